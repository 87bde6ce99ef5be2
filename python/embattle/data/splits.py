"""Texts with labels, divided by seed into training, validation and test parts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from embattle.errors import InputError

PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class Examples:
    """Texts and the class number of each."""

    texts: list[str]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, order: Sequence[int]) -> Examples:
        """The examples at these positions, in this order."""
        return Examples([self.texts[i] for i in order], [self.labels[i] for i in order])


@dataclass(frozen=True)
class Splits:
    """The three parts, and what the class numbers stand for.

    Attributes:
        parts: `train`, `validation` and `test`.
        classes: the labels as they stand in the data, by class number.
    """

    parts: dict[str, Examples]
    classes: list[str]

    def counts(self) -> dict[str, list[int]]:
        """Examples of each class in each part."""
        return {
            name: [part.labels.count(c) for c in range(len(self.classes))]
            for name, part in self.parts.items()
        }


def number_labels(values: Sequence[Any], column: str) -> tuple[list[int], list[str]]:
    """Numbers the distinct labels in their natural order.

    Args:
        values: one label per example: numbers, booleans or strings.
        column: the column's name, for messages.

    Returns:
        The class number of each example, and the labels by number.

    Raises:
        InputError: if a label is missing, there are fewer than two different ones, or so many that
            the column is no label (more than 1,000).
    """
    if any(value is None or value != value for value in values):
        raise InputError(f"column {column!r} has missing labels; drop those rows or fill them")
    distinct = set(values)
    if len(distinct) < 2:
        only = f"only the label {next(iter(distinct))!r}" if distinct else "no label"
        raise InputError(f"column {column!r} holds {only}; training needs at least two classes")
    if len(distinct) > 1000:
        raise InputError(
            f"column {column!r} holds {len(distinct)} different values; choose a column of classes"
        )
    try:
        ordered = sorted(distinct)
    except TypeError:
        ordered = sorted(distinct, key=str)
    number = {value: i for i, value in enumerate(ordered)}
    return [number[value] for value in values], [str(value) for value in ordered]


def split(
    examples: Examples,
    classes: Sequence[str],
    *,
    fractions: Sequence[float],
    limits: Sequence[int | None],
    balance: Sequence[bool],
    seed: int,
) -> Splits:
    """Divides examples at random; no two parts share a text.

    An example goes to a part by a hash of its text and the seed, so that copies of one text stay
    together and a larger table never moves an example from one part to another. Within a part the
    order is shuffled by seed before anything is cut off.

    Args:
        examples: everything there is.
        classes: the labels by number.
        fractions: expected shares of train, validation and test; they sum to 1.
        limits: the most examples to keep in each part; None keeps all.
        balance: per part, whether to keep equally many of each class.
        seed: decides the parts and the order.

    Returns:
        The parts.

    Raises:
        InputError: if a part would be empty or, for training and test, would lack a class.
    """
    import numpy as np

    spot = np.array([_place(text, seed) for text in examples.texts])
    edges = np.cumsum(fractions)[:-1]
    part_of = np.searchsorted(edges, spot, side="right")
    labels = np.asarray(examples.labels)
    parts = {}
    for k, name in enumerate(PARTS):
        rows = np.flatnonzero(part_of == k)
        rows = np.random.default_rng([seed, k]).permutation(rows)
        if balance[k]:
            by_class = [rows[labels[rows] == c] for c in range(len(classes))]
            most = min(len(group) for group in by_class)
            limit = limits[k]
            if limit is not None:
                most = min(most, limit // len(classes))
            rows = np.stack([group[:most] for group in by_class], axis=1).reshape(-1)
        rows = rows[: limits[k]]
        lacking = sorted(set(range(len(classes))) - set(labels[rows].tolist()))
        if not len(rows) or (lacking and name != "validation"):
            what = f"no example of class {classes[lacking[0]]!r}" if len(rows) else "no examples"
            raise InputError(
                f"the {name} part has {what} ({len(examples)} examples in all); "
                f"give more data, or raise data.limits.{name} or its share in data.fractions"
            )
        parts[name] = examples.take(rows.tolist())
    return Splits(parts, list(classes))


def _place(text: str, seed: int) -> float:
    """A number in [0, 1) that depends on the text and the seed alone."""
    digest = hashlib.blake2b(text.encode(), digest_size=6, key=str(seed).encode()).digest()
    return int.from_bytes(digest, "big") / 2.0**48
