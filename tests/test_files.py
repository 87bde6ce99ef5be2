"""Files that a user may give: what is read of each, or how it is refused; see `file_cases`."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("pydantic")

from embattle import data
from embattle.data.formats import recognise
from embattle.data.inspect import describe
from embattle.data.looks import guess_roles, kind_of_table, look, look_all
from embattle.data.recipe import DataRecipe
from embattle.errors import InputError
from file_cases import ACCENTS, CASES, TEXTS, Case, rows

DOCUMENT = Path(__file__).parent.parent / "docs" / "files.md"


def section(path: Path, changes: dict[str, Any]) -> DataRecipe:
    start = {"path": str(path), "text": ["body"], "label": "label", "fractions": (0.6, 0.1, 0.3)}
    return DataRecipe.model_validate(start | changes)


def told(path: Path, account: data.Account, error: InputError | None) -> str:
    """What comes of a file, as the document says it."""
    if error is None:
        facts = [v for n, v in account.facts if n in ("file", "rows", "dropped", "labels made one")]
        warnings = [w for w in account.warnings if "say little" not in w and "right as" not in w]
        text = "; ".join(["read: " + facts[0], *facts[1:], *(f"**{w}**" for w in warnings)])
    else:
        text = f"refused: {error}"
    text = text.replace(str(path), path.name)
    # Arrow's own words differ from version to version.
    text = re.sub(r"(cannot read \S+ as Parquet: ).*(; repair)", r"\1(Arrow's reason)\2", text)
    text = re.sub(r"is no JSON \(.*?, column \d+\)", "is no JSON (the reason)", text)
    text = re.sub(r"(\(known: [^()]{60})[^()]*\)", r"\1...)", text)
    return data.account.printable(text).replace("|", "\\|").replace("<", "\\<")


@pytest.fixture(scope="session")
def document() -> list[str]:
    """The lines of the document's table; EMBATTLE_WRITE_FILES=1 writes them anew."""
    begin, end = "<!-- the table of tests/file_cases.py -->\n", "<!-- end -->\n"
    text = DOCUMENT.read_text(encoding="utf-8")
    before, rest = text.split(begin)
    table, after = rest.split(end)
    if os.environ.get("EMBATTLE_WRITE_FILES"):
        with tempfile.TemporaryDirectory() as folder:
            lines = [line_of(case, Path(folder)) for case in CASES]
        table = "| file | what comes of it |\n|---|---|\n" + "".join(lines)
        DOCUMENT.write_text(before + begin + table + end + after, encoding="utf-8")
    return table.splitlines(keepends=True)[2:]


def line_of(case: Case, folder: Path) -> str:
    """The case's line of the document."""
    path, account = folder / case.file, data.Account()
    path.write_bytes(case.content.encode() if isinstance(case.content, str) else case.content)
    try:
        data.load(section(path, case.recipe), 0, account)
    except InputError as error:
        return f"| {case.name} | {told(path, account, error)} |\n"
    return f"| {case.name} | {told(path, account, None)} |\n"


def test_the_document_has_the_table(document: list[str], tmp_path: Path) -> None:
    names = [case.name for case in CASES]
    assert len(names) == len(set(names)) > 150
    assert [line.split(" | ")[0][2:] for line in document] == names
    assert document == [line_of(case, tmp_path) for case in CASES]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_file_is_read_rightly_or_refused_in_a_line(case: Case, tmp_path: Path) -> None:
    path = tmp_path / case.file
    content = case.content
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    account = data.Account()
    if case.error is not None:
        with pytest.raises(InputError, match=case.error) as raised:
            data.load(section(path, case.recipe), 0, account)
        assert "\n" not in str(raised.value)
        return
    splits = data.load(section(path, case.recipe), 0, account)
    said = "\n".join(account.lines())
    for words in case.says:
        assert words in said
    assert not any(
        "b'" in text or "\ufffd" in text for p in splits.parts.values() for text in p.texts
    )
    assert all(line.isprintable() for line in account.lines())


def test_texts_come_as_they_stand(tmp_path: Path) -> None:
    for encoding in ("latin-1", "utf-16", "cp1252"):
        path = tmp_path / f"{encoding}.csv"
        path.write_bytes(ACCENTS.encode(encoding))
        named = {} if encoding == "utf-16" else {"encoding": encoding}
        splits = data.load(section(path, named), 0)
        texts = {text for part in splits.parts.values() for text in part.texts}
        assert texts == {f"le café numéro {i} est bon" for i in range(40)}


