"""What the columns of a table look like, and what kind of table they make."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from embattle.data.account import Account
from embattle.data.moments import is_date

Kind = Literal["empty", "numbers", "dates", "prose", "words"]

# A number whose commas may be of thousands.
_THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2}(,\d{3})+(\.\d*)?")
_NUMBER = re.compile(r"[+-]?(\d+([.,]\d*)?|[.,]\d+)([eE][+-]?\d+)?")
#: Words that often stand for no value, in lower case. In a column of words they may be classes.
NO_VALUE = {"na", "n/a", "nan", "null", "none", "nil", "-", "?", "unknown", "#n/a"}
#: Words that are no finite number where all else in a column is one.
NO_NUMBER = NO_VALUE | {"inf", "+inf", "-inf", "infinity", "-infinity", "#div/0!", "#value!"}
_CLOCK = re.compile(r"\b\d{1,2}:\d{2}(:\d{2})?\b")
_LETTERS = re.compile(r"[^\W\d_]+")
_ROLES = {
    "user": r"user|customer|reviewer|member|account|visitor|session|buyer",
    "item": r"item|movie|film|product|article|song|track|artist|book|isbn|asin|business|sku|game",
    "rating": r"ratings?|stars?|score|overall",
    "time": r"time|timestamp|date|datetime|unix",
    "click": r"click|clicks|clicked|ctr|purchased?|event|impressions?|bought",
    "label": r"labels?|class|category|target|sentiment|recommended|rating|stars|y"
    r"|outcome|diagnosis|default|churn(?:ed)?|fraud|survived|reactions?",
}
# What a kind of table is called, and what it means that a job of texts reads it.
TABLES = {
    "ratings": "ratings of items by users",
    "clicks": "clicks or events of users",
    "tabular": "numbers and categories",
}
# What reads it as what it is.
_EVENTS = "; embattle.data.ratings.read_ratings reads it as events, and so do the tasks "
READERS = {
    "ratings": _EVENTS + "item_ranking and next_item (a recipe: recipes/films_ranking.yaml)",
    "clicks": _EVENTS + "click_through and next_item (a recipe: recipes/films_ctr.yaml)",
    "tabular": "; the task tabular reads it as columns (a recipe: recipes/adult_income.yaml)",
}


@dataclass(frozen=True)
class Column:
    """What a column looks like in its first rows.

    Attributes:
        kind: `numbers`; `dates`; `prose`: sentences; `words`: names, categories, identifiers.
        blank: share of blank cells.
        distinct: different values that are not blank.
        example: the first value that is not blank.
    """

    kind: Kind
    blank: float
    distinct: int
    example: str


def has_thousands(cells: Sequence[str]) -> bool:
    """Whether the commas in a column's cells are of thousands, and not decimal.

    All of them can be, and something shows it: a number without a comma beside them, or one with
    two, or with a point. Decimals that are all written with three digits have none of these.
    """
    commas = [cell for cell in cells if "," in cell]
    if not commas or not all(map(may_be_thousands, commas)):
        return False
    shown = any(cell.count(",") > 1 or "." in cell for cell in commas)
    return shown or any("," not in cell and "." not in cell for cell in cells)


class Points:
    """Whether the points in a column's numbers may well be of thousands, as its cells come.

    All of them can be (950, 1.250, 12.500), and there is a number without one beside them.
    """

    def __init__(self) -> None:
        self._plain = self._decimal = False
        self._pointed = ""

    def add(self, cells: Sequence[Any]) -> None:
        """Look at further cells. What is no text has been a number before, and is sure."""
        if self._decimal:
            return
        for cell in dict.fromkeys(cells):
            if not isinstance(cell, str):
                continue
            if "." not in cell and "," not in cell:
                self._plain = self._plain or is_number(cell)
            elif "," not in cell and may_be_thousands(cell.strip().replace(".", ",")):
                self._pointed = self._pointed or cell.strip()
            elif is_number(cell):
                self._decimal = True
                return

    def warn(self, name: str, account: Account) -> None:
        """Warn of the column, if so."""
        if self._plain and self._pointed and not self._decimal:
            account.warn(
                f"column {name!r}: the points of its numbers, such as {self._pointed!r}, may be of "
                "thousands, and are read as decimal; leave such points out of the file"
            )


def may_be_thousands(cell: str) -> bool:
    """Whether a cell has commas that can be of thousands: 1,250 is 1250, or 1.25."""
    return "," in cell and _THOUSANDS.fullmatch(cell) is not None


def number_of(cell: str, *, thousands: bool) -> float | None:
    """A cell as a number; None where it is none. Its commas are of thousands, or decimal."""
    cell = cell.replace(",", "") if thousands and _THOUSANDS.fullmatch(cell) else cell
    return float(cell.replace(",", ".")) if is_number(cell) else None


def number_in(cell: Any) -> float:
    """A cell as a number, known by itself: its comma is decimal.

    Raises:
        ValueError: it is none, or its comma may be of thousands.
    """
    try:
        return float(cell)
    except (TypeError, ValueError):
        text = str(cell).strip()
    number = number_of(text, thousands=False)
    if number is None:
        raise ValueError(f"{text!r} is none")
    if may_be_thousands(text):
        raise ValueError(
            f"the comma of {text!r} may be decimal or of thousands; write a point, or no comma"
        )
    return number


def is_number(text: str) -> bool:
    """Whether a cell is written as a number."""
    return _NUMBER.fullmatch(text.strip()) is not None


def look(values: Sequence[str]) -> Column:
    """Looks at a column's values; blank cells are empty strings."""
    filled = [value for value in values if value.strip()]
    if not filled:
        return Column("empty", 1.0, 0, "")
    count = len(filled)
    said = [value for value in filled if value.strip().lower() not in NO_NUMBER]
    numbers = sum(map(is_number, said)) / max(1, len(said))
    words = sum(len(value.split()) for value in filled) / count
    # Chinese, Japanese and Thai have no spaces: several letters beyond Latin are prose as well.
    foreign = sum(sum(c.isalpha() and ord(c) > 0x0E00 for c in value) for value in filled) / count
    kind: Kind = "words"
    if numbers > 0.95:
        kind = "numbers"
    elif sum(map(is_date, filled)) > 0.95 * count:
        kind = "dates"
    elif words >= 3 or foreign >= 6:
        # Dates in a form that is not known are no sentences.
        kind = "words" if sum(map(_may_be_moment, filled)) > 0.95 * count else "prose"
    return Column(kind, 1 - count / len(values), len(set(filled)), filled[0])


