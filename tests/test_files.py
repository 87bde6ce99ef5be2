"""Files that a user may give, good, odd and hostile: what is read of each, or how it is refused."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("pydantic")

import pyarrow
import pyarrow.parquet
from embattle import data
from embattle.data.formats import recognise
from embattle.data.inspect import describe
from embattle.data.looks import guess_roles, kind_of_table, look, look_all
from embattle.data.recipe import DataRecipe
from embattle.errors import InputError

TEXTS = [f"the dress number {i} fits me well" for i in range(40)]


def rows(
    labels: Callable[[int], str] = lambda i: "pos" if i % 2 else "neg",
    text: Callable[[int], str] = lambda i: TEXTS[i],
    header: str = "body,label",
    sep: str = ",",
    count: int = 40,
    end: str = "\n",
) -> str:
    """A table of 40 texts."""
    lines = [header, *(f"{text(i)}{sep}{labels(i)}" for i in range(count))]
    return end.join(lines) + end


def parquet(**columns: Any) -> bytes:
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), stream)
    return stream.getvalue()


def jsonl(*objects: Any) -> bytes:
    return "".join(json.dumps(x) + "\n" for x in objects).encode()


def archive(*names: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        for name in names:
            file.writestr(name, "x")
    return stream.getvalue()


class Case(NamedTuple):
    """A file and what comes of it.

    Attributes:
        name: of the case.
        content: of the file.
        error: what the refusal says, all of it in one line; None if the file is read.
        says: what the account says if it is read.
        recipe: changes to the data section.
        file: the file's name.
    """

    name: str
    content: str | bytes
    error: str | None = None
    says: tuple[str, ...] = ()
    recipe: dict[str, Any] = {}  # noqa: RUF012 (never changed)
    file: str = "reviews.csv"


PARQUET = parquet(body=TEXTS, label=["pos", "neg"] * 20)
OBJECTS = [{"body": text, "label": i % 2} for i, text in enumerate(TEXTS)]
ACCENTS = rows(text=lambda i: f"le café numéro {i} est bon")

CASES = [
    # ---- Encodings
    Case("utf-8", ACCENTS, says=("CSV, utf-8, delimiter comma (guessed)", "'neg'")),
    Case("utf-8 with its mark", "\ufeff" + ACCENTS, says=("utf-8-sig",)),
    Case("utf-16 with its mark", ACCENTS.encode("utf-16"), says=("utf-16",)),
    Case("utf-16 without", ACCENTS.encode("utf-16-le"), "line 1: a NUL character.*utf-16"),
    Case(
        "utf-16 without, named",
        ACCENTS.encode("utf-16-le"),
        says=("utf-16-le",),
        recipe={"encoding": "utf-16-le"},
    ),
    Case(
        "latin-1",
        rows(text=lambda i: TEXTS[i] if i < 7 else f"café {i}").encode("latin-1"),
        r"line 9: byte 0xE9 is not UTF-8; name the file's encoding in data\.encoding .*café",
    ),
    Case(
        "latin-1, named",
        ACCENTS.encode("latin-1"),
        says=("CSV, iso8859-1",),
        recipe={"encoding": "latin-1"},
    ),
    Case(
        "not what was named",
        ACCENTS.encode("latin-1"),
        r"line 2: byte 0x\w\w is not SHIFT_JIS; name the right one",
        recipe={"encoding": "shift_jis"},
    ),
    Case("no such encoding", ACCENTS, "data.encoding: 'klingon'", recipe={"encoding": "klingon"}),
    Case("no text encoding", ACCENTS, "data.encoding: 'hex'", recipe={"encoding": "hex"}),
    Case(
        "decoded wrongly before",
        ACCENTS.encode().decode("latin-1"),
        says=("warning: 40 cells look as if they had been decoded wrongly",),
    ),
    Case("a NUL inside", rows(text=lambda i: f"a\0b {i} c"), "line 2: a NUL character"),
    # ---- Delimiters and quotes
    Case("semicolons", rows(header="body;label", sep=";"), says=("delimiter semicolon (guessed)",)),
    Case("tabs", rows(header="body\tlabel", sep="\t"), says=("delimiter tab",)),
    Case("bars", rows(header="body|label", sep="|"), says=("delimiter bar",)),
    Case(
        "commas in texts of a semicolon file",
        rows(header="body;label", sep=";", text=lambda i: f"well, {i}, that, is, it"),
        says=("delimiter semicolon",),
    ),
    Case(
        "another delimiter, given",
        rows(header="body:label", sep=":"),
        says=("delimiter ':' (given)",),
        recipe={"delimiter": ":"},
    ),
    Case(
        "another delimiter",
        rows(header="body:label", sep=":"),
        r"no column 'body'.*read as CSV.*data\.delimiter changes it",
    ),
    Case(
        "the line by which Excel names the delimiter",
        "sep=;\n" + rows(header="body;label", sep=";"),
        says=("delimiter semicolon (given)", "40 of 2 columns"),
    ),
    Case(
        "quoted newlines",
        rows(text=lambda i: f'"two\nlines, number {i}"'),
        says=("40 of 2 columns",),
    ),
    Case(
        "a quote that is never closed",
        rows(text=lambda i: '"an open one' if i == 30 else TEXTS[i]),
        "line 32: a quote is opened and never closed",
    ),
    Case("inches", rows(text=lambda i: f'a screen of {i}" is enough'), says=("40 of 2",)),
    Case(
        "rows of other lengths",
        rows(labels=lambda i: "pos,x" if i in (5, 9) else "neg"),
        "2 rows do not have the header's 2 cells; the first is row 7 with 3 .*ragged_rows: drop",
    ),
    Case(
        "rows of other lengths, dropped",
        rows(labels=lambda i: "a,b,c" if i in (5, 9) else str(i % 2)),
        says=("2 rows with too few or too many cells", "38 of 2 columns"),
        recipe={"ragged_rows": "drop"},
    ),
    Case("lines end as on Windows", rows(end="\r\n"), says=("40 of 2 columns",)),
    Case("lines end as on an old Mac", rows(end="\r"), says=("40 of 2 columns",)),
    Case("blank lines first", "\n\n" + rows(), says=("40 of 2 columns",)),
    # ---- Headers
    Case(
        "a name twice",
        rows(header="body,body"),
        "2 columns named 'body'",
        recipe={"label": "body2"},
    ),
    Case("another name", rows(header="text,label"), r"no column 'body'; .*known: label, text"),
    Case(
        "thousands of columns",
        ",".join(f"c{i}" for i in range(5000)) + "\n" + ",".join("1" * 5000) + "\n",
        "no column 'body'.* and 4970 more",
    ),
    Case("a header alone", "body,label\n", "has no rows"),
    Case("a header without an end", "body,label", "has no rows"),
    Case("nothing", "", "is empty"),
    Case("nothing but spaces", " \n\n \n", "is empty"),
    # ---- Other kinds of files
    Case("Excel", archive("xl/workbook.xml", "[Content_Types].xml"), "Excel workbook .*save"),
    Case("old Excel", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + b"\0" * 100, "old Excel workbook"),
    Case("OpenDocument", archive("content.xml", "mimetype"), "OpenDocument"),
    Case("zip", archive("reviews.csv"), "a zip archive; unpack"),
    Case("a broken zip", archive("reviews.csv")[:30], "damaged zip"),
    Case("gzip", gzip.compress(rows().encode()), "gzip.*unpack"),
    Case("a pickle", pickle.dumps({"body": TEXTS}), "pickle, which can run code"),
    Case("SQLite", b"SQLite format 3\0" + b"\0" * 100, "SQLite"),
    Case("a web page", "<!DOCTYPE html><html>not found</html>", "web page", file="reviews.dat"),
    Case("a pointer", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    Case("random bytes", bytes(range(128, 256)) * 9, "line 1: byte 0x80 is not UTF-8"),
    # ---- Parquet
    Case("Parquet", PARQUET, says=("Parquet", "40 of 2 columns"), file="reviews.bin"),
    Case("half a Parquet file", PARQUET[: len(PARQUET) // 2], "cannot read .* as Parquet"),
    Case(
        "bytes in Parquet",
        parquet(
            body=[f"café {i} is good".encode("latin-1") for i in range(40)], label=["a", "b"] * 20
        ),
        r"row 1: column 'body' holds bytes that are not utf-8; name the encoding",
    ),
    Case(
        "bytes in Parquet, named",
        parquet(
            body=[f"café {i} is good".encode("latin-1") for i in range(40)], label=["a", "b"] * 20
        ),
        says=("40 of 2",),
        recipe={"encoding": "latin-1"},
    ),
    Case(
        "lists", parquet(body=[[t] for t in TEXTS], label=["a", "b"] * 20), "list<.*give a column"
    ),
    Case(
        "categories, truth values",
        parquet(body=pyarrow.array(TEXTS).dictionary_encode(), label=[True, False] * 20),
        says=("'False'",),
    ),
    # ---- JSON
    Case("JSON lines", jsonl(*OBJECTS), says=("JSON lines",), file="reviews.jsonl"),
    Case("a JSON array", json.dumps(OBJECTS), "JSON array; write JSON lines", file="r.json"),
    Case(
        "JSON of two kinds",
        jsonl({"body": "a", "label": 1}, {"body": "b", "label": "x"}),
        "line 2 holds a text in 'label', and line 1 a number",
        file="r.jsonl",
    ),
    Case(
        "damaged JSON",
        jsonl(*OBJECTS[:3]) + b'{"body": "x", \n',
        r"line 4 is no JSON \(.*one object in each line",
        file="r.jsonl",
    ),
    Case(
        "nested JSON",
        jsonl(*({"body": {"en": t}, "label": i % 2} for i, t in enumerate(TEXTS))),
        "line 1 holds an object in 'body'",
        file="r.jsonl",
    ),
    Case(
        "half of a character",
        b'{"body": "\\ud800", "label": 1}\n',
        "line 1 holds half of a character",
        file="r.jsonl",
    ),
    Case(
        "dates in JSON stay text",
        jsonl(*({"body": t, "label": f"2020-01-0{1 + i % 2}"} for i, t in enumerate(TEXTS))),
        says=("'2020-01-01'",),
        file="r.jsonl",
    ),
    Case(
        "JSON in utf-16",
        jsonl(*OBJECTS).decode().encode("utf-16"),
        says=("JSON lines, utf-16",),
        file="r.jsonl",
    ),
    # ---- Labels
    Case(
        "blank labels",
        rows(labels=lambda i: "" if i in (4, 8) else str(i % 2), text=lambda i: f'"a\n b {i}"'),
        r"2 rows have a text and no label in column 'label', the first in line 10; .*blank_labels",
    ),
    Case(
        "blank labels, dropped",
        rows(labels=lambda i: " " if i in (4, 8) else str(i % 2)),
        says=("2 rows without a label",),
        recipe={"blank_labels": "drop"},
    ),
    Case(
        "a class NA",
        rows(labels=lambda i: ("NA", "EU")[i % 2]),
        says=("'NA' ", "warning: taken as classes, not as missing: 'NA' (20)"),
    ),
    Case(
        "NA that is missing",
        rows(labels=lambda i: ("NA", "EU", "US", "AS")[i % 4]),
        says=("10 rows without a label",),
        recipe={"missing": ["NA"], "blank_labels": "drop"},
    ),
    Case(
        "spellings",
        rows(labels=lambda i: (" pos", "POS", "neg", "pos")[i % 4]),
        says=("warning: labels that differ only in spaces, case", "normalize_labels: true"),
    ),
    Case(
        "spellings made one",
        rows(labels=lambda i: (" pos", "POS ", "neg", "pos", "1.0", "1")[i % 6]),
        says=("labels made one", "'1' "),
        recipe={"normalize_labels": True, "fractions": (0.5, 0.1, 0.4)},
    ),
    Case(
        "a rare class",
        rows(labels=lambda i: "rare" if i == 3 else str(i % 2)),
        r"1 classes have fewer than data\.min_per_class = 5 examples: 'rare' \(1\)",
        recipe={"min_per_class": 5},
    ),
    Case(
        "a rare class, dropped",
        rows(labels=lambda i: "rare" if i == 3 else str(i % 2)),
        says=("1 rows of 1 rare classes: 'rare' (1)",),
        recipe={"min_per_class": 5, "rare_classes": "drop"},
    ),
    Case(
        "a class that a part lacks",
        rows(labels=lambda i: "rare" if i == 3 else str(i % 2)),
        r"part has no example of class 'rare' \(1 in all\); .*data\.min_per_class",
    ),
    Case("one class", rows(labels=lambda i: "pos"), "only the label 'pos'"),
    Case("a quantity", rows(labels=lambda i: f"{i * 1.7:.2f}"), "a quantity: .*no regression"),
    Case("names", rows(labels=lambda i: f"name {i}"), "40 different values in 40 rows"),
    Case(
        "fraud",
        rows(
            labels=lambda i: "fraud" if i < 8 else "no",
            text=lambda i: f"payment number {i} made",
            count=400,
        ),
        says=("of class 'fraud': figures about so few say little", "right as often"),
    ),
    # ---- Texts
    Case(
        "empty rows",
        rows() + ",\n" * 30 + ",pos\n" * 5,
        says=("30 empty rows", "5 rows without text", "75 of 2"),
    ),
    Case("no text at all", "body,label\n,a\n,b\n", "no text in 'body' with a label"),
    Case(
        "copies",
        rows() + f"{TEXTS[0]},neg\n{TEXTS[1]},neg\n",
        says=("2 rows repeat the text of another one; 1 texts", "warning: 1 texts have different"),
    ),
    Case(
        "numbers joined as text",
        "age,income,home,label\n"
        + "".join(f"{20 + i},{i * 10.5},OWN,{i % 2}\n" for i in range(40)),
        says=("'age', 'income' hold numbers", "the file looks like numbers and categories"),
        recipe={"text": ["age", "income", "home"]},
    ),
    Case(
        "ratings",
        "user_id,item_id,rating\n" + "".join(f"u{i % 9},i{i},{1 + i % 2}\n" for i in range(80)),
        says=("the file looks like ratings of items by users ('user_id', 'item_id', 'rating')",),
        recipe={"text": ["user_id", "item_id"], "label": "rating"},
    ),
    Case(
        "clicks",
        "SessionId,ItemId,Time,Clicked\n"
        + "".join(f"s{i % 9},i{i},{1600000000 + i},{i % 2}\n" for i in range(80)),
        says=("the file looks like clicks",),
        recipe={"text": ["SessionId", "ItemId"], "label": "Clicked"},
    ),
    Case(
        "the label under another name",
        rows(
            text=lambda i: f"{TEXTS[i]},{i % 2}",
            header="body,copy,label",
            labels=lambda i: str(i % 2),
        ),
        says=("the text column 'copy' says the label of every row", "'copy' hold numbers"),
        recipe={"text": ["body", "copy"]},
    ),
    Case(
        "escapes for the terminal",
        rows(labels=lambda i: "\x1b[31mred" if i % 2 else "\u202eevil"),
        says=(r"\x1b[31mred", r"\u202eevil"),
    ),
]


def section(path: Path, changes: dict[str, Any]) -> DataRecipe:
    start = {"path": str(path), "text": ["body"], "label": "label", "fractions": (0.6, 0.1, 0.3)}
    return DataRecipe.model_validate(start | changes)


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
    os.mkfifo(tmp_path / "pipe.csv")
    with pytest.raises(InputError, match="no regular file"):
        recognise(tmp_path / "pipe.csv")
    with pytest.raises(InputError, match=r"check data\.path"):
        recognise(tmp_path / "absent.csv")


def test_columns_are_told_apart() -> None:
    assert look(["1", "2.5", "-3e4", ""]).kind == "numbers"
    assert look(["a red dress", "it does not fit"]).kind == "prose"
    assert look(["这件衣服很好看", "不合身而且太贵"]).kind == "prose"
    assert look(["OWN", "RENT"]).kind == "words"
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
