"""Numerical traps of attack and clipping code, one test for each: none may come back.

Each was met in published code of the same purpose. A docstring says what was measured there and,
where numbers are given, that they are the input's true values.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from compare import distances, run
from embattle import ops, reference
from samples import DTYPES, NORMS, PRECISIONS, Call
from torch import Tensor

HALVES = (torch.float16, torch.bfloat16)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- shapes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(8,), (4, 8), (4, 2, 8), (4, 2, 3, 8), (2, 1, 2, 2, 8)])
def test_a_step_keeps_the_rank(shape: tuple[int, ...], norm: str) -> None:
    """A factor of shape [B, 1, 1, 1] turned a [4, 8] perturbation into [4, 1, 4, 8]."""
    delta, grad = randn(*shape) / 8, randn(*shape, seed=1)
    moved = ops.pgd_step(delta, grad, step_size=0.5, eps=1.0, norm=norm)
    assert moved.shape == shape
    per_group = torch.full((shape[0] if len(shape) > 1 else 1,), 0.5)
    again = ops.pgd_step(delta, grad, step_size=per_group, eps=2 * per_group, norm=norm)
    assert torch.equal(moved, again)


def test_per_sample_radii_stay_on_their_samples_when_sizes_agree() -> None:
    """With as many samples as features a radius per sample broadcasts along either dimension."""
    x = torch.ones(4, 4)
    eps = torch.tensor([0.0, 0.25, 0.5, math.inf])
    wanted = torch.tensor([0.0, 0.25, 0.5, 1.0])[:, None].expand(4, 4)
    assert torch.equal(ops.project(x, eps=eps, norm="linf"), wanted)
    assert torch.allclose(ops.project(x, eps=2 * eps, norm="l2"), wanted)
    assert torch.allclose(ops.project(x, eps=4 * eps, norm="l1"), wanted)
    moved = ops.pgd_step(x * 0, x, step_size=torch.tensor([0.0, 1, 2, 3]), eps=9.0, norm="linf")
    assert torch.equal(moved, torch.arange(4.0)[:, None].expand(4, 4))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_point_within_the_ball_is_not_moved(dtype: torch.dtype) -> None:
    """A misplaced parenthesis gave [1, 0, 0] as the projection of [0.1, 0, 0] on the 5-ball."""
    x = torch.tensor([[0.1, 0, 0], [3.0, 0, 0]], dtype=dtype)
    for norm in NORMS:
        for eps in (5.0, torch.tensor([5.0, 3.0])):
            assert torch.equal(ops.project(x, eps=eps, norm=norm), x)


# --- zeros, small and large numbers ---------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", NORMS)
def test_radius_zero_and_zero_delta_give_zero(norm: str, dtype: torch.dtype) -> None:
    """eps = 0, delta = 0 and a zero gradient each gave NaN by a division by the norm."""
    zero, x = torch.zeros(3, 7, dtype=dtype), randn(3, 7).to(dtype)
    options: dict[str, Any] = {"step_size": 0.5, "norm": norm}
    for eps in (0.0, torch.zeros(3)):
        assert torch.equal(ops.project(x, eps=eps, norm=norm), zero)
        assert torch.equal(ops.pgd_step(x, x, eps=eps, **options), zero)
        assert torch.equal(ops.random_start(x, eps=eps, norm=norm), zero)
        assert torch.equal(ops.gaussian_noise(x, std=1.0, eps=eps, norm=norm), zero)
    assert torch.equal(ops.project(zero, eps=1.0, norm=norm), zero)
    assert torch.equal(ops.pgd_step(zero, zero, eps=1.0, **options), zero)
    for style in ("mi", "apgd"):
        moved, velocity = ops.momentum_step(
            zero, zero, zero, decay=0.9, eps=1.0, style=style, **options
        )
        assert torch.equal(moved, zero)
        assert torch.equal(velocity, zero)
    assert distances(Call([zero], options), ops.pgd_step(zero, x, eps=1.0, **options)).min() > 0.4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-12, 1e-8, 1e-6, 1e30])
def test_a_step_is_as_long_as_asked_whatever_the_gradient(scale: float, dtype: torch.dtype) -> None:
    """A floor of 1e-6 under the norm made the step for ||g|| = 1e-8 a hundredth of its length."""
    grad = (randn(5, 33).sign() * scale).to(dtype)
    zero = torch.zeros_like(grad)
    rough = PRECISIONS[dtype].unit * 4
    for norm in NORMS:
        call = Call([zero, grad], {"step_size": 0.5, "eps": math.inf, "norm": norm})
        length = distances(call, run("pgd_step", call)[0])
        assert torch.allclose(length, torch.full_like(length, 0.5), rtol=rough)
    _, velocity = ops.momentum_step(zero, zero, grad, decay=0.5, step_size=0.1, eps=1.0)
    length = velocity.double().abs().sum(1)
    assert torch.allclose(length, torch.ones_like(length), rtol=rough)


@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1e-8])
def test_small_points_are_projected_on_smaller_balls(scale: float) -> None:
    """A floor under the norm leaves points outside balls smaller than it."""
    x = randn(4, 50) * scale
    for norm in NORMS:
        call = Call([x], {"eps": scale / 2, "norm": norm})
        length = distances(call, run("project", call)[0])
        assert (length <= scale / 2).all()
        assert torch.allclose(length, torch.full_like(length, scale / 2), rtol=1e-5)


@pytest.mark.parametrize("dtype", HALVES)
def test_norms_of_half_precision_neither_vanish_nor_overflow(dtype: torch.dtype) -> None:
    """A float16 norm was 0.0017 where the true one is 0.0026, and inf for elements of about 300."""
    small = torch.full((2, 700), 1e-4, dtype=dtype)
    large = torch.full((2, 60000), 300.0, dtype=dtype)
    for x in (small, large):
        true = x.double().norm(dim=1)
        for norms in (
            ops.group_norm(x),
            ops.per_sample_norm([x]),
            ops.clip_and_sum([x], max_norm=1.0)[1],
            ops.linear_grad_norm(x, torch.ones(2, 1, dtype=dtype)),
        ):
            assert norms.dtype == torch.float32
            assert torch.allclose(norms.double(), true, rtol=1e-6)
        call = Call([torch.zeros_like(x), x], {"step_size": 1.0, "eps": math.inf})
        length = distances(call, run("pgd_step", call)[0])
        assert torch.allclose(length, torch.ones_like(length), rtol=4 * PRECISIONS[dtype].unit)
        length = distances(Call([x], {}), ops.project(x, eps=0.001))
        assert (length <= 0.001).all()
        assert torch.allclose(length, torch.full_like(length, 0.001), rtol=0.02)
    sums = ops.clip_and_sum([large], max_norm=1.0)[0][0]
    wanted = 2 / math.sqrt(60000)
    assert torch.allclose(sums.double(), torch.full_like(sums.double(), wanted), rtol=0.01)


def test_norms_of_many_elements_are_accurate() -> None:
    """A float32 norm of 16.8 million elements was off by 6.5e-4 (of one million by 1e-5)."""
    x = randn(1, 1 << 24).abs_().add_(0.5)
    for norm, order in (("l2", 2), ("l1", 1)):
        true = float(torch.linalg.vector_norm(x, order, dtype=torch.float64))
        assert math.isclose(float(ops.group_norm(x, norm=norm)), true, rel_tol=2e-7)
    true = float(torch.linalg.vector_norm(x, dtype=torch.float64))
    assert math.isclose(float(ops.per_sample_norm([x])), true, rel_tol=2e-7)
    moved = ops.project(x, eps=1.0)
    assert float(torch.linalg.vector_norm(moved, dtype=torch.float64)) <= 1
    assert torch.allclose(moved, x / true, rtol=1e-6)


# --- projections ----------------------------------------------------------------------------------


def test_the_l1_projection_is_no_rescale() -> None:
    """Dividing by the l1 norm gives a point of the ball, but not the nearest one."""
    x = torch.tensor([[3.0, 1.0, -0.5], [1.0, 1.0, 1.0]])
    projected = ops.project(x, eps=1.5, norm="l1")
    assert torch.allclose(projected, torch.tensor([[1.5, 0, 0], [0.5, 0.5, 0.5]]), atol=1e-6)
    x = randn(6, 40)
    projected = ops.project(x, eps=4.0, norm="l1")
    rescaled = x * (4 / x.abs().sum(1, keepdim=True)).clamp(max=1)
    assert ((projected - x).norm(dim=1) < (rescaled - x).norm(dim=1) - 0.1).all()


def test_radii_of_a_tensor_bound_are_one_per_group_in_every_norm() -> None:
    """A clamp by a tensor bound took one radius for all samples, or failed to broadcast."""
    x = randn(6, 3, 5) * 4
    eps = torch.tensor([0.0, 0.1, 0.2, 1.0, 2.0, math.inf])
    for norm in NORMS:
        together = ops.project(x, eps=eps, norm=norm)
        for i in range(6):
            alone = ops.project(x[i : i + 1], eps=float(eps[i]), norm=norm)
            assert torch.equal(together[i : i + 1], alone)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("top", [1, 3, 0.25])
def test_no_more_coordinates_move_than_asked_where_gradients_tie(
    top: float, dtype: torch.dtype
) -> None:
    """Keeping all that reach a threshold moves more than k coordinates where values tie there."""
    grad = torch.tensor([[1.0] * 12, [-2.0] * 12, [0, 5, 5, 5, 5, 0, 0, 0, 0, 0, 0, 0]])
    grad = grad.to(dtype)
    zero = torch.zeros_like(grad)
    moved = ops.pgd_step(zero, grad, step_size=1.0, eps=1.0, norm="l1", top=top)
    count = top if top >= 1 else round(top * 12)
    assert ((moved != 0).sum(1) == count).all()
    lowest = grad.double().abs().sort(dim=1, descending=True, stable=True).indices[:, :count]
    assert (moved.gather(1, lowest) != 0).all(), "the lowest indices win"


def test_no_more_tokens_move_than_the_budget_where_norms_tie() -> None:
    grad = torch.ones(3, 6, 4)
    zero = torch.zeros_like(grad)
    for norm in NORMS:
        options: dict[str, Any] = {"step_size": 1.0, "eps": 1.0, "norm": norm, "max_groups": 2}
        moved = ops.pgd_step(zero, grad, group="token", **options)
        assert torch.equal((moved != 0).any(2), torch.tensor([True] * 2 + [False] * 4).expand(3, 6))


# --- groups do not mix ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_sample_moves_however_large_another_is(dtype: torch.dtype) -> None:
    """With the maximum over the batch in an l1 step, only the sample that holds it moved."""
    grad = randn(5, 20).to(dtype) * torch.tensor([1e-4, 1e-2, 1, 100, 3e3], dtype=dtype)[:, None]
    zero = torch.zeros_like(grad)
    for norm in NORMS:
        call = Call([zero, grad], {"step_size": 1.0, "eps": math.inf, "norm": norm})
        length = distances(call, run("pgd_step", call)[0])
        assert torch.allclose(length, torch.ones_like(length), rtol=4 * PRECISIONS[dtype].unit)
    for norm in NORMS:
        together = ops.project(grad, eps=1e-3, norm=norm)
        alone = [ops.project(grad[i : i + 1], eps=1e-3, norm=norm) for i in range(5)]
        assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("norm", NORMS)
def test_one_nonfinite_gradient_stops_its_own_sample_only(norm: str, bad: float) -> None:
    """A NaN in one sample's gradient made the whole batch NaN."""
    delta, grad = randn(4, 9) / 20, randn(4, 9, seed=1)
    clean = ops.pgd_step(delta, grad, step_size=0.1, eps=1.0, norm=norm)
    grad[2, 5] = bad
    moved = ops.pgd_step(delta, grad, step_size=0.1, eps=1.0, norm=norm)
    kept = torch.where(torch.arange(4)[:, None] == 2, delta, clean)
    assert torch.equal(moved, kept)


