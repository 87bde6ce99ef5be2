"""Negative sampling: never what a user has seen, with the promised odds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from embattle.data.negatives import NegativeSampler
from embattle.errors import InputError
from hypothesis import given, settings
from hypothesis import strategies as st

# User 0 has seen much, user 1 nothing, user 2 all but item 3.
USERS = np.array([0, 0, 0, 0, *[2] * 5])
ITEMS = np.array([0, 2, 5, 2, 0, 1, 2, 4, 5])


def sampler(**changes: Any) -> NegativeSampler:
    return NegativeSampler(USERS, ITEMS, **({"user_count": 3, "item_count": 6} | changes))


def test_uniform_over_what_is_not_seen() -> None:
    drawn = sampler().draw([0, 1, 2], 60_000, 0)
    shares = np.stack([np.bincount(row, minlength=6) / 60_000 for row in drawn])
    expected = [[0, 1 / 3, 0, 1 / 3, 1 / 3, 0], [1 / 6] * 6, [0, 0, 0, 1, 0, 0]]
    # Five standard deviations of a share.
    assert np.abs(shares - expected).max() < 5 * 0.5 / np.sqrt(60_000)
    assert ((shares > 0) == (np.array(expected) > 0)).all()


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_popularity_over_what_is_not_seen(power: float) -> None:
    users, items = np.repeat([0, 1, 2, 3], 25), np.repeat([0, 1, 1, 3, 3], 20)
    drawn = NegativeSampler(users, items, user_count=5, item_count=5, power=power).draw(
        [0, 4], 60_000, 0
    )
    weight = np.array([20, 40, 0, 40, 0], dtype=float) ** power * [1, 1, 0, 1, 0]
    for row, seen in ((0, [0, 1]), (1, [])):
        odds = weight.copy()
        odds[seen] = 0
        share = np.bincount(drawn[row], minlength=5) / 60_000
        assert np.abs(share - odds / odds.sum()).max() < 5 * 0.5 / np.sqrt(60_000)
        assert (share[odds == 0] == 0).all()


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6)), min_size=1, max_size=34),
    st.sampled_from([0.0, 0.75, 1.0]),
    st.integers(0, 10**6),
)
def test_what_is_drawn_was_never_seen(
    events: list[tuple[int, int]], power: float, step: int
) -> None:
    users, items = np.array(events).T
    found = NegativeSampler(users, items, user_count=5, item_count=7, power=power, seed=step)
    for user in range(5):
        seen = set(items[users == user].tolist())
        open_to = (set(range(7)) if power == 0 else set(items.tolist())) - seen
        if open_to:
            drawn = set(found.draw([user], 200, step).reshape(-1).tolist())
            assert drawn <= open_to
            assert len(open_to) > 3 or drawn == open_to
        else:
            with pytest.raises(InputError, match="have seen every item"):
                found.draw([user], 1, step)


def test_a_step_gives_the_same_again_without_the_steps_before() -> None:
    first = [sampler(seed=4).draw([0, 1], 8, step) for step in range(3)]
    assert (sampler(seed=4).draw([0, 1], 8, 2) == first[2]).all()
    assert (first[0] != first[1]).any()
    assert (sampler(seed=5).draw([0, 1], 8, 0) != first[0]).any()


def test_a_huge_catalogue_costs_nothing() -> None:
    items = 1 << 40
    found = NegativeSampler([0, 0], [0, items - 1], user_count=1000, item_count=items)
    drawn = found.draw(np.zeros(100, dtype=np.int64), 100, 0)
    assert drawn.min() > 0
    assert drawn.max() < items - 1
    assert drawn.dtype == np.int64


def test_an_empty_batch_and_no_events() -> None:
    assert sampler().draw(np.empty(0, dtype=np.int64), 4, 0).shape == (0, 4)
    none = NegativeSampler([], [], user_count=2, item_count=3)
    assert none.draw([1], 0, 0).shape == (1, 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sampler(item_count=5), "items must be below item_count = 5, got 5"),
        (lambda: sampler(user_count=2), "users must be below user_count = 2, got 2"),
        (lambda: sampler(power=-1.0), "power must be a number >= 0, got -1.0"),
        (lambda: sampler().draw([3], 1, 0), "users must be below 3, got 3"),
        (lambda: sampler().draw([0], -1, 0), "count and step must be >= 0, got -1 and 0"),
        (lambda: sampler(item_count=1 << 62), "too many"),
        (
            lambda: NegativeSampler([], [], user_count=1, item_count=1, power=1.0),
            "no events to take popularity from",
        ),
    ],
)
def test_bad_arguments(call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
