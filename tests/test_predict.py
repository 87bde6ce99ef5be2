"""`embattle predict`: all tasks and formats, bad rows, stops, and how much is held."""

from __future__ import annotations

import csv
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("pyarrow")
pytest.importorskip("pydantic")
pytest.importorskip("transformers")
pytest.importorskip("typer")
pytest.importorskip("yaml")

import deployed
import pyarrow
import pyarrow.parquet
from deployed import NAMES, model_of, rows_of, write_csv
from embattle.data import tables
from embattle.errors import InputError
from embattle.files import UNFINISHED
from embattle.jobs import predict as predicting
from embattle.jobs.predict import Predicted, predict
from embattle.jobs.run_folder import locked
from embattle.jobs.trained import load_trained
from embattle.tasks import Task
from tiny_job import invoke

models = deployed.models

Cells = dict[str, Any]


def wanted(model: Path, rows: list[Cells]) -> list[Cells]:
    """What the task says of each row alone."""
    trained = load_trained(model)
    found = []
    for number, row in enumerate(rows, start=1):
        cells = {name: str(value) for name, value in row.items()}
        with torch.no_grad():
            at = trained.task.evaluate(trained.model, trained.task.encode(trained.model, [cells]))
        kept = {name: cells[name] for name in [*trained.task.keys(), "id"]}
        assert at.outputs is not None
        found.append({"row": number, **kept, **trained.task.describe(at.outputs)[0]})
    return found


def read(path: Path) -> list[Cells]:
    """A file of predictions, the cells of CSV as JSON where they are."""
    if path.suffix == ".parquet":
        rows: list[Cells] = pyarrow.parquet.read_table(path).to_pylist()
        return rows
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]

    def cell(name: str, text: str) -> Any:
        plain = name in ("id", "who") or (name == "prediction" and not text.startswith("["))
        return text if plain else json.loads(text)

    with path.open(newline="") as file:
        return [{k: cell(k, v) for k, v in row.items()} for row in csv.DictReader(file)]


def close(found: list[Cells], expected: list[Cells]) -> None:
    assert [list(row) for row in found] == [list(row) for row in expected]
    for one, other in zip(found, expected, strict=True):
        for name, value in one.items():
            if isinstance(value, float) or name == "scores":
                assert value == pytest.approx(other[name], abs=1e-5), name
            else:
                assert value == other[name], name


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_is_what_the_task_says(
    name: str, models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In all formats, whatever the reader's blocks."""
    monkeypatch.setattr(tables, "BLOCK", 128)
    rows = rows_of(name, 23)
    expected = wanted(models(name), rows)
    table = write_csv(tmp_path / "rows.csv", rows)
    for suffix in ("csv", "parquet", "jsonl"):
        out = tmp_path / f"out.{suffix}"
        words = ("predict", models(name), table, "--out", out, "--keep", "id", "--batch-size", 4)
        status, text = invoke(*words)
        assert status == 0, text
        assert f"23 predictions: {out}" in text
        close(read(out), expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "out.csv",
        "out.jsonl",
        "out.parquet",
        "rows.csv",
    ]
    said = [{k: v for k, v in row.items() if k not in ("row", "id", "who")} for row in expected]
    assert len({str(row) for row in said}) > 3


def test_seen_items_are_not_recommended_and_the_number_is_chosen(
    models: Callable[[str], Path], tmp_path: Path
) -> None:
    table = write_csv(tmp_path / "rows.csv", [{"who": f"u{u}"} for u in range(12)])
    for name in ("item_ranking", "lightgcn"):
        predict(models(name), table, tmp_path / f"{name}.jsonl", top=17)
        task: Any = load_trained(models(name)).task
        for row in read(tmp_path / f"{name}.jsonl"):
            user = task.users.index(row["who"])
            met = {task.items[i] for i in task.graph.items[task.graph.users == user].tolist()}
            assert len(met) == 5
            # All others, of which there are fewer than asked for.
            assert {*row["prediction"]} == {*task.items} - met
            assert row["scores"] == sorted(row["scores"], reverse=True)
    with pytest.raises(InputError, match="--top is for models that rank"):
        predict(models("tabular"), table, tmp_path / "no.csv", top=3)


def test_histories_may_be_lists(models: Callable[[str], Path], tmp_path: Path) -> None:
    rows = rows_of("next_item", 6)
    expected = wanted(models("next_item"), rows)
    lists = [{**row, "history": row["history"].split()} for row in rows]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(lists), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lists))
    for name in ("a.parquet", "a.jsonl"):
        predict(models("next_item"), tmp_path / name, tmp_path / "out.jsonl", keep=["id"],
                overwrite=True)  # fmt: skip
        close(read(tmp_path / "out.jsonl"), expected)


