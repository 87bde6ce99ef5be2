"""Goals about classes: a wrong one, a given one, wrong labels among several."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from embattle import checks, losses
from embattle.criteria.base import (
    Criterion,
    any_of,
    constant,
    integers,
    largest,
    require,
    required_outputs,
)
from embattle.perturb.evaluation import Evaluation

_OF_LABELS = {"cross_entropy": losses.cross_entropy, "margin": losses.margin, "dlr": losses.dlr}
_LEAST = -(2**63)


class _Labelled(Criterion):
    """A wrong answer to labels, of which those that are `ignore_index` do not count."""

    labels: Tensor
    ignore_index: int

    per_sample: ClassVar[tuple[str, ...]] = ("labels",)
    needs_outputs: ClassVar[bool] = True

    @abstractmethod
    def wrong(self, outputs: Tensor) -> Tensor:
        """Return True where a prediction is not the label, in the labels' shape (checked)."""

    def reached(self, now: Evaluation, clean: Evaluation | None) -> Tensor:
        """Return True where a label that counts is not predicted."""
        return any_of(self._missed(now))

    def accuracy(self, now: Evaluation) -> Tensor:
        """Return the share of labels that are predicted, of those that count."""
        count = self._kept.sum()
        return (count - self._missed(now).sum()) / count

    def counted(self, evaluation: Evaluation) -> Tensor:
        """Return True where a sample has a label that counts."""
        return any_of(self._kept)

    @property
    def _kept(self) -> Tensor:
        return self.labels != self.ignore_index

    def _missed(self, now: Evaluation) -> Tensor:
        return self.wrong(required_outputs(type(self).__name__, now)) & self._kept


@dataclass(frozen=True, eq=False, repr=False)
class Misclassify(_Labelled):
    """A wrong class: reached where any label of a sample that counts is not predicted.

    Outputs are logits `[B, C]` with labels `[B]`; one logit of a binary decision, `[B]` or
    `[B, 1]`, with labels `[B]` in {0, 1}; or sequences `[B, ..., C]` with labels `[B, ...]`. The
    predicted class is the largest logit. A sample whose labels are all `ignore_index` counts
    neither as reached nor as right.

    Args:
        labels: class numbers, integers or bool, of the outputs' shape without the class dim.
        ignore_index: the label of what does not count.
        ascend: `"loss"`: the losses that the loss function returns, or the cross-entropy of the
            outputs if it returns none; `"cross_entropy"`, `"margin"`, `"dlr"`: see
            `embattle.losses`. The cross-entropy of saturated logits has no gradient, the margin
            has.

    Raises:
        TypeError: labels are no tensor, or `ignore_index` is no integer.
        ValueError: labels are no integers, or `ascend` is unknown.
    """

    labels: Tensor
    ignore_index: int = -100
    ascend: Literal["loss", "cross_entropy", "margin", "dlr"] = "loss"

    def __post_init__(self) -> None:
        _set(self, "labels", integers("Misclassify", "labels", self.labels))
        checks.integer("Misclassify", "ignore_index", self.ignore_index, _LEAST)
        checks.one_of("Misclassify", "ascend", self.ascend, ("loss", *_OF_LABELS))

    def check(self, clean: Evaluation) -> None:
        """Check the labels' shape and values, and that `ascend` is one for these outputs.

        Raises:
            ValueError: labels of another shape, a label that is no class, or "dlr" with fewer than
                three classes.
        """
        outputs = logits("Misclassify", clean)
        losses.check_labels("Misclassify", outputs, self.labels)
        super().check(clean)
        classes = losses.classes(outputs)
        if self.ascend == "dlr" and classes < 3:
            raise ValueError(
                f"Misclassify: ascend='dlr' needs at least three classes, got outputs "
                f"{tuple(outputs.shape)}; use ascend='margin'"
            )
        labels = self.labels
        hint = ""
        if classes == 2:
            hint = "; ratings and other values are a matter for embattle.Deviate"
        if outputs.shape == (classes, classes):
            hint += (
                "; where the classes are the batch's own samples (negatives of the batch), the "
                "labels of a part of it are other numbers: attack whole batches (form='mixed', not "
                "'partial'; no subset=)"
            )
        require(
            ((labels >= 0) & (labels < classes)) | (labels == self.ignore_index),
            labels,
            f"Misclassify: labels must lie in [0, {classes}) for outputs {tuple(outputs.shape)}, "
            f"or be ignore_index={self.ignore_index}{hint}",
        )

    def objective(self, now: Evaluation, clean: Evaluation | None) -> Tensor:
        """Return the losses, or what `ascend` names."""
        if self.ascend == "loss":
            if now.losses is not None:
                return now.losses
            value = losses.cross_entropy
        else:
            value = _OF_LABELS[self.ascend]
        return value(
            required_outputs("Misclassify", now), self.labels, ignore_index=self.ignore_index
        )

    def predict(self, outputs: Tensor) -> Tensor:
        """Return the class with the largest logit, of the labels' shape; -1 where one is NaN."""
        return losses.predict(outputs)

    def wrong(self, outputs: Tensor) -> Tensor:
        """Return True where the class is another one, or none (a logit is NaN)."""
        losses.check_labels("Misclassify", outputs, self.labels)
        return losses.predict(outputs) != self.labels


