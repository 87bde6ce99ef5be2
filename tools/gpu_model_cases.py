"""What `make gpu-model` counts: every op at real sizes, by the kernels in the emulator.

A launch of a device's size would take minutes: a launch whose blocks do not meet runs a few of them
(`cohorts`), spread over its grid; one whose blocks meet runs whole, on a device and a problem that
are both `reduce` times smaller.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "emulator"))
import emulated

COHORTS = 4


@dataclass
class Case:
    """An op at one size."""

    name: str
    call: Callable[[], Any]
    compulsory: int  # bytes: every input read once, every output written once
    reduce: int = 1
    cohorts: int = COHORTS
    traffic_bar: bool = False
    list: bool = False  # it reads its list twice
    small: bool = False

    def device(self, gpu: Any) -> Any:
        """The part of a GPU that a case runs on."""
        few = gpu.multiprocessors // self.reduce
        return replace(
            gpu, multiprocessors=few, bandwidth=gpu.bandwidth * few / gpu.multiprocessors
        )


def library() -> ctypes.CDLL:
    """The emulator's counters."""
    lib = ctypes.CDLL(str(emulated.kernels().__file__))
    lib.emu_trace.argtypes = [ctypes.c_int, ctypes.c_uint64]
    lib.emu_registers.argtypes = [ctypes.c_int]
    lib.emu_trace_take.restype = ctypes.c_char_p
    return lib


def count(call: Callable[[], Any], cohorts: int = 0) -> list[dict[str, Any]]:
    """What the launches of a call cost; of each so many cohorts run, or all (0)."""
    lib = library()
    lib.emu_trace(1, cohorts)
    try:
        call()
        counts: list[dict[str, Any]] = json.loads(lib.emu_trace_take())
    finally:
        lib.emu_trace(0, 0)
    return counts


def traced(
    case: Case, gpu: Any, codes: Mapping[tuple[str, str], Any]
) -> tuple[list[dict[str, Any]], Path]:
    """What a case's launches cost on a device, and the library that they are in."""
    kernels, lib, device = emulated.kernels(), library(), case.device(gpu)
    clip = codes.get(("clip_kernel", gpu.arch))  # its grid is what the occupancy allows
    try:
        kernels.set_device(
            device.multiprocessors, gpu.major, gpu.shared_per_block, gpu.shared_per_multiprocessor
        )
        lib.emu_registers(clip.registers if clip else 128)
        return count(case.call, case.cohorts), Path(str(kernels.__file__))
    finally:
        kernels.set_device()
        lib.emu_registers(128)


