"""Fake profiles: the accounts that an attacker registers to push an item, or to nuke it.

Templates of profile injection ("shilling") attacks, which need no access to the model. A profile
rates the targets, some selected items, and fillers that are drawn for each account.
With the scale's best rating `most`, its worst `least`, and normal draws `N(mean, deviation)`:

| template | selected items | fillers | from |
|---|---|---|---|
| random | none | N of all ratings | Lam and Riedl 2004 |
| average | none | N of the item's ratings | Lam and Riedl 2004 |
| bandwagon | the most rated: `most` | N of all ratings | O'Mahony et al. 2005, in the survey |
| segment | those that you name: `most` | `least` | Burke et al. 2005, in the survey |
| love_hate | none | the reverse of the targets' | the survey |

The targets get `most`, or `least` by a nuke attack; the rest of a bandwagon or a segment stays the
same then. Of implicit feedback, where all values are the same, the items alone tell the templates
apart.

Lam and Riedl: "Shilling recommender systems for fun and profit", WWW 2004, pages 393-402. The
survey: Mobasher, Burke, Bhaumik and Williams, "Toward trustworthy recommender systems: an analysis
of attack models and algorithm robustness", ACM TOIT 7(4), 2007. The templates here are our reading
of them, defined by this text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from embattle.data.account import listed
from embattle.data.ratings import Floats, Ints, Ratings, together
from embattle.errors import InputError, closest

TEMPLATES = ("random", "average", "bandwagon", "segment", "love_hate")

# Items that a bandwagon jumps on, where nobody says how many.
POPULAR = 10


@dataclass(frozen=True)
class Fakes:
    """The events of F fake accounts.

    Attributes:
        ratings: the E fake events alone, account by account; `user_count` counts genuine users too.
        users: [F] int64 the accounts' numbers, which follow those of the genuine users.
        targets: [T] int64 items that are pushed or nuked; every profile has them all.
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


def fake_profiles(
    ratings: Ratings,
    targets: Sequence[int] | Ints,
    *,
    template: str,
    accounts: int | None = None,
    share: float | None = None,
    fillers: int | None = None,
    nuke: bool = False,
    popular: int | None = None,
    segment: Sequence[int] | Ints = (),
    repeats: int = 1,
    seed: int = 0,
) -> Fakes:
    """Makes fake accounts; they rate on the genuine ratings' scale and in its steps.

    Fillers are distinct, drawn uniformly, and neither targets nor selected items. Times are drawn
    from those of the genuine events.

    Args:
        ratings: the genuine events, from which scale, means and popularity are taken.
        targets: [T] items to push, or to nuke.
        template: one of `TEMPLATES`, see the module.
        accounts: how many; without it, `share` says so.
        share: accounts as a share of the genuine users, at least one; .01 without `accounts`.
        fillers: of each account; None makes profiles as long as the mean genuine one.
        nuke: rate the targets worst instead of best.
        popular: the most rated items that a bandwagon rates; None takes `POPULAR`.
        segment: the items that the attacked segment of users likes.
        repeats: events that each account gives each target, for data in which a user may come
            back to an item: plays, clicks, purchases.
        seed: decides the draws.

    Returns:
        The fake events.

    Raises:
        InputError: an argument that is out of range or does not go with the template; too few
            items; no genuine events; nuke where all ratings are the same.
    """
    if template not in TEMPLATES:
        raise InputError(
            f"fake_profiles: no template is called {template!r}; {closest(template, TEMPLATES)}"
        )
    if not len(ratings):
        raise InputError("fake_profiles: ratings has no events; give the genuine ones")
    aims = _items("targets", targets, ratings.item_count)
    if not len(aims):
        raise InputError("fake_profiles: targets is empty; name an item at least")
    scale = np.unique(ratings.values)
    if nuke and len(scale) == 1:
        raise InputError(
            f"fake_profiles: nuke=True, but all ratings are {scale[0]:g}: none says that an item "
            "is bad; push other items instead"
        )
    selected = _selected(ratings, template, aims, popular, segment)
    count = _accounts(ratings, accounts, share)
    repeats = _whole("repeats", repeats, 1)
    others = np.setdiff1d(np.arange(ratings.item_count), np.append(aims, selected))
    length = _fillers(ratings, fillers, len(aims) + len(selected), len(others))

    draw = np.random.default_rng(seed)
    chosen = others[_distinct(draw, count, length, len(others))]
    least, most = scale[0], scale[-1]
    aimed = least if nuke else most
    if template == "segment":
        values = np.full(chosen.shape, least)
    elif template == "love_hate":
        values = np.full(chosen.shape, most if nuke else least)
    else:
        mean, deviation = _moments(ratings, by_item=template == "average")
        values = _nearest(scale, draw.normal(mean[chosen], deviation[chosen]))

    head = np.concatenate([np.repeat(aims, repeats), selected])
    rated = np.where(np.arange(len(head)) < len(aims) * repeats, aimed, most)
    items = np.hstack([np.tile(head, (count, 1)), chosen])
    values = np.hstack([np.tile(rated, (count, 1)), values])
    users = np.arange(ratings.user_count, ratings.user_count + count)
    times_of = draw.integers(0, len(ratings), items.size)
    fakes = Ratings(
        np.repeat(users, items.shape[1]),
        items.ravel(),
        values.ravel(),
        ratings.times[times_of],
        ratings.user_count + count,
        ratings.item_count,
    )
    return Fakes(fakes, users, aims, selected, length, times_of)


