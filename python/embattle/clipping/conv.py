"""Convolutions and transposed convolutions over one, two and three spatial dimensions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from embattle.clipping.context import Layout
from embattle.clipping.grad_sample import ConvGradSample, DenseGradSample
from embattle.clipping.graph import Add, Record, note
from embattle.clipping.operators import Operators, Source, put, rule


class _Conv(Record):
    __slots__ = ("bias", "dilation", "groups", "padding", "shape", "stride", "transposed", "weight")

    weight: Source
    bias: Source
    shape: torch.Size
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    transposed: bool

    def sample_dims(self, dims: int) -> Sequence[int]:
        return [0]

    def deliver(self, add: Add, grad: Tensor, layout: Layout, samples: int) -> None:
        features = grad.dim() - 1
        out = layout.tokens(grad, samples, features)
        if self.bias is not None:
            spatial = tuple(range(3, out.dim()))
            terms = out if self.layer.context.probed else None
            put(add, self.bias, DenseGradSample(out.sum((1, *spatial)), terms))
        if self.weight is None:
            return
        x = layout.tokens(self.checked_input(), samples, features).to(out.dtype)
        if self.transposed:
            x, out = self._reached(out, x.shape[3:]), x
        padding = (0,) * len(self.padding) if self.transposed else self.padding
        put(
            add,
            self.weight,
            ConvGradSample(x, out, self.shape, self.stride, padding, self.dilation, self.groups),
        )

    def _reached(self, grad: Tensor, size: torch.Size) -> Tensor:
        """The gradient of a transposed convolution's output, padded, cut to where inputs reach."""
        grad = F.pad(grad, [p for p in reversed(self.padding) for _ in range(2)])
        for i, length in enumerate(size):
            reach = (length - 1) * self.stride[i] + (self.shape[2 + i] - 1) * self.dilation[i] + 1
            grad = grad.narrow(3 + i, 0, reach)
        return grad


def _numbers(value: Any, count: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return values * count if len(values) == 1 else values


def _run(
    ops: Operators,
    function: Callable[..., Tensor],
    spatial: int,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    numbers: tuple[tuple[int, ...], ...],
    groups: int,
    output_padding: tuple[int, ...] | None,
) -> Any:
    if ops.source(x) is not None:
        return NotImplemented
    if x.dim() != spatial + 2:
        raise ValueError(
            f"PerSampleClipper: layer '{ops.layer.name}' got an input of shape {tuple(x.shape)}, "
            "which has no batch dimension; give the layer one row per sample"
        )
    stride, padding, dilation = numbers
    x = ops.layer.spread(x, spatial + 1)
    if output_padding is None:
        out = function(x, weight, bias, stride, padding, dilation, groups)
    else:
        out = function(x, weight, bias, stride, padding, output_padding, groups, dilation)
    sources = ops.sources(weight, bias)
    record = _Conv(
        ops.layer, x, weight if sources[0] is None else None, bias if sources[1] is None else None
    )
    record.weight, record.bias = sources
    record.shape, record.groups, record.transposed = (
        weight.shape,
        groups,
        output_padding is not None,
    )
    record.stride, record.padding, record.dilation = numbers
    out = out.clone() if out._is_view() else out
    note(out, record)
    return out


def _register(function: Any, other: Any, spatial: int) -> None:
    @rule(function, other)
    def _(
        ops: Operators,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Any:
        gaps = _numbers(dilation, spatial)
        if isinstance(padding, str):
            # "same" may need one more on the right, which the operator pads by itself too.
            sides = [(gap * (k - 1)) for gap, k in zip(gaps, weight.shape[2:], strict=True)]
            if padding == "same" and any(sides):
                pads = [p for both in reversed(sides) for p in (both // 2, both - both // 2)]
                input = F.pad(input, pads)
            padding = 0
        numbers = (_numbers(stride, spatial), _numbers(padding, spatial), gaps)
        return _run(ops, function, spatial, input, weight, bias, numbers, groups, None)


def _register_transposed(function: Any, other: Any, spatial: int) -> None:
    @rule(function, other)
    def _(
        ops: Operators,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Any:
        numbers = tuple(_numbers(value, spatial) for value in (stride, padding, dilation))
        more = _numbers(output_padding, spatial)
        return _run(ops, function, spatial, input, weight, bias, numbers, groups, more)


_register(torch.conv1d, F.conv1d, 1)
_register(torch.conv2d, F.conv2d, 2)
_register(torch.conv3d, F.conv3d, 3)
_register_transposed(torch.conv_transpose1d, F.conv_transpose1d, 1)
_register_transposed(torch.conv_transpose2d, F.conv_transpose2d, 2)
_register_transposed(torch.conv_transpose3d, F.conv_transpose3d, 3)
