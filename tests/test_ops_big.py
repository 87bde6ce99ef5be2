"""Groups of more than 2^31 elements: every count and every position is 64 bits wide.

Needs 5 GiB of memory, so it is run by hand: ``EMBATTLE_BIG_TESTS=1 pytest tests/test_ops_big.py``.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator

import pytest
import torch
from embattle import ops
from torch import Tensor

pytestmark = [
    pytest.mark.big,
    pytest.mark.skipif(
        os.environ.get("EMBATTLE_BIG_TESTS") != "1",
        reason="needs 5 GiB of memory; EMBATTLE_BIG_TESTS=1 runs it",
    ),
]

COUNT = 2**31 + 12_345
EDGES = (0, 1, 2**31 - 1, 2**31, 2**31 + 1, COUNT - 1)  # hold something else than the rest


@pytest.fixture(scope="module")
def memory() -> Tensor:
    return torch.empty(1, COUNT, dtype=torch.bfloat16)


@pytest.fixture
def x(memory: Tensor) -> Tensor:
    """0.5 everywhere, but -64 at the edges."""
    memory.fill_(0.5)
    memory[0, list(EDGES)] = -64.0
    return memory


def others(x: Tensor) -> Iterator[Tensor]:
    """The elements between the edges, in pieces."""
    for begin, end in itertools.pairwise(EDGES):
        yield from x[0, begin + 1 : end].split(1 << 28)


def test_norms(x: Tensor) -> None:
    rest, edges = COUNT - len(EDGES), len(EDGES)
    wanted = {
        "l2": math.sqrt(rest * 0.25 + edges * 64.0**2),
        "linf": 64.0,
        "l1": rest * 0.5 + edges * 64.0,
    }
    for norm, value in wanted.items():
        assert math.isclose(float(ops.group_norm(x, norm=norm)), value, rel_tol=1e-7)
    assert math.isclose(float(ops.per_sample_norm([x])), wanted["l2"], rel_tol=1e-7)


def test_a_step_in_place(x: Tensor) -> None:
    """The gradient is the perturbation itself: every element moves away from zero."""
    assert ops.pgd_step_(x, x, step_size=0.25, eps=0.625, norm="linf") is x
    assert all(float(x[0, edge]) == -0.625 for edge in EDGES)
    assert all(bool((piece == 0.625).all()) for piece in others(x))


def test_a_projection_in_place(x: Tensor) -> None:
    norm = float(ops.group_norm(x))
    ops.project_(x, eps=norm / 2)
    assert all(float(x[0, edge]) == -32.0 for edge in EDGES)
    assert all(bool((piece == 0.25).all()) for piece in others(x))
