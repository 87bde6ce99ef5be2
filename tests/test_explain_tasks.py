"""What is explained of each task's models, by names that a reader knows; and the jobs."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")
pytest.importorskip("peft")
pytest.importorskip("pyarrow")
pytest.importorskip("pydantic")
pytest.importorskip("transformers")
pytest.importorskip("typer")

import made_tables
from embattle.attacks import PGD
from embattle.data.movielens import GENRES
from embattle.explain import explain
from embattle.jobs import explain as job
from embattle.jobs import recipe as recipes
from embattle.tasks import Account, Classification, Task
from test_recipes import RECIPES, changes_of, slices
from tiny_job import BAD, GOOD, PLAIN, invoke, make_encoder, recipe_of

__all__ = ["slices"]

WORDS = {*GOOD, *BAD, *PLAIN, "[UNK]"}
ONE_OF_EACH = {
    "adult_income": {"age", "occupation", "hours-per-week"},
    "drug_reviews": WORDS,
    "films_ctr": {"user_id", "movie_id", "age", "gender", "occupation", *GENRES},
    "films_hybrid": {
        *(f"user {n}" for n in range(1, 25)),
        *(f"item {n}" for n in range(1, 31)),
    },
    "films_ranking": {
        *(f"user {n}" for n in range(1, 25)),
        *(f"item {n}" for n in range(1, 31)),
    },
    "films_sequential": {str(n) for n in range(1, 31)},
    "llm_movies": {"film", "Good", "Bad", ".", "[UNK]"},
    "news_mind": WORDS,
}


def task_of(name: str, slices: Path, *more: str) -> Task:
    (path,) = [path for path in RECIPES if path.stem == name]
    task = recipes.load(path, changes=[*changes_of(path, slices), *more]).make_task()
    task.read(Account())
    return task


@pytest.mark.parametrize("name", [*ONE_OF_EACH, "films_hybrid of texts"])
def test_each_task_names_what_is_attacked(name: str, slices: Path) -> None:
    name, _, texts = name.partition(" ")
    task = task_of(name, slices, *(["model.attacked=texts"] if texts else []))
    torch.manual_seed(0)
    model = task.build().eval().requires_grad_(False)
    if name == "llm_movies":
        model.get_parameter("answers.weight").normal_()  # zeros, until it is trained
    group = "token" if name in ("films_ranking", "films_hybrid") else "sample"
    sites = task.sites(model, group)  # type: ignore[arg-type]
    found = explain(
        model,
        task,
        "test",
        sites,
        PGD(eps=0.5, steps=2, keep="best"),
        worst=[1, 0],
        spread=[0, 1, 2],
        unsure=[0, 2],
        texts=task.batches(model, "test", 50),
    )
    json.dumps(found, allow_nan=False)
    known = {"film", "Good", "Bad"} | WORDS if texts else ONE_OF_EACH[name]
    names = {entry["name"] for entry in found["carried"] if "others" not in entry["name"]}
    assert names
    assert names <= known, names - known
    assert sum(entry["share"] for entry in found["carried"]) == pytest.approx(1.0)
    assert found["gap"] < 0.05
    assert [sample["row"] for sample in found["samples"]] == [1, 0]
    for sample in found["samples"]:
        assert sample["text"] == task.show("test", sample["row"])
        assert sample["rise"] >= 0
        rose = float(sample["rise"] > 0)
        assert sum(entry["share"] for entry in sample["parts"]) == pytest.approx(rose)
        assert sum(entry["size"] for entry in sample["parts"]) == pytest.approx(rose)
        for entry in sample["parts"]:
            assert entry["name"] in known or "others" in entry["name"]
    middle = found["landscape"]["z"][4][4]
    batch = task.batch(model, "test", torch.tensor([0, 1, 2]))
    with torch.no_grad():
        losses = task.evaluate(model, batch).losses
    assert losses is not None
    assert middle == pytest.approx(float(losses.mean()), rel=1e-4)
    for swap in found["swaps"]:
        assert swap["before"] != swap["after"]
        assert task.words(model) is not None


def test_a_row_of_a_table_is_that_of_the_sample(slices: Path) -> None:
    task = task_of("films_ranking", slices)
    torch.manual_seed(0)
    model = task.build().eval().requires_grad_(False)
    attack, sites = PGD(eps=0.5, steps=2), task.sites(model, "token")
    options: dict[str, Any] = {"worst": [3], "spread": [0, 3], "unsure": [3], "plane": False}
    found = explain(model, task, "test", sites, attack, **options)
    (sample,) = found["samples"]
    user, item = task.show("test", 3).removeprefix("user ").split(": ")
    moved = {entry["name"]: entry["share"] for entry in sample["parts"]}
    # Another user's row takes no part in this one's loss; the item held out does.
    assert {name for name in moved if name.startswith("user ")} == {f"user {user}"}
    assert moved[f"item {item}"] > 0
    assert found["swaps"] == []
    assert found["landscape"] is None


def test_the_worst_are_those_that_turned_then_those_whose_loss_rose_most() -> None:
    class Kinds(Task):
        kind = Classification()

        def read(self, account: Account) -> None:
            raise NotImplementedError

        def encode(self, model: Any, rows: Any) -> Any:
            raise NotImplementedError

        def build(self) -> Any:
            raise NotImplementedError

    clean = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 9.0], [2.0, 0.0], [2.0, 0.0]])
    under = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 99.0], [0.0, 3.0], [2.0, float("inf")]])
    labels = torch.zeros(5, dtype=torch.int64)
    task = Kinds(None, None)
    assert job.worst_of(task, (clean, under), labels, 5) == [3, 0, 2, 1]
    assert job.worst_of(task, (clean, under), labels, 2) == [3, 0]
    sure = torch.tensor([[2.0, 0.0], [0.1, 0.0], [0.0, 9.0], [1.0, 0.0], [0.2, 0.0]])
    assert job.unsure_of(task, sure, labels, 3) == [1, 4, 3]
    assert job.unsure_of(task, sure, labels, 9) == [1, 4, 3, 0]


def test_the_audit_explains_and_so_does_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    recipe = recipe_of(tmp_path, make_encoder(tmp_path / "encoder"))
    assert invoke("train", recipe, "--out", out)[0] == 0
    status, said = invoke("audit", out)
    assert status == 0, said
    facts = json.loads((out / "metrics.json").read_text())
    saved = json.loads((out / "explanations.json").read_text())
    for name in ("standard", "hardened"):
        found = facts["models"][name]["explanations"]
        assert saved["models"][name] == found
        assert found["attack"] == "PGD-3"
        assert len(found["samples"]) == found["averaged"] == 8
        assert {entry["name"] for entry in found["carried"]} <= WORDS
        assert [entry["name"] for entry in found["positions"]] == ["2", "3", "4", "5", "6"]
        assert all(swap["right"][0] for swap in found["swaps"])
        for swap in found["swaps"]:
            assert set(swap["predictions"]) <= {"0", "1"}
            assert (swap["predictions"][0] == swap["label"]) == swap["right"][0]
            assert (swap["predictions"][1] == swap["label"]) == swap["right"][1]
        for what in ("carried", "worst", "landscape"):
            ET.parse(out / f"{name}.{what}.svg")
    before = (out / "explanations.json").read_bytes()
    assert not (out / "explanations.html").exists()

    status, said = invoke("explain", out, "--model", "hardened", "--samples", "3")
    assert status == 0, said
    page = (out / "explanations.html").read_text()
    assert "How the attack works" in page
    assert page.count("before → under attack") == 3
    assert "style=" not in page
    made = (out / "explanations.json").read_bytes()
    assert list(json.loads(made)["models"]) == ["hardened"]
    assert made != before
    assert invoke("explain", out, "--model", "hardened", "--samples", "3")[0] == 0
    assert (out / "explanations.json").read_bytes() == made

    def odd(*args: Any, **options: Any) -> Any:
        raise ValueError("an odd model\nat length")

    # What cannot be explained does not cost the audit.
    monkeypatch.setattr(job, "explain_model", odd)
    status, said = invoke("audit", out)
    assert status == 0, said
    assert said.count("not explained: an odd model\n") == 2
    facts = json.loads((out / "metrics.json").read_text())
    assert "explanations" not in facts["models"]["hardened"]

    status, said = invoke("explain", out, "--model", "hardend")
    assert status == 2
    assert "--model" in said
    assert "did you mean 'hardened'?" in said
    status, said = invoke("explain", tmp_path / "nowhere")
    assert status == 2
    assert "is not a run folder" in said


def test_an_audit_may_explain_nothing(tmp_path: Path) -> None:
    made_tables.census(tmp_path / "census.csv")
    out = tmp_path / "run"
    (path,) = [path for path in RECIPES if path.stem == "adult_income"]
    raw = path.read_text().replace("source: adult", f"path: {tmp_path / 'census.csv'}")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(raw)
    small = [
        "train.steps=2",
        "audit.attacks=[{kind: fgm}]",
        "audit.sweep=[1]",
        "audit.explain=null",
    ]
    words = [word for change in small for word in ("--set", change)]
    status, said = invoke("train", recipe, "--out", out, *words)
    assert status == 0, said
    status, said = invoke("audit", out)
    assert status == 0, said
    facts = json.loads((out / "metrics.json").read_text())
    assert "explanations" not in facts["models"]["standard"]
    assert [path.name for path in out.glob("*.svg")] == ["curves.svg"]
    assert not (out / "explanations.json").exists()
    status, said = invoke("explain", out, "--model", "standard")
    assert status == 0, said
    assert "hours-per-week" in (out / "explanations.html").read_text()
