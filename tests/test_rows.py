"""Rows of files and their numbers, among them rows that cannot be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pyarrow")

import pyarrow
import pyarrow.parquet
from embattle.data import tables
from embattle.data.rows import Rows
from embattle.data.tables import Table
from embattle.errors import InputError

NO_JSON = "is no JSON (Expecting property name enclosed in double quotes, column 2); "
# Name, text, columns; of each row its cells or what is wrong, and its line.
FILES: dict[str, tuple[str, str, list[str] | None, list[tuple[Any, int]]]] = {
    "ragged": (
        "a.csv",
        'a,b\n1,2\n\n3,"4\n4"\n5\n6,7,8\n9,9\n3\n',
        ["a"],
        [
            ({"a": "1"}, 2),
            ({"a": ""}, 3),
            ({"a": "3"}, 4),
            ("has 1 cells, and not 2", 6),
            ("has 3 cells, and not 2", 7),
            ({"a": "9"}, 8),
            ("has 1 cells, and not 2", 9),
        ],
    ),
    "after lines without a row": (
        "a.csv",
        "sep=;\na;b\n1;2\n5\n9;9\n",
        ["b", "a"],
        [({"a": "1", "b": "2"}, 3), ("has 1 cells, and not 2", 4), ({"a": "9", "b": "9"}, 5)],
    ),
    "without a header": (
        "u.data",
        "1\t2\t3\t4\n1\t2\n3\t4\t5\t6\n",
        ["user_id"],
        [({"user_id": "1"}, 1), ("has 2 cells, and not 4", 2), ({"user_id": "3"}, 3)],
    ),
    "JSON lines": (
        "a.jsonl",
        '{"a": [1, "x"], "b": 1}\n\n{"a": "t"}\n{bad\n{"a": {"c": 1}}\n{"a": [[1]]}\n{"a": 2}\n',
        ["a"],
        [
            ({"a": ["1", "x"]}, 1),
            ({"a": "t"}, 3),
            (f"{NO_JSON}JSON lines have one object in each line", 4),
            ("holds an object in 'a'; give a column of text or numbers", 5),
            ("holds what is neither text nor number in the list 'a'", 6),
            ("holds a number in 'a', and line 3 a text; write all of a column alike", 7),
        ],
    ),
}


@pytest.mark.parametrize("block", [24, 1 << 20])
@pytest.mark.parametrize("case", FILES)
def test_rows_have_their_numbers_and_lines(
    case: str, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, text, columns, wanted = FILES[case]
    path = tmp_path / name
    path.write_text(text)
    monkeypatch.setattr(tables, "BLOCK", block)
    rows = Rows(path, columns, lists=["a"])
    for _ in range(2):  # from the beginning each time
        found = list(rows)
        assert [row.number for row in found] == list(range(len(wanted)))
        assert [row.wrong or row.cells for row in found] == [what for what, _ in wanted]
    lines = [line for _, line in wanted]
    assert list(rows.lines(range(len(wanted)))) == lines
    assert list(rows.lines([1, len(wanted) - 1])) == [lines[1], lines[-1]]
    assert rows.place(1) == f"{path}, line {lines[1]}"
    assert rows.estimate() >= len(wanted) - 1


def test_rows_of_parquet_have_no_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"h": [["1", "2"], None, []], "n": [[1], [2], [3]], "x": [1, 2, 3]})
    pyarrow.parquet.write_table(table, path)
    rows = Rows(path, ["h", "x"], lists=["h"])
    assert [row.cells["h"] for row in rows] == [["1", "2"], None, []]
    assert list(rows.lines([0, 2])) == [None, None]
    assert rows.place(2) == f"{path}, row 3"
    assert rows.estimate() == 3
    with pytest.raises(InputError, match="column 'n' holds list"):
        list(Rows(path, ["n"], lists=["h"]))


def test_lines_that_are_bad_without_exception_are_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": [1]}\n{"a": {}}\n')
    rows = list(Rows(path, ["a"]))
    assert [row.number for row in rows] == [0, 1]
    assert rows[0].wrong.startswith("holds a list in 'a'")


def test_a_column_that_no_line_has(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"age": 1}) + "\n{\n")
    with pytest.raises(InputError, match=r"a\.jsonl has no column 'agee'; did you mean 'age'"):
        Rows(path, ["agee"])


def test_the_first_row_of_another_length_is_named_after_lines_without_a_row(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.csv"
    path.write_text("sep=;\na;b\n1;2\n5\n")
    with pytest.raises(InputError, match=r"the first is row 4 with 1 \(the header is row 2\)"):
        list(Table(path, ["a"]))
