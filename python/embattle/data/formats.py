"""What a table file is: its kind, its encoding and its delimiter, found out before it is read."""

from __future__ import annotations

import codecs
import csv
import dataclasses
import io
import itertools
import json
import os
import re
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from embattle.errors import InputError

DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
_GIVE = "give a CSV file with a header line, a Parquet file, or JSON lines"
_BLOCK = 1 << 20
_SAMPLE = 1 << 18
_HEADER = 1 << 24

# Stands for a delimiter of several characters; it is in no text.
_SEPARATOR = "\x1f"

# RecBole's header cells: a name and a type.
_ATOMIC = re.compile(r"(\S.*):(?:token|token_seq|float|float_seq)")
# GroupLens' files without a header line: names by the file's name and the number of columns.
_EVENT = ("user_id", "item_id", "rating", "timestamp")
_GENRES = (
    *("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime"),
    *("Documentary", "Drama", "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance"),
    *("Sci-Fi", "Thriller", "War", "Western"),
)
_GROUPLENS = {
    ("u.user", 5): ("user_id", "age", "gender", "occupation", "zip_code"),
    ("u.item", 24): ("item_id", "title", "release_date", "video_release_date", "url", *_GENRES),
    ("users.dat", 5): ("user_id", "gender", "age", "occupation", "zip_code"),
    ("movies.dat", 3): ("item_id", "title", "genres"),
}
_GROUPLENS_NAME = re.compile(r"u\.data|u\w\.(base|test)", re.IGNORECASE)

# First bytes of files that are no tables here: what they are, and what to do with them.
_OTHERS = (
    (b"\xd0\xcf\x11\xe0", "an old Excel workbook (.xls); save the sheet as CSV"),
    (b"\x1f\x8b", "compressed (gzip); unpack it first"),
    (b"BZh", "compressed (bzip2); unpack it first"),
    (b"\x28\xb5\x2f\xfd", "compressed (zstd); unpack it first"),
    (b"\xfd7zXZ", "compressed (xz); unpack it first"),
    (b"7z\xbc\xaf", "a 7z archive; unpack it first"),
    (b"Rar!", "a RAR archive; unpack it first"),
    (b"ARROW1", "an Arrow (Feather) file; write it as Parquet"),
    (b"ORC", "an ORC file; write it as Parquet"),
    (b"Obj\x01", "an Avro file; write it as Parquet"),
    (b"PARE", "an encrypted Parquet file; decrypt it first"),
    (b"SQLite format 3", "an SQLite database; export the table as CSV"),
    (b"\x89HDF", "an HDF5 file; export the table as CSV or Parquet"),
    (b"\x93NUMPY", "a NumPy array; write a table with named columns"),
    (b"\x80\x02", "a pickle, which can run code and is never read; write CSV or Parquet"),
    (b"\x80\x03", "a pickle, which can run code and is never read; write CSV or Parquet"),
    (b"\x80\x04", "a pickle, which can run code and is never read; write CSV or Parquet"),
    (b"\x80\x05", "a pickle, which can run code and is never read; write CSV or Parquet"),
    (b"%PDF", "a PDF document; export the table as CSV"),
    (b"\x89PNG", "a picture"),
    (b"\xff\xd8\xff", "a picture"),
    (b"version https://git-lfs", "a pointer of Git LFS, not the data; run `git lfs pull`"),
)


def delimiter_of(word: str | None) -> str | None:
    """A delimiter as it is given: a tab also by its name."""
    return "\t" if word in ("tab", "\\t") else word


