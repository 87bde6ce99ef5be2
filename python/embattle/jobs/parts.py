"""Finished parts of a long table, kept until it is whole: what is stopped goes on after the last.

A part is an Arrow file of some rows of the table. Beside its columns it keeps which rows of the
input it is about, and which of those are bad.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from embattle.audit.scores import plain
from embattle.data.rows import Rows
from embattle.errors import InputError, need
from embattle.files import remove_unfinished, replacing, write_text
from embattle.jobs.run_folder import clear, contents, locked

#: How a table is written, by the end of its file's name.
SUFFIXES = (".csv", ".parquet", ".jsonl")
_JOB = "job.json"

Bad = tuple[int, str]


class Parts:
    """The parts of one table, in a folder beside it.

    Args:
        out: the table's file.
        job: all that decides what the table holds, as JSON: parts of another job are not gone on
            with.

    Attributes:
        done: rows of the input that the parts are about.
        bad: of those, how many are bad.
        unknown: values that the model does not know, by column of the input.
    """

    def __init__(self, out: Path, job: Mapping[str, Any]) -> None:
        self.out, self.job = out, json.loads(json.dumps(job))
        self.folder, self.done, self.bad = parts_folder(out), 0, 0
        self.unknown: Counter[str] = Counter()

    @contextmanager
    def open(self, *, resume: bool, overwrite: bool) -> Iterator[None]:
        """Keeps other processes out; afterwards the folder is gone if it holds no part.

        Args:
            resume: go on with the parts that are there.
            overwrite: remove them, and replace the table in the end.

        Raises:
            InputError: neither is given and something is there, or it belongs to another job.
        """
        with locked(self.folder, f"predict {self.out}"):
            remove_unfinished(self.folder)
            if overwrite:
                clear(self.folder)
            if contents(self.folder):
                if not resume:
                    raise InputError(
                        f"{self.folder} holds what an earlier run had finished; go on with "
                        "--resume, or begin anew with --overwrite"
                    )
                self._read()
            else:
                write_text(self.folder / _JOB, json.dumps(self.job, indent=2) + "\n")
            try:
                yield
            finally:
                if not self._files():
                    clear(self.folder)
        with suppress(OSError):  # there is something in it
            self.folder.rmdir()

    def add(
        self,
        rows: Sequence[Mapping[str, Any]],
        after: int,
        bad: Sequence[Bad],
        unknown: Mapping[str, int],
    ) -> None:
        """Keeps the next part.

        Args:
            rows: of the table, each with the same columns.
            after: the number of the input's row that comes next.
            bad: numbers of the input's rows that are bad, ascending, and what is wrong with each.
            unknown: values of the rows that the model does not know, by column.
        """
        arrow = need("pyarrow")
        facts = {"first": self.done, "after": after, "bad": bad, "unknown": unknown}
        table = arrow.Table.from_pylist([dict(row) for row in rows])
        table = table.replace_schema_metadata({"embattle": json.dumps(facts)})
        with (
            replacing(self.folder / f"{self.done:015d}.arrow") as part,
            arrow.OSFile(str(part), "wb") as file,
            arrow.ipc.new_file(file, table.schema) as writer,
        ):
            writer.write_table(table)
        self.done, self.bad = after, self.bad + len(bad)
        self.unknown.update(unknown)

    def write(self, rows: Rows) -> int:
        """Writes the whole table, and beside it the bad rows if there are any; the parts go.

        Args:
            rows: of the input.

        Returns:
            How many rows the table has.

        Raises:
            InputError: it has none, or a file cannot be written.
        """
        arrow = need("pyarrow")
        schemas = [table.schema.remove_metadata() for table in self._tables()]
        schema = arrow.unify_schemas(schemas, promote_options="permissive")
        if not len(schema):
            raise InputError(f"{rows.table.path}: none of {self.done:,} rows can be used")
        side = bad_rows_file(self.out)
        if self.bad:
            with replacing(side) as part, part.open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerow(["row", "line", "reason"])
                lines = rows.lines(number for number, _ in self.bad_rows())
                for (number, reason), line in zip(self.bad_rows(), lines, strict=True):
                    writer.writerow([number + 1, line, reason])
        else:
            side.unlink(missing_ok=True)
        count = 0
        with replacing(self.out) as part, _writer(part, schema) as table_writer:
            for table in self._tables():
                if len(table):
                    table_writer.write_table(_with(schema, table))
                count += len(table)
        clear(self.folder)
        return count

    def bad_rows(self) -> Iterator[Bad]:
        """The bad rows of all parts: number and reason."""
        for table in self._tables():
            yield from ((number, reason) for number, reason in _facts(table)["bad"])

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("*.arrow"))

    def _tables(self) -> Iterator[Any]:
        arrow = need("pyarrow")
        for path in self._files():
            with arrow.OSFile(str(path), "rb") as file:
                yield arrow.ipc.open_file(file).read_all()

    def _read(self) -> None:
        """Takes over the parts that are there."""
        try:
            job = json.loads((self.folder / _JOB).read_text(encoding="utf-8"))
            differ = [name for name in self.job if job.get(name) != self.job[name]]
            if differ:
                raise InputError(
                    f"{self.folder} was begun with another {' and another '.join(differ)}; use the "
                    "same, or begin anew with --overwrite"
                )
            for table in self._tables():
                facts = _facts(table)
                if facts["first"] != self.done:
                    raise ValueError(f"the part from row {self.done + 1} is missing")
                self.done, self.bad = facts["after"], self.bad + len(facts["bad"])
                self.unknown.update(facts["unknown"])
        except InputError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{self.folder} is damaged ({error}); begin anew with --overwrite"
            ) from error


def parts_folder(out: Path) -> Path:
    """Where the parts of a table are until it is whole."""
    return out.with_name(f"{out.name}.parts")


def bad_rows_file(out: Path) -> Path:
    """Where the bad rows of a table's input are listed."""
    return out.with_name(f"{out.name}.bad.csv")


