"""Copies of a table with some cells exchanged and rows added, and their record."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from embattle.data.formats import parquet_files
from embattle.data.tables import Table
from embattle.errors import InputError
from embattle.files import replacing, sha256, write_text

# Told the number of the first row of a block (from 0) and the block's cells as text, which it may
# exchange.
Look = Callable[[int, dict[str, list[str]]], None]
# Given all columns' names, the rows that are added.
Added = Callable[[list[str]], Iterable[Mapping[str, str]]]


def manifest_path(out: Path) -> Path:
    """Where the record of what is fake lies beside a poisoned table."""
    return out.with_name(f"{out.name}.manifest.json")


def check_out(out: Path, what: str) -> None:
    """Check that a copy can be written.

    Raises:
        InputError: it is no CSV file, or it or its record is there already.
    """
    if out.suffix.lower() != ".csv":
        raise InputError(f"--out {out}: {what} is written as CSV; name a .csv file")
    for file in (out, manifest_path(out)):
        if file.exists():
            raise InputError(f"{file} is there already; name another --out, or remove it first")


def write_copy(
    path: Path,
    out: Path,
    look: Look,
    added: Added,
    facts: Callable[[], dict[str, Any]],
    *,
    encoding: str | None,
    delimiter: str | None,
) -> None:
    """Write a copy and its record, both whole or none.

    Args:
        path: the genuine table.
        out: the copy, CSV.
        look: sees all rows first.
        added: gives the rows that follow them, by column; other columns are blank.
        facts: what the record says beside both files' hashes; asked when all rows are written.
        encoding, delimiter: of the genuine table, if it is text.
    """
    table = whole_table(path, encoding, delimiter)
    with replacing(out) as part:
        with part.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            names = _all_names(table)
            writer.writerow(names)
            writer.writerows(_rows(table, names, look))
            for row in added(names):
                writer.writerow([row.get(name, "") for name in names])
        record = {
            "poisoned": {"file": out.name, "sha256": sha256(part)},
            "source": {"file": path.name, "sha256": _hashes(path)},
            **facts(),
        }
        write_text(manifest_path(out), json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def whole_table(path: Path, encoding: str | None, delimiter: str | None) -> Table:
    """A table of all columns; those of JSON lines are known once they are read."""
    names = Table(path, encoding=encoding, delimiter=delimiter).names
    return Table(path, names or None, encoding=encoding, delimiter=delimiter)


def cell_text(cell: Any) -> str:
    """A cell as it is written; what is absent is blank."""
    return "" if cell is None or cell != cell else str(cell)


def _rows(table: Table, names: list[str], look: Look) -> Iterator[list[str]]:
    start = 0
    for block in table:
        length = len(next(iter(block.values())))
        cells = {name: [cell_text(cell) for cell in block[name]] for name in block}
        look(start, cells)
        blank = [""] * length
        yield from map(list, zip(*(cells.get(name, blank) for name in names), strict=True))
        start += length


def _all_names(table: Table) -> list[str]:
    """All columns; of JSON lines those of all lines, so that the file is read through."""
    if not table.names:
        for _ in table:
            pass
    return list(table.names)


def _hashes(path: Path) -> str | dict[str, str]:
    """The SHA-256 of a file, or of each file of a folder."""
    if path.is_dir():
        return {file.name: sha256(file) for file in parquet_files(path)}
    return sha256(path)
