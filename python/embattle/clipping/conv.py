"""Convolutions and transposed convolutions over one, two and three spatial dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from embattle.clipping.context import Layout
from embattle.clipping.derived import Source, put
from embattle.clipping.grad_sample import ConvGradSample, DenseGradSample
from embattle.clipping.graph import Add, Record, note
from embattle.clipping.operators import Operators, rule


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


_OPTIONS = ("stride", "padding", "dilation", "groups")
_TRANSPOSED_OPTIONS = ("stride", "padding", "output_padding", "groups", "dilation")


def _register(function: Any, other: Any, spatial: int, *, transposed: bool) -> None:
    names = _TRANSPOSED_OPTIONS if transposed else _OPTIONS

    @rule(function, other)
    def _(
        ops: Operators,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if ops.source(input) is not None:
            return NotImplemented
        layer, options = ops.layer, dict(zip(names, args, strict=False)) | kwargs
        if input.dim() != spatial + 2:
            raise ValueError(
                f"PerSampleClipper: layer '{layer.name}' got an input of shape "
                f"{tuple(input.shape)}, which has no batch dimension; give the layer one row per "
                "sample"
            )
        x = layer.spread(input, spatial + 1)
        gaps = _numbers(options.get("dilation", 1), spatial)
        if isinstance(options.get("padding"), str):
            # "same" may need one more on the right, which the operator pads by itself too.
            sides = [gap * (k - 1) for gap, k in zip(gaps, weight.shape[2:], strict=True)]
            if options["padding"] == "same" and any(sides):
                x = F.pad(x, [p for n in reversed(sides) for p in (n // 2, n - n // 2)])
            options["padding"] = 0
        out = function(x, weight, bias, **options)
        own, own_bias = ops.sources(weight, bias)
        record = _Conv(
            layer, x, weight if own is None else None, bias if own_bias is None else None
        )
        record.weight, record.bias, record.shape = own, own_bias, weight.shape
        record.stride = _numbers(options.get("stride", 1), spatial)
        record.padding = _numbers(options.get("padding", 0), spatial)
        record.dilation, record.groups = gaps, options.get("groups", 1)
        record.transposed = transposed
        out = out.clone() if out._is_view() else out
        note(out, record)
        return out


_register(torch.conv1d, F.conv1d, 1, transposed=False)
_register(torch.conv2d, F.conv2d, 2, transposed=False)
_register(torch.conv3d, F.conv3d, 3, transposed=False)
_register(torch.conv_transpose1d, F.conv_transpose1d, 1, transposed=True)
_register(torch.conv_transpose2d, F.conv_transpose2d, 2, transposed=True)
_register(torch.conv_transpose3d, F.conv_transpose3d, 3, transposed=True)
