"""What is asked of a maker of fake profiles, and what it gives back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from embattle.data.account import listed
from embattle.data.ratings import Floats, Ints, Ratings
from embattle.errors import InputError


@dataclass(frozen=True)
class Fakes:
    """The events of F fake accounts.

    Attributes:
        ratings: the E fake events alone, account by account; `user_count` counts genuine users too.
        users: [F] int64 the accounts' numbers, which follow those of the genuine users.
        targets: [T] int64 items that are pushed or nuked. Every profile has them all, but for a
            nuke by implicit feedback, whose profiles leave them out.
        selected: [S] int64 items that every profile has beside them.
        fillers: how many further items a profile has.
        times_of: [E] int64 genuine events, by position, whose times the fake ones have.
    """

    ratings: Ratings
    users: Ints
    targets: Ints
    selected: Ints
    fillers: int
    times_of: Ints


@dataclass(frozen=True)
class Request:
    """Fake accounts that are wanted; all is checked.

    Attributes:
        ratings: the genuine events.
        targets: [T] int64.
        selected: [S] int64, what every profile has beside the targets, rated best.
        others: [O] int64, what may be a filler.
        accounts: how many.
        fillers: of each account.
        nuke: whether the targets are to be recommended less.
        rated: whether the profiles have the targets.
        repeats: events that each account gives each target.
        scale: the values that occur, ascending.
        draw: the source of all draws.
    """

    ratings: Ratings
    targets: Ints
    selected: Ints
    others: Ints
    accounts: int
    fillers: int
    nuke: bool
    rated: bool
    repeats: int
    scale: Floats
    draw: np.random.Generator

    @property
    def aimed(self) -> float:
        """What the targets get."""
        return float(self.scale[0] if self.nuke else self.scale[-1])

    def fakes(self, chosen: Ints, values: Floats) -> Fakes:
        """Make the accounts' events of their fillers [F, fillers] and what these are rated."""
        aims = self.targets if self.rated else self.targets[:0]
        head = np.concatenate([np.repeat(aims, self.repeats), self.selected])
        first = np.arange(len(head)) < len(aims) * self.repeats
        rated = np.where(first, self.aimed, self.scale[-1])
        items = np.hstack([np.tile(head, (self.accounts, 1)), chosen])
        values = np.hstack([np.tile(rated, (self.accounts, 1)), values])
        genuine = self.ratings
        users = np.arange(genuine.user_count, genuine.user_count + self.accounts)
        times_of = self.draw.integers(0, len(genuine), items.size)
        ratings = Ratings(
            np.repeat(users, items.shape[1]),
            items.ravel(),
            values.ravel(),
            genuine.times[times_of],
            genuine.user_count + self.accounts,
            genuine.item_count,
        )
        return Fakes(ratings, users, self.targets, self.selected, self.fillers, times_of)

    def drawn_values(self, chosen: Ints, *, by_item: bool) -> Floats:
        """Ratings of fillers, drawn around the mean of all ratings or around each item's own."""
        mean, deviation = _moments(self.ratings, by_item=by_item)
        return self.nearest(self.draw.normal(mean[chosen], deviation[chosen]))

    def nearest(self, values: Floats) -> Floats:
        """The nearest values of the scale; the lower one half-way between two."""
        found: Floats = self.scale[np.searchsorted((self.scale[1:] + self.scale[:-1]) / 2, values)]
        return found


def request(
    who: str,
    ratings: Ratings,
    targets: Ints,
    *,
    selected: Ints,
    accounts: int | None,
    share: float | None,
    fillers: int | None,
    nuke: bool,
    repeats: int,
    seed: int,
    rated: bool = True,
) -> Request:
    """Check what is asked for.

    Args:
        who: asks, for errors.
        targets, selected: see `target_items`, and what every profile has besides.
        ratings, accounts, share, fillers, nuke, repeats, seed: see
            `embattle.data.profiles.fake_profiles`.
        rated: see `Request`.

    Raises:
        InputError: a number that is out of range, or too few items.
    """
    count = _accounts(who, ratings, accounts, share)
    repeats = whole(who, "repeats", repeats, 1)
    others = np.setdiff1d(np.arange(ratings.item_count), np.append(targets, selected))
    head = len(targets) * rated + len(selected)
    return Request(
        ratings,
        targets,
        selected,
        others,
        count,
        _fillers(who, ratings, fillers, head, len(others)),
        nuke,
        rated,
        repeats,
        np.unique(ratings.values),
        np.random.default_rng(seed),
    )


def target_items(who: str, ratings: Ratings, targets: Sequence[int] | Ints) -> Ints:
    """Check the targets of genuine events.

    Raises:
        InputError: there are no events or no targets, or they are no items.
    """
    if not len(ratings):
        raise InputError(f"{who}: ratings has no events; give the genuine ones")
    found = items_of(who, "targets", targets, ratings.item_count)
    if not len(found):
        raise InputError(f"{who}: targets is empty; name an item at least")
    return found


def items_of(who: str, name: str, items: Sequence[int] | Ints, count: int) -> Ints:
    """Item numbers as an array, each once.

    Raises:
        InputError: they are no such.
    """
    found = np.asarray(items if len(items) else [], dtype=None if len(items) else np.int64)
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise InputError(f"{who}: {name} must be whole numbers of items, got {items!r}")
    wrong = found[(found < 0) | (found >= count)]
    if len(wrong):
        raise InputError(
            f"{who}: {name} must be in [0, {count}), got {listed([str(i) for i in wrong])}"
        )
    distinct = found.astype(np.int64)
    if len(np.unique(distinct)) < len(distinct):
        raise InputError(f"{who}: {name} has an item twice: {distinct.tolist()}")
    return distinct


def whole(who: str, name: str, value: int, least: int) -> int:
    """A whole number that is at least `least`.

    Raises:
        InputError: it is none.
    """
    if value != int(value) or value < least:
        raise InputError(f"{who}: {name} must be a whole number >= {least}, got {value}")
    return int(value)


def _accounts(who: str, ratings: Ratings, accounts: int | None, share: float | None) -> int:
    """How many accounts are wanted."""
    if accounts is not None:
        if share is not None:
            raise InputError(f"{who}: accounts={accounts} and share={share}; give one of them")
        return whole(who, "accounts", accounts, 0)
    share = 0.01 if share is None else share
    if not 0 < share < math.inf:
        raise InputError(f"{who}: share must be above 0, got {share}")
    return max(1, round(share * ratings.user_count))


def _fillers(who: str, ratings: Ratings, fillers: int | None, others: int, most: int) -> int:
    """How many fillers a profile has beside `others` items, of `most` that there are."""
    if fillers is None:
        mean = len(ratings) / len(np.unique(ratings.users))
        return min(most, max(0, round(mean) - others))
    if whole(who, "fillers", fillers, 0) > most:
        raise InputError(
            f"{who}: fillers={fillers}, but there are {most} items beside targets and selected ones"
        )
    return fillers


def _moments(ratings: Ratings, *, by_item: bool) -> tuple[Floats, Floats]:
    """[item_count] mean and deviation; those of all ratings where an item has none."""
    mean = np.full(ratings.item_count, ratings.values.mean())
    deviation = np.full(ratings.item_count, ratings.values.std())
    if by_item:
        count = ratings.popularity()
        rated = count > 0

        def average(values: Floats) -> Floats:
            sums = np.bincount(ratings.items, values, len(count)).astype(np.float64)
            found: Floats = sums[rated] / count[rated]
            return found

        mean[rated] = average(ratings.values)
        deviation[rated] = np.sqrt(average((ratings.values - mean[ratings.items]) ** 2))
    return mean, deviation
