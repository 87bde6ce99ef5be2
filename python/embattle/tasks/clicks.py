"""Whether a user likes an item, from columns of a table: DeepFM and DLRM."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from embattle.data.account import Account
from embattle.data.batch import Batch
from embattle.data.divide import random_parts
from embattle.data.keyed import Keyed, plain_name
from embattle.data.labels import TRUTH, is_blank
from embattle.data.looks import Points, number_in
from embattle.data.recipe import Place, Remedy, check_fractions
from embattle.data.splits import PARTS
from embattle.data.tables import read_columns
from embattle.errors import InputError
from embattle.models.deepfm import DeepFM
from embattle.models.dlrm import DLRM
from embattle.models.fm import FM
from embattle.sections import Section
from embattle.tasks.base import Task
from embattle.tasks.columns import Columns
from embattle.tasks.kinds import BinaryClassification

# isort: split
from pydantic import Field, PositiveFloat, PositiveInt, model_validator


class Joined(Place):
    """A further table, with one row for each value of a column.

    Attributes:
        key: the column, in both tables.
        fields: its columns of categories.
        dense: its columns of numbers.
    """

    key: str
    fields: list[str] = Field(default=[])
    dense: list[str] = Field(default=[])


class ClicksRecipe(Place):
    """Which table, and which of its columns.

    Attributes:
        fields: columns of categories.
        dense: columns of numbers.
        join: further tables that tell more of a category, such as of users and items.
        label: the column that is predicted.
        at_least: the label is positive from this value on.
        missing: cells that stand for no value, such as NA.
        blank_labels: what happens to rows without a label.
        fractions: shares of train, validation and test, drawn by the recipe's seed.
        rows: use the first so many rows; null uses all.
    """

    fields: list[str] = Field(min_length=1)
    dense: list[str] = Field(default=[])
    join: list[Joined] = Field(default=[])
    label: str
    at_least: float = 1.0
    missing: list[str] = Field(default=[])
    blank_labels: Remedy = "refuse"
    fractions: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (0.8, 0.1, 0.1)
    rows: PositiveInt | None = None

    @model_validator(mode="after")
    def _consistent(self) -> ClicksRecipe:
        names = [*self.fields, *self.dense]
        names += [name for other in self.join for name in (*other.fields, *other.dense)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"the column {twice[0]!r} is named twice; once is enough")
        if self.label in names:
            raise ValueError(f"the label {self.label!r} is among the columns: leave it out")
        missing = [other.key for other in self.join if other.key not in self.fields]
        if missing:
            raise ValueError(f"join: the key {missing[0]!r} is not among data.fields; add it there")
        check_fractions(self.fractions)
        return self

    def categories(self) -> list[str]:
        """All columns of categories."""
        return self.fields + [name for other in self.join for name in other.fields]

    def numbers(self) -> list[str]:
        """All columns of numbers."""
        return self.dense + [name for other in self.join for name in other.dense]


class ClicksModel(Section):
    """A model of click-through rates.

    Attributes:
        kind: `deepfm`, `fm` or `linear` (columns of categories alone; see `TabularModel`), or
            `dlrm` (with columns of numbers).
        dim: width of a value's vector.
        hidden: widths of the hidden layers (of DLRM those after the products).
        dropout: in the perceptrons.
    """

    kind: Literal["deepfm", "fm", "linear", "dlrm"] = "deepfm"
    dim: PositiveInt = 16
    hidden: tuple[PositiveInt, ...] = (64, 64)
    dropout: float = Field(default=0.0, ge=0, lt=1)


class ClickThrough(Task):
    """Predicts one logit, yes or no; the attacker moves the vectors of a sample's values.

    Values that the training part does not have share one vector; a column of numbers is brought to
    mean 0 and variance 1 there (of one number alone the variance stays 0), and what is absent to 0.
    """

    Data: ClassVar[type[Section]] = ClicksRecipe
    Model: ClassVar[type[Section]] = ClicksModel
    sample: ClassVar[str] = "sample"
    vector: ClassVar[str] = "value"

    data_options: ClicksRecipe
    model_options: ClicksModel
    known: dict[str, list[str]]
    scales: dict[str, list[float]]

    def __init__(self, data: Any, model: Any, seed: int = 0) -> None:
        super().__init__(data, model, seed)
        dense = self.data_options.numbers()
        if self.model_options.kind == "dlrm" and not dense:
            raise InputError("model.kind: dlrm needs columns of numbers; name some in data.dense")
        kind = self.model_options.kind
        if kind != "dlrm" and dense:
            raise InputError(
                f"data.dense: {kind} reads no columns of numbers ({dense[0]}); choose kind: dlrm"
            )

    def read(self, account: Account) -> None:
        """Read and join the tables, and divide the rows by seed."""
        options = self.data_options
        wanted = (*options.fields, *options.dense, options.label)
        table = read_columns(options.table(), wanted, account, **options.written)
        columns = {name: column[: options.rows] for name, column in table.items()}
        if options.blank_labels == "drop":
            columns = _labelled(columns, options, account)
        count = len(columns[options.label])
        for other in options.join:
            columns |= _look_up(other, columns[other.key], account)
        for name in (*options.numbers(), options.label):
            points = Points()
            points.add(columns[name])
            points.warn(name, account)
        liked = _liked(options, columns.pop(options.label))
        if not 0 < liked.sum() < count:
            raise InputError(
                f"data.at_least: {options.label!r} is {'always' if liked.any() else 'never'} at "
                f"least {options.at_least:g}; choose a bound between its values"
            )
        chosen = self._divided(columns, count, account)
        self.kind = BinaryClassification(("no", "yes"))
        train = chosen["train"]
        self.known = {
            name: sorted({self._name(columns[name][i]) for i in train})
            for name in options.categories()
        }
        self.scales = {}
        for name in options.numbers():
            found = _numbers(name, columns[name], options.missing)[train]
            if np.isnan(found).all():
                raise InputError(
                    f"column {name!r} has no number in the training part; leave it out"
                )
            # Of one number alone rounding may leave a spread, by which another would be divided.
            varies = np.nanmin(found) < np.nanmax(found)
            spread = float(np.nanstd(found)) if varies else 0.0
            self.scales[name] = [float(np.nanmean(found)), spread or 1.0]
            if not np.isfinite(self.scales[name]).all():
                raise InputError(f"column {name!r} holds numbers that are too large to be scaled")
        values, dense = self._numbered(columns, count)
        self.parts = {
            name: Rows(values[rows], dense[rows], liked[rows]) for name, rows in chosen.items()
        }
        account.note("rows", f"{count:,}, {liked.mean():.1%} of them yes")

    def _divided(
        self, columns: Mapping[str, Sequence[Any]], count: int, account: Account
    ) -> dict[str, NDArray[np.int64]]:
        """The rows of each part, in random order.

        Copies of a row, but for the label, are never in two parts.
        """
        fractions = self.data_options.fractions
        groups: dict[tuple[str, ...], int] = {}
        same = [
            groups.setdefault(tuple(map(str, row)), len(groups))
            for row in zip(*columns.values(), strict=True)
        ]
        place = np.random.default_rng(self.seed).permutation(count)
        if len(groups) == count:
            edges = (np.cumsum(fractions)[:-1] * count).round().astype(int)
            return dict(zip(PARTS, np.split(place, edges), strict=True))
        account.note("duplicates", f"{count - len(groups):,} rows repeat another one")
        part = random_parts(count, fractions, self.seed, same)[place]
        return {name: place[part == k] for k, name in enumerate(PARTS)}

    def build(self) -> nn.Module:
        """Vectors and weights drawn at random."""
        options, sizes = self.model_options, [len(known) + 1 for known in self.known.values()]
        if options.kind == "deepfm":
            return DeepFM(sizes, dim=options.dim, hidden=options.hidden, dropout=options.dropout)
        if options.kind != "dlrm":
            return FM(sizes, dim=options.dim if options.kind == "fm" else 0)
        return DLRM(
            sizes, len(self.scales), dim=options.dim, top=options.hidden, dropout=options.dropout
        )

    def batch(self, model: nn.Module, part: str, rows: Tensor, *, seed: int = 0) -> Batch:
        """Some rows of a part."""
        found: Rows = self.parts[part]
        inputs = {"values": torch.from_numpy(found.values)[rows]}
        if self.scales:
            inputs["dense"] = torch.from_numpy(found.dense)[rows]
        return Batch(inputs, torch.from_numpy(found.label)[rows].long())

    def columns_read(self) -> list[str]:
        """Give the columns of categories and of numbers, those of joined tables too."""
        return [*self.known, *self.scales]

    def unknown(self, rows: Sequence[Mapping[str, Any]]) -> Counter[str]:
        """Count the values of categories that are not known."""
        found: Counter[str] = Counter()
        for name, known in self.known.items():
            names, held = [self._name(row.get(name)) for row in rows], set(known)
            found[name] = sum(value != "" and value not in held for value in names)
        return found

    def encode(self, model: nn.Module, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """Rows of a file that has all columns, those of joined tables too."""
        columns = {name: [row.get(name) for row in rows] for name in self.columns_read()}
        values, dense = self._numbered(columns, len(rows))
        inputs = {"values": torch.from_numpy(values)}
        if self.scales:
            inputs["dense"] = torch.from_numpy(dense)
        options = self.data_options
        given = [row.get(options.label) for row in rows]
        labels = None
        if all(value is not None for value in given):
            labels = torch.from_numpy(_liked(options, given)).long()
        return Batch(inputs, labels)

    def show(self, part: str, row: int) -> str:
        """Show the values of the columns of categories."""
        numbers = self.parts[part].values[row].tolist()
        shown = zip(self.known.items(), numbers, strict=True)
        return ", ".join(f"{name} {known[n - 1] if n else '?'}" for (name, known), n in shown)

    def parts_of(self, model: nn.Module, batch: Batch) -> list[list[list[str]]]:
        """Name the columns of categories, whose vectors are attacked."""
        return [[list(self.known)]]

    def swappable(self, model: nn.Module) -> Columns:
        """The columns of categories, and of DLRM those of numbers."""
        known = list(self.known.items())
        made: Any = model
        places = (made.embedding, getattr(made, "first", None))
        dense = isinstance(model, DLRM)
        return Columns(
            "values",
            list(self.known),
            [len(values) + 1 for values in self.known.values()],
            [table for table in places if table is not None],
            numbers="dense" if dense else "",
            number_names=list(self.scales),
            number_place=made.numbers if dense else None,
            show=lambda column, value: known[column][1][value - 1] if value else "?",
        )

    def facts(self) -> dict[str, Any]:
        """Give the values that are known, and the scales of numbers."""
        return {**super().facts(), "known": self.known, "scales": self.scales}

    def restore(self, facts: dict[str, Any]) -> None:
        """Take them over."""
        super().restore(facts)
        self.known, self.scales = facts["known"], facts["scales"]

    def _name(self, cell: Any) -> str:
        """A category by its name; a cell without a value has an empty one."""
        return "" if is_blank(cell, self.data_options.missing) else plain_name(cell)

    def _numbered(
        self, columns: Mapping[str, Sequence[Any]], count: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Values by number, 0 for one that is not known, and numbers on their scales."""
        missing = self.data_options.missing
        values = np.zeros((count, len(self.known)), dtype=np.int64)
        for place, (name, known) in enumerate(self.known.items()):
            number = {value: i for i, value in enumerate(known, start=1)}
            values[:, place] = [number.get(self._name(value), 0) for value in columns[name]]
        dense = np.zeros((count, len(self.scales)), dtype=np.float32)
        for place, (name, (mean, spread)) in enumerate(self.scales.items()):
            found = (_numbers(name, columns[name], missing) - mean) / spread
            dense[:, place] = np.where(np.isnan(found), 0, found)
        return values, dense


