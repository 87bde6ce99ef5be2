"""Tasks: what they are made of, where they are found, and what is kept of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("pydantic")
pytest.importorskip("safetensors")

from embattle import Site
from embattle.attacks import PGD
from embattle.audit import evaluate, sweep
from embattle.errors import InputError
from embattle.jobs import recipe as recipes
from embattle.jobs.train import read
from embattle.tasks import (
    Account,
    Batch,
    Classification,
    Evaluator,
    MultiLabelClassification,
    Ranking,
    Regression,
    Section,
    Task,
)
from embattle.tasks.find import BUILT_IN, find
from embattle.tasks.kinds import from_json

OWN = """
from embattle.tasks import Batch, Regression, Section, Task

class Data(Section):
    count: int
    name: str = "x"

class Mine(Task):
    Data = Data
    kind = Regression(within=1.0)
    def read(self, account): ...
    def build(self): ...
    def encode(self, model, rows): ...

class Half(Task):
    def read(self, account): ...

class Other: ...

class Dictionary(Mine):
    Data = {}

class Empty(Mine):
    Data = Section
    def read(self, account):
        self.parts = {"train": [1, 2]}

class Silent(Empty):
    def read(self, account): ...
"""


class Toy(Task):
    """One embedding for each number; the class is its parity."""

    def __init__(self, *options: Any, offset: int = 0) -> None:
        super().__init__(*(options or (Section(), Section())))
        self.offset = offset

    def read(self, account: Account) -> None:
        rows = [{"number": n, "parity": n % 2} for n in range(self.offset, 8)]
        self.parts = {"train": rows[:-2], "test": rows[-2:]}
        self.kind = Classification(("even", "odd"))

    def build(self) -> nn.Module:
        return Parity()

    def encode(self, model: nn.Module, rows: Any) -> Batch:
        numbers = torch.tensor([row["number"] for row in rows])
        return Batch({"numbers": numbers}, torch.tensor([row["parity"] for row in rows]))


class Parity(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 2)
        self.last = nn.Linear(2, 1)

    def forward(self, numbers: Tensor) -> Tensor:
        out: Tensor = self.last(self.embedding(numbers)).squeeze(1)
        return out


# --- kinds ---


def test_one_logit_is_scored_as_two() -> None:
    one = torch.tensor([2.0, -1.0, 0.5, -0.2])
    labels = torch.tensor([1, 0, 0, 1])
    two = torch.stack([torch.zeros_like(one), one], 1)
    kind = Classification(("no", "yes"))
    assert kind.scores(one, labels) == pytest.approx(kind.scores(two, labels))
    assert kind.right(one, labels).tolist() == [True, True, False, False]
    assert kind.scores(one, labels)["auc"] == 0.75
    yes = 1 / (1 + math.exp(-2))
    assert kind.describe(one)[0] == {
        "prediction": "yes",
        "confidence": pytest.approx(yes),
        "probability_no": pytest.approx(1 - yes),
        "probability_yes": pytest.approx(yes),
    }
    assert kind.show(one[1], labels[1]) == "73%"
    assert kind.show_label(labels[1]) == "no"
    assert kind.chance(torch.tensor([1, 1, 0])) == pytest.approx(2 / 3)


def test_several_labels() -> None:
    outputs = torch.tensor([[1.0, -1.0, 3.0], [2.0, 1.0, -3.0], [-1.0, -2.0, -1.0]])
    labels = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 1, 0]])
    kind = MultiLabelClassification(("a", "b", "c"))
    found = kind.scores(outputs, labels)
    assert kind.right(outputs, labels).tolist() == [False, True, False]
    assert found["all_right"] == pytest.approx(1 / 3)
    # F1 of each label: 1, 2/3, 0. AUC of the first two: 1, and 1/2; the third is never there.
    assert found["f1"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert found["auc"] == pytest.approx((1 + 0.5) / 2)
    assert found["loss"] == pytest.approx(
        float(nn.functional.binary_cross_entropy_with_logits(outputs, labels.float()))
    )
    second = kind.describe(outputs)[1]
    assert second["prediction"] == ["a", "b"]
    shares = [1 / (1 + math.exp(-x)) for x in (2, 1, -3)]
    assert [second[f"probability_{x}"] for x in "abc"] == pytest.approx(shares)
    assert kind.show(outputs[2], labels[2]) == "2 of 3"
    assert kind.show_label(labels[1]) == "a, b"
    assert kind.show_label(torch.tensor([0, 0, 0])) == "none"


def test_values() -> None:
    outputs, labels = torch.tensor([1.0, 2.0, 5.0]), torch.tensor([1.0, 2.5, 3.0])
    found = Regression(within=0.6).scores(outputs, labels)
    assert found["within"] == pytest.approx(2 / 3)
    assert found["mae"] == pytest.approx(2.5 / 3)
    assert found["loss"] == pytest.approx(4.25 / 3)
    mean = 6.5 / 3
    spread = sum((x - mean) ** 2 for x in (1.0, 2.5, 3.0))
    assert found["r2"] == pytest.approx(1 - 4.25 / spread)
    assert math.isnan(Regression(within=1.0).scores(outputs[:1], labels[:1])["r2"])
    assert Regression(within=1.0).describe(outputs)[2] == {"prediction": 5.0}
    with pytest.raises(ValueError, match=r"must have one shape"):
        Regression(within=1.0).losses(outputs[:, None], labels)


def test_ranks() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0, 0.0], [0.0, 0.0, 5.0, -math.inf], [1.0, 2.0, 3.0, 4.0]])
    items = torch.tensor([2, 1, 0])  # ranks 2, 2 (equal ones do not push it back), and 4
    kind = Ranking(k=2)
    found = kind.scores(scores, items)
    assert kind.right(scores, items).tolist() == [True, True, False]
    assert found["hit_rate"] == pytest.approx(2 / 3)
    assert found["ndcg"] == pytest.approx(2 / math.log2(3) / 3)
    assert found["mrr"] == pytest.approx((0.5 + 0.5) / 3)
    assert kind.describe(scores)[0] == {"prediction": [0, 2], "scores": [3.0, 2.0]}
    assert kind.show(scores[2], items[2]) == "4"


@pytest.mark.parametrize(
    "kind",
    [Classification(("a", "b")), MultiLabelClassification(("a",)), Regression(0.5), Ranking(7)],
)
def test_a_kind_survives_being_written(kind: Any) -> None:
    assert from_json(json.loads(json.dumps(kind.to_json()))) == kind
    with pytest.raises(ValueError, match="no samples"):
        kind.scores(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(ValueError, match="no kind of prediction"):
        from_json({"name": "Judge"})
    with pytest.raises(ValueError, match="unexpected"):
        from_json({**kind.to_json(), "more": 1})


# --- audit ---


class Shift(nn.Module):
    """The value is the sum of two embeddings of one dim."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 1)
        with torch.no_grad():
            self.embedding.weight.copy_(torch.tensor([[0.0], [1.0], [2.0], [3.0]]))

    def forward(self, places: Tensor) -> Tensor:
        found: Tensor = self.embedding(places).sum((1, 2))
        return found


