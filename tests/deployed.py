"""Small models of all tasks in folders as `embattle train` leaves them, and rows to predict."""

from __future__ import annotations

import csv
import importlib.util
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import made_tables
import pytest
import tiny_models
import torch
import yaml
from embattle.jobs import recipe as recipes
from embattle.tasks import Account, Task
from tiny_job import BAD, GOOD, PLAIN, make_encoder, write_reviews

Cells = dict[str, Any]

RATINGS = {"user": "who", "item": "film", "rating": "stars", "time": "when", "k": 3}
RECIPES: dict[str, Cells] = {
    "text_classification": {
        "data": {
            "path": "reviews.csv",
            "text": ["text"],
            "label": "recommended",
            "stratify": True,
        },
        "model": {"pretrained": "encoder", "max_tokens": 12},
    },
    "tabular": {
        "data": {"path": "people.csv", "label": "rich", "columns": ["age", "job"], "ranges": 4},
        "model": {"dim": 4, "hidden": [8]},
    },
    "click_through": {
        "data": {
            "path": "people.csv",
            "fields": ["job"],
            "dense": ["age"],
            "label": "rich",
            "at_least": 1,
        },
        "model": {"kind": "dlrm", "dim": 4, "hidden": [8]},
    },
    "item_ranking": {"data": {"path": "ratings.csv", **RATINGS}, "model": {"dim": 4}},
    "lightgcn": {
        "task": "item_ranking",
        "data": {"path": "ratings.csv", **RATINGS},
        "model": {"kind": "lightgcn", "dim": 4, "layers": 2},
    },
    "next_item": {
        "data": {"path": "ratings.csv", **RATINGS},
        "model": {"dim": 8, "length": 6, "blocks": 1},
    },
    "hybrid_ranking": {
        "data": {
            "path": "ratings.csv",
            **RATINGS,
            "items": {"path": "films.csv", "key": "film", "text": ["title"]},
        },
        "model": {"pretrained": "encoder", "dim": 4},
    },
    "news_clicks": {
        "data": {"path": "news", "history": 3},
        "model": {"pretrained": "encoder", "dim": 4},
    },
    "llm_ranking": {
        "data": {
            "path": "ratings.csv",
            **{name: column for name, column in RATINGS.items() if name != "k"},
            "titles": {"path": "films.csv", "key": "film"},
        },
        "model": {
            "pretrained": "llama",
            "rank": 2,
            "max_tokens": 24,
            "prompt": "the {liked} is {title}",
            "answers": [" soft", " poor"],
        },
    },
}


#: The names of the recipes, for `parametrize`.
NAMES = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            name == "llm_ranking" and not importlib.util.find_spec("peft"),
            reason="peft is not installed",
        ),
    )
    for name in RECIPES
]


def write_data(folder: Path) -> None:
    """The tables and the pretrained models of the recipes."""
    draw = random.Random(0)
    write_reviews(folder / "reviews.csv", 160)
    people = [(draw.randrange(17, 80), draw.choice("abc"), draw.randrange(2)) for _ in range(80)]
    write_csv(
        folder / "people.csv", [dict(zip(("age", "job", "rich"), p, strict=True)) for p in people]
    )
    met = [(u, film, k) for u in range(12) for k, film in enumerate(draw.sample(range(20), 7))]
    write_csv(
        folder / "ratings.csv",
        [
            {"who": f"u{u}", "film": f"f{film}", "stars": 5 - 3 * (film % 4 == 0), "when": k}
            for u, film, k in met
        ],
    )
    write_csv(
        folder / "films.csv", [{"film": f"f{i}", "title": made_tables.mood(i)} for i in range(20)]
    )
    made_tables.news(folder / "news")
    make_encoder(folder / "encoder")
    if importlib.util.find_spec("peft"):
        tiny_models.save_llama(folder / "llama", [*GOOD, *BAD, *PLAIN])


def write_csv(path: Path, rows: Sequence[Cells]) -> Path:
    """A table of rows."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def recipe_of(name: str, folder: Path) -> Path:
    """The recipe of a name above, with the data and the encoder of a folder."""
    raw = {"name": name, "seed": 1, "task": name, **RECIPES[name]}
    raw = _in(folder, raw)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def _in(folder: Path, section: Cells) -> Cells:
    """A section with the places that it names in a folder."""
    return {
        key: _in(folder, value)
        if isinstance(value, dict)
        else str(folder / value)
        if key in ("path", "pretrained")
        else value
        for key, value in section.items()
    }


def model_of(recipe: Path, folder: Path, *, trust: bool = False) -> Path:
    """A folder with a model whose weights are random, and large enough to tell rows apart."""
    found = recipes.load(recipe, trust=trust)
    task: Task = found.make_task()
    task.read(Account())
    torch.manual_seed(0)
    model = task.build()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.copy_(torch.randn_like(weight) / 2)
    task.save(model, folder)
    (folder / "recipe.yaml").write_text(found.to_yaml())
    return folder


def rows_of(name: str, count: int) -> list[Cells]:
    """Rows of a file for the model of a recipe."""
    draw = random.Random(1)
    rows: list[Cells] = []
    for i in range(count):
        if name == "text_classification":
            words = draw.choices([*GOOD, *BAD], k=1 + i % 7)
            rows.append({"id": f"r{i}", "text": " ".join(words)})
        elif name in ("tabular", "click_through"):
            rows.append({"id": f"r{i}", "age": draw.randrange(17, 80), "job": draw.choice("abcd")})
        elif name == "llm_ranking":
            liked = "; ".join(made_tables.mood(draw.randrange(20)) for _ in range(i % 4))
            rows.append({"id": f"r{i}", "history": liked, "title": made_tables.mood(i)})
        elif name == "news_clicks":
            seen = " ".join(f"N{draw.randrange(1, 9)}" for _ in range(i % 4))
            rows.append({"id": f"r{i}", "history": seen, "news": f"N{draw.randrange(1, 9)}"})
        elif name == "next_item":
            films = draw.sample(range(20), 1 + i % 8)
            rows.append({"id": f"r{i}", "history": " ".join(f"f{film}" for film in films)})
        else:
            rows.append({"id": f"r{i}", "who": f"u{draw.randrange(12)}"})
    return rows


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a model by the name of its recipe, made once."""
    folder = tmp_path_factory.mktemp("deployed")
    write_data(folder)

    def model(name: str) -> Path:
        made = folder / "models" / name
        return made if made.exists() else model_of(recipe_of(name, folder), made)

    return model
