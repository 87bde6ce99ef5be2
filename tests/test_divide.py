"""Divisions into parts: shares, no leak from one part into another, ties."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from embattle.data.divide import (
    LEFT_OUT,
    TEST,
    TRAIN,
    VALIDATION,
    leave_one_out,
    pairs,
    random_parts,
    stratified_parts,
    time_parts,
)
from embattle.errors import InputError
from hypothesis import given, settings
from hypothesis import strategies as st

SHARES = (0.6, 0.1, 0.3)


def test_random_parts_have_the_shares_and_the_seed_decides() -> None:
    parts = random_parts(1000, SHARES, 7)
    assert [(parts == k).sum() for k in (TRAIN, VALIDATION, TEST)] == [600, 100, 300]
    assert (parts == random_parts(1000, SHARES, 7)).all()
    assert (parts != random_parts(1000, SHARES, 8)).any()
    assert len(random_parts(0, SHARES, 0)) == 0


def test_each_class_is_divided_alike_however_rare() -> None:
    labels = np.array(["many"] * 900 + ["few"] * 10 + ["two"] * 2 + ["one"])
    parts = stratified_parts(labels, SHARES, 3)
    counts = {
        label: [int(((parts == k) & (labels == label)).sum()) for k in range(3)]
        for label in ("many", "few", "two", "one")
    }
    assert counts == {"many": [540, 90, 270], "few": [6, 1, 3], "two": [1, 0, 1], "one": [1, 0, 0]}
    none = stratified_parts(labels, (0.0, 0.5, 0.5), 3)
    assert not (none == TRAIN).any()
    assert not (stratified_parts(labels, (0.9, 0.1, 0.0), 3) == TEST).any()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 12), max_size=60), st.integers(0, 99))
def test_no_group_is_in_two_parts(groups: list[int], seed: int) -> None:
    texts = np.array([f"text {g}" for g in groups], dtype=str)
    labels = np.arange(len(groups)) % 3
    times = np.arange(len(groups), dtype=float)
    found = [random_parts(len(groups), SHARES, seed, texts)]
    found.append(stratified_parts(labels, SHARES, seed, texts))
    if len(groups) >= 10:
        found.append(time_parts(times, SHARES, texts))
    for parts in found:
        for text in set(texts.tolist()):
            assert len(set(parts[(texts == text) & (parts != LEFT_OUT)].tolist())) <= 1


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(0, 5)), max_size=40),
    st.booleans(),
    st.booleans(),
)
def test_leave_one_out_never_leaks(
    events: list[tuple[int, int, int]], validation: bool, strict: bool
) -> None:
    users, items, times = np.array(events, dtype=np.int64).reshape(-1, 3).T
    parts = leave_one_out(users, items, times, validation=validation, strict=strict)
    assert validation or not (parts == VALIDATION).any()
    for user in set(users.tolist()):
        mine = users == user
        of = {k: set(items[mine & (parts == k)].tolist()) for k in (TRAIN, VALIDATION, TEST)}
        assert not of[TRAIN] & of[VALIDATION]
        assert not of[TRAIN] & of[TEST]
        assert not of[VALIDATION] & of[TEST]
        different = len(set(items[mine].tolist()))
        if not strict:
            assert len(of[TEST]) == (different > 1)
            assert len(of[VALIDATION]) == (validation and different > 2)
            assert of[TRAIN]
        last = -np.inf
        for part in (TRAIN, VALIDATION, TEST):
            when = times[mine & (parts == part)]
            if len(when):
                assert when.min() > last if strict and part != TRAIN else when.min() >= -np.inf
                assert part == TRAIN or when.min() >= last
                last = when.max()


def test_leave_one_out_by_hand() -> None:
    users = np.array([0, 0, 0, 0, 1, 1, 2, 3, 3])
    items = np.array([5, 6, 7, 5, 1, 2, 9, 4, 4])
    times = np.array([1, 2, 3, 4, 8, 8, 1, 1, 2])
    parts = leave_one_out(users, items, times)
    # User 0 comes back to item 5 last; user 1 has a tie; users 2 and 3 have one item each.
    assert parts.tolist() == [LEFT_OUT, TRAIN, VALIDATION, TEST, TRAIN, TEST, *[TRAIN] * 3]
    strict = leave_one_out(users, items, times, strict=True)
    assert strict.tolist() == [LEFT_OUT, TRAIN, VALIDATION, TEST, LEFT_OUT, LEFT_OUT, *[TRAIN] * 3]
    again = np.random.default_rng(0).permutation(len(users))
    assert (leave_one_out(users[again], items[again], times[again]) == parts[again]).all()


def test_rows_at_one_time_are_never_divided() -> None:
    times = np.repeat([3.0, 1.0, 2.0, 4.0], [10, 50, 15, 25])
    parts = time_parts(times, SHARES)
    assert [set(parts[times == t].tolist()) for t in (1, 2, 3, 4)] == [{0}, {0}, {1}, {2}]
    with pytest.raises(InputError, match="a part would be empty: 30 rows have 2 different"):
        time_parts(np.repeat([1.0, 2.0], 15), SHARES)


def test_a_pair_seen_before_is_left_out_of_later_parts() -> None:
    users, items = np.zeros(10, dtype=np.int64), np.array([1, 2, 3, 4, 5, 6, 6, 1, 7, 8])
    parts = time_parts(np.arange(10), SHARES, pairs(users, items))
    assert parts.tolist() == [0, 0, 0, 0, 0, 0, LEFT_OUT, LEFT_OUT, 2, 2]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: random_parts(5, (0.5, 0.5), 0), "three numbers"),
        (lambda: random_parts(5, (0.5, 0.6, -0.1), 0), "three numbers"),
        (lambda: random_parts(5, (0.5, 0.1, 0.1), 0), "sum to 1"),
        (lambda: random_parts(5, SHARES, 0, [1, 2]), "got 2 for 5 rows"),
        (lambda: pairs([0.5], [1]), "users must be one row of whole numbers, got float64"),
        (lambda: pairs([0], [-1]), "items must be >= 0, got -1"),
        (lambda: leave_one_out([0, 1], [1], [1, 2]), "2 users, 1 items"),
        (lambda: leave_one_out([0], [1], [np.nan]), "times must be finite"),
        (lambda: leave_one_out([0], [1], [1, 2]), "times must be 1 numbers"),
    ],
)
def test_bad_arguments(call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
