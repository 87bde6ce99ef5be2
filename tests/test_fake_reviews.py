"""Flipped labels and reviews that nobody wrote: the copy, and the manifest of what is fake."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from embattle.errors import InputError
from embattle.poisoning.reviews import fake_reviews, flip_labels, words_of

GOOD = ["I love it.", "Great colour!", "It fits so well.", "Soft and warm.", "Would buy again."]
BAD = ["I hate it.", "Poor seams!", "It is itchy.", "Sent it back.", "Too large for me."]


def table(path: Path) -> list[list[str]]:
    """60 reviews of 4 dresses; every tenth text says both, every fifteenth label is blank."""
    draw = np.random.default_rng(0)
    rows = [["item", "shop", "review", "label", "size"]]
    for i in range(60):
        words = list(draw.choice(GOOD if i % 2 else BAD, 3, replace=False))
        if i % 10 == 0:
            words[1:] = list(draw.choice(GOOD, 2, replace=False))
        label = "" if i % 15 == 14 else "yes" if i % 2 else "no"
        rows.append([f"dress {i % 4}", f"shop {i % 4 // 2}", " ".join(words), label, str(i % 7)])
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return rows


def command(path: Path, out: Path, *more: str) -> tuple[int, str]:
    pytest.importorskip("typer")
    pytest.importorskip("pyarrow")
    from tiny_job import invoke

    return invoke("poison", path, "--out", out, "--label", "label", *more)


def read(path: Path) -> tuple[list[list[str]], dict[str, Any]]:
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    return rows, json.loads(path.with_name(f"{path.name}.manifest.json").read_text())


@pytest.mark.parametrize("kind", ["flip", "flip_near"])
def test_the_manifest_undoes_the_flips(tmp_path: Path, kind: str) -> None:
    before = table(tmp_path / "in.csv")
    text = ("--text", "review") if kind == "flip_near" else ()
    out = tmp_path / "out.csv"
    status, told = command(tmp_path / "in.csv", out, "--kind", kind, "--count", "7", *text)
    assert status == 0, told
    after, facts = read(out)
    assert len(facts["flipped"]) == 7
    changed = [i for i, (one, two) in enumerate(zip(before, after, strict=True)) if one != two]
    assert [flip["row"] + 1 for flip in facts["flipped"]] == changed
    for flip in facts["flipped"]:
        row = after[flip["row"] + 1]
        assert (row[3], before[flip["row"] + 1][3]) == (flip["after"], flip["before"])
        assert flip["before"] != flip["after"]
        row[3] = flip["before"]
    assert after == before
    again = tmp_path / "again.csv"
    assert command(tmp_path / "in.csv", again, "--kind", kind, "--count", "7", *text)[0] == 0
    assert again.read_bytes() == out.read_bytes()


def test_flips_near_the_boundary_are_of_texts_that_say_both() -> None:
    labels: list[str | None] = ["yes" if i % 2 else "no" for i in range(200)]
    draw = np.random.default_rng(1)
    texts = [" ".join(draw.choice(GOOD if i % 2 else BAD, 3)) for i in range(200)]
    for i in range(0, 200, 20):
        texts[i] = " ".join([draw.choice(BAD), draw.choice(GOOD)])
    found = flip_labels(labels, 10, texts=[words_of(text) for text in texts])
    # By chance one in twenty of them.
    assert len(set(found.rows.tolist()) & set(range(0, 200, 20))) >= 9
    drawn = flip_labels(labels, 10, seed=3)
    assert (drawn.rows == flip_labels(labels, 10, seed=3).rows).all()
    assert len(set(drawn.rows) & set(found.rows)) < 5


def test_labels_are_flipped_from_and_to_a_class() -> None:
    labels: list[str | None] = [None, *"abcabcabc"]
    found = flip_labels(labels, 3, source="a", goal="c")
    assert (found.before, found.after) == (["a"] * 3, ["c"] * 3)
    assert found.rows.tolist() == [1, 4, 7]
    found = flip_labels(labels, 6, goal="c")
    assert set(found.before) == {"a", "b"}
    every = flip_labels(labels, 9)
    assert all(one != two for one, two in zip(every.before, every.after, strict=True))
    near = flip_labels(labels, 2, texts=[[x or ""] for x in labels], source="b", goal="a")
    assert (near.before, near.after) == (["b", "b"], ["a", "a"])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"count": 4, "source": "a"}, "count=4, but 3 labels can be exchanged"),
        ({"count": 1, "source": "x"}, "source: no row is labelled 'x'"),
        ({"count": 1, "goal": "x"}, "goal: no row is labelled 'x'"),
        ({"count": 1, "goal": "a", "source": "a"}, "source and goal are both 'a'"),
        ({"count": -1}, "count=-1"),
        ({"count": 1, "labels": ["a", None]}, "the labels are of 1 classes"),
    ],
)
def test_flips_that_cannot_be_made_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        flip_labels(options.pop("labels", [*"abcabcabc"]), **options)


def test_fake_reviews_are_made_of_sentences_of_others() -> None:
    genuine = [f"{a} {b} {c}" for a in GOOD for b in GOOD for c in GOOD[:2] if len({a, b, c}) == 3]
    found = fake_reviews(genuine, 20, seed=1)
    assert len(set(found)) == 20
    assert not set(found) & set(genuine)
    for text in found:
        for sentence in GOOD:
            text = text.replace(sentence, "")
        assert not text.strip()
    assert found == fake_reviews(genuine, 20, seed=1)
    with pytest.raises(InputError, match="2 genuine texts"):
        fake_reviews(["One.", "Two."], 1)
    with pytest.raises(InputError, match="could be made that differ"):
        fake_reviews(["One.", "Two.", "Three."], 500)


def test_fake_reviews_name_the_target_and_say_what_all_its_rows_say(tmp_path: Path) -> None:
    before, out = table(tmp_path / "in.csv"), tmp_path / "out.csv"
    more = ("--kind", "reviews", "--text", "review", "--to", "yes", "--count", "5")
    item = ("--item", "item", "--targets", "dress 2,dress 1")
    status, told = command(tmp_path / "in.csv", out, *more, *item)
    assert status == 0, told
    after, facts = read(out)
    assert after[:61] == before
    assert facts["fake_rows"] == [60, 61, 62, 63, 64]
    fakes = after[61:]
    assert [row[0] for row in fakes] == ["dress 2", "dress 1", "dress 2", "dress 1", "dress 2"]
    assert [row[1] for row in fakes] == ["shop 1", "shop 0", "shop 1", "shop 0", "shop 1"]
    assert {(row[3], row[4]) for row in fakes} == {("yes", "")}
    genuine = {row[2] for row in before}
    assert not genuine & {row[2] for row in fakes}
    assert all(any(s in row[2] for s in GOOD) for row in fakes)
    assert not any(s in row[2] for row in fakes for s in BAD)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--kind", "reviews"), "--kind reviews needs --text"),
        (("--kind", "reviews", "--text", "review", "--to", "maybe"), "--to: no row is labelled"),
        (("--kind", "reviews", "--text", "review", "--to", "yes", "--item", "item"), "--targets"),
        (
            ("--kind", "reviews", "--text", "review", "--to", "yes", "--item", "item",
             "--targets", "dress 9"),
            "has no 'dress 9'",
        ),
        (("--kind", "flip", "--targets", "dress 1"), "are for --kind reviews"),
        (("--kind", "flip", "--nuke"), "--nuke is not for --kind flip"),
        (("--kind", "flip", "--share", "2"), "--share must be above 0"),
        (("--kind", "flip", "--share", ".1", "--count", "3"), "give one of them"),
        (("--kind", "flip", "--from", "maybe"), "no row is labelled 'maybe'"),
        (("--kind", "flip_near", "--text", "label"), "named twice"),
        (("--kind", "flip", "--label", "lable"), "lable"),
    ],
)  # fmt: skip
def test_what_the_command_refuses(tmp_path: Path, more: tuple[str, ...], says: str) -> None:
    table(tmp_path / "in.csv")
    status, told = command(tmp_path / "in.csv", tmp_path / "out.csv", *more)
    assert status == 2, told
    assert says in told
    assert [file.name for file in tmp_path.iterdir()] == ["in.csv"]
