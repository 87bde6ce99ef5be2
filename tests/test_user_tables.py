"""Corners of users' tables and folders where a job was wrong without a word."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("pyarrow")
pytest.importorskip("pydantic")
pytest.importorskip("typer")
pytest.importorskip("yaml")

import deployed
import made_tables
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from deployed import rows_of, write_csv
from embattle.criteria import Deviate
from embattle.data.account import Account
from embattle.data.labels import most
from embattle.data.looks import has_thousands
from embattle.errors import InputError
from embattle.jobs import predict as predicting
from embattle.jobs import recipe as recipes
from embattle.jobs.init import look
from embattle.jobs.predict import predict
from embattle.jobs.run_folder import Run, find_run
from embattle.perturb.evaluation import Evaluation
from embattle.tasks.kinds import BinaryClassification, Classification, Ranking
from embattle.tasks.learned_column import Column
from test_variants import recipe_of
from tiny_job import invoke

models = deployed.models


@pytest.mark.parametrize(
    ("cells", "thousands"),
    [
        (["100", "999", "1,000", "4,546"], True),
        (["1,234,567", "1,000"], True),
        (["1,234.5", "2,000"], True),
        (["1,234", "2,500"], False),  # decimals, all with three digits
        (["0,125", "3"], False),
        (["1,5", "1,250", "3"], False),
        (["100", "2.5"], False),
    ],
)
def test_commas_are_of_thousands_where_something_shows_it(
    cells: list[str], thousands: bool
) -> None:
    assert has_thousands(cells) == thousands
    column = Column.learn("income", cells, ranges=4, least=1)
    assert column.values is None
    numbers = [float(cell.replace(",", "" if thousands else ".")) for cell in cells]
    assert set(column.edges) <= set(numbers)
    order = column.encode(cells).tolist()
    assert [x for _, x in sorted(zip(numbers, order, strict=True))] == sorted(order)
    with pytest.raises(InputError, match="column 'income': 'abc' is no number"):
        column.refuse([None, cells[0], "abc"])


def test_numbers_among_commas_that_may_be_either_are_unknown() -> None:
    """Within such numbers the order is sure; one without a comma may be anywhere among them."""
    column = Column.learn("income", ["1,250", "2,500", "52,000"], ranges=3, least=1)
    assert column.encode(["1,250", "2,500", "52,000", "950", "1250", "1,5"]).tolist() == [
        *(1, 2, 3), *(0, 0, 0)
    ]  # fmt: skip
    for cell in ("950", "1,5"):
        with pytest.raises(InputError, match=f"'{cell}' is no number for sure: the column's comm"):
            column.refuse([cell])
    sure = Column.learn("income", ["0,950", "2,500", "52,000"], ranges=3, least=1)
    assert sure.number("1,5") == 1.5


@pytest.mark.parametrize(
    ("cells", "warning"),
    [
        (["1,250", "52,000"], "column 'income': nothing tells whether the commas of its numbers"),
        (["950", "1.250", "12.500"], "column 'income': the points of its numbers, such as '1.250'"),
        (["950", "1.25", "12.500"], None),
        (["0.950", "1.250", "2"], None),
        (["1.250", "12.500"], None),
    ],
)
def test_numbers_that_may_be_thousands_are_told_of(
    cells: list[str], warning: str | None, tmp_path: Path
) -> None:
    rows = [[cells[i % len(cells)], "abc"[i % 3], int(i % 50 > 20)] for i in range(200)]
    table = made_tables.table(tmp_path / "a.csv", ("income", "job", "ill"), rows)
    data = {"path": str(table), "label": "ill"}
    task = recipes.load(recipe_of(tmp_path, task="tabular", data=data, model={})).make_task()
    account = Account()
    task.read(account)
    assert len(account.warnings) == (warning is not None)
    assert warning is None or account.warnings[0].startswith(warning)


def test_the_larger_count_wins_whatever_its_commas() -> None:
    assert most(["like", "love"], ["1,200", "900"], ()) == "like"
    assert most(["like", "love"], ["1,234,567", "900"], ()) == "like"
    assert most(["like", "love"], ["0,5", "1"], ()) == "love"


def test_copies_of_a_click_are_in_one_part(tmp_path: Path) -> None:
    """Each row is there six times, with a label that is drawn anew."""
    rows = [[i % 15, i % 10, (i * copy) % 2] for i in range(150) for copy in range(6)]
    table = made_tables.table(tmp_path / "clicks.csv", ("user", "item", "clicked"), rows)
    data = {"path": str(table), "fields": ["user", "item"], "label": "clicked", "at_least": 1}
    recipe = recipes.load(recipe_of(tmp_path, task="click_through", data=data, model={"dim": 4}))
    task, account = recipe.make_task(), Account()
    task.read(account)
    parts = [{tuple(row) for row in part.values.tolist()} for part in task.parts.values()]
    assert all(parts)
    assert sum(map(len, parts)) == len(set().union(*parts))
    assert any("870 rows repeat another one" in line for line in account.lines())


def test_files_that_no_run_writes_are_not_overwritten(tmp_path: Path) -> None:
    recipe, folder = recipes.load(recipe_of(tmp_path)), tmp_path / "run"
    (folder / "standard").mkdir(parents=True)
    (folder / "older").mkdir()
    (folder / "older" / "recipe.yaml").touch()
    for name in ("run.json", "recipe.yaml", "metrics.json", "report.html", "curves.svg"):
        (folder / name).touch()
    assert find_run(recipe, folder, resume=False, overwrite=True) is None
    (folder / "mydata.csv").touch()
    (folder / "notes").mkdir()
    (folder / "notes" / "a.txt").touch()
    with pytest.raises(InputError, match=r"'mydata\.csv', 'notes'\), and would remove it"):
        find_run(recipe, folder, resume=False, overwrite=True)


def test_what_is_no_number_is_right_of_nothing() -> None:
    nan = torch.nan
    scores = torch.tensor([[nan, nan, nan], [0.0, 1.0, 2.0], [3.0, nan, 1.0]])
    assert Ranking(1).scores(scores, torch.tensor([0, 2, 0]))["hit_rate"] == pytest.approx(1 / 3)
    goal = Deviate(torch.zeros(3), by=0.1)
    assert goal.reached(Evaluation(outputs=torch.tensor([nan, 0.05, 5.0])), None).tolist() == [
        True, False, True,
    ]  # fmt: skip


@pytest.mark.parametrize("shift", [0.0, 100.0])
def test_areas_know_confident_scores_apart(shift: float) -> None:
    """Whose probabilities are equal to a float."""
    labels = torch.tensor([0, 1])
    for scores, area in (([20.0, 30.0], 1), ([30.0, 20.0], 0), ([25.0, 25.0], 0.5)):
        logits = torch.tensor(scores) + shift
        assert BinaryClassification().scores(logits, labels)["auc"] == area
        many = torch.stack([torch.zeros(2), logits, torch.zeros(2)], 1)
        found = Classification().scores(many, torch.tensor([0, 1]))["auc"]
        assert found != found  # a class is absent
    weights = torch.ones(1, 3, dtype=torch.double)
    logits = torch.tensor([[40.0, 0, 0], [30.0, 0, 0], [0, 30.0, 40.0]]) + shift
    labels = torch.tensor([0, 1, 2])
    kind = Classification()
    auc = kind.scores(logits, labels)["auc"]
    assert auc == pytest.approx((1 + 0.5 + 1) / 3)
    assert float(kind.weighted(logits, labels)["auc"](weights)) == pytest.approx(auc)


def test_what_is_kept_is_not_read(models: Any, tmp_path: Path) -> None:
    """Such as a label that is blank, or of no class."""
    for name, label in (("click_through", "rich"), ("text_classification", "recommended")):
        cells = zip(rows_of(name, 2), ["", "x"], strict=True)
        rows = [{**row, label: value} for row, value in cells]
        table = tmp_path / f"{name}.csv"
        write_csv(table, rows)
        found = predict(models(name), table, tmp_path / f"{name}.jsonl", keep=[label])
        assert (found.rows, found.bad) == (len(rows), 0)


def test_what_is_kept_may_be_large_or_nothing(models: Any, tmp_path: Path) -> None:
    """Such as a hash of 64 bits, NaN, and what is infinite; JSON has none but the first."""
    added = {"hash": pa.array([2**63, 5, 1], pa.uint64()), "price": [math.nan, 1.5, -math.inf]}
    table = pa.Table.from_pylist(rows_of("click_through", 3))
    for name, cells in added.items():
        table = table.append_column(name, [cells])
    pq.write_table(table, tmp_path / "a.parquet")
    out = tmp_path / "a.jsonl"
    predict(models("click_through"), tmp_path / "a.parquet", out, keep=list(added))
    found = [json.loads(line, parse_constant=pytest.fail) for line in out.open()]
    kept = [(row["hash"], row["price"]) for row in found]
    assert kept == [("9223372036854775808", None), ("5", 1.5), ("1", None)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("seed=20261201123456", r"seed: .*less than 4294967296"),
        ("data.label=2020-13-45", "the value is not YAML"),
        ("full={train: {steps: 0}}", r"with the section full: train\.steps"),
    ],
)
def test_changes_that_cannot_be_are_said(tmp_path: Path, change: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        recipes.load(recipe_of(tmp_path), changes=[change])
    file = tmp_path / "wrong.yaml"
    file.write_text("seed: 2020-13-01\n")
    with pytest.raises(InputError, match=r"wrong\.yaml: not YAML \(month must be"):
        recipes.load(file)


def test_yes_and_no_in_words_are_clicks(tmp_path: Path) -> None:
    """And the file's encoding can be named for any task."""
    rows = [[f"é{i % 9}", i % 7, "False" if i % 3 else "True", i] for i in range(60)]
    names = ("user", "item", "clicked", "timestamp")
    table = made_tables.table(tmp_path / "clicks.csv", names, rows)
    drafted = look(table)
    assert drafted.task == "click_through"
    table.write_bytes(table.read_text(encoding="utf-8").encode("latin-1"))
    data = {"path": str(table), "fields": ["user", "item"], "label": "clicked"}
    options: dict[str, Any] = {"task": "click_through", "model": {"dim": 4}}
    with pytest.raises(InputError, match=r"name the file's encoding in data\.encoding"):
        recipes.load(recipe_of(tmp_path, data=data, **options)).make_task().read(Account())
    data |= {"encoding": "latin-1", "delimiter": ","}
    task = recipes.load(recipe_of(tmp_path, data=data, **options)).make_task()
    task.read(Account())
    assert sum(part.label.sum() for part in task.parts.values()) == 20


