"""What all layers of a clipped model share, and how a tensor's rows belong to samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter


class Context:
    """State of one clipper.

    Attributes:
        names: the trained parameters and their names.
        batch_size: samples of the running forward pass, if known.
        declared: whether the user said so.
        inside_vmap: depth of layers being run through torch.func, whose own layers are left alone.
        silent: depth of rules at work, whose own operators are not looked at.
        backward: whether one of the clipper's own backward passes runs.
        collected: what that pass has delivered where it starts others; else None.
        ran_without_grad: whether a layer ran where no graph was built.
        compare: whether layers that go through torch.func compare themselves with their module.
    """

    def __init__(self) -> None:
        self.names: dict[Parameter, str] = {}
        self.batch_size: int | None = None
        self.declared = False
        self.inside_vmap = 0
        self.silent = 0
        self.backward = False
        self.collected: list[tuple[object, Tensor]] | None = None
        self.ran_without_grad = False
        self.compare = False


class Layout(NamedTuple):
    """Where a tensor's dims hold the samples.

    Attributes:
        first, last: the dims, both included, taken as one; its size is a multiple of B.
        minor: whether row ``k * B + b`` of them is sample b's, instead of row ``b * K + k``.
    """

    first: int
    last: int
    minor: bool

    def of_samples(self, values: Tensor, rows: int) -> Tensor:
        """values [B] -> [rows]: each row's sample's."""
        times = rows // max(len(values), 1)
        return values.repeat(times) if self.minor else values.repeat_interleave(times)

    def to_front(self, x: Tensor, samples: int) -> Tensor:
        """x -> [B, K, other dims]."""
        x = x.flatten(self.first, self.last) if self.last > self.first else x
        x = x.movedim(self.first, 0) if self.first else x
        times = x.shape[0] // samples
        if self.minor:
            return x.reshape(times, samples, *x.shape[1:]).transpose(0, 1)
        return x.unsqueeze(1) if times == 1 else x.reshape(samples, times, *x.shape[1:])

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


def layouts(shape: Sequence[int], dims: Sequence[int], samples: int) -> list[Layout]:
    """All layouts that the sizes allow, the likeliest first.

    Args:
        shape: a tensor's.
        dims: which of its dims may hold samples, the likeliest first.
        samples: B.
    """
    found = []
    for dim in dims:
        if shape[dim] and shape[dim] % samples == 0:
            found.append(Layout(dim, dim, False))
    exact = len(found)
    for dim in dims:
        if shape[dim] > samples and shape[dim] % samples == 0:
            found.append(Layout(dim, dim, True))
    allowed = sorted(dims)
    for first in allowed:
        size = shape[first]
        for last in range(first + 1, len(shape)):
            if last not in allowed:
                break
            size *= shape[last]
            if size and size % samples == 0 and shape[first] % samples and shape[last] % samples:
                found.append(Layout(first, last, False))
    # One sample a row before several.
    return sorted(found[:exact], key=lambda x: shape[x.first] != samples) + found[exact:]


def tolerance(dtype: torch.dtype) -> float:
    """How far rounding may take two ways to compute the same apart, relative to what is summed."""
    if dtype == torch.float64:
        return 1e-9
    return 1e-4 if dtype == torch.float32 else 5e-2
