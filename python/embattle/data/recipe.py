"""Sections `data` of recipes: where a table is, and the one for texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from embattle.data.formats import delimiter_of
from embattle.data.labels import most
from embattle.data.sources import find
from embattle.sections import Section  # pydantic is optional: this says so where it is missing

# isort: split
from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

Part = Literal["train", "validation", "test"]
Remedy = Literal["refuse", "drop"]


class Limits(Section):
    """The most examples to use of each part; null uses all."""

    train: PositiveInt | None = None
    validation: PositiveInt | None = None
    test: PositiveInt | None = None


class Place(Section):
    """A table: a data set that `embattle.data.sources` knows, or a file of one's own.

    Attributes:
        source: the name of a data set; or
        path: a CSV, Parquet or JSON-lines file.
        encoding: of a text file; null takes UTF-8 (or UTF-16 with its mark).
        delimiter: of a CSV file, one character or `tab`; null guesses among `,` `;` `|` and tab.
        header: names of the columns of a CSV file without a header line.
        ragged_rows: what happens to rows of a CSV file with too few or too many cells.
    """

    source: str | None = None
    path: str | None = None
    encoding: str | None = None
    delimiter: str | None = None
    header: list[str] | None = None
    ragged_rows: Remedy = "refuse"

    @field_validator("delimiter")
    @classmethod
    def _one_character(cls, value: str | None) -> str | None:
        value = delimiter_of(value)
        if value is not None and (len(value) != 1 or value in '\r\n"' or not value.isascii()):
            raise ValueError("must be one ASCII character that is no quote, or 'tab'")
        return value

    @model_validator(mode="after")
    def _one_table(self) -> Place:
        if (self.source is None) == (self.path is None):
            raise ValueError("give either source (a known data set) or path (a file), not both")
        return self

    @property
    def written(self) -> dict[str, Any]:
        """How the file is written, as `Table` wants it."""
        return {
            "encoding": self.encoding,
            "delimiter": self.delimiter,
            "header": self.header,
            "drop_ragged": self.ragged_rows == "drop",
        }

    def table(self) -> Path:
        """The file, fetched where needed."""
        if self.source is not None:
            return find(self.source).path()
        assert self.path is not None
        return Path(self.path).expanduser()


class Events(Place):
    """A table of events (see `Place`).

    Attributes:
        missing: cells that stand for no value, such as NA.
        blank_cells: what happens to rows without a value in one of the columns that are read.
    """

    missing: list[str] = Field(default=[])
    blank_cells: Remedy = "refuse"

    @property
    def reading(self) -> dict[str, Any]:
        """How the file is written and read, as `read_ratings` wants it."""
        drop = self.blank_cells == "drop"
        return {**self.written, "missing": self.missing, "drop_blank": drop}


def check_fractions(fractions: Sequence[float]) -> None:
    """Raise ValueError if the shares of the parts do not sum to 1."""
    if abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(f"fractions must sum to 1, not {sum(fractions):g}")


class DataRecipe(Place):
    """Which table (see `Place`), which columns, and how they are divided.

    Attributes:
        text: the text columns, joined by a space.
        label: the column to predict: any two or more classes; or several columns of counts, such as
            of reactions, of which the name of that with the largest is the class. A row in which
            two share the largest, or all are 0, has no label.
        missing: cells that stand for no value, such as NA; without it, NA is a class or a word.
        blank_labels: what happens to rows that have a text and no label.
        normalize_labels: make labels one that differ only in spaces, case or form.
        min_per_class: the fewest examples that a class must have.
        rare_classes: what happens to classes with fewer; `merge` makes them one, `other`.
        stratify: give each part the same share of every class.
        fractions: shares of train, validation and test.
        limits: the most examples of each part.
        balance: the parts in which each class gets equally many examples.
    """

    text: list[str] = Field(min_length=1)
    label: str | list[str]
    missing: list[str] = Field(default=[])
    blank_labels: Remedy = "refuse"
    normalize_labels: bool = False
    min_per_class: PositiveInt = 1
    rare_classes: Literal["refuse", "drop", "merge"] = "refuse"
    stratify: bool = False
    fractions: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (0.8, 0.1, 0.1)
    limits: Limits = Limits()
    balance: list[Part] = Field(default=[])

    @property
    def label_columns(self) -> list[str]:
        """The columns that say the label."""
        return [self.label] if isinstance(self.label, str) else self.label

    @property
    def label_name(self) -> str:
        """The label's column or columns, for messages."""
        return ", ".join(self.label_columns)

    def labels(self, columns: Mapping[str, list[Any]]) -> list[Any]:
        """The label of each row of columns; None where counts name none.

        Raises:
            InputError: a count is no number.
        """
        if isinstance(self.label, str):
            return columns[self.label]
        rows = zip(*(columns[name] for name in self.label), strict=True)
        return [most(self.label, counts, self.missing) for counts in rows]

    @model_validator(mode="after")
    def _consistent(self) -> DataRecipe:
        if isinstance(self.label, list) and len(set(self.label)) < max(2, len(self.label)):
            raise ValueError(
                "label: name two or more different columns of counts, or one of classes"
            )
        among = [name for name in self.label_columns if name in self.text]
        if among:
            raise ValueError(f"the label {among[0]!r} is among the text columns: leave it out")
        twice = [name for name in self.text if self.text.count(name) > 1]
        if twice:
            raise ValueError(f"text names the column {twice[0]!r} twice; once is enough")
        check_fractions(self.fractions)
        return self
