"""What is written about items: a text for each, from columns of a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from embattle.data.account import Account
from embattle.data.keyed import Keyed
from embattle.data.labels import is_blank
from embattle.data.recipe import Place
from embattle.errors import InputError

# isort: split
from pydantic import Field

_SET = {"1", "1.0", "true", "yes"}


class ItemTexts(Place):
    """A table (see `Place`) with a row for each item.

    Attributes:
        key: the column of the items' names, as the table of events has them.
        text: columns of text, joined by a space.
        flags: columns of 0 and 1, such as genres: the names of those with a 1 join the text.
    """

    key: str
    text: list[str] = Field(min_length=1)
    flags: list[str] = Field(default=[])

    def read(self, items: Sequence[str], account: Account) -> list[str]:
        """Read the texts of items; that of an item of which the table says nothing is empty.

        Args:
            items: their names.
            account: is told how many items have no text.

        Raises:
            InputError: the table cannot be read, names an item twice, or has no text of any.
        """
        path = self.table()
        table = Keyed(path, self.key, [*self.text, *self.flags], account, **self.written)
        found = table.columns

        def text(row: int | None) -> str:
            if row is None:
                return ""
            words = [str(found[c][row]).strip() for c in self.text if not is_blank(found[c][row])]
            return " ".join([*words, *(c for c in self.flags if _is_set(found[c][row]))])

        known = [text(table.row(name)) for name in items]
        lacking = known.count("")
        if lacking == len(known):
            raise InputError(
                f"{path}: column {self.key!r} has no text for any of the {len(known):,} items, "
                f"such as {items[0]!r}; check data.items.key and data.items.text"
            )
        account.note("texts of items", f"{path}: {len(known) - lacking:,} of {len(known):,} items")
        if lacking:
            account.warn(f"{lacking:,} items have no text: they are known by who met them alone")
        return known


def _is_set(cell: Any) -> bool:
    return str(cell).strip().lower() in _SET
