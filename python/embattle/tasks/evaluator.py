"""What an attack and an audit need to know of a model: how it is run, and what is right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from embattle.criteria import Criterion
from embattle.data.batch import Batch
from embattle.losses import wide
from embattle.perturb.evaluation import Evaluation
from embattle.tasks.kinds import Classification, Kind


class Evaluator:
    """Runs a model on batches, and knows what an attack on a batch is for.

    As it is, it serves models that are called as `model(**batch.inputs)`, and return outputs, or
    something that has them as `logits`: an attribute, or a dict's key.

    Args:
        kind: what the model predicts; classes by default.
    """

    kind: Kind

    def __init__(self, kind: Kind | None = None) -> None:
        self.kind = Classification() if kind is None else kind

    def evaluate(self, model: nn.Module, batch: Batch) -> Evaluation:
        """Run the model, with a graph.

        Returns:
            Losses [B] (None if the batch has no labels), and outputs [B, ...] in float32 at least.

        Raises:
            TypeError: the model returns no outputs.
        """
        found: Any = model(**batch.inputs)
        outputs = found.get("logits") if isinstance(found, Mapping) else found
        outputs = getattr(outputs, "logits", outputs)
        if not isinstance(outputs, Tensor):
            has = f" with {', '.join(map(str, found))}" if isinstance(found, Mapping) else ""
            raise TypeError(
                f"the model returned a {type(found).__name__}{has}, and which are its outputs is "
                "not known; let it return them, or something that has them as logits, or give an "
                "Evaluator of your own"
            )
        outputs = wide(outputs)
        losses = None if batch.labels is None else self.kind.losses(outputs, batch.labels)
        return Evaluation(losses, outputs)

    def criterion(self, batch: Batch) -> Criterion:
        """Give what an attack on the batch is for: reached where a sample is wrong."""
        return self.kind.criterion(batch.known_labels())

    def mask(self, batch: Batch) -> Any:
        """Give what may move, as `Attack.run` takes it; None: everything."""
        return batch.movable