def test_ratings_say_what_was_read_and_who_is_always_right(tmp_path: Path) -> None:
    rows = [[u, i, 5, 10 * u + i] for u in range(6) for i in range(12) if (u + i) % 6 or u > 2]
    table = made_tables.table(tmp_path / "r.csv", ("u", "i", "stars", "when"), rows)
    data = {"path": str(table), "user": "u", "item": "i", "rating": "stars", "time": "when", "k": 2}
    task = recipes.load(recipe_of(tmp_path, task="item_ranking", data=data, model={})).make_task()
    account = Account()
    task.read(account)
    lines = "\n".join(account.lines())
    assert "r.csv: CSV, utf-8, delimiter comma" in lines
    assert "3 of 6 test users have met all but 2 items or fewer" in lines


def test_categories_and_keys_of_joins_by_their_names(tmp_path: Path) -> None:
    """Whole numbers that were once floats, and spaces; keys that are not there are said."""
    rows = [[f" {i % 9}", i % 7, i % 2, f"{i}.5"] for i in range(80)]
    names = ("user", "item", "clicked", "age")
    table = made_tables.table(tmp_path / "clicks.csv", names, rows)
    groups = made_tables.table(
        tmp_path / "groups.csv", ("user", "grp"), [[f"{u}.0", "ab"[u % 2]] for u in range(8)]
    )
    data: dict[str, Any] = {
        "path": str(table), "fields": ["user", "item"], "dense": ["age"], "label": "clicked",
        "join": [{"path": str(groups), "key": "user", "fields": ["grp"]}],
    }  # fmt: skip
    options: dict[str, Any] = {"task": "click_through", "model": {"dim": 4, "kind": "dlrm"}}
    task, account = recipes.load(recipe_of(tmp_path, data=data, **options)).make_task(), Account()
    task.read(account)
    assert task.known["grp"] == ["", "a", "b"]
    assert any("have no 'user' in it" in line for line in account.lines())
    columns: dict[str, list[Any]] = {"item": [1, 1], "grp": ["a", "a"], "age": [1, 1]}
    values = task._numbered({"user": [2.0, "2"], **columns}, 2)[0]
    assert values[0].tolist() == values[1].tolist()
    assert values[0, 0] > 0
    made_tables.table(groups, ("user", "grp"), [[f"user{u}", "a"] for u in range(8)])
    with pytest.raises(InputError, match="has none of the keys of the rows, such as"):
        task.read(Account())
    made_tables.table(table, names, [*rows, [1, 2, 1, "1e400"]])
    data.pop("join")
    with pytest.raises(InputError, match="column 'age' holds numbers that are not finite"):
        recipes.load(recipe_of(tmp_path, data=data, **options)).make_task().read(Account())


