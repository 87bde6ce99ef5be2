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

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from embattle.data.profile_request import Fakes as Fakes
from embattle.data.profile_request import items_of, request, target_items, whole
from embattle.data.ratings import Ints, Ratings, together
from embattle.errors import InputError, closest

TEMPLATES = ("random", "average", "bandwagon", "segment", "love_hate")

# Items that a bandwagon jumps on, where nobody says how many.
POPULAR = 10

_WHO = "fake_profiles"


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
    aims = target_items(_WHO, ratings, targets)
    scale = np.unique(ratings.values)
    if nuke and len(scale) == 1:
        raise InputError(
            f"fake_profiles: nuke=True, but all ratings are {scale[0]:g}: none says that an item "
            "is bad; push other items instead"
        )
    selected = _selected(ratings, template, aims, popular, segment)
    wanted = request(
        _WHO,
        ratings,
        aims,
        selected=selected,
        accounts=accounts,
        share=share,
        fillers=fillers,
        nuke=nuke,
        repeats=repeats,
        seed=seed,
    )
    places = _distinct(wanted.draw, wanted.accounts, wanted.fillers, len(wanted.others))
    chosen = wanted.others[places]
    if template == "segment":
        values = np.full(chosen.shape, scale[0])
    elif template == "love_hate":
        values = np.full(chosen.shape, scale[-1] if nuke else scale[0])
    else:
        values = wanted.drawn_values(chosen, by_item=template == "average")
    return wanted.fakes(chosen, values)


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
    named = items_of(_WHO, "segment", segment, ratings.item_count)
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
        most = POPULAR if popular is None else whole(_WHO, "popular", popular, 1)
        best = np.argsort(-ratings.popularity(), kind="stable")
        best = best[~np.isin(best, targets)]
        if most > len(best):
            raise InputError(
                f"fake_profiles: popular={most}, but there are {len(best)} items beside the targets"
            )
        return best[:most]
    return named


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
