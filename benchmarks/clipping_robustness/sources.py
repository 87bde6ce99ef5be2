"""The data: real, or drawn for a quick run that needs no network."""

from __future__ import annotations

import numpy as np
from embattle import data
from embattle.data.ratings import Ratings, read_ratings
from embattle.data.recipe import DataRecipe
from embattle.data.sources import find
from embattle.data.splits import Examples, Splits, split


def movielens() -> Ratings:
    columns = ["user_id", "movie_id", "rating", "timestamp"]
    return read_ratings(find("movielens_100k").path(), columns)


def reviews() -> Splits:
    recipe = DataRecipe(
        source="womens_reviews",
        text=["Title", "Review Text"],
        label="Recommended IND",
        fractions=[0.7, 0.1, 0.2],
        balance=["train", "validation", "test"],
    )
    return data.load(recipe, 0)


def drawn_ratings(users: int = 60, items: int = 80) -> Ratings:
    """Tastes of rank two, rounded to 1 to 5; a few items are rated seldom."""
    rng = np.random.default_rng(0)
    taste = rng.normal(size=(users, 2)) @ rng.normal(size=(2, items))
    odds = np.where(np.arange(items) < 20, 0.15, 0.5)
    u, i = np.nonzero(rng.random((users, items)) < odds)
    values = np.clip(np.round(3.5 + taste[u, i]), 1, 5)
    return Ratings(u, i, values, rng.permutation(len(u)).astype(float), users, items)


def drawn_reviews(count: int = 600) -> Splits:
    """Each text has some words of its label's own."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, count).tolist()
    texts = []
    for number, label in enumerate(labels):
        own = rng.choice(["good", "soft", "fits"] if label else ["bad", "stiff", "tight"], 2)
        noise = [f"w{'abcdefghij'[k]}" for k in rng.integers(0, 10, 5)]
        texts.append(" ".join([*noise, *own, "x" * (1 + number % 40), "y" * (1 + number // 40)]))
    return split(
        Examples(texts, labels),
        ["0", "1"],
        fractions=[0.6, 0.2, 0.2],
        limits=[None, None, None],
        balance=[True, True, True],
        seed=0,
    )
