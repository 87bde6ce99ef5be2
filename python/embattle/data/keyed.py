"""Tables that say one thing about each value of a column, such as of items."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from embattle.data.account import Account
from embattle.data.labels import is_blank
from embattle.data.tables import read_columns
from embattle.errors import InputError

# A whole number that was once a float.
_WHOLE = re.compile(r"^([+-]?\d+)\.0+$")


def plain_name(cell: Any) -> str:
    """A value by its name: whole numbers are the same with and without a point."""
    return _WHOLE.sub(r"\1", str(cell).strip())


class Keyed:
    """Some columns of a table, whose rows are found by the value of one.

    Args:
        path: the table.
        key: the column that says what a row is about; a row without it is about nothing.
        columns: the others.
        account: is told what was read.
        written: see `Table`.

    Attributes:
        columns: the values of each column, by row.

    Raises:
        InputError: the table cannot be read, or says two things about a value of `key`.
    """

    def __init__(
        self, path: Path, key: str, columns: Sequence[str], account: Account, **written: Any
    ) -> None:
        self.columns = read_columns(path, [key, *columns], account, **written)
        others = [(name, self.columns[name]) for name in columns if name != key]
        self._rows: dict[str, int] = {}
        for row, cell in enumerate(self.columns[key]):
            if is_blank(cell):
                continue
            first = self._rows.setdefault(plain_name(cell), row)
            if first == row:
                continue
            # The same once more is nothing new: the table may be that of the events themselves.
            values = ((name, str(found[row]), str(found[first])) for name, found in others)
            other = next((name for name, one, two in values if one != two), None)
            if other is not None:
                raise InputError(
                    f"{path}: column {key!r} names {str(cell)!r} twice, with different values of "
                    f"{other!r}; give one row for each"
                )

    def row(self, value: Any) -> int | None:
        """The row that is about a value of the key; None if there is none."""
        return self._rows.get(plain_name(value))
