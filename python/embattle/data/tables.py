"""Columns out of CSV, Parquet and JSON-lines files, a block of rows at a time."""

from __future__ import annotations

import io
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from embattle.data.account import Account, printable
from embattle.data.formats import Format, line_of, parquet_files, recognise, unclosed_quote
from embattle.data.jsonlines import Objects, OnBad
from embattle.errors import InputError, closest, first_line, need

# Bytes of text that are read at once, and the most that a cell of a CSV file may have. Arrow reads
# some thirty blocks of such a file ahead.
BLOCK = 1 << 22
# The most characters of a line of JSON, in blocks.
_LINE = 16
# Rows of a Parquet file that are read at once.
_ROWS = 1 << 14


class Table:
    """Some columns of a file, read block by block: what is held does not grow with the file.

    Args:
        path: a Parquet file or a folder of nothing else, JSON lines, or a CSV file, known by what
            is in it.
        columns: the wanted columns; None takes all.
        encoding: of a text file; None takes UTF-8 (or UTF-16 with its mark).
        delimiter: of a CSV file; None guesses.
        header: names of the columns of a CSV file without a header line.
        drop_ragged: leave rows of a CSV file out that have too few or too many cells, instead of
            refusing the file.
        block: bytes of text to read at once, and the most that a cell of a CSV
            file may have; None takes `BLOCK`.
        lists: columns of JSON lines and Parquet that may hold lists of texts and numbers.
        on_bad: is told of each row that is none, with its number (from 0, of all rows of the file)
            and what is wrong: too few or too many cells, a line that is no such JSON. The row is
            left out, and the file not refused. Whoever has a block has been told of all its rows.

    Attributes:
        form: how the file is written.
        names: all columns that it has; of JSON lines, those of the lines read so far.
        rows: rows read so far.
        ragged: rows left out so far because they have too few or too many cells.
        nested: where all columns are read, those seen so far that a job refuses: lists, objects,
            bytes that are no text.

    Raises:
        InputError: if the file is no table, or lacks a column or has it twice.
    """

    def __init__(
        self,
        path: Path,
        columns: Sequence[str] | None = None,
        *,
        encoding: str | None = None,
        delimiter: str | None = None,
        header: Sequence[str] | None = None,
        drop_ragged: bool = False,
        block: int | None = None,
        lists: Collection[str] = (),
        on_bad: OnBad | None = None,
    ) -> None:
        self.path, self.block = path, block or BLOCK
        self.drop_ragged = drop_ragged or on_bad is not None
        self._lists, self._on_bad = lists, on_bad
        self._encoding = encoding
        self.form = recognise(
            path, columns or (), encoding=encoding, delimiter=delimiter, header=header
        )
        self.rows = self.ragged = 0
        self.nested: set[str] = set()
        self._closed = False  # whether all quotes are, which is looked for once
        self._first_ragged: tuple[int, int] | None = None
        with self._errors():
            if self.form.kind == "parquet":
                first = parquet_files(path)[0]
                self.names = list(need("pyarrow.parquet").read_schema(first).names)
            elif self.form.kind == "csv":
                self.names = next(iter(self.form.records()), [])
            else:
                self.names = []
        self.columns = None if columns is None else list(dict.fromkeys(columns))
        if self.form.kind != "jsonl":
            self._require(self.names)

    def __iter__(self) -> Iterator[dict[str, list[Any]]]:
        """Blocks of rows from the beginning: column to values.

        Cells of a CSV file are text as it stands there: no numbers, no dates, and `NA` is a cell.
        Those of JSON lines are text or None, numbers with their own digits. Parquet gives text,
        numbers, truth values, dates, or None.

        Raises:
            InputError: if the file cannot be read or has no rows, or a wanted column holds what is
                neither text nor number, date or truth value.
        """
        self.rows = self.ragged = self._objects_bad = 0
        read = {"parquet": self._parquet, "jsonl": self._json, "csv": self._csv}[self.form.kind]
        with self._errors():
            for block in read():
                self.rows += len(next(iter(block.values()), []))
                yield block
        if self.rows == 0 and self.ragged:
            raise InputError(
                f"{self.path}: none of {self.ragged} rows has the header's {len(self.names)} "
                f"cells; it was read as {self.form.words()}; check data.delimiter"
            )
        if self.rows == 0 and not self._objects_bad:
            raise InputError(f"{self.path} has no rows; give a file with data in it")

    def tell_ragged(self, account: Account) -> None:
        """Note the rows that were left out so far."""
        if self.ragged:
            account.note("dropped", f"{self.ragged:,} rows with too few or too many cells")

    def place(self, row: int) -> str:
        """Where a row (from 0) is in the file."""
        return line_of(self.path, self.form, row)

    def sample(self, rows: int = 1000) -> dict[str, list[str]]:
        """The first rows of all columns as text; blank cells are empty."""
        if self.form.kind == "csv":
            records = self.form.records()[: rows + 1]
            width = len(self.names)
            body = [record for record in records[1:] if len(record) == width]
            return {name: [record[i] for record in body] for i, name in enumerate(self.names)}
        with self._errors():
            first: dict[str, list[Any]]
            if self.form.kind == "parquet":
                first = next(self._parquet(rows, every=True), {name: [] for name in self.names})
            else:
                ignore = None if self._on_bad is None else lambda number, what: None
                objects = self._objects(None, ignore)
                first = next(objects.blocks(min(self.block, len(self.form.sample))), {})
        return {
            name: ["" if v is None or v != v else str(v) for v in values[:rows]]
            for name, values in first.items()
        }

    def _errors(self) -> _Refusal:
        return _Refusal(self)

    def _require(self, present: Sequence[str]) -> None:
        note = ""
        if self.form.kind == "csv" and not self.form.style:
            note = f" (read as {self.form.words()}; data.delimiter changes it, and data.header "
            note += "names the columns of a file without a header line)"
            note += not_a_header(present)
        for name in self.columns or ():
            count = list(present).count(name)
            if count == 0:
                known = printable(closest(name, present))
                raise InputError(f"{self.path} has no column {name!r}; {known}{note}")
            if count > 1:
                raise InputError(
                    f"{self.path} has {count} columns named {name!r}; give each its own name"
                )

    def _parquet(self, rows: int = 0, *, every: bool = False) -> Iterator[dict[str, list[Any]]]:
        columns = None if every else self.columns
        for path in parquet_files(self.path):
            with need("pyarrow.parquet").ParquetFile(path, buffer_size=1 << 20) as file:
                if list(file.schema_arrow.names) != self.names:
                    raise InputError(f"{path} has other columns than the first file of its folder")
                for batch in file.iter_batches(rows or _ROWS, columns=columns, use_threads=False):
                    batch.validate(full=True)
                    yield {
                        name: self._values(name, column, plain=not every)
                        for name, column in zip(batch.schema.names, batch.columns, strict=True)
                    }

    def _objects(self, columns: Sequence[str] | None, on_bad: OnBad | None) -> Objects:
        longest = _LINE * self.block
        return Objects(
            self.path, self.form.encoding, columns, longest, lists=self._lists, on_bad=on_bad
        )

    def _json(self) -> Iterator[dict[str, list[Any]]]:
        objects = self._objects(self.columns, self._on_bad)
        for block in objects.blocks(self.block):
            self.names, self.nested = list(objects.names), objects.nested
            yield block
        self._objects_bad = objects.bad
        if objects.rows:
            self._require(self.names)

    def _csv(self) -> Iterator[dict[str, list[Any]]]:
        arrow, csv = need("pyarrow"), need("pyarrow.csv")
        if len(self.form.records()) < 2 and not self.form.cut:
            return  # arrow misreads a header line without an end
        form, columns = self.form, self.columns
        # The same name twice among columns that nobody wants does no harm.
        names = [f"{i}" for i in range(len(self.names))]
        wanted = {
            names[i]: name
            for i, name in enumerate(self.names)
            if columns is None or name in columns
        }

        def note(row: Any) -> str:
            if self._first_ragged is None or not self.ragged:
                self._first_ragged = (row.number, row.actual_columns)
            self.ragged += 1
            if self._on_bad is not None:
                what = f"has {row.actual_columns} cells, and not {len(names)}"
                self._on_bad(row.number - 1 - form.skip - form.header, what)
            return "skip"

        reader = csv.open_csv(
            self._stream(),
            read_options=csv.ReadOptions(
                use_threads=False,
                block_size=self.block,
                column_names=names,
                skip_rows=form.skip,
                skip_rows_after_names=int(form.header),
            ),
            parse_options=csv.ParseOptions(
                delimiter=form.separator,
                newlines_in_values=True,
                ignore_empty_lines=False,
                invalid_row_handler=note,
            ),
            convert_options=csv.ConvertOptions(
                include_columns=list(wanted),
                column_types=dict.fromkeys(wanted, arrow.string()),
                strings_can_be_null=False,
            ),
        )
        for batch in reader:
            if batch.num_rows:
                yield {
                    wanted[name]: column.to_pylist()
                    for name, column in zip(batch.schema.names, batch.columns, strict=True)
                }
        self._refuse_open_quote()
        if self.ragged and not self.drop_ragged:
            number, cells = self._first_ragged or (0, 0)
            head = f" (the header is row {1 + form.skip})" if form.header else ""
            raise InputError(
                f"{self.path}: {self.ragged} rows do not have the header's {len(names)} cells; the "
                f"first is row {number} with {cells}{head}: repair them, check "
                "data.delimiter, or set data.ragged_rows: drop"
            )

    def _refuse_open_quote(self) -> None:
        line = None if self._closed else unclosed_quote(self.path, self.form)
        self._closed = True
        if line is not None:
            raise InputError(
                f"{self.path}, line {line}: a quote is opened and never closed, so that all that "
                "follows is one cell; close it, or double the quotes inside a cell"
            )

    def _stream(self) -> Any:
        """The file's text as UTF-8, without a byte-order mark, `separator` between the cells."""
        arrow = need("pyarrow")
        if len(self.form.delimiter) > 1:
            return arrow.PythonFile(_Plain(self.path, self.form), mode="r")
        file = arrow.OSFile(str(self.path))
        if self.form.encoding == "utf-8":
            return file
        return arrow.transcoding_input_stream(file, self.form.encoding, "utf-8")

    def _values(self, name: str, column: Any, *, plain: bool) -> list[Any]:
        """A column as Python values: text, numbers, truth values, dates, or None."""
        types = need("pyarrow").types
        kind = column.type
        if types.is_dictionary(kind):
            kind = kind.value_type
        if types.is_temporal(kind) and getattr(kind, "unit", "us") == "ns":
            column = column.cast("string")  # finer than Python's dates
        if types.is_uint64(kind):
            column = column.cast("string")  # Arrow takes no such number back as Python's
        values: list[Any] = column.to_pylist()
        wanted = plain and self.columns is not None
        encoding = self._encoding or "utf-8"
        if types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind):
            for row, value in enumerate(values):
                try:
                    values[row] = None if value is None else value.decode(encoding)
                except (UnicodeError, LookupError) as error:
                    if not wanted:
                        self.nested.add(name)
                        continue
                    raise InputError(
                        f"{self.path}, row {self.rows + row + 1}: column {name!r} holds bytes that "
                        f"are not {encoding}; name the encoding in data.encoding"
                    ) from error
        elif types.is_nested(kind) and not (name in self._lists and _is_list(types, kind)):
            if wanted:
                raise InputError(
                    f"{self.path}: column {name!r} holds {kind} values; give a column of text or "
                    "numbers"
                )
            self.nested.add(name)
        return values