def test_a_regression_is_attacked_until_it_is_too_far_off() -> None:
    model, places = Shift(), torch.tensor([[0, 1], [2, 3], [1, 1]])
    batch = Batch({"places": places}, torch.tensor([1.0, 5.4, 2.9]))
    # Under a ball of eps the sum moves by eps * sqrt(2); the errors are 0, 0.4 and 0.9.
    attack = PGD(eps=0.5, step_size=0.5, steps=3)
    evaluator, site = Evaluator(Regression(within=1.0)), Site(model.embedding)
    found = evaluate(model, [batch], site, {"PGD": attack}, evaluator=evaluator)["PGD"]
    assert found.right.tolist() == [True, False, False]
    assert found.norm == pytest.approx(0.5)
    balls = [PGD(eps=e, step_size=e, steps=2) for e in (0.05, 0.1, 0.5, 1.0)]
    shares = sweep(model, [batch], site, balls, evaluator=evaluator)
    assert shares == pytest.approx([1.0, 2 / 3, 1 / 3, 0.0])


def test_two_sites_are_attacked_together() -> None:
    one, two = nn.Embedding(4, 1), nn.Embedding(4, 1)

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = one, two

        def forward(self, places: Tensor) -> Tensor:
            found: Tensor = (self.one(places) + self.two(places)).sum((1, 2))
            return found

    with torch.no_grad():
        one.weight.zero_(), two.weight.zero_()
    model, batch = Both(), Batch({"places": torch.tensor([[0], [1]])}, torch.tensor([0.5, 1.5]))
    evaluator, attack = Evaluator(Regression(within=2.0)), PGD(eps=0.5, step_size=0.5, steps=1)
    sites = [Site(one), Site(two)]
    found = evaluate(model, [batch], sites, {"PGD": attack}, evaluator=evaluator)["PGD"]
    assert found.right.tolist() == [True, False]  # each site moves by 0.5
    assert found.outputs.tolist() == [-1.0, -1.0]


