"""What an attack ascends, and when it has succeeded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor

from embattle import losses
from embattle.perturb.stage import Evaluation

Predict: TypeAlias = Callable[[Tensor], Tensor]
Ascend: TypeAlias = Literal["loss", "kl", "symmetric_kl", "squared_distance", "dlr", "margin"]

ASCENDS: tuple[Ascend, ...] = ("loss", "kl", "symmetric_kl", "squared_distance", "dlr", "margin")
DIVERGENCES = {
    "kl": losses.kl,
    "symmetric_kl": losses.symmetric_kl,
    "squared_distance": losses.squared_distance,
}
_OF_LABELS = {"dlr": losses.dlr, "margin": losses.margin}


@dataclass
class Judge:
    """Knows the labels, the clean outputs, and how outputs become predictions.

    Attributes:
        labels: `[B]`, or None.
        predictions: from outputs to predictions; the largest logit by default.
        clean: the model's outputs without perturbation, detached, where they are known.
    """

    labels: Tensor | None = None
    predictions: Predict | None = None
    clean: Tensor | None = None

    def values(self, evaluation: Evaluation, ascend: Ascend) -> Tensor:
        """Give what is ascended, `[B]`.

        Raises:
            ValueError: outputs, labels or clean outputs are needed and unknown.
        """
        if ascend == "loss":
            return evaluation.losses
        if evaluation.outputs is None:
            raise ValueError(
                f"ascend={ascend!r} needs outputs: let loss_fn return (losses, logits)"
            )
        if ascend in DIVERGENCES:
            if self.clean is None:
                raise ValueError(f"ascend={ascend!r} needs the clean outputs, and none were made")
            return DIVERGENCES[ascend](self.clean, evaluation.outputs)
        if self.labels is None:
            raise ValueError(f"ascend={ascend!r} needs labels")
        return _OF_LABELS[ascend](evaluation.outputs, self.labels)

    def predict(self, evaluation: Evaluation) -> Tensor | None:
        """Give the predictions, or None if the loss function returned no outputs."""
        if evaluation.outputs is None:
            return None
        return (self.predictions or losses.predict)(evaluation.outputs)

    def fooled(self, evaluation: Evaluation) -> Tensor | None:
        """Give bool `[B]`: wrong now. None without labels or outputs."""
        predicted = self.predict(evaluation)
        if predicted is None or self.labels is None:
            return None
        return _any_per_sample(predicted != self.labels)

    def success(self, clean: Evaluation, now: Evaluation) -> Tensor | None:
        """Give bool `[B]`: the attack flipped the prediction (of what was right, given labels)."""
        before, after = self.predict(clean), self.predict(now)
        if before is None or after is None:
            return None
        if self.labels is None:
            return _any_per_sample(before != after)
        right = ~_any_per_sample(before != self.labels)
        return right & _any_per_sample(after != self.labels)


def _any_per_sample(wrong: Tensor) -> Tensor:
    return wrong if wrong.dim() == 1 else wrong.flatten(1).any(1)
