"""Tasks on ratings and clicks: their recipes, batches, predictions, and what is kept of them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("pydantic")
pytest.importorskip("pyarrow")
pytest.importorskip("typer")
pytest.importorskip("yaml")

import made_tables
import yaml
from embattle.attacks import PGD
from embattle.data import movielens
from embattle.data.ratings import read_named_ratings, read_ratings
from embattle.errors import InputError
from embattle.jobs import recipe as recipes
from embattle.models import LightGCN
from embattle.tasks import Account, ClickThrough, ItemRanking, NextItem, Task
from tiny_job import invoke

RECIPES = Path(__file__).parent.parent / "recipes"
RATINGS = ("user_id", "movie_id", "rating", "timestamp")


@pytest.fixture
def films(tmp_path: Path) -> Path:
    """Ratings, users and films in the columns of MovieLens 100K; a user's taste is her parity."""
    made_tables.film_ratings(tmp_path / "ratings.csv")
    made_tables.film_users(tmp_path / "users.csv")
    made_tables.films(tmp_path / "films.csv")
    return tmp_path


def small(name: str, films: Path) -> Path:
    """A recipe with the small tables in place of MovieLens's, and a few steps."""
    raw = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    del raw["data"]["source"]
    raw["data"]["path"] = str(films / "ratings.csv")
    for other, file in zip(raw["data"].get("join", []), ("users", "films"), strict=False):
        del other["source"]
        other["path"] = str(films / f"{file}.csv")
    if name != "films_ctr":
        raw["data"] |= {"k": 3, "users": 20}
    raw["train"] |= {"steps": 8, "batch_size": 32}
    raw["variants"]["hardened"]["eps_schedule"] = {"share": 0}
    raw["audit"] |= {"sweep": [1.0], "attacks": [{"kind": "pgd", "steps": 3}]}
    path = films / f"{name}.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def made(name: str, films: Path, *changes: str) -> Task:
    task = recipes.load(small(name, films), changes=changes).make_task()
    task.read(Account())
    return task


