"""Texts with labels, divided by seed into training, validation and test parts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from embattle.data.account import listed
from embattle.data.divide import stratified_parts
from embattle.data.looks import is_number
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


def number_labels(labels: Sequence[str]) -> tuple[list[int], list[str]]:
    """Numbers the distinct labels in their natural order: by value where all are numbers.

    Args:
        labels: one label per example.

    Returns:
        The class number of each example, and the labels by number.
    """
    distinct = set(labels)
    ordered = sorted(distinct)
    if all(is_number(label) for label in distinct):
        ordered.sort(key=lambda label: float(label.replace(",", ".")))
    number = {label: i for i, label in enumerate(ordered)}
    return [number[label] for label in labels], ordered


def split(
    examples: Examples,
    classes: Sequence[str],
    *,
    fractions: Sequence[float],
    limits: Sequence[int | None],
    balance: Sequence[bool],
    seed: int,
    stratify: bool = False,
) -> Splits:
    """Divides examples at random; no two parts share a text.

    Args:
        examples: everything there is.
        classes: the labels by number.
        fractions: expected shares of train, validation and test; they sum to 1.
        limits: the most examples to keep in each part; None keeps all.
        balance: per part, whether to keep equally many of each class.
        seed: decides the parts and the order.
        stratify: give every part the same share of each class, see `choose`.

    Returns:
        The parts.

    Raises:
        InputError: if a part would be empty or, for training and test, would lack a class.
    """
    rows = choose(
        [place(text, seed) for text in examples.texts],
        examples.labels,
        classes,
        fractions=fractions,
        limits=limits,
        balance=balance,
        seed=seed,
        stratify=stratify,
    )
    parts = {name: examples.take(chosen.tolist()) for name, chosen in rows.items()}
    return Splits(parts, list(classes))


def choose(
    places: ArrayLike,
    labels: ArrayLike,
    classes: Sequence[str],
    *,
    fractions: Sequence[float],
    limits: Sequence[int | None],
    balance: Sequence[bool],
    seed: int,
    stratify: bool = False,
) -> dict[str, NDArray[np.int64]]:
    """Chooses the examples of each part; see `split`.

    An example goes to a part by its place, a hash of its text and the seed, so that copies of one
    text stay together and a larger table never moves an example from one part to another. With
    `stratify` it goes by the share of its class instead; copies stay together all the same. Within
    a part the order is shuffled by seed before anything is cut off.

    Args:
        places: [N] `place` of each example.
        labels: [N] class numbers.
        classes: the labels by number.
        fractions, limits, balance, seed, stratify: see `split`.

    Returns:
        The positions of each part's examples, in its order.
    """
    spot, labels = np.asarray(places, dtype=np.float64), np.asarray(labels, dtype=np.int64)
    if stratify:
        part_of = stratified_parts(labels, fractions, seed, groups=spot)
    else:
        part_of = np.searchsorted(np.cumsum(fractions)[:-1], spot, side="right").astype(np.int8)
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
            other = "" if stratify else "set data.stratify: true, "
            raise InputError(
                f"the {name} part has {_lack(classes, lacking, labels, len(rows))}; {other}give "
                f"more data, raise data.limits.{name} or its share in data.fractions, or leave "
                "small classes out with data.min_per_class and data.rare_classes: drop"
            )
        parts[name] = rows
    return parts


def _lack(classes: Sequence[str], lacking: list[int], labels: Any, rows: int) -> str:
    """What a part has not, and how much of it there is in all."""
    if not rows:
        return f"no examples ({len(labels)} in all)"
    counts = [f"{classes[c]!r} ({int((labels == c).sum())} in all)" for c in lacking]
    return f"no example of class {listed(counts)}"


def place(text: str, seed: int) -> float:
    """A number in [0, 1) that depends on the text and the seed alone."""
    digest = hashlib.blake2b(text.encode(), digest_size=6, key=str(seed).encode()).digest()
    return int.from_bytes(digest, "big") / 2.0**48