def test_numbers_and_dates_of_a_csv_file_stay_text(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(rows(text=lambda i: f"00{i}.50 and 2020-01-01", labels=lambda i: f"0{i % 2}"))
    splits = data.load(section(path, {}), 0)
    assert splits.classes == ["00", "01"]
    assert all(text.startswith("00") for part in splits.parts.values() for text in part.texts)


def test_numbered_classes_are_ordered_by_value(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(rows(labels=lambda i: str((2, 10, 1)[i % 3])))
    assert data.load(section(path, {}), 0).classes == ["1", "2", "10"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": ["body", "label"]}, "among the text columns"),
        ({"text": ["body", "body"]}, "twice"),
        ({"delimiter": "::"}, "one ASCII character"),
        ({"delimiter": '"'}, "one ASCII character"),
        ({"min_per_class": 0}, "greater than 0"),
        ({"blank_labels": "keep"}, "refuse"),
    ],
)
def test_a_bad_data_section_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        section(Path("a.csv"), changes)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder"):
        recognise(tmp_path)
    loop, to_nowhere = tmp_path / "loop.csv", tmp_path / "gone.csv"
    loop.symlink_to(loop)
    to_nowhere.symlink_to(tmp_path / "absent.csv")
    for path, message in (
        (loop, r"cannot read .*loop\.csv: .*check data\.path"),
        (to_nowhere, "No such file"),
        (tmp_path / ("x" * 300), "name too long"),
        (tmp_path / "a\0.csv", "check data"),
        (tmp_path / "absent" / "a.csv", "No such file"),
        (Path("/dev/zero"), "no regular file"),
    ):
        with pytest.raises(InputError, match=message):
            recognise(path)
    os.mkfifo(tmp_path / "pipe.csv")
    with pytest.raises(InputError, match="no regular file"):
        recognise(tmp_path / "pipe.csv")
    with pytest.raises(InputError, match=r"check data\.path"):
        recognise(tmp_path / "absent.csv")


def test_columns_are_told_apart() -> None:
    assert look(["1", "2.5", "-3e4", ""]).kind == "numbers"
    assert look(["a red dress", "it does not fit"]).kind == "prose"
    assert look(["[10:33] a red dress, said Anna", "[9:15] it does not fit me"]).kind == "prose"
    assert look(["2020-01-05 10:33:11 the disk of node 3 is full again"]).kind == "prose"
    assert look(["Fri, May 1, 2020 at 10:30 AM", "Mon Apr 06 22:19:45 PDT 2009"]).kind == "words"
    assert look(["这件衣服很好看", "不合身而且太贵"]).kind == "prose"
    assert look(["OWN", "RENT"]).kind == "words"
    for dates in (
        ["2020-01-31", "2020-02-01 10:00:00", "2020-02-01T10:00:00Z"],
        ["31.1.2020", "1.2.20"],
        ["May 30, 2011", "December 4, 2012"],
        ["01-Jan-1995", "3 March 2020"],
    ):
        assert look(dates).kind == "dates"
    assert look(["May 30, 2011 was fine", "1.2.3"]).kind != "dates"
    assert look(["", " "]).kind == "empty"
    columns = look_all(
        {"id": ["1", "2"], "review": ["a fine thing", "no good at all"], "y": ["0", "1"]}
    )
    assert kind_of_table(columns)[0] == "text"
    assert guess_roles(columns) == (["review"], "y")


def test_a_recipe_is_proposed_for_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(rows(header="id;body;label", sep=";", text=lambda i: f"{i};{TEXTS[i]}"))
    account = data.Account()
    proposed = describe(path, account)
    assert proposed is not None
    assert "text:\n  - body" in proposed
    assert "label: label" in proposed
    assert any("'body': prose" in line for line in account.lines())
    path.write_text("user,item,rating\n" + "a,b,1\n" * 9)
    assert describe(path, account) is None
    assert "looks like ratings" in account.lines()[-1]
    assert ("guess", "user: 'user', item: 'item', rating: 'rating'") in account.facts


def test_a_file_without_a_header_line_is_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("1,2\n3,4\n5,6\n")
    account = data.Account()
    assert describe(path, account) is None
    assert any("nothing but numbers" in warning for warning in account.warnings)


@pytest.mark.parametrize("delimiter", ["", "\n", '"', "é"])
def test_what_cannot_divide_is_refused(delimiter: str, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(rows())
    with pytest.raises(InputError, match="the delimiter must be ASCII characters"):
        describe(path, data.Account(), delimiter=delimiter)


def test_inspecting_reads_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(rows() * 40 + "a,b,c\n" * 7 + "\n" * 9)
    account = data.Account()
    describe(path, account)
    facts = account.facts
    assert ("rows", "1,648 of 2 columns") in facts
    assert ("dropped", "9 empty rows") in facts
    assert ("dropped", "7 rows with too few or too many cells") in facts
    assert any("data.ragged_rows" in warning for warning in account.warnings)
    path.write_text(rows())
    describe(path, account := data.Account())
    assert not any(name == "dropped" for name, _ in account.facts)
