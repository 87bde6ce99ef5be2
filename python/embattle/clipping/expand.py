"""A parameter that is spread over the batch: its gradient is the sum over where it went."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from embattle.clipping.context import Layout
from embattle.clipping.derived import Source, put, shape_of
from embattle.clipping.grad_sample import DenseGradSample
from embattle.clipping.graph import Add, Record, note

if TYPE_CHECKING:
    from embattle.clipping.layers import Layer


def summed(
    record: Record,
    x: Tensor,
    spread: Sequence[int],
    layout: Layout,
    samples: int,
    shape: Sequence[int],
) -> DenseGradSample:
    """Sums x over the dims in spread but the samples; what is left has the parameter's shape."""
    others = [d for d in range(x.dim()) if not layout.first <= d <= layout.last]
    # [B, K, the other dims in their order], of which the parameter's own stay.
    x = layout.to_front(x, samples)
    out = x.sum([1, *(2 + i for i, d in enumerate(others) if d in spread)])
    return DenseGradSample(out.reshape(samples, *shape), x if record.layer.context.probed else None)


class _Expand(Record):
    __slots__ = ("shape", "source")

    source: Source
    shape: torch.Size

    def sample_dims(self, dims: int) -> Sequence[int]:
        missing = dims - len(self.shape)
        return [d for d in range(dims) if d < missing or self.shape[d - missing] == 1]

    def deliver(self, add: Add, grad: Tensor, layout: Layout, samples: int) -> None:
        spread = self.sample_dims(grad.dim())
        shape = shape_of(self.source)
        put(add, self.source, summed(self, grad, spread, layout, samples, shape))


def expand(
    layer: Layer, value: Tensor, source: Source, shape: Sequence[int], spread_dim: int | None = None
) -> Tensor:
    """value.expand(shape), whose gradient is clipped.

    Args:
        layer: where it happens.
        value: a parameter's, with dims of size 1 added or not.
        source: what it is; None where not trained.
        shape: the result's.
        spread_dim: see Record.
    """
    out = value.expand(shape)
    if source is not None:
        layer.spread_dim = spread_dim
        record = _Expand(layer, out.detach())
        record.source, record.shape = source, value.shape
        note(out, record)
    return out
