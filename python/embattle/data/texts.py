"""Texts and labels of a file of any size: what is held of a row is a few numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from embattle.data.account import Account, listed
from embattle.data.labels import check_classes, is_blank, unify, unify_rare
from embattle.data.looks import READERS, TABLES, kind_of_table, look, look_all
from embattle.data.splits import number_labels, place
from embattle.data.tables import Table
from embattle.errors import InputError

if TYPE_CHECKING:
    from embattle.data.recipe import DataRecipe

Ints = NDArray[np.int64]
# Different labels, however they are spelled, that are held at most.
_MOST = 100_000


class Reading:
    """One reading of a file: which rows have a text and a label, where each text goes, what is odd.

    Args:
        path: the file.
        recipe: columns, and what is done with odd rows.
        seed: decides the places.
        account: is told what was read, dropped and found.

    Attributes:
        places: of each row with text and label, in the file's order: see `embattle.data.splits`.
        kept: the positions among those rows of the examples to use; set by `classes`.

    Raises:
        InputError: if the file cannot be read, a row has a text and no label and that is refused,
            or no row has both.
    """

    def __init__(self, path: Path, recipe: DataRecipe, seed: int, account: Account) -> None:
        self.recipe, self.seed, self.account = recipe, seed, account
        self.table = Table(
            path,
            [*recipe.text, *recipe.label_columns],
            **recipe.written,
        )
        account.note("file", f"{path}: {self.table.form.words()}")
        self.kept: Ints = np.empty(0, dtype=np.int64)
        self._number: dict[str, int] = {}
        self._first: dict[str, list[str]] = {}
        self._dropped: Counter[str] = Counter()
        self._unlabelled = -1
        self._damaged = 0
        self._copies = dict.fromkeys(recipe.text, True)
        places, labels, hashes = [], [], []
        for texts, codes in self._rows(first=True):
            places.append(np.fromiter((place(text, seed) for text in texts), np.float64))
            hashes.append(np.fromiter(map(hash, texts), np.int64))
            labels.append(np.asarray(codes, dtype=np.int64))
        self.places = np.concatenate([np.empty(0), *places])
        self._hashes = np.concatenate([np.empty(0, dtype=np.int64), *hashes])
        self._labels = np.concatenate([np.empty(0, dtype=np.int64), *labels])
        self._tell()

    def _rows(self, *, first: bool) -> Iterator[tuple[list[str], list[int]]]:
        """Of each block, the texts and label numbers of the rows that have both."""
        recipe, missing = self.recipe, set(self.recipe.missing)
        before = 0
        for block in self.table:
            columns = [
                ["" if is_blank(cell, missing) else str(cell).strip() for cell in block[name]]
                for name in recipe.text
            ]
            texts = [" ".join(filter(None, row)) for row in zip(*columns, strict=True)]
            raw = recipe.labels(block)
            blank = [is_blank(label, missing) for label in raw]
            if first:
                self._look(columns, raw, texts, blank, before)
            before += len(raw)
            rows = [i for i, text in enumerate(texts) if text and not blank[i]]
            number = self._number
            codes = [number.setdefault(str(raw[i]), len(number)) for i in rows]
            if len(number) > _MOST:
                raise InputError(
                    f"column {recipe.label_name!r} holds more than {_MOST:,} different values, so "
                    "it is no label (a text, a name, an identifier?); choose a column of classes"
                )
            yield [texts[i] for i in rows], codes

    def _look(
        self,
        columns: list[list[str]],
        raw: list[Any],
        texts: list[str],
        blank: list[bool],
        before: int,
    ) -> None:
        """Counts what is dropped and odd in a block; `before` rows came before it."""
        labels = ["" if value is None else str(value).strip() for value in raw]
        for name, column in zip(self.recipe.text, columns, strict=True):
            first = self._first.setdefault(name, [])
            first += [cell[:500] for cell in column[: 1000 - len(first)]]
            self._copies[name] &= column == labels
            self._damaged += sum("\ufffd" in x or "Ã" in x or "â€" in x for x in column)
        for i, (text, none) in enumerate(zip(texts, blank, strict=True)):
            if text and not none:
                continue
            self._dropped["unlabelled" if text else "empty" if none else "wordless"] += 1
            if text and self._unlabelled < 0:
                self._unlabelled = before + i

    def _tell(self) -> None:
        """Tells what was read, and refuses what is not allowed."""
        recipe, account, table, dropped = self.recipe, self.account, self.table, self._dropped
        account.note("rows", f"{table.rows:,} of {len(table.names)} columns")
        account.note("text", listed([repr(name) for name in recipe.text]))
        account.note("label", repr(recipe.label_name))
        counted = (
            (table.ragged, "rows with too few or too many cells"),
            (dropped["empty"], "empty rows"),
            (dropped["wordless"], "rows without text"),
        )
        for count, what in counted:
            if count:
                account.note("dropped", f"{count:,} {what}")
        self._warn()
        count = dropped["unlabelled"]
        if count and recipe.blank_labels == "refuse":
            raise InputError(
                f"{table.path}: {count:,} rows have a text and no label in column "
                f"{recipe.label_name!r}, the first in {table.place(self._unlabelled)}; fill them, "
                "or set data.blank_labels: drop"
            )
        if count:
            account.note("dropped", f"{count:,} rows without a label")
        if not len(self.places):
            names = ", ".join(repr(name) for name in recipe.text)
            raise InputError(
                f"{table.path} has no text in {names} with a label; choose other columns in "
                "data.text"
            )

    def _warn(self) -> None:
        """Warns of text columns that are no texts."""
        account, recipe = self.account, self.recipe
        seen = {name: look(column) for name, column in self._first.items()}
        numbers = [repr(name) for name, column in seen.items() if column.kind == "numbers"]
        if numbers:
            account.warn(
                f"{listed(numbers)} hold numbers, which this job reads as words of a text: 9 and "
                "10 are as different to it as any two words"
            )
        prose = any(column.kind == "prose" for column in seen.values())
        kind, why = kind_of_table(look_all(self.table.sample()))
        if kind != "text" and not prose:
            account.warn(
                f"the file looks like {TABLES[kind]} ({listed([repr(name) for name in why], 3)}), "
                "and this job reads it as texts; nothing but the words of the text columns is used"
                + READERS.get(kind, "")
            )
        for name in recipe.text:
            if self._copies[name]:
                account.warn(f"the text column {name!r} says the label of every row: leave it out")
        if self._damaged:
            account.warn(
                f"{self._damaged:,} cells look as if they had been decoded wrongly (such as 'Ã©' "
                "for 'é'): check data.encoding and how the file was made"
            )

    def classes(self) -> tuple[list[str], Ints]:
        """The classes, and the class number of each example in `kept`, which is set.

        Raises:
            InputError: about labels that are no classes, or classes that are too small.
        """
        recipe, account = self.recipe, self.account
        names = list(self._number)
        counts = np.bincount(self._labels, minlength=len(names)).tolist()
        became = unify(
            dict(zip(names, counts, strict=True)), account, normalize=recipe.normalize_labels
        )
        united: Counter[str] = Counter()
        for name, count in zip(names, counts, strict=True):
            united[became[name]] += count
        large = unify_rare(
            united,
            recipe.label_name,
            account,
            least=recipe.min_per_class,
            remedy=recipe.rare_classes,
        )
        final = [large[became[name]] for name in names]
        left: Counter[str] = Counter()
        for label, count in zip(final, counts, strict=True):
            if label is not None:
                left[label] += count
        check_classes(left, recipe.label_name, account)
        numbers, classes = number_labels(list(left))
        of = dict(zip(left, numbers, strict=True))
        numbered = np.array([-1 if label is None else of[label] for label in final])[self._labels]
        self.kept = np.flatnonzero(numbered >= 0)
        self._tell_copies(self._hashes[self.kept], numbered[self.kept])
        return classes, numbered[self.kept]

    def _tell_copies(self, hashes: Ints, labels: Ints) -> None:
        """Notes how many rows repeat a text, and how many of those contradict."""
        known, member = np.unique(hashes, return_inverse=True)
        answers = np.unique(np.stack([member.reshape(-1), labels]), axis=1)
        torn = int((np.bincount(answers[0]) > 1).sum())
        copies = len(hashes) - len(known)
        if copies:
            also = f"; {torn:,} texts have several labels" if torn else ""
            self.account.note("duplicates", f"{copies:,} rows repeat the text of another one{also}")
        if torn:
            self.account.warn(f"{torn:,} texts have different labels: no model can get all right")

    def texts(self, wanted: Mapping[str, Ints]) -> dict[str, list[str]]:
        """Reads the file again for the texts at these positions among the rows with text and label.

        Args:
            wanted: name of a part to its positions.

        Returns:
            Name of a part to its texts, in the order of the positions.

        Raises:
            InputError: if the file has changed.
        """
        positions = np.unique(np.concatenate([np.empty(0, dtype=np.int64), *wanted.values()]))
        found: list[str] = []
        before = 0
        changed = InputError(f"{self.table.path} has changed while it was read; start again")
        try:
            for block, _ in self._rows(first=False):
                first, last = np.searchsorted(positions, [before, before + len(block)])
                found += [block[i - before] for i in positions[first:last].tolist()]
                before += len(block)
        except InputError as error:
            raise changed from error
        hashes = np.fromiter(map(hash, found), np.int64)
        if before != len(self.places) or (hashes != self._hashes[positions]).any():
            raise changed
        return {
            name: [found[i] for i in np.searchsorted(positions, rows).tolist()]
            for name, rows in wanted.items()
        }
