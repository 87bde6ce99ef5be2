"""What a model predicts: classes, several labels, values, or an order of items.

A kind says what is lost on a sample, what an attack on it is for, how good predictions are, and how
they are shown. Its `headline` is the share of samples on which that attack's goal does not hold:
accuracy, for classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from embattle import losses
from embattle.criteria import Criterion, Demote, Deviate, Misclassify, MultiLabel
from embattle.errors import need
from embattle.perturb.evaluation import Evaluation


class Kind(ABC):
    """A kind of prediction.

    Attributes:
        measures: the keys of `scores` that belong in a table, each with its title; the first is the
            share of samples that are right.
        note: a sentence about them.
        shown: what `show` tells, in words.
        graded: whether a measure depends on how wrong a sample is, not only on whether it is, so
            that an attack has to go on with samples that have fallen.
    """

    measures: ClassVar[tuple[tuple[str, str], ...]]
    note: ClassVar[str] = ""
    shown: ClassVar[str]
    graded: ClassVar[bool] = True

    @abstractmethod
    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Give the loss of each sample, [B], with a graph."""

    @abstractmethod
    def criterion(self, labels: Tensor) -> Criterion:
        """Give what an attack is for: reached where a sample is wrong."""

    @abstractmethod
    def _scores(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        """Give the measures but the loss."""

    @abstractmethod
    def describe(self, outputs: Tensor) -> list[dict[str, Any]]:
        """Give the columns of a prediction for each sample of outputs [B, ...]."""

    @abstractmethod
    def show(self, output: Tensor, label: Tensor) -> str:
        """Show one sample's output beside its label, in a few characters."""

    def show_label(self, label: Tensor) -> str:
        """Show one sample's label."""
        return str(label.tolist())

    def chance(self, labels: Tensor) -> float | None:
        """Give the share that is right if the same is always predicted; None: it is not known."""
        return None

    def scores(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        """Score outputs [N, ...] against labels [N, ...].

        Returns:
            The measures by key, and `loss`, the mean loss. NaN where a measure is not defined.

        Raises:
            ValueError: there are no samples.
        """
        if not len(labels):
            raise ValueError("scores: there are no samples to score; give at least one")
        outputs = outputs.float()
        loss = float(self.losses(outputs, labels).mean())
        return {**self._scores(outputs, labels), "loss": loss}

    def right(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Tell for each sample whether it is right, bool [N]."""
        at = Evaluation(outputs=outputs)
        reached = self.criterion(labels).reached(at, at)
        return torch.ones(len(labels), dtype=torch.bool) if reached is None else ~reached

    def to_json(self) -> dict[str, Any]:
        """Give the kind as JSON, for `from_json`."""
        return {"name": type(self).__name__, **asdict(self)}  # type: ignore[call-overload]


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
    note: ClassVar[str] = (
        "F1 is the mean over the classes. Samples leave an attack as they fall: AUC under attack "
        "is that of each one's first success."
    )
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
        if len(set(labels.tolist())) < count:
            auc = torch.tensor(float("nan"))
        elif count == 2:
            auc = metrics.binary_auroc(logits.softmax(1)[:, 1], labels)
        else:
            auc = metrics.multiclass_auroc(logits.softmax(1), labels, num_classes=count)
        return {
            "accuracy": float((logits.argmax(1) == labels).float().mean()),
            "f1": float(f1),
            "auc": float(auc),
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
    note: ClassVar[str] = "All right: no label is wrong. F1 and AUC are means over the labels."
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
        areas = [float(metrics.binary_auroc(outputs[:, c].sigmoid(), truth[:, c])) for c in both]
        return {
            "all_right": float(self.right(outputs, labels).float().mean()),
            "f1": float(f1),
            "auc": sum(areas) / len(areas) if areas else float("nan"),
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


@dataclass(frozen=True)
class Regression(Kind):
    """A value: outputs [B], labels [B] in floating point.

    Args:
        within: a prediction counts as right if it is off by at most this.
    """

    within: float

    measures: ClassVar[tuple[tuple[str, str], ...]] = (
        ("within", "close enough"),
        ("mae", "MAE"),
        ("r2", "R2"),
    )
    note: ClassVar[str] = (
        "Close enough: share of predictions that count as right. MAE: mean absolute error."
    )
    shown: ClassVar[str] = "predicted value"

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Give the squared error."""
        if outputs.shape != labels.shape:
            raise ValueError(
                f"Regression: outputs {tuple(outputs.shape)} and labels {tuple(labels.shape)} must "
                "have one shape, [B]; squeeze the outputs' last dim"
            )
        return losses.per_sample((outputs - labels.to(outputs)).square())

    def criterion(self, labels: Tensor) -> Criterion:
        """Give the goal of a prediction that is too far off; its distance has a gradient at 0."""
        return Deviate(labels, by=self.within, ascend="distance")

    def _scores(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        """Share that is close enough, mean absolute error, and the coefficient of determination."""
        off, labels = (outputs - labels).double(), labels.double()
        spread = float((labels - labels.mean()).square().sum())
        return {
            "within": float(self.right(outputs, labels.to(outputs)).float().mean()),
            "mae": float(off.abs().mean()),
            "r2": 1 - float(off.square().sum()) / spread if spread else float("nan"),
        }

    def describe(self, outputs: Tensor) -> list[dict[str, Any]]:
        """Give `prediction`, the value."""
        return [{"prediction": value} for value in outputs.tolist()]

    def show(self, output: Tensor, label: Tensor) -> str:
        """Show the value."""
        return f"{float(output):.4g}"

    def show_label(self, label: Tensor) -> str:
        """Show the value."""
        return f"{float(label):.4g}"


@dataclass(frozen=True)
class Ranking(Kind):
    """An order of items: scores of all items [B, N], -inf for those ruled out; labels: one item.

    An item that others equal is before them.

    Args:
        k: how many items are recommended.
    """

    k: int = 10

    measures: ClassVar[tuple[tuple[str, str], ...]] = (
        ("hit_rate", "hit rate"),
        ("ndcg", "NDCG"),
        ("mrr", "MRR"),
    )
    note: ClassVar[str] = "Hit rate, NDCG and MRR are of the items that are recommended."
    shown: ClassVar[str] = "rank of the right item"
    graded: ClassVar[bool] = False  # below the k-th place all ranks count for nothing

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Give the cross-entropy of the right item among all."""
        return losses.cross_entropy(outputs, labels)

    def criterion(self, labels: Tensor) -> Criterion:
        """Give the goal that the right item is not recommended."""
        return Demote(labels, self.k)

    def _scores(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        """Hit rate, NDCG and reciprocal rank, all cut at k; ranks are over all items."""
        rank = _ranks(outputs, labels).double()
        hit = (rank < self.k).double()
        return {
            "hit_rate": float(hit.mean()),
            "ndcg": float((hit / (rank + 2).log2()).mean()),
            "mrr": float((hit / (rank + 1)).mean()),
        }

    def describe(self, outputs: Tensor) -> list[dict[str, Any]]:
        """Give `prediction`, the numbers of the k best items, best first, and their `scores`.

        There are fewer than k where the others are ruled out.
        """
        best = outputs.topk(min(self.k, outputs.shape[1]), dim=1)
        left = (best.values > -torch.inf).sum(1).tolist()
        ranked = zip(best.indices.tolist(), best.values.tolist(), left, strict=True)
        return [{"prediction": items[:n], "scores": scores[:n]} for items, scores, n in ranked]

    def show(self, output: Tensor, label: Tensor) -> str:
        """Show the rank."""
        return str(int(_ranks(output[None], label[None])) + 1)


def _ranks(scores: Tensor, items: Tensor) -> Tensor:
    """How many items score higher than each row's own item, [B]."""
    return (scores > scores.gather(1, items[:, None])).sum(1)


#: By the name that `Kind.to_json` gives.
KINDS: dict[str, type[Kind]] = {
    kind.__name__: kind
    for kind in (
        Classification,
        BinaryClassification,
        MultiLabelClassification,
        Regression,
        Ranking,
    )
}


def from_json(facts: dict[str, Any]) -> Kind:
    """Make the kind that `Kind.to_json` described.

    Raises:
        ValueError: it describes none.
    """
    found = dict(facts)
    kind = KINDS.get(found.pop("name", ""))
    if kind is None:
        raise ValueError(f"no kind of prediction is called {facts.get('name')!r}")
    try:
        made = kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in found.items()})
    except TypeError as error:
        raise ValueError(str(error)) from error
    return made
