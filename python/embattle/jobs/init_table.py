"""A table of which no recipe says anything yet: its columns, counted over the whole file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from embattle.data.labels import is_blank
from embattle.data.looks import NO_NUMBER, Column, look_all
from embattle.data.tables import Table

#: Different values of a column that are counted at most.
COUNTED = 1000
# Words that stand for no value also in a column of words.
_NEVER = {"na", "n/a", "nan", "null", "#n/a", "?"}


@dataclass(frozen=True)
class Seen:
    """A file as it looks.

    Attributes:
        path: of it.
        columns: as they look in the first rows; how much is blank and how many values there are
            is counted over the whole file. Those of `twice` and `nested` are left out.
        counts: how often there is each value of a column that stands for one; of columns with more
            than `COUNTED` different ones not of all.
        words: those of a column that stand for no value.
        rows: of the file.
        twice: names that several columns have.
        nested: columns that no task reads, see `Table`.
    """

    path: Path
    columns: Mapping[str, Column]
    counts: Mapping[str, Counter[str]]
    words: Mapping[str, list[str]]
    rows: int
    twice: list[str]
    nested: list[str]

    def without_value(
        self, *names: str, also: Sequence[str] = (), keep: Collection[str] = ()
    ) -> list[tuple[str, Any, str]]:
        """The line of the section `data` that says which cells of columns stand for no value.

        It is about all columns alike, and so leaves out what stands for a value in the label.

        Args:
            names: the columns.
            also: words that stand for no value anyway.
            keep: the label's values.
        """
        words = [*also, *(word for name in names for word in self.words[name])]
        found = [word for word in dict.fromkeys(words) if word not in keep]
        return [("missing", found, "cells that stand for no value")] if found else []

    def has_blank(self, *names: str) -> bool:
        """Whether a row has no value in one of the columns."""
        return any(self.columns[name].blank > 0 for name in names)


def whole(table: Table) -> Seen:
    """Look at the first rows, and count over all of them."""
    counts: dict[str, Counter[str]] = {}
    for block in table:
        for name, values in block.items():
            known = counts.setdefault(name, Counter())
            for value in values:
                text = "" if is_blank(value) else str(value).strip()
                if text in known or len(known) <= COUNTED or text.lower() in NO_NUMBER or not text:
                    known[text] += 1
    looks, columns, words = look_all(table.sample()), {}, {}
    twice = [name for name, count in Counter(table.names).items() if count > 1]
    nested = [name for name in looks if name in table.nested]
    for name in [name for name in looks if name not in {*twice, *nested}]:
        known = counts[name]
        unsaid = _NEVER if looks[name].kind in ("words", "prose") else NO_NUMBER
        words[name] = [text for text in known if text.lower() in unsaid]
        blank = sum(known.pop(text) for text in ["", *words[name]] if text in known)
        columns[name] = replace(looks[name], distinct=len(known), blank=blank / table.rows)
    return Seen(table.path, columns, counts, words, table.rows, twice, nested)
