"""CUDA tensors where an op has no CUDA kernel: a helpful error, or the CPU with one warning."""

from __future__ import annotations

import warnings

import pytest
import torch
from embattle import _C, ops
from embattle.ops import _no_cuda

STEP = _no_cuda.through_the_cpu(torch.ops.embattle.pgd_step.default)


@pytest.mark.skipif(_C.build_info()["cuda"], reason="this build has CUDA kernels")
def test_the_error_says_how_to_rebuild(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EMBATTLE_CPU_FALLBACK", raising=False)
    x = torch.ones(2, 3)
    with pytest.raises(RuntimeError, match=r"embattle\.pgd_step: .*EMBATTLE_CUDA=ON"):
        STEP(x, x, 0.1, 1.0)


def test_the_fallback_gives_the_cpu_result_and_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBATTLE_CPU_FALLBACK", "1")
    monkeypatch.setattr(_no_cuda, "_warned", False)
    x, g = torch.randn(2, 2, 3)
    with pytest.warns(RuntimeWarning, match="runs on the CPU"):
        result = STEP(x, g, 0.1, 1.0)
    assert result.device == x.device
    assert torch.equal(result.cpu(), ops.pgd_step(x.cpu(), g.cpu(), step_size=0.1, eps=1.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        STEP(x, g, 0.1, 1.0)


def test_the_fallback_writes_what_the_op_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBATTLE_CPU_FALLBACK", "1")
    monkeypatch.setattr(_no_cuda, "_warned", True)
    x, g = torch.randn(2, 2, 3)
    count = torch.zeros(2, dtype=torch.int32)
    g[1, 0] = torch.nan
    want = ops.pgd_step(x.cpu(), g.cpu(), step_size=0.1, eps=1.0)
    step = _no_cuda.through_the_cpu(torch.ops.embattle.pgd_step_.default)
    step(x, g, 0.1, 1.0, nonfinite=count)
    assert torch.equal(x.cpu(), want)
    assert count.tolist() == [0, 1]


def test_every_op_has_a_cuda_implementation() -> None:
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("embattle::"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"), name
