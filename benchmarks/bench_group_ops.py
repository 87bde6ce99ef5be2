"""The group ops against a copy of the same bytes, eager torch and torch.compile.

    make bench BENCH="benchmarks/bench_group_ops.py --out benchmarks/results"

The candidates of a case are run in turn, round after round, so that a machine that slows down slows
all of them. Ratios of medians are to a copy, by as many threads, of the bytes that the op has to
move at least. A bar is what the op is held to. pytest-benchmark keeps the times of the op itself.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import embattle.ops as ops
import peers
import pytest
import torch
from torch import Tensor

ROUNDS = int(os.environ.get("EMBATTLE_BENCH_ROUNDS", "15"))
COMPILE = os.environ.get("EMBATTLE_BENCH_COMPILE", "1") == "1"
Run = Callable[[], Any]


class Case(NamedTuple):
    """An op at one size."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    passes: int  # tensors that have to be read or written at least
    bar: float | None
    op: Callable[[Tensor, Tensor], Any]
    eager: Callable[[Tensor, Tensor], Any]


def _cases() -> list[Case]:
    big, middle, rows = (64, 128, 768), (256, 32, 128), (4096, 64)
    half = (torch.bfloat16, torch.float16)
    step: dict[str, tuple[Any, Any]] = {
        "l2 pgd_step": (
            lambda d, g: ops.pgd_step(d, g, step_size=0.3, eps=1.0),
            lambda d, g: peers.l2_step(d, g, 0.3, 1.0),
        ),
        "linf pgd_step": (
            lambda d, g: ops.pgd_step(d, g, step_size=0.003, eps=0.01, norm="linf"),
            lambda d, g: peers.linf_step(d, g, 0.003, 0.01),
        ),
        "l1 pgd_step": (
            lambda d, g: ops.pgd_step(d, g, step_size=0.3, eps=5.0, norm="l1"),
            lambda d, g: peers.l1_step(d, g, 0.3, 5.0),
        ),
        "l1 project": (
            lambda d, g: ops.project(d, eps=5.0, norm="l1"),
            lambda d, g: peers.l1_project(d, 5.0),
        ),
        "random_start": (lambda d, g: ops.random_start(d, eps=1.0), lambda d, g: peers.l2_start(d)),
        "gaussian_noise": (
            lambda d, g: ops.gaussian_noise(d, std=1.0),
            lambda d, g: d + torch.randn_like(d),
        ),
    }
    passes = {"l1 project": 2, "random_start": 1, "gaussian_noise": 2}
    bars: dict[tuple[str, tuple[int, ...]], float] = {
        ("l2 pgd_step", big): 1.05,
        ("l2 pgd_step", middle): 1.3,
        ("linf pgd_step", big): 0.85,
        ("linf pgd_step", middle): 1.1,
        ("l1 project", big): 1.4,
        ("l1 project", middle): 3,
        ("l1 pgd_step", big): 1.6,
        ("l1 pgd_step", middle): 3.5,
        ("random_start", big): 2,
        ("gaussian_noise", big): 2,
    }
    cases = []
    for name, (op, eager) in step.items():
        for shape in (big, middle, rows):
            bar = bars.get((name, shape))
            cases.append(Case(name, shape, torch.float32, passes.get(name, 3), bar, op, eager))
    for name in ("l2 pgd_step", "linf pgd_step"):
        for dtype in half:
            cases.append(Case(name, big, dtype, 3, 1.3, *step[name]))
    return cases


def _title(case: Case) -> str:
    return f"{case.name} {list(case.shape)} {str(case.dtype).removeprefix('torch.')}"


def medians(candidates: dict[str, Run], rounds: int = ROUNDS) -> dict[str, float]:
    """Median seconds of every candidate, run in turn."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for run in candidates.values():
        run()
    for _ in range(rounds):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


HEADER = (
    f"{'op':<46} {'ms':>8} {'ratio':>7} {'bar':>6} {'eager':>7} {'compile':>8}   "
    "(ratios to a copy of the same bytes)"
)


@pytest.mark.parametrize("case", _cases(), ids=_title)
def test_group_op(case: Case, benchmark: Any, report: dict[str, list[str]]) -> None:
    generator = torch.Generator().manual_seed(0)
    delta = (torch.randn(case.shape, generator=generator) * 0.01).to(case.dtype)
    grad = torch.randn(case.shape, generator=generator).to(case.dtype)
    source = torch.zeros(delta.numel() * case.passes // 2, dtype=case.dtype)
    target = torch.empty_like(source)
    candidates: dict[str, Run] = {
        "copy": lambda: target.copy_(source),
        "op": lambda: case.op(delta, grad),
        "eager": lambda: case.eager(delta, grad),
    }
    if COMPILE:
        compiled = torch.compile(case.eager)
        candidates["compile"] = lambda: compiled(delta, grad)
    took = medians(candidates)
    benchmark.pedantic(candidates["op"], rounds=3, iterations=1)
    ratio = {name: seconds / took["copy"] for name, seconds in took.items()}
    benchmark.extra_info.update(
        bytes=case.passes * delta.numel() * delta.element_size(),
        threads=torch.get_num_threads(),
        bar=case.bar,
        **{f"ratio_{name}": value for name, value in ratio.items()},
    )
    lines = report.setdefault("group ops", [HEADER])
    bar = "-" if case.bar is None else f"{case.bar:.2f}"
    compiled_ratio = f"{ratio['compile']:.2f}" if COMPILE else "-"
    lines.append(
        f"{_title(case):<46} {took['op'] * 1e3:8.3f} {ratio['op']:7.2f} {bar:>6} "
        f"{ratio['eager']:7.2f} {compiled_ratio:>8}"
    )


@pytest.mark.parametrize("name", ["pgd_step", "pgd_step_", "project"])
def test_call_overhead(name: str, benchmark: Any, report: dict[str, list[str]]) -> None:
    """A call that has nothing to do, against torch.add: what is left is what a call costs."""
    delta, grad = torch.randn(4, 16), torch.randn(4, 16)
    calls: dict[str, Run] = {
        "pgd_step": lambda: ops.pgd_step(delta, grad, step_size=0.1, eps=1.0),
        "pgd_step_": lambda: ops.pgd_step_(delta, grad, step_size=0.1, eps=1.0),
        "project": lambda: ops.project(delta, eps=1.0),
    }

    def repeated(run: Run) -> Run:
        return lambda: [run() for _ in range(500)]

    took = medians({"add": repeated(lambda: torch.add(delta, grad)), "op": repeated(calls[name])})
    benchmark(calls[name])
    ratio = took["op"] / took["add"]
    benchmark.extra_info.update(ratio_add=ratio, bar=2.5)
    assert math.isfinite(ratio)
    lines = report.setdefault("call overhead on [4, 16]", [f"{'op':<12} {'us':>7} {'x add':>7}"])
    lines.append(f"{name:<12} {took['op'] * 2e3:7.2f} {ratio:7.2f}   bar 2.50")
