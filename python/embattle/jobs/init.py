"""A commented recipe for a file of which no recipe says anything yet."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from embattle.data.account import printable
from embattle.data.labels import TRUTH, is_blank
from embattle.data.looks import (
    TABLES,
    Column,
    guess_events,
    guess_roles,
    is_number,
    kind_of_table,
    look_all,
    with_role,
)
from embattle.data.mind import is_mind
from embattle.data.tables import Table
from embattle.errors import InputError
from embattle.files import write_text
from embattle.jobs.init_sections import sections
from embattle.progress import say

# Different values of a column that are counted at most.
_COUNTED = 1000
# Where the comments of the section `data` begin.
_COMMENTS = 35
_IDENTIFIER = re.compile(r"(?:.*[_\s])?[iI][dD]|.*[a-z]I[dD]|[iI]ndex|Unnamed.*|")


@dataclass(frozen=True)
class Draft:
    """What a recipe is made of.

    Attributes:
        task: its name.
        looks: what the file looks like, in words.
        data: lines of the section `data`: key, value, comment.
        rows: of the file.
        model: what fills the section `model` in, see `sections`.
    """

    task: str
    looks: str
    data: Sequence[tuple[str, Any, str]]
    rows: int
    model: Mapping[str, str]


def init(path: Path, out: Path | None) -> Path:
    """Write a recipe for a file, and say what it is.

    Args:
        path: a table, or a folder in the layout of MIND.
        out: the recipe's file; by default it is named after `path`, in the working directory.

    Returns:
        The recipe's path.

    Raises:
        InputError: the file cannot be read, nothing in it can be predicted, or `out` is there.
    """
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", path.stem or path.name).strip("._-") or "mine"
    out = Path(f"{name}.yaml") if out is None else out
    if out.exists():
        raise InputError(f"{out} is there already; choose another file with --out")
    draft = look(path)
    write_text(out, recipe_of(draft, name))
    for line in (
        f"{path} looks like {draft.looks}: task {draft.task}",
        f"wrote {out}; check its columns, then",
        f"  embattle data inspect {out}",
        f"  embattle train {out} --out runs/{name}",
    ):
        say(printable(line))
    return out


def recipe_of(draft: Draft, name: str) -> str:
    """The text of a recipe."""
    lines = []
    for key, value, comment in draft.data:
        line = f"  {key}: {_flow(value)}"
        if comment and len(line) > _COMMENTS - 2:
            lines.append(f"  # {comment}")
        fits = comment and len(line) <= _COMMENTS - 2
        lines.append(f"{line:<{_COMMENTS}}# {comment}" if fits else line)
    looks = draft.looks[0].upper() + draft.looks[1:]
    head = (
        f"# {looks}. Written by `embattle init`: what it says of\n"
        "# the columns is a guess by their names and values, so check it.\n"
        f"name: {name}\n"
        "seed: 0                            # of the division and the first weights\n"
        f"task: {draft.task}\n"
    )
    data = "\n".join(["data:", *lines, ""])
    return "\n".join([head, data, sections(draft.task, draft.rows, **draft.model)])


def look(path: Path) -> Draft:
    """Look at a file, and choose what is predicted from what.

    Raises:
        InputError: it cannot be read, or nothing in it can be predicted.
    """
    if is_mind(path):
        return _news(path)
    table = Table(path)
    columns, rows = _whole(table)
    kind, why = kind_of_table(columns)
    events = guess_events(columns)
    if kind == "text" and why:
        return _texts(path, columns, rows)
    if kind == "ratings" and "time" in events:
        return _events("item_ranking", path, columns, rows, events, TABLES["ratings"])
    if kind in ("ratings", "clicks"):
        clicks = _clicks(path, columns, rows, events, table.sample(), TABLES[kind])
        if clicks is not None:
            return clicks
        if {"user", "item", "time"} <= set(events):
            return _events("next_item", path, columns, rows, events, "what users met and when")
    return _tabular(path, columns, rows)


def _whole(table: Table) -> tuple[dict[str, Column], int]:
    """The columns as they look in the first rows, their values counted over the whole file."""
    found: dict[str, set[str]] = {}
    for block in table:
        for name, values in block.items():
            known = found.setdefault(name, set())
            if len(known) <= _COUNTED:
                known.update(str(value).strip() for value in values if not is_blank(value))
    columns = look_all(table.sample())
    return {name: replace(c, distinct=len(found[name])) for name, c in columns.items()}, table.rows


def _news(folder: Path) -> Draft:
    data = [
        ("path", str(folder), "news.tsv and behaviors.tsv"),
        ("text", ["title"], "and abstract, category, subcategory"),
        ("history", 10, "the latest so many news are looked at"),
        ("unclicked", 1, "drawn for each news that was clicked"),
        ("fractions", [0.8, 0.1, 0.1], "train, validation, test, by time"),
        ("limits", {"train": 20000, "validation": 500, "test": 500}, "null uses all"),
    ]
    return Draft("news_clicks", "news and clicks in the layout of MIND", data, 4000, {})


def _texts(path: Path, columns: Mapping[str, Column], rows: int) -> Draft:
    texts, label = guess_roles(columns)
    if label is None:
        raise InputError(
            f"{path}: no column has 2 to 20 different values beside the texts "
            f"({', '.join(map(repr, texts))}), so nothing can be predicted; add a column of classes"
        )
    data: list[tuple[str, Any, str]] = [
        ("path", str(path), "from the working directory"),
        ("text", [name for name in texts if name != label], "joined by a space"),
        ("label", label, f"{columns[label].distinct} classes"),
    ]
    if columns[label].blank:
        data.append(("blank_labels", "drop", "rows without a label are left out"))
    data += [
        ("stratify", True, "each part has the same share of each class"),
        ("fractions", [0.7, 0.1, 0.2], "train, validation, test"),
        ("limits", {"train": 4000, "validation": 200, "test": 250}, "null uses all"),
    ]
    return Draft("text_classification", "texts with classes", data, min(rows, 4000), {})


def _events(
    task: str,
    path: Path,
    columns: Mapping[str, Column],
    rows: int,
    events: Mapping[str, str],
    looks: str,
) -> Draft:
    data: list[tuple[str, Any, str]] = [
        ("path", str(path), "from the working directory"),
        ("user", events["user"], ""),
        ("item", events["item"], ""),
        ("rating", events.get("rating"), "all that was met counts as liked"),
        ("time", events["time"], "each user's last two items are held out"),
        ("k", max(1, min(10, columns[events["item"]].distinct // 2)), "items are recommended"),
    ]
    return Draft(task, looks, data, rows, {})


def _clicks(
    path: Path,
    columns: Mapping[str, Column],
    rows: int,
    events: Mapping[str, str],
    sample: Mapping[str, Sequence[str]],
    looks: str,
) -> Draft | None:
    """Yes or no for a user and an item, or for coded columns; None if nothing says yes or no."""
    coded = [name for name in columns if re.fullmatch(r"[CI]\d+", name)]
    numeric = [name for name, column in columns.items() if column.kind == "numbers"]
    marks = [
        name
        for name in (*with_role("click", columns), *with_role("label", columns))
        if columns[name].distinct == 2 and (name in numeric or _says_yes_or_no(sample[name]))
    ]
    label = next(iter(marks), events.get("rating"))
    if label is None:
        return None
    cut = _middle(sample[label]) if label not in marks else _larger(sample[label])
    roles = {label, *events.values(), *with_role("time", columns)}
    words = [
        name
        for name, column in columns.items()
        if name not in roles and column.kind == "words" and column.distinct <= _COUNTED
    ]
    fields = [events[role] for role in ("user", "item") if role in events] + words
    dense = [name for name in coded if name.startswith("I") and name in numeric]
    data: list[tuple[str, Any, str]] = [
        ("path", str(path), "from the working directory"),
        ("fields", [*fields, *(n for n in coded if n not in {*dense, *fields})], "categories"),
        ("label", label, ""),
        ("at_least", cut, "yes from this value on"),
        ("fractions", [0.8, 0.1, 0.1], "train, validation, test"),
    ]
    if dense:
        data.insert(2, ("dense", dense, "numbers"))
    kind = f"  kind: {'dlrm' if dense else 'deepfm'}\n"
    return Draft("click_through", looks, data, rows, {"kind": kind})


def _says_yes_or_no(cells: Sequence[str]) -> bool:
    return all(cell.strip().lower() in TRUTH for cell in cells if cell.strip())


def _larger(cells: Sequence[str]) -> float:
    """The larger of two numbers; 1 if there is but one."""
    numbers = {float(cell.replace(",", ".")) for cell in cells if is_number(cell)}
    return max(numbers) if len(numbers) > 1 else 1.0


def _middle(cells: Sequence[str]) -> float:
    """A value that about half of the numbers reach, and not all."""
    numbers = sorted(float(cell.replace(",", ".")) for cell in cells if is_number(cell))
    middle = numbers[len(numbers) // 2]
    return next((x for x in numbers if x > numbers[0]), middle) if middle == numbers[0] else middle


def _tabular(path: Path, columns: Mapping[str, Column], rows: int) -> Draft:
    two = [name for name, column in columns.items() if column.distinct == 2]
    if not two or len(columns) < 2:
        raise InputError(
            f"{path}: no column of sentences, no users and items, and no column of two classes: "
            f"nothing here is a task that embattle knows; see `embattle data inspect {path}`"
        )
    named = with_role("label", columns)
    ends = [name for name in (list(columns)[-1], next(iter(columns))) if name in two]
    label = [*(name for name in named if name in two), *ends, two[-1]][0]
    others = [repr(name) for name in two if name != label]
    about = f"two values; so have {', '.join(others[:3])}" if others else "two values"
    many = [name for name in named if name not in two and label not in named]
    if many:
        about = f"two values, which {many[0]!r} has not"
    ignore = [
        name
        for name, column in columns.items()
        if name != label
        and (
            name in many
            or column.kind in ("empty", "dates", "prose")
            or _IDENTIFIER.fullmatch(name)
            or (column.kind == "words" and column.distinct > min(_COUNTED, rows // 2))
        )
    ]
    data: list[tuple[str, Any, str]] = [
        ("path", str(path), "from the working directory"),
        ("label", label, about),
        ("missing", ["?", "NA"], "cells that stand for no value"),
        ("ranges", 16, "of a column of numbers, as many rows in each"),
        ("fractions", [0.7, 0.1, 0.2], "train, validation, test"),
    ]
    if ignore:
        data.insert(2, ("ignore", ignore, "left out: names, dates, other labels"))
    return Draft("tabular", TABLES["tabular"], data, rows, {})


def _flow(value: Any) -> str:
    """A value in YAML, on one line."""
    text: str = yaml.safe_dump(
        value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=1 << 20
    )
    text = text.removesuffix("...\n").strip()
    return text if "\n" not in text else json.dumps(value)
