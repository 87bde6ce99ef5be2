"""Data for the jobs: named data sets, or the user's own CSV, Parquet and JSON-lines files."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from embattle.data.account import Account, listed
from embattle.data.splits import PARTS, Examples, Splits, number_labels, split
from embattle.errors import InputError

if TYPE_CHECKING:
    from embattle.data.recipe import DataRecipe
    from embattle.data.tables import Table

__all__ = ["PARTS", "Account", "Examples", "Splits", "load"]

# A part with fewer examples of a class than this says little about the class.
_FEW = 10


def load(recipe: DataRecipe, seed: int, account: Account | None = None) -> Splits:
    """Reads, cleans and divides the data that a recipe asks for.

    The text columns are joined by a space; rows without any text are dropped.

    Args:
        recipe: the recipe's `data` section.
        seed: decides the division.
        account: is told what was read, dropped and found; it is filled as far as the reading gets.

    Returns:
        The three parts.

    Raises:
        InputError: if the data cannot be had or used; the message says what to do.
    """
    from embattle.data.labels import check_classes, drop_rare, unify
    from embattle.data.sources import find
    from embattle.data.tables import read_table

    account = Account() if account is None else account
    if recipe.source is not None:
        path = find(recipe.source).path()
    else:
        path = Path(recipe.path or "").expanduser()
    table = read_table(
        path,
        [*recipe.text, recipe.label],
        encoding=recipe.encoding,
        delimiter=recipe.delimiter,
        drop_ragged=recipe.ragged_rows == "drop",
        as_text=True,
    )
    account.note("file", f"{path}: {table.form.words()}")
    account.note("rows", f"{table.rows:,} of {len(table.names)} columns")
    account.note("text", listed([repr(name) for name in recipe.text]))
    account.note("label", repr(recipe.label))
    if table.ragged:
        account.note("dropped", f"{table.ragged:,} rows with too few or too many cells")
    texts, labels = _rows(table, recipe, account)
    labels = unify(labels, account, normalize=recipe.normalize_labels)
    kept = drop_rare(
        labels,
        recipe.label,
        account,
        least=recipe.min_per_class,
        drop=recipe.rare_classes == "drop",
    )
    texts, labels = [texts[i] for i in kept], [labels[i] for i in kept]
    check_classes(labels, recipe.label, account)
    _copies(texts, labels, account)
    numbers, classes = number_labels(labels)
    splits = split(
        Examples(texts, numbers),
        classes,
        fractions=recipe.fractions,
        limits=[getattr(recipe.limits, part) for part in PARTS],
        balance=[part in recipe.balance for part in PARTS],
        seed=seed,
    )
    _parts(splits, len(texts), account)
    return splits


def _rows(table: Table, recipe: DataRecipe, account: Account) -> tuple[list[str], list[str]]:
    """The texts and labels of the rows that have both."""
    from embattle.data.labels import is_blank

    missing = set(recipe.missing)
    columns = [
        ["" if is_blank(cell, missing) else str(cell).strip() for cell in table.columns[name]]
        for name in recipe.text
    ]
    raw = table.columns[recipe.label]
    _look(table, columns, recipe, account)
    texts = [" ".join(cell for cell in row if cell) for row in zip(*columns, strict=True)]
    blank = [is_blank(label, missing) for label in raw]
    empty = sum(not text and none for text, none in zip(texts, blank, strict=True))
    wordless = sum(not text for text in texts) - empty
    for count, what in ((empty, "empty rows"), (wordless, "rows without text")):
        if count:
            account.note("dropped", f"{count:,} {what}")
    unlabelled = [i for i, text in enumerate(texts) if text and blank[i]]
    if unlabelled and recipe.blank_labels == "refuse":
        raise InputError(
            f"{table.path}: {len(unlabelled):,} rows have a text and no label in column "
            f"{recipe.label!r}, the first in {table.place(unlabelled[0])}; fill them, or set "
            "data.blank_labels: drop"
        )
    if unlabelled:
        account.note("dropped", f"{len(unlabelled):,} rows without a label")
    kept = [i for i, text in enumerate(texts) if text and not blank[i]]
    if not kept:
        names = ", ".join(repr(name) for name in recipe.text)
        raise InputError(
            f"{table.path} has no text in {names} with a label; choose other columns in data.text"
        )
    return [texts[i] for i in kept], [str(raw[i]) for i in kept]


def _look(table: Table, columns: list[list[str]], recipe: DataRecipe, account: Account) -> None:
    """Warns of text columns that are no texts."""
    from embattle.data.looks import TABLES, kind_of_table, look, look_all
    from embattle.data.tables import sample

    seen = {name: look(column[:1000]) for name, column in zip(recipe.text, columns, strict=True)}
    numbers = [repr(name) for name, column in seen.items() if column.kind == "numbers"]
    if numbers:
        account.warn(
            f"{listed(numbers)} hold numbers, which this job reads as words of a text: 9 and 10 "
            "are as different to it as any two words"
        )
    prose = any(column.kind == "prose" for column in seen.values())
    kind, why = kind_of_table(look_all(sample(table.path, table.form)))
    if kind != "text" and not prose:
        account.warn(
            f"the file looks like {TABLES[kind]} ({listed([repr(name) for name in why], 3)}), and "
            "this job reads it as texts; nothing but the words of the text columns is used"
        )
    labels = ["" if value is None else str(value).strip() for value in table.columns[recipe.label]]
    for name, column in zip(recipe.text, columns, strict=True):
        if column == labels:
            account.warn(f"the text column {name!r} says the label of every row: leave it out")
    damaged = sum("\ufffd" in cell for column in columns for cell in column)
    mixed = sum("Ã" in cell or "â€" in cell for column in columns for cell in column)
    if damaged or mixed:
        account.warn(
            f"{damaged + mixed:,} cells look as if they had been decoded wrongly (such as 'Ã©' for "
            "'é'): check data.encoding and how the file was made"
        )


def _copies(texts: list[str], labels: list[str], account: Account) -> None:
    """Notes how many rows repeat a text, and how many of those contradict."""
    answers: dict[str, set[str]] = {}
    for text, label in zip(texts, labels, strict=True):
        answers.setdefault(text, set()).add(label)
    copies = len(texts) - len(answers)
    torn = sum(len(found) > 1 for found in answers.values())
    if copies:
        also = f"; {torn:,} texts have several labels" if torn else ""
        account.note("duplicates", f"{copies:,} rows repeat the text of another one{also}")
    if torn:
        account.warn(f"{torn:,} texts have different labels: no model can get all right")


def _parts(splits: Splits, examples: int, account: Account) -> None:
    """Notes the classes of each part, and warns of what cannot be learned or judged."""
    counts = splits.counts()
    used = sum(len(part) for part in splits.parts.values())
    cut = "" if used == examples else f"; {examples - used:,} left out by limits and balance"
    account.note("used", f"{used:,} examples{cut}")
    for name in PARTS:
        shown = [
            f"{label!r} {count:,}"
            for label, count in zip(splits.classes, counts[name], strict=True)
        ]
        account.note(f"{name} part", listed(shown, 12))
    for name in ("train", "test"):
        few = {label: n for label, n in zip(splits.classes, counts[name], strict=True) if n < _FEW}
        if few:
            those = listed([f"{n} of class {label!r}" for label, n in few.items()])
            account.warn(f"the {name} part has only {those}: figures about so few say little")
    test = Counter(dict(zip(splits.classes, counts["test"], strict=True)))
    label, most = test.most_common(1)[0]
    if most > 0.9 * test.total():
        account.warn(
            f"{most / test.total():.1%} of the test part are {label!r}: a model that "
            "always says so is right as often; see data.balance"
        )
