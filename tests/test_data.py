"""Data: reading, dividing, fetching."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pyarrow")

from embattle.data.account import Account
from embattle.data.labels import check_classes
from embattle.data.splits import Examples, number_labels, split
from embattle.data.tables import read_columns
from embattle.errors import InputError
from embattle.files import replacing, replacing_folder


def divided(count: int, seed: int, **changes: Any) -> Any:
    texts = [f"review {i}" for i in range(count)]
    options: dict[str, Any] = {
        "fractions": (0.6, 0.2, 0.2),
        "limits": (None, None, None),
        "balance": (False, False, False),
    }
    labels = [int(i % 5 == 0) for i in range(count)]
    return split(Examples(texts, labels), ["no", "yes"], seed=seed, **(options | changes))


def test_parts_are_disjoint_complete_and_decided_by_the_seed() -> None:
    first, again, other = divided(1000, 1), divided(1000, 1), divided(1000, 2)
    assert first == again
    assert first.parts["test"] != other.parts["test"]
    texts = [text for part in first.parts.values() for text in part.texts]
    assert len(texts) == len(set(texts)) == 1000
    assert len(first.parts["train"]) == pytest.approx(600, abs=60)


def test_more_data_moves_no_example_to_another_part() -> None:
    small, large = divided(500, 1), divided(1000, 1)
    for name, part in small.parts.items():
        assert set(part.texts) <= set(large.parts[name].texts)


def test_copies_of_a_text_stay_together() -> None:
    texts = [f"review {i % 100}" for i in range(400)]
    found = split(
        Examples(texts, [i % 2 for i in range(400)]),
        ["a", "b"],
        fractions=(0.6, 0.2, 0.2),
        limits=(None, None, None),
        balance=(False, False, False),
        seed=0,
    )
    parts = [set(part.texts) for part in found.parts.values()]
    assert not parts[0] & parts[1] | parts[0] & parts[2] | parts[1] & parts[2]


def test_limits_and_balance() -> None:
    found = divided(1000, 3, limits=(100, 10, None), balance=(True, False, True)).counts()
    assert found["train"] == [50, 50]
    assert sum(found["validation"]) == 10
    assert found["test"][0] == found["test"][1] > 10


def test_a_part_without_a_class_is_refused() -> None:
    with pytest.raises(InputError, match="the test part has no example of class 'yes'"):
        divided(1000, 3, limits=(None, None, 1))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["1", "1"], "only the label '1'"),
        ([], "no label"),
        ([str(i // 2) for i in range(2002)], "1001 different numbers"),
        ([f"a{i // 2}" for i in range(2002)], "1001 different values"),
    ],
)
def test_bad_labels(values: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_classes(values, "y", Account())


def test_labels_are_numbered_in_order() -> None:
    assert number_labels(["b", "a", "b"]) == ([1, 0, 1], ["a", "b"])
    assert number_labels(["10", "9"]) == ([1, 0], ["9", "10"])


def test_csv_and_parquet_give_the_same(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    csv = tmp_path / "a.csv"
    csv.write_text('text,y\n"two\nlines, and a comma",1\n,0\n')
    pyarrow.parquet.write_table(
        pyarrow.table({"y": [1, 0], "text": ["two\nlines, and a comma", None]}), tmp_path / "a.dat"
    )
    first, second = (read_columns(tmp_path / name, ["text", "y"]) for name in ("a.csv", "a.dat"))
    assert [int(y) for y in first["y"]] == second["y"] == [1, 0]
    assert first["text"][0] == second["text"][0]
    with pytest.raises(InputError, match=r"no column 'txt'; did you mean 'text'\?"):
        read_columns(csv, ["txt"])


def test_an_empty_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").touch()
    with pytest.raises(InputError, match=r"a\.csv is empty"):
        read_columns(tmp_path / "a.csv", ["x"])


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as part:  # noqa: PT012
        part.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_replaced_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    path.mkdir()
    (path / "old.txt").write_text("old")
    rename, seen = Path.rename, []

    def failing(self: Path, target: Path) -> Path:
        seen.append(target)
        if len(seen) == 2:  # the first puts the old one aside
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(InputError, match="No space left"), replacing_folder(path) as part:
        (part / "new.txt").write_text("new")
    assert [one.name for one in path.iterdir()] == ["old.txt"]
    assert list(tmp_path.iterdir()) == [path]
