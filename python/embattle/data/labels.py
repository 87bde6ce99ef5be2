"""Labels as they stand in a file: blank, spelled in several ways, rare, or no classes at all."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from embattle.data.account import Account, listed
from embattle.data.looks import NO_VALUE, is_number, number_of
from embattle.errors import InputError

#: Words for yes and no, as numbers.
TRUTH = {"true": 1.0, "yes": 1.0, "false": 0.0, "no": 0.0}


def is_blank(value: Any, missing: Collection[str] = ()) -> bool:
    """Whether a cell holds nothing: absent, NaN, only spaces, or one of the strings `missing`."""
    if value is None or value != value:
        return True
    text = str(value).strip()
    return not text or text in missing


def most(names: Sequence[str], counts: Sequence[Any], missing: Collection[str]) -> str | None:
    """The name of the largest of a row's counts; None if two are the largest, or all are 0.

    Raises:
        InputError: a count is no number. A blank one, or one of the strings `missing`, is 0.
    """
    numbers = []
    for name, count in zip(names, counts, strict=True):
        blank = is_blank(count, missing)
        # A count's commas are of thousands, where they can be.
        number = 0.0 if blank else number_of(str(count).strip(), thousands=True)
        if number is None:
            raise InputError(
                f"data.label: {str(count)!r} in column {name!r} is no count; name columns of "
                "numbers, or one column of classes"
            )
        numbers.append(number)
    largest = max(numbers)
    return None if largest <= 0 or numbers.count(largest) > 1 else names[numbers.index(largest)]


def spelling(label: str) -> str:
    """What is the same for two labels that differ only in spaces, case or the way it is encoded."""
    text = unicodedata.normalize("NFKC", label)
    text = "".join(c for c in text if unicodedata.category(c) != "Cf")
    text = " ".join(text.casefold().split())
    return re.sub(r"\.0*$", "", text) if is_number(text) else text


def spellings(counts: Mapping[str, int]) -> list[list[str]]:
    """The labels in groups that differ only in spelling, the most frequent first."""
    spelled: dict[str, list[str]] = {}
    for label in sorted(counts, key=lambda label: (-counts[label], label)):
        spelled.setdefault(spelling(label), []).append(label)
    return list(spelled.values())


def alike(counts: Mapping[str, int]) -> str:
    """Which labels differ only in spelling, and how often there is each, in words."""
    several = [group for group in spellings(counts) if len(group) > 1]
    return listed([" = ".join(f"{x!r} ({counts[x]})" for x in group) for group in several])


def unify(counts: Mapping[str, int], account: Account, *, normalize: bool) -> dict[str, str]:
    """Reports labels that differ only in spelling, and makes them one if asked to.

    Args:
        counts: how often each label stands in the file.
        account: is told of it.
        normalize: whether each is replaced by the most frequent spelling, without outer spaces.

    Returns:
        What each label becomes.
    """
    shown = alike(counts)
    if not shown:
        return {label: label for label in counts}
    if normalize:
        account.note("labels made one", shown)
        return {label: group[0].strip() for group in spellings(counts) for label in group}
    account.warn(
        f"labels that differ only in spaces, case or form are different classes: {shown}; "
        "data.normalize_labels: true makes them one"
    )
    return {label: label for label in counts}


def unify_rare(
    counts: Mapping[str, int], column: str, account: Account, *, least: int, remedy: str
) -> dict[str, str | None]:
    """Refuses, drops or merges classes that are too small.

    Args:
        counts: how often there is each label.
        column: the column's name, for messages.
        account: is told of it.
        least: the fewest examples that a class must have.
        remedy: `refuse`; `drop` leaves smaller classes out; `merge` makes all of them one, `other`.

    Returns:
        What each label becomes; None leaves it out.

    Raises:
        InputError: about classes that are too small, also once they are merged.
    """
    rare = {label: n for label, n in sorted(counts.items()) if n < least}
    became: dict[str, str | None] = {label: label for label in counts}
    if not rare:
        return became
    shown = listed([f"{label!r} ({n})" for label, n in rare.items()])
    if remedy == "refuse":
        raise InputError(
            f"column {column!r}: {len(rare)} classes have fewer than data.min_per_class = "
            f"{least} examples: {shown}; set data.rare_classes: drop (or merge), or merge them in "
            "the file"
        )
    total = sum(rare.values())
    if remedy == "drop":
        account.note("dropped", f"{total} rows of {len(rare)} rare classes: {shown}")
        return became | dict.fromkeys(rare)
    name = next(x for x in ("other", "other classes", "rare") if counts.get(x, 0) < least)
    if total < least:
        raise InputError(
            f"column {column!r}: the {len(rare)} rare classes have only {total} examples together, "
            f"fewer than data.min_per_class = {least}; set data.rare_classes: drop"
        )
    account.note("labels made one", f"{len(rare)} rare classes are now {name!r}: {shown}")
    return became | dict.fromkeys(rare, name)


def check_classes(labels: Iterable[str], column: str, account: Account) -> None:
    """Refuses a column that holds quantities or texts instead of classes; warns of odd classes.

    Args:
        labels: one label for each example, or a Counter of them.
        column: the column's name, for messages.
        account: is told of odd classes.

    Raises:
        InputError: if there are fewer than two classes, so many that they are none, or numbers that
            are a quantity.
    """
    counts = Counter(labels)
    distinct, rows = len(counts), counts.total()
    if distinct < 2:
        only = f"only the label {next(iter(counts))!r}" if counts else "no label"
        raise InputError(f"column {column!r} holds {only}; training needs at least two classes")
    crowded = rows >= 20 and distinct * 2 > rows
    if all(is_number(label) for label in counts):
        values = sorted(float(label.replace(",", ".")) for label in counts)
        broken = any(not value.is_integer() for value in values)
        if crowded or distinct > 100 or (broken and distinct > 20):
            raise InputError(
                f"column {column!r} holds {distinct} different numbers ({values[0]:g} to "
                f"{values[-1]:g}), a quantity: this job predicts classes and offers no regression; "
                "choose a column of classes, or cut the numbers into a few ranges"
            )
    if crowded or distinct > 1000:
        raise InputError(
            f"column {column!r} holds {distinct} different values in {rows} rows, so it is "
            "no label (a text, a name, an identifier?); choose a column of classes"
        )
    odd = [f"{label!r} ({n})" for label, n in counts.items() if label.strip().lower() in NO_VALUE]
    if odd:
        account.warn(
            f"taken as classes, not as missing: {listed(odd)}; data.missing: [...] names what "
            "stands for no value"
        )
