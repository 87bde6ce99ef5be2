"""How far an attack on targets gets: their place in users' recommendations, and their scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from embattle import checks
from embattle.models.interactions import Interactions
from embattle.models.ranking import evaluate, rank, score

Scores = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Exposure:
    """Measures of T targets, each over the genuine users who have not seen it, `[T]` float64.

    Attributes:
        users: how many users those are, int64.
        hit_rate: T-HR@K, the share of them to whom the target is recommended.
        ndcg: T-NDCG@K, the mean of 1 / log2(1 + place) with 0 where it is not recommended.
    """

    users: Tensor
    hit_rate: Tensor
    ndcg: Tensor

    def means(self) -> dict[str, float]:
        """Give the mean of hit rate and NDCG over the targets."""
        return {"hit_rate": float(self.hit_rate.mean()), "ndcg": float(self.ndcg.mean())}


def exposure(
    scores: Scores,
    targets: Tensor,
    users: Tensor,
    seen: Interactions,
    *,
    k: int = 50,
    batch_size: int = 1024,
) -> Exposure:
    """Measure how often targets are recommended, as Zhang et al. do for PamaCF (NeurIPS 2024).

    Args:
        scores: gives the scores `[B, N]` of all items for users `[B]` int64; it is called without
            gradients. Put the model into eval mode before.
        targets: [T] int64 items.
        users: [U] int64, the genuine users.
        seen: what the users have in the training part; it is not recommended.
        k: length of a list of recommendations.
        batch_size: users that are ranked at once.

    Returns:
        The measures.

    Raises:
        ValueError: numbers out of range, scores of another shape or with a NaN, or a target that
            all users have seen.
    """
    k = checks.integer("exposure", "k", k, 1)
    count, hits, gains = torch.zeros(3, len(targets), dtype=torch.float64, device=targets.device)
    for some, met in _batches("exposure", targets, users, seen, batch_size):
        best = rank(score("exposure", scores, some, seen.item_count), met, k)
        at = best[:, :, None] == targets
        place = torch.arange(2, best.shape[1] + 2, dtype=torch.float64, device=best.device)
        # What was seen is never among the best, and adds nothing.
        count += (~met[:, targets]).sum(0)
        hits += at.any(1).sum(0)
        gains += (at / place.log2()[:, None]).sum((0, 1))
    _refuse_seen_by_all("exposure", targets, count)
    return Exposure(count.long(), hits / count, gains / count)


def prediction_shift(
    before: Scores,
    after: Scores,
    targets: Tensor,
    users: Tensor,
    seen: Interactions,
    *,
    batch_size: int = 1024,
) -> Tensor:
    """Measure by how much the targets' scores rise, over the genuine users who have not seen them.

    The prediction shift of Burke, O'Mahony and Hurley ("Robust collaborative recommendation",
    Recommender Systems Handbook). It says something where scores are predicted ratings.

    Args:
        before, after: give the scores `[B, N]` of the model without and with the fake users.
        targets, users, seen, batch_size: see `exposure`.

    Returns:
        [T] float64, above 0 where the target has been pushed.

    Raises:
        ValueError: see `exposure`.
    """
    who = "prediction_shift"
    count, moved = torch.zeros(2, len(targets), dtype=torch.float64, device=targets.device)
    for some, met in _batches(who, targets, users, seen, batch_size):
        old, new = (
            score(who, of, some, seen.item_count)[:, targets].double() for of in (before, after)
        )
        unseen = ~met[:, targets]
        count += unseen.sum(0)
        moved += ((new - old) * unseen).sum(0)
    _refuse_seen_by_all(who, targets, count)
    shift: Tensor = moved / count
    return shift


@dataclass(frozen=True)
class NDCGChange:
    """Recommendations of genuine users without and with an attack.

    Attributes:
        before, after: mean NDCG@K.
        difference: delta-NDCG, [U] float64, of each user: after minus before.
    """

    before: float
    after: float
    difference: Tensor

    @property
    def delta(self) -> float:
        """Mean delta-NDCG@K, below 0 where recommendations are worse."""
        return float(self.difference.mean())


def ndcg_change(
    before: Scores,
    after: Scores,
    relevant: Interactions,
    seen: Interactions | None = None,
    *,
    k: int = 10,
    batch_size: int = 1024,
) -> NDCGChange:
    """Measure what an attack costs the genuine users: the change of NDCG@K over all items.

    Args:
        before, after: give the scores `[B, N]` of the model without and with the attack.
        relevant: the genuine users' held-out items.
        seen, k, batch_size: see `embattle.models.ranking.evaluate`.

    Returns:
        The change, for users who have a held-out item.

    Raises:
        ValueError: see `evaluate`.
    """
    old, new = (
        evaluate(scores, relevant, seen, k=k, batch_size=batch_size).ndcg
        for scores in (before, after)
    )
    return NDCGChange(float(old.mean()), float(new.mean()), new - old)


def _batches(
    who: str, targets: Tensor, users: Tensor, seen: Interactions, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Some users at a time, and bool `[B, N]` what they have seen."""
    size = checks.integer(who, "batch_size", batch_size, 1)
    limits = (("targets", targets, seen.item_count), ("users", users, seen.user_count))
    for name, numbers, limit in limits:
        if numbers.dim() != 1 or numbers.is_floating_point() or not len(numbers):
            raise ValueError(
                f"{who}: {name} must be integers of shape [1 or more]; got {numbers.dtype}, "
                f"{tuple(numbers.shape)}"
            )
        wrong = numbers[(numbers < 0) | (numbers >= limit)]
        if len(wrong):
            raise ValueError(f"{who}: {name} must lie in [0, {limit}); got {int(wrong[0])}")
    for some in torch.split(users, size):
        yield some, seen.mask(some)


def _refuse_seen_by_all(who: str, targets: Tensor, unseen: Tensor) -> None:
    full = targets[unseen == 0]
    if len(full):
        raise ValueError(
            f"{who}: all users have seen target {int(full[0])}; choose one that fewer have seen"
        )
