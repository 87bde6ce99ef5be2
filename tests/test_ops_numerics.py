"""Every op against its definition in float64, on every sample.

A sample is run in float32 and, in turn, in one of the other dtypes: its neighbours in the table,
which differ from it in one thing, take the others.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import samples
import torch
from compare import assert_matches_reference, run, same_bits
from embattle import ops, reference
from samples import DTYPES, NORMS, Sample


def _samples(names: tuple[str, ...]) -> list[object]:
    return [
        pytest.param(op, sample, DTYPES[1 + index % 3], id=f"{op}-{sample.name}")
        for op in names
        for index, sample in enumerate(samples.for_op(op))
    ]


@pytest.mark.parametrize(("op", "sample", "other"), _samples(samples.OPS))
def test_op_is_what_the_reference_says(op: str, sample: Sample, other: torch.dtype) -> None:
    for dtype in (torch.float32, other):
        call = sample.call(dtype)
        results = run(op, call)
        original = sample.call(dtype)
        assert_matches_reference(op, original, results)
        if not op.endswith("_"):
            for given, kept in zip(_inputs(call), _inputs(original), strict=True):
                assert same_bits(given, kept), f"{dtype}: the op wrote one of its arguments"


@pytest.mark.parametrize(("op", "sample", "other"), _samples(tuple(samples.WRITING)))
def test_in_place_form_writes_the_same_bits(op: str, sample: Sample, other: torch.dtype) -> None:
    if sample.name.endswith("/expanded"):
        return  # has no memory of its own to write; test_ops_errors.py shows what it raises
    for dtype in (torch.float32, other):
        call = sample.call(dtype)
        written = call.args[: samples.WRITING[op]]
        results = run(op, call)
        for result, argument in zip(results, written, strict=True):
            assert result is argument
        functional = sample.call(dtype)
        for result, wanted in zip(results, run(op.removesuffix("_"), functional), strict=True):
            assert same_bits(result, wanted), f"{dtype}: in place differs from functional"
        counted, kept = call.kwargs.get("nonfinite"), functional.kwargs.get("nonfinite")
        assert counted is None or torch.equal(counted, kept)


@pytest.mark.parametrize("op", ["pgd_step", "momentum_step"])
def test_nonfinite_groups_are_counted(op: str) -> None:
    for sample in samples.for_op(op):
        if "nonfinite" not in sample.name:
            continue
        call, wanted = sample.call(), sample.call()
        run(op, call)
        run(op, wanted, source=reference)
        assert torch.equal(call.kwargs["nonfinite"], wanted.kwargs["nonfinite"])
        assert wanted.kwargs["nonfinite"].any(), "a sample that counts nothing shows nothing"


def _inputs(call: samples.Call) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    call.map(lambda t: (found.append(t), t)[1])
    return [t for t in found if t.dtype != torch.int32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(70, 64), (33, 100), (129, 1, 72), (9, 3, 300)])
def test_short_groups_draw_what_they_draw_alone(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Many short groups are drawn together; groups that are told by offsets, one by one."""
    like = torch.zeros(shape, dtype=dtype)
    rows = math.prod(shape[:-1])
    alone: dict[str, Any] = {"offsets": torch.arange(0, rows + 1, rows // shape[0])}
    radii = torch.linspace(0, 2, shape[0])  # the first group stays where it is
    for options in (
        *({"norm": norm, "eps": eps} for norm in NORMS for eps in (0.7, radii)),
        {"std": 0.3},
        {"std": 0.3, "eps": 1.0},
        {"std": radii},
    ):
        op = ops.gaussian_noise if "std" in options else ops.random_start
        together, each = (
            op(like, **options, **cut, generator=torch.Generator().manual_seed(5))
            for cut in ({}, alone)
        )
        assert same_bits(together, each), options


@pytest.mark.parametrize("dtype", DTYPES)
def test_steps_with_a_ball_alone_are_those_of_the_general_op(dtype: torch.dtype) -> None:
    """Where there is nothing but a ball the ops have fewer arguments, and the same bits."""
    g = torch.Generator().manual_seed(0)
    delta, grad = (torch.randn(6, 5, 24, generator=g).to(dtype) for _ in range(2))
    grad[2, 1, 3] = math.nan
    for norm in NORMS:
        for group in ("sample", "token"):
            counts = [torch.zeros(6 if group == "sample" else 30, dtype=torch.int32) for _ in "abc"]
            general = {"mask": torch.ones(6, 5, dtype=torch.bool)}
            options: dict[str, Any] = {"eps": 1.5, "norm": norm, "group": group}
            step = options | {"step_size": 0.4}
            want = ops.pgd_step(delta, grad, **step, **general, nonfinite=counts[0])
            found = ops.pgd_step(delta, grad, **step, nonfinite=counts[1])
            inside = delta.clone()
            ops.pgd_step_(inside, grad, **step, nonfinite=counts[2])
            assert same_bits(found, want)
            assert same_bits(inside, want)
            assert counts[0].sum() == 1
            assert counts[0].tolist() == counts[1].tolist() == counts[2].tolist()
            assert same_bits(
                ops.project(delta, **options), ops.project(delta, **options, **general)
            )


def test_a_float64_step_that_nearly_undoes_the_delta_ends_at_the_border() -> None:
    # The sums of one pass cancel: ||d + a g||^2 is 1e-4 of its terms.
    delta = torch.tensor([[-0.2949133561062002], [0.70]], dtype=torch.float64)
    grad = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    eps = torch.tensor([1e-3, 1e-3])
    found = ops.pgd_step(delta, grad, step_size=0.3, eps=eps, norm="l2")
    wanted = torch.tensor([[1.0], [1.0]], dtype=torch.float64) * eps.double()[:, None]
    assert torch.allclose(found, wanted, rtol=4e-16, atol=0)
