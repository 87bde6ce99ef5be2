"""What users met, in the order of time, as tensors for sequential models."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from embattle import checks
from embattle.data.ratings import Ratings


def histories(ratings: Ratings, length: int) -> Tensor:
    """Give each user's latest items, oldest first, padded at the end.

    Events at the same time are in the order of the items' numbers, as in `hold_out_latest`.

    Args:
        ratings: all events.
        length: how many items at most.

    Returns:
        [user_count, length] int64; padding is `ratings.item_count`.
    """
    length = checks.integer("histories", "length", length, 1)
    items, owner, left = _in_order(ratings)
    kept = left < length
    count = np.minimum(np.bincount(ratings.users, minlength=ratings.user_count), length)
    place = count[owner[kept]] - 1 - left[kept]
    found = np.full((ratings.user_count, length), ratings.item_count)
    found[owner[kept], place] = items[kept]
    return torch.from_numpy(found)


def windows(ratings: Ratings, length: int) -> tuple[Tensor, Tensor]:
    """Cut each user's history into stretches to train on, from the latest item backwards.

    The last item of a stretch is the first one of the stretch after it, so that each item but a
    user's first is a target once. Users with a single event have none.

    Args:
        ratings: all events.
        length: items of a stretch at most.

    Returns:
        Sequences and, for each place, the item that came next, both [W, length] int64, padded at
        the end with `ratings.item_count`.
    """
    length = checks.integer("windows", "length", length, 1)
    items, owner, left = _in_order(ratings)
    # A pair of an item and the next; the pairs of a user are counted from the latest.
    pair = np.flatnonzero(left > 0)
    stretch, back = np.divmod(left[pair] - 1, length)
    key = owner[pair] * (len(items) + 1) - stretch
    _, row, size = np.unique(key, return_inverse=True, return_counts=True)
    place = size[row] - 1 - back
    found = np.full((2, len(size), length), ratings.item_count)
    found[0, row, place] = items[pair]
    found[1, row, place] = items[pair + 1]
    sequences, targets = torch.from_numpy(found)
    return sequences, targets


def _in_order(ratings: Ratings) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Items and users by user and time, and how many of the user's events come later."""
    order = np.lexsort((ratings.items, ratings.times, ratings.users))
    owner = ratings.users[order]
    ends = np.bincount(owner, minlength=ratings.user_count).cumsum()
    return ratings.items[order], owner, ends[owner] - 1 - np.arange(len(order))