# Lines of a file of users; of the bad ones, what is said.
LINES = ["who,n", "u1,1", "nobody,1", "u2,1", "", "u3,u4,1", "u5,1", '"u\n6",1', "u7,1"]
BAD_ROWS = {
    2: (3, "column 'who': the model knows no 'nobody'"),
    4: (5, "column 'who' is empty; fill it in"),
    5: (6, "has 3 cells, and not 2"),
    7: (8, "column 'who': the model knows no 'u\\n6'"),
}


@pytest.mark.parametrize("part", [1, 3, 100])
def test_bad_rows_are_left_out_with_their_lines(
    part: int, models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predicting, "PART", part)
    table, out = tmp_path / "rows.csv", tmp_path / "out.csv"
    table.write_text("\n".join(LINES) + "\n")
    words = ("predict", models("item_ranking"), table, "--out", out, "--batch-size", 2)
    status, text = invoke(*words)
    assert status == 2
    assert f"{table}, line 3: column 'who': the model knows no 'nobody'" in text
    assert "--on-bad-row skip" in text
    assert not out.exists()
    status, text = invoke(*words, "--on-bad-row", "skip", "--resume")
    assert status == 0, text
    assert [(row["row"], row["who"]) for row in read(out)] == [
        (1, "u1"),
        (3, "u2"),
        (6, "u5"),
        (8, "u7"),
    ]
    assert "4 rows are left out; all are in" in text
    assert "left out: line 3: column 'who'" in text
    with (tmp_path / "out.csv.bad.csv").open(newline="") as file:
        listed = [*csv.DictReader(file)]
    assert [int(row["row"]) for row in listed] == [*BAD_ROWS]
    for row, (line, reason) in zip(listed, BAD_ROWS.values(), strict=True):
        assert int(row["line"]) == line
        assert row["reason"].startswith(reason)
    # A run without bad rows takes the list away.
    table.write_text("who,n\nu1,1\n")
    assert invoke(*words, "--overwrite")[0] == 0
    assert not (tmp_path / "out.csv.bad.csv").exists()
    assert len(read(out)) == 1


def test_damaged_json_lines(models: Callable[[str], Path], tmp_path: Path) -> None:
    table, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    lines = ['{"age": 20, "job": "a"}', "{", '{"age": 3e400, "job": "b"}', "", '{"age": [2]}']
    table.write_text("\n".join([*lines, lines[0]]))
    with pytest.raises(InputError, match=r"rows\.jsonl, line 2: is no JSON"):
        predict(models("click_through"), table, out)
    found = predict(models("click_through"), table, out, on_bad_row="skip")
    assert found == Predicted(rows=2, bad=3)
    assert [row["row"] for row in read(out)] == [1, 5]
    with (tmp_path / "out.jsonl.bad.csv").open(newline="") as file:
        listed = [(row["line"], row["reason"]) for row in csv.DictReader(file)]
    assert [line for line, _ in listed] == ["2", "3", "5"]
    assert "not finite" in listed[1][1]
    assert "a list in 'age'" in listed[2][1]


def test_a_file_of_bad_rows_alone(models: Callable[[str], Path], tmp_path: Path) -> None:
    table = write_csv(tmp_path / "rows.csv", [{"who": "x"}, {"who": "y"}])
    with pytest.raises(InputError, match="none of 2 rows can be used"):
        predict(models("item_ranking"), table, tmp_path / "out.csv", on_bad_row="skip")


