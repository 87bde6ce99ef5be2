"""Columns out of CSV, Parquet and JSON-lines files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embattle.data.formats import Format, line_of, recognise, unclosed_quote
from embattle.errors import InputError, closest, need

# A cell of a CSV file may be this long at most.
_LONGEST = 1 << 26


@dataclass(frozen=True)
class Table:
    """Some columns of a file.

    Attributes:
        path: the file.
        form: how it is written.
        names: all columns that it has.
        columns: the wanted columns, all of one length; absent values are None.
        rows: rows that were read.
        ragged: rows that were left out because they have too few or too many cells.
    """

    path: Path
    form: Format
    names: list[str]
    columns: dict[str, list[Any]]
    rows: int
    ragged: int = 0

    def place(self, row: int) -> str:
        """Where a row (from 0) is in the file."""
        return line_of(self.path, self.form, row)


def read_columns(path: Path, columns: Sequence[str]) -> dict[str, list[Any]]:
    """The wanted columns of a table, numbers as numbers; see `read_table`."""
    return read_table(path, columns).columns


def read_table(
    path: Path,
    columns: Sequence[str],
    *,
    encoding: str | None = None,
    delimiter: str | None = None,
    drop_ragged: bool = False,
    as_text: bool = False,
) -> Table:
    """Reads some columns of a table.

    Args:
        path: a Parquet file, JSON lines, or a CSV file with a header line, known by what is in
            it.
        columns: the wanted columns.
        encoding: of a text file; None takes UTF-8 (or UTF-16 with its mark).
        delimiter: of a CSV file; None guesses.
        drop_ragged: leave rows of a CSV file out that have too few or too many cells, instead of
            refusing the file.
        as_text: give the cells of a CSV file as they stand there: no numbers, no dates, and a cell
            `NA` is a cell.

    Returns:
        The table.

    Raises:
        InputError: if the file cannot be read, a column is missing or there twice, there are no
            rows, or a column holds what is neither text nor number, date or truth value.
    """
    form = recognise(path, columns, encoding=encoding, delimiter=delimiter)
    arrow = need("pyarrow")
    ragged = 0
    try:
        if form.kind == "parquet":
            names, table = _parquet(path, columns)
        elif form.kind == "jsonl":
            names, table = _json(path, columns, form)
        else:
            names, table, ragged = _csv(path, columns, form, drop_ragged, as_text)
        if table.num_rows == 0:
            raise InputError(f"{path} has no rows; give a file with data in it")
        table.validate(full=True)
        found = {name: _values(path, name, table.column(name), encoding) for name in columns}
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"cannot read {path} as {form.words()}: {_reason(error)}; repair or convert it"
        ) from error
    return Table(path, form, names, found, table.num_rows, ragged)


def sample(path: Path, form: Format, rows: int = 1000) -> dict[str, list[str]]:
    """The first rows of all columns, as text; blank cells are empty strings."""
    if form.kind == "csv":
        records = form.records()[: rows + 1]
        if not records:
            return {}
        width = len(records[0])
        body = [record for record in records[1:] if len(record) == width]
        return {name: [record[i] for record in body] for i, name in enumerate(records[0])}
    arrow = need("pyarrow")
    try:
        if form.kind == "parquet":
            file = need("pyarrow.parquet").ParquetFile(path)
            table = next(file.iter_batches(batch_size=rows), None)
            if table is None:
                return {name: [] for name in file.schema_arrow.names}
        else:
            lines = "".join(form.sample.splitlines(keepends=True)[:rows])
            table = need("pyarrow.json").read_json(arrow.BufferReader(lines.encode()))
        shown = zip(table.schema.names, table.columns, strict=True)
        return {
            name: ["" if v is None or v != v else str(v) for v in column.to_pylist()]
            for name, column in shown
        }
    except (arrow.ArrowException, OSError, UnicodeError) as error:
        raise InputError(
            f"cannot read {path} as {form.words()}: {_reason(error)}; repair or convert it"
        ) from error


def _reason(error: Exception) -> str:
    """The first line of an error, with objects of JSON lines counted from 1."""
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return re.sub(r"in row (\d+)$", lambda found: f"in object {int(found[1]) + 1}", first)


def _parquet(path: Path, columns: Sequence[str]) -> tuple[list[str], Any]:
    parquet = need("pyarrow.parquet")
    names = parquet.read_schema(path).names
    _require(path, columns, names)
    return names, parquet.read_table(path, columns=list(dict.fromkeys(columns)))


def _stream(path: Path, form: Format) -> Any:
    """The file's text as UTF-8, without a byte-order mark."""
    arrow = need("pyarrow")
    file = arrow.OSFile(str(path))
    if form.encoding == "utf-8":
        return file
    return arrow.transcoding_input_stream(file, form.encoding, "utf-8")