@dataclass(frozen=True)
class Format:
    """How a file is written.

    Attributes:
        kind: of the file.
        encoding: Python's name of the text's encoding.
        delimiter: between the cells of a CSV file; of several characters in GroupLens' files.
        guessed: whether the delimiter was found out rather than given.
        skip: lines before the header of a CSV file.
        names: the columns, where the file does not name them or names them with their types.
        header: whether a CSV file has a header line.
        style: whose kind of CSV file it is: `GroupLens`, `RecBole` or nobody's.
        sample: the first 256 KiB of the text, whole lines only.
        cut: whether the file has more text.
    """

    kind: Literal["csv", "jsonl", "parquet"]
    encoding: str = "utf-8"
    delimiter: str = ","
    guessed: bool = True
    skip: int = 0
    names: tuple[str, ...] = ()
    header: bool = True
    style: str = ""
    sample: str = ""
    cut: bool = False

    def words(self) -> str:
        """The format in words."""
        if self.kind == "parquet":
            return "Parquet"
        if self.kind == "jsonl":
            return f"JSON lines, {self.encoding}"
        name = DELIMITERS.get(self.delimiter, repr(self.delimiter))
        how = "guessed" if self.guessed else "given"
        bare = "" if self.header else ", no header line"
        return f"{self.style or 'CSV'}, {self.encoding}, delimiter {name} ({how}){bare}"

    def records(self) -> list[list[str]]:
        """The sample's records, the names of the columns first; blank lines left out."""
        found = _records(self.sample, self.delimiter, self.skip)
        if not self.names:
            return found
        return [list(self.names), *found[int(self.header) :]]

    @property
    def separator(self) -> str:
        """One character that stands between the cells once the text is `plain`."""
        return self.delimiter if len(self.delimiter) == 1 else _SEPARATOR

    def plain(self, text: str) -> str:
        """The text with `separator` between the cells."""
        return text if len(self.delimiter) == 1 else text.replace(self.delimiter, _SEPARATOR)


def recognise(
    path: Path,
    wanted: Sequence[str] = (),
    *,
    encoding: str | None = None,
    delimiter: str | None = None,
    header: Sequence[str] | None = None,
) -> Format:
    """Finds out how a file is written, and reads a text file through once to see that it is text.

    Args:
        path: the file.
        wanted: columns that will be read; a delimiter that gives them is preferred.
        encoding: of the text; None takes UTF-8, or UTF-16 where the file begins with its mark.
        delimiter: one character, or several; None guesses among comma, semicolon, tab, bar and
            the `::` of GroupLens.
        header: names of the columns of a CSV file without a header line.

    Returns:
        The format.

    Raises:
        InputError: if the file is no table, or its bytes are not in the encoding: then the line of
            the first bad byte is named.
    """
    if delimiter is not None and (
        not delimiter or not delimiter.isascii() or any(c in '\r\n"' for c in delimiter)
    ):
        raise InputError(
            f"the delimiter must be ASCII characters that are no quote and no line break, got "
            f"{delimiter!r}; give one, such as ';' or tab"
        )
    if os.path.isdir(path) and parquet_files(path):
        return Format("parquet")
    head = _head(path)
    if head[:4] == b"PAR1":
        return Format("parquet")
    if head[:4] == b"PK\x03\x04":
        raise InputError(f"{path} is {_zip(path)}; {_GIVE}")
    for magic, what in _OTHERS:
        if head.startswith(magic):
            raise InputError(f"{path} is {what}; {_GIVE}")
    if head[257:262] == b"ustar":
        raise InputError(f"{path} is a tar archive; unpack it first; {_GIVE}")
    chosen = _encoding(encoding, head)
    sample, size = _read_through(path, chosen, given=encoding is not None)
    start = sample.lstrip("\ufeff \t\r\n")
    if not start:
        raise InputError(f"{path} is empty; {_GIVE}")
    if start[:1] == "<" and start[:200].lower().startswith(("<!doctype", "<html", "<?xml", "<svg")):
        raise InputError(f"{path} is a web page or XML, not a table; download the file itself")
    if _is_object(start):
        return Format("jsonl", chosen, sample=sample)
    if path.suffix.lower() not in {".csv", ".tsv", ".txt"}:
        if start.startswith("{"):
            return Format("jsonl", chosen, sample=sample)
        if start.startswith("["):
            raise InputError(
                f"{path} is a JSON array; write JSON lines: one object in each line, no brackets"
            )
    skip, guessed = _lines_before(sample), delimiter is None
    if delimiter is None and start[:4].lower() == "sep=" and start[5:6] in ("\r", "\n"):
        # Excel's own mark: a line that names the delimiter.
        delimiter, guessed, skip = start[4], False, skip + 1
    if delimiter is None:
        delimiter = _delimiter(sample, [] if header else wanted, skip)
    form = Format("csv", chosen, delimiter, guessed, skip, sample=sample, cut=len(sample) < size)
    if header:
        return dataclasses.replace(form, names=tuple(header), header=False)
    return _of_a_library(form, path.name)


