"""Fake users by template: the profiles of the attacks on ratings that are known since the 2000s.

A profile rates the targets, some selected items, and fillers that are drawn for each fake user.
With the scale's best rating `most`, its worst `least`, and normal draws `N(mean, deviation)`:

| kind | selected items | fillers | from |
|---|---|---|---|
| random | none | N of all ratings | Lam and Riedl, WWW 2004 |
| average | none | N of the item's ratings | Lam and Riedl, WWW 2004 |
| bandwagon | the most rated: `most` | N of all ratings | O'Mahony et al. 2005, in the survey |
| segment | those that you name: `most` | `least` | Burke et al. 2005, in the survey |
| love_hate | none | the reverse of the targets' | the survey |

The targets get `most`, or `least` by a nuke attack; the rest of a bandwagon or a segment stays the
same then. The survey is Mobasher et al., "Toward trustworthy recommender systems" (ACM TOIT 7(4),
2007). Of implicit feedback, where all values are the same, the items alone tell the kinds apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from embattle.data.account import listed
from embattle.data.ratings import Floats, Ints, Ratings, together
from embattle.errors import InputError, closest

KINDS = ("random", "average", "bandwagon", "segment", "love_hate")

# Items that a bandwagon jumps on, where nobody says how many.
POPULAR = 10


@dataclass(frozen=True)
class Fakes:
    """The events of F fake users.

    Attributes:
        ratings: the E fake events alone, user by user; the F users have the numbers after those of
            the genuine ones, and `user_count` counts both.
        targets: [T] int64 items that are pushed or nuked; every profile has them all.
        selected: [S] int64 items that every profile has beside them.
        fillers: how many further items a profile has.
        times_of: [E] int64 genuine events, by position, whose times the fake ones have.
    """

    ratings: Ratings
    targets: Ints
    selected: Ints
    fillers: int
    times_of: Ints

    @property
    def users(self) -> Ints:
        """[F] int64 numbers of the fake users."""
        return np.unique(self.ratings.users)

    def among(self, genuine: Ratings) -> Ratings:
        """The genuine events, then the fake ones, with the users of both."""
        users = self.ratings.user_count
        return together(
            Ratings(
                genuine.users,
                genuine.items,
                genuine.values,
                genuine.times,
                users,
                genuine.item_count,
            ),
            self.ratings,
        )


def fake_users(
    ratings: Ratings,
    kind: str,
    targets: Sequence[int] | Ints,
    *,
    count: int | None = None,
    share: float | None = None,
    fillers: int | None = None,
    nuke: bool = False,
    popular: int | None = None,
    segment: Sequence[int] | Ints = (),
    seed: int = 0,
) -> Fakes:
    """Makes fake users for ratings, see the module.

    Ratings are the nearest of those that occur in the data. Fillers are distinct, drawn uniformly,
    and neither targets nor selected items. Times are drawn from the genuine events.

    Args:
        ratings: the genuine events.
        kind: the template, one of `KINDS`.
        targets: [T] items to push, or to nuke.
        count: fake users; without it, `share` says how many.
        share: fake users as a share of the genuine ones, at least one user; .01 without `count`.
        fillers: of each profile; None makes profiles as long as the mean genuine one.
        nuke: rate the targets worst instead of best.
        popular: the most rated items that a bandwagon rates; None takes `POPULAR`.
        segment: the items that the attacked segment of users likes.
        seed: decides all draws.

    Returns:
        The fake events.

    Raises:
        InputError: an argument that is out of range or does not go with the kind; too few items;
            nuke where all ratings are the same.
    """
    if kind not in KINDS:
        raise InputError(f"fake_users: kind {kind!r} is not known; {closest(kind, KINDS)}")
    if not len(ratings):
        raise InputError("fake_users: ratings has no events; give the genuine ones")
    aims = _items("targets", targets, ratings.item_count)
    if not len(aims):
        raise InputError("fake_users: targets is empty; name an item at least")
    scale = np.unique(ratings.values)
    if nuke and len(scale) == 1:
        raise InputError(
            f"fake_users: nuke=True, but all ratings are {scale[0]:g}: no rating says that an item "
            "is bad; push other items instead"
        )
    selected = _selected(ratings, kind, aims, popular, segment)
    users = _count(ratings, count, share)
    others = np.setdiff1d(np.arange(ratings.item_count), np.append(aims, selected))
    length = _fillers(ratings, fillers, len(aims) + len(selected), len(others))

    draw = np.random.default_rng(seed)
    chosen = others[_distinct(draw, users, length, len(others))]
    least, most = scale[0], scale[-1]
    aimed = least if nuke else most
    if kind == "segment":
        values = np.full(chosen.shape, least)
    elif kind == "love_hate":
        values = np.full(chosen.shape, most if nuke else least)
    else:
        mean, deviation = _moments(ratings, chosen, by_item=kind == "average")
        values = _nearest(scale, draw.normal(mean, deviation, chosen.shape))

    def rows(each: Floats | Ints | float, like: Ints) -> Floats | Ints:
        return np.broadcast_to(each, (users, len(like)))

    items = np.hstack([rows(aims, aims), rows(selected, selected), chosen])
    rated = np.hstack([rows(aimed, aims), rows(most, selected), values])
    times_of = draw.integers(0, len(ratings), items.size)
    total = ratings.user_count + users
    fakes = Ratings(
        np.repeat(np.arange(ratings.user_count, total), items.shape[1]),
        items.ravel(),
        rated.ravel(),
        ratings.times[times_of],
        total,
        ratings.item_count,
    )
    return Fakes(fakes, aims, selected, length, times_of)


def _selected(
    ratings: Ratings,
    kind: str,
    targets: Ints,
    popular: int | None,
    segment: Sequence[int] | Ints,
) -> Ints:
    """The items that every profile has beside the targets."""
    named = _items("segment", segment, ratings.item_count)
    if kind != "bandwagon" and popular is not None:
        raise InputError(f"fake_users: popular={popular} is for kind 'bandwagon', not {kind!r}")
    if kind != "segment" and len(named):
        raise InputError(
            f"fake_users: segment={named.tolist()} is for kind 'segment', not {kind!r}"
        )
    if kind == "segment":
        both = np.intersect1d(named, targets)
        if len(both):
            raise InputError(f"fake_users: segment has targets in it: {both.tolist()}; drop them")
        if not len(named):
            raise InputError("fake_users: segment is empty; name items that the segment likes")
        return named
    if kind == "bandwagon":
        most = POPULAR if popular is None else _whole("popular", popular, 1)
        best = np.argsort(-ratings.popularity(), kind="stable")
        best = best[~np.isin(best, targets)]
        if most > len(best):
            raise InputError(
                f"fake_users: popular={most}, but there are {len(best)} items beside the targets"
            )
        return best[:most]
    return named


def _count(ratings: Ratings, count: int | None, share: float | None) -> int:
    """How many fake users are wanted."""
    if count is not None:
        if share is not None:
            raise InputError(f"fake_users: count={count} and share={share}; give one of them")
        return _whole("count", count, 1)
    share = 0.01 if share is None else share
    if not 0 < share < math.inf:
        raise InputError(f"fake_users: share must be above 0, got {share}")
    return max(1, round(share * ratings.user_count))


def _fillers(ratings: Ratings, fillers: int | None, others: int, most: int) -> int:
    """How many fillers a profile has beside `others` items, of `most` that there are."""
    if fillers is None:
        mean = len(ratings) / len(np.unique(ratings.users))
        return min(most, max(0, round(mean) - others))
    if _whole("fillers", fillers, 0) > most:
        raise InputError(
            f"fake_users: fillers={fillers}, but there are {most} items beside targets and "
            "selected ones"
        )
    return fillers


def _distinct(draw: np.random.Generator, rows: int, count: int, below: int) -> Ints:
    """[rows, count] numbers below `below`, each row's distinct; all sets are equally likely.

    Floyd's algorithm (Bentley, CACM 30(9), 1987), for all rows at once.
    """
    found = np.empty((rows, count), dtype=np.int64)
    for place, top in enumerate(range(below - count, below)):
        drawn = draw.integers(0, top + 1, rows)
        again = (found[:, :place] == drawn[:, None]).any(1)
        found[:, place] = np.where(again, top, drawn)
    return found


def _moments(ratings: Ratings, items: Ints, *, by_item: bool) -> tuple[Floats, Floats]:
    """Mean and deviation of all ratings or, where there are some, of each of the items."""
    mean, deviation = ratings.values.mean(), ratings.values.std()
    if not by_item:
        return mean, deviation
    count = ratings.popularity()
    rated = np.maximum(count, 1)
    means = np.bincount(ratings.items, ratings.values, ratings.item_count) / rated
    apart = (ratings.values - means[ratings.items]) ** 2
    deviations = np.sqrt(np.bincount(ratings.items, apart, ratings.item_count) / rated)
    means[count == 0], deviations[count == 0] = mean, deviation
    return means[items], deviations[items]


def _nearest(scale: Floats, values: Floats) -> Floats:
    """The nearest value of an ascending scale; the lower one half-way between two."""
    found: Floats = scale[np.searchsorted((scale[1:] + scale[:-1]) / 2, values)]
    return found


def _items(name: str, items: Sequence[int] | Ints, count: int) -> Ints:
    """Item numbers as an array, each once."""
    found = np.asarray(items if len(items) else [], dtype=None if len(items) else np.int64)
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise InputError(f"fake_users: {name} must be whole numbers of items, got {items!r}")
    wrong = found[(found < 0) | (found >= count)]
    if len(wrong):
        raise InputError(
            f"fake_users: {name} must be in [0, {count}), got {listed([str(i) for i in wrong])}"
        )
    distinct = found.astype(np.int64)
    if len(np.unique(distinct)) < len(distinct):
        raise InputError(f"fake_users: {name} has an item twice: {distinct.tolist()}")
    return distinct


def _whole(name: str, value: int, least: int) -> int:
    if value != int(value) or value < least:
        raise InputError(f"fake_users: {name} must be a whole number >= {least}, got {value}")
    return int(value)
