"""Ratings of items by users, as parallel arrays."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embattle.data.account import Account
from embattle.data.divide import TEST, TRAIN, leave_one_out, pairs
from embattle.data.keyed import plain_name
from embattle.data.labels import is_blank
from embattle.data.looks import Points, guess_events, look_all, number_in
from embattle.data.moments import Moments
from embattle.data.tables import Table
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


def read_ratings(
    path: Path,
    columns: Sequence[str | None] | None = None,
    *,
    account: Account | None = None,
    drop_blank: bool = False,
    missing: Collection[str] = (),
    **options: Any,
) -> Ratings:
    """Reads ratings from any table; users and items are numbered in natural order.

    Args:
        path: the file, see `embattle.data.tables.Table`; GroupLens' and RecBole's are known.
        columns: the names of the columns that hold user, item, rating and time; None guesses by
            their names. Without a rating (None) every event counts 1; without a time all have
            time 0.
        account: is told what was read, dropped and guessed.
        drop_blank: leave rows with an empty cell out, instead of refusing the file.
        missing: cells that are as good as empty, such as NA.
        options: of `embattle.data.tables.Table`: encoding, delimiter, header.

    Returns:
        All rows. Of the file, the numbers alone are held, and each user's and item's name once.

    Raises:
        InputError: if the file cannot be read, has no such columns, or a cell is empty or, for
            rating and time, is no finite number (for time, no date either).
    """
    return read_named_ratings(
        path, columns, account=account, drop_blank=drop_blank, missing=missing, **options
    )[0]


def read_named_ratings(
    path: Path,
    columns: Sequence[str | None] | None = None,
    *,
    account: Account | None = None,
    drop_blank: bool = False,
    missing: Collection[str] = (),
    **options: Any,
) -> tuple[Ratings, list[str], list[str]]:
    """Reads ratings as `read_ratings` does, and the names of users and items by number, as text.

    Names are as `plain_name` has them: 5 and 5.0 are one user.
    """
    account = Account() if account is None else account
    if columns is None:
        roles = guess_events(look_all(Table(path, **options).sample()))
        if "user" not in roles or "item" not in roles:
            raise InputError(
                f"{path}: no columns of users and items can be told by their names; name user, "
                "item, rating and time"
            )
    else:
        named_roles = zip(("user", "item", "rating", "time"), columns, strict=False)
        roles = {role: name for role, name in named_roles if name is not None}
    table = Table(path, list(roles.values()), **options)
    account.note("file", f"{path}: {table.form.words()}")
    for role, name in roles.items():
        account.note(role, f"{name!r}" + (" (guessed)" if columns is None else ""))
    known: dict[str, dict[Any, int]] = {"user": {}, "item": {}}
    codes: dict[str, list[NDArray[Any]]] = {role: [] for role in known}
    numbers = {
        role: _Numbers(path, name, role) for role, name in roles.items() if role not in known
    }
    dropped, none, points = 0, set(missing), Points()
    for block in table:
        cells = [block[name] for name in roles.values()]
        if any(_has_blank(column, none) for column in cells):
            if not drop_blank:
                name = next(n for n in roles.values() if _has_blank(block[n], none))
                raise InputError(
                    f"{path}: column {name!r} has empty cells; drop those rows "
                    "(data.blank_cells: drop)"
                )
            rows = [
                row
                for row in zip(*cells, strict=True)
                if not any(is_blank(cell, none) for cell in row)
            ]
            dropped += len(cells[0]) - len(rows)
            cells = [list(column) for column in zip(*rows, strict=True)] or [[] for _ in cells]
        for role, column in zip(roles, cells, strict=True):
            if role in known:
                number = known[role]
                found_codes = [number.setdefault(value, len(number)) for value in column]
                codes[role].append(np.asarray(found_codes, dtype=np.int64))
            else:
                numbers[role].add(column)
                if role == "rating":
                    points.add(column)
    found = {role: np.concatenate(blocks) for role, blocks in codes.items()}
    found |= {role: column.all() for role, column in numbers.items()}
    events = len(found["user"])
    if not events:
        raise InputError(f"{path} has no row without empty cells; choose other columns")
    named: dict[str, list[str]] = {}
    for role, number in known.items():
        plain: dict[str, int] = {}
        codes_of = [plain.setdefault(plain_name(cell), len(plain)) for cell in number]
        rank = _in_natural_order(list(plain))
        found[role] = rank[np.asarray(codes_of, dtype=np.int64)[found[role]]]
        named[role] = [name for _, name in sorted(zip(rank, plain, strict=True))]
    account.note("rows", f"{table.rows:,} of {len(table.names)} columns")
    if dropped:
        account.note("dropped", f"{dropped:,} rows with empty cells")
    if "rating" in roles:
        points.warn(roles["rating"], account)
    table.tell_ragged(account)
    account.note("users", f"{len(named['user']):,}")
    account.note("items", f"{len(named['item']):,}")
    again = events - len(np.unique(pairs(found["user"], found["item"])))
    if again:
        account.note("duplicates", f"{again:,} events repeat a user and an item")
    ratings = Ratings(
        found["user"],
        found["item"],
        found.get("rating", np.ones(events)),
        found.get("time", np.zeros(events)),
        len(named["user"]),
        len(named["item"]),
    )
    return ratings, named["user"], named["item"]


def _has_blank(column: list[Any], missing: set[str]) -> bool:
    """Whether a cell of a column of one kind is blank."""
    if None in column or "" in column:
        return True
    if column and isinstance(column[0], str):
        known = missing and not missing.isdisjoint(map(str.strip, column))
        return bool(known) or any(map(str.isspace, column))
    if not missing:
        return any(value != value for value in column)
    return any(is_blank(value, missing) for value in column)


def _in_natural_order(names: list[str]) -> Ints:
    """[names] rank of each name: by value where all are whole numbers, else as text."""
    try:
        order = sorted(range(len(names)), key=lambda i: (int(names[i]), names[i]))
    except ValueError:
        order = sorted(range(len(names)), key=lambda i: names[i])
    rank = np.empty(len(names), dtype=np.int64)
    rank[order] = np.arange(len(names))
    return rank


def hold_out_latest(ratings: Ratings) -> tuple[Ratings, Ratings]:
    """Takes each user's latest event away (leave-one-out by time).

    Users with a single item keep it. Of events at the same time the one with the largest item
    number counts as the latest. Earlier events with an item that was taken are left out.

    Args:
        ratings: all events.

    Returns:
        What remains, and what was taken: at most one event a user.
    """
    part = leave_one_out(ratings.users, ratings.items, ratings.times, validation=False)
    return ratings.take(part == TRAIN), ratings.take(part == TEST)


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


class _Numbers:
    """A column of numbers, or of dates as seconds since 1970, a block of cells at a time.

    Args:
        path: the file, for messages.
        name: of the column.
        role: what it holds: a `time` may be given as dates.
    """

    def __init__(self, path: Path, name: str, role: str) -> None:
        self._dates = role == "time"
        self._where = f"{path}: column {name!r}"
        self._blocks: list[Floats] = []
        self._moments: Moments | None = None

    def add(self, cells: list[Any]) -> None:
        """Take further cells.

        Raises:
            InputError: one is no finite number, and no date where dates may be.
        """
        try:
            self._add(cells)
        except ValueError as error:
            raise self._wrong(error) from error

    def all(self) -> Floats:
        """The numbers of all cells.

        Raises:
            InputError: see `Moments.seconds`.
        """
        if self._moments is None:
            return np.concatenate([np.empty(0), *self._blocks])
        try:
            return self._moments.seconds()
        except ValueError as error:
            raise self._wrong(error) from error

    def _add(self, cells: list[Any]) -> None:
        if self._moments is None:
            found = self._as_numbers(cells)
            if found is not None:
                if not np.isfinite(found).all():
                    raise InputError(
                        f"{self._where} has values that are not finite; drop those rows, or name "
                        "them in data.missing"
                    )
                self._blocks.append(found)
                return
            if self._blocks:
                raise ValueError("the first are numbers and later ones are not")
            self._moments = Moments()
        self._moments.add(cells)

    def _as_numbers(self, cells: list[Any]) -> Floats | None:
        """Cells as numbers; None where they may be dates."""
        try:
            return np.asarray(cells, dtype=np.float64)
        except (TypeError, ValueError):
            try:
                return np.array([number_in(cell) for cell in cells], dtype=np.float64)
            except ValueError:
                if self._dates:
                    return None
                raise

    def _wrong(self, error: ValueError) -> InputError:
        what = "numbers or dates" if self._dates else "numbers"
        return InputError(
            f"{self._where} must hold {what}: {error} (data.missing: [...] names what stands for "
            "no value)"
        )
