"""A copy of a table of ratings with fake users in it, and the record of what is fake."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from embattle.data.account import Account, listed
from embattle.data.formats import parquet_files
from embattle.data.looks import guess_events, look_all
from embattle.data.profiles import Fakes, fake_profiles
from embattle.data.ratings import Ratings, read_named_ratings
from embattle.data.tables import Table
from embattle.errors import InputError, closest
from embattle.files import replacing, sha256, write_text
from embattle.progress import say


@dataclass(frozen=True)
class Plan:
    """What `embattle.data.profiles.fake_profiles` is asked for; items by name."""

    template: str
    targets: Sequence[str]
    accounts: int | None = None
    share: float | None = None
    fillers: int | None = None
    nuke: bool = False
    popular: int | None = None
    segment: Sequence[str] = ()
    seed: int = 0


def manifest_path(out: Path) -> Path:
    """Where the record of what is fake lies beside a poisoned table."""
    return out.with_name(f"{out.name}.manifest.json")


def names_in(text: str) -> list[str]:
    """The names between the commas of a line; in double quotes a name may have commas itself."""
    rows = list(csv.reader([text], skipinitialspace=True))
    return [name.strip() for row in rows for name in row]


def poison(
    path: Path,
    out: Path,
    plan: Plan,
    *,
    columns: Sequence[str | None] | None = None,
    encoding: str | None = None,
    delimiter: str | None = None,
) -> None:
    """Writes a table of ratings with fake users after the genuine rows, and a manifest.

    Args:
        path: the genuine ratings, any table that the jobs read.
        out: the CSV file to write, with the columns of `path`; `manifest_path` says where the
            record of the fakes goes.
        plan: the fake users.
        columns: of user, item, rating and time; without the first two they are guessed.
        encoding, delimiter: of a text file.

    Raises:
        InputError: if either file is there already, the ratings cannot be read, an item is not
            among them, or the plan does not go with them.
    """
    record = manifest_path(out)
    if out.suffix.lower() != ".csv":
        raise InputError(f"--out {out}: poisoned ratings are written as CSV; name a .csv file")
    for file in (out, record):
        if file.exists():
            raise InputError(f"{file} is there already; name another --out, or remove it first")
    named = columns if columns is not None and any(columns) else None
    if named is not None and not all(named[:2]):
        raise InputError(
            f"--user {named[0]!r}, --item {named[1]!r}: name the columns of both, and of --rating "
            "and --time where there are such; or name none"
        )
    account = Account()
    ratings, users, items = read_named_ratings(
        path, named, account=account, encoding=encoding, delimiter=delimiter
    )
    say("\n".join(account.lines()))
    if named is None:
        first = Table(path, encoding=encoding, delimiter=delimiter).sample()
        roles = guess_events(look_all(first))
    else:
        pairs = zip(("user", "item", "rating", "time"), named, strict=False)
        roles = {role: name for role, name in pairs if name is not None}
    both = [name for name in plan.segment if name in plan.targets]
    if both:
        raise InputError(f"--segment: {listed(both)} is among --targets too; drop it from one")
    fakes = fake_profiles(
        ratings,
        _numbers("--targets", plan.targets, items),
        template=plan.template,
        accounts=plan.accounts,
        share=plan.share,
        fillers=plan.fillers,
        nuke=plan.nuke,
        popular=plan.popular,
        segment=_numbers("--segment", plan.segment, items),
        seed=plan.seed,
    )
    new = _new_users(users, len(fakes.users))
    with replacing(out) as part:
        with part.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            copy = _Copy(_whole_table(path, encoding, delimiter), ratings, fakes, roles)
            writer.writerows(copy.rows())
            writer.writerows(copy.fake_rows(new, items))
        facts = {
            "poisoned": {"file": out.name, "sha256": sha256(part)},
            "source": {"file": path.name, "sha256": _hashes(path)},
            "columns": roles,
            "template": plan.template,
            "goal": "nuke" if plan.nuke else "push",
            "targets": [items[i] for i in fakes.targets],
            "selected": [items[i] for i in fakes.selected],
            "fillers": fakes.fillers,
            "seed": plan.seed,
            "genuine_rows": len(ratings),
            "fake_rows": len(fakes.ratings),
            "fake_users": new,
        }
        write_text(record, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
    say(f"{out}: {len(new):,} fake users and {len(fakes.ratings):,} fake rows added")
    say(f"{record}: who they are")


class _Copy:
    """The rows of a table, and fake ones whose ratings and times are written as those there are."""

    def __init__(self, table: Table, ratings: Ratings, fakes: Fakes, roles: dict[str, str]) -> None:
        self._table, self._fakes, self._roles = table, fakes, roles
        scale, first = np.unique(ratings.values, return_index=True)
        self._rating_of = first[np.searchsorted(scale, fakes.ratings.values)]
        # By row of the table, the cells that fake rows repeat.
        self._cells = {
            "rating": dict.fromkeys(self._rating_of.tolist(), ""),
            "time": dict.fromkeys(fakes.times_of.tolist(), ""),
        }
        self._names: list[str] = []

    def rows(self) -> Iterator[list[str]]:
        """The header and the rows of the table."""
        self._names = self._all_names()
        yield self._names
        start = 0
        for block in self._table:
            length = len(next(iter(block.values())))
            text = {name: [_text(cell) for cell in block[name]] for name in block}
            for role, kept in self._cells.items():
                column = text.get(self._roles.get(role, ""), [])
                for i in range(len(column)):
                    if start + i in kept:
                        kept[start + i] = column[i]
            blank = [""] * length
            yield from map(list, zip(*(text.get(name, blank) for name in self._names), strict=True))
            start += length

    def fake_rows(self, users: Sequence[str], items: Sequence[str]) -> Iterator[list[str]]:
        """The fake rows, once `rows` is through; of the fakes by number, and items, the names."""
        events = self._fakes.ratings
        first = events.user_count - len(users)
        for user, item, rating, time in zip(
            events.users.tolist(),
            events.items.tolist(),
            self._rating_of.tolist(),
            self._fakes.times_of.tolist(),
            strict=True,
        ):
            cells = {
                "user": users[user - first],
                "item": items[item],
                "rating": self._cells["rating"][rating],
                "time": self._cells["time"][time],
            }
            row = {name: cells[role] for role, name in self._roles.items()}
            yield [row.get(name, "") for name in self._names]

    def _all_names(self) -> list[str]:
        """All columns; of JSON lines those of all lines, so that the file is read through."""
        if not self._table.names:
            for _ in self._table:
                pass
        return list(self._table.names)


def _whole_table(path: Path, encoding: str | None, delimiter: str | None) -> Table:
    """A table of all columns; those of JSON lines are known once they are read."""
    names = Table(path, encoding=encoding, delimiter=delimiter).names
    return Table(path, names or None, encoding=encoding, delimiter=delimiter)


def _numbers(option: str, names: Sequence[str], items: Sequence[str]) -> list[int]:
    """The numbers of items by name."""
    number = {name: i for i, name in enumerate(items)}
    for place, name in enumerate(names):
        if name in names[:place]:
            raise InputError(f"{option}: {name!r} is there twice; name it once")
        if name not in number:
            raise InputError(f"{option}: no item {name!r} is rated; {closest(name, items)}")
    return [number[name] for name in names]


def _new_users(known: Sequence[str], wanted: int) -> list[str]:
    """Names for fake users: the next numbers where all names are such, else fake_1 and so on."""
    if all(name.isdecimal() and name.isascii() for name in known):
        last = max(map(int, known))
        return [str(last + i + 1) for i in range(wanted)]
    taken = set(known)
    fresh = (name for i in count(1) if (name := f"fake_{i}") not in taken)
    return [next(fresh) for _ in range(wanted)]


def _text(cell: Any) -> str:
    return "" if cell is None or cell != cell else str(cell)


def _hashes(path: Path) -> str | dict[str, str]:
    """The SHA-256 of a file, or of each file of a folder."""
    if path.is_dir():
        return {file.name: sha256(file) for file in parquet_files(path)}
    return sha256(path)