@pytest.mark.parametrize("mode", ["flat", "per_layer", "automatic"])
def test_one_nonfinite_sample_leaves_the_clipped_sum_alone(mode: str) -> None:
    """One infinite sample made all clipping factors NaN."""
    grads = [randn(5, 8), randn(5, 3, 2, seed=1)]
    rest = [0, 1, 2, 4]
    wanted, _ = ops.clip_and_sum([g[rest] for g in grads], max_norm=0.5, mode=mode)
    for bad in (math.nan, math.inf):
        for tensor in grads:
            tensor[3] = bad
        sums, norms = ops.clip_and_sum(grads, max_norm=0.5, mode=mode)
        for a, b in zip(sums, wanted, strict=True):
            assert torch.allclose(a, b, atol=1e-6)
        assert not norms[3].isfinite().any()
        assert norms[rest].isfinite().all()


def test_padding_takes_no_part() -> None:
    """Where padding counts, a sample's ball and step depend on how far its batch was padded."""
    delta, grad = randn(2, 4, 6), randn(2, 4, 6, seed=1)
    mask = torch.ones(2, 4, dtype=torch.bool)
    longer = torch.cat([mask, torch.zeros(2, 5, dtype=torch.bool)], 1)
    more = randn(2, 5, 6, seed=2) * 9
    for norm in NORMS:
        options: dict[str, Any] = {"step_size": 0.5, "eps": 1.0, "norm": norm}
        short = ops.pgd_step(delta, grad, mask=mask, **options)
        long = ops.pgd_step(
            torch.cat([delta, more], 1), torch.cat([grad, more], 1), mask=longer, **options
        )
        assert torch.allclose(long[:, :4], short, rtol=1e-6, atol=1e-7)
        assert not long[:, 4:].any()


