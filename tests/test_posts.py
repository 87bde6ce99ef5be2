"""Posts with reactions: the class of a post is its reaction, or the one that was given most."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("pyarrow")
pytest.importorskip("pydantic")
pytest.importorskip("transformers")

import made_tables
from embattle.errors import InputError
from embattle.jobs import recipe as recipes
from embattle.tasks import Account
from made_tables import REACTIONS, table
from tiny_job import make_encoder

RECIPE = Path(__file__).parents[1] / "recipes" / "posts_reactions.yaml"
COUNTS = f"data.label=[{', '.join(REACTIONS)}]"


def task_of(path: Path, *changes: str) -> Any:
    small = ["data.min_per_class=1", "data.stratify=false"]
    return recipes.load(RECIPE, changes=[f"data.path={path}", *small, *changes]).make_task()


def test_the_reaction_that_was_given_most_is_the_class(tmp_path: Path) -> None:
    path = made_tables.posts(tmp_path / "posts.csv")
    one, most = task_of(path), task_of(path, COUNTS)
    for task in (one, most):
        task.read(Account())
    # In the made-up posts a user's reaction is also the one given most.
    assert one.kind.classes == most.kind.classes == ("angry", "love")
    assert one.fingerprint() == most.fingerprint()


def test_posts_without_a_most_frequent_reaction_have_no_label(tmp_path: Path) -> None:
    texts = [f"{made_tables.mood(i)} {i}" for i in range(60)]
    counts: list[tuple[object, ...]] = [(0, 3.0, "1,5"), ("12", "3", ""), (" 0 ", "", "2")] * 20
    rows = [(text, *row) for text, row in zip(texts, counts, strict=True)]
    rows += [("nobody reacts", 0, 0, ""), ("two are as many", 4, "4.0", 1)]
    account = Account()
    task = task_of(table(tmp_path / "posts.csv", ("text", *REACTIONS), rows), COUNTS)
    task.read(account)
    assert {label for part in task.counts().values() for label, n in enumerate(part) if n} == {
        0,
        1,
        2,
    }
    assert task.kind.classes == ("angry", "like", "love")
    known = dict(zip(texts, ("love", "like", "angry") * 20, strict=True))
    for part in task.parts.values():
        for text, label in zip(part.texts, part.labels, strict=True):
            assert task.kind.classes[label] == known[text]
    assert ("dropped", "2 rows without a label") in account.facts
    assert ("label", "'like, love, angry'") in account.facts


def test_rows_of_a_file_are_labelled_by_their_counts(tmp_path: Path) -> None:
    task = task_of(
        made_tables.posts(tmp_path / "posts.csv"),
        COUNTS,
        f"model.pretrained={make_encoder(tmp_path / 'encoder')}",
        "model.layers=1",
    )
    task.read(Account())
    model = task.build()
    rows = [{"text": "love", "like": 1, "love": 2}, {"text": "hate", "angry": "3"}]
    assert torch.equal(task.encode(model, rows).labels, torch.tensor([1, 0]))
    assert task.encode(model, [*rows, {"text": "love"}]).labels is None
    with pytest.raises(InputError, match="the model knows no class 'like'"):
        task.encode(model, [{"text": "love", "like": 7}])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.label=[like, love, text]", "the label 'text' is among the text columns"),
        ("data.label=[like]", "two or more different columns of counts"),
        ("data.label=[like, like]", "two or more different columns of counts"),
        ("data.label=[like, lov]", "has no column 'lov'"),
        ("data.label=[like, author]", "'a0' in column 'author' is no count"),
    ],
)
def test_what_is_no_count_is_refused(change: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        task_of(made_tables.posts(tmp_path / "posts.csv"), change).read(Account())
