"""A copy of a table of ratings with fake users in it, and the record of what is fake."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from embattle.data.account import Account, listed
from embattle.data.looks import guess_events, look_all
from embattle.data.profile_request import Fakes
from embattle.data.ratings import Ratings, read_named_ratings
from embattle.data.tables import Table
from embattle.errors import InputError, closest
from embattle.jobs.poisoned_copy import check_out, manifest_path, write_copy
from embattle.poisoning.profiles import make_fakes, rounds
from embattle.progress import bar, say


@dataclass(frozen=True)
class Plan:
    """What `embattle.poisoning.profiles.make_fakes` is asked for; items by name."""

    kind: str
    targets: Sequence[str]
    accounts: int | None = None
    share: float | None = None
    fillers: int | None = None
    nuke: bool = False
    popular: int | None = None
    segment: Sequence[str] = ()
    feedback: str | None = None
    steps: int | None = None
    seed: int = 0


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
        out: the CSV file to write, with the columns of `path`; the record lies beside it.
        plan: the fake users.
        columns: of user, item, rating and time; without the first two they are guessed.
        encoding, delimiter: of a text file.

    Raises:
        InputError: if either file is there already, the ratings cannot be read, an item is not
            among them, or the plan does not go with them.
    """
    check_out(out, "the copy")
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
    options: dict[str, Any] = {
        "accounts": plan.accounts,
        "share": plan.share,
        "fillers": plan.fillers,
        "nuke": plan.nuke,
        "popular": plan.popular,
        "feedback": plan.feedback,
        "steps": plan.steps,
        "seed": plan.seed,
    }
    targets = _numbers("--targets", plan.targets, items)
    segment = _numbers("--segment", plan.segment, items)
    total = rounds(plan.kind, plan.steps)
    with bar(f"making {plan.kind} fakes", total, shown=total > 0) as show:
        fakes = make_fakes(
            ratings,
            targets,
            kind=plan.kind,
            segment=segment,
            tick=lambda done, loss: show(done, {"loss": loss}),
            **options,
        )
    new = _new_users(users, len(fakes.users))
    cells = _Cells(ratings, fakes, roles)
    optimised = {"feedback": plan.feedback, "steps": plan.steps} if total else {}
    facts = {
        "columns": roles,
        "kind": plan.kind,
        "goal": "nuke" if plan.nuke else "push",
        "targets": [items[i] for i in fakes.targets],
        "selected": [items[i] for i in fakes.selected],
        "fillers": fakes.fillers,
        **optimised,
        "seed": plan.seed,
        "genuine_rows": len(ratings),
        "fake_rows": len(fakes.ratings),
        "fake_users": new,
    }
    write_copy(
        path,
        out,
        cells.look,
        lambda names: cells.fake_rows(new, items),
        lambda: facts,
        encoding=encoding,
        delimiter=delimiter,
    )
    say(f"{out}: {len(new):,} fake users and {len(fakes.ratings):,} fake rows added")
    say(f"{manifest_path(out)}: who they are")


class _Cells:
    """The ratings and times of fake rows, written as those of genuine rows are."""

    def __init__(self, ratings: Ratings, fakes: Fakes, roles: dict[str, str]) -> None:
        self._fakes, self._roles = fakes, roles
        scale, first = np.unique(ratings.values, return_index=True)
        self._rating_of = first[np.searchsorted(scale, fakes.ratings.values)]
        # By row of the table, the cells that fake rows repeat.
        self._cells = {
            "rating": dict.fromkeys(self._rating_of.tolist(), ""),
            "time": dict.fromkeys(fakes.times_of.tolist(), ""),
        }

    def look(self, start: int, cells: dict[str, list[str]]) -> None:
        """Note what is wanted of the genuine rows."""
        for role, kept in self._cells.items():
            column = cells.get(self._roles.get(role, ""), [])
            for i in range(len(column)):
                if start + i in kept:
                    kept[start + i] = column[i]

    def fake_rows(self, users: Sequence[str], items: Sequence[str]) -> Iterator[dict[str, str]]:
        """The fake rows; of the fakes by number, and items, the names."""
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
            yield {name: cells[role] for role, name in self._roles.items()}


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
