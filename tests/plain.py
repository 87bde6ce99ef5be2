"""Losses and goals of one sample in plain Python, on lists of numbers, to compare with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

Row = Sequence[float]
INF = math.inf


def two_sided(row: float | Row) -> Row:
    """One logit of a binary decision as two."""
    row = [row] if isinstance(row, float) else row
    return [0.0, row[0]] if len(row) == 1 else row


def probabilities(row: Row) -> Row:
    exps = [math.exp(x - max(row)) for x in row]
    return [e / sum(exps) for e in exps]


def cross_entropy(row: Row, label: int) -> float:
    return -math.log(probabilities(row)[label])


def margin(row: Row, label: int) -> float:
    return max(x for i, x in enumerate(row) if i != label) - row[label]


def dlr(row: Row, label: int) -> float:
    first, _, third = sorted(row, reverse=True)[:3]
    return margin(row, label) / (first - third if first > third else 1.0)


def kl(p: Row, q: Row) -> float:
    pairs = zip(probabilities(p), probabilities(q), strict=True)
    return sum(a * math.log(a / b) for a, b in pairs if a > 0)


def symmetric_kl(p: Row, q: Row) -> float:
    return kl(p, q) + kl(q, p)


def squared_distance(p: Row, q: Row) -> float:
    return mean([0.0 if a == b else (a - b) ** 2 for a, b in zip(p, q, strict=True)])


def bce(logit: float, label: float) -> float:
    chance = 1 / (1 + math.exp(-logit))
    return -math.log(chance if label == 1 else 1 - chance)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def predicted(row: Row) -> int:
    """The first of the largest."""
    return row.index(max(row))  # type: ignore[attr-defined]


def kth_other(row: Row, item: int, k: int) -> float:
    return sorted((x for i, x in enumerate(row) if i != item), reverse=True)[k - 1]


def finite(score: float) -> float:
    return 0.0 if math.isinf(score) else score


def flat(value: Any, depth: int) -> list[Any]:
    """The entries of nested lists, `depth` levels down."""
    if depth == 0:
        return [value]
    return [entry for part in value for entry in flat(part, depth - 1)]


def over_labels(
    formula: Callable[[Row, int], float], logits: list[Any], labels: list[Any], ignore: int = -100
) -> list[float]:
    """A formula of one prediction, averaged over each sample's labels that count."""
    return [
        mean([formula(row, label) for row, label in places(*pair, ignore)])
        for pair in zip(logits, labels, strict=True)
    ]


def places(logits: Any, labels: Any, ignore: int = -100) -> list[tuple[Row, int]]:
    """What counts of one sample: pairs of logits and label."""
    depth = 0
    part = labels
    while isinstance(part, list):
        depth, part = depth + 1, part[0]
    pairs = zip(flat(logits, depth), flat(labels, depth), strict=True)
    return [(two_sided(row), label) for row, label in pairs if label != ignore]