@dataclass(frozen=True)
class Rows:
    """Rows of a part: values [N, fields], numbers [N, dense], and bool labels [N]."""

    values: NDArray[np.int64]
    dense: NDArray[np.float32]
    label: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.label)


def _labelled(
    columns: dict[str, list[Any]], options: ClicksRecipe, account: Account
) -> dict[str, list[Any]]:
    """The rows that have a label."""
    blank = [is_blank(cell, options.missing) for cell in columns[options.label]]
    if any(blank):
        account.note("dropped", f"{sum(blank):,} rows without a label")
    return {
        name: [cell for cell, none in zip(column, blank, strict=True) if not none]
        for name, column in columns.items()
    }


def _liked(options: ClicksRecipe, column: Sequence[Any]) -> NDArray[np.bool_]:
    values = _numbers(options.label, column, options.missing)
    if np.isnan(values).any():
        raise InputError(
            f"data.label: column {options.label!r} has empty cells; drop those rows "
            "(data.blank_labels: drop)"
        )
    liked: NDArray[np.bool_] = values >= options.at_least
    return liked


def _numbers(name: str, column: Sequence[Any], missing: Collection[str]) -> NDArray[np.float64]:
    """A column as numbers, true and yes as 1, false and no as 0; NaN where there is no value."""
    try:
        found = [
            math.nan
            if is_blank(value, missing)
            else number_in(TRUTH.get(str(value).strip().lower(), value))
            for value in column
        ]
    except ValueError as error:
        raise InputError(
            f"column {name!r} must hold numbers: {error} (data.missing: [...] names what stands "
            "for no value)"
        ) from error
    numbers = np.array(found, dtype=np.float64)
    if np.isinf(numbers).any():
        raise InputError(
            f"column {name!r} holds numbers that are not finite; name them in data.missing"
        )
    return numbers


def _look_up(other: Joined, keys: Sequence[Any], account: Account) -> dict[str, list[Any]]:
    """The columns of a further table for each key, None where it has none."""
    path, names = other.table(), [*other.fields, *other.dense]
    table = Keyed(path, other.key, names, account, **other.written)
    rows = [table.row(key) for key in keys]
    lacking = rows.count(None)
    if lacking == len(rows):
        raise InputError(
            f"{path}: column {other.key!r} has none of the keys of the rows, such as {keys[0]!r}; "
            "check data.join"
        )
    if lacking:
        account.note(
            "joined", f"{path}: {lacking:,} of {len(rows):,} rows have no {other.key!r} in it"
        )
    found = table.columns
    return {name: [None if row is None else found[name][row] for row in rows] for name in names}
