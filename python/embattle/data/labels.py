"""Labels as they stand in a file: blank, spelled in several ways, rare, or no classes at all."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

from embattle.data.account import Account, listed
from embattle.data.looks import is_number
from embattle.errors import InputError

# Classes that are often meant as "no value". They are taken for what they are: names of classes.
_ODD = {"na", "n/a", "nan", "null", "none", "nil", "-", "?", "unknown", "#n/a"}


def is_blank(value: Any, missing: Collection[str] = ()) -> bool:
    """Whether a cell holds nothing: absent, NaN, only spaces, or one of the strings `missing`."""
    if value is None or value != value:
        return True
    text = str(value).strip()
    return not text or text in missing


def spelling(label: str) -> str:
    """What is the same for two labels that differ only in spaces, case or the way it is encoded."""
    text = unicodedata.normalize("NFKC", label)
    text = "".join(c for c in text if unicodedata.category(c) != "Cf")
    text = " ".join(text.casefold().split())
    return re.sub(r"\.0*$", "", text) if is_number(text) else text


def unify(labels: Sequence[str], account: Account, *, normalize: bool) -> list[str]:
    """Reports labels that differ only in spelling, and makes them one if asked to.

    Args:
        labels: one label for each example.
        account: is told of it.
        normalize: whether each is replaced by the most frequent spelling, without outer spaces.

    Returns:
        The labels.
    """
    counts = Counter(labels)
    spelled: dict[str, list[str]] = {}
    for label in sorted(counts, key=lambda label: (-counts[label], label)):
        spelled.setdefault(spelling(label), []).append(label)
    several = [group for group in spelled.values() if len(group) > 1]
    if not several:
        return list(labels)
    shown = listed([" = ".join(f"{x!r} ({counts[x]})" for x in group) for group in several])
    if normalize:
        account.note("labels made one", shown)
        first = {label: group[0].strip() for group in spelled.values() for label in group}
        return [first[label] for label in labels]
    account.warn(
        f"labels that differ only in spaces, case or form are different classes: {shown}; "
        "data.normalize_labels: true makes them one"
    )
    return list(labels)


def drop_rare(
    labels: Sequence[str], column: str, account: Account, *, least: int, drop: bool
) -> list[int]:
    """Finds the examples whose classes are large enough.

    Args:
        labels: one label for each example.
        column: the column's name, for messages.
        account: is told what is dropped.
        least: the fewest examples that a class must have.
        drop: whether smaller classes are left out; else they are an error.

    Returns:
        The positions of the examples to keep.

    Raises:
        InputError: about classes that are too small.
    """
    counts = Counter(labels)
    rare = {label: n for label, n in sorted(counts.items()) if n < least}
    if rare:
        shown = listed([f"{label!r} ({n})" for label, n in rare.items()])
        if not drop:
            raise InputError(
                f"column {column!r}: {len(rare)} classes have fewer than data.min_per_class = "
                f"{least} examples: {shown}; set data.rare_classes: drop, or merge them in the file"
            )
        account.note("dropped", f"{sum(rare.values())} rows of {len(rare)} rare classes: {shown}")
    return [i for i, label in enumerate(labels) if label not in rare]


def check_classes(labels: Sequence[str], column: str, account: Account) -> None:
    """Refuses a column that holds quantities or texts instead of classes; warns of odd classes.

    Raises:
        InputError: if there are fewer than two classes, so many that they are none, or numbers that
            are a quantity.
    """
    counts = Counter(labels)
    distinct = len(counts)
    if distinct < 2:
        only = f"only the label {next(iter(counts))!r}" if counts else "no label"
        raise InputError(f"column {column!r} holds {only}; training needs at least two classes")
    crowded = len(labels) >= 20 and distinct * 2 > len(labels)
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
            f"column {column!r} holds {distinct} different values in {len(labels)} rows, so it is "
            "no label (a text, a name, an identifier?); choose a column of classes"
        )
    odd = [f"{label!r} ({n})" for label, n in counts.items() if label.strip().lower() in _ODD]
    if odd:
        account.warn(
            f"taken as classes, not as missing: {listed(odd)}; data.missing: [...] names what "
            "stands for no value"
        )
