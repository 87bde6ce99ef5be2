"""Ratings of items by users, as parallel arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embattle.data.tables import read_columns
from embattle.errors import InputError

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Ratings:
    """N events: a user rated an item.

    Attributes:
        users: [N] int64, numbered from 0.
        items: [N] int64, numbered from 0.
        values: [N] float64, the ratings.
        times: [N] float64, larger is later.
        user_count: users there are, with or without events.
        item_count: items there are, with or without events.
    """

    users: Ints
    items: Ints
    values: Floats
    times: Floats
    user_count: int
    item_count: int

    def __len__(self) -> int:
        return len(self.users)

    def take(self, chosen: NDArray[Any]) -> Ratings:
        """The events at these positions, or where this mask is true; the counts stay."""
        return Ratings(
            self.users[chosen],
            self.items[chosen],
            self.values[chosen],
            self.times[chosen],
            self.user_count,
            self.item_count,
        )

    def popularity(self) -> Ints:
        """[item_count] events of each item."""
        return np.bincount(self.items, minlength=self.item_count)


def read_ratings(path: Path, columns: Sequence[str]) -> Ratings:
    """Reads ratings from a CSV or Parquet file; users and items are numbered in natural order.

    Args:
        path: the file, see `embattle.data.tables.read_columns`.
        columns: the names of the columns that hold user, item, rating and time.

    Returns:
        All rows.

    Raises:
        InputError: if the file cannot be read, or a cell is empty or, for rating and time, is no
            finite number.
    """
    return read_named_ratings(path, columns)[0]


def read_named_ratings(path: Path, columns: Sequence[str]) -> tuple[Ratings, list[str], list[str]]:
    """Reads ratings as `read_ratings` does, and the names of users and items by number, as text."""
    table = read_columns(path, columns)
    for name in columns:
        if any(value is None for value in table[name]):
            raise InputError(f"{path}: column {name!r} has empty cells; drop those rows")
    known, numbers = zip(
        *(np.unique(np.asarray(table[name]), return_inverse=True) for name in columns[:2]),
        strict=True,
    )
    values, times = (_numbers(path, name, table[name]) for name in columns[2:])
    users, items = (found.astype(np.int64) for found in numbers)
    ratings = Ratings(users, items, values, times, len(known[0]), len(known[1]))
    by_user, by_item = ([str(name) for name in names.tolist()] for names in known)
    return ratings, by_user, by_item


def hold_out_latest(ratings: Ratings) -> tuple[Ratings, Ratings]:
    """Takes each user's latest event away (leave-one-out by time).

    Users with a single event keep it. Of events at the same time the one with the largest item
    number counts as the latest.

    Args:
        ratings: all events.

    Returns:
        What remains, and what was taken: at most one event a user.
    """
    order = np.lexsort((ratings.items, ratings.times, ratings.users))
    owner = ratings.users[order]
    last = np.append(owner[1:] != owner[:-1], True)[: len(owner)]
    first = np.insert(owner[1:] != owner[:-1], 0, True)[: len(owner)]
    taken = np.zeros(len(ratings), dtype=bool)
    taken[order[last & ~first]] = True
    return ratings.take(~taken), ratings.take(taken)


def together(first: Ratings, second: Ratings) -> Ratings:
    """Joins the events of two parts of the same users and items."""
    return Ratings(
        np.concatenate([first.users, second.users]),
        np.concatenate([first.items, second.items]),
        np.concatenate([first.values, second.values]),
        np.concatenate([first.times, second.times]),
        first.user_count,
        first.item_count,
    )


def _numbers(path: Path, name: str, column: list[Any]) -> Floats:
    try:
        found = np.asarray(column, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: column {name!r} must hold numbers: {error}") from error
    if not np.isfinite(found).all():
        raise InputError(f"{path}: column {name!r} has values that are not finite; drop those rows")
    return found
