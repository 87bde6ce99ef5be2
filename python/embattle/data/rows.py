"""The rows of a file one after the other, with their numbers; those that cannot be read as well."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from embattle.data.formats import lines_of_rows, parquet_files
from embattle.data.tables import Table
from embattle.errors import InputError, closest, need


@dataclass(frozen=True)
class Row:
    """A row of a file.

    Attributes:
        number: its place among all rows of the file, from 0; the header is none.
        cells: column to cell, as `Table` gives them; empty for a row that cannot be read.
        wrong: what is wrong with the row, and nothing if it was read.
    """

    number: int
    cells: Mapping[str, Any]
    wrong: str = ""


class Rows:
    """All rows of a file in order; what is held does not grow with the file.

    Args:
        path: a file that `Table` reads.
        columns: the wanted columns; None takes all.
        lists: those that may hold lists of texts and numbers.
        encoding, delimiter: of a text file, see `Table`.

    Attributes:
        table: the file.

    Raises:
        InputError: the file is no table, or lacks a column. JSON lines lack one that is in none of
            the first lines.
    """

    def __init__(
        self,
        path: Path,
        columns: Sequence[str] | None = None,
        *,
        lists: Collection[str] = (),
        encoding: str | None = None,
        delimiter: str | None = None,
    ) -> None:
        self._unread: deque[Row] = deque()
        self.table = Table(
            path,
            columns,
            lists=lists,
            encoding=encoding,
            delimiter=delimiter,
            on_bad=lambda number, what: self._unread.append(Row(number, {}, what)),
        )
        if self.table.form.kind == "jsonl":
            first = self.table.sample()
            for name in columns or ():
                if name not in first:
                    raise InputError(f"{path} has no column {name!r}; {closest(name, first)}")

    def __iter__(self) -> Iterator[Row]:
        """All rows from the beginning.

        Raises:
            InputError: the file cannot be read, or has no rows.
        """
        self._unread.clear()
        number = 0
        for block in self.table:
            for cells in zip(*block.values(), strict=True):
                while self._unread and self._unread[0].number == number:
                    yield self._unread.popleft()
                    number += 1
                yield Row(number, dict(zip(block, cells, strict=True)))
                number += 1
        yield from self._unread

    def estimate(self) -> int:
        """About how many rows there are: of text, how many line ends, which texts may have too."""
        path, form = self.table.path, self.table.form
        if form.kind == "parquet":
            read = need("pyarrow.parquet").read_metadata
            return sum(read(file).num_rows for file in parquet_files(path))
        ends = 0
        with path.open("rb") as stream:
            while block := stream.read(1 << 20):
                ends += block.count(b"\n")
        return max(1, ends - form.header)

    def lines(self, numbers: Iterable[int]) -> Iterator[int | None]:
        """The lines on which rows begin, from 1; None where it cannot be told.

        Args:
            numbers: of the rows, ascending.
        """
        found = zip(count(), lines_of_rows(self.table.path, self.table.form), strict=False)
        place, line = -1, None
        for number in numbers:
            while place < number:
                place, (line, _) = next(found, (number, (None, True)))
            yield line

    def place(self, number: int) -> str:
        """Where a row is, in words."""
        (line,) = self.lines([number])
        return f"{self.table.path}, {f'row {number + 1}' if line is None else f'line {line}'}"