def _of_a_library(form: Format, name: str) -> Format:
    """The format with names for the columns, if the file is one of GroupLens' or RecBole's."""
    first = next(iter(form.records()), [])
    typed = [_ATOMIC.fullmatch(cell) for cell in first]
    if first and all(typed):
        names = tuple(found[1] for found in typed if found)
        return dataclasses.replace(form, names=names, style="RecBole atomic file")
    names = _GROUPLENS.get((name.lower(), len(first)), ())
    rating = len(first) == 4 and form.delimiter in ("\t", "::") and all(map(_is_number, first))
    if rating and (form.delimiter == "::" or _GROUPLENS_NAME.fullmatch(name)):
        names = _EVENT
    if not names or not _is_number(first[0]):
        return form
    return dataclasses.replace(form, names=names, header=False, style="GroupLens")


def _is_object(text: str) -> bool:
    """Whether the first line is a JSON object."""
    try:
        return text.startswith("{") and isinstance(json.loads(text.split("\n", 1)[0]), dict)
    except (ValueError, RecursionError):
        return False


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def parquet_files(path: Path) -> list[Path]:
    """The file, or those of a folder of Parquet files in the order of their names.

    Files whose names begin with `.` or `_` are marks of whoever wrote the folder. A folder that
    holds anything else is none.
    """
    if not path.is_dir():
        return [path]
    found = sorted(file for file in path.iterdir() if not file.name.startswith((".", "_")))
    for file in found:
        if not file.is_file() or not file.name.lower().endswith((".parquet", ".pq")):
            return []
    return found


def _head(path: Path) -> bytes:
    try:
        if path.is_dir():
            raise InputError(f"{path} is a folder, and not one of Parquet files alone; {_GIVE}")
        if path.exists() and not path.is_file():
            raise InputError(f"{path} is no regular file; {_GIVE}")
        with path.open("rb") as stream:
            head = stream.read(512)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read {path}: {reason}; check data.path") from error
    if not head:
        raise InputError(f"{path} is empty; {_GIVE}")
    return head