def _facts(table: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(table.schema.metadata[b"embattle"])
    return found


def _with(schema: Any, table: Any) -> Any:
    """A table with the columns of a schema; those it lacks are null."""
    arrow = need("pyarrow")
    columns = [
        table[field.name].cast(field.type)
        if field.name in table.column_names
        else arrow.nulls(len(table), field.type)
        for field in schema
    ]
    return arrow.Table.from_arrays(columns, schema=schema)


class _Writer(Protocol):
    def write_table(self, table: Any) -> None: ...


class _Lines:
    """Writes JSON lines."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def write_table(self, table: Any) -> None:
        """Writes a line for each row."""
        for row in table.to_pylist():
            self.file.write(json.dumps(plain(row), ensure_ascii=False, default=str) + "\n")


class _Csv:
    """Writes CSV; a list is a cell of JSON."""

    def __init__(self, path: Path, schema: Any) -> None:
        arrow = need("pyarrow")
        self.types = need("pyarrow.types")
        self.schema = arrow.schema(
            [
                field.with_type(arrow.string()) if self.types.is_nested(field.type) else field
                for field in schema
            ]
        )
        self.writer = need("pyarrow.csv").CSVWriter(str(path), self.schema)

    def write_table(self, table: Any) -> None:
        """Writes the rows."""
        arrow = need("pyarrow")
        columns = [
            arrow.array([json.dumps(x, ensure_ascii=False) for x in column.to_pylist()])
            if self.types.is_nested(column.type)
            else column
            for column in table.columns
        ]
        self.writer.write_table(arrow.Table.from_arrays(columns, schema=self.schema))


@contextmanager
def _writer(path: Path, schema: Any) -> Iterator[_Writer]:
    """Gives what writes a table as the end of the file's name says."""
    if path.suffix == ".parquet":
        with need("pyarrow.parquet").ParquetWriter(str(path), schema) as parquet:
            yield parquet
    elif path.suffix == ".csv":
        made = _Csv(path, schema)
        with made.writer:
            yield made
    else:
        with path.open("w", encoding="utf-8") as file:
            yield _Lines(file)