@dataclass(frozen=True, eq=False, repr=False)
class Target(Criterion):
    """A class that is to be predicted: reached where it is, at every place of a sequence.

    Args:
        classes: the class for all samples and places, or integers of the outputs' shape without the
            class dim: `[B]`, or `[B, ...]` for sequences.
        ascend: `"cross_entropy"` or `"margin"`, towards the class.
        ignore_index: the class of places where the prediction does not matter, such as padding. A
            sample that has no other place is never reached.

    Raises:
        TypeError: classes are neither an integer nor a tensor, or `ignore_index` is no integer.
        ValueError: classes are no integers, or `ascend` is unknown.
    """

    classes: int | Tensor
    ascend: Literal["cross_entropy", "margin"] = "cross_entropy"
    ignore_index: int = -100

    per_sample: ClassVar[tuple[str, ...]] = ("classes",)
    needs_outputs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.classes, Tensor):
            _set(self, "classes", integers("Target", "classes", self.classes))
        else:
            _set(self, "classes", checks.integer("Target", "classes", self.classes, 0))
        checks.one_of("Target", "ascend", self.ascend, ("cross_entropy", "margin"))
        checks.integer("Target", "ignore_index", self.ignore_index, _LEAST)

    def check(self, clean: Evaluation) -> None:
        """Check the classes' shape and values.

        Raises:
            ValueError: another shape, or no class of the outputs.
        """
        outputs = logits("Target", clean)
        classes, count = self._classes(outputs), losses.classes(outputs)
        super().check(clean)
        message = f"Target: classes must lie in [0, {count}) for outputs {tuple(outputs.shape)}"
        if isinstance(self.classes, Tensor):
            good = ((classes >= 0) & (classes < count)) | (classes == self.ignore_index)
            require(good, classes, f"{message}, or be ignore_index={self.ignore_index}")
        elif self.classes >= count:
            raise ValueError(f"{message}; got {self.classes}")

    def objective(self, now: Evaluation, clean: Evaluation | None) -> Tensor:
        """Return the negative cross-entropy or margin of the target class."""
        outputs = required_outputs("Target", now)
        value = _OF_LABELS[self.ascend]
        return -value(outputs, self._classes(outputs), ignore_index=self.ignore_index)

    def reached(self, now: Evaluation, clean: Evaluation | None) -> Tensor:
        """Return True where the target class is predicted at all places that count."""
        outputs = required_outputs("Target", now)
        classes = self._classes(outputs)
        kept = classes != self.ignore_index
        missed = any_of((losses.predict(outputs) != classes) & kept)
        return any_of(kept) & missed.logical_not()

    def predict(self, outputs: Tensor) -> Tensor:
        """Return the class with the largest logit; -1 where one is NaN."""
        return losses.predict(outputs)

    def counted(self, evaluation: Evaluation) -> Tensor | None:
        """Return True where a sample has a target at any place."""
        if isinstance(self.classes, int):
            return None
        return any_of(self.classes != self.ignore_index)

    def _classes(self, outputs: Tensor) -> Tensor:
        if isinstance(self.classes, int):
            shape = outputs.shape if outputs.dim() == 1 else outputs.shape[:-1]
            return torch.full(shape, self.classes, device=outputs.device)
        losses.check_labels("Target", outputs, self.classes)
        return self.classes


