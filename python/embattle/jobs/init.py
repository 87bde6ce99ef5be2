"""A commented recipe for a file of which no recipe says anything yet."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from embattle.data.account import Account, listed, printable
from embattle.data.formats import delimiter_of
from embattle.data.labels import TRUTH, alike, spellings
from embattle.data.looks import (
    TABLES,
    guess_events,
    guess_roles,
    kind_of_table,
    number_of,
    with_role,
)
from embattle.data.mind import is_mind
from embattle.data.tables import Table
from embattle.errors import InputError, options_named
from embattle.files import write_text
from embattle.jobs import recipe as recipes
from embattle.jobs.init_sections import sections
from embattle.jobs.init_table import COUNTED, Seen, whole
from embattle.jobs.train import read
from embattle.progress import say

# Where the comments of the section `data` begin.
_COMMENTS = 35
# A class with fewer rows than this is left out: the parts could not all have it.
_FEW = 5
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


def init(
    path: Path, out: Path | None, *, encoding: str | None = None, delimiter: str | None = None
) -> Path:
    """Write a recipe for a file, and say what it is.

    The file is read as the job will read it before anything is written: no recipe is written that
    the job would refuse.

    Args:
        path: a table, or a folder in the layout of MIND.
        out: the recipe's file; by default it is named after `path`, in the working directory.
        encoding, delimiter: of a text file, see `embattle.data.tables.Table`.

    Returns:
        The recipe's path.

    Raises:
        InputError: the file cannot be read, nothing in it can be predicted, or `out` is there.
    """
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", path.stem or path.name).strip("._-") or "mine"
    out = Path(f"{name}.yaml") if out is None else out
    if out.exists():
        raise InputError(f"{out} is there already; choose another file with --out")
    draft = look(path, encoding=encoding, delimiter=delimiter)
    text, account = recipe_of(draft, name), Account()
    recipe = recipes.of_text(text, str(out))
    try:
        read(recipe.make_task(), account, "train", recipe.audit.part)
    except InputError as error:
        raise InputError(
            f"{path} looks like {draft.looks}, and task {draft.task} cannot use it, so that no "
            f"recipe is written: {error}"
        ) from error
    write_text(out, text)
    for line in (
        *(f"warning: {warning}" for warning in account.warnings),
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
        f"name: {_flow(name)}\n"
        "seed: 0                            # of the division and the first weights\n"
        f"task: {draft.task}\n"
    )
    data = "\n".join(["data:", *lines, ""])
    return "\n".join([head, data, sections(draft.task, draft.rows, **draft.model)])


def look(path: Path, *, encoding: str | None = None, delimiter: str | None = None) -> Draft:
    """Look at a file, and choose what is predicted from what.

    Raises:
        InputError: it cannot be read, or nothing in it can be predicted.
    """
    if is_mind(path):
        return _news(path)
    delimiter = delimiter_of(delimiter)
    with options_named():
        table = Table(path, encoding=encoding, delimiter=delimiter, drop_ragged=True)
        seen = whole(table)
    ragged = f"{table.ragged:,} rows with too few or too many cells"
    if seen.nested:
        names = listed([repr(name) for name in seen.nested])
        held = f"lists, objects, or bytes that are no {encoding or 'utf-8'} text"
        say(f"warning: columns with {held} are left out: {names}")
    twice = f"several columns are called {listed([repr(name) for name in seen.twice])}"
    try:
        draft = _of_table(seen)
    except InputError as error:
        if seen.twice:
            raise InputError(f"{path}: {twice}; give each its own name") from error
        if table.ragged:
            raise InputError(f"{error} ({ragged} are not looked at; check --delimiter)") from error
        raise
    if seen.twice:
        say(f"warning: {twice}: they are left out")
    given = [("encoding", encoding, "of the text"), ("delimiter", delimiter, "between cells")]
    told: list[tuple[str, Any, str]] = [line for line in given if line[1] is not None]
    if table.ragged:
        say(f"warning: {ragged} are left out: check whether the delimiter is right")
        told.append(("ragged_rows", "drop", f"{ragged} are left out"))
    place = [("path", str(path), "from the working directory"), *told]
    return replace(draft, data=[*place, *draft.data])


def _of_table(seen: Seen) -> Draft:
    """The same, of a table; the section `data` lacks its place."""
    columns = seen.columns
    kind, why = kind_of_table(columns)
    events = guess_events(columns)
    if kind == "text" and why:
        return _texts(seen)
    if kind == "ratings" and "time" in events:
        return _events("item_ranking", seen, events, TABLES["ratings"])
    if kind in ("ratings", "clicks"):
        clicks = _clicks(seen, events, TABLES[kind])
        if clicks is not None:
            return clicks
        if {"user", "item", "time"} <= set(events):
            return _events("next_item", seen, events, "what users met and when")
    return _tabular(seen)


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


def _texts(seen: Seen) -> Draft:
    columns = seen.columns
    texts, label = guess_roles(columns)
    if label is None:
        raise InputError(
            f"{seen.path}: no column has 2 to 20 different values beside the texts "
            f"({', '.join(map(repr, texts))}), so nothing can be predicted; add a column of classes"
        )
    text = [name for name in texts if name != label]
    counts = [count for count in seen.counts[label].values() if count >= _FEW]
    data: list[tuple[str, Any, str]] = [
        ("text", text, "joined by a space"),
        ("label", label, f"{columns[label].distinct} classes"),
        *seen.without_value(label, *text),
    ]
    if seen.has_blank(label):
        data.append(("blank_labels", "drop", "rows without a label are left out"))
    if 2 <= len(counts) < columns[label].distinct:
        data += [
            ("min_per_class", _FEW, "smaller classes"),
            ("rare_classes", "drop", "are left out; merge makes them one"),
        ]
    # Of a part that is cut at random, the smallest class must be sure to be in it.
    share = min(counts, default=1) / max(1, sum(counts))
    limits = {"train": 4000, "validation": 200, "test": 250}
    kept = {part: None if count * share < 2 * _FEW else count for part, count in limits.items()}
    data += [
        ("stratify", True, "each part has the same share of each class"),
        ("fractions", [0.7, 0.1, 0.2], "train, validation, test"),
        ("limits", kept, "null uses all"),
    ]
    steps_for = seen.rows if kept["train"] is None else min(seen.rows, 4000)
    return Draft("text_classification", "texts with classes", data, steps_for, {})


def _events(task: str, seen: Seen, events: Mapping[str, str], looks: str) -> Draft:
    used = list(events.values())
    data: list[tuple[str, Any, str]] = [
        ("user", events["user"], ""),
        ("item", events["item"], ""),
        ("rating", events.get("rating"), "all that was met counts as liked"),
        ("time", events["time"], "each user's last two items are held out"),
        *seen.without_value(*used),
    ]
    if seen.has_blank(*used):
        data.append(("blank_cells", "drop", "rows without one of these are left out"))
    items = seen.columns[events["item"]].distinct
    data.append(("k", max(1, min(10, items // 2)), "items are recommended"))
    return Draft(task, looks, data, seen.rows, {})


def _clicks(seen: Seen, events: Mapping[str, str], looks: str) -> Draft | None:
    """Yes or no for a user and an item, or for coded columns; None if nothing says yes or no."""
    columns = seen.columns
    coded = [name for name in columns if re.fullmatch(r"[CI]\d+", name)]
    numeric = [name for name, column in columns.items() if column.kind == "numbers"]
    marks = [
        name
        for name in (*with_role("click", columns), *with_role("label", columns))
        if columns[name].distinct == 2 and (name in numeric or _says_yes_or_no(seen.counts[name]))
    ]
    label = next(iter(marks), events.get("rating"))
    if label is None or columns[label].distinct < 2:
        return None
    cut = _middle(seen.counts[label]) if label not in marks else _larger(seen.counts[label])
    roles = {label, *events.values(), *with_role("time", columns)}
    words = [
        name
        for name, column in columns.items()
        if name not in roles and column.kind == "words" and column.distinct <= COUNTED
    ]
    ids = [
        name
        for name in numeric
        if name not in roles
        and _IDENTIFIER.fullmatch(name)
        and 1 < columns[name].distinct <= COUNTED
        and columns[name].distinct < seen.rows
    ]
    fields = [events[role] for role in ("user", "item") if role in events] + words + ids
    dense = [name for name in coded if name.startswith("I") and name in numeric]
    fields += [name for name in coded if name not in {*dense, *fields}]
    unread = [repr(name) for name in columns if name not in {label, *fields, *dense}]
    left_out = f"; left out: {listed(unread)}" if unread else ""
    data: list[tuple[str, Any, str]] = [
        ("fields", fields, f"categories{left_out}"),
        *([("dense", dense, "numbers")] if dense else []),
        ("label", label, ""),
        ("at_least", cut, "yes from this value on"),
        *seen.without_value(label, *fields, *dense),
        ("fractions", [0.8, 0.1, 0.1], "train, validation, test"),
    ]
    if seen.has_blank(label):
        data.append(("blank_labels", "drop", "rows without a label are left out"))
    kind = f"  kind: {'dlrm' if dense else 'deepfm'}\n"
    return Draft("click_through", looks, data, seen.rows, {"kind": kind})


def _says_yes_or_no(counts: Mapping[str, int]) -> bool:
    return all(cell.lower() in TRUTH for cell in counts)


def _larger(counts: Mapping[str, int]) -> float:
    """The larger of two numbers; 1 for words."""
    return max(_numbers(counts), default=1.0)


def _middle(counts: Mapping[str, int]) -> float:
    """A value that about half of the numbers reach, and not all."""
    numbers = sorted(_numbers(counts).elements())
    middle = numbers[len(numbers) // 2]
    return next((x for x in numbers if x > numbers[0]), middle) if middle == numbers[0] else middle


def _numbers(counts: Mapping[str, int]) -> Counter[float]:
    found: Counter[float] = Counter()
    for cell, count in counts.items():
        number = number_of(cell, thousands=False)
        if number is not None:
            found[number] += count
    return found


def _tabular(seen: Seen) -> Draft:
    columns, rows = seen.columns, seen.rows
    two = [name for name, column in columns.items() if column.distinct == 2]
    spelled = {
        name: f"column {name!r} has two classes, of which some are spelled in several ways "
        f"({alike(seen.counts[name])}): write each in one, to predict it"
        for name, column in columns.items()
        if 2 < column.distinct <= 20 and len(spellings(seen.counts[name])) == 2
    }
    if spelled and not two:
        raise InputError(f"{seen.path}: {'; '.join(spelled.values())}")
    if not two or len(columns) < 2:
        raise InputError(
            f"{seen.path}: no column of sentences, no users and items with times or opinions, and "
            "no column of two classes: nothing here is a task that embattle knows; see "
            f"`embattle data inspect {seen.path}`"
        )
    named = with_role("label", columns)
    ends = [name for name in (list(columns)[-1], next(iter(columns))) if name in two]
    label = [*(name for name in named if name in two), *ends, two[-1]][0]
    others = [repr(name) for name in two if name != label]
    about = f"two values; so have {', '.join(others[:3])}" if others else "two values"
    many = [name for name in named if name not in two and label not in named]
    if many:
        about = f"two values, which {many[0]!r} has not"
    for name in many:
        if name in spelled:
            say(f"warning: {spelled[name]}")
    ignore = [
        name
        for name, column in columns.items()
        if name != label
        and (
            name in many
            or column.kind in ("empty", "dates", "prose")
            or _IDENTIFIER.fullmatch(name)
            or (column.kind == "words" and column.distinct > min(COUNTED, rows // 2))
        )
    ]
    ignore += [*seen.twice, *seen.nested]
    read = [name for name in columns if name not in ignore]
    data: list[tuple[str, Any, str]] = [
        ("label", label, about),
        *([("ignore", ignore, "left out: names, dates, other labels")] if ignore else []),
        *seen.without_value(*read, also=["?", "NA"], keep=seen.counts[label]),
        ("ranges", 16, "of a column of numbers, as many rows in each"),
        ("fractions", [0.7, 0.1, 0.2], "train, validation, test"),
    ]
    return Draft("tabular", TABLES["tabular"], data, rows, {})


def _flow(value: Any) -> str:
    """A value in YAML, on one line."""
    text: str = yaml.safe_dump(
        value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=1 << 20
    )
    text = text.removesuffix("...\n").strip()
    return text if "\n" not in text else json.dumps(value)