def inject(ratings: Ratings, fakes: Ratings) -> Ratings:
    """Genuine events followed by fake ones.

    Raises:
        InputError: if the two number their items differently.
    """
    if fakes.item_count != ratings.item_count:
        raise InputError(
            f"inject: the fakes know {fakes.item_count} items and the ratings "
            f"{ratings.item_count}; make the fakes from these ratings"
        )
    counted = replace(ratings, user_count=max(ratings.user_count, fakes.user_count))
    return together(counted, fakes)


def _selected(
    ratings: Ratings,
    template: str,
    targets: Ints,
    popular: int | None,
    segment: Sequence[int] | Ints,
) -> Ints:
    """The items that every profile has beside the targets."""
    named = _items("segment", segment, ratings.item_count)
    if template != "bandwagon" and popular is not None:
        raise InputError(
            f"fake_profiles: popular={popular} is for template 'bandwagon', not {template!r}"
        )
    if template != "segment" and len(named):
        raise InputError(
            f"fake_profiles: segment ({len(named)} items) is for template 'segment', not "
            f"{template!r}"
        )
    if template == "segment":
        both = np.intersect1d(named, targets)
        if len(both):
            raise InputError(
                f"fake_profiles: segment has targets in it: {both.tolist()}; drop them"
            )
        if not len(named):
            raise InputError("fake_profiles: segment is empty; name items that the segment likes")
        return named
    if template == "bandwagon":
        most = POPULAR if popular is None else _whole("popular", popular, 1)
        best = np.argsort(-ratings.popularity(), kind="stable")
        best = best[~np.isin(best, targets)]
        if most > len(best):
            raise InputError(
                f"fake_profiles: popular={most}, but there are {len(best)} items beside the targets"
            )
        return best[:most]
    return named


def _accounts(ratings: Ratings, accounts: int | None, share: float | None) -> int:
    """How many accounts are wanted."""
    if accounts is not None:
        if share is not None:
            raise InputError(
                f"fake_profiles: accounts={accounts} and share={share}; give one of them"
            )
        return _whole("accounts", accounts, 0)
    share = 0.01 if share is None else share
    if not 0 < share < math.inf:
        raise InputError(f"fake_profiles: share must be above 0, got {share}")
    return max(1, round(share * ratings.user_count))


def _fillers(ratings: Ratings, fillers: int | None, others: int, most: int) -> int:
    """How many fillers a profile has beside `others` items, of `most` that there are."""
    if fillers is None:
        mean = len(ratings) / len(np.unique(ratings.users))
        return min(most, max(0, round(mean) - others))
    if _whole("fillers", fillers, 0) > most:
        raise InputError(
            f"fake_profiles: fillers={fillers}, but there are {most} items beside targets and "
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


def _nearest(scale: Floats, values: Floats) -> Floats:
    """The nearest value of an ascending scale; the lower one half-way between two."""
    found: Floats = scale[np.searchsorted((scale[1:] + scale[:-1]) / 2, values)]
    return found


def _items(name: str, items: Sequence[int] | Ints, count: int) -> Ints:
    """Item numbers as an array, each once."""
    found = np.asarray(items if len(items) else [], dtype=None if len(items) else np.int64)
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise InputError(f"fake_profiles: {name} must be whole numbers of items, got {items!r}")
    wrong = found[(found < 0) | (found >= count)]
    if len(wrong):
        raise InputError(
            f"fake_profiles: {name} must be in [0, {count}), got {listed([str(i) for i in wrong])}"
        )
    distinct = found.astype(np.int64)
    if len(np.unique(distinct)) < len(distinct):
        raise InputError(f"fake_profiles: {name} has an item twice: {distinct.tolist()}")
    return distinct


def _whole(name: str, value: int, least: int) -> int:
    if value != int(value) or value < least:
        raise InputError(f"fake_profiles: {name} must be a whole number >= {least}, got {value}")
    return int(value)
