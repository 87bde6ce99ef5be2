"""Fake profiles: the accounts that an attacker registers to push an item.

Templates of profile injection ("shilling") attacks, which need no access to the model. A profile
gives the target the highest rating and hides it among filler items:

- `random`: fillers rated as the whole data set is, N(mean, standard deviation);
- `average`: each filler rated as others rate it, N(its mean, its standard deviation);
- `bandwagon`: `random`, and the most rated items get the highest rating.

The names are the literature's: Lam and Riedl, "Shilling recommender systems for fun and profit",
WWW 2004, pages 393-402; Mobasher, Burke, Bhaumik and Williams, "Toward trustworthy recommender
systems: an analysis of attack models and algorithm robustness", ACM TOIT 7(4), 2007. The templates
here are our reading of them, defined by this text.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from embattle.data.ratings import Floats, Ratings
from embattle.errors import InputError, closest

Template = Literal["random", "average", "bandwagon"]


def fake_profiles(
    ratings: Ratings,
    target: int,
    *,
    template: Template,
    accounts: int,
    fillers: int = 36,
    popular: int = 5,
    repeats: int = 1,
    seed: int = 0,
) -> Ratings:
    """Makes the events of fake accounts; they rate on the genuine ratings' scale and in its steps.

    Args:
        ratings: the genuine events, from which scale, means and popularity are taken.
        target: the item to push.
        template: see the module.
        accounts: how many accounts; they are numbered on from the genuine users.
        fillers: different items that each account rates besides, drawn uniformly.
        popular: most rated items that each account of the bandwagon rates highest.
        repeats: events that each account gives the target, for data in which a user may come
            back to an item: plays, clicks, purchases.
        seed: decides the draws.

    Returns:
        The fake events alone, timed at the genuine events' latest time; `user_count` includes
        genuine users.

    Raises:
        InputError: an argument out of range, or no genuine events.
    """
    if template not in get_args(Template):
        raise InputError(
            f"fake_profiles: no template is called {template!r}; "
            f"{closest(str(template), get_args(Template))}"
        )
    if not len(ratings):
        raise InputError("fake_profiles: there are no genuine ratings to imitate; give some")
    if not 0 <= target < ratings.item_count:
        raise InputError(
            f"fake_profiles: target must be an item from 0 to {ratings.item_count - 1}, "
            f"got {target}"
        )
    if accounts < 0 or fillers < 0 or popular < 0 or repeats < 1:
        raise InputError(
            "fake_profiles: accounts, fillers and popular must be >= 0 and repeats >= 1, got "
            f"{accounts}, {fillers}, {popular} and {repeats}"
        )
    selected = np.empty(0, dtype=np.int64)
    if template == "bandwagon":
        order = np.argsort(-ratings.popularity(), kind="stable")
        selected = order[order != target][:popular]
    others = np.setdiff1d(np.arange(ratings.item_count), np.append(selected, target))
    if fillers > len(others):
        raise InputError(
            f"fake_profiles: {fillers} fillers were asked for, but only {len(others)} other items "
            "remain; ask for fewer"
        )
    rng = np.random.default_rng(seed)
    mean, spread = _moments(ratings, by_item=template == "average")
    highest = float(ratings.values.max())
    filled = [rng.choice(others, fillers, replace=False) for _ in range(accounts)]
    items = [
        np.concatenate([np.full(repeats, target, dtype=np.int64), selected, chosen])
        for chosen in filled
    ]
    pushed = np.full(repeats + len(selected), highest)
    values = [
        np.concatenate([pushed, _on_scale(rng.normal(mean[chosen], spread[chosen]), ratings)])
        for chosen in filled
    ]
    size = repeats + len(selected) + fillers
    users = np.repeat(np.arange(accounts, dtype=np.int64) + ratings.user_count, size)
    return Ratings(
        users,
        np.concatenate(items) if items else np.empty(0, dtype=np.int64),
        np.concatenate(values) if values else np.empty(0),
        np.full(len(users), float(ratings.times.max())),
        ratings.user_count + accounts,
        ratings.item_count,
    )


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
    return Ratings(
        np.concatenate([ratings.users, fakes.users]),
        np.concatenate([ratings.items, fakes.items]),
        np.concatenate([ratings.values, fakes.values]),
        np.concatenate([ratings.times, fakes.times]),
        max(ratings.user_count, fakes.user_count),
        ratings.item_count,
    )


def _moments(ratings: Ratings, *, by_item: bool) -> tuple[Floats, Floats]:
    """[item_count] mean and standard deviation; those of all ratings where an item has none."""
    mean = np.full(ratings.item_count, ratings.values.mean())
    spread = np.full(ratings.item_count, ratings.values.std())
    if by_item:
        count = ratings.popularity()
        rated = count > 0

        def average(values: Floats) -> Floats:
            sums = np.bincount(ratings.items, values, len(count)).astype(np.float64)
            found: Floats = sums[rated] / count[rated]
            return found

        mean[rated] = average(ratings.values)
        spread[rated] = np.sqrt(average((ratings.values - mean[ratings.items]) ** 2))
    return mean, spread


def _on_scale(values: Floats, ratings: Ratings) -> Floats:
    """Each value moved to the nearest rating that genuine users give."""
    scale = np.unique(ratings.values)
    middle = (scale[1:] + scale[:-1]) / 2
    return scale[np.searchsorted(middle, values)]
