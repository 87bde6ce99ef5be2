"""Negative sampling: for a user, items that she has not seen."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from embattle.data.account import listed
from embattle.data.divide import whole
from embattle.errors import InputError

Ints = NDArray[np.int64]

# Whole-number weights sum to at most this, so that every draw is exact.
_TOTAL = 1 << 36


class NegativeSampler:
    """Draws items that a user has not seen, uniformly or by popularity.

    Nothing is drawn and rejected: a number is drawn below the weight of what the user has not seen,
    and then moved past the items that she has. A draw takes O(log events + log items) time,
    whatever share of the catalogue the user has seen. It depends on seed, step and position in the
    batch alone, so that a job that resumes at a step draws what it would have drawn.

    Args:
        users: [N] int64 from 0, the users of the seen events; repeated events count once.
        items: [N] int64 from 0, their items.
        user_count: users there are.
        item_count: items there are.
        power: 0 draws uniformly; otherwise an item's weight is its events to this power, so that
            1 is popularity and 0.75 word2vec's smoothing (Mikolov et al., NIPS 2013). An item
            without events is then never drawn.
        seed: decides the draws.

    Raises:
        InputError: if a number is out of range.
    """

    def __init__(
        self,
        users: ArrayLike,
        items: ArrayLike,
        *,
        user_count: int,
        item_count: int,
        power: float = 0.0,
        seed: int = 0,
    ) -> None:
        u, i = whole("NegativeSampler", users=users, items=items)
        for name, found, count in (("users", u, user_count), ("items", i, item_count)):
            if count < 1 or (len(found) and found.max() >= count):
                raise InputError(
                    f"NegativeSampler: {name} must be below {name[:-1]}_count = {count}, got "
                    f"{found.max(initial=0)}"
                )
        if user_count * (max(item_count, _TOTAL) + 1) >= 1 << 63:
            raise InputError(
                f"NegativeSampler: {user_count} users and {item_count} items are too many"
            )
        if not (np.isfinite(power) and power >= 0):
            raise InputError(f"NegativeSampler: power must be a number >= 0, got {power}")
        self.seed, self.user_count, self.item_count = seed, user_count, item_count
        # [item_count + 1] weight of all items before an item; None where each weighs 1.
        self._before = None if power == 0 else _weights_before(i, item_count, power)
        seen = np.unique(u * item_count + i)
        owner, item = np.divmod(seen, item_count)
        start = np.searchsorted(owner, np.arange(user_count + 1))
        weight, before = self._weigh(item)
        # Weight of what the user has seen before each of her items, and of what she has not.
        passed = np.append(0, np.cumsum(weight))
        passed = (passed - passed[start[:-1]][np.append(owner, -1)])[:-1]
        self._end = start[1:]
        self._passed = np.append(passed, 0)
        self._sum = np.bincount(owner, weight, user_count).astype(np.int64)
        self._span = self._total() + 1
        # Increasing within a user and from user to user: one search finds the place of any draw.
        self._keys = owner * self._span + (before - passed)

    def _total(self) -> int:
        return self.item_count if self._before is None else int(self._before[-1])

    def _weigh(self, items: Ints) -> tuple[Ints, Ints]:
        """The weight of items, and of all items before them."""
        if self._before is None:
            return np.ones_like(items), items
        return self._before[items + 1] - self._before[items], self._before[items]

    def draw(self, users: ArrayLike, count: int, step: int) -> Ints:
        """Draws for a batch, with replacement.

        Args:
            users: [B] int64.
            count: items for each user.
            step: number of the draw, from 0; the same step gives the same items again.

        Returns:
            [B, count] int64 items that the user of the row has not seen.

        Raises:
            InputError: if a user is not known, or has seen all items that could be drawn.
        """
        (u,) = whole("draw", users=users)
        if len(u) and u.max() >= self.user_count:
            raise InputError(f"draw: users must be below {self.user_count}, got {u.max()}")
        if count < 0 or step < 0:
            raise InputError(f"draw: count and step must be >= 0, got {count} and {step}")
        left = self._total() - self._sum[u]
        if (left <= 0).any():
            full = [str(x) for x in np.unique(u[left <= 0]).tolist()]
            raise InputError(
                f"draw: {len(full)} users have seen every item that could be drawn (user "
                f"{listed(full, 3)}): there is no negative for them; leave them out of training"
                + ("" if self._before is None else ", or draw uniformly (power=0)")
            )
        rng = np.random.default_rng([self.seed, step])
        drawn = rng.integers(0, left[:, None], size=(len(u), count))
        place = np.searchsorted(self._keys, u[:, None] * self._span + drawn, side="right")
        beyond = place == self._end[u][:, None]
        moved: Ints = drawn + np.where(beyond, self._sum[u][:, None], self._passed[place])
        if self._before is None:
            return moved
        return np.searchsorted(self._before, moved, side="right") - 1


def _weights_before(items: Ints, count: int, power: float) -> Ints:
    """[count + 1] cumulated whole-number weights, events ** power."""
    weights = np.bincount(items, minlength=count).astype(np.float64) ** power
    weights[np.bincount(items, minlength=count) == 0] = 0
    total = weights.sum()
    if total == 0:
        raise InputError("NegativeSampler: no events to take popularity from; use power=0")
    scale = 1.0 if power == 1 and total <= _TOTAL else _TOTAL / 2 / total
    whole = np.where(weights > 0, np.maximum(np.rint(weights * scale), 1), 0).astype(np.int64)
    return np.concatenate([[0], np.cumsum(whole)])
