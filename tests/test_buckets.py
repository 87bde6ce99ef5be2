"""Batches of similar length."""

from __future__ import annotations

import numpy as np
import pytest
from embattle.data.buckets import LengthBuckets, padding
from embattle.errors import InputError
from torch.utils.data import DataLoader

LENGTHS = np.random.default_rng(0).geometric(0.03, 2007)


def test_each_example_comes_once_and_the_epoch_decides_the_order() -> None:
    buckets = LengthBuckets(LENGTHS, 16, seed=3)
    epochs = [list(buckets), list(buckets)]
    for batches in epochs:
        assert sorted(i for batch in batches for i in batch) == list(range(2007))
        assert len(batches) == len(buckets) == 126
        assert sorted({len(batch) for batch in batches}) == [7, 16]
    assert epochs[0] != epochs[1]
    assert list(LengthBuckets(LENGTHS, 16, seed=3)) == epochs[0]
    assert list(LengthBuckets(LENGTHS, 16, seed=4)) != epochs[0]
    longest = [LENGTHS[batch].max() for batch in epochs[0]]
    assert (
        0.3 < np.mean(np.diff(longest) > 0) < 0.7
    )  # the order of the batches is no order of length


def test_little_is_padding() -> None:
    mixed = np.random.default_rng(1).permutation(2007)
    plain = padding(LENGTHS, [mixed[i : i + 16].tolist() for i in range(0, 2007, 16)])
    assert plain > 0.6
    assert padding(LENGTHS, list(LengthBuckets(LENGTHS, 16))) < 0.15
    assert padding(LENGTHS, list(LengthBuckets(LENGTHS, 16, window=1))) > 0.6
    assert padding([2, 4, 3], [[0, 1], [2]]) == pytest.approx(2 / 11)
    assert padding([], []) == 0.0


def test_it_resumes_at_a_position() -> None:
    buckets = LengthBuckets(LENGTHS, 16, seed=3)
    buckets.set_epoch(2)
    whole = list(buckets)
    assert buckets.state_dict() == {"epoch": 3, "position": 0}
    buckets.set_epoch(2)
    stream = iter(buckets)
    first = [next(stream) for _ in range(10)]
    other = LengthBuckets(LENGTHS, 16, seed=3)
    other.load_state_dict(buckets.state_dict())
    assert first + list(other) == whole


def test_a_data_loader_takes_it() -> None:
    loader: DataLoader[int] = DataLoader(
        range(2007),  # type: ignore[arg-type]
        batch_sampler=LengthBuckets(LENGTHS, 50),
    )
    assert sorted(int(i) for batch in loader for i in batch) == list(range(2007))


def test_none_and_one() -> None:
    assert list(LengthBuckets([], 4)) == []
    assert list(LengthBuckets([9], 4)) == [[0]]


def test_bad_arguments() -> None:
    with pytest.raises(InputError, match="batch_size must be a whole number > 0, got 0"):
        LengthBuckets([1], 0)
    with pytest.raises(InputError, match=r"window must be a whole number > 0, got 1\.5"):
        LengthBuckets([1], 1, window=1.5)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="lengths must be one row of numbers"):
        LengthBuckets([[1, 2]], 1)
