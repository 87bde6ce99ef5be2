"""Ratings and the fake profiles that are injected among them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("pyarrow")

from embattle.data.profiles import fake_profiles, inject
from embattle.data.ratings import Ratings
from embattle.errors import InputError


def some(users: int = 40, items: int = 60, seed: int = 0) -> Ratings:
    """Every user rates half of the items; items with a small number are rated higher."""
    rng = np.random.default_rng(seed)
    u = np.repeat(np.arange(users), items // 2)
    i = np.concatenate([rng.choice(items, items // 2, replace=False) for _ in range(users)])
    values = np.clip(5 - i // 15 + rng.integers(0, 2, len(i)), 1, 5).astype(float)
    return Ratings(u, i, values, rng.permutation(len(i)).astype(float), users, items)


@pytest.mark.parametrize("template", ["random", "average", "bandwagon"])
def test_a_profile_pushes_the_target_and_hides_it(template: Any) -> None:
    ratings = some()
    fakes = fake_profiles(
        ratings, 7, template=template, accounts=3, fillers=10, popular=4, repeats=2, seed=1
    )
    size = 12 + 4 * (template == "bandwagon")
    assert np.bincount(fakes.users)[-3:].tolist() == [size] * 3
    assert fakes.users.min() == ratings.user_count
    assert fakes.user_count == ratings.user_count + 3
    assert set(fakes.values[fakes.items == 7]) == {5.0}
    assert (fakes.items == 7).sum() == 6
    assert set(fakes.values) <= set(ratings.values)
    for user in set(fakes.users.tolist()):
        others = fakes.items[(fakes.users == user) & (fakes.items != 7)]
        assert len(set(others.tolist())) == len(others)
    if template == "bandwagon":
        counts = ratings.popularity()
        counts[7] = 0
        top = set(np.argsort(-counts, kind="stable")[:4].tolist())
        for user in set(fakes.users.tolist()):
            mine = fakes.take((fakes.users == user) & np.isin(fakes.items, list(top)))
            assert set(mine.items.tolist()) == top
            assert set(mine.values) == {5.0}


def test_average_imitates_each_item_and_random_the_whole() -> None:
    ratings = some(users=200)
    sums = {}
    for template in ("random", "average"):
        fakes = fake_profiles(ratings, 0, template=template, accounts=300, fillers=30)  # type: ignore[arg-type]
        sums[template] = [
            fakes.values[(fakes.items >= low) & (fakes.items < low + 15) & (fakes.items > 0)].mean()
            for low in (0, 45)
        ]
    true = [ratings.values[(ratings.items // 15) == k].mean() for k in (0, 3)]
    assert sums["average"] == pytest.approx(true, abs=0.1)
    assert sums["random"] == pytest.approx([ratings.values.mean()] * 2, abs=0.15)


def test_the_seed_decides_and_injection_appends() -> None:
    ratings = some()
    options: dict[str, Any] = {"template": "random", "accounts": 5, "fillers": 8}
    first, again, other = (fake_profiles(ratings, 1, seed=s, **options) for s in (1, 1, 2))
    assert first.items.tolist() == again.items.tolist() != other.items.tolist()
    joined = inject(ratings, first)
    assert len(joined) == len(ratings) + len(first)
    assert joined.items[: len(ratings)].tolist() == ratings.items.tolist()
    assert joined.user_count == ratings.user_count + 5
    none = fake_profiles(ratings, 1, template="random", accounts=0)
    assert len(inject(ratings, none)) == len(ratings)


@pytest.mark.parametrize(
    ("target", "changes", "message"),
    [
        (60, {}, "target must be an item from 0 to 59"),
        (0, {"fillers": 60}, "only 59 other items"),
        (0, {"repeats": 0}, "repeats >= 1"),
        (0, {"template": "averge"}, "did you mean 'average'"),
    ],
)
def test_bad_arguments(target: int, changes: dict[str, Any], message: str) -> None:
    options = {"template": "random", "accounts": 2, "fillers": 5} | changes
    with pytest.raises(InputError, match=message):
        fake_profiles(some(), target, **options)


def test_fakes_made_from_other_ratings_are_refused() -> None:
    fakes = fake_profiles(some(items=20), 0, template="random", accounts=1, fillers=3)
    with pytest.raises(InputError, match="know 20 items and the ratings 60"):
        inject(some(), fakes)
