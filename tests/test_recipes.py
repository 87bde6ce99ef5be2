"""Every recipe in recipes/ trains and audits, on a slice made up in its data's columns."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("peft")
pytest.importorskip("pyarrow")
pytest.importorskip("pydantic")
pytest.importorskip("transformers")
pytest.importorskip("typer")

import made_tables
import tiny_models
from embattle.audit.schema import Metrics
from embattle.data import recipe as data_sections
from embattle.data.sources import SOURCES
from embattle.jobs import recipe as recipes
from embattle.tasks import Account
from tiny_job import invoke, make_encoder

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))


@pytest.fixture(scope="module")
def slices(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with made-up tables, in which named data sets are looked for, and an encoder."""
    folder = tmp_path_factory.mktemp("slices")
    make_encoder(folder / "encoder")
    words = "She liked . Yes or no , will she like yes no Good Bad film"
    tiny_models.save_llama(folder / "llama", words.split(), layers=1)
    made_tables.news(folder / "mind")
    made_tables.posts(folder / "posts.csv")

    class Made:
        def __init__(self, name: str) -> None:
            self.name = name

        def path(self) -> Path:
            return made_tables.SOURCES[self.name](folder / f"{self.name}.csv")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_sections, "find", Made)
        yield folder


def changes_of(path: Path, slices: Path) -> list[str]:
    """What makes a recipe small."""
    recipe = recipes.load(path)
    changes = [
        "train.steps=2",
        "train.batch_size=8",
        "variants.hardened.eps_schedule={share: 0}",
        "audit.attacks=[{kind: pgd, steps: 2}]",
        "audit.sweep=[1]",
    ]
    if recipe.task == "llm_ranking":
        changes += [f"model.pretrained={slices / 'llama'}", "model.layers=1"]
    elif hasattr(recipe.model, "pretrained"):
        changes += [f"model.pretrained={slices / 'encoder'}", "model.layers=1"]
        changes += ["model.max_tokens=12"]
    if getattr(recipe.data, "path", None) is not None:
        made = "mind" if recipe.task == "news_clicks" else "posts.csv"
        changes.append(f"data.path={slices / made}")
    return changes


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_trains_and_audits(path: Path, slices: Path, tmp_path: Path) -> None:
    words = [word for change in changes_of(path, slices) for word in ("--set", change)]
    status, said = invoke("train", path, "--out", tmp_path / "run", *words)
    assert status == 0, said
    status, said = invoke("audit", tmp_path / "run")
    assert status == 0, said
    models = json.loads((tmp_path / "run" / "metrics.json").read_text())["models"]
    assert set(models) == {"standard", "hardened"}
    for model in models.values():
        assert model["attacks"]["PGD-2"]["loss"] > model["clean"]["loss"]


@pytest.mark.parametrize(
    ("name", "more", "kind"),
    [
        ("films_ranking", ["model.kind=lightgcn", "variants.hardened.objective=apr"], "balls"),
        ("films_hybrid", ["model.dim=8"], "balls"),
        ("adult_income", ["model.kind=fm"], "swaps"),
        ("womens_reviews", ["audit.batch_size=40"], "smoothing"),
        ("films_sequential", ["model.dim=16"], None),
    ],
)
def test_what_is_certified_is_no_more_than_attacks_leave(
    name: str,
    more: list[str],
    kind: str | None,
    slices: Path,
    tmp_path: Path,
) -> None:
    pytest.importorskip("scipy")
    path = next(path for path in RECIPES if path.stem == name)
    changes = [*changes_of(path, slices), *more]
    changes.append("audit.certify.smoothing={samples: 6, choosing: 20, copies: 60}")
    words = [word for one in changes for word in ("--set", one)]
    status, said = invoke("train", path, "--out", tmp_path / "run", *words)
    assert status == 0, said
    status, said = invoke("audit", tmp_path / "run", "--certify")
    assert status == 0, said
    models = json.loads((tmp_path / "run" / "metrics.json").read_text())["models"]
    for model in models.values():
        if kind is None:
            assert model["certificates"] == []
            assert "nothing can be certified" in said
            continue
        for found in model["certificates"]:
            assert found["kind"] == kind
            certified = found["certified"]
            assert len(certified) == len(found["eps"])
            assert certified == sorted(certified, reverse=True)
            assert f"{found['title']} {certified[0]:.3f} at 0" in said
            if found["attacked"] is not None:
                pairs = zip(certified, found["attacked"], strict=True)
                assert all(proven <= left + 1e-12 for proven, left in pairs)
            if kind == "balls":
                assert certified[0] == pytest.approx(model["clean"][found["measure"]], abs=1e-6)
                place = found["eps"].index(
                    recipes.load(tmp_path / "run" / "recipe.yaml").threat.eps
                )
                assert certified[place] <= model["attacks"]["PGD-2"][found["measure"]] + 1e-6


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_full_reads_the_same_columns(path: Path, slices: Path) -> None:
    changes = [c for c in changes_of(path, slices) if c.startswith(("data.", "model."))]
    task = recipes.load(path, full=True, changes=changes).make_task()
    task.read(Account())
    assert all(len(part) for part in task.parts.values())


def test_made_up_tables_stand_for_data_sets_that_there_are() -> None:
    assert set(made_tables.SOURCES) <= set(SOURCES)


@pytest.mark.parametrize("name", ["films_ranking", "films_sequential"])
def test_an_ensemble_under_fake_users(name: str, slices: Path, tmp_path: Path) -> None:
    pytest.importorskip("scipy")
    path = next(path for path in RECIPES if path.stem == name)
    fakes = {"submodels": 1000, "size": 8, "each": 2, "dim": 4, "steps": 20, "fakes": [3, 1]}
    changes = [*changes_of(path, slices), f"audit.certify.fakes={json.dumps(fakes)}"]
    words = [word for one in changes for word in ("--set", one)]
    status, said = invoke("train", path, "--out", tmp_path / "run", *words)
    assert status == 0, said
    bound = "certified_fakes_overlap@1=0.99"
    status, said = invoke("audit", tmp_path / "run", "--certify", "--fail-under", bound)
    assert status == 1, said
    assert "failed: ensemble of MF: certified_fakes_overlap@1" in said
    assert "training submodels" in said
    facts = json.loads((tmp_path / "run" / "metrics.json").read_text())
    Metrics.model_validate(facts)
    hits, lists = facts["certificates"]
    for found, kind in ((hits, "fakes"), (lists, "fakes_overlap")):
        assert found["kind"] == kind
        assert found["eps"] == [0, 1, 3]
        assert found["certified"] == sorted(found["certified"], reverse=True)
        assert f"ensemble of MF: {found['title']} {found['certified'][0]:.3f} at 0" in said
        assert found["title"] in (tmp_path / "run" / "report.html").read_text()
    assert lists["certified"][0] > 0
    with_rate = re.search(r"its hit rate is ([\d.]+)\.$", hits["note"])
    assert with_rate is not None
    assert hits["certified"][0] <= float(with_rate[1]) + 1e-4

    recipe = (tmp_path / "run" / "recipe.yaml").read_text()
    (tmp_path / "run" / "recipe.yaml").write_text(recipe.replace("size: 8", "size: 50000"))
    status, said = invoke("audit", tmp_path / "run", "--certify")
    assert status == 2, said
    assert "audit.certify.fakes.size: 50000 users of a submodel are more than" in said
