"""Ranking all items for each user, and how good the best k are.

torchmetrics has these measures for one query at a time; here all users of a batch are ranked at
once. The tests compare both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from embattle import checks
from embattle.models.interactions import Interactions


@dataclass(frozen=True)
class RankingMetrics:
    """Measures of the best k items of each of U users, `[U]` float64 each, in the users' order.

    Relevance is binary; users without a relevant item are not among the U.

    Attributes:
        users: the users' numbers, int64.
        hit_rate: 1 where a relevant item is among the k.
        precision: share of the k that is relevant.
        recall: share of the relevant items that is among the k.
        ndcg: discounted cumulative gain over that of the best order there is, cut at k.
        mrr: reciprocal rank of the first relevant item, 0 if it is not among the k.
        map: precisions at the relevant ranks, summed, over the number of relevant items.
        map_at_k: the same over min(k, number of relevant items).
    """

    users: Tensor
    hit_rate: Tensor
    precision: Tensor
    recall: Tensor
    ndcg: Tensor
    mrr: Tensor
    map: Tensor
    map_at_k: Tensor

    def means(self) -> dict[str, float]:
        """Give the mean of each measure over the users."""
        names = [field.name for field in fields(self) if field.name != "users"]
        return {name: float(getattr(self, name).mean()) for name in names}


def rank(scores: Tensor, seen: Tensor | None, k: int) -> Tensor:
    """Give the k best items of each row, best first; equal scores in any order.

    Args:
        scores: [B, N].
        seen: bool [B, N], True at items that are not recommended; None: there are none.
        k: how many.

    Returns:
        Item numbers, [B, k] int64; -1 where no item is left; fewer columns than k where
        there are not as many items.
    """
    if seen is not None:
        scores = scores.masked_fill(seen, -torch.inf)
    best = scores.topk(min(k, scores.shape[1]), dim=1)
    return best.indices.masked_fill(best.values == -torch.inf, -1)


def evaluate(
    scores: Callable[[Tensor], Tensor],
    relevant: Interactions,
    seen: Interactions | None = None,
    *,
    k: int = 10,
    batch_size: int = 1024,
) -> RankingMetrics:
    """Rank all items for every user who has a relevant one.

    Args:
        scores: gives the scores `[B, N]` of all items for users `[B]` int64, as a ranker's
            `scores` does. It is called without gradients; put the model into eval mode before.
        relevant: the held-out items.
        seen: items that are not recommended, such as those of the training part.
        k: length of a list of recommendations.
        batch_size: users that are ranked at once.

    Returns:
        The measures.

    Raises:
        ValueError: nothing is relevant, scores of another shape or with a NaN, or parts that know
            other items.
    """
    k = checks.integer("evaluate", "k", k, 1)
    size = checks.integer("evaluate", "batch_size", batch_size, 1)
    counts = (relevant.user_count, relevant.item_count)
    if seen is not None and (seen.user_count, seen.item_count) != counts:
        raise ValueError(
            f"evaluate: relevant has {counts[0]} users and {counts[1]} items, seen "
            f"{seen.user_count} and {seen.item_count}; give both the same counts"
        )
    users = relevant.counts.nonzero().squeeze(1)
    if not len(users):
        raise ValueError("evaluate: relevant has no pairs; hold some items out")
    parts = []
    for some in torch.split(users, size):
        found = score("evaluate", scores, some, relevant.item_count)
        best = rank(found, None if seen is None else seen.mask(some), k)
        hits = relevant.mask(some).gather(1, best.clamp(min=0)) & (best >= 0)
        parts.append(measures(hits, relevant.counts[some], k))
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return RankingMetrics(users=users, **joined)


def score(who: str, scores: Callable[[Tensor], Tensor], users: Tensor, items: int) -> Tensor:
    """Score all items for some users, without gradients.

    Args:
        who: asks, for errors.
        scores: gives the scores of all items for users.
        users: [B] int64.
        items: how many there are.

    Returns:
        [B, items].

    Raises:
        ValueError: scores of another shape or with a NaN.
    """
    with torch.no_grad():
        found = scores(users)
    if found.shape != (len(users), items):
        raise ValueError(
            f"{who}: scores must be [{len(users)}, {items}], one for each item that there is; got "
            f"{tuple(found.shape)}"
        )
    if bool(found.isnan().any()):
        raise ValueError(f"{who}: scores have NaNs; the model's weights may not be finite")
    return found


def measures(hits: Tensor, relevant: Tensor, k: int) -> dict[str, Tensor]:
    """Measure ranked lists.

    Args:
        hits: bool [B, at most k], True where the item at that rank is relevant.
        relevant: [B] how many relevant items there are, each above 0.
        k: length of the lists.

    Returns:
        The measures of `RankingMetrics` by name, each [B] float64.
    """
    gain = hits.double()
    place = torch.arange(1, hits.shape[1] + 1, dtype=torch.float64, device=hits.device)
    total = relevant.double()
    discount = 1 / torch.arange(2, k + 2, dtype=torch.float64, device=hits.device).log2()
    ideal = discount.cumsum(0)[relevant.clamp(max=k) - 1]
    precisions = gain * gain.cumsum(1) / place
    return {
        "hit_rate": hits.any(1).double(),
        "precision": gain.sum(1) / k,
        "recall": gain.sum(1) / total,
        "ndcg": (gain * discount[: hits.shape[1]]).sum(1) / ideal,
        "mrr": (gain / place).amax(1),
        "map": precisions.sum(1) / total,
        "map_at_k": precisions.sum(1) / total.clamp(max=k),
    }
