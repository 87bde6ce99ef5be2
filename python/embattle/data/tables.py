"""Columns out of CSV and Parquet files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from embattle.errors import InputError, closest, need

_PARQUET = b"PAR1"


def read_columns(path: Path, columns: Sequence[str]) -> dict[str, list[Any]]:
    """Reads some columns of a table.

    Args:
        path: a Parquet file (known by its first bytes, whatever its name) or a CSV file with a
            header line, comma-separated, UTF-8.
        columns: the wanted columns.

    Returns:
        Column name to its values, all of one length; absent values are None.

    Raises:
        InputError: if the file cannot be read, a column is missing, or there are no rows.
    """
    try:
        with path.open("rb") as stream:
            head = stream.read(4)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; check data.path") from error
    if not head:
        raise InputError(f"{path} is empty; give a CSV file with a header line, or a Parquet file")
    arrow = need("pyarrow")
    try:
        if head == _PARQUET:
            parquet = need("pyarrow.parquet")
            _require(path, columns, parquet.read_schema(path).names)
            table = parquet.read_table(path, columns=list(columns))
        else:
            csv = need("pyarrow.csv")
            table = csv.read_csv(
                path,
                parse_options=csv.ParseOptions(newlines_in_values=True),
                convert_options=csv.ConvertOptions(strings_can_be_null=True),
            )
            _require(path, columns, table.column_names)
    except arrow.ArrowException as error:
        kind = "Parquet" if head == _PARQUET else "CSV"
        first = str(error).splitlines()[0]
        raise InputError(f"cannot read {path} as {kind}: {first}; repair or convert it") from error
    if table.num_rows == 0:
        raise InputError(f"{path} has no rows; give a file with data in it")
    return {name: table.column(name).to_pylist() for name in columns}


def _require(path: Path, columns: Sequence[str], present: Sequence[str]) -> None:
    for name in columns:
        if name not in present:
            raise InputError(f"{path} has no column {name!r}; {closest(name, present)}")
