"""Classes: one of several, one of two, or any number of several labels."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from embattle import losses
from embattle.criteria import Criterion, Misclassify, MultiLabel
from embattle.tasks.kinds.base import Kind
from embattle.tasks.kinds.weighted import F1, Area, Mean, MeanOf, Measure, at_once

# The label of what is not known.
_UNKNOWN = -100

# Bins of the expected calibration error, as Guo et al. (2017) have them.
BINS = 15


def _areas(logits: Tensor, true: Tensor) -> list[Area]:
    """Give the area of each class against the rest (of two classes one); none if one is absent.

    Samples are ordered by the logarithm of the odds: probabilities near 1 are equal to a float.
    """
    if not true.any(0).all():
        return []
    logits, classes = logits.double(), range(logits.shape[1])
    rest = [torch.cat([logits[:, :c], logits[:, c + 1 :]], 1).logsumexp(1) for c in classes]
    areas = [Area(logits[:, c] - rest[c], true[:, c]) for c in classes]
    return areas[1:] if len(areas) == 2 else areas


@dataclass(frozen=True)
class Classification(Kind):
    """One of several classes: logits [B, C], or one logit [B] or [B, 1] of a binary decision.

    Args:
        classes: the names of the classes by number; without them the numbers are shown.
    """

    classes: tuple[str, ...] = ()

    measures: ClassVar[tuple[tuple[str, str], ...]] = (
        ("accuracy", "accuracy"),
        ("f1", "F1"),
        ("auc", "AUC"),
    )
    note: ClassVar[str] = "F1 is the mean over the classes."
    shown: ClassVar[str] = "confidence in the true label"
    graded: ClassVar[bool] = False

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Give the cross-entropy."""
        return losses.cross_entropy(outputs, labels)

    def criterion(self, labels: Tensor) -> Criterion:
        """Give the goal of a wrong class.

        Raises:
            ValueError: a sample has several labels, which the measures do not count.
        """
        if labels.dim() > 1 and labels.shape[-1] > 1:
            raise ValueError(
                f"{type(self).__name__}: a sample has one class, and labels are "
                f"{tuple(labels.shape)}. Where each token has one, an attack tells the share of "
                "tokens that are right: "
                "attack.run(..., criterion=Misclassify(labels)).robust_accuracy"
            )
        return Misclassify(labels)

    def _scores(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        """Accuracy, F1 and area under the ROC curve, means over classes; NaN if one is absent."""
        found = at_once(self.weighted(outputs, labels), labels)
        return {"accuracy": found["accuracy"], "f1": found["f1"], "auc": found.get("auc", math.nan)}

    def weighted(self, outputs: Tensor, labels: Tensor) -> Mapping[str, Measure]:
        """Give accuracy, F1, AUC (where no class is absent) and the loss."""
        logits, predicted, true = self._told(outputs, labels)
        found: dict[str, Measure] = {
            "accuracy": Mean((predicted & true).any(1)),
            "f1": F1(predicted, true),
        }
        areas = _areas(logits, true)
        if areas:
            found["auc"] = MeanOf(areas, every=True)
        return found | {"loss": Mean(self.losses(losses.wide(outputs), labels))}

    def details(self, outputs: Tensor, labels: Tensor) -> dict[str, Any]:
        """Give precision, recall, F1 and count of each class, and the calibration.

        `ece` is the expected calibration error of the predicted class's probability in 15 bins of
        equal width (Guo et al., "On calibration of modern neural networks", ICML 2017, equation 3),
        `brier` the mean of the squared errors of all probabilities, summed over the classes
        (Brier, Monthly Weather Review 78, 1950, equation 2): of two classes twice what is often
        said of the positive one alone.
        """
        logits, predicted, true = self._told(outputs, labels)
        shares = logits.double().softmax(1)
        ece = _calibration_error(shares.amax(1), (predicted & true).any(1))
        brier = float((shares - true.double()).square().sum(1).mean())
        names = [self._name(c) for c in range(true.shape[1])]
        return {
            "per_class": _per_class(names, predicted, true),
            "calibration": {"ece": ece, "brier": brier},
        }

    def describe(self, outputs: Tensor) -> list[dict[str, Any]]:
        """Give `prediction`, the class, `confidence`, its probability, and that of each class."""
        shares = losses.two_sided(outputs).softmax(1)
        found = []
        for row, number in zip(shares.tolist(), shares.argmax(1).tolist(), strict=True):
            every = {f"probability_{self._name(n)}": share for n, share in enumerate(row)}
            found.append({"prediction": self._name(number), "confidence": row[number], **every})
        return found

    def show(self, output: Tensor, label: Tensor) -> str:
        """Show the probability of the true class."""
        shares = losses.two_sided(output[None]).softmax(1)[0]
        return f"{float(shares[label]):.0%}"

    def show_label(self, label: Tensor) -> str:
        """Show the class."""
        return self._name(int(label))

    def chance(self, labels: Tensor) -> float:
        """Give the share of the most frequent class."""
        return max(Counter(labels.tolist()).values()) / len(labels)

    def learnt_nothing(self, outputs: Tensor, labels: Tensor) -> bool:
        """Tell whether the classes' shares, as the answer for all, would be no worse.

        Neither in how many are right nor, but for a thousandth, in the loss, which for a rare class
        tells more.
        """
        shares = torch.bincount(labels.long()).double() / len(labels)
        loss = float(torch.special.entr(shares).sum())
        right = float(self.right(outputs, labels).double().mean())
        found = float(self.losses(outputs, labels).double().mean())
        return right <= self.chance(labels) and found >= 0.999 * loss

    def _told(self, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [N, C], and whether each class is predicted, and true, bool [N, C]."""
        logits = losses.two_sided(losses.wide(outputs))
        count = logits.shape[1]
        predicted = losses.one_hot(losses.predict(logits), count)
        return logits, predicted, losses.one_hot(labels, count)

    def _name(self, number: int) -> str:
        return self.classes[number] if self.classes else str(number)


@dataclass(frozen=True)
class BinaryClassification(Classification):
    """One of two classes, judged by its probability too: clicks, risks."""

    measures: ClassVar[tuple[tuple[str, str], ...]] = (
        ("accuracy", "accuracy"),
        ("auc", "AUC"),
        ("loss", "log loss"),
    )
    note: ClassVar[str] = "Log loss is the mean cross-entropy."
    graded: ClassVar[bool] = True


@dataclass(frozen=True)
class MultiLabelClassification(Kind):
    """Any number of several labels: logits [B, C], labels 0 or 1, or -100: not known, [B, C].

    A label that is not known counts in no measure.

    Args:
        labels: the names of the labels; without them their numbers are shown.
    """

    labels: tuple[str, ...] = ()

    measures: ClassVar[tuple[tuple[str, str], ...]] = (
        ("all_right", "all right"),
        ("f1", "F1"),
        ("auc", "AUC"),
    )
    note: ClassVar[str] = (
        "All right: no label is wrong. F1 and AUC are means over the labels; under attack, of the "
        "point that counts for a sample: a wrong label first, then the largest loss."
    )
    shown: ClassVar[str] = "labels that are right"

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Give the binary cross-entropy, averaged over the labels that are known."""
        values = F.binary_cross_entropy_with_logits(outputs, labels.to(outputs), reduction="none")
        return losses.per_counted(values, labels != _UNKNOWN)

    def criterion(self, labels: Tensor) -> Criterion:
        """Give the goal of any wrong label."""
        return MultiLabel(labels, ignore_index=_UNKNOWN)

    def _scores(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        """Share without a wrong label; F1 and AUC, averaged over labels (AUC: with both values)."""
        return at_once(self.weighted(outputs, labels), labels)

    def weighted(self, outputs: Tensor, labels: Tensor) -> Mapping[str, Measure]:
        """Give the share without a wrong label, F1, AUC and the loss."""
        outputs, true, known = losses.wide(outputs), labels == 1, labels != _UNKNOWN
        areas = [Area(outputs[:, c], true[:, c], known[:, c]) for c in range(outputs.shape[1])]
        return {
            "all_right": Mean(self.right(outputs, labels)),
            "f1": F1((outputs.sigmoid() > 0.5) & known, true, absent=0.0),
            "auc": MeanOf(areas),
            "loss": Mean(self.losses(outputs, labels)),
        }

    def details(self, outputs: Tensor, labels: Tensor) -> dict[str, Any]:
        """Give precision, recall, F1 and count of each label, and the calibration.

        `ece` and `brier` are those of one label's probability, over all samples and labels.
        """
        shares, true, known = losses.wide(outputs).sigmoid(), labels == 1, labels != _UNKNOWN
        names = self._names(torch.ones(shares.shape[1]))
        brier = float((shares.double() - true.double())[known].square().mean())
        return {
            "per_class": _per_class(names, (shares > 0.5) & known, true),
            "calibration": {"ece": _calibration_error(shares[known], true[known]), "brier": brier},
        }

    def describe(self, outputs: Tensor) -> list[dict[str, Any]]:
        """Give `prediction`, the names of the predicted labels, and the probability of each."""
        every = self._names(torch.ones(outputs.shape[1]))
        return [
            {
                "prediction": self._names(row > 0),
                **{f"probability_{x}": p for x, p in zip(every, shares, strict=True)},
            }
            for row, shares in zip(outputs, outputs.sigmoid().tolist(), strict=True)
        ]

    def show(self, output: Tensor, label: Tensor) -> str:
        """Show how many labels are right, of how many that are known."""
        known = label != _UNKNOWN
        return f"{int((((output > 0) == (label == 1)) & known).sum())} of {int(known.sum())}"

    def show_label(self, label: Tensor) -> str:
        """Show the labels that are there."""
        return ", ".join(self._names(label == 1)) or "none"

    def _names(self, chosen: Tensor) -> list[str]:
        numbers = chosen.nonzero().flatten().tolist()
        return [self.labels[n] if self.labels else str(n) for n in numbers]


def _per_class(
    names: Sequence[str], predicted: Tensor, true: Tensor
) -> dict[str, dict[str, float]]:
    """The report of each class, from where it is predicted and where it is true, bool [N, C].

    A share of nothing is 0, as scikit-learn's report has it.
    """
    found: dict[str, dict[str, float]] = {}
    counts = torch.stack([(predicted & true).sum(0), predicted.sum(0), true.sum(0)], dim=1)
    for name, (hits, named, there) in zip(names, counts.tolist(), strict=True):
        found[name] = {
            "precision": hits / max(1, named),
            "recall": hits / max(1, there),
            "f1": 2 * hits / max(1, named + there),
            "count": there,
        }
    return found


def _calibration_error(confidence: Tensor, right: Tensor) -> float:
    """The expected calibration error of probabilities, [n], beside what came true, bool [n].

    A bin holds its upper edge, the first one 0 too. NaN where a probability is.
    """
    confidence = confidence.double()
    places = (confidence * BINS).nan_to_num().ceil().clamp(1, BINS).long() - 1
    gaps = confidence.new_zeros(BINS).index_add_(0, places, right.double() - confidence)
    return float(gaps.abs().sum() / len(confidence))