def test_clicks_without_values_and_with_decimal_commas(tmp_path: Path) -> None:
    rows = [[f"u{i % 9}", ("a", "NA", "")[i % 3], ("0", "1", "NA")[i % 4 % 3]] for i in range(120)]
    rows = [[*row, "n/a" if i % 5 == 0 else f"{i % 7},5"] for i, row in enumerate(rows)]
    table = tmp_path / "clicks.csv"
    table.write_text("user;device;clicked;age\n" + "".join(";".join(r) + "\n" for r in rows))
    data: dict[str, Any] = {
        "path": str(table), "fields": ["user", "device"], "dense": ["age"], "label": "clicked",
    }  # fmt: skip
    options: dict[str, Any] = {"task": "click_through", "model": {"dim": 4, "kind": "dlrm"}}

    def read() -> Any:
        task = recipes.load(recipe_of(tmp_path, data=data, **options)).make_task()
        account = Account()
        task.read(account)
        assert ("dropped", "30 rows without a label") in account.facts
        return task

    with pytest.raises(InputError, match=r"'NA' is none \(data.missing"):
        read()
    data["missing"] = ["NA", "n/a"]
    with pytest.raises(InputError, match=r"empty cells; drop those rows \(data.blank_labels: drop"):
        read()
    data["blank_labels"] = "drop"
    task = read()
    assert sum(map(len, task.parts.values())) == 90
    assert task.known["device"] == ["", "a"]
    blank = [{"user": "u1", "device": cell, "age": 1.5} for cell in (None, "", "NA", float("nan"))]
    values = task.encode(task.build(), [*blank, {"user": "u1", "device": "", "age": "1,5"}]).inputs
    assert values["values"][:, 1].tolist() == [1] * 5
    assert len(set(values["dense"].flatten().tolist())) == 1