# --- per-sample norms -----------------------------------------------------------------------------


def test_the_padding_row_has_no_gradient() -> None:
    """Counting the padding row gave norms of [2.07, 1.39] where [1.19, 0.98] were true."""
    indices = torch.tensor([[0, 3, 0, 5], [0, 0, 2, 2]])
    table = torch.zeros(6, 7, requires_grad=True)
    grad = randn(2, 4, 7)
    out = torch.nn.functional.embedding(indices, table, padding_idx=0)
    true = [torch.autograd.grad(out[b], table, grad[b], retain_graph=True)[0] for b in range(2)]
    wanted = torch.stack([t.norm() for t in true])
    assert torch.allclose(ops.embedding_grad_norm(indices, grad, padding_idx=0), wanted)
    assert (ops.embedding_grad_norm(indices, grad) > wanted + 0.1).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_repeated_indices_that_cancel_give_zero(dtype: torch.dtype) -> None:
    """The root of a sum over index pairs was NaN in half of such cases: rounding went below 0."""
    grad = randn(64, 3, 16).to(dtype)
    pair = torch.cat([grad, -grad], 1)
    indices = torch.arange(3).repeat(64, 2)
    norm = ops.embedding_grad_norm(indices, pair)
    assert torch.equal(norm, torch.zeros_like(norm))
    weight, state = torch.ones(3, 16, dtype=dtype), torch.zeros(3)
    before = weight.clone()
    ops.rowwise_adagrad_(weight, state, indices, pair, lr=0.1, eps=0.0, max_norm=1.0)
    assert weight.isfinite().all()
    assert state.isfinite().all()
    ops.rowwise_adagrad_(before, torch.zeros(3), torch.arange(3), grad[0] * 0, lr=0.1, eps=0.0)
    assert torch.equal(before, torch.ones_like(before)), "a zero gradient moves nothing"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ["auto", "direct"])
