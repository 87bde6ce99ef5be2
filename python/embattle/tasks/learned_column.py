"""How the cells of a table's column become numbers, learned from the training part."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from embattle.data.looks import has_thousands, is_number, may_be_thousands, number_of
from embattle.errors import InputError


@dataclass(frozen=True)
class Column:
    """How the cells of a column become numbers from 0; 0 is unknown: missing, rare, not seen.

    Attributes:
        name: of the column.
        values: the known ones, numbered from 1; None for a column of numbers.
        edges: of a column of numbers: range k (from 1) reaches from edge k - 2, which is not in
            it, to edge k - 1.
        thousands: commas in its numbers are of thousands.
        decimal: they are decimal. Where the training part has none, a later comma is decimal if it
            cannot be of thousands.
        unsure: all numbers have a comma that may be either. Their order is the same by both
            readings, and they are read as decimal; a number without such a comma is none, as it
            may be far above them or far below.
    """

    name: str
    values: dict[str, int] | None
    edges: list[float]
    thousands: bool = False
    decimal: bool = False
    unsure: bool = False

    @classmethod
    def learn(cls, name: str, cells: Sequence[str | None], ranges: int, least: int) -> Column:
        """Learn from the cells of the training rows; None is a missing one."""
        known = [cell for cell in cells if cell is not None]
        thousands = has_thousands(known)
        numbers = [number_of(cell, thousands=thousands) for cell in known]
        if known and None not in numbers:
            shares = np.linspace(0, 1, ranges + 1)[1:-1]
            edges = np.unique(np.quantile(np.array(numbers, float), shares, method="inverted_cdf"))
            decimal = not thousands and any("," in cell for cell in known)
            unsure = decimal and all(map(may_be_thousands, known))
            return cls(name, None, edges.tolist(), thousands, decimal, unsure)
        often = sorted(value for value, count in Counter(known).items() if count >= least)
        return cls(name, {value: k for k, value in enumerate(often, 1)}, [])

    @property
    def size(self) -> int:
        """How many numbers there are."""
        return len(self.edges) + 2 if self.values is None else len(self.values) + 1

    def show(self, number: int) -> str:
        """A value, or the bounds of a range, by number."""
        if number == 0:
            return "?"
        if self.values is not None:
            return list(self.values)[number - 1]
        low = f"above {self.edges[number - 2]:g}" if number > 1 else ""
        high = f"up to {self.edges[number - 1]:g}" if number <= len(self.edges) else ""
        return ", ".join(part for part in (low, high) if part) or "any"

    def encode(self, cells: Sequence[str | None]) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The numbers [N] of cells."""
        if self.values is not None:
            known = self.values
            return np.array([known.get(cell or "", 0) for cell in cells], dtype=np.int64)
        numbers = [self.number(cell or "") for cell in cells]
        usable = [number is not None for number in numbers]
        found = np.searchsorted(self.edges, [number or 0.0 for number in numbers], side="left") + 1
        return np.where(usable, found, 0).astype(np.int64)

    def unknown(self, cells: Sequence[str | None]) -> int:
        """How many cells hold a category that is not known."""
        if self.values is None:
            return 0
        return sum(cell is not None and cell not in self.values for cell in cells)

    def refuse(self, cells: Sequence[str | None]) -> None:
        """Raises InputError about a cell of a column of numbers that is filled, and no number."""
        if self.values is None:
            for cell in cells:
                if cell is not None and self.number(cell) is None:
                    whose = "the column's commas" if self.unsure else "its comma"
                    unsure = f" for sure: {whose} may be decimal or of thousands"
                    why = unsure if is_number(cell) or may_be_thousands(cell) else ""
                    raise InputError(f"column {self.name!r}: {cell!r} is no number{why}")

    def number(self, cell: str) -> float | None:
        """A cell as a number; None where it is none, or may be two."""
        if self.unsure:
            sure = may_be_thousands(cell)
        else:
            sure = self.thousands or self.decimal or not may_be_thousands(cell)
        if not sure:
            return None
        return number_of(cell, thousands=self.thousands)