def _json(path: Path, columns: Sequence[str], form: Format) -> tuple[list[str], Any]:
    arrow, json = need("pyarrow"), need("pyarrow.json")
    # One block: an error then counts the objects from the beginning of the file.
    block = json.ReadOptions(use_threads=False, block_size=min(path.stat().st_size * 4, 2**31 - 1))
    table = json.read_json(_stream(path, form), read_options=block)
    names = table.schema.names
    _require(path, columns, names)
    # Text that looks like a date was taken for one: read it again as it stands there.
    dates = [name for name in columns if arrow.types.is_temporal(table.schema.field(name).type)]
    if dates:
        schema = arrow.schema([(name, arrow.string()) for name in dates])
        options = json.ParseOptions(explicit_schema=schema)
        table = json.read_json(_stream(path, form), read_options=block, parse_options=options)
    return names, table.select(list(dict.fromkeys(columns)))


def _csv(
    path: Path, columns: Sequence[str], form: Format, drop_ragged: bool, as_text: bool
) -> tuple[list[str], Any, int]:
    arrow, csv = need("pyarrow"), need("pyarrow.csv")
    header = next(iter(form.records()), [])
    _require(path, columns, header, note=f" (read as {form.words()}; data.delimiter changes it)")
    ragged: list[tuple[int, int]] = []

    def note(row: Any) -> str:
        ragged.append((row.number, row.actual_columns))
        return "skip"

    wanted = list(dict.fromkeys(columns))
    options = {
        "read_options": csv.ReadOptions(
            use_threads=False,
            block_size=_LONGEST,
            skip_rows=form.skip,
        ),
        "parse_options": csv.ParseOptions(
            delimiter=form.delimiter,
            newlines_in_values=True,
            ignore_empty_lines=False,
            invalid_row_handler=note,
        ),
        "convert_options": csv.ConvertOptions(
            include_columns=wanted,
            column_types=dict.fromkeys(wanted, arrow.string()) if as_text else None,
            strings_can_be_null=not as_text,
        ),
    }
    try:
        table = csv.read_csv(_stream(path, form), **options)
    except arrow.ArrowInvalid as error:
        if "straddl" in str(error):
            line = unclosed_quote(path, form)
            where = f" (the quote of line {line} is not closed)" if line else ""
            raise InputError(
                f"{path} has a cell of more than {_LONGEST >> 20} MiB{where}; repair it"
            ) from error
        if "Empty CSV" in str(error):
            raise InputError(f"{path} has no rows; give a file with data in it") from error
        raise
    line = unclosed_quote(path, form)
    if line is not None:
        raise InputError(
            f"{path}, line {line}: a quote is opened and never closed, so that all that follows "
            "is one cell; close it, or double the quotes inside a cell"
        )
    if ragged and not drop_ragged:
        number, cells = ragged[0]
        raise InputError(
            f"{path}: {len(ragged)} rows do not have the header's {len(header)} cells; the first "
            f"is row {number + form.skip} with {cells} (the header is row {1 + form.skip}): repair "
            "them, check data.delimiter, or set data.ragged_rows: drop"
        )
    return header, table, len(ragged)


def _values(path: Path, name: str, column: Any, encoding: str | None) -> list[Any]:
    """A column as Python values: text, numbers, truth values, dates, or None."""
    types = need("pyarrow").types
    kind = column.type
    if types.is_dictionary(kind):
        kind = kind.value_type
    values: list[Any] = column.to_pylist()
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind):
        for row, value in enumerate(values):
            try:
                values[row] = None if value is None else value.decode(encoding or "utf-8")
            except (UnicodeError, LookupError) as error:
                raise InputError(
                    f"{path}, row {row + 1}: column {name!r} holds bytes that are not "
                    f"{encoding or 'utf-8'}; name the encoding in data.encoding"
                ) from error
    elif types.is_nested(kind):
        raise InputError(
            f"{path}: column {name!r} holds {kind} values; give a column of text or numbers"
        )
    return values


def _require(path: Path, columns: Sequence[str], present: Sequence[str], note: str = "") -> None:
    for name in columns:
        count = list(present).count(name)
        if count == 0:
            raise InputError(f"{path} has no column {name!r}; {closest(name, present)}{note}")
        if count > 1:
            raise InputError(f"{path} has {count} columns named {name!r}; give each its own name")