def _is_list(types: Any, kind: Any) -> bool:
    """Whether an Arrow type is one of lists of plain values."""
    listed = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return listed and not types.is_nested(kind.value_type)


class _Refusal:
    """Turns what a reader complains of into a line."""

    def __init__(self, table: Table) -> None:
        self.table = table

    def __enter__(self) -> None:
        return None

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        arrow = need("pyarrow")
        table = self.table
        if isinstance(error, InputError) or not isinstance(
            error, (arrow.ArrowException, OSError, ValueError, OverflowError)
        ):
            return
        reason = first_line(error)
        if table.form.kind == "csv" and "Empty CSV" in reason:
            raise InputError(f"{table.path} has no rows; give a file with data in it") from error
        if table.form.kind == "csv" and "straddl" in reason:
            line = unclosed_quote(table.path, table.form)
            where = f" (the quote of line {line} is not closed)" if line else ""
            raise InputError(
                f"{table.path} has a cell of more than {table.block >> 20} MiB{where}; repair it"
            ) from error
        raise InputError(
            f"cannot read {table.path} as {table.form.words()}: {reason}; repair or convert it"
        ) from error


class _Plain(io.RawIOBase):
    """A text file as UTF-8 with one character for a delimiter of several."""

    def __init__(self, path: Path, form: Format) -> None:
        self._lines = path.open(encoding=form.encoding, newline="")
        self._form = form
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fills the buffer with what comes next."""
        if not self._rest:
            # By lines, so that no delimiter is cut.
            self._rest = self._form.plain("".join(self._lines.readlines(1 << 16))).encode()
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count

    def read(self, size: int = -1) -> bytes:  # arrow wants as much as it asks for, but at the end
        """The next bytes."""
        found = bytearray(size)
        view, have = memoryview(found), 0
        while have < size and (count := self.readinto(view[have:])):
            have += count
        return bytes(found[:have])

    def close(self) -> None:
        """Closes the file."""
        self._lines.close()
        super().close()


def read_columns(
    path: Path, columns: Sequence[str], account: Account | None = None, **options: Any
) -> dict[str, list[Any]]:
    """The wanted columns whole, for small files; see `Table`. The account is told what it is."""
    found: dict[str, list[Any]] = {name: [] for name in columns}
    table = Table(path, columns, **options)
    account = Account() if account is None else account
    account.note("file", f"{path}: {table.form.words()}")
    for block in table:
        for name in found:
            found[name] += block[name]
    table.tell_ragged(account)
    return found


def not_a_header(names: Sequence[str]) -> str:
    """What is odd about a first line, if it does not look like names of columns; else nothing."""
    from embattle.data.looks import is_number

    if names and names[0].lstrip().startswith("#"):
        return "; the first line looks like a comment: delete it"
    if names and all(is_number(name) for name in names):
        return "; the first line holds nothing but numbers"
    return ""
