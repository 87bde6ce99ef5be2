"""Linear layers and matrix products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from embattle.clipping.context import Layout
from embattle.clipping.derived import Source, put
from embattle.clipping.grad_sample import DenseGradSample, LinearGradSample
from embattle.clipping.graph import Add, Record, note
from embattle.clipping.operators import Operators, rule

if TYPE_CHECKING:
    from embattle.clipping.layers import Layer


class _Linear(Record):
    __slots__ = ("bias", "transposed", "weight")

    weight: Source
    bias: Source
    transposed: bool

    def shaped(self, grad: Tensor) -> Tensor:
        x = self.x
        return grad if x is None or x.dim() == 2 else grad.reshape(*x.shape[:-1], grad.shape[-1])

    def sample_dims(self, dims: int) -> Sequence[int]:
        return range(dims - 1)

    def deliver(self, add: Add, grad: Tensor, layout: Layout, samples: int) -> None:
        out = layout.tokens(grad, samples, 1)
        shift = None
        if self.bias is not None:
            summed = out.flatten(1) if out.shape[1] == 1 else out.sum(1)
            shift = DenseGradSample(summed, out if self.layer.context.probed else None)
            put(add, self.bias, shift)
        if self.weight is not None:
            x = layout.tokens(self.checked_input(), samples, 1)
            if x.dtype != out.dtype:
                x = x.to(out.dtype)
            if self.transposed:
                x, out, shift = out, x, None
            put(add, self.weight, LinearGradSample(x, out, (0, out.shape[-1]), shift))


def linear(
    layer: Layer,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sources: tuple[Source, Source],
    *,
    transposed: bool = False,
) -> Tensor:
    """F.linear with parameters whose gradients are clipped.

    Args:
        layer: where it happens.
        x: [*, I].
        weight: [O, I], or [I, O] where transposed.
        bias: [O] or None.
        sources: what the weight and the bias are, None where not trained.
        transposed: how the weight is stored.
    """
    x = _lowered(x)
    outer = x.shape[:-1]
    # What F.linear returns for other inputs may be a view.
    rows = x if len(outer) == 1 else x.reshape(outer.numel(), x.shape[-1])
    out = F.linear(rows, weight.t() if transposed else weight, bias)
    own, own_bias = sources
    if own is not None or own_bias is not None:
        record = _Linear(
            layer, x, weight if own is None else None, bias if own_bias is None else None
        )
        record.weight, record.bias, record.transposed = own, own_bias, transposed
        note(out, record)
    return out if len(outer) == 1 else out.reshape(*outer, out.shape[-1])


def _lowered(x: Tensor) -> Tensor:
    """x as autocast would have it, so that what is kept is what was multiplied."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return x
    return x.to(torch.get_autocast_dtype(kind))


@rule(F.linear)
def _(ops: Operators, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if ops.source(input) is not None:
        return NotImplemented
    return linear(ops.layer, ops.layer.spread(input, 1), weight, bias, ops.sources(weight, bias))


@rule(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)
def _(ops: Operators, x: Tensor, weight: Tensor) -> Any:
    if ops.source(x) is not None or weight.dim() != 2 or x.dim() < 2:
        return NotImplemented
    own = (ops.source(weight), None)
    return linear(ops.layer, ops.layer.spread(x, 1), weight, None, own, transposed=True)


@rule(torch.addmm, Tensor.addmm)
def _(ops: Operators, bias: Tensor, x: Tensor, weight: Tensor, **options: Any) -> Any:
    if ops.source(x) is not None or bias.dim() != 1 or options:
        return NotImplemented
    return linear(ops.layer, x, weight, bias, ops.sources(weight, bias), transposed=True)
