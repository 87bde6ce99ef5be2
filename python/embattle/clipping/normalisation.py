"""Layers that normalise: what follows their normalisation is a product and a sum.

Layer norm runs as torch's one operator; the others normalise first, and their weight and bias are
spread over the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor

from embattle.clipping.context import Layout
from embattle.clipping.derived import Source, put
from embattle.clipping.expand import expand, summed
from embattle.clipping.graph import Add, Record, note
from embattle.clipping.operators import Operators, rule

if TYPE_CHECKING:
    from embattle.clipping.layers import Layer


class _LayerNorm(Record):
    __slots__ = ("bias", "eps", "shape", "weight")

    weight: Source
    bias: Source
    shape: tuple[int, ...]
    eps: float

    def sample_dims(self, dims: int) -> Sequence[int]:
        return range(dims - len(self.shape))

    def deliver(self, add: Add, grad: Tensor, layout: Layout, samples: int) -> None:
        outer = self.sample_dims(grad.dim())
        if self.weight is not None:
            x = F.layer_norm(self.checked_input(), self.shape, None, None, self.eps)
            terms = grad * x.to(grad.dtype)
            put(add, self.weight, summed(self, terms, outer, layout, samples, self.shape))
        if self.bias is not None:
            put(add, self.bias, summed(self, grad, outer, layout, samples, self.shape))


def layer_norm(
    layer: Layer,
    x: Tensor,
    shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    sources: tuple[Source, Source],
) -> Tensor:
    """F.layer_norm with parameters whose gradients are clipped."""
    own, own_bias = sources
    if own is None and own_bias is None:
        return F.layer_norm(x, tuple(shape), weight, bias, eps)
    x = layer.spread(x, len(shape))
    out = F.layer_norm(x, tuple(shape), weight, bias, eps)
    record = _LayerNorm(
        layer, x, weight if own is None else None, bias if own_bias is None else None
    )
    record.weight, record.bias, record.shape, record.eps = own, own_bias, tuple(shape), eps
    note(out, record)
    return out


@rule(F.layer_norm)
def _(
    ops: Operators,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    if ops.source(input) is not None:
        return NotImplemented
    sources = ops.sources(weight, bias)
    return layer_norm(ops.layer, input, normalized_shape, weight, bias, eps, sources)


@rule(F.rms_norm)
def _(
    ops: Operators,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Any:
    if ops.source(input) is not None or weight is None:
        return NotImplemented
    x = ops.layer.spread(input, len(normalized_shape))
    out = F.rms_norm(x, tuple(normalized_shape), None, eps)
    return (out * expand(ops.layer, weight, ops.source(weight), out.shape)).to(x.dtype)


def _channels(function: Callable[..., Tensor]) -> None:
    """Registers a function whose weight and bias belong to its input's dim 1."""

    @rule(function)
    def _(ops: Operators, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        if ops.source(input) is not None:
            return NotImplemented
        x = ops.layer.spread(input, input.dim() - 1)
        # Torch hands these on by name, however it was called.
        out = function(x, *args, **(kwargs | {"weight": None, "bias": None}))
        for name, combine in (("weight", Tensor.mul), ("bias", Tensor.add)):
            p = kwargs.get(name)
            if p is not None:
                wide = p.reshape(-1, *[1] * (x.dim() - 2))
                out = combine(out, expand(ops.layer, wide, ops.source(p), out.shape))
        return out.to(x.dtype)


_channels(F.group_norm)
_channels(F.batch_norm)
_channels(F.instance_norm)