def _bytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def _groups() -> Iterator[Case]:
    """Ops over groups."""
    half = torch.float16
    shapes: list[tuple[tuple[int, ...], str, torch.dtype, int]] = [
        ((64, 128, 768), "sample", torch.float32, 4),
        ((64, 128, 768), "sample", half, 4),
        ((64, 128, 768), "token", torch.float32, 1),
        ((4096, 64), "sample", torch.float32, 1),
        ((256, 32, 128), "sample", torch.float32, 1),
        ((64, 4096), "sample", torch.float32, 1),
        ((8, 1 << 20), "sample", torch.float32, 4),
    ]
    for shape, group, dtype, reduce in shapes:
        run = (shape[0] // reduce, *shape[1:])
        delta, grad = _random(*run, dtype=dtype), _random(*run, dtype=dtype)
        size = f"{list(shape)} {str(dtype).removeprefix('torch.')}"
        size += " per token" if group == "token" else ""
        at_all = {"reduce": reduce, "small": _bytes(delta) * reduce <= 1 << 20}
        for norm in ("linf", "l2", "l1"):
            options = {"norm": norm, "eps": 1.0, "group": group}
            if norm == "l1" and len(delta) * reduce == 8:
                continue  # its many rounds of a long group take minutes here
            yield Case(
                f"pgd_step {norm} {size}",
                partial(emulated.pgd_step, delta, grad, step_size=0.3, **options),
                3 * _bytes(delta),
                traffic_bar=norm != "l1",
                **at_all,
            )
        if shape == (64, 128, 768) and group == "sample" and dtype != half:
            options = {"norm": "l2", "eps": 1.0}
            one = _bytes(delta)
            mask = torch.rand(run[:2], generator=torch.Generator().manual_seed(1)) < 0.8
            x0 = torch.zeros_like(delta)
            boxed = {"x0": x0, "lower": -1.0, "upper": 1.0}
            yield Case(
                f"pgd_step l2, masked {size}",
                partial(emulated.pgd_step, delta, grad, step_size=0.3, mask=mask, **options),
                3 * one + _bytes(mask),
                **at_all,
            )
            yield Case(
                f"pgd_step linf, in a box {size}",
                partial(
                    emulated.pgd_step, delta, grad, step_size=0.3, norm="linf", eps=1.0, **boxed
                ),
                4 * one,
                **at_all,
            )
            for norm in ("linf", "l2", "l1"):
                yield Case(
                    f"project {norm} {size}",
                    partial(emulated.project, delta, norm=norm, eps=1.0),
                    2 * one,
                    traffic_bar=True,
                    **at_all,
                )
            yield Case(
                f"momentum_step l2 {size}",
                partial(
                    emulated.momentum_step,
                    delta,
                    torch.zeros_like(delta),
                    grad,
                    step_size=0.3,
                    decay=0.9,
                    **options,
                ),
                5 * one,
                **at_all,
            )
            yield Case(
                f"group_norm l2 {size}",
                partial(emulated.group_norm, delta, norm="l2"),
                one,
                traffic_bar=True,
                **at_all,
            )
            generator = torch.Generator().manual_seed(3)
            yield Case(
                f"random_start l2 {size}",
                partial(emulated.random_start, delta, generator=generator, **options),
                one,
                traffic_bar=True,
                **at_all,
            )
            yield Case(
                f"gaussian_noise {size}",
                partial(
                    emulated.gaussian_noise,
                    delta,
                    norm="l2",
                    eps=None,
                    std=0.1,
                    generator=generator,
                ),
                2 * one,
                traffic_bar=True,
                **at_all,
            )


def _lists() -> Iterator[Case]:
    """Ops on per-sample gradients."""
    for batch, widths in ((64, [262144]), (512, [4096, 256, 16384, 64])):
        grads = [_random(batch, width // 4) for width in widths]
        one = _bytes(*grads)
        size = f"{batch} x {widths} float32"
        yield Case(
            f"per_sample_norm {size}",
            partial(emulated.per_sample_norm, grads),
            one,
            reduce=4,
            traffic_bar=True,
        )
        yield Case(
            f"clip_and_sum {size}",
            partial(emulated.clip_and_sum, grads, max_norm=1.0),
            one + one // batch,
            reduce=4,
            traffic_bar=True,
            list=True,
        )
    for batch, tokens, reduce in ((256, 1, 1), (256, 128, 32)):
        input, grad = (_random(batch // reduce, tokens, 768) for _ in range(2))
        yield Case(
            f"linear_grad_norm [{batch}, {tokens}, 768] x [{batch}, {tokens}, 768]",
            partial(emulated.linear_grad_norm, input, grad),
            _bytes(input, grad),
            reduce=reduce,
            cohorts=0,
        )


def _tables() -> Iterator[Case]:
    """Ops on embedding tables."""
    generator = torch.Generator().manual_seed(2)
    batch, tokens, dim, rows = 512, 32, 64, 100_000
    indices = torch.randint(rows, (batch, tokens), generator=generator)
    unique, inverse = torch.unique(indices, return_inverse=True)
    weight, grad = _random(rows, dim), _random(batch, tokens, dim)
    delta = _random(len(unique), dim)
    size = f"[{batch}, {tokens}] x {dim}"
    unsorted = ", without CUB's sort"
    touched = len(unique) * dim * 4
    yield Case(
        f"embedding_grad_norm {size}",
        partial(emulated.embedding_grad_norm, indices, grad),
        _bytes(indices, grad),
    )
    yield Case(
        f"embedding_perturb {size}",
        partial(emulated.embedding_perturb, weight, indices, delta, inverse),
        2 * touched + _bytes(grad, indices, inverse),
    )
    yield Case(
        f"embedding_grad_sum {size}{unsorted}",
        partial(emulated.segment_sum, grad, inverse, len(unique)),
        _bytes(grad, inverse) + touched,
        cohorts=0,
    )
    state = torch.zeros(rows)
    yield Case(
        f"rowwise_adagrad_ {size}{unsorted}",
        partial(
            emulated.rowwise_adagrad_, weight, state, indices.flatten(), grad.flatten(0, 1), lr=0.1
        ),
        _bytes(grad, indices) + 2 * touched + 8 * len(unique),
        cohorts=0,
    )


def cases() -> Iterator[Case]:
    """All of them, one after another: each holds its tensors."""
    yield from _groups()
    yield from _lists()
    yield from _tables()
