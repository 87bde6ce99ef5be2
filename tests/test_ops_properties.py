"""What holds for every input: balls are never left, groups never mix, threads never matter."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

pytest.importorskip("hypothesis")
import samples
import torch
from compare import assert_close, assert_matches_reference, distances, run, same_bits
from embattle import ops
from embattle.ops.reference.groups import Groups
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import DTYPES, NORMS, PRECISIONS, Call
from torch import Tensor

MOVING = ("pgd_step", "project", "random_start", "gaussian_noise", "momentum_step")


class Cut(NamedTuple):
    """A shape and how it is cut into groups."""

    shape: tuple[int, ...]
    options: dict[str, Any]


@st.composite
def cuts(draw: st.DrawFn, masks: bool = True) -> Cut:
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    if draw(st.integers(0, 9)) == 0:
        shape = (*shape[:-1], draw(st.sampled_from([31, 64, 257, 1031])))
    rows = math.prod(shape[:-1])
    options: dict[str, Any] = {}
    kind = draw(st.sampled_from(["sample", "token", "ragged"]))
    if kind == "ragged":
        inner = draw(st.lists(st.integers(0, rows), max_size=4))
        options["offsets"] = torch.tensor([0, *sorted(inner), rows])
    else:
        options["group"] = kind
    if masks and draw(st.booleans()):
        flags = draw(st.lists(st.booleans(), min_size=rows, max_size=rows))
        options["mask"] = torch.tensor(flags, dtype=torch.bool).reshape(shape[:-1])
    return Cut(shape, options)


dtypes = st.sampled_from(DTYPES)
norms = st.sampled_from(NORMS)
seeds = st.integers(0, 2**20)
exponents = st.sampled_from([-40, -30, -9, -3, -1, 0, 0, 0, 1, 4, 20, 38])
radii = st.one_of(st.sampled_from([0.0, 1.0, 0.1, 1e-30, 1e-7, 3.0, 100.0]), st.floats(1e-4, 50.0))
kinds = st.sampled_from(["normal", "normal", "range", "ties", "equal", "denormal", "zeros"])


def values(
    shape: tuple[int, ...], dtype: torch.dtype, seed: int, kind: str = "normal", exponent: int = 0
) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    x = samples.VALUES[kind](shape, dtype, g).double() * 10.0**exponent
    limit = torch.finfo(dtype).max / 1024
    return x.clamp(-limit, limit).to(dtype)


def assert_inside(call: Call, result: Tensor) -> None:
    """The norm, in float64 on the stored values, is at most eps. Not "about": at most.

    Only for float64 itself is the rounding of the norm computed here let through.
    """
    eps = torch.as_tensor(call.kwargs["eps"], dtype=torch.float64)
    if result.dtype == torch.float64:
        eps = eps * (1 + 8 * 2.0**-52)
    over = distances(call, result) - eps
    assert not (over > 0).any(), f"{float(over.max())} beyond eps {call.kwargs['eps']}"


@st.composite
def moves(draw: st.DrawFn) -> tuple[str, Call]:
    """A call of one of the ops that end in a projection, on any values."""
    cut = draw(cuts())
    dtype = draw(dtypes)
    seed = draw(seeds)
    norm = draw(norms)
    options: dict[str, Any] = {"eps": draw(radii), "norm": norm, **cut.options}
    x = values(cut.shape, dtype, seed, draw(kinds), draw(exponents))
    if draw(st.integers(0, 3)) == 0:
        centre = values(cut.shape, dtype, seed + 1)
        options["x0"] = centre
        x = (centre.double() + x.double()).clamp(-1e4, 1e4).to(dtype)
        if draw(st.booleans()):
            options["lower"] = centre - values(cut.shape, dtype, seed + 2).abs()
            options["upper"] = centre + values(cut.shape, dtype, seed + 3).abs()
    elif draw(st.integers(0, 3)) == 0:
        options["lower"] = -values(cut.shape, dtype, seed + 2).abs()
        options["upper"] = values(cut.shape, dtype, seed + 3).abs()
    op = draw(st.sampled_from(MOVING))
    args = [x]
    if op in ("pgd_step", "momentum_step"):
        options["step_size"] = draw(st.sampled_from([0.0, 0.1, 1.0, -3.0, 1e5]))
        if op == "momentum_step":
            options["decay"] = draw(st.floats(0, 1))
            options["style"] = draw(st.sampled_from(["mi", "apgd"]))
            args.append(values(cut.shape, dtype, seed + 4))
        args.append(values(cut.shape, draw(dtypes), seed + 5, draw(kinds)))
    elif op == "gaussian_noise":
        options["std"] = draw(st.sampled_from([0.0, 0.1, 10.0]))
    return op, Call(args, options)


@settings(max_examples=400)
@given(moves())
def test_nothing_leaves_its_ball_or_box(move: tuple[str, Call]) -> None:
    op, call = move
    result = run(op, call)[0]
    if not call.args[0].isfinite().all():
        return
    assert result.isfinite().all()
    assert_inside(call, result)
    if "lower" in call.kwargs:
        mask = call.kwargs.get("mask", torch.tensor(True))[..., None]
        assert ((result >= call.kwargs["lower"]) | ~mask).all()
        assert ((result <= call.kwargs["upper"]) | ~mask).all()


@settings(max_examples=200)
@given(moves())
def test_projection_is_idempotent(move: tuple[str, Call]) -> None:
    _, call = move
    names = ("eps", "norm", "group", "offsets", "mask", "x0", "lower", "upper")
    options = {k: v for k, v in call.kwargs.items() if k in names}
    once = ops.project(call.args[0], **options)
    assert same_bits(ops.project(once, **options), once)


@settings(max_examples=150)
@given(cuts(), dtypes, norms, seeds, st.sampled_from([-30, -20, -8, -2, 3, 8, 20]))
def test_step_length_does_not_depend_on_the_gradients_size(
    cut: Cut, dtype: torch.dtype, norm: str, seed: int, exponent: int
) -> None:
    if dtype == torch.float16:
        exponent = max(-3, min(exponent, 2))
    grad = values(cut.shape, dtype, seed)
    grad = torch.where(grad.abs() < 1e-2, 0.5, grad)
    options: dict[str, Any] = {"step_size": 0.5, "eps": math.inf, "norm": norm, **cut.options}
    zero = torch.zeros(cut.shape, dtype=dtype)
    step = ops.pgd_step(zero, grad, **options)
    scaled = ops.pgd_step(zero, grad * 2.0**exponent, **options)
    assert_close(scaled, step, torch.zeros(()), cut.shape[-1], "a scaled gradient's step")
    call = Call([zero, grad], options)
    wanted = torch.where(Groups.of(zero, **_cut(options)).used.any(1), 0.5, 0.0)
    length = distances(call, scaled)
    slack = 2 * PRECISIONS[dtype].unit * max(1.0, math.sqrt(grad.numel()) * (norm == "l1"))
    assert ((length - wanted).abs() <= slack).all()


def _cut(options: dict[str, Any]) -> dict[str, Any]:
    return {
        "group": options.get("group", "sample"),
        "offsets": options.get("offsets"),
        "mask": options.get("mask"),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_the_smallest_gradient_there_is_makes_a_whole_step(norm: str, dtype: torch.dtype) -> None:
    grad = torch.zeros(2, 300, dtype=dtype)
    grad[0, 3] = PRECISIONS[dtype].least
    grad[1, 250] = -torch.finfo(dtype).max
    step = ops.pgd_step(torch.zeros_like(grad), grad, step_size=0.5, eps=1.0, norm=norm)
    assert step[0, 3] == 0.5
    assert step[1, 250] == -0.5
    assert step.count_nonzero() == 2


@settings(max_examples=200)
@given(
    cuts(masks=False),
    dtypes,
    dtypes,
    norms,
    seeds,
    st.sampled_from([math.nan, math.inf, -math.inf]),
)
def test_a_nonfinite_gradient_stays_in_its_group(
    cut: Cut, dtype: torch.dtype, grad_dtype: torch.dtype, norm: str, seed: int, poison: float
) -> None:
    x = values(cut.shape, dtype, seed)
    grad = values(cut.shape, grad_dtype, seed + 1)
    g = torch.Generator().manual_seed(seed)
    victim = int(torch.randint(grad.numel(), (1,), generator=g))
    poisoned = grad.clone()
    poisoned.view(-1)[victim] = poison
    groups = Groups.of(x, **_cut(cut.options))
    hit = ~groups.pack(poisoned).isfinite().all(1)
    ball: dict[str, Any] = {"eps": 1.5, "norm": norm, **cut.options}
    options = {**ball, "step_size": 0.7}
    count = torch.zeros(len(hit), dtype=torch.int32)
    clean = ops.pgd_step(x, grad, **options)
    result = ops.pgd_step(x, poisoned, nonfinite=count, **options)
    assert torch.equal(count, hit.int())
    kept = ops.project(x, **ball)
    wanted = groups.unpack(
        torch.where(hit[:, None], groups.pack(kept), groups.pack(clean)), torch.zeros_like(x)
    )
    assert same_bits(result, wanted.to(dtype))
    for style in ("mi", "apgd"):
        velocity = values(cut.shape, dtype, seed + 2)
        more = {**options, "decay": 0.5, "style": style}
        clean = ops.momentum_step(x, velocity, grad, **more)[0]
        result = ops.momentum_step(x, velocity, poisoned, **more)[0]
        wanted = groups.unpack(
            torch.where(hit[:, None], groups.pack(kept), groups.pack(clean)), torch.zeros_like(x)
        )
        assert same_bits(result, wanted.to(dtype))


@settings(max_examples=100)
@given(cuts(masks=False), dtypes, norms, seeds)
def test_a_nonfinite_delta_stays_in_its_group(
    cut: Cut, dtype: torch.dtype, norm: str, seed: int
) -> None:
    x = values(cut.shape, dtype, seed)
    poisoned = x.clone()
    poisoned.view(-1)[seed % x.numel()] = math.nan
    groups = Groups.of(x, **_cut(cut.options))
    healthy = groups.pack(poisoned).isfinite().all(1)
    for op, options in (("project", {}), ("pgd_step", {"step_size": 0.5})):
        args = [x, x] if op == "pgd_step" else [x]
        options = {"eps": 0.9, "norm": norm, **cut.options, **options}
        clean = getattr(ops, op)(*args, **options)
        result = getattr(ops, op)(poisoned, *args[1:], **options)
        assert same_bits(groups.pack(result)[healthy], groups.pack(clean)[healthy])


@settings(max_examples=200)
@given(moves())
def test_masked_rows_are_zero_and_do_not_count(move: tuple[str, Call]) -> None:
    op, call = move
    if "mask" not in call.kwargs:
        return
    mask = call.kwargs["mask"]
    masked = ~mask[..., None].expand(call.args[0].shape)
    results = run(op, call)
    base = call.kwargs.get("x0", torch.zeros_like(call.args[0]))
    assert torch.equal(results[0][masked], base[masked])
    other = Call([a.masked_fill(masked, math.nan) for a in call.args], call.kwargs)
    for result, again in zip(results, run(op, other), strict=True):
        assert same_bits(result, again)
        assert same_bits(result[masked], torch.zeros_like(result[masked])) or "x0" in call.kwargs
    norms_ = {**_cut(call.kwargs), "norm": call.kwargs["norm"]}
    assert same_bits(
        ops.group_norm(call.args[0], **norms_), ops.group_norm(other.args[0], **norms_)
    )


@settings(max_examples=100)
@given(moves(), seeds)
def test_per_group_strengths_act_on_their_groups(move: tuple[str, Call], seed: int) -> None:
    """Running with one eps and step per group is running each group with its own."""
    op, call = move
    groups = Groups.of(call.args[0], **_cut(call.kwargs))
    g = torch.Generator().manual_seed(seed)
    count = len(groups.rows)
    eps = torch.rand(count, generator=g) * 2
    step = torch.rand(count, generator=g)
    some = dict(call.kwargs, eps=eps)
    for name in ("step_size", "std"):
        if name in call.kwargs:
            some[name] = step
    together = groups.pack(run(op, Call(call.args, some))[0])
    for i in range(min(count, 3)):
        for name in ("eps", "step_size", "std"):
            if name in some:
                some[name] = float((eps if name == "eps" else step)[i])
        alone = groups.pack(run(op, Call(call.args, some))[0])
        assert same_bits(together[i], alone[i])


@settings(max_examples=60)
@given(norms, dtypes, seeds, st.integers(1, 4), st.integers(1, 5), st.integers(1, 40))
def test_the_three_cuts_agree(
    norm: str, dtype: torch.dtype, seed: int, batch: int, tokens: int, dim: int
) -> None:
    x = values((batch, tokens, dim), dtype, seed)
    grad = values(x.shape, dtype, seed + 1)
    options: dict[str, Any] = {"eps": 1.0, "step_size": 0.5, "norm": norm}
    rows = torch.arange(0, batch * tokens + 1)
    for group, offsets in (("sample", rows[::tokens]), ("token", rows)):
        uniform = ops.pgd_step(x, grad, group=group, **options)
        ragged = ops.pgd_step(x, grad, offsets=offsets.contiguous(), **options)
        assert same_bits(uniform, ragged)


# --- threads --------------------------------------------------------------------------------------


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


BIG = (
    samples.Geometry("one-large-sample", (1, 96, 1031), masked=0.1),
    samples.Geometry("many-samples", (70, 9, 131)),
    samples.Geometry("many-tokens", (30, 33, 64), group="token", masked=0.2),
    samples.Geometry("many-short", (9001, 7)),
    samples.Geometry("ragged", (1200, 64), offsets=(0, 3, 3, 900, 1000, 1200)),
)


def _big_call(op: str, geometry: samples.Geometry, norm: str, dtype: torch.dtype) -> Call:
    g = torch.Generator().manual_seed(5)
    options: dict[str, Any] = {"norm": norm, **geometry.options(g)}
    args = [geometry.tensor(dtype, g)]
    if op != "group_norm":
        options["eps"] = geometry.per_group(0.5, 20.0, g)
    if op in ("pgd_step", "momentum_step"):
        args += [geometry.tensor(dtype, g) for _ in range(1 + (op == "momentum_step"))]
        options["step_size"] = 2.0
    if op == "momentum_step":
        options["decay"] = 0.9
    if op == "gaussian_noise":
        options["std"] = 0.3
    return Call(args, options)


@pytest.mark.parametrize("op", samples.GROUP_OPS)
def test_group_ops_give_the_same_bits_for_any_number_of_threads(op: str, threads: None) -> None:
    for geometry in BIG:
        for norm in NORMS:
            for dtype in (torch.float32, torch.bfloat16):
                call = _big_call(op, geometry, norm, dtype)
                results = []
                for count in (1, 2, 3):
                    torch.set_num_threads(count)
                    results.append(run(op, call))
                for other in results[1:]:
                    for a, b in zip(results[0], other, strict=True):
                        assert same_bits(a, b), f"{geometry.name}, {norm}, {dtype}"


@pytest.mark.parametrize("op", [op for op in samples.OPS if op not in samples.GROUP_OPS])
def test_other_ops_give_the_same_bits_for_any_number_of_threads(op: str, threads: None) -> None:
    g = torch.Generator().manual_seed(6)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    def ids(*shape: int) -> Tensor:
        return torch.randint(0, 50, shape, generator=g)

    lists = [random(64, 1031), random(64, 3), random(64, 40, 30)]
    build = {
        "per_sample_norm": lambda: Call([lists], {}),
        "clip_and_sum": lambda: Call([lists], {"max_norm": 20.0, "weights": random(64).abs()}),
        "linear_grad_norm": lambda: Call([random(40, 30, 64), random(40, 30, 33)], {}),
        "embedding_grad_norm": lambda: Call([ids(99, 70), random(99, 70, 32)], {}),
        "embedding_grad_sum": lambda: Call(
            [ids(90, 30), random(90, 30, 64), 50], {"weights": random(90), "padding_idx": 3}
        ),
        "embedding_perturb": lambda: Call(
            [random(50, 64), ids(90, 30), random(50, 64), ids(90, 30)], {}
        ),
        "rowwise_adagrad_": lambda: Call(
            [random(50, 64), random(50).abs(), ids(5000), random(5000, 64)], {"lr": 0.1}
        ),
    }
    call = build[op]()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(run(op, call.clone()))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert same_bits(a, b)


# --- random numbers -------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["random_start", "gaussian_noise"])
def test_seeds_decide_random_numbers(op: str) -> None:
    x = torch.zeros(5, 37)
    options: dict[str, Any] = {"eps": 1.0} if op == "random_start" else {"std": 1.0}

    def draw(generator: torch.Generator | None) -> Tensor:
        result: Tensor = getattr(ops, op)(x, generator=generator, **options)
        return result

    g = torch.Generator().manual_seed(11)
    first, second = draw(g), draw(g)
    assert not torch.equal(first, second)
    assert torch.equal(first, draw(torch.Generator().manual_seed(11)))
    torch.manual_seed(11)
    assert torch.equal(first, draw(None)), "the default generator gives the same numbers"
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("op", ["random_start", "gaussian_noise"])
def test_half_precision_draws_the_same_numbers_as_float32(op: str) -> None:
    options: dict[str, Any] = {"eps": 1.0, "norm": "linf"}
    if op == "gaussian_noise":
        options = {"std": 1.0}
    draws = [
        getattr(ops, op)(
            torch.zeros(9, 31, dtype=dtype),
            generator=torch.Generator().manual_seed(2),
            **options,
        )
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
    ]
    assert torch.allclose(draws[0], draws[1].float(), rtol=2e-3, atol=1e-6)
    assert torch.allclose(draws[0], draws[2].float(), rtol=1.6e-2, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 7, 331), (2, 1, 140_001)])
def test_long_draws_are_those_of_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Groups that begin between blocks of words, cross the stretches drawn at once, or outgrow the
    buffer that they are drawn into."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    mask = torch.ones(shape[:-1], dtype=torch.bool)
    mask[0, 1:3] = False
    for norm in NORMS:
        for options in ({"norm": norm}, {"norm": norm, "mask": mask}):
            start = Call([x], {"eps": 1.5, **options})
            assert_matches_reference("random_start", start, run("random_start", start.clone()))
            assert_inside(start, run("random_start", start.clone())[0])
            noise = Call([x], {"std": 0.5, "eps": 7.0, **options})
            assert_matches_reference("gaussian_noise", noise, run("gaussian_noise", noise.clone()))
            assert_inside(noise, run("gaussian_noise", noise.clone())[0])


# --- fast paths -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", NORMS)
def test_short_groups_are_the_same_alone(norm: str, dtype: torch.dtype) -> None:
    """Short groups go several at a time, whatever their neighbours hold."""
    g = torch.Generator().manual_seed(5)
    x = torch.randn(23, 77, generator=g).to(dtype)
    grad = torch.randn(23, 77, generator=g).to(dtype)
    x[3] = 0
    x[4] *= 1e-4
    grad[6, 5] = math.inf
    grad[7] = 0
    grad[8] = -x[8]
    eps = torch.rand(23, generator=g) * {"l1": 30, "l2": 12, "linf": 2}[norm]
    eps[10] = 0
    for options in ({"eps": eps}, {"eps": 0.7}):

        def alone(k: int, options: dict[str, Any] = options) -> dict[str, Any]:
            return {
                name: v[k : k + 1] if isinstance(v, Tensor) else v for name, v in options.items()
            }

        projected = ops.project(x, norm=norm, **options)
        stepped = ops.pgd_step(x, grad, step_size=0.4, norm=norm, **options)
        in_place = ops.pgd_step_(x.clone(), grad, step_size=0.4, norm=norm, **options)
        assert same_bits(stepped, in_place)
        for k in range(len(x)):
            row = slice(k, k + 1)
            assert same_bits(projected[row], ops.project(x[row], norm=norm, **alone(k)))
            step = ops.pgd_step(x[row], grad[row], step_size=0.4, norm=norm, **alone(k))
            assert same_bits(stepped[row], step)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [1e-6, 3e-3, 0.1, 0.6, 0.999])
@pytest.mark.parametrize("kind", ["normal", "heavy", "ties", "equal", "sorted", "peak"])
def test_l1_thresholds_of_long_groups(kind: str, share: float, dtype: torch.dtype) -> None:
    """Few and many elements left, in places that a sample of the group does and does not show."""
    g = torch.Generator().manual_seed(9)
    x = torch.randn(2, 30_011, generator=g)
    if kind == "heavy":
        x = x**5
    elif kind == "ties":
        x = (x * 2).round() / 2
    elif kind == "equal":
        x = x.sign() * 0.3
    elif kind == "sorted":
        x = x.sort(1).values
    elif kind == "peak":
        x[:, 17] = 1e4
    x = x.to(dtype)
    eps = x.double().abs().sum(1) * share
    call = Call([x], {"eps": eps.float(), "norm": "l1"})
    result = run("project", call)
    assert_matches_reference("project", call, result)
    assert_inside(call, result[0])
    step = Call([x, x.roll(1, 1)], {"eps": eps.float(), "norm": "l1", "step_size": 0.5})
    result = run("pgd_step", step)
    assert_matches_reference("pgd_step", step, result)
    assert_inside(step, result[0])


# --- per-sample gradients -------------------------------------------------------------------------


@settings(max_examples=100)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=4),
    st.integers(0, 6),
    dtypes,
    seeds,
    st.sampled_from([0.0, 0.1, 1.0, 30.0, math.inf]),
)
def test_clipped_samples_keep_within_the_bound(
    widths: list[int], batch: int, dtype: torch.dtype, seed: int, bound: float
) -> None:
    grads = [values((batch, width), dtype, seed + i) for i, width in enumerate(widths)]
    if batch > 1:
        grads[0][1] = 0
    for b in range(batch):
        weights = torch.zeros(batch)
        weights[b] = 1
        sums, norms_ = ops.clip_and_sum(grads, max_norm=bound, weights=weights)
        length = math.sqrt(sum(float(s.double().square().sum()) for s in sums))
        wanted = min(float(norms_[b]), bound)
        assert math.isclose(length, wanted, rel_tol=3 * PRECISIONS[dtype].unit, abs_tol=1e-6)


@settings(max_examples=100)
@given(st.integers(1, 6), dtypes, seeds, st.sampled_from(["flat", "per_layer", "automatic"]))
def test_weight_0_removes_a_sample(batch: int, dtype: torch.dtype, seed: int, mode: str) -> None:
    """Whatever the sample holds: the sums are those of the others."""
    grads = [values((batch, 7), dtype, seed), values((batch, 2, 3), dtype, seed + 1)]
    weights = torch.rand(batch, generator=torch.Generator().manual_seed(seed)) + 0.1
    gone = seed % batch
    rest = [i for i in range(batch) if i != gone]
    removed = weights.clone()
    removed[gone] = 0
    poisoned = [grad.clone() for grad in grads]
    poisoned[1][gone] = math.nan
    options: dict[str, Any] = {"max_norm": 1.0, "mode": mode}
    wanted, _ = ops.clip_and_sum([g[rest] for g in grads], weights=weights[rest], **options)
    for given_grads in (grads, poisoned):
        sums, _ = ops.clip_and_sum(given_grads, weights=removed, **options)
        for a, b in zip(sums, wanted, strict=True):
            assert_close(a, b, b.double().abs().max() + 1, batch, mode)
    sums, norms_ = ops.clip_and_sum(poisoned, weights=weights, **options)
    poisoned_norm = norms_[gone] if mode != "per_layer" else norms_[gone, 1]
    assert poisoned_norm.isnan(), "the norm of a poisoned sample is reported as it is"
    assert all(s.isfinite().all() for s in sums)


@settings(max_examples=60)
@given(
    st.integers(1, 4),
    st.integers(1, 9),
    st.integers(1, 12),
    st.integers(1, 12),
    seeds,
    st.booleans(),
)
def test_linear_norms_are_those_of_autograd(
    batch: int, tokens: int, inputs: int, outputs: int, seed: int, bias: bool
) -> None:
    a = values((batch, tokens, inputs), torch.float64, seed)
    g = values((batch, tokens, outputs), torch.float64, seed + 1)
    wanted = []
    for b in range(batch):
        layer = torch.nn.Linear(inputs, outputs, bias=bias, dtype=torch.float64)
        layer(a[b]).backward(g[b])
        grads = [p.grad for p in layer.parameters() if p.grad is not None]
        wanted.append(torch.cat([p.flatten() for p in grads]).norm())
    for method in ("auto", "gram", "direct"):
        norm = ops.linear_grad_norm(a, g, bias=bias, method=method)
        assert torch.allclose(norm, torch.stack(wanted), rtol=1e-9)


@settings(max_examples=60)
@given(
    st.integers(1, 4),
    st.integers(0, 9),
    st.integers(1, 6),
    st.integers(1, 7),
    st.sampled_from([None, 0]),
    seeds,
)
def test_embedding_norms_are_those_of_autograd(
    batch: int, tokens: int, rows: int, dim: int, padding: int | None, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(0, rows, (batch, tokens), generator=generator)
    grad = values((batch, tokens, dim), torch.float64, seed)
    wanted = []
    for b in range(batch):
        table = torch.zeros(rows, dim, dtype=torch.float64, requires_grad=True)
        out = torch.nn.functional.embedding(indices[b], table, padding_idx=padding)
        (table_grad,) = torch.autograd.grad(out, table, grad[b])
        wanted.append(table_grad.norm())
    norm = ops.embedding_grad_norm(indices, grad, padding_idx=padding)
    assert torch.allclose(norm, torch.stack(wanted), rtol=1e-12)


@settings(max_examples=60)
@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=5),
    st.sampled_from(["sum", "mean"]),
    st.sampled_from([None, 0]),
    st.booleans(),
    seeds,
)
def test_bag_norms_are_those_of_autograd(
    lengths: list[int], mode: str, padding: int | None, weighted: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    count = int(starts[-1])
    indices = torch.randint(0, 4, (count,), generator=generator)
    grad = values((len(lengths), 5), torch.float64, seed)
    weights = values((count,), torch.float64, seed + 1) if weighted and mode == "sum" else None
    wanted = []
    for b in range(len(lengths)):
        bag = slice(int(starts[b]), int(starts[b + 1]))
        table = torch.zeros(4, 5, dtype=torch.float64, requires_grad=True)
        out = torch.nn.functional.embedding_bag(
            indices[bag],
            table,
            torch.tensor([0]),
            mode=mode,
            per_sample_weights=None if weights is None else weights[bag],
            padding_idx=padding,
        )
        (table_grad,) = torch.autograd.grad(out, table, grad[b : b + 1])
        wanted.append(table_grad.norm())
    for offsets in (starts, starts[:-1].contiguous()):
        norm = ops.embedding_grad_norm(
            indices,
            grad,
            padding_idx=padding,
            offsets=offsets,
            mode=mode,
            per_sample_weights=weights,
        )
        assert torch.allclose(norm, torch.stack(wanted), rtol=1e-12)


@settings(max_examples=60)
@given(st.integers(1, 30), st.integers(1, 6), dtypes, seeds)
def test_rowwise_adagrad_leaves_other_rows_alone(
    count: int, rows: int, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = values((20, 8), dtype, seed)
    state = torch.rand(20, generator=generator).to(
        torch.float64 if dtype == torch.float64 else torch.float32
    )
    before, state_before = weight.clone(), state.clone()
    indices = torch.randint(0, rows, (count,), generator=generator)
    ops.rowwise_adagrad_(weight, state, indices, values((count, 8), dtype, seed + 1), lr=0.5)
    touched = torch.zeros(20, dtype=torch.bool)
    touched[indices] = True
    assert torch.equal(weight[~touched], before[~touched])
    assert torch.equal(state[~touched], state_before[~touched])
    assert (state[touched] > state_before[touched]).all()
