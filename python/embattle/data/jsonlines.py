"""JSON lines, read as they stand: a number keeps its digits, and every complaint has a line."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from embattle.errors import InputError

_ONE = "JSON lines have one object in each line"

#: Is told of a row that is left out: its number in the file, from 0, and what is wrong with it.
OnBad = Callable[[int, str], None]


class _Number(str):
    """A number as it is written."""


class _Refused(InputError):
    """A line that is refused.

    Args:
        message: the whole one.
        what: is wrong, without the file and the line.
    """

    def __init__(self, message: str, what: str) -> None:
        super().__init__(message)
        self.what = what


class Objects:
    """The objects of a file of JSON lines, a block at a time.

    Args:
        path: the file.
        encoding: of its text.
        columns: the wanted keys; None takes all.
        longest: characters that a line may have.
        lists: keys that may hold lists of texts and numbers, which are given as lists of texts.
        on_bad: is told of each line that is no such object, with its number among those that are
            not blank (from 0) and what is wrong; the line is left out. None: it is an error.

    Attributes:
        names: keys seen so far, in order of appearance.
        rows: objects read so far.
        bad: lines left out so far.
        nested: keys seen so far that hold lists or objects; of all keys, where none are wanted.
    """

    def __init__(
        self,
        path: Path,
        encoding: str,
        columns: Sequence[str] | None,
        longest: int,
        *,
        lists: Collection[str] = (),
        on_bad: OnBad | None = None,
    ) -> None:
        self.path, self.encoding, self.columns, self.longest = path, encoding, columns, longest
        self.lists, self.on_bad = lists, on_bad
        self.names: dict[str, None] = {}
        self.nested: set[str] = set()
        self.rows = self.bad = 0
        self._kinds: dict[str, tuple[str, int]] = {}
        self._line = 0

    def blocks(self, size: int) -> Iterator[dict[str, list[Any]]]:
        """Blocks of about `size` characters; a key that an object lacks is None.

        Raises:
            InputError: about a line that is no object, has a key twice, holds a list or an object
                in a wanted key, or a number where a line before has a text.
        """
        found: list[dict[str, Any]] = []
        held = 0
        with self.path.open(encoding=self.encoding, newline="\n") as stream:
            while line := stream.readline(self.longest + 1):
                self._line += 1
                if len(line) > self.longest:
                    self._refuse(f"is longer than {self.longest >> 20} Mi characters")
                if line.isspace():
                    continue
                try:
                    found.append(self._object(line))
                except _Refused as error:
                    if self.on_bad is None:
                        raise
                    self.on_bad(self.rows + len(found) + self.bad, error.what)
                    self.bad += 1
                    continue
                held += len(line)
                if held >= size:
                    yield self._block(found)
                    found, held = [], 0
        if found:
            yield self._block(found)

    def _block(self, found: list[dict[str, Any]]) -> dict[str, list[Any]]:
        self.rows += len(found)
        wanted = self.names if self.columns is None else self.columns
        return {name: [x.get(name) for x in found] for name in wanted}

    def _object(self, line: str) -> dict[str, Any]:
        try:
            found = json.loads(
                line,
                parse_int=_Number,
                parse_float=_Number,
                parse_constant=lambda name: None if name == "NaN" else _Number(name),
                object_pairs_hook=self._pairs,
            )
        except json.JSONDecodeError as error:
            reason = f"is no JSON ({error.msg}, column {error.colno}); {_ONE}"
            self._refuse(reason, error)
        except RecursionError as error:
            self._refuse("is nested too deeply", error)
        if not isinstance(found, dict):
            self._refuse(f"is no object; {_ONE}")
        self.names.update(dict.fromkeys(found))
        for name, value in found.items():
            if self.columns is None or name in self.columns:
                found[name] = self._cell(name, value)
        return found

    def _pairs(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            self._refuse(f"has the name {twice!r} twice")
        return found

    def _cell(self, name: str, value: Any) -> str | list[str] | None:
        """A cell as text; kinds of values may not change from line to line."""
        if value is None:
            return None
        kind = "a number" if isinstance(value, _Number) else "a text"
        if isinstance(value, bool):
            kind, value = "a truth value", str(value)
        elif isinstance(value, list) and name in self.lists:
            if not all(isinstance(item, str) for item in value):
                self._refuse(f"holds what is neither text nor number in the list {name!r}")
            return [self._whole(name, item) for item in value]
        elif isinstance(value, (dict, list)):
            if self.columns is None:
                self.nested.add(name)
                return json.dumps(value)
            what = "an object" if isinstance(value, dict) else "a list"
            self._refuse(f"holds {what} in {name!r}; give a column of text or numbers")
        before, line = self._kinds.setdefault(name, (kind, self._line))
        if before != kind and self.columns is not None:
            self._refuse(
                f"holds {kind} in {name!r}, and line {line} {before}; write all of a column alike"
            )
        return self._whole(name, value)

    def _whole(self, name: str, value: str) -> str:
        try:
            value.encode()
        except UnicodeEncodeError as error:
            self._refuse(f"holds half of a character (a lone surrogate) in {name!r}", error)
        return str(value)

    def _refuse(self, what: str, cause: Exception | None = None) -> NoReturn:
        raise _Refused(f"{self.path}, line {self._line} {what}", what) from cause