def test_data_with_other_values_is_told_of(tmp_path: Path) -> None:
    """Whose numbers are the same, so that the fingerprint is."""
    table, runs = tmp_path / "a.csv", []
    for job in "bB":
        rows = [[(job, "c")[i % 2], int(i % 50 > 20)] for i in range(200)]
        made_tables.table(table, ("job", "ill"), rows)
        data = {"path": str(table), "label": "ill"}
        task = recipes.load(recipe_of(tmp_path, task="tabular", data=data, model={})).make_task()
        task.read(Account())
        runs.append(Run.of(task, Account()))
    runs[0].require(runs[0], tmp_path)
    assert runs[0].fingerprint == runs[1].fingerprint
    with pytest.raises(
        InputError, match=r"the data has other classes, values or counts than .*run"
    ):
        runs[0].require(runs[1], tmp_path)


@pytest.mark.parametrize("task", ["tabular", "click_through", "item_ranking"])
def test_every_table_may_lose_ragged_rows(task: str, tmp_path: Path) -> None:
    rows = [[f"u{i % 9}", f"i{i * 5 % 17}", i % 2, i] for i in range(90)]
    names = ("user", "item", "clicked", "time")
    table = made_tables.table(tmp_path / "a.csv", names, [*rows, ["u1", "i1", 1]])
    roles = {"user": "user", "item": "item", "rating": "clicked", "time": "time", "k": 3}
    label = {"label": "clicked"}
    of = {"click_through": {"fields": ["user", "item"], **label}, "item_ranking": roles}
    data: dict[str, Any] = {"path": str(table), **of.get(task, label)}

    def read(account: Account) -> None:
        recipe = recipe_of(tmp_path, task=task, data=data, model={})
        recipes.load(recipe).make_task().read(account)

    with pytest.raises(InputError, match=r"repair them, .* or set data\.ragged_rows: drop"):
        read(Account())
    data["ragged_rows"] = "drop"
    account = Account()
    read(account)
    assert ("dropped", "1 rows with too few or too many cells") in account.facts


