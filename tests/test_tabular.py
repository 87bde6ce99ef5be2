"""The tabular task: how cells become numbers, that no part leaks, and the job of its recipe."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("pyarrow")
pytest.importorskip("pydantic")
pytest.importorskip("typer")

from embattle.errors import InputError
from embattle.tasks import Account, Tabular
from embattle.tasks.learned_column import Column
from embattle.tasks.tabular import TabularData, TabularModel
from tiny_job import invoke

RECIPE = Path(__file__).parents[1] / "recipes" / "adult_income.yaml"
JOBS = ["Adm-clerical", "Craft-repair", "Exec-managerial", "Sales"]


def write(path: Path, count: int = 400, seed: int = 0) -> Path:
    """A table with columns of the census: who is old and works long earns more."""
    draw = random.Random(seed)
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["age", "occupation", "hours-per-week", "capital-gain", "income"])
        for i in range(count):
            age, job, hours = draw.randrange(17, 80), draw.randrange(4), draw.randrange(10, 60)
            rich = age + hours + 10 * job + draw.gauss(0, 5) > 95
            work = "?" if i % 40 == 7 else JOBS[job]
            gain = 5000 if rich and i % 10 == 0 else 0
            rows.writerow([age, work, hours, gain, ">50K" if rich else "<=50K"])
    return path


def task_of(path: Path, **options: Any) -> Tabular:
    given: dict[str, Any] = {"path": str(path), "label": "income", "missing": ["?"], **options}
    return Tabular(TabularData(**given), TabularModel(), 3)


def read(path: Path, **options: Any) -> Tabular:
    task = task_of(path, **options)
    task.read(Account())
    return task


def test_cells_become_numbers() -> None:
    words = Column.learn("w", ["b", "a", "b", None, "a", "rare"], 4, 2)
    assert words.encode(["a", "b", "rare", "new", None]).tolist() == [1, 2, 0, 0, 0]
    assert words.size == 3
    numbers = Column.learn("n", [str(n) for n in range(1, 9)], 4, 2)
    # Two of the eight in each of four ranges.
    assert numbers.encode([str(n) for n in range(1, 9)]).tolist() == [1, 1, 2, 2, 3, 3, 4, 4]
    assert numbers.encode(["-5", "1e9", "2,5", None, "x"]).tolist() == [1, 4, 2, 0, 0]
    assert numbers.size == 5
    # A comma is what the training part says; where it says nothing, only what is sure is read.
    assert numbers.encode(["1,250", "1,2505"]).tolist() == [0, 1]
    with pytest.raises(InputError, match="'1,250' is no number for sure: its comma may be decimal"):
        numbers.refuse(["1,250"])
    for cells, number in ((["1,5", "2,5", "3,5", "4"], 1), (["1,000", "2,000", "3,000", "9"], 3)):
        told = Column.learn("n", cells, 4, 2)
        assert told.encode(["1,250"]).tolist() == [number], cells
    mostly_zero = Column.learn("z", ["0"] * 9 + ["7"], 10, 1)
    assert mostly_zero.encode(["0", "7"]).tolist() == [1, 2]
    assert Column.learn("e", [None, None], 4, 1).encode([None, "1"]).tolist() == [0, 0]


def test_copies_of_a_row_are_in_one_part_and_the_test_part_teaches_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    lines = write(path).read_text().splitlines()
    path.write_text("\n".join([*lines, *lines[1:]]) + "\n")
    task = read(path)
    parts = {name: set(part.places.tolist()) for name, part in task.parts.items()}
    assert sum(map(len, parts.values())) == 2 * (len(lines) - 1)
    for places in parts.values():
        assert {(p + len(lines) - 1) % (2 * (len(lines) - 1)) for p in places} == places


def test_only_the_training_part_is_learned_from(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    head, *lines = write(path).read_text().splitlines()
    cells = [line.split(",") for line in lines]
    own = [[age, f"job {i}", *rest] for i, (age, _, *rest) in enumerate(cells)]
    path.write_text("\n".join([head, *(",".join(row) for row in own)]) + "\n")
    task = read(path, min_count=1, ranges=50)
    training = task.parts["train"].places.tolist()
    age, job = task.columns[:2]
    assert job.values is not None
    assert set(job.values) == {f"job {i}" for i in training}
    assert age == Column.learn("age", [own[i][0] for i in training], 50, 1)
    assert (task.parts["test"].fields[:, 1] == 0).all()


def test_rows_of_a_file_are_encoded_like_those_of_a_part(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv")
    task = read(path)
    with path.open() as file:
        rows = list(csv.DictReader(file))
    part = task.parts["test"]
    model = task.build()
    batch = task.encode(model, [rows[i] for i in part.places.tolist()])
    assert (batch.inputs["values"] == part.fields).all()
    assert (batch.known_labels() == part.labels).all()
    task.save(model, tmp_path / "model")
    fresh = task_of(path)
    loaded = fresh.load(tmp_path / "model")
    lines = [{k: v for k, v in row.items() if k != "income"} for row in rows[:4]]
    unlabelled = fresh.encode(loaded, [*lines, {}])
    assert unlabelled.labels is None
    assert unlabelled.inputs["values"][-1].tolist() == [0, 0, 0, 0]
    with torch.no_grad():
        found = loaded(**unlabelled.inputs)
    assert torch.equal(found[:4], model(**task.encode(model, rows[:4]).inputs).detach())
    columns = ["prediction", "confidence", "probability_<=50K", "probability_>50K"]
    assert list(fresh.kind.describe(found)[0]) == columns
    assert task.show("test", 0).startswith(f"age {rows[int(part.places[0])]['age']}, occupation ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label": "occupation"}, "holds 4 classes"),
        ({"label": "incom"}, "has no column 'incom'"),
        ({"positive": ">60K"}, "data.positive: column 'income' has no class '>60K'"),
        ({"ignore": ["agee"]}, "data.ignore: no column 'agee'"),
        ({"ignore": ["age", "occupation", "hours-per-week", "capital-gain"]}, "no column beside"),
        ({"columns": ["agee"]}, "has no column 'agee'"),
        ({"limits": {"test": 1}}, "the test part has rows of one class only"),
    ],
    ids=str,
)
def test_what_cannot_be_learned_is_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        read(write(tmp_path / "a.csv"), **options)


def test_the_positive_class_may_be_chosen(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv")
    one, two = read(path), read(path, positive="<=50K")
    assert one.kind.classes == ("<=50K", ">50K")
    assert two.kind.classes == (">50K", "<=50K")
    assert one.fingerprint() != two.fingerprint()


def test_the_recipe_on_a_slice(tmp_path: Path) -> None:
    path, out = write(tmp_path / "census.csv", 600), tmp_path / "run"
    changes = [
        f"data={{source: null, path: {path}, limits: {{train: 400}}}}",
        "train={steps: 60, batch_size: 64, learning_rate: 0.01}",
        "variants.hardened.attack={kind: pgd, steps: 1}",
        "audit.attacks=[{kind: noise}, {kind: pgd, steps: 5}]",
        "audit.sweep=[1]",
    ]
    words = [word for change in changes for word in ("--set", change)]
    status, text = invoke("train", RECIPE, "--out", out, *words)
    assert status == 0, text
    assert "numbers in ranges  'age', 'hours-per-week', 'capital-gain'" in text
    assert "missing values     'occupation' 15" in text
    status, text = invoke("audit", out)
    assert status == 0, text
    models = json.loads((out / "metrics.json").read_text())["models"]
    assert models["standard"]["clean"]["auc"] > 0.9
    fallen = {name: model["attacks"]["PGD-5"]["loss"] for name, model in models.items()}
    assert fallen["standard"] > models["standard"]["clean"]["loss"]
    assert fallen["hardened"] < fallen["standard"]
    assert "log loss" in text
