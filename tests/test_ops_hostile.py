"""Every op against the reference on hostile values (tests/hostile.py), however the processor rounds
subnormals and on any number of threads; boxes that do not hold their origin."""

from __future__ import annotations

import math
from collections.abc import Iterator

import hostile_values as hostile
import pytest
import samples
import torch
from compare import assert_matches_reference, expected, run, same_bits
from embattle import ops, reference
from samples import INF, NAN, Call

SEEDS = 120


@pytest.fixture
def flush() -> Iterator[None]:
    """Has the processor flush subnormals, and leaves it as it was."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    yield
    torch.set_flush_denormal(False)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("op", hostile.OPS)
def test_hostile_values_give_what_the_reference_says(op: str) -> None:
    for seed in range(SEEDS):
        call = hostile.call(op, seed)
        hostile.assert_matches(op, call, run(op, call.clone()), seed)


@pytest.mark.parametrize("op", hostile.OPS)
def test_flushed_subnormals_and_threads_change_no_bit(op: str, flush: None, threads: None) -> None:
    for seed in range(SEEDS):
        torch.set_flush_denormal(False)
        call = hostile.call(op, seed)
        torch.set_num_threads(1)
        want = run(op, call.clone())
        given = call.clone()
        torch.set_num_threads(2)
        torch.set_flush_denormal(True)
        got = run(op, given)
        torch.set_flush_denormal(False)
        assert all(same_bits(a, b) for a, b in zip(got, want, strict=True)), seed


@pytest.mark.parametrize("dtype", samples.DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("norm", samples.NORMS)
def test_a_small_gradient_makes_a_whole_step_where_subnormals_are_flushed(
    norm: str, dtype: torch.dtype, flush: None, threads: None
) -> None:
    # Large enough for several threads: each has the setting of its own.
    torch.set_flush_denormal(False)
    shape = (4, 70_000)
    small = 1e-5 if dtype == torch.float16 else samples.PRECISIONS[dtype].least * 40
    grad = (torch.randn(shape, dtype=torch.float64).sign() * small).to(dtype)
    delta, x0 = torch.zeros(shape, dtype=dtype), torch.full(shape, 0.5, dtype=dtype)
    calls = [
        ("group_norm", Call([grad], {"norm": norm})),
        ("pgd_step", Call([delta, grad], {"eps": 2.0, "step_size": 1.0, "norm": norm})),
        (
            "pgd_step",
            Call([x0.clone(), grad], {"eps": 2.0, "step_size": 1.0, "norm": norm, "x0": x0}),
        ),
        (
            "momentum_step",
            Call(
                [delta, delta.clone(), grad],
                {"eps": 2.0, "step_size": 1.0, "norm": norm, "decay": 0.5},
            ),
        ),
        ("per_sample_norm", Call([[grad]], {})),
        ("clip_and_sum", Call([[grad]], {"max_norm": 1.0})),
        ("linear_grad_norm", Call([torch.ones(4, 1, dtype=dtype), grad], {})),
        ("embedding_grad_norm", Call([torch.zeros(4, 1, dtype=torch.int64), grad[:, None]], {})),
    ]
    wanted = [expected(op, call) for op, call in calls]
    torch.set_num_threads(2)
    torch.set_flush_denormal(True)
    results = [run(op, call.clone()) for op, call in calls]
    torch.set_flush_denormal(False)
    torch.set_num_threads(1)  # the reference's: torch's other threads may flush now
    for (op, call), result, want in zip(calls, results, wanted, strict=True):
        assert_matches_reference(op, call, result)
        assert want[0].abs().max() > 0, "a result of zero shows nothing"


# ---- Boxes ----


def boxes() -> Iterator[tuple[str, dict[str, float | torch.Tensor]]]:
    """Options around a delta of [2, 6] or [2, 400]: boxes that the origin may lie outside of."""
    for width in (6, 400):
        shape = (2, width)
        g = torch.Generator().manual_seed(width)
        x0 = torch.randn(shape, generator=g)
        edge = torch.where(torch.rand(shape, generator=g) < 0.02, 1.02, 0.98) * x0.abs()
        yield f"apart-{width}", {"x0": torch.zeros(shape), "lower": 5.0, "upper": 6.0}
        yield f"touching-{width}", {"x0": torch.zeros(shape), "lower": 0.01, "upper": 6.0}
        yield f"edge-{width}", {"x0": x0, "upper": edge}
        yield f"no-origin-{width}", {"lower": 0.03, "upper": 0.05}
        low, high = torch.full(shape, 0.4), torch.full(shape, -0.1)
        yield f"crossed-{width}", {"lower": low, "upper": high}
        nans = torch.where(torch.rand(shape, generator=g) < 0.5, NAN, 0.01)
        yield f"nan-{width}", {"lower": nans, "upper": 1 - nans}
        yield f"one-nan-{width}", {"lower": torch.tensor(NAN), "upper": 0.2}
        yield f"infinite-{width}", {"lower": -INF, "upper": INF}
        yield f"beyond-{width}", {"lower": 0.1, "upper": INF}


@pytest.mark.parametrize("dtype", samples.DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("norm", samples.NORMS)
@pytest.mark.parametrize("box", [pytest.param(box, id=name) for name, box in boxes()])
def test_the_box_wins_whatever_it_is(
    box: dict[str, float | torch.Tensor], norm: str, dtype: torch.dtype
) -> None:
    tensors = [t for t in box.values() if isinstance(t, torch.Tensor) and t.dim()]
    shape = tensors[0].shape if tensors else torch.Size((2, 6))
    g = torch.Generator().manual_seed(7)
    box = {k: t.to(dtype) if isinstance(t, torch.Tensor) else t for k, t in box.items()}
    x = (torch.randn(shape, generator=g) * 3 + box.get("x0", torch.zeros(shape))).to(dtype)
    grad = torch.randn(shape, generator=g).to(dtype)
    for eps in (0.0, 1e-3, 1.0, 30.0, INF):
        options = {**box, "eps": eps, "norm": norm}
        step = {**options, "step_size": 0.7}
        for op, call in (
            ("project", Call([x], options)),
            ("pgd_step", Call([x, grad], step)),
            ("momentum_step", Call([x, grad, grad], {**step, "decay": 0.9})),
            ("momentum_step", Call([x, x, grad], {**step, "decay": 0.75, "style": "apgd"})),
            ("gaussian_noise", Call([x], {**options, "std": 0.3})),
        ):
            results = run(op, call.clone())
            assert_matches_reference(op, call, results)
            low, high = (
                torch.as_tensor(box.get(name, none), dtype=dtype).nan_to_num(nan=none)
                for name, none in (("lower", -INF), ("upper", INF))
            )
            assert (results[0] >= low.minimum(high)).all()
            assert (results[0] <= high).all()
        once = ops.project(x, **options)
        assert same_bits(ops.project(once, **options), once)


def test_a_projection_outside_the_ball_ends() -> None:
    # One unit in the last place at a time would take hours.
    x0 = torch.zeros(1, 4, dtype=torch.float64)
    box = {"eps": 1.0, "norm": "linf", "lower": 5.0, "upper": 6.0, "x0": x0}
    assert (ops.project(torch.full((1, 4), 5.5, dtype=torch.float64), **box) == 5).all()
    x0 = torch.rand(1, 4096)
    x0[0, 9] = 1.02
    out = ops.pgd_step(x0, torch.ones_like(x0), step_size=0.1, eps=0.3, norm="linf", x0=x0, upper=1)
    assert out[0, 9] == 1


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_the_reference_projects_on_ball_and_box_wherever_the_origin_is(norm: str) -> None:
    # The nearest point: none of many feasible points is nearer.
    g = torch.Generator().manual_seed(1)
    origin = torch.tensor([[0.4, -0.3, 0.0]], dtype=torch.float64)
    lower = torch.tensor([[0.5, -1.0, -0.2]], dtype=torch.float64)
    x = torch.tensor([[2.0, 0.8, -1.5]], dtype=torch.float64)
    out = reference.project(x, eps=0.6, norm=norm, x0=origin, lower=lower, upper=1.0)
    points = lower + (1 - lower) * torch.rand(200_000, 3, generator=g, dtype=torch.float64)
    inside = (points - origin).norm(p=1 if norm == "l1" else 2, dim=1) <= 0.6
    assert inside.sum() > 1000
    assert ((points[inside] - x).norm(dim=1) >= (out - x).norm() - 1e-12).all()
    assert (out - origin).norm(p=1 if norm == "l1" else 2) <= 0.6 + 1e-12
    far = reference.project(x, eps=0.05, norm=norm, x0=origin, lower=lower, upper=1.0)
    torch.testing.assert_close(far, origin.clamp(min=lower))


@pytest.mark.parametrize("norm", samples.NORMS)
def test_the_gradient_of_a_projection_whose_origin_is_outside_the_box(norm: str) -> None:
    g = torch.Generator().manual_seed(4)
    x0 = torch.randn(3, 8, generator=g, dtype=torch.float64)
    for eps in (0.3, 2.0, 4.0):
        grads = []
        for source in (ops, reference):
            x = (x0 * 1.5 + 0.7).requires_grad_()
            out = source.project(x, eps=eps, norm=norm, x0=x0, lower=-0.4, upper=0.9)
            (out * torch.arange(1, 25).view(3, 8)).sum().backward()
            grads.append(x.grad)
        torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["pgd_step", "project", "random_start", "gaussian_noise"])
def test_a_float_box_costs_no_op_of_its_own(name: str) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    called: list[str] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            called.append(str(func))
            return func(*args, **(kwargs or {}))

    x = torch.randn(2, 5)
    args, options = [x], {"eps": 1.0, "lower": -0.5, "upper": 1}
    if name == "pgd_step":
        args, options = [x, x], {**options, "step_size": 0.1}
    if name == "gaussian_noise":
        options["std"] = 0.1
    with Record():
        getattr(ops, name)(*args, **options)
    assert [c for c in called if "randint" not in c] == [
        f"embattle.{name}{'_constant' if name == 'project' else ''}.default"
    ]


def test_numbers_that_make_no_box_are_refused() -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"project: lower must not be above upper, got 1 and 0"):
        ops.project(x, eps=1.0, lower=1.0, upper=0.0)
    with pytest.raises(ValueError, match=r"project: upper must not be a NaN"):
        ops.project(x, eps=1.0, upper=math.nan)
    assert (ops.project(x, eps=1.0, lower=0.5, upper=0.5) == 0.5).all()


def test_automatic_clipping_of_tiny_and_of_zero_samples_stays_finite() -> None:
    grad = torch.zeros(3, 4, dtype=torch.float64)
    grad[1, 0], grad[2, 1] = 5e-324, 2.0
    sums, _ = ops.clip_and_sum([grad], max_norm=1.0, mode="automatic", gamma=0.0)
    assert sums[0].isfinite().all()
    assert sums[0][1] == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 3), (5, 130), (2, 40_000)])
def test_l1_noise_is_projected_before_it_is_rounded_to_a_half_type(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    # The threshold is a difference of numbers near 3,000, between which a half type has gaps of 2.
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    call = Call([x], {"std": 1000.0, "eps": 30.0, "norm": "l1"})
    assert_matches_reference("gaussian_noise", call, run("gaussian_noise", call.clone()))


def test_a_number_far_above_a_tiny_l1_ball_in_a_box_comes_to_its_edge() -> None:
    # eps / |x| is below all numbers.
    x = torch.tensor([[7e298, 0.0], [-1e30, 1e28]], dtype=torch.float64)
    for source in (ops, reference):
        out = source.project(x, eps=1e-30, norm="l1", lower=-1.0, upper=1.0)
        edge = torch.tensor([1e-30, -1e-30], dtype=torch.float64)
        torch.testing.assert_close(out[:, 0], edge, rtol=1e-9, atol=0)


@pytest.mark.parametrize("norm", samples.NORMS)
def test_the_neighbour_of_a_bound_keeps_its_bits(norm: str) -> None:
    # The origin is so far that both are at the same distance from it.
    high = torch.full((2, 9), 0.6376450061798096, dtype=torch.float64)
    x0 = torch.full_like(high, -0.650658130645752)
    x = torch.nextafter(high, torch.zeros_like(high))
    assert torch.equal(x - x0, high - x0)
    assert same_bits(ops.project(x, x0=x0, upper=high, eps=30.0, norm=norm), x)