@pytest.mark.parametrize("task", ["tabular", "click_through"])
def test_values_that_the_model_does_not_know_are_counted(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predicting, "PART", 4)
    rows = [["abc"[i % 3], "xy"[i % 2], i % 20, i % 7 % 2] for i in range(360)]
    table = made_tables.table(tmp_path / "a.csv", ("job", "sex", "age", "rich"), rows)
    data: dict[str, Any] = {"path": str(table), "label": "rich", "missing": ["NA"]}
    if task == "click_through":
        data["fields"] = ["job", "sex", "age"]
    recipe = recipe_of(tmp_path, task=task, data=data, model={"dim": 2, "hidden": [4]})
    status, said = invoke("train", recipe, "--out", tmp_path / "run", "--set", "train.steps=2")
    assert status == 0, said
    new = [["a", "x"], ["new", "x"], ["b", "z"], ["", "NA"], ["other", "y"], ["", "y"], ["c", ""]]
    made_tables.table(tmp_path / "new.csv", ("job", "sex", "age"), [[*row, 9] for row in new])
    model, out = tmp_path / "run" / "standard", tmp_path / "out.csv"
    status, said = invoke("predict", model, tmp_path / "new.csv", "--out", out)
    assert status == 0, said
    assert "column 'job': 2 of 7 rows have a value that the model does not know" in said
    assert "column 'sex': 1 of 7 rows have a value that the model does not know" in said
    score, calls = predicting._Scorer.score, 0

    def stopping(self: Any, some: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return score(self, some)

    monkeypatch.setattr(predicting._Scorer, "score", stopping)
    words = ("predict", model, tmp_path / "new.csv", "--out", tmp_path / "more.csv")
    assert invoke(*words)[0] == 130
    found = predicting.predict(model, tmp_path / "new.csv", tmp_path / "more.csv", resume=True)
    assert (found.rows, found.unknown) == (7, {"job": 2, "sex": 1})


def test_columns_that_say_little_are_told_of(tmp_path: Path) -> None:
    rows = [
        [i % 50, "inf" if i == 7 else f"{i}.5", f"${i}", "abc"[i % 3], int(i % 50 > 20)]
        for i in range(200)
    ]
    names = ("age", "debt", "price", "job", "ill")
    table = made_tables.table(tmp_path / "a.csv", names, rows)
    data: dict[str, Any] = {"path": str(table), "label": "ill"}

    def warnings() -> list[str]:
        task, account = (
            recipes.load(recipe_of(tmp_path, task="tabular", data=data, model={})).make_task(),
            Account(),
        )
        task.read(account)
        return account.warnings

    one, two = warnings()
    assert one.startswith("column 'debt' holds numbers but for 'inf' (1), so that ")
    assert two.startswith("column 'price': 200 of 200 values are in fewer than 5 rows of the trai")
    data |= {"missing": ["inf"], "ignore": ["price"]}
    assert warnings() == []
