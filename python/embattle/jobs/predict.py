"""Predictions for the rows of a file of any size, by a model of a run.

Rows are read, scored and kept a part at a time: what is held does not grow with the file, and what
is stopped goes on after the last whole part. How rows are divided into parts and batches depends on
the file alone, so that the same comes out however often it was stopped.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from embattle import checks
from embattle.data.account import printable
from embattle.data.batch import Batch
from embattle.data.formats import delimiter_of, parquet_files
from embattle.data.rows import Row, Rows
from embattle.errors import InputError, Interrupted, options_named
from embattle.files import sha256
from embattle.jobs.parts import SUFFIXES, Bad, Parts, bad_rows_file, parts_folder
from embattle.jobs.trained import TrainedModel, chosen_device, load_trained, model_files
from embattle.progress import bar, say
from embattle.tasks.base import Task
from embattle.tasks.kinds import Ranking

# Rows of a part.
PART = 4096
# Bad rows that are printed.
_SHOWN = 5
# What `Task.encode` raises about a row that it cannot use.
_UNUSABLE = (ValueError, TypeError, LookupError, ArithmeticError)


@dataclass(frozen=True)
class Predicted:
    """What became of the rows of a file.

    Attributes:
        rows: how many have a prediction.
        bad: how many were left out.
        unknown: of the rows with a prediction, how many have a value that the model does not know,
            by column; those without such are left out.
    """

    rows: int
    bad: int
    unknown: Mapping[str, int] = field(default_factory=dict)


def predict(
    folder: Path,
    table: Path,
    out: Path,
    *,
    keep: Sequence[str] = (),
    top: int | None = None,
    on_bad_row: Literal["fail", "skip"] = "fail",
    batch_size: int = 256,
    encoding: str | None = None,
    delimiter: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    trust: bool = False,
) -> Predicted:
    """Predicts for each row of a file, in order.

    Args:
        folder: a model of a run, such as `runs/NAME/hardened`.
        table: a CSV, Parquet or JSON-lines file with the columns that the task reads.
        out: what is written: `row`, the row's number in the file from 1, the columns of `keep`, and
            those of `Task.describe`. The name's end, `.csv`, `.parquet` or `.jsonl`, says how.
            Until it is whole, what is finished is in a folder beside it, `OUT.parts`.
        keep: columns of the file to repeat; `Task.keys` are repeated anyway.
        top: how many items are recommended; None takes the recipe's number.
        on_bad_row: whether a row that cannot be read, encoded or scored is an error, or left out
            and listed in a file beside the predictions, `OUT.bad.csv`.
        batch_size: rows that the model is given at once.
        encoding, delimiter: of a text file, see `embattle.data.tables.Table`.
        resume: go on with what an earlier run had finished; begin where there is nothing.
        overwrite: replace what is there.
        trust: whether a task that is code of one's own may be run.

    Raises:
        InputError: about whatever the user can mend; what is finished is kept.
        Interrupted: on Ctrl-C; what is finished is kept.
    """
    checks.one_of("predict", "on_bad_row", on_bad_row, ("fail", "skip"))
    checks.integer("predict", "batch_size", batch_size, 1)
    if resume and overwrite:
        raise InputError("--resume and --overwrite exclude each other; give one")
    if not _wanted(table, out, resume=resume, overwrite=overwrite):
        say(f"{out} is complete; nothing to do (--overwrite predicts it again)")
        return Predicted(0, 0)
    trained = load_trained(folder, trust=trust)
    task = trained.task
    if top is not None:
        task.kind = _with_top(task, top)
    kept = list(dict.fromkeys([*task.keys(), *keep]))
    with options_named():
        read = task.columns_read()
        rows = Rows(
            table,
            None if read is None else list(dict.fromkeys([*read, *kept])),
            lists=task.list_columns,
            encoding=encoding,
            delimiter=delimiter_of(delimiter),
        )
        device = chosen_device()
        job = {
            "model": _hash(model_files(folder), folder),
            "table": _hash(parquet_files(table), table.parent),
            "columns kept": kept,
            "number of items": top,
            "batch size": batch_size,
            "encoding": encoding,
            "delimiter": delimiter,
            "device": device.type,
            "way of writing": out.suffix,
        }
        parts = Parts(out, job)
        scorer = _Scorer(trained, kept, device)
        with parts.open(resume=resume, overwrite=overwrite):
            _score(rows, parts, scorer, size=batch_size, skip=on_bad_row == "skip")
            first = list(islice(parts.bad_rows(), _SHOWN))
            count = parts.write(rows)
    found = Predicted(count, parts.bad, dict(+parts.unknown))
    _tell(found, rows, first, out)
    return found


def _wanted(table: Path, out: Path, *, resume: bool, overwrite: bool) -> bool:
    """Whether there is anything to do; raises InputError if the file cannot be written there."""
    if out.suffix not in SUFFIXES:
        raise InputError(f"--out: {out} must end with {', '.join(SUFFIXES)}")
    if out.is_dir():
        raise InputError(f"--out: {out} is a folder; name a file")
    if out.exists() and table.exists() and out.samefile(table):
        raise InputError(f"--out: {out} is the file that is read; choose another name")
    if not out.exists() or overwrite:
        return True
    if not resume:
        raise InputError(f"--out: {out} is there already; use --overwrite, or another name")
    return parts_folder(out).exists()


def _with_top(task: Task, top: int) -> Ranking:
    if not isinstance(task.kind, Ranking):
        raise InputError("--top is for models that rank items; this one does not")
    if top < 1:
        raise InputError(f"--top: {top} items cannot be recommended; give 1 or more")
    return replace(task.kind, k=top)


def _hash(files: Sequence[Path], folder: Path) -> str:
    """A hash over names and contents of files, and the names' places below a folder."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(folder)}\0{sha256(file)}\0".encode())
    return digest.hexdigest()


