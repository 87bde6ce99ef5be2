"""The CUDA kernels in the emulator against the reference, on calls as they come."""

from __future__ import annotations

import os
from random import Random

import hostile_values as hostile
import pytest
import torch
from compare import same_bits
from embattle import ops
from emulated_case import IN_EMULATOR, emulated
from test_ops_fuzz import OPS, checked, described, drawn, functional

pytestmark = IN_EMULATOR
CASES = int(os.environ.get("EMBATTLE_CUDA_FUZZ_CASES", "2000"))
PARTS = 4
# Those that the reference has by another name are held to it by tests/test_ops_fuzz.py.
DRAWN = [op for op in OPS if op not in ("embedding_perturb_backward", "embedding_grad_rows")]


@pytest.mark.parametrize("part", range(PARTS))
def test_calls_as_they_come_are_what_the_reference_says(part: int) -> None:
    for seed in range(part, CASES, PARTS):
        name = DRAWN[seed // PARTS % len(DRAWN)]
        call = drawn(name, hostile.Draw(Random(seed), seed, wide=True)).map(torch.Tensor.detach)
        before = call.map(torch.Tensor.clone)
        results = checked(name, call, emulated)
        what = f"{seed}: {described(before)}"
        hostile.assert_matches(functional(name), before, results, what, 2.0**-24)


def test_a_negative_zero_is_no_coordinate_of_an_l1_step() -> None:
    grad = torch.tensor([[-0.0, 3.0, -0.0, 1.0, 2.0, -0.0]])
    step = {"step_size": 1.0, "eps": 9.0, "norm": "l1", "top": 2}
    found = emulated.pgd_step(torch.zeros(1, 6), grad, **step)
    assert found.tolist() == [[0, 0.5, 0, 0, 0.5, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_ball_of_radius_0_beside_its_box_gives_the_box(dtype: torch.dtype) -> None:
    x0 = torch.tensor([[0.25, -0.75, 1.0]], dtype=dtype)
    options = {"eps": 0.0, "x0": x0, "lower": -0.5}
    assert same_bits(emulated.project(x0, **options), ops.project(x0, **options))


def test_a_linear_gradient_of_huge_inputs_and_zeros_is_zero() -> None:
    inputs = torch.full((1, 1, 16), 1e300, dtype=torch.float64)
    for zero in (0.0, -0.0):
        grad = torch.full((1, 1, 16), zero, dtype=torch.float64)
        for method in ("gram", "direct"):
            assert emulated.linear_grad_norm(inputs, grad, method=method).tolist() == [0.0]


def test_a_box_brings_huge_numbers_near_a_small_ball() -> None:
    # Their squares in a unit of the huge ones vanish: they are not inside.
    x = torch.tensor([1e300], dtype=torch.float64)
    for eps, low in ((1e-5, -0.25), (1e-30, 0.25)):
        found = emulated.project(x, eps=eps, lower=low, upper=1.0)
        assert torch.allclose(found, ops.project(x, eps=eps, lower=low, upper=1.0), rtol=1e-13)
