"""Questions about taste: what a user liked, and one more title that she liked or never met."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from embattle.data.divide import TEST, TRAIN, VALIDATION, leave_one_out
from embattle.data.negatives import NegativeSampler
from embattle.data.ratings import Ratings
from embattle.errors import InputError

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Questions:
    """N questions; half of them are about an item that was liked, next to one about another.

    Attributes:
        users: [N] int64, who is asked about.
        items: [N] int64, what.
        liked: [N] bool, whether she liked it; what she did not, she never rated.
        history: [N, length] int64, the items that she liked latest before, oldest first; -1 comes
            before them where there are fewer.
    """

    users: Ints
    items: Ints
    liked: NDArray[np.bool_]
    history: Ints

    def __len__(self) -> int:
        return len(self.users)


def ask(
    ratings: Ratings,
    *,
    at_least: float,
    length: int,
    limits: dict[str, int | None],
    seed: int,
) -> dict[str, Questions]:
    """Divides likes by leave-one-out, and puts beside each an item that the user never rated.

    A user's latest like is the test part's, the one before it the validation part's; every other
    like with one before it is the training part's.

    Args:
        ratings: all events.
        at_least: from this value on a rating is a like.
        length: items of a history at most.
        limits: for each part the most questions, of which those kept are drawn; None keeps all.
        seed: decides what is drawn.

    Returns:
        The parts by name, in an order drawn by the seed.

    Raises:
        InputError: nothing was liked by anyone who liked something before.
    """
    likes = ratings.take(ratings.values >= at_least)
    part = leave_one_out(likes.users, likes.items, likes.times)
    order = np.lexsort((likes.items, likes.times, likes.users))
    order = order[part[order] >= 0]
    users, items, part = likes.users[order], likes.items[order], part[order]
    first = np.searchsorted(users, users)  # the place of each user's first like
    draw = NegativeSampler(
        ratings.users,
        ratings.items,
        user_count=ratings.user_count,
        item_count=ratings.item_count,
        seed=seed,
    ).draw
    found = {}
    for step, (name, number) in enumerate(
        (("train", TRAIN), ("validation", VALIDATION), ("test", TEST))
    ):
        places = np.flatnonzero((part == number) & (np.arange(len(users)) > first))
        places = np.random.default_rng([seed, step]).permutation(places)
        limit = limits.get(name)
        places = places[: None if limit is None else max(1, limit // 2)]
        back = places[:, None] + np.arange(-length, 0)
        history = np.where(back >= first[places, None], items[np.maximum(back, 0)], -1)
        both = np.stack([items[places], draw(users[places], 1, step)[:, 0]], axis=1)
        found[name] = Questions(
            np.repeat(users[places], 2),
            both.reshape(-1),
            np.tile([True, False], len(places)),
            np.repeat(history, 2, axis=0),
        )
    if not len(found["train"]) or not len(found["test"]):
        raise InputError(
            f"data.at_least: no user has three ratings of at least {at_least:g}, to learn from and "
            "to test on; lower it"
        )
    return found


def plain_title(title: str) -> str:
    """A film's title as one says it: `Usual Suspects, The (1995)` is `The Usual Suspects`."""
    bare = re.sub(r"(\s*\([^()]*\))*\s*\(\d{4}\)$", "", title.strip())
    moved = re.fullmatch(r"(.+), (The|A|An)", bare)
    return (f"{moved[2]} {moved[1]}" if moved else bare) or title
