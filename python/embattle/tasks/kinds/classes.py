"""Classes: one of several, one of two, or any number of several labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from embattle import losses
from embattle.criteria import Criterion, Misclassify, MultiLabel
from embattle.errors import need
from embattle.tasks.kinds.base import Kind
from embattle.tasks.kinds.weighted import F1, Area, Mean, MeanOf, Measure

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


def _mean(areas: Sequence[Measure], labels: Tensor) -> float:
    if not areas:
        return float("nan")
    return float(MeanOf(list(areas))(torch.ones_like(labels, dtype=torch.double)[None]))


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
        """Give the goal of a wrong class."""
        return Misclassify(labels)

    def _scores(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        """Accuracy, F1 and area under the ROC curve, means over classes; NaN if one is absent."""
        metrics = need("torchmetrics.functional.classification")
        logits = losses.two_sided(outputs)
        count = logits.shape[1]
        f1 = metrics.multiclass_f1_score(logits, labels, num_classes=count, average="macro")
        areas = _areas(logits, F.one_hot(labels, count).bool())
        return {
            "accuracy": float(self.right(outputs, labels).float().mean()),
            "f1": float(f1),
            "auc": _mean(areas, labels),
        }

    def weighted(self, outputs: Tensor, labels: Tensor) -> Mapping[str, Measure]:
        """Give accuracy, F1, AUC (where no class is absent) and the loss."""
        logits = losses.two_sided(outputs.float())
        count, predicted = logits.shape[1], logits.argmax(1)
        true = F.one_hot(labels, count).bool()
        found: dict[str, Measure] = {
            "accuracy": Mean(self.right(outputs, labels)),
            "f1": F1(F.one_hot(predicted, count).bool(), true),
        }
        areas = _areas(logits, true)
        if areas:
            found["auc"] = MeanOf(areas)
        return found | {"loss": Mean(self.losses(outputs.float(), labels))}

    def details(self, outputs: Tensor, labels: Tensor) -> dict[str, Any]:
        """Give precision, recall, F1 and count of each class, and the calibration.

        `ece` is the expected calibration error of the predicted class's probability in 15 bins of
        equal width (Guo et al., "On calibration of modern neural networks", ICML 2017, equation 3),
        `brier` the mean of the squared errors of all probabilities, summed over the classes
        (Brier, Monthly Weather Review 78, 1950, equation 2): of two classes twice what is often
        said of the positive one alone.
        """
        metrics = need("torchmetrics.functional.classification")
        logits = losses.two_sided(outputs.float())
        count, shares = logits.shape[1], logits.softmax(1)
        stats = metrics.multiclass_stat_scores(logits, labels, num_classes=count, average=None)
        ece = metrics.multiclass_calibration_error(
            shares, labels, num_classes=count, n_bins=BINS, norm="l1"
        )
        off = shares.double() - F.one_hot(labels, count)
        return {
            "per_class": _per_class([self._name(c) for c in range(count)], stats),
            "calibration": {"ece": float(ece), "brier": float(off.square().sum(1).mean())},
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
    """Any number of several labels: logits [B, C], labels 0 or 1, [B, C].

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
        """Give the binary cross-entropy, averaged over the labels."""
        values = F.binary_cross_entropy_with_logits(outputs, labels.to(outputs), reduction="none")
        return losses.per_sample(values)

    def criterion(self, labels: Tensor) -> Criterion:
        """Give the goal of any wrong label."""
        return MultiLabel(labels)

    def _scores(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        """Share without a wrong label; F1 and AUC, averaged over labels (AUC: with both values)."""
        metrics = need("torchmetrics.functional.classification")
        count, truth = outputs.shape[1], labels.long()
        f1 = metrics.multilabel_f1_score(
            outputs.sigmoid(), truth, num_labels=count, average="macro"
        )
        both = [c for c in range(count) if 0 < int(truth[:, c].sum()) < len(truth)]
        areas = [Area(outputs[:, c], truth[:, c].bool()) for c in both]
        return {
            "all_right": float(self.right(outputs, labels).float().mean()),
            "f1": float(f1),
            "auc": _mean(areas, truth[:, 0]),
        }

    def weighted(self, outputs: Tensor, labels: Tensor) -> Mapping[str, Measure]:
        """Give the share without a wrong label, F1, AUC and the loss."""
        outputs, true = outputs.float(), labels.bool()
        shares = outputs.sigmoid()
        areas = [Area(outputs[:, c], true[:, c]) for c in range(shares.shape[1])]
        return {
            "all_right": Mean(self.right(outputs, labels)),
            "f1": F1(shares > 0.5, true, absent=0.0),
            "auc": MeanOf(areas),
            "loss": Mean(self.losses(outputs, labels)),
        }

    def details(self, outputs: Tensor, labels: Tensor) -> dict[str, Any]:
        """Give precision, recall, F1 and count of each label, and the calibration.

        `ece` and `brier` are those of one label's probability, over all samples and labels.
        """
        metrics = need("torchmetrics.functional.classification")
        shares, truth = outputs.float().sigmoid(), labels.long()
        stats = metrics.multilabel_stat_scores(
            shares, truth, num_labels=shares.shape[1], average=None
        )
        ece = metrics.binary_calibration_error(
            shares.flatten(), truth.flatten(), n_bins=BINS, norm="l1"
        )
        off = shares.double() - truth
        return {
            "per_class": _per_class(self._names(torch.ones(shares.shape[1])), stats),
            "calibration": {"ece": float(ece), "brier": float(off.square().mean())},
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
        """Show how many labels are right, of how many."""
        return f"{int(((output > 0) == (label == 1)).sum())} of {len(output)}"

    def show_label(self, label: Tensor) -> str:
        """Show the labels that are there."""
        return ", ".join(self._names(label == 1)) or "none"

    def _names(self, chosen: Tensor) -> list[str]:
        numbers = chosen.nonzero().flatten().tolist()
        return [self.labels[n] if self.labels else str(n) for n in numbers]


def _per_class(names: Sequence[str], stats: Tensor) -> dict[str, dict[str, float]]:
    """The report of each class from its counts of TP, FP, TN, FN and support, [C, 5].

    A share of nothing is 0, as scikit-learn's report has it.
    """
    found: dict[str, dict[str, float]] = {}
    for name, (tp, fp, _, fn, support) in zip(names, stats.tolist(), strict=True):
        found[name] = {
            "precision": tp / max(1, tp + fp),
            "recall": tp / max(1, tp + fn),
            "f1": 2 * tp / max(1, 2 * tp + fp + fn),
            "count": support,
        }
    return found