def _score(rows: Rows, parts: Parts, scorer: _Scorer, *, size: int, skip: bool) -> None:
    """Scores the rows that no part is about yet, part by part.

    Raises:
        InputError: about the first bad row, unless such rows are skipped.
        Interrupted: on Ctrl-C.
    """
    total = math.ceil(rows.estimate() / PART)
    title, done = f"parts of {PART:,} rows", parts.done // PART
    left = islice(rows, parts.done, None)
    try:
        with bar(title, total, start=min(done, total)) as show:
            while part := list(islice(left, PART)):
                found: list[dict[str, Any]] = []
                bad: list[Bad] = []
                unknown: Counter[str] = Counter()
                for start in range(0, len(part), size):
                    scored, wrong, strange = scorer.score(part[start : start + size])
                    if wrong and not skip:
                        number, reason = wrong[0]
                        raise InputError(
                            f"{rows.place(number)}: {reason}; correct the row, or leave such rows "
                            "out with --on-bad-row skip"
                        )
                    found, bad = [*found, *scored], [*bad, *wrong]
                    unknown += strange
                parts.add(found, part[-1].number + 1, bad, unknown)
                done += 1
                show(min(done, total), {})
    except KeyboardInterrupt as stop:
        raise Interrupted(
            f"stopped after {parts.done:,} rows; the same command with --resume goes on from there"
        ) from stop


class _Scorer:
    """Makes rows of predictions.

    Args:
        trained: the model.
        keep: columns of the input to repeat.
        device: where the model runs.
    """

    def __init__(self, trained: TrainedModel, keep: Sequence[str], device: torch.device) -> None:
        self.task, self.keep, self.device = trained.task, keep, device
        self.model: nn.Module = self.task.for_scoring(trained.model.to(device))
        self.read = self.task.columns_read()

    def score(self, rows: Sequence[Row]) -> tuple[list[dict[str, Any]], list[Bad], Counter[str]]:
        """Gives rows of the output, which rows are bad, both in order, and what is not known."""
        bad = [(row.number, row.wrong) for row in rows if row.wrong]
        usable, batch = self._encode([row for row in rows if not row.wrong], bad)
        if batch is None:
            return [], sorted(bad), Counter()
        with torch.inference_mode():
            outputs = self.task.evaluate(self.model, batch.to(self.device)).outputs
        if outputs is None:
            raise InputError(f"task {type(self.task).__name__}: evaluate gives no outputs")
        wrong = (outputs.isnan() | outputs.isposinf()).reshape(len(usable), -1).any(1)
        found, scored = [], []
        described = self.task.describe(outputs.cpu())
        for row, none, columns in zip(usable, wrong.tolist(), described, strict=True):
            if none:
                bad.append((row.number, "the model's output is no finite number"))
                continue
            taken = [name for name in self.keep if name in ("row", *columns)]
            if taken:
                raise InputError(
                    f"--keep: {taken[0]!r} is a column of predictions; rename that of the file"
                )
            kept = {name: row.cells.get(name) for name in self.keep}
            found.append({"row": row.number + 1, **kept, **columns})
            scored.append(self._cells(row))
        return found, sorted(bad), self.task.unknown(scored)

    def _encode(self, rows: Sequence[Row], bad: list[Bad]) -> tuple[Sequence[Row], Batch | None]:
        """The rows that can be used, and a batch of them if there are any."""
        if not rows:
            return rows, None
        try:
            return rows, self.task.encode(self.model, [self._cells(row) for row in rows])
        except _UNUSABLE:
            usable = [row for row in rows if self._is_usable(row, bad)]
            if len(usable) == len(rows):
                raise  # it is about no single row
        return self._encode(usable, bad)

    def _cells(self, row: Row) -> Mapping[str, Any]:
        """What the model reads of a row: not the columns that are only kept, such as a label."""
        if self.read is None:
            return row.cells
        return {name: row.cells[name] for name in self.read if name in row.cells}

    def _is_usable(self, row: Row, bad: list[Bad]) -> bool:
        try:
            self.task.encode(self.model, [self._cells(row)])
        except _UNUSABLE as error:
            said = " ".join(str(error).split())
            known = isinstance(error, InputError)
            bad.append((row.number, said if known else f"{type(error).__name__}: {said}"))
            return False
        return True


def _tell(found: Predicted, rows: Rows, first: Sequence[Bad], out: Path) -> None:
    if found.bad:
        places = rows.lines([number for number, _ in first])
        for (number, reason), line in zip(first, places, strict=True):
            where = f"row {number + 1}" if line is None else f"line {line}"
            say(f"left out: {where}: {reason}")
        more = found.bad - len(first)
        also = f", {more:,} more" if more else ""
        say(f"{found.bad:,} rows are left out{also}; all are in {bad_rows_file(out)}")
    for name, count in found.unknown.items():
        among = f"{count:,} of {found.rows:,} rows"
        say(printable(f"column {name!r}: {among} have a value that the model does not know"))
    say(f"{found.rows:,} predictions: {out}")
