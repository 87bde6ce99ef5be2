"""An order of items."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from embattle import losses
from embattle.criteria import Criterion, Outrank
from embattle.tasks.kinds.base import Kind
from embattle.tasks.kinds.weighted import Mean, Measure, at_once


@dataclass(frozen=True)
class Ranking(Kind):
    """An order of items: scores of all items [B, N], -inf for those ruled out; labels: one item.

    An item that others equal is before them. One that is ruled out is the last, and never a hit.

    Args:
        k: how many items are recommended.
    """

    k: int = 10

    measures: ClassVar[tuple[tuple[str, str], ...]] = (
        ("hit_rate", "hit rate"),
        ("ndcg", "NDCG"),
        ("mrr", "MRR"),
    )
    note: ClassVar[str] = (
        "Hit rate, NDCG and MRR are of the items that are recommended. Of a right item that stays "
        "among them each attack gives the point where its leads over the best k others are "
        "smallest; the worst of several attacks is the lowest rank."
    )
    shown: ClassVar[str] = "rank of the right item"
    graded: ClassVar[bool] = False  # below the k-th place all ranks count for nothing

    def titled(self) -> list[list[str]]:
        """Give them with k: `hit rate@10`."""
        return [[key, f"{title}@{self.k}"] for key, title in self.measures]

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Give the cross-entropy of the right item among all."""
        return losses.cross_entropy(outputs, labels)

    def badness(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Give the rank of the right item: NDCG and MRR do not ask for its score."""
        return _ranks(outputs, labels).float()

    def criterion(self, labels: Tensor) -> Criterion:
        """Give the goal that the right item is not recommended, or as far down as may be."""
        return Outrank(labels, self.k)

    def _scores(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        """Hit rate, NDCG and reciprocal rank, all cut at k; ranks are over all items."""
        found = at_once(self.weighted(outputs, labels), labels)
        return {key: found[key] for key, _ in self.measures}

    def weighted(self, outputs: Tensor, labels: Tensor) -> Mapping[str, Measure]:
        """Give hit rate, NDCG, MRR and the loss."""
        rank = _ranks(losses.wide(outputs), labels).double()
        hit = rank < min(self.k, outputs.shape[1])
        return {
            "hit_rate": Mean(hit),
            "ndcg": Mean(hit / (rank + 2).log2()),
            "mrr": Mean(hit / (rank + 1)),
            "loss": Mean(self.losses(losses.wide(outputs), labels)),
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
    """How many items score higher than each row's own, [B]; all N if that is a NaN or ruled out."""
    own = scores.gather(1, items[:, None].long())
    return (~(scores <= own) | (own == -torch.inf)).sum(1)
