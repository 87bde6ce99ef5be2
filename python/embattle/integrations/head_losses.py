"""What the models of transformers are trained on, sample by sample.

A model of theirs gives one loss for a batch, usually a mean over all labels of it. An attack needs
one loss for each sample; here they are computed from the model's outputs, so that their mean over
the batch is the model's loss.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES,
)

from embattle.criteria import Criterion, Misclassify, MultiLabel
from embattle.losses import per_sample, wide
from embattle.perturb.evaluation import Evaluation

IGNORED = -100
_HEADS = ("start_logits", "end_logits")
_SINGLE = "single_label_classification"
Inputs: TypeAlias = dict[str, Any]
# From a model's outputs and the batch to losses [B].
LossPerSample: TypeAlias = Callable[[Any, Inputs], Tensor]


class HeadLoss(ABC):
    """What a model is trained on.

    Attributes:
        name: in words, for errors.
    """

    name: str

    @abstractmethod
    def evaluate(self, outputs: Any, inputs: Inputs) -> Evaluation:
        """Give losses `[B]` whose mean is the mean over all labels of the batch, and outputs."""

    def counted(self, inputs: Inputs) -> Tensor | None:
        """Count the labels that the mean is over, 0-d; None where models take no other mean."""
        return None

    def criterion(self, inputs: Inputs) -> Criterion | None:
        """Give the goal that belongs to the labels; None if it takes more than labels to say it."""
        return None


@dataclass(frozen=True)
class Classes(HeadLoss):
    """Class numbers: of a sample, of its tokens, of its choices.

    Args:
        shift: the logits at a place predict the label of the next one.
        smoothing: the share of the uniform distribution in the targets.
        before: how many places of the logits come before the first label: peft's virtual tokens.
    """

    shift: bool = False
    smoothing: float = 0.0
    before: int = 0

    @property
    def name(self) -> str:  # type: ignore[override]
        """In words."""
        parts = ["the cross-entropy of its logits"]
        parts += ["with labels one place ahead"] if self.shift else []
        parts += [f"smoothed by {self.smoothing:g}"] if self.smoothing else []
        return ", ".join(parts)

    def evaluate(self, outputs: Any, inputs: Inputs) -> Evaluation:
        """Average over all labels that count; a sample has its own labels' share of that."""
        logits = outputs.logits
        logits = logits[:, :-1] if self.shift else logits
        labels = self._labels(inputs)
        labels = labels.reshape(logits.shape[:-1]).to(logits.device)
        values = F.cross_entropy(
            wide(logits).flatten(0, -2),
            labels.reshape(-1),
            reduction="none",
            ignore_index=IGNORED,
            label_smoothing=self.smoothing,
        ).reshape(labels.shape)
        return Evaluation(_shares(values, labels != IGNORED), logits)

    def counted(self, inputs: Inputs) -> Tensor:
        """Count the labels that are not ignored."""
        return (self._labels(inputs) != IGNORED).sum()

    def criterion(self, inputs: Inputs) -> Criterion:
        """Give the goal of a wrong class anywhere."""
        labels = self._labels(inputs)
        if not self.shift and labels.dim() == 2 and labels.shape[1] == 1:
            labels = labels.squeeze(1)
        return Misclassify(labels, ignore_index=IGNORED)

    def _labels(self, inputs: Inputs) -> Tensor:
        labels: Tensor = inputs["labels"]
        if self.before:
            labels = F.pad(labels, (self.before, 0), value=IGNORED)
        return labels[:, 1:] if self.shift else labels


@dataclass(frozen=True)
class Labels(HeadLoss):
    """Several labels for each sample, 0 or 1."""

    name = "the binary cross-entropy of its logits"

    def evaluate(self, outputs: Any, inputs: Inputs) -> Evaluation:
        """Average over each sample's labels."""
        logits, labels = outputs.logits, inputs["labels"].to(outputs.logits.device)
        values = F.binary_cross_entropy_with_logits(
            wide(logits), labels.to(wide(logits).dtype), reduction="none"
        )
        return Evaluation(per_sample(values), logits)

    def criterion(self, inputs: Inputs) -> Criterion:
        """Give the goal of any wrong label."""
        return MultiLabel(inputs["labels"])


@dataclass(frozen=True)
class Values(HeadLoss):
    """A regression, on labels in floating point or integers."""

    name = "the squared error of its logits"

    def evaluate(self, outputs: Any, inputs: Inputs) -> Evaluation:
        """Average over each sample's values."""
        labels = inputs["labels"].to(outputs.logits.device)
        values = outputs.logits.reshape(labels.shape)
        return Evaluation(per_sample((wide(values) - labels).square()), values)