@pytest.mark.parametrize("suffix", ["csv", "parquet", "jsonl"])
def test_a_stopped_run_goes_on_to_the_same_bytes(
    suffix: str, models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predicting, "PART", 8)
    rows = [*rows_of("item_ranking", 30), {"id": "x", "who": "nobody"}]
    rows = [*rows[:9], rows[-1], *rows[9:-1]]
    table = write_csv(tmp_path / "rows.csv", rows)
    whole, out = tmp_path / f"whole.{suffix}", tmp_path / f"out.{suffix}"
    words = ("predict", models("item_ranking"), table, "--on-bad-row", "skip", "--batch-size", 3)
    assert invoke(*words, "--out", whole)[0] == 0

    score, scored = predicting._Scorer.score, 0

    def stopping(self: Any, some: Any) -> Any:
        nonlocal scored
        scored += 1
        if scored in (2, 8, 9, 13):
            raise KeyboardInterrupt
        return score(self, some)

    monkeypatch.setattr(predicting._Scorer, "score", stopping)
    assert invoke(*words, "--out", out) == (130, "stopped after 0 rows; the same command with "
                                                 "--resume goes on from there\n")  # fmt: skip
    assert not (tmp_path / f"out.{suffix}.parts").exists()
    for done in (8, 8, 16):
        status, text = invoke(*words, "--out", out, "--resume")
        assert status == 130
        assert f"stopped after {done} rows" in text
        assert not out.exists()
    status, text = invoke(*words, "--out", out)
    assert status == 2
    assert "holds what an earlier run had finished; go on with --resume" in text
    # A killed process leaves these as well.
    for name in (f"{UNFINISHED}part.arrow", ".lock"):
        (tmp_path / f"out.{suffix}.parts" / name).write_text("half")
    status, text = invoke(*words, "--out", out, "--resume")
    assert status == 0, text
    assert out.read_bytes() == whole.read_bytes()
    assert Path(f"{out}.bad.csv").read_bytes() == Path(f"{whole}.bad.csv").read_bytes()
    assert not (tmp_path / f"out.{suffix}.parts").exists()
    status, text = invoke(*words, "--out", out, "--resume")
    assert status == 0
    assert "nothing to do" in text