@dataclass(frozen=True, eq=False, repr=False)
class MultiLabel(_Labelled):
    """A wrong label among several: reached where any label of a sample that counts is wrong.

    Outputs `[B, C]` (or of any other shape) are one logit for each label; a label is predicted
    where the sigmoid of its logit is above the threshold.

    Args:
        labels: 0 and 1, of the outputs' shape; integers, bool or floating point.
        threshold: of the sigmoid, in (0, 1).
        ascend: `"loss"`: the losses that the loss function returns, or the binary cross-entropy if
            it returns none; `"bce"`: that, averaged over the labels that count; `"margin"`: how far
            the worst logit is on the wrong side of the threshold, above 0 where one is.
        ignore_index: the label of what does not count.

    Raises:
        TypeError: labels are no tensor, or an argument is of the wrong type.
        ValueError: a label is neither 0 nor 1, the threshold is outside (0, 1), or `ascend` is
            unknown.
    """

    labels: Tensor
    threshold: float = 0.5
    ascend: Literal["loss", "bce", "margin"] = "loss"
    ignore_index: int = -100

    def __post_init__(self) -> None:
        if not isinstance(self.labels, Tensor):
            kind = type(self.labels).__name__
            raise TypeError(f"MultiLabel: labels must be a tensor, got {kind}")
        # Floating point stays: rounding would hide that labels are not 0 and 1.
        labels = self.labels if self.labels.is_floating_point() else self.labels.long()
        _set(self, "labels", constant(labels))
        threshold = checks.real("MultiLabel", "threshold", self.threshold, 0, 1)
        if threshold in (0.0, 1.0):
            raise ValueError(f"MultiLabel: threshold must lie inside (0, 1), got {threshold:g}")
        _set(self, "threshold", threshold)
        checks.one_of("MultiLabel", "ascend", self.ascend, ("loss", "bce", "margin"))
        checks.integer("MultiLabel", "ignore_index", self.ignore_index, _LEAST)
        labels = self.labels
        require(
            (labels == 0) | (labels == 1) | (labels == self.ignore_index),
            labels,
            f"MultiLabel: labels must be 0, 1 or ignore_index={self.ignore_index}; one class "
            "number for each sample is a matter for embattle.Misclassify",
        )

    def check(self, clean: Evaluation) -> None:
        """Check the labels' shape.

        Raises:
            ValueError: another shape than the outputs'.
        """
        outputs = logits("MultiLabel", clean)
        self._check_shape(outputs)
        super().check(clean)

    def objective(self, now: Evaluation, clean: Evaluation | None) -> Tensor:
        """Return the losses, or what `ascend` names."""
        if self.ascend == "loss" and now.losses is not None:
            return now.losses
        outputs = required_outputs("MultiLabel", now)
        self._check_shape(outputs)
        positive, kept = self.labels == 1, self._kept
        if self.ascend == "margin":
            beyond = outputs - math.log(self.threshold / (1 - self.threshold))
            wrong = torch.where(positive, -beyond, beyond)
            worst = largest(torch.where(kept, wrong, -math.inf))
            return torch.where(any_of(kept), worst, 0.0)
        entropies = -F.logsigmoid(torch.where(positive, outputs, -outputs))
        return losses.per_counted(entropies, kept)

    def predict(self, outputs: Tensor) -> Tensor:
        """Return 1 where the sigmoid is above the threshold, else 0 (-1 for a NaN); their shape."""
        above = (outputs.sigmoid() > self.threshold).long()
        return above.masked_fill(outputs.isnan(), -1)

    def wrong(self, outputs: Tensor) -> Tensor:
        """Return True where the logit is on the wrong side, or no number."""
        self._check_shape(outputs)
        return self.predict(outputs) != (self.labels == 1)

    def _check_shape(self, outputs: Tensor) -> None:
        if self.labels.shape != outputs.shape:
            raise ValueError(
                "MultiLabel: labels must be 0 or 1 for each of the outputs, of their shape "
                f"{tuple(outputs.shape)}; got labels {tuple(self.labels.shape)}. One class number "
                "for each sample is a matter for embattle.Misclassify"
            )


def logits(who: str, evaluation: Evaluation) -> Tensor:
    """Return the outputs, which must be logits.

    Raises:
        ValueError: there are none, or they are no floating-point numbers.
    """
    outputs = required_outputs(who, evaluation)
    if not outputs.is_floating_point():
        raise ValueError(
            f"{who}: outputs must be logits in floating point, got {tuple(outputs.shape)} of "
            f"{outputs.dtype}; predictions have no gradient"
        )
    return outputs


def _set(criterion: Criterion, name: str, value: Any) -> None:
    object.__setattr__(criterion, name, value)
