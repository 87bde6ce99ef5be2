"""Files that a user may give, good, odd and hostile, and what comes of each."""

from __future__ import annotations

import bz2
import datetime
import decimal
import gzip
import io
import json
import lzma
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet

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


def tar() -> bytes:
    stream = io.BytesIO()
    content = rows().encode()
    with tarfile.open(fileobj=stream, mode="w") as file:
        info = tarfile.TarInfo("reviews.csv")
        info.size = len(content)
        file.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def numbered(*values: Any) -> bytes:
    """JSON lines with these labels in turn."""
    return jsonl(*({"body": t, "label": values[i % len(values)]} for i, t in enumerate(TEXTS)))


def damaged(content: bytes, first: int, last: int) -> bytes:
    return bytes(b ^ 0x5A if first <= i < last else b for i, b in enumerate(content))


HEADLESS = rows().split("\n", 1)[1]
ENDS = ("\n", "\r\n", "\r")

CASES += [
    # ---- More encodings
    Case("utf-32 with its mark", ACCENTS.encode("utf-32"), says=("utf-32", "40 of 2 columns")),
    Case(
        "Excel's Unicode text",
        rows(header="body\tlabel", sep="\t").encode("utf-16"),
        says=("CSV, utf-16, delimiter tab",),
    ),
    Case("half of a utf-16 character", ACCENTS.encode("utf-16")[:-1], "line 41: the file ends in"),
    Case("half of a utf-8 character", rows().encode() + b"caf\xc3", "line 42: the file ends in"),
    Case("a surrogate in utf-8", rows().encode() + b"\xed\xa0\x80,pos\n", "line 42: byte 0xED"),
    Case("an overlong slash", rows().encode() + b"a\xc0\xaf b,pos\n", "line 42: byte 0xC0"),
    Case("two marks", "\ufeff\ufeff" + rows(), says=("40 of 2 columns",)),
    Case(
        "Chinese in gbk, named",
        rows(text=lambda i: f"这件衣服 {i} 很好看").encode("gbk"),
        says=("CSV, gbk",),
        recipe={"encoding": "gbk"},
    ),
    Case("no encoding of texts", rows(), "data.encoding: 'rot13'", recipe={"encoding": "rot13"}),
    # ---- More lines, delimiters and quotes
    Case(
        "three kinds of line ends",
        "body,label\r\n" + "".join(f"{TEXTS[i]},{i % 2}{ENDS[i % 3]}" for i in range(40)),
        says=("40 of 2 columns",),
    ),
    Case(
        "blank lines between",
        rows().replace("\n", "\n\n"),
        says=("81 of 2 columns", "41 empty rows"),
    ),
    Case(
        "other line breaks in texts",
        rows(text=lambda i: f"a\u2028b {i} c\x0c\x0b\x85d"),
        says=("40 of 2 columns",),
    ),
    Case("a mark of DOS at the end", rows() + "\x1a", "1 rows do not .* first is row 42 with 1"),
    Case("a comment first", "# exported today\n" + rows(), "the first line looks like a comment"),
    Case(
        "comments between",
        rows().replace("\n", "\n# c\n", 3),
        "3 rows do not have the header's 2 cells; the first is row 2 with 1",
    ),
    Case(
        "comments between, dropped",
        rows().replace("\n", "\n# c\n", 3),
        says=("3 rows with too few or too many cells",),
        recipe={"ragged_rows": "drop"},
    ),
    Case(
        "a delimiter too many in each row",
        rows(end=",\n").replace("label,", "label"),
        "40 rows do not have the header's 2 cells",
    ),
    Case(
        "delimiters at the ends of all lines",
        "body,label,\n" + HEADLESS.replace("\n", ",\n"),
        says=("40 of 3 columns",),
    ),
    Case(
        "quotes escaped by backslashes",
        rows(text=lambda i: f'"he said \\"hi, {i}\\" ok"'),
        "40 rows do not have the header's 2 cells",
    ),
    Case(
        "single quotes around commas",
        rows(text=lambda i: f"'well, {i}'"),
        "40 rows do not have the header's 2 cells",
    ),
    Case(
        "delimiters inside quotes",
        rows(header='"body";"label"', sep=";", text=lambda i: f'"well; {i}"'),
        says=("delimiter semicolon", "40 of 2"),
    ),
    Case(
        "every row of another length, dropped",
        rows(labels=lambda i: "a,b"),
        "none of 40 rows has the header's 2 cells",
        recipe={"ragged_rows": "drop"},
    ),
    Case(
        "carriage returns twice",
        rows(end="\r\r\n"),
        says=("81 of 2 columns", "41 empty rows"),
    ),
    Case("columns by spaces", "body label\n" + "a b\n" * 9, "no column 'body'; did you mean"),
    Case("two colons", rows(header="body::label", sep="::"), says=("delimiter '::' (guessed)",)),
    Case("nothing but delimiters", ",,,\n,,,\n", "no column 'body'"),
    Case("nothing but quotes", '"""\n', "no column 'body'"),
    # ---- More headers
    Case("no header line", HEADLESS, "no column 'body'.*data.header names the columns"),
    Case(
        "no header line, names given",
        HEADLESS,
        says=("no header line", "40 of 2 columns"),
        recipe={"header": ["body", "label"]},
    ),
    Case(
        "names given for more columns",
        HEADLESS,
        "40 rows do not have the header's 3 cells",
        recipe={"header": ["body", "label", "more"]},
    ),
    Case("a header of numbers", "1,2\n3,4\n5,6\n", "the first line holds nothing but numbers"),
    Case("spaces around names", rows(header=" body , label "), "did you mean ' body '"),
    Case("names in capitals", rows(header="Body,Label"), "did you mean 'Body'"),
    Case("a line break in a name", rows(header='"bo\ndy",label'), r"did you mean 'bo\\ndy'"),
    Case(
        "another name twice",
        rows(header="body,x,x,label", sep=",1,2,"),
        says=("40 of 4 columns",),
    ),
    Case(
        "columns without names",
        rows(header=",body,,label", text=lambda i: f"{i},{TEXTS[i]},"),
        says=("40 of 4 columns",),
    ),
    Case(
        "a header longer than the sample",
        ",".join(["body", "label", *(f"column{i}" for i in range(30_000))])
        + "\n"
        + "".join(f"{TEXTS[i]},{i % 2}{',' * 30_000}\n" for i in range(40)),
        says=("40 of 30002 columns",),
    ),
    Case("one column", "body\n" + "\n".join(TEXTS), "no column 'label'"),
    # ---- More cells
    Case(
        "a huge cell",
        rows() + "x" * (1 << 20) + ",pos\n",
        says=("41 of 2 columns",),
    ),
    Case(
        "dates as classes",
        rows(labels=lambda i: f"2020-01-0{1 + i % 2}"),
        says=("'2020-01-01' ",),
    ),
    Case(
        "decimal commas as classes",
        rows(header="body;label", sep=";", labels=lambda i: f"{i % 2},5"),
        says=("delimiter semicolon", "'0,5' "),
    ),
    Case(
        "thousands with commas",
        rows(labels=lambda i: '"1,000"' if i % 2 else '"2,000"'),
        says=("'1,000' ",),
    ),
    Case("formulas", rows(text=lambda i: f"=cmd|'/c calc'!A{i}"), says=("40 of 2 columns",)),
    Case("labels of spaces", rows(labels=lambda i: " "), "40 rows have a text and no label"),
    Case(
        "unbreakable spaces in labels",
        rows(labels=lambda i: "a\u00a0" if i % 2 else "a"),
        says=(r"'a' (20) = 'a\xa0' (20)",),
    ),
    Case(
        "rare classes, merged",
        rows(labels=lambda i: f"rare{i}" if i < 12 else str(i % 2)),
        says=("12 rare classes are now 'other'",),
        recipe={"min_per_class": 5, "rare_classes": "merge"},
    ),
    Case(
        "rare classes, too few to merge",
        rows(labels=lambda i: "rare" if i < 3 else str(i % 2)),
        "1 rare classes have only 3 examples together, fewer than data.min_per_class = 5",
        recipe={"min_per_class": 5, "rare_classes": "merge"},
    ),
    Case(
        "a class that a part lacks, stratified",
        rows(labels=lambda i: "rare" if i < 2 else str(i % 2)),
        says=("'rare' 1",),
        recipe={"stratify": True},
    ),
    # ---- More other kinds
    Case("tar", tar(), "a tar archive; unpack"),
    Case("bzip2", bz2.compress(rows().encode()), "bzip2.*unpack"),
    Case("xz", lzma.compress(rows().encode()), "xz.*unpack"),
    Case("Arrow", b"ARROW1\0\0" + b"x" * 9, "Arrow .*write it as Parquet"),
    Case("a refusal in XML", "<?xml version='1.0'?><Error>AccessDenied</Error>", "web page or XML"),
    Case("Markdown", "| body | label |\n|---|---|\n| a b | x |\n", "no column 'body'"),
    Case("SQL", "INSERT INTO reviews VALUES (1,'a');\n" * 5, "no column 'body'"),
    Case("YAML", "body: a\nlabel: b\n", "no column 'body'"),
    Case("RTF", r"{\rtf1 hello}", "line 1 is no JSON", file="reviews.rtf"),
    # ---- More Parquet
    Case("a damaged page of Parquet", damaged(PARQUET, 4, 200), "cannot read .* as Parquet"),
    Case("Parquet by its first bytes alone", b"PAR1" + b"x" * 40, "cannot read .* as Parquet"),
    Case(
        "Parquet without rows",
        parquet(body=pyarrow.array([], "string"), label=pyarrow.array([], "int8")),
        "has no rows",
    ),
    Case("Parquet without columns", parquet(), "no column 'body'"),
    Case(
        "Parquet with decimals",
        parquet(
            body=pyarrow.array(TEXTS, "large_string"), label=[decimal.Decimal("1.5"), None] * 20
        ),
        "20 rows have a text and no label in column 'label', the first in row 2",
    ),
    Case(
        "Parquet with NaN as label",
        parquet(body=TEXTS, label=[1.0, 2.0] * 19 + [float("nan")] * 2),
        says=("2 rows without a label", "'1.0' "),
        recipe={"blank_labels": "drop"},
    ),
    Case(
        "Parquet with dates",
        parquet(body=TEXTS, label=[datetime.date(2020, 1, 1 + i % 2) for i in range(40)]),
        says=("'2020-01-01' ",),
    ),
    Case(
        "Parquet with nanoseconds",
        parquet(
            body=TEXTS, label=pyarrow.array([10**18 + i % 2 for i in range(40)], "timestamp[ns]")
        ),
        says=("'2001-09-09 01:46:40.000000001' ",),
    ),
    Case(
        "Parquet with dates that Python has not",
        parquet(body=TEXTS, label=pyarrow.array([2**62, 1] * 20, "timestamp[us]")),
        "cannot read .* as Parquet: .*out of range",
    ),
    Case(
        "structures in a column that nobody wants",
        parquet(body=TEXTS, label=["a", "b"] * 20, other=[{"x": [1]}] * 40),
        says=("40 of 3 columns",),
    ),
    # ---- More JSON
    Case("JSON lines called CSV", jsonl(*OBJECTS), says=("JSON lines", "40 of 2")),
    Case(
        "JSON over several lines",
        json.dumps(OBJECTS[0], indent=1),
        "line 1 is no JSON",
        file="r.json",
    ),
    Case(
        "a refusal in JSON",
        '{"error": "not found"}\n',
        "no column 'body'; .*known: error",
        file="r.json",
    ),
    Case(
        "JSON with blank lines",
        jsonl(*OBJECTS).replace(b"\n", b"\n\n"),
        says=("40 of 2",),
        file="r.jsonl",
    ),
    Case(
        "JSON with its mark", b"\xef\xbb\xbf" + jsonl(*OBJECTS), says=("utf-8-sig",), file="r.jsonl"
    ),
    Case(
        "JSON lines end as on Windows",
        jsonl(*OBJECTS).replace(b"\n", b"\r\n"),
        says=("40 of",),
        file="r.jsonl",
    ),
    Case(
        "a JSON name twice",
        b'{"body": "a", "body": "b", "label": 1}\n',
        "line 1 has the name 'body' twice",
        file="r.jsonl",
    ),
    Case(
        "JSON with NaN and without a key",
        jsonl(*OBJECTS, {"body": "a b", "label": float("nan")}, {"body": "c"}, {"label": 1}),
        says=("2 rows without a label", "1 rows without text", "43 of 2"),
        recipe={"blank_labels": "drop"},
        file="r.jsonl",
    ),
    Case(
        "a JSON line that is no object", jsonl(OBJECTS[0], 3), "line 2 is no object", file="r.jsonl"
    ),
    Case(
        "a JSON line that is a list", jsonl(OBJECTS[0], [1]), "line 2 is no object", file="r.jsonl"
    ),
    Case(
        "commas between JSON lines",
        b'{"body": "a"},\n{"body": "b"}\n',
        "line 1 is no JSON",
        file="r.jsonl",
    ),
    Case(
        "comments between JSON lines",
        jsonl(OBJECTS[0]) + b"// x\n",
        "line 2 is no JSON",
        file="r.jsonl",
    ),
    Case(
        "JSON nested without end",
        b'{"body": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n",
        "line 1 is nested too deeply",
        file="r.jsonl",
    ),
    Case("lists in JSON", numbered(["a"]), "line 1 holds a list in 'label'", file="r.jsonl"),
    Case("truth values in JSON", numbered(True, False), says=("'False' ",), file="r.jsonl"),
    Case(
        "whole and broken numbers in JSON",
        numbered(1, 1.0, 2),
        says=("labels that differ only in spaces, case or form", "'1.0' (13)"),
        file="r.jsonl",
    ),
    Case(
        "JSON in latin-1",
        '{"body": "café", "label": 1}\n'.encode("latin-1"),
        "line 1: byte 0xE9 is not UTF-8",
        file="r.jsonl",
    ),
    # ---- Events, which the text job reads only if it is told to
    Case(
        "RecBole's atomic file",
        "user_id:token\titem_id:token\treview:token_seq\tlabel:float\n"
        + "".join(f"{i}\t{i}\t{TEXTS[i]}\t{i % 2}\n" for i in range(40)),
        says=("RecBole atomic file, utf-8, delimiter tab", "40 of 4 columns"),
        recipe={"text": ["review"]},
        file="some.inter",
    ),
    Case(
        "GroupLens' u.data",
        "".join(f"{i % 9}\t{i}\t{1 + i % 2}\t{881250949 + i}\n" for i in range(80)),
        says=("GroupLens, utf-8, delimiter tab (guessed), no header line", "looks like ratings"),
        recipe={"text": ["user_id", "item_id"], "label": "rating"},
        file="u.data",
    ),
    Case(
        "GroupLens' u.item",
        "".join(
            f"{i}|Café {i} (1990)|01-Jan-1990||http://x/{i}" + f"|{i % 2}" * 19 + "\n"
            for i in range(40)
        ).encode("latin-1"),
        says=("GroupLens, iso8859-1, delimiter bar (guessed)", "40 of 24 columns"),
        recipe={"text": ["title"], "label": "Drama", "encoding": "latin-1"},
        file="u.item",
    ),
    Case(
        "GroupLens' movies.dat",
        "".join(f"{i}::Film: number {i} (1990)::{('Drama', 'War')[i % 2]}\n" for i in range(40)),
        says=("GroupLens, utf-8, delimiter '::'", "40 of 3 columns"),
        recipe={"text": ["title"], "label": "genres"},
        file="movies.dat",
    ),
]