def test_linear_norms_are_right_where_positions_cancel(dtype: torch.dtype, method: str) -> None:
    """The norm by pairs of positions lost 3e-2 of its value in float32 where they nearly cancel."""
    a = randn(4, 1, 32).expand(4, 8, 32).contiguous().to(dtype)
    g = randn(4, 4, 16, seed=1).to(dtype)
    g = torch.cat([g, -g], 1)
    g[:, 0, 0] += g[:, 0, 0].abs() * 0.01 + 0.001
    for bias in (False, True):
        exact = reference.linear_grad_norm(a.double(), g.double(), bias=bias)
        norm = ops.linear_grad_norm(a, g, bias=bias, method=method)
        assert torch.allclose(norm.double(), exact, rtol=1e-3 if dtype != torch.float64 else 1e-9)
    g[:, 4:] = -g[:, :4]
    norm = ops.linear_grad_norm(a, g, method=method)
    assert (norm <= PRECISIONS[torch.float32].unit * 64 * ops.per_sample_norm([g])).all()


@pytest.mark.parametrize("exponents", [(300, 300), (-350, -345), (990, -750), (-1030, 700), (0, 0)])
def test_linear_norms_are_those_of_numbers_of_any_size(exponents: tuple[int, int]) -> None:
    """Of float64 numbers of 2^300 it was infinite, and of those of 2^-350 zero."""
    # Few digits, which denormal numbers have as well.
    a, g = ((8 * randn(2, 3, 4, seed=seed)).round().double() / 8 for seed in (1, 2))
    left, right = (2.0**exponent for exponent in exponents)
    exact = reference.linear_grad_norm(a, g) * (left * right)
    for method in ("gram", "direct"):
        norm = ops.linear_grad_norm(a * left, g * right, method=method)
        assert torch.allclose(norm, exact, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("dims", [1, 2, 3, 4])
def test_linear_norms_take_any_number_of_positions(dims: int) -> None:
    """Layers on [B, *, I] inputs of four dimensions raised."""
    shape = (3, 2, 4, 2)[:dims]
    a, g = randn(*shape, 5).double(), randn(*shape, 6, seed=1).double()
    weight = torch.einsum("bti,bto->boi", a.reshape(3, -1, 5), g.reshape(3, -1, 6))
    assert torch.allclose(ops.linear_grad_norm(a, g), weight.flatten(1).norm(dim=1))


def test_a_bound_of_zero_infinity_and_a_zero_norm_are_what_they_say() -> None:
    grads = [randn(3, 5)]
    grads[0][1] = 0
    zero, _ = ops.clip_and_sum(grads, max_norm=0.0)
    everything, norms = ops.clip_and_sum(grads, max_norm=math.inf)
    assert not zero[0].any()
    assert torch.allclose(everything[0], grads[0].sum(0))
    assert norms[1] == 0
    sums, _ = ops.clip_and_sum([torch.zeros(2, 4)], max_norm=0.0)
    assert not sums[0].any()