def _zip(path: Path) -> str:
    """What a file that begins like a zip archive is."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return "a damaged zip archive"
    if any(name.startswith("xl/") for name in names):
        return "an Excel workbook (.xlsx); save the sheet as CSV"
    if "content.xml" in names:
        return "an OpenDocument file; save the sheet as CSV"
    return "a zip archive; unpack it first"


def _encoding(given: str | None, head: bytes) -> str:
    if given is None:
        if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
            return "utf-32"
        if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return "utf-16"
        return "utf-8-sig" if head.startswith(codecs.BOM_UTF8) else "utf-8"
    try:
        found = codecs.lookup(given)
        "".encode(given)
    except (LookupError, ValueError, TypeError) as error:
        raise InputError(
            f"data.encoding: {given!r} is no text encoding that Python knows; for instance "
            "utf-8, cp1252, latin-1, utf-16, gb18030, shift_jis"
        ) from error
    if found.name == "utf-8" and head.startswith(codecs.BOM_UTF8):
        return "utf-8-sig"
    return found.name


def _read_through(path: Path, encoding: str, *, given: bool) -> tuple[str, int]:
    """Decodes the whole file once.

    Returns:
        Its beginning, cut at a line's end where it is not all of it, and its characters in all.
    """
    decoder = codecs.getincrementaldecoder(encoding)("strict")
    sample, lines, size = "", 1, 0
    with path.open("rb") as stream:
        while True:
            block = stream.read(_BLOCK)
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise InputError(_bad_byte(path, encoding, given, lines, error)) from error
            except UnicodeError as error:
                raise InputError(
                    f"{path} is not {encoding} ({error}); check data.encoding"
                ) from error
            if "\0" in text:
                raise InputError(_nul(path, lines + _line_ends(text[: text.index("\0")])))
            lines += _line_ends(text)
            size += len(text)
            # A header line longer than the sample is wanted whole.
            if len(sample) < _SAMPLE or (len(sample) < _HEADER and not _line_ends(sample)):
                sample += text
            if not block:
                break
    if size > _SAMPLE:
        end = max(sample.rfind("\n", 0, _SAMPLE), sample.rfind("\r", 0, _SAMPLE)) + 1
        first = re.search(r"\r\n?|\n", sample)
        sample = sample[: end or (first.end() if first else _HEADER)]
    return sample, size


def _line_ends(text: str) -> int:
    return text.count("\n") or text.count("\r")


def _nul(path: Path, line: int) -> str:
    return (
        f"{path}, line {line}: a NUL character; the file is binary, damaged, or in an encoding "
        f"such as utf-16 (data.encoding); {_GIVE}"
    )


def _bad_byte(path: Path, encoding: str, given: bool, lines: int, error: UnicodeDecodeError) -> str:
    """The message about the first byte that is not in the encoding."""
    before = error.object[: error.start]
    line = lines + _line_ends(before.decode(encoding, "ignore"))
    if b"\0" in before:
        return _nul(path, lines + _line_ends(before[: before.index(b"\0")].decode("latin-1")))
    if error.reason in (
        "unexpected end of data",
        "truncated data",
        "incomplete multibyte sequence",
    ):
        return (
            f"{path}, line {line}: the file ends in the middle of a character: it was cut off, or "
            f"is not {encoding.upper()}; get it again, or see data.encoding"
        )
    near = error.object[max(0, error.start - 12) : error.start + 12]
    shown = near.decode("cp1252", "replace").strip()
    remedy = (
        "name the right one in data.encoding"
        if given
        else f"name the file's encoding in data.encoding (as cp1252 this reads {shown!r})"
    )
    byte = error.object[error.start]
    name = encoding.removesuffix("-sig").upper()
    return f"{path}, line {line}: byte 0x{byte:02X} is not {name}; {remedy}"


def _lines_before(sample: str) -> int:
    """Blank lines at the beginning."""
    return sum(1 for _ in itertools.takewhile(lambda line: not line.strip(), io.StringIO(sample)))


def _records(text: str, delimiter: str, skip: int) -> list[list[str]]:
    if len(delimiter) > 1:
        text, delimiter = text.replace(delimiter, _SEPARATOR), _SEPARATOR
    lines = itertools.islice(io.StringIO(text.removeprefix("\ufeff"), newline=""), skip, None)
    found: list[list[str]] = []
    try:
        for record in csv.reader(lines, delimiter=delimiter):
            if record:
                found.append(record)
            if len(found) > 1000:
                break
    except csv.Error:
        pass  # a cell too long for this reader: what was read before is sample enough
    return found


def _delimiter(sample: str, wanted: Sequence[str], skip: int) -> str:
    """The delimiter that gives the wanted columns, else the most regular table of several."""

    def fit(delimiter: str) -> tuple[bool, bool, float, int]:
        records = _records(sample, delimiter, skip)[:100]
        if not records:
            return False, False, 0.0, 0
        width = len(records[0])
        share = sum(len(record) == width for record in records) / len(records)
        has = bool(wanted) and set(wanted) <= set(records[0])
        return has, width > 1 and share > 0.5, share, width

    return max([*DELIMITERS, "::"], key=fit)


def line_of(path: Path, form: Format, row: int) -> str:
    """Where a row is in a file, in words that a text editor understands where it can be told.

    Args:
        path: the file.
        form: its format.
        row: number of the row, from 0, as it was read.
    """
    whole = (line for line, whole in lines_of_rows(path, form) if whole)
    line = next(itertools.islice(whole, row, None), None)
    return f"line {line}" if line else f"row {row + 1}"


def lines_of_rows(path: Path, form: Format) -> Iterator[tuple[int, bool]]:
    """The line on which each row of a file begins, as far as that can be told.

    Yields:
        The line, from 1, and whether the row has the header's number of cells. Of a Parquet file
        nothing.
    """
    if form.kind == "parquet":
        return
    with path.open(encoding=form.encoding, newline="") as stream:
        if form.kind == "jsonl":
            yield from ((i, True) for i, line in enumerate(stream, 1) if line.strip())
            return
        lines = map(form.plain, itertools.islice(stream, form.skip, None))
        reader = csv.reader(lines, delimiter=form.separator)
        width, begins, header = None, form.skip + 1, form.header
        with suppress(csv.Error):  # a cell too long for this reader
            for record in reader:
                width = width or len(record)
                if not header:
                    yield begins, len(record) == width or not record
                begins, header = form.skip + reader.line_num + 1, False


def unclosed_quote(path: Path, form: Format) -> int | None:
    """The line of a CSV file on which a quote opens that is never closed; None if there is none."""
    with path.open(encoding=form.encoding, newline="") as stream:
        if sum(line.count('"') for line in stream) % 2 == 0:
            return None
        stream.seek(0)
        lines = map(form.plain, itertools.islice(stream, form.skip, None))
        reader = csv.reader(lines, delimiter=form.separator, strict=True)
        begins = form.skip + 1
        try:
            for _ in reader:
                begins = form.skip + reader.line_num + 1
        except csv.Error as error:
            if "unexpected end" in str(error) or "field limit" in str(error):
                return begins
    return None