# --- a task's data and model ---


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    task = Toy()
    task.read(Account())
    model = task.build()
    task.save(model, tmp_path)
    fresh = Toy()  # has not read its data
    again = fresh.load(tmp_path)
    assert fresh.kind == Classification(("even", "odd"))
    assert not again.training
    batch = task.batches(model, "test", 1)
    assert [len(one) for one in batch] == [1, 1]
    assert (model(**batch[0].inputs) == again(**batch[0].inputs)).all()

    (tmp_path / "task.json").write_text('{"kind": {"name": "Classification", "classes": ["a"]}}')
    with pytest.raises(InputError, match=r"does not belong to the data; train it"):
        task.load(tmp_path)
    with torch.no_grad():
        model.last.bias.fill_(float("nan"))
    task.save(model, tmp_path)
    with pytest.raises(InputError, match=r"last\.bias holds values that are no finite numbers"):
        task.load(tmp_path)


def test_the_fingerprint_is_of_the_data() -> None:
    prints = []
    for offset in (0, 0, 1):
        task = Toy(offset=offset)
        task.read(Account())
        prints.append(task.fingerprint())
    assert prints[0] == prints[1] != prints[2]
    task.parts = {"train": torch.arange(4), "test": torch.arange(4)[:2].numpy()}
    first = task.fingerprint()
    task.parts = {"train": torch.arange(4), "test": torch.arange(4)[1:3].numpy()}
    assert task.fingerprint() != first
    task.parts = {"train": [object()]}
    with pytest.raises(TypeError, match="knows nothing of a object"):
        task.fingerprint()


def test_batches_without_labels_are_for_prediction_alone() -> None:
    batch = Batch({"numbers": torch.tensor([1, 2])})
    at = Evaluator().evaluate(Parity(), batch)
    assert at.losses is None
    assert at.outputs is not None
    assert len(batch.take(torch.tensor([1]))) == 1
    with pytest.raises(ValueError, match="no labels"):
        Evaluator().criterion(batch)


# --- where tasks are found ---


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("text_clasification", "did you mean 'text_classification'"),
        ("own.py", "no task is called 'own.py'"),
        ("own.py:", "no task is called"),
        ("own.py:a b", "no task is called"),
        ("nowhere.py:Mine", "cannot read the task's file nowhere.py"),
        ("own.py:Nine", "own.py has no class 'Nine'; did you mean 'Mine'"),
        ("own.py:Other", "is no task: derive it from"),
        ("own.py:Half", "lacks build, encode"),
        ("own.py:Dictionary", "Data must be a class derived from embattle.tasks.Section, got {}"),
        ("no_such_module:Mine", "cannot be imported"),
        ("broken.py:Mine", "cannot be run: ZeroDivisionError"),
        ("wrong.py:Mine", "cannot be run: SyntaxError"),
        ("exit.py:Mine", "cannot be run: SystemExit"),
    ],
)
def test_what_is_no_task_is_refused(name: str, message: str, own: Path) -> None:
    own.with_name("broken.py").write_text("1 / 0")
    own.with_name("wrong.py").write_text("class")
    own.with_name("exit.py").write_text("raise SystemExit(0)")
    with pytest.raises(InputError, match=message):
        find(name, trust=True)


@pytest.mark.parametrize("name", BUILT_IN)
def test_what_is_built_in_is_there_and_described(name: str) -> None:
    assert issubclass(find(name), Task)
    text = (Path(__file__).parents[1] / "docs" / "tasks.md").read_text()
    assert f"`{name}`" in text


def test_code_runs_only_where_it_is_trusted(own: Path) -> None:
    own.write_text(OWN + "\nimport pathlib\npathlib.Path('ran').touch()\n")
    with pytest.raises(InputError, match="--trust-task"):
        find("own.py:Mine")
    with pytest.raises(InputError, match="--trust-task"):
        find("antigravity:Mine")
    assert not Path("ran").exists()
    assert find("own.py:Mine", trust=True) is find("own.py:Mine", trust=True)
    assert Path("ran").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Empty", r"no samples in the test part, and this needs some; there are: train \(2\)"),
        ("Silent", "Silent.read sets no parts"),
    ],
)
def test_what_a_task_did_not_read_is_said(name: str, message: str, own: Path) -> None:
    task = find(f"own.py:{name}", trust=True)(Section(), Section())
    with pytest.raises(InputError, match=message):
        read(task, Account(), "train", "test")


