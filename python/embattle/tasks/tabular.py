"""One of two outcomes from the columns of a table: click-through, risk, income."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from embattle.data.account import Account, listed
from embattle.data.batch import Batch
from embattle.data.divide import stratified_parts
from embattle.data.labels import alike, is_blank
from embattle.data.looks import Points, look
from embattle.data.recipe import Limits, Place, check_fractions
from embattle.data.splits import PARTS, number_labels
from embattle.data.tables import Table
from embattle.errors import InputError, closest
from embattle.models.deepfm import DeepFM
from embattle.models.fm import FM
from embattle.sections import Section
from embattle.tasks.base import Task
from embattle.tasks.columns import Columns
from embattle.tasks.kinds import BinaryClassification
from embattle.tasks.learned_column import Column

# isort: split
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

# Cells that tell what kind of column theirs is.
_LOOKED_AT = 1000


class TabularData(Place):
    """Which table and columns, and how they become fields of numbered values.

    The table (see `Place`) is held in memory.

    Attributes:
        label: the column to predict, of two classes; rows without it are dropped.
        positive: the class whose probability is predicted; null takes the second in natural order.
        columns: the columns to predict from; null takes all others.
        ignore: columns to leave out, such as identifiers.
        missing: cells that stand for no value, such as `?`.
        ranges: a column of numbers is cut into so many ranges, with as many training rows in each.
        min_count: values that fewer training rows have are one, `unknown`.
        fractions: shares of train, validation and test, the same for both classes.
        limits: the most rows of each part.
    """

    label: str
    positive: str | None = None
    columns: list[str] | None = Field(default=None, min_length=1)
    ignore: list[str] = Field(default=[])
    missing: list[str] = Field(default=[])
    ranges: PositiveInt = 16
    min_count: PositiveInt = 5
    fractions: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (0.8, 0.1, 0.1)
    limits: Limits = Limits()

    @model_validator(mode="after")
    def _consistent(self) -> TabularData:
        if self.label in (self.columns or ()):
            raise ValueError(f"the label {self.label!r} is among the columns: leave it out")
        if self.columns and self.ignore:
            raise ValueError("give either columns or ignore, not both")
        check_fractions(self.fractions)
        return self


class TabularModel(Section):
    """A model of the fields.

    Attributes:
        kind: `deepfm`; `fm`, a factorisation machine, which is a DeepFM without its perceptron; or
            `linear`, logistic regression. Of the latter two the worst swaps of values are known.
        dim: width of a field's vectors; a linear model has none.
        hidden: widths of the hidden layers of a DeepFM's perceptron.
        dropout: in the perceptron.
    """

    kind: Literal["deepfm", "fm", "linear"] = "deepfm"
    dim: PositiveInt = 16
    hidden: list[PositiveInt] = Field(default=[64, 64])
    dropout: NonNegativeFloat = Field(default=0.0, lt=1)


@dataclass(frozen=True)
class Rows:
    """A part.

    Attributes:
        places: of the rows in the file (without those that have no label), [N] int64.
        fields: the numbers of their values, [N, fields] int64.
        labels: [N] int64, 1 for the positive class.
    """

    places: Tensor
    fields: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


class Tabular(Task):
    """Predicts one of two classes from columns of numbers, words and categories."""

    Data: ClassVar[type[Section]] = TabularData
    Model: ClassVar[type[Section]] = TabularModel
    sample: ClassVar[str] = "row"
    vector: ClassVar[str] = "field"

    data_options: TabularData
    model_options: TabularModel
    kind: BinaryClassification
    columns: list[Column]
    parts: Mapping[str, Rows]

    def read(self, account: Account) -> None:
        """Read the table, divide it, and learn the values of each column from the training part.

        Copies of a row, but for the label, are never in two parts.
        """
        options = self.data_options
        cells, labels = self._cells(account)
        numbers, classes = number_labels(labels)
        if len(classes) != 2:
            found = alike(Counter(labels))
            spelled = f"; write each in one way: {found}" if found else ""
            raise InputError(
                f"column {options.label!r} holds {len(classes)} classes "
                f"({listed([repr(c) for c in classes])}); this task predicts two{spelled}"
            )
        if options.positive is not None:
            if options.positive not in classes:
                raise InputError(
                    f"data.positive: column {options.label!r} has no class {options.positive!r}; "
                    f"{closest(options.positive, classes)}"
                )
            if options.positive == classes[0]:
                numbers, classes = [1 - number for number in numbers], classes[::-1]
        self.kind = BinaryClassification(tuple(classes))
        groups: dict[tuple[str | None, ...], int] = {}
        same = [groups.setdefault(row, len(groups)) for row in zip(*cells.values(), strict=True)]
        part_of = stratified_parts(numbers, options.fractions, self.seed, same)
        chosen = {}
        for k, name in enumerate(PARTS):
            rows = np.flatnonzero(part_of == k)
            rows = np.random.default_rng([self.seed, k]).permutation(rows)
            chosen[name] = rows[: getattr(options.limits, name)].tolist()
        training = chosen["train"]
        self.columns = [
            Column.learn(name, [column[i] for i in training], options.ranges, options.min_count)
            for name, column in cells.items()
        ]
        self._shown = cells
        self.parts = {name: self._part(rows, numbers) for name, rows in chosen.items()}
        self._account(account, len(groups))

    def _cells(self, account: Account) -> tuple[dict[str, list[str | None]], list[str]]:
        """The cells of each column, blank ones None, and the labels, of the rows with a label."""
        options = self.data_options
        path = options.table()
        how = options.written
        names = options.columns
        if names is None:
            every = [name for name in Table(path, **how).sample() if name != options.label]
            for name in options.ignore:
                if name not in every:
                    raise InputError(f"data.ignore: no column {name!r}; {closest(name, every)}")
            names = [name for name in every if name not in options.ignore]
            if not names:
                raise InputError(f"{path} has no column beside the label to predict from")
        table = Table(path, [*names, options.label], **how)
        account.note("file", f"{path}: {table.form.words()}")
        missing = set(options.missing)
        cells: dict[str, list[str | None]] = {name: [] for name in names}
        labels: list[str] = []
        for block in table:
            kept = [i for i, x in enumerate(block[options.label]) if not is_blank(x, missing)]
            labels += [str(block[options.label][i]).strip() for i in kept]
            for name, column in cells.items():
                found = block[name]
                column += [self._cell(found[i]) for i in kept]
        table.tell_ragged(account)
        account.note("rows", f"{table.rows:,}")
        account.note("label", repr(options.label))
        if len(labels) < table.rows:
            account.note("dropped", f"{table.rows - len(labels):,} rows without a label")
        return cells, labels

    def _cell(self, value: Any) -> str | None:
        """A cell as text; None where it stands for no value."""
        return None if is_blank(value, self.data_options.missing) else str(value).strip()

    def _part(self, rows: list[int], numbers: Sequence[int]) -> Rows:
        """The rows at these places, whose classes are `numbers`."""
        fields = [c.encode([self._shown[c.name][i] for i in rows]) for c in self.columns]
        return Rows(
            torch.tensor(rows, dtype=torch.int64),
            torch.from_numpy(np.stack(fields, 1)),
            torch.tensor([numbers[i] for i in rows], dtype=torch.int64),
        )

    def _account(self, account: Account, distinct: int) -> None:
        ranges = [repr(c.name) for c in self.columns if c.values is None]
        words = [f"{c.name!r} ({c.size - 1})" for c in self.columns if c.values is not None]
        account.note("numbers in ranges", listed(ranges) or "none")
        account.note("categories", listed(words) or "none")
        for column in self.columns:
            self._warn(column, account)
        grouped = [repr(c.name) for c in self.columns if c.thousands]
        if grouped:
            account.note("commas of thousands", listed(grouped))
        blank = {n: sum(c is None for c in cells) for n, cells in self._shown.items()}
        gaps = [f"{name!r} {count:,}" for name, count in blank.items() if count]
        if gaps:
            account.note("missing values", listed(gaps))
        rows = len(next(iter(self._shown.values())))
        if distinct < rows:
            account.note("duplicates", f"{rows - distinct:,} rows repeat another one")
        for name, counts in self.counts().items():
            shown = zip(self.kind.classes, counts, strict=True)
            account.note(f"{name} part", listed([f"{label!r} {n:,}" for label, n in shown]))
            if name != "validation" and not all(counts):
                raise InputError(
                    f"the {name} part has rows of one class only; give more data, raise "
                    f"data.limits.{name} or its share in data.fractions"
                )

    def _warn(self, column: Column, account: Account) -> None:
        """Warn of a column whose cells say less to the model than they seem to."""
        cells = [cell for cell in self._shown[column.name] if cell is not None]
        if column.unsure:
            account.warn(
                f"column {column.name!r}: nothing tells whether the commas of its numbers, such as "
                f"{cells[0]!r}, are decimal or of thousands, so that numbers without such a comma "
                "are unknown; write them with a point, or without commas"
            )
        elif look(cells[:_LOOKED_AT]).kind == "numbers":
            if column.values is None:
                points = Points()
                points.add(cells)
                points.warn(column.name, account)
            odd = Counter(x for x in cells if column.number(x) is None)
            if odd:
                read = "they are unknown" if column.values is None else "it is read as categories"
                shown = listed([f"{x!r} ({n:,})" for x, n in odd.most_common()], 3)
                account.warn(
                    f"column {column.name!r} holds numbers but for {shown}, so that {read}; "
                    "data.missing: [...] names what stands for no value"
                )
        elif column.values is not None:
            unknown = column.unknown(cells)
            if unknown * 2 > len(cells):
                account.warn(
                    f"column {column.name!r}: {unknown:,} of {len(cells):,} values are in fewer "
                    f"than {self.data_options.min_count} rows of the training part, and unknown to "
                    "the model; leave the column out, or write it in a few categories or as numbers"
                )

    def unknown(self, rows: Sequence[Mapping[str, Any]]) -> Counter[str]:
        """Count the values of categories that are not known."""
        cells = {c.name: [self._cell(row.get(c.name)) for row in rows] for c in self.columns}
        return Counter({c.name: c.unknown(cells[c.name]) for c in self.columns})

    def columns_read(self) -> list[str]:
        """Give the columns that are predicted from."""
        return [column.name for column in self.columns]

    def encode(self, model: nn.Module, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """Number the values of rows of a file; a column that is not there is unknown.

        Raises:
            InputError: a cell of a column of numbers is filled, and no number.
        """
        fields = []
        for column in self.columns:
            cells = [self._cell(row.get(column.name)) for row in rows]
            column.refuse(cells)
            fields.append(column.encode(cells))
        inputs = {"values": torch.from_numpy(np.stack(fields, 1))}
        names = [self._cell(row.get(self.data_options.label)) for row in rows]
        if not all(name in self.kind.classes for name in names):
            return Batch(inputs)
        return Batch(inputs, torch.tensor([self.kind.classes.index(name or "") for name in names]))

    def batch(self, model: nn.Module, part: str, rows: Tensor, *, seed: int = 0) -> Batch:
        """Take some rows of a part."""
        found = self.parts[part]
        return Batch({"values": found.fields[rows]}, found.labels[rows])

    def show(self, part: str, row: int) -> str:
        """Show the cells of a row."""
        place = int(self.parts[part].places[row])
        return ", ".join(f"{name} {cells[place] or '?'}" for name, cells in self._shown.items())

    def counts(self) -> dict[str, Any]:
        """Give the rows of each class in each part."""
        return {
            name: [int((part.labels == c).sum()) for c in (0, 1)]
            for name, part in self.parts.items()
        }

    def build(self) -> DeepFM | FM:
        """A model with new weights."""
        options = self.model_options
        sizes = [column.size for column in self.columns]
        if options.kind != "deepfm":
            return FM(sizes, dim=options.dim if options.kind == "fm" else 0)
        return DeepFM(sizes, dim=options.dim, hidden=options.hidden, dropout=options.dropout)

    def parts_of(self, model: nn.Module, batch: Batch) -> list[list[list[str]]]:
        """Name the columns."""
        return [[self.columns_read()]]

    def swappable(self, model: nn.Module) -> Columns:
        """All columns; those of numbers by their ranges."""
        made = cast("DeepFM | FM", model)
        return Columns(
            "values",
            [column.name for column in self.columns],
            [column.size for column in self.columns],
            [table for table in (made.embedding, made.first) if table is not None],
            show=lambda column, value: self.columns[column].show(value),
        )

    def facts(self) -> dict[str, Any]:
        """Give the classes, and how cells become numbers."""
        return {**super().facts(), "columns": [asdict(column) for column in self.columns]}

    def restore(self, facts: dict[str, Any]) -> None:
        """Take over classes and columns."""
        super().restore(facts)
        self.columns = [Column(**column) for column in facts["columns"]]
