"""Goals about an item's place among all items: into the best k, or out of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from embattle import checks
from embattle.criteria.base import Criterion, integers, require
from embattle.criteria.classes import logits
from embattle.perturb.evaluation import Evaluation


@dataclass(frozen=True, eq=False, repr=False)
class _TopK(Criterion):
    """What both share: an item's score, and that of the k-th best of the others.

    A score of -inf takes an item out of the ranking. Where one of the two scores is infinite the
    objective takes 0 in its place, so that it stays finite; `reached` compares the scores as they
    are.
    """

    items: int | Tensor
    k: int

    per_sample: ClassVar[tuple[str, ...]] = ("items",)
    needs_outputs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        who = type(self).__name__
        if isinstance(self.items, Tensor):
            items: int | Tensor = integers(who, "items", self.items)
            if self.items.dtype == torch.bool:
                raise ValueError(f"{who}: items must be item numbers, got {self.items.dtype}")
        else:
            items = checks.integer(who, "items", self.items, 0)
        object.__setattr__(self, "items", items)
        object.__setattr__(self, "k", checks.integer(who, "k", self.k, 1))

    def check(self, clean: Evaluation) -> None:
        """Check that outputs are scores `[B, N]`, with the items among them and k others.

        Raises:
            ValueError: they are not.
        """
        who = type(self).__name__
        outputs = logits(who, clean)
        items = self._items(outputs)
        super().check(clean)
        count = outputs.shape[1]
        if self.k >= count:
            raise ValueError(
                f"{who}: k must be smaller than the number of items, that the item can be in or "
                f"out; got k={self.k} for outputs {tuple(outputs.shape)}"
            )
        message = f"{who}: items must lie in [0, {count}) for outputs {tuple(outputs.shape)}"
        if isinstance(self.items, Tensor):
            require((items >= 0) & (items < count), items, message)
        elif self.items >= count:
            raise ValueError(f"{message}; got {self.items}")

    def predict(self, outputs: Tensor) -> Tensor:
        """Return the k best items, best first, `[B, k]`."""
        return outputs.topk(self.k, dim=1).indices

    def _best(self, now: Evaluation) -> tuple[Tensor, Tensor]:
        # The item's own [B], and those of the k best others [B, k], the best first.
        outputs = logits(type(self).__name__, now)
        index = self._items(outputs).unsqueeze(1)
        others = outputs.scatter(1, index, -math.inf)
        return outputs.gather(1, index).squeeze(1), others.topk(self.k, dim=1).values

    def _scores(self, now: Evaluation) -> tuple[Tensor, Tensor]:
        # The item's own, and the k-th best of the others.
        own, best = self._best(now)
        return own, best.select(1, -1)

    def _items(self, outputs: Tensor) -> Tensor:
        who = type(self).__name__
        if outputs.dim() != 2:
            raise ValueError(
                f"{who}: outputs must be scores of all items, [B, N]; got {tuple(outputs.shape)}"
            )
        batch = outputs.shape[0]
        if isinstance(self.items, int):
            return torch.full((batch,), self.items, device=outputs.device)
        if self.items.shape != (batch,):
            raise ValueError(
                f"{who}: outputs {tuple(outputs.shape)} need items {(batch,)}, one for each "
                f"sample; got items {tuple(self.items.shape)}"
            )
        return self.items


@dataclass(frozen=True, eq=False, repr=False)
class Promote(_TopK):
    """An item that is to be recommended: reached where it is among the k best of its sample.

    Outputs are scores of all items, `[B, N]`. What is ascended is the item's score minus that of
    the k-th best other one; equal scores do not count as reached. Scores of -inf are items that are
    ruled out: they are never reached, and do no harm elsewhere.

    Args:
        items: the item for all samples, or `[B]` integers.
        k: how many items are recommended.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: k below 1, or items that are no item numbers.
    """

    def objective(self, now: Evaluation, clean: Evaluation | None) -> Tensor:
        """Return the lead over the k-th best other item."""
        return _lead(*self._scores(now))

    def reached(self, now: Evaluation, clean: Evaluation | None) -> Tensor:
        """Return True where fewer than k other items are as good."""
        own, bar = self._scores(now)
        return own > bar


@dataclass(frozen=True, eq=False, repr=False)
class Demote(_TopK):
    """An item that is not to be recommended: reached where k others are better.

    Outputs are scores of all items, `[B, N]`. What is ascended is the score of the k-th best other
    item minus the item's; equal scores do not count as reached. Scores of -inf are items that are
    ruled out. An item that is itself ruled out is not recommended, and so reached.

    Args:
        items: the item for all samples, or `[B]` integers.
        k: how many items are recommended.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: k below 1, or items that are no item numbers.
    """

    def objective(self, now: Evaluation, clean: Evaluation | None) -> Tensor:
        """Return how far the k-th best other item is ahead."""
        return -_lead(*self._scores(now))

    def reached(self, now: Evaluation, clean: Evaluation | None) -> Tensor:
        """Return True where at least k others are better, or it is ruled out; a NaN is the last."""
        own, bar = self._scores(now)
        return (own >= bar).logical_not() | (own == -math.inf)


@dataclass(frozen=True, eq=False, repr=False)
class Outrank(Demote):
    """An item that is to be far down the list: reached as by `Demote`.

    What is ascended is minus the sum of the item's leads over those of the k best others that are
    not ahead of it yet; once all are, the lead of the k-th best other item over it. So all k are
    pulled past the item at once, and an item that cannot be pushed off the list is pushed down it,
    which is what NDCG and MRR count. With k = 1 it is `Demote`. Items that are ruled out add
    nothing. The gradient is that of the mean of these leads: where samples share what is moved,
    none pulls harder for having more items to be pulled past.

    Args:
        items: the item for all samples, or `[B]` integers.
        k: how many items are recommended.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: k below 1, or items that are no item numbers.
    """

    def objective(self, now: Evaluation, clean: Evaluation | None) -> Tensor:
        """Return minus the leads that are left, or how far the k-th best other item is ahead."""
        own, best = self._best(now)
        bar = best.select(1, -1)
        leads = own.unsqueeze(1) - best
        behind = leads.isfinite() & (leads >= 0)
        leads = leads.masked_fill(behind.logical_not(), 0.0)
        mean = leads / behind.sum(1, keepdim=True).clamp(min=1)
        left = mean + (leads - mean).detach()  # the values of leads, the slopes of mean
        return torch.where(bar > own, -_lead(own, bar), -left.sum(1))


def _lead(own: Tensor, bar: Tensor) -> Tensor:
    """How far one score is above the other; 0 in the place of what is infinite."""
    return own.masked_fill(own.isinf(), 0.0) - bar.masked_fill(bar.isinf(), 0.0)