def _may_be_moment(cell: str) -> bool:
    """Whether a cell may be a date with a time of day: further numbers, and few words."""
    rest, clocks = _CLOCK.subn(" ", cell)
    return clocks > 0 and any(map(str.isdigit, rest)) and len(_LETTERS.findall(rest)) <= 4


def look_all(sample: Mapping[str, Sequence[str]]) -> dict[str, Column]:
    """Looks at every column."""
    found = {name: look(values) for name, values in sample.items()}
    for name in with_role("time", found):
        filled = [value for value in sample[name] if value.strip()]
        # What is called a date, and has a number in each cell, is no text either.
        if found[name].kind == "prose" and all(any(map(str.isdigit, v)) for v in filled):
            found[name] = replace(found[name], kind="words")
    return found


def kind_of_table(columns: Mapping[str, Column]) -> tuple[str, list[str]]:
    """What a table looks like.

    Returns:
        `text`, `ratings`, `clicks` or `tabular`, and the columns that say so.
    """
    prose = [name for name, column in columns.items() if column.kind == "prose"]
    if prose:
        return "text", prose
    user, item = with_role("user", columns), with_role("item", columns)
    rating = [name for name in with_role("rating", columns) if columns[name].kind == "numbers"]
    if user and item and rating:
        return "ratings", [user[0], item[0], rating[0]]
    acts = [*with_role("click", columns), *with_role("time", columns)]
    coded = [name for name in columns if re.fullmatch(r"[CI]\d+", name)]
    if user and item and acts:
        return "clicks", [user[0], item[0], acts[0]]
    if len(coded) >= 8:
        return "clicks", coded
    numbers = [name for name, column in columns.items() if column.kind == "numbers"]
    if len(columns) >= 3 and len(numbers) * 3 >= len(columns):
        return "tabular", numbers
    return "text", []


def guess_roles(columns: Mapping[str, Column]) -> tuple[list[str], str | None]:
    """Which columns are probably the text, and which the label; empty and None where none is."""
    text = [name for name, column in columns.items() if column.kind == "prose"]
    few = [
        name
        for name, column in columns.items()
        if column.kind in ("words", "numbers") and 2 <= column.distinct <= 20
    ]
    named = [name for name in with_role("label", columns) if name in few]
    label = next(iter([*named, *sorted(few, key=lambda name: columns[name].distinct)]), None)
    return text, label


def guess_events(columns: Mapping[str, Column]) -> dict[str, str]:
    """The columns of users, items, ratings and times of a table of events, by their names."""
    found: dict[str, str] = {}
    for role in ("user", "item", "rating", "time"):
        named = [name for name in with_role(role, columns) if name not in found.values()]
        if role == "rating":
            named = [name for name in named if columns[name].kind == "numbers"]
        if named:
            found[role] = named[0]
    return found


def with_role(role: str, names: Mapping[str, Column]) -> list[str]:
    """The columns that have one of the role's words in their names."""
    pattern = re.compile(rf"(?:{_ROLES[role]})(?:s?ids?)?", re.IGNORECASE)
    found = []
    for name in names:
        # CamelCase and anything that is no letter divide a name into words.
        words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)
        if any(pattern.fullmatch(word) for word in words):
            found.append(name)
    return found