def test_a_recipe_has_the_sections_of_its_task(own: Path) -> None:
    path = own.with_name("mine.yaml")
    path.write_text("name: mine\ntask: own.py:Mine\ndata: {count: 3}\n")
    recipe = recipes.load(path, trust=True)
    task = recipe.make_task()
    assert type(task).__name__ == "Mine"
    assert (task.data_options.count, task.data_options.name) == (3, "x")
    copy = own.with_name("copy.yaml")
    copy.write_text(recipe.to_yaml())
    assert recipes.load(copy, trust=True) == recipe
    for change, message in (
        ("data.cuont=3", "unknown key data.cuont; did you mean 'count'"),
        ("data.text=[a]", "unknown key data.text"),
        ("model.layers=1", "unknown key model.layers"),
        ("data.count=x", "data.count"),
        ("task=7", "task"),
        ("task=own.py:Mien", "task: own.py has no class 'Mien'"),
        ("task=text_classification", "data"),
    ):
        with pytest.raises(InputError, match=message):
            recipes.load(path, changes=[change], trust=True)
    path.write_text("name: mine\ntask: own.py:Mine\n")
    with pytest.raises(InputError, match="data is missing"):
        recipes.load(path, trust=True)


def test_texts_of_a_file_are_encoded_like_those_of_a_part(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from tiny_job import make_encoder, recipe_of

    path = recipe_of(tmp_path, make_encoder(tmp_path / "encoder"))
    task = recipes.load(path).make_task()
    task.read(Account())
    model = task.build()
    texts = [task.show("test", i) for i in range(3)]
    known = task.batch(model, "test", torch.arange(3))
    names = [task.kind.show_label(label) for label in known.known_labels()]
    rows = [{"text": t, "recommended": n} for t, n in zip(texts, names, strict=True)]
    batch = task.encode(model, rows)
    assert (batch.inputs["input_ids"] == known.inputs["input_ids"]).all()
    assert (batch.known_labels() == known.known_labels()).all()
    assert task.encode(model, [{"text": "love"}, {"text": "hate"}]).labels is None
    with pytest.raises(InputError, match="there is no text in 'text'"):
        task.encode(model, [{"text": "love"}, {"text": None}])
    with pytest.raises(InputError, match="knows no class 'maybe'"):
        task.encode(model, [{"text": "love", "recommended": "maybe"}])
    task.save(model, tmp_path / "model")
    fresh = recipes.load(path).make_task()
    fresh.load(tmp_path / "model")
    assert fresh.kind == task.kind


@pytest.mark.parametrize("tables", [False, True], ids=["users' vectors", "both tables"])
def test_a_ranking_task_goes_through_the_jobs(tables: bool, tmp_path: Path) -> None:
    for module in ("accelerate", "matplotlib", "typer", "yaml"):
        pytest.importorskip(module)
    from tiny_job import invoke

    recipe, out = tmp_path / "visits.yaml", tmp_path / "run"
    recipe.write_text(
        f"name: visits\ntask: {Path(__file__).with_name('ranking_task.py')}:Visited\n"
        f"data: {{tables: {str(tables).lower()}}}\nthreat: {{eps: 1.0}}\n"
        "train: {steps: 60, batch_size: 64, learning_rate: 0.05}\n"
        "audit: {attacks: [{kind: pgd, steps: 5}], sweep: [0.5, 2], "
        "sweep_attack: {kind: pgd, steps: 3}}\n"
    )
    status, text = invoke("train", recipe, "--out", out, "--trust-task")
    assert status == 0, text
    status, text = invoke("audit", out, "--trust-task")
    assert status == 0, text
    facts = json.loads((out / "metrics.json").read_text())
    model = facts["models"]["standard"]
    assert model["clean"]["hit_rate"] > 0.5  # 5 of 30 by chance
    assert model["attacks"]["PGD-5"]["hit_rate"] < model["clean"]["hit_rate"]
    shares = model["sweep"]["hit_rate"]
    assert shares == sorted(shares, reverse=True)
    assert "hit rate" in text
    assert "each user as a whole" in text
