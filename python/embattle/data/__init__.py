"""Data for the jobs: named data sets, or the user's own CSV, Parquet and JSON-lines files."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from embattle.data.account import Account, listed
from embattle.data.splits import PARTS, Examples, Splits, choose

if TYPE_CHECKING:
    from embattle.data.recipe import DataRecipe

__all__ = ["PARTS", "Account", "Examples", "Splits", "load"]

# A part with fewer examples of a class than this says little about the class.
_FEW = 10


def load(recipe: DataRecipe, seed: int, account: Account | None = None) -> Splits:
    """Reads, cleans and divides the data that a recipe asks for.

    The text columns are joined by a space; rows without any text are dropped. The file is read
    twice, a block at a time: once to see what there is and to choose, once for the texts chosen.

    Args:
        recipe: the recipe's `data` section.
        seed: decides the division.
        account: is told what was read, dropped and found; it is filled as far as the reading gets.

    Returns:
        The three parts.

    Raises:
        InputError: if the data cannot be had or used; the message says what to do.
    """
    from embattle.data.texts import Reading

    account = Account() if account is None else account
    reading = Reading(recipe.table(), recipe, seed, account)
    classes, labels = reading.classes()
    rows = choose(
        reading.places[reading.kept],
        labels,
        classes,
        fractions=recipe.fractions,
        limits=[getattr(recipe.limits, part) for part in PARTS],
        balance=[part in recipe.balance for part in PARTS],
        seed=seed,
        stratify=recipe.stratify,
    )
    texts = reading.texts({name: reading.kept[chosen] for name, chosen in rows.items()})
    splits = Splits(
        {name: Examples(texts[name], labels[chosen].tolist()) for name, chosen in rows.items()},
        classes,
    )
    _parts(splits, len(labels), account)
    return splits


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