@dataclass(frozen=True)
class Spans(HeadLoss):
    """Where the answer to a question starts and ends; places outside of the text do not count."""

    name = "the cross-entropy of its start and end logits"

    def evaluate(self, outputs: Any, inputs: Inputs) -> Evaluation:
        """Average the starts, and the ends, that count."""
        logits = torch.stack([outputs.start_logits, outputs.end_logits], dim=1)
        labels = self._labels(inputs, logits.shape[-1]).to(logits.device)
        values = F.cross_entropy(
            wide(logits).flatten(0, 1),
            labels.flatten(),
            reduction="none",
            ignore_index=IGNORED,
        ).reshape(labels.shape)
        kept = labels != IGNORED
        start, end = (_shares(values[:, i], kept[:, i]) for i in (0, 1))
        return Evaluation((start + end) / 2, logits)

    def criterion(self, inputs: Inputs) -> Criterion | None:
        """Give the goal of a wrong start or end."""
        if "input_ids" not in inputs:
            return None
        return Misclassify(self._labels(inputs, inputs["input_ids"].shape[-1]))

    def _labels(self, inputs: Inputs, length: int) -> Tensor:
        """Starts and ends `[B, 2]`, clamped as the models do it."""
        both = [inputs[name].reshape(-1) for name in ("start_positions", "end_positions")]
        places = torch.stack(both, dim=1).clamp(min=0)
        return places.masked_fill(places >= length, IGNORED)


@dataclass(frozen=True)
class Given(HeadLoss):
    """Losses that the user's function gives.

    Args:
        losses: the function.
        usual: what is known of such a batch otherwise, for outputs and the goal.
    """

    losses: LossPerSample
    usual: HeadLoss | None
    name = "loss_per_sample"

    def evaluate(self, outputs: Any, inputs: Inputs) -> Evaluation:
        """Give the function's losses."""
        losses = self.losses(outputs, inputs)
        if self.usual is not None:
            return Evaluation(losses, self.usual.evaluate(outputs, inputs).outputs)
        logits = getattr(outputs, "logits", None)
        return Evaluation(losses, logits if isinstance(logits, Tensor) else None)

    def criterion(self, inputs: Inputs) -> Criterion | None:
        """Give the usual goal."""
        return None if self.usual is None else self.usual.criterion(inputs)


def head_loss_of(
    model: Any, outputs: Any, inputs: Inputs, smoothing: float | None
) -> HeadLoss | None:
    """Tell what a model is trained on with such a batch; None where that is not known.

    Args:
        model: of transformers, or one that returns logits as those do. It has been run: its
            `config.problem_type` is set.
        outputs: what it returned.
        inputs: the batch.
        smoothing: the Trainer's label smoothing, which then computes the loss; None without it.
    """
    labels, logits = inputs.get("labels"), getattr(outputs, "logits", None)
    if not isinstance(labels, Tensor):
        names = ("start_positions", "end_positions")
        found = all(isinstance(inputs.get(name), Tensor) for name in names)
        heads = all(isinstance(getattr(outputs, n, None), Tensor) for n in _HEADS)
        return Spans() if found and heads else None
    if not isinstance(logits, Tensor) or logits.dim() < 2 or labels.dim() < 1:
        return None
    integers = not labels.is_floating_point()
    if smoothing is not None:
        shift = type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        return Classes(shift, smoothing) if integers else None
    if logits.dim() > 2:
        if not integers or labels.dim() != logits.dim() - 1:
            return None
        before = logits.shape[-2] - labels.shape[-1]
        places = before >= 0 and labels.shape[:-1] == logits.shape[:-2]
        return Classes(_shifts(model), before=before) if places else None
    problem = _problem(model, logits, labels, inputs)
    if problem == "regression" and labels.numel() == logits.numel():
        return Values()
    if problem == "multi_label_classification" and labels.shape == logits.shape:
        return Labels()
    if problem == _SINGLE and integers and labels.numel() == len(logits):
        return Classes()
    return None


def _problem(model: Any, logits: Tensor, labels: Tensor, inputs: Inputs) -> str:
    """Tell which loss logits `[B, C]` have, as the models tell it."""
    tokens = inputs.get("input_ids")
    choices = isinstance(tokens, Tensor) and tokens.dim() == 3
    if choices or _is_one_of(model, MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES):
        return _SINGLE
    named = getattr(getattr(model, "config", None), "problem_type", None)
    if isinstance(named, str):
        return named
    if logits.shape[1] == 1:
        return "regression"
    return "multi_label_classification" if labels.is_floating_point() else _SINGLE


def _shifts(model: Any) -> bool:
    """Whether a model's loss moves the labels by one place: it predicts what follows."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    if _is_one_of(model, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        return True
    return LOSS_MAPPING.get(getattr(model, "loss_type", None) or "") is ForCausalLMLoss


def _is_one_of(model: Any, names: Any) -> bool:
    known = set(names.values())
    return any(kind.__name__ in known for kind in type(model).__mro__)


def _shares(values: Tensor, kept: Tensor) -> Tensor:
    """Sum each sample's values, scaled so that the batch's mean is one over all that are kept."""
    total = torch.where(kept, values, torch.zeros_like(values)).reshape(len(values), -1).sum(1)
    return total * (len(values) / kept.sum().clamp(min=1))
