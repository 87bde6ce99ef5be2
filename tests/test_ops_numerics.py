"""Every op against its definition in float64, on every sample.

A sample is run in float32 and, in turn, in one of the other dtypes: its neighbours in the table,
which differ from it in one thing, take the others.
"""

from __future__ import annotations

import pytest
import samples
import torch
from compare import assert_matches_reference, run, same_bits
from embattle import reference
from samples import DTYPES, Sample


def _samples(ops: tuple[str, ...]) -> list[object]:
    return [
        pytest.param(op, sample, DTYPES[1 + index % 3], id=f"{op}-{sample.name}")
        for op in ops
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