NAMES = ("films_ranking", "films_sequential", "films_ctr")


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_trains_hardens_and_audits(name: str, films: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    status, said = invoke("train", small(name, films), "--out", run)
    assert status == 0, said
    status, said = invoke("audit", run)
    assert status == 0, said
    facts = json.loads((run / "metrics.json").read_text())
    for model in facts["models"].values():
        assert model["attacks"]["PGD-3"]["loss"] > model["clean"]["loss"]
    history = json.loads((run / "run.json").read_text())["variants"]["hardened"]["history"]
    moved = [figures for figures in history if "robust_loss" in figures]
    assert moved[-1]["robust_loss"] > moved[-1]["loss"]


ENDS = "{kind: cosine, start: 1, end: 0}"


@pytest.mark.parametrize(
    "objective",
    [
        "staggered",
        "partial",
        "partial, every: 8",  # the last step attacks nothing, here and in the next two
        f"partial, share_schedule: {ENDS}",
        f"partial, lam_schedule: {ENDS}",
    ],
)
def test_what_triplets_look_up_is_perturbed_sample_by_sample(
    objective: str, films: Path, tmp_path: Path
) -> None:
    options = f"objective: {objective}, lam: 4.0, eps_schedule: {{share: 0}}"
    variant = f"variants={{tried: {{{options}}}}}"
    words = ("train", small("films_ranking", films), "--out", tmp_path / "run", "--set", variant)
    status, said = invoke(*words)
    assert status == 0, said
    assert re.search(r"standard: trained in [\d.]+ s$", said, re.MULTILINE)
    assert re.search(r"tried: trained in [\d.]+ s(, [\d.]+ times standard)?$", said, re.MULTILINE)
    history = json.loads((tmp_path / "run" / "run.json").read_text())["variants"]["tried"][
        "history"
    ]
    assert history[-1]["eps"] > 0
    # Of a step without an attack no loss under attack is told.
    moved = [figures for figures in history if "robust_loss" in figures]
    assert all(figures["robust_loss"] != figures["loss"] for figures in moved)
    assert (moved == history[:1]) if "every" in objective else (len(moved) > 1)
    # LightGCN reads whole tables: its samples share what is perturbed.
    changes = ("model={kind: lightgcn, layers: 1}", "variants.hardened.objective=apr")
    graph = [word for change in changes for word in ("--set", change)]
    status, said = invoke(*words, "--overwrite", *graph)
    assert status == 2, said
    assert "variants.tried: " in said
    assert "mixed" in said
    assert "form=" not in said  # which recipes do not have
    assert "trained in" not in said


def test_a_step_s_loss_under_attack_is_of_the_passes_that_have_one(
    films: Path, tmp_path: Path
) -> None:
    variant = "variants={tried: {objective: staggered, eps_schedule: {share: 0}}}"
    words = ("--set", variant, "--set", "train.accumulate=2", "--out", tmp_path / "run")
    status, said = invoke("train", small("films_ranking", films), *words)
    assert status == 0, said
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    first = run["variants"]["tried"]["history"][0]  # whose first pass has new samples alone
    assert first["robust_loss"] > 0.9 * first["loss"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["first", "other"])
def test_models_are_saved_and_loaded_without_the_data(
    name: str, kind: str, films: Path, tmp_path: Path
) -> None:
    more = {
        "films_ranking": ["model={kind: lightgcn, dim: 8, layers: 2}"],
        "films_sequential": ["model={length: 4, dim: 8, heads: 2, dropout: 0}"],
        "films_ctr": ["model={kind: dlrm, dim: 4}", "data.dense=[timestamp]"],
    }[name] if kind == "other" else []  # fmt: skip
    task = made(name, films, *more)
    model = task.build().eval()
    task.save(model, tmp_path)
    again = recipes.load(small(name, films), changes=more).make_task()
    loaded = again.load(tmp_path)
    row = {
        "films_ranking": {"user_id": 3},
        "films_sequential": {"history": "4 2 9"},
        "films_ctr": {"user_id": "3", "movie_id": "5", "timestamp": 2000, "age": 20},
    }[name]
    with torch.no_grad():
        mine = task.evaluate(model, task.encode(model, [row, row]))
        theirs = again.evaluate(loaded, again.encode(loaded, [row, row]))
    assert mine.losses is None
    assert mine.outputs is not None
    assert theirs.outputs is not None
    assert torch.equal(mine.outputs, theirs.outputs)
    assert len(again.kind.describe(theirs.outputs)) == 2
    # A model for other data is refused.
    other = made(name, films, *more, "data.rows=90" if name == "films_ctr" else "data.users=9")
    if name != "films_sequential":  # which depends on the items alone
        with pytest.raises(InputError, match="does not hold a trained model"):
            other.load(tmp_path)


def test_each_recipe_names_its_task() -> None:
    kinds = {"films_ranking": ItemRanking, "films_sequential": NextItem, "films_ctr": ClickThrough}
    for name, kind in kinds.items():
        for full in (False, True):
            recipe = recipes.load(RECIPES / f"{name}.yaml", full=full)
            assert recipe.name == name
            assert recipe.task_class is kind


def test_ranking_holds_out_each_users_last_two(films: Path) -> None:
    task: Any = made("films_ranking", films)
    ratings, users, items = read_named_ratings(films / "ratings.csv", RATINGS)
    assert users[:3] == ["1", "2", "3"]
    model = task.build()
    assert task.counts() == {"train": 20 * 7, "validation": 20, "test": 20}
    for part, held in (("validation", -2), ("test", -1)):
        batch = task.batch(model, part, torch.tensor([4]))
        own = ratings.items[ratings.users == 4]
        assert int(batch.labels[0]) == own[held]
        assert batch.inputs["seen"][0].nonzero().squeeze(1).tolist() == sorted(own[:held])
        scores = task.evaluate(model, batch).outputs
        assert torch.equal(scores == -torch.inf, batch.inputs["seen"])
    assert task.show("test", 4) == f"user 5: {items[ratings.items[ratings.users == 4][-1]]}"
    rows = torch.arange(50)
    one, same, other = (task.batch(model, "train", rows, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.inputs["negative"], same.inputs["negative"])
    assert not torch.equal(one.inputs["negative"], other.inputs["negative"])
    met = task.graph.mask(one.inputs["users"])
    assert not met.gather(1, one.inputs["negative"][:, None]).any()
    assert met.gather(1, one.inputs["positive"][:, None]).all()
    plain = task.evaluate(model, one).losses
    bare = model.losses(*one.inputs.values())
    assert torch.allclose(plain, bare + 0.02 * model.penalty(*one.inputs.values()))


def test_rows_of_both_tables_are_attacked(films: Path) -> None:
    for more in ([], ["model={kind: lightgcn, dim: 8}"]):
        task = made("films_ranking", films, *more)
        model = task.build().eval()
        assert isinstance(model, LightGCN) == bool(more)
        batch = task.batch(model, "test", torch.arange(20))
        result = PGD(eps=1.0, steps=4).run(
            lambda m=model, b=batch, t=task: t.evaluate(m, b), task.sites(model, "token")
        )
        assert result.losses.mean() > result.clean_losses.mean()
        assert [tuple(d.shape[:-1]) for d in result.deltas] == [(20,), (30,)]
        with pytest.raises(InputError, match="group: token"):
            task.sites(model, "sample")


def test_histories_are_those_before_the_part(films: Path) -> None:
    task: Any = made("films_sequential", films, "model.length=5")
    ratings = read_ratings(films / "ratings.csv", RATINGS)
    model = task.build().eval()
    own = ratings.items[ratings.users == 7]
    batch = task.batch(model, "test", torch.tensor([7]))
    assert batch.inputs["sequences"][0].tolist() == own[3:8].tolist()
    assert int(batch.labels[0]) == own[8]
    assert batch.inputs["seen"][0].nonzero().squeeze(1).tolist() == sorted(own[:8])
    row = {"history": [task.items[i] for i in own[:8]], "movie_id": task.items[own[8]]}
    encoded = task.encode(model, [row])
    for name, value in batch.inputs.items():
        assert torch.equal(encoded.inputs[name], value), name
    assert torch.equal(encoded.labels, batch.labels)
    floats = {"history": list(map(float, row["history"])), "movie_id": float(row["movie_id"])}
    assert torch.equal(task.encode(model, [floats]).inputs["sequences"], batch.inputs["sequences"])
    train = task.batch(model, "train", torch.arange(3))
    assert torch.equal(task.mask(train), train.inputs["sequences"] != 30)
    assert task.evaluate(model, train).losses.shape == (3,)
    assert task.show("test", 7).endswith(f"; {task.items[own[8]]}")
    with pytest.raises(InputError, match="column 'history': the model knows no '77'"):
        task.encode(model, [{"history": "3 77"}])
    with pytest.raises(InputError, match="column 'movie_id': the model knows no '77'"):
        task.encode(model, [{"history": "3", "movie_id": "77"}])
    with pytest.raises(InputError, match="column 'history' is empty in row 2"):
        task.encode(model, [{"history": "3"}, {}])


def test_clicks_are_joined_scaled_and_numbered(films: Path) -> None:
    task: Any = made(
        "films_ctr", films, "data.dense=[timestamp]", "model={kind: dlrm}", "data.rows=100"
    )
    model = task.build()
    parts = task.parts
    assert [len(parts[name]) for name in ("train", "validation", "test")] == [80, 10, 10]
    train = task.batch(model, "train", torch.arange(80))
    dense = train.inputs["dense"]
    torch.testing.assert_close(dense.mean(0), torch.zeros(1), atol=1e-5, rtol=0)
    torch.testing.assert_close(dense.std(0, correction=0), torch.ones(1), atol=1e-5, rtol=0)
    assert train.inputs["values"].min() == 1
    for row in range(10):
        shown = dict(cell.rsplit(" ", 1) for cell in task.show("test", row).split(", "))
        user, film = shown["user_id"], shown["movie_id"]
        if "?" not in (user, film):
            assert shown["age"] in (str(17 + int(user)), "?")
            assert shown["Drama"] == str(int(int(film) % 19 == 8))
            assert int(parts["test"].label[row]) == (int(user) + int(film)) % 2
    row = {"user_id": "999", "movie_id": "5", "timestamp": None, "rating": 4}
    batch = task.encode(model, [row])
    assert batch.inputs["values"][0, 0] == 0
    assert batch.inputs["values"][0, 1] > 0
    assert batch.inputs["dense"].tolist() == [[0.0]]
    assert batch.labels.tolist() == [1]
    assert task.encode(model, [{**row, "rating": None}]).labels is None


def test_a_number_that_does_not_vary_is_moved_alone(films: Path) -> None:
    """The mean of many tenths is not quite a tenth: what is left is no spread."""
    lines = (films / "ratings.csv").read_text().splitlines()
    table = [f"{lines[0]},price", *(f"{line},0.1" for line in lines[1:])]
    (films / "ratings.csv").write_text("\n".join(table))
    task: Any = made("films_ctr", films, "data.dense=[price]", "model={kind: dlrm}", "data.join=[]")
    assert task.scales["price"] == [pytest.approx(0.1), 1.0]
    row = {"user_id": "1", "movie_id": "5", "price": 0.2}
    assert task.encode(task.build(), [row]).inputs["dense"].item() == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("films_ranking", "model.layers=2", "mf has no layers"),
        ("films_ranking", "data.source=movielens_100k", "either source .* or path"),
        ("films_sequential", "model.heads=3", "dim 64 cannot be divided among 3 heads"),
        ("films_ctr", "data.fields=[user_id, rating, movie_id]", "the label 'rating' is among"),
        ("films_ctr", "data.fields=[user_id]", "join: the key 'movie_id' is not among data.fields"),
        ("films_ctr", "data.dense=[age]", "the column 'age' is named twice"),
        ("films_ctr", "data.fractions=[0.5, 0.1, 0.1]", "fractions must sum to 1"),
        ("films_ctr", "model.kind=dlrm", "dlrm needs columns of numbers"),
        ("films_ctr", "data.dense=[timestamp]", "deepfm reads no columns of numbers"),
        ("films_ctr", "data.at_least=9", "'rating' is never at least 9"),
        ("films_ctr", "data.label=movie_title", "has no column 'movie_title'"),
        ("films_ranking", "data.k=30", "30 of 30 items cannot be a choice"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(
    name: str, change: str, message: str, films: Path
) -> None:
    with pytest.raises(InputError, match=message):
        made(name, films, change)


@pytest.mark.parametrize(
    ("name", "met", "message"),
    [
        ("films_ranking", 1, r"no user has met two different items \('user_id', 'movie_id'\)"),
        ("films_sequential", 1, "no user has met two different items"),
        ("films_sequential", 3, "no user has met two items beside those held out"),
    ],
)
def test_histories_that_are_too_short_are_told_of(
    name: str, met: int, message: str, films: Path
) -> None:
    events = [f"{user},{user % 9 + turn},5,{turn}" for user in range(20) for turn in range(met)]
    (films / "ratings.csv").write_text("\n".join([",".join(RATINGS), *events]))
    with pytest.raises(InputError, match=message):
        made(name, films)


@pytest.mark.parametrize("name", ["films_ranking", "films_sequential"])
def test_precision_that_the_losses_would_not_have_is_refused(
    name: str, films: Path, tmp_path: Path
) -> None:
    recipe, out = small(name, films), tmp_path / "run"
    status, said = invoke("train", recipe, "--out", out, "--set", "train.precision=bf16")
    assert status == 2
    assert "full precision" in said
    assert not (out / "run.json").exists()


def test_what_is_known_of_movielens(films: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Place:
        def __init__(self, name: str) -> None:
            kinds = {"movielens_100k": "ratings", "movielens_100k_items": "films"}
            self.name = kinds.get(name, "users")

        def path(self) -> Path:
            return films / f"{self.name}.csv"

    monkeypatch.setattr(movielens, "find", Place)
    ratings = movielens.ratings()
    known = movielens.context(ratings)
    assert known.sizes[:2] == [24, 30]
    assert known.values.shape == (len(ratings), 5 + 19)
    assert (known.values < np.array(known.sizes)).all()
    for event in (0, 57, 200):
        user, film = ratings.users[event] + 1, ratings.items[event] + 1
        age = 17 + user
        group = sum(age >= bound for bound in (18, 25, 35, 45, 50, 56))
        assert known.values[event, 2:5].tolist() == [group, int(user % 2 == 0), 0]
        assert known.values[event, 5:].tolist() == [int(film % 19 == g) for g in range(19)]
        assert known.dense[event, 0] == pytest.approx((age - 29.5) / np.arange(24).std(), abs=1e-5)
