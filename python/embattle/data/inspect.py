"""What is in a file of which no recipe says anything yet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from embattle.data.account import Account, listed, short
from embattle.data.formats import delimiter_of
from embattle.data.labels import is_blank
from embattle.data.looks import READERS, TABLES, guess_events, guess_roles, kind_of_table, look_all
from embattle.data.tables import Table, not_a_header
from embattle.errors import options_named
from embattle.progress import say


def inspect_file(path: Path, *, encoding: str | None, delimiter: str | None) -> None:
    """Prints what is in a table, and the beginning of a recipe for it.

    Raises:
        InputError: if the file cannot be read.
    """
    account = Account()
    try:
        with options_named():
            section = describe(
                path,
                account,
                encoding=encoding,
                delimiter=delimiter_of(delimiter),
            )
    finally:
        for line in account.lines():
            say(line)
    if section is not None:
        say("")
        say("A recipe may begin with (check the columns):")
        say(section.rstrip())


def describe(
    path: Path, account: Account, *, encoding: str | None = None, delimiter: str | None = None
) -> str | None:
    """Looks at a file's columns and guesses which are the text and the label.

    Args:
        path: a CSV, Parquet or JSON-lines file.
        account: is told what there is.
        encoding: see `embattle.data.tables.Table`.
        delimiter: see there.

    Returns:
        The `data` section of a recipe for it, in YAML; None if the file has no text or no label.

    Raises:
        InputError: if the file cannot be read.
    """
    table = Table(path, encoding=encoding, delimiter=delimiter, drop_ragged=True)
    account.note("file", f"{path}: {table.form.words()}")
    shown = table.sample()
    columns = look_all(shown)
    _count(table, account)
    odd = not_a_header(table.names)
    if odd and table.form.kind == "csv" and table.form.header:
        account.warn(f"the first line is read as the names of the columns{odd}")
    rows = max(map(len, shown.values()), default=0)
    account.note("looked at", f"the first {rows:,} rows, for what follows")
    for name, column in columns.items():
        account.note(
            "column",
            f"{name!r}: {column.kind}, {column.distinct:,} different, {column.blank:.0%} blank, "
            f"such as {short(column.example)}",
        )
    kind, why = kind_of_table(columns)
    if kind != "text":
        account.warn(
            f"the file looks like {TABLES[kind]} ({listed([repr(name) for name in why], 3)}), and "
            "the task text_classification reads texts" + READERS.get(kind, "")
        )
    if kind in ("ratings", "clicks"):
        roles = guess_events(columns)
        account.note("guess", ", ".join(f"{role}: {name!r}" for role, name in roles.items()))
    text, label = guess_roles(columns)
    if not text or label is None:
        if kind in ("ratings", "clicks"):
            return None
        account.note("guess", "no column of sentences" if not text else "no column of classes")
        return None
    section: dict[str, Any] = {
        "path": str(path),
        "text": [name for name in text if name != label],
        "label": label,
    }
    for key, value in (("encoding", encoding), ("delimiter", delimiter)):
        if value is not None:
            section[key] = value
    written: str = yaml.safe_dump({"data": section}, sort_keys=False, allow_unicode=True)
    return written


def _count(table: Table, account: Account) -> None:
    """Reads the whole file, and notes its rows and what a job would drop or refuse."""
    empty = 0
    for block in table:
        blank = [[is_blank(value) for value in column] for column in block.values()]
        empty += sum(map(all, zip(*blank, strict=True)))
    account.note("rows", f"{table.rows:,} of {len(table.names)} columns")
    if empty:
        account.note("dropped", f"{empty:,} empty rows")
    table.tell_ragged(account)
    if table.ragged:
        account.warn("a job refuses such rows unless data.ragged_rows: drop is set")
