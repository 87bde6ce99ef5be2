"""Data for the jobs: named data sets, or the user's own CSV and Parquet files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from embattle.data.splits import PARTS, Examples, Splits, number_labels, split
from embattle.errors import InputError

if TYPE_CHECKING:
    from embattle.recipe import DataRecipe

__all__ = ["PARTS", "Examples", "Splits", "load"]


def load(recipe: DataRecipe, seed: int) -> Splits:
    """Reads, cleans and divides the data that a recipe asks for.

    The text columns are joined by a space; rows without any text are dropped.

    Args:
        recipe: the recipe's `data` section.
        seed: decides the division.

    Returns:
        The three parts.

    Raises:
        InputError: if the data cannot be had or used; the message says what to do.
    """
    from embattle.data.sources import find
    from embattle.data.tables import read_columns

    if recipe.source is not None:
        path = find(recipe.source).path()
    else:
        path = Path(recipe.path or "").expanduser()
    table = read_columns(path, [*recipe.text, recipe.label])
    columns = [table[name] for name in recipe.text]
    texts = [
        " ".join(str(t).strip() for t in row if t is not None).strip()
        for row in zip(*columns, strict=True)
    ]
    kept = [i for i, text in enumerate(texts) if text]
    if not kept:
        names = ", ".join(repr(name) for name in recipe.text)
        raise InputError(f"{path} has no text in {names}; choose other columns in data.text")
    labels, classes = number_labels([table[recipe.label][i] for i in kept], recipe.label)
    return split(
        Examples([texts[i] for i in kept], labels),
        classes,
        fractions=recipe.fractions,
        limits=[getattr(recipe.limits, part) for part in PARTS],
        balance=[part in recipe.balance for part in PARTS],
        seed=seed,
    )
