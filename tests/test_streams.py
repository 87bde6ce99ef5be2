"""Files are read a block at a time: the same whatever the block, and little of them is held."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("pydantic")

import pyarrow
import pyarrow.parquet
from embattle import data
from embattle.data import tables
from embattle.data.ratings import read_ratings
from embattle.data.recipe import DataRecipe
from embattle.data.tables import Table
from embattle.errors import InputError

COUNT = 3000
TEXTS = [f"review, number {i}\nwith 'quotes' and é {'x' * (i % 50)}" for i in range(COUNT)]
LABELS = [str(i % 3) for i in range(COUNT)]


def write(path: Path) -> Path:
    if path.suffix == ".parquet":
        table = pyarrow.table({"text": TEXTS, "y": LABELS})
        pyarrow.parquet.write_table(table, path, row_group_size=700)
    elif path.suffix == ".jsonl":
        lines = (json.dumps({"text": t, "y": y}) for t, y in zip(TEXTS, LABELS, strict=True))
        path.write_text("\n".join(lines))
    else:
        encoding = "utf-16" if "16" in path.name else "utf-8"
        rows = (f'"{t}",{y}' for t, y in zip(TEXTS, LABELS, strict=True))
        path.write_text("text,y\n" + "\n".join(rows) + "\n", encoding=encoding)
    return path


@pytest.mark.parametrize("name", ["a.csv", "a16.csv", "a.jsonl", "a.parquet"])
def test_the_size_of_a_block_changes_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / name)
    recipe = DataRecipe(path=str(path), text=["text"], label="y", limits={"test": 100})
    found = []
    for block, rows in ((1 << 24, 1 << 14), (1000, 64)):
        monkeypatch.setattr(tables, "BLOCK", block)
        monkeypatch.setattr(tables, "_ROWS", rows)
        blocks = list(Table(path, ["y", "text"]))
        assert [text for b in blocks for text in b["text"]] == TEXTS
        assert [y for b in blocks for y in b["y"]] == LABELS
        assert (len(blocks) > 20) == (block == 1000)
        account = data.Account()
        found.append((data.load(recipe, 5, account), account.lines()))
    assert found[0] == found[1]


def test_a_job_holds_little_of_a_large_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size, block = 20 << 20, 1 << 17
    for name in ("a.csv", "a.jsonl"):
        path = tmp_path / name
        with path.open("w") as stream:
            stream.write("" if name == "a.jsonl" else "text,y\n")
            for i in range(size // 4096):
                text = f"this is {i} " + "x" * 4000
                stream.write(
                    json.dumps({"text": text, "y": i % 2}) + "\n"
                    if name == "a.jsonl"
                    else f"{text},{i % 2}\n"
                )
        assert path.stat().st_size > 0.9 * size
        monkeypatch.setattr(tables, "BLOCK", block)
        arrow = []
        rows = Table._csv

        def watched(self: Any, rows: Any = rows, arrow: list[int] = arrow) -> Any:
            for found in rows(self):
                arrow.append(pyarrow.total_allocated_bytes())
                yield found

        monkeypatch.setattr(Table, "_csv", watched)
        limits = {"train": 50, "validation": 20, "test": 20}
        recipe = DataRecipe(path=str(path), text=["text"], label="y", limits=limits)
        before = pyarrow.total_allocated_bytes()
        tracemalloc.start()
        splits = data.load(recipe, 0)
        held = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert [len(part) for part in splits.parts.values()] == [50, 20, 20]
        assert held < size / 4
        assert all(found - before < 48 * block for found in arrow)
        assert (len(arrow) > 100) == (name == "a.csv")


def test_a_folder_of_parquet_files_is_one_table(tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    for k in range(3):
        part = pyarrow.table({"text": TEXTS[k * 1000 : k * 1000 + 1000], "y": LABELS[:1000]})
        pyarrow.parquet.write_table(part, folder / f"part-{k}.parquet")
    (folder / "_SUCCESS").touch()
    blocks = list(Table(folder, ["text"]))
    assert [text for block in blocks for text in block["text"]] == TEXTS
    recipe = DataRecipe(path=str(folder), text=["text"], label="y")
    assert sum(len(part) for part in data.load(recipe, 0).parts.values()) == COUNT
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), folder / "part-9.parquet")
    with pytest.raises(InputError, match=r"part-9\.parquet has other columns than the first"):
        data.load(recipe, 0)
    (folder / "notes.txt").touch()
    with pytest.raises(InputError, match="is a folder, and not one of Parquet files alone"):
        data.load(recipe, 0)


def test_a_file_that_changes_while_it_is_read_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from embattle.data import texts

    path = write(tmp_path / "a.csv")
    content = path.read_text()
    choose = texts.check_classes
    for changed in (content.replace("number 7\n", "number 8\n"), content[: len(content) // 2]):
        path.write_text(content)

        def meddled(*arguments: Any, changed: str = changed) -> None:
            path.write_text(changed)
            choose(*arguments)

        monkeypatch.setattr(texts, "check_classes", meddled)
        with pytest.raises(InputError, match="has changed while it was read; start"):
            data.load(DataRecipe(path=str(path), text=["text"], label="y"), 0)


def test_a_column_of_texts_as_label_is_not_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from embattle.data import texts

    monkeypatch.setattr(texts, "_MOST", 500)
    recipe = DataRecipe(path=str(write(tmp_path / "a.csv")), text=["y"], label="text")
    with pytest.raises(InputError, match="holds more than 500 different values, so it is no label"):
        data.load(recipe, 0)


def test_a_cell_longer_than_a_block_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,y\n" + "a,1\n" * 50 + "x" * 5_000_000 + ",2\n")
    with pytest.raises(InputError, match="a cell of more than 1 MiB; repair it"):
        list(Table(path, ["text"], block=1 << 20))
    lines = tmp_path / "a.jsonl"
    lines.write_text(json.dumps({"text": "x" * 17_000_000}) + "\n")
    with pytest.raises(InputError, match="line 1 is longer than 16 Mi characters"):
        list(Table(lines, ["text"], block=1 << 20))


def test_ratings_are_the_same_whatever_the_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    users, items = rng.integers(0, 900, (2, 5000))
    path = tmp_path / "ratings.dat"
    lines = (f"{u}::{i}::{1 + k % 5}::{k}\n" for k, (u, i) in enumerate(zip(users, items)))  # noqa: B905
    path.write_text("".join(lines))
    whole = read_ratings(path)
    monkeypatch.setattr(tables, "BLOCK", 500)
    again = read_ratings(path)
    for name in ("users", "items", "values", "times"):
        assert (getattr(whole, name) == getattr(again, name)).all()
    assert (np.unique(users)[whole.users] == users).all()
    assert (np.unique(items)[whole.items] == items).all()
    assert whole.times.tolist() == list(range(5000))