def test_parts_of_another_job_are_not_gone_on_with(
    models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predicting, "PART", 4)
    table, out = write_csv(tmp_path / "rows.csv", rows_of("tabular", 12)), tmp_path / "out.csv"
    parts, model = tmp_path / "out.csv.parts", models("tabular")

    def stopped(self: Task, batch: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(predicting.Parts, "write", stopped)
        with pytest.raises(KeyboardInterrupt):
            predict(model, table, out, batch_size=4)
    assert len(list(parts.glob("*.arrow"))) == 3
    with pytest.raises(InputError, match="another batch size; use the same"):
        predict(model, table, out, batch_size=5, resume=True)
    # The parts are the same file's if its name is.
    (tmp_path / "out.jsonl.parts").symlink_to(parts)
    with pytest.raises(InputError, match="another columns kept and another way of writing"):
        predict(model, table, tmp_path / "out.jsonl", batch_size=4, keep=["id"], resume=True)
    text = table.read_bytes()
    table.write_bytes(text.replace(b"r3,", b"r4,"))
    with pytest.raises(InputError, match="another table; use the same"):
        predict(model, table, out, batch_size=4, resume=True)
    table.write_bytes(text)
    middle = sorted(parts.glob("*.arrow"))[1]
    content = middle.read_bytes()
    middle.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"is damaged .*; begin anew with --overwrite"):
        predict(model, table, out, batch_size=4, resume=True)
    middle.unlink()
    with pytest.raises(InputError, match="the part from row 5 is missing"):
        predict(model, table, out, batch_size=4, resume=True)
    middle.write_bytes(content)
    with locked(parts, "predict elsewhere"), pytest.raises(InputError, match="is in use by"):
        predict(model, table, out, batch_size=4, resume=True)
    assert predict(model, table, out, batch_size=4, resume=True) == Predicted(12, 0, {"job": 5})


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_little_of_a_large_file_is_held(
    suffix: str, models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size, block = 20 << 20, 1 << 16
    table = tmp_path / f"rows.{suffix}"
    with table.open("w") as stream:
        stream.write("" if suffix == "jsonl" else "age,job,rest\n")
        for i in range(size // 4096):
            rest = "x" * 4060
            line = {"age": i % 90, "job": "a", "rest": rest}
            text = json.dumps(line) if suffix == "jsonl" else f"{i % 90},a,{rest}"
            stream.write(text + "\n")
    assert table.stat().st_size > 0.9 * size
    monkeypatch.setattr(tables, "BLOCK", block)
    monkeypatch.setattr(predicting, "PART", 64)
    score, arrow = predicting._Scorer.score, []

    def watched(self: Any, rows: Any) -> Any:
        arrow.append(pyarrow.total_allocated_bytes())
        return score(self, rows)

    monkeypatch.setattr(predicting._Scorer, "score", watched)
    out, before = tmp_path / f"out.{suffix}", pyarrow.total_allocated_bytes()
    tracemalloc.start()
    # A kept column of all the file's bytes is not held either.
    found = predict(models("tabular"), table, out, keep=["rest"], batch_size=32)
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == Predicted(size // 4096, 0)
    assert out.stat().st_size > 0.9 * size
    assert held < size / 4
    assert len(arrow) == size // 4096 // 32
    assert max(arrow) - before < size / 2


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("column", r"rows\.csv has no column 'job'; did you mean 'jobs'"),
        ("json", r"rows\.jsonl has no column 'job'"),
        ("keep", r"rows\.csv has no column 'idd'; did you mean 'id'"),
        ("own", "--keep: 'prediction' is a column of predictions"),
        ("format", r"out\.txt must end with \.csv, \.parquet, \.jsonl"),
        ("input", "is the file that is read"),
        ("there", r"out\.csv is there already; use --overwrite"),
        ("run", "is a run with several models; name one: .*hardened"),
        ("no model", "holds no trained model"),
        ("no file", r"cannot read .*nowhere\.csv"),
        ("encoding", "name the file's encoding in --encoding"),
    ],
)
def test_what_cannot_be_is_one_clear_line(
    case: str, message: str, models: Callable[[str], Path], tmp_path: Path
) -> None:
    model, out, keep = models("tabular"), tmp_path / "out.csv", ["id"]
    rows = rows_of("tabular", 3)
    if case in ("column", "json"):
        rows = [{"id": 1, "age": 3, "jobs": "a"}]
    elif case == "own":
        rows, keep = [{**row, "prediction": 1} for row in rows], ["prediction"]
    table = write_csv(tmp_path / "rows.csv", rows)
    if case == "json":
        table = tmp_path / "rows.jsonl"
        table.write_text(json.dumps(rows[0]))
    elif case == "keep":
        keep = ["idd"]
    elif case == "format":
        out = tmp_path / "out.txt"
    elif case == "input":
        out = table
    elif case == "there":
        out.write_text("mine")
    elif case == "run":
        model = tmp_path / "run"
        for name in ("standard", "hardened"):
            (model / name).mkdir(parents=True)
            (model / name / "recipe.yaml").touch()
        (model / "recipe.yaml").touch()
        (model / "run.json").touch()
    elif case == "no model":
        model = tmp_path
    elif case == "no file":
        table = tmp_path / "nowhere.csv"
    elif case == "encoding":
        table.write_bytes("age,job,id\n3,é,1\n".encode("latin-1"))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=message):
        predict(model, table, out, keep=keep)
    assert sorted(tmp_path.rglob("*")) == before
    if case == "encoding":
        assert predict(model, table, out, encoding="latin-1") == Predicted(1, 0, {"job": 1})


OWN = """
import torch
from torch import nn
from embattle.tasks import Batch, MultiLabelClassification, Task

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(4, 3)

    def forward(self, numbers):
        return self.embedding(numbers)

class Mine(Task):
    kind = MultiLabelClassification(("a", "b", "c"))

    def read(self, account):
        self.parts = {"train": [], "test": [{"number": i} for i in range(3)]}

    def build(self):
        return Net()

    def encode(self, model, rows):
        return Batch({"numbers": torch.tensor([int(row["number"]) for row in rows])})
"""


def test_a_task_of_ones_own_reads_all_columns(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OWN)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"{{name: own, task: '{tmp_path}/mine.py:Mine', data: {{}}, model: {{}}}}")
    model = model_of(recipe, tmp_path / "model", trust=True)
    table = write_csv(tmp_path / "rows.csv", [{"number": n} for n in (3, "x", 0, "")])
    words = ("predict", model, table, "--out", tmp_path / "out.jsonl", "--on-bad-row", "skip")
    status, text = invoke(*words)
    assert status == 2
    assert "--trust-task" in text
    status, text = invoke(*words, "--trust-task")
    assert status == 0, text
    assert "left out: line 3: ValueError: invalid literal for int()" in text
    found = read(tmp_path / "out.jsonl")
    assert [row["row"] for row in found] == [1, 3]
    for row in found:
        for label in "abc":
            assert (row[f"probability_{label}"] > 0.5) == (label in row["prediction"])
