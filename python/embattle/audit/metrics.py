"""Scores of predictions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from embattle.errors import need


@dataclass(frozen=True)
class Scores:
    """How good predictions are.

    Attributes:
        accuracy: share of right predictions.
        f1: F1 score, averaged over the classes (macro).
        auc: area under the ROC curve, averaged over the classes where there are more than two; NaN
            if a class has no example.
        loss: mean cross-entropy.
    """

    accuracy: float
    f1: float
    auc: float
    loss: float


def score(logits: Tensor, labels: Tensor) -> Scores:
    """Scores logits [N, C] against class numbers [N] int64.

    Raises:
        ValueError: if there are no examples.
    """
    if not len(labels):
        raise ValueError("score: there are no examples to score; give at least one")
    metrics = need("torchmetrics.functional.classification")
    logits = logits.float()
    classes = logits.shape[1]
    present = len(set(labels.tolist()))
    f1 = metrics.multiclass_f1_score(logits, labels, num_classes=classes, average="macro")
    if present < classes:
        auc = torch.tensor(float("nan"))
    elif classes == 2:
        auc = metrics.binary_auroc(logits.softmax(1)[:, 1], labels)
    else:
        auc = metrics.multiclass_auroc(logits.softmax(1), labels, num_classes=classes)
    return Scores(
        accuracy=float((logits.argmax(1) == labels).float().mean()),
        f1=float(f1),
        auc=float(auc),
        loss=float(torch.nn.functional.cross_entropy(logits, labels)),
    )


def success_rate(clean: Tensor, attacked: Tensor, labels: Tensor) -> float:
    """Share of the rightly classified examples that an attack flips; 0 if none was right.

    Args:
        clean: logits without the attack, [N, C].
        attacked: logits under it, [N, C].
        labels: [N] int64.
    """
    right = clean.argmax(1) == labels
    flipped = right & (attacked.argmax(1) != labels)
    return int(flipped.sum()) / max(1, int(right.sum()))
