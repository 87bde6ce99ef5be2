"""What all layers of a clipped model share, and how a tensor's rows belong to samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

# How many numbers are compared at a time.
_PART = 1 << 22


class Context:
    """State of one clipper.

    Attributes:
        names: the trained parameters and their names.
        batch_size: samples of the running forward pass, if known.
        declared: whether the user said so.
        silent: depth of rules at work, whose own operators are not looked at.
        backward: whether one of the clipper's own backward passes runs.
        collected: what that pass has delivered where it starts others; else None.
        ran_without_grad: whether a layer ran where no graph was built.
        spread: layers whose input has been given a row for every sample in this block.
        guessed: those that the model's call has given it without being told.
        again: layers that use parameters in checkpoints, and what watches these in backward passes.
        running: whether the model itself runs, not only parts of it.
        plain: whether it runs without rules.
        redrawn: whether a rule has drawn random numbers in another order than the operator does.
        probed: whether what is delivered now is checked.
    """

    def __init__(self) -> None:
        self.names: dict[Parameter, str] = {}
        self.batch_size: int | None = None
        self.declared = False
        self.silent = 0
        self.backward = False
        self.collected: list[tuple[object, Tensor]] | None = None
        self.ran_without_grad = False
        self.spread: set[str] = set()
        self.guessed: set[str] = set()
        self.again: dict[str, Any] = {}
        self.running = False
        self.plain = False
        self.redrawn = False
        self.probed = False


def body_of(function: Any) -> Any:
    """A function of torch's that does not look for modes: one that does turns them off inside."""
    return FunctionType(
        function.__code__,
        function.__globals__ | {"has_torch_function": lambda _: False},
        argdefs=function.__defaults__,
    )


class Layout(NamedTuple):
    """Where a tensor's dims hold the samples.

    Attributes:
        first, last: the dims, both included, taken as one.
        inner: how many of its rows in a row are of one sample: row ``(k * B + b) * inner + i`` is
            sample b's.
    """

    first: int
    last: int
    inner: int

    def of_samples(self, values: Tensor, rows: int) -> Tensor:
        """values [B] -> [rows]: each row's sample's."""
        outer = rows // max(len(values) * self.inner, 1)
        return values.repeat_interleave(self.inner).repeat(outer)

    def to_front(self, x: Tensor, samples: int) -> Tensor:
        """x -> [B, K, other dims]."""
        x = x.flatten(self.first, self.last) if self.last > self.first else x
        x = x.movedim(self.first, 0) if self.first else x
        times = x.shape[0] // samples
        if times == 1:
            return x.unsqueeze(1)
        if self.inner == times:
            return x.reshape(samples, times, *x.shape[1:])
        x = x.reshape(times // self.inner, samples, self.inner, *x.shape[1:])
        return x.transpose(0, 1).flatten(1, 2)

    def tokens(self, x: Tensor, samples: int, features: int) -> Tensor:
        """x -> [B, T, *features], where the last `features` dims stay."""
        outer = x.dim() - features
        if not self.last and x.shape[0] == samples:
            if outer == 1:
                return x.unsqueeze(1)
            if outer == 2:
                return x
        x = self.to_front(x, samples)
        own = x.shape[x.dim() - features :]
        return x.reshape(samples, math.prod(x.shape[1 : x.dim() - features]), *own)


def layouts(shape: Sequence[int], dims: Sequence[int], samples: int) -> list[list[Layout]]:
    """All layouts that the sizes allow, the likeliest first, those of the same dims together.

    Args:
        shape: a tensor's.
        dims: which of its dims may hold samples, the likeliest first.
        samples: B.
    """
    ranges = [(dim, dim) for dim in sorted(dims, key=lambda dim: shape[dim] != samples)]
    ranges += [(a, b) for a in sorted(dims) for b in range(a + 1, len(shape)) if b in dims]
    found = []
    for first, last in ranges:
        size = math.prod(shape[first : last + 1])
        parts = all(dim in dims for dim in range(first, last + 1))
        whole = first == last or all(shape[dim] % samples for dim in range(first, last + 1))
        if size and size % samples == 0 and parts and whole:
            times = size // samples
            inner = [n for n in range(1, times + 1) if times % n == 0]
            # Rows of one sample side by side, rows of all samples in turn, something between.
            inner = [times, *inner[:-1]] if times > 1 else inner
            found.append([Layout(first, last, n) for n in inner])
    return found


def tolerance(dtype: torch.dtype) -> float:
    """How far rounding may take two ways to compute the same apart, relative to what is summed."""
    if dtype in (torch.float16, torch.bfloat16):
        return 5e-2
    return 1e-4 if dtype == torch.float32 else 1e-9


def alike(found: Tensor, wanted: Tensor, limit: float, floor: float = 0.0) -> bool:
    """Whether two tensors are equal up to limit, relative to the largest number, or to floor."""
    ours, wanted = found.flatten(), wanted.expand_as(found).flatten()
    # In parts: copies of a language model's logits in float64 would not fit beside its graph.
    pairs = zip(torch.split(ours, _PART), torch.split(wanted, _PART), strict=True)
    parts = list(pairs) if len(ours) else []
    scale = max([floor, *[float(w.abs().nan_to_num(posinf=0).max()) for _, w in parts]])
    return all(
        torch.allclose(x.double(), w.double(), rtol=limit, atol=limit * scale, equal_nan=True)
        for x, w in parts
    )
