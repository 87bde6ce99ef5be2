"""Convolutions over one and two spatial dimensions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embattle.clipping.layer import Layer, apply, once
from embattle.clipping.uses import ConvUse, DenseUse


class _Conv(torch.autograd.Function):
    """A 2-D convolution that gives the gradient of its input alone, and lets the layer listen."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, anchor: Tensor, layer: Any
    ) -> Tensor:
        out = F.conv2d(
            x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.module.groups
        )
        ctx.save_for_backward(x.to(out.dtype), weight.to(out.dtype))
        ctx.layer, ctx.dtype = layer, x.dtype
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None, None
        x, weight = ctx.saved_tensors
        layer = ctx.layer
        layer.record(x, weight, grad)
        out = None
        if ctx.needs_input_grad[0]:
            out = torch.ops.aten.convolution_backward(
                grad,
                x,
                weight,
                None,
                layer.stride,
                layer.padding,
                layer.dilation,
                False,
                [0, 0],
                layer.module.groups,
                [True, False, False],
            )[0].to(ctx.dtype)
        return out, None, None, None, None


class ConvLayer(Layer):
    """torch.nn.Conv1d and Conv2d: groups, strides, dilation, every padding mode."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        module = self.module
        flat = isinstance(module, nn.Conv1d)
        self.flat = flat
        self.stride = (1, module.stride[0]) if flat else (module.stride[0], module.stride[1])
        self.dilation = (
            (1, module.dilation[0]) if flat else (module.dilation[0], module.dilation[1])
        )
        zeros = module.padding_mode == "zeros" and not isinstance(module.padding, str)
        padding = module.padding if zeros else (0, 0)
        self.padding = (0, padding[0]) if flat else (padding[0], padding[1])
        self.zeros = zeros

    def forward(self, input: Tensor) -> Tensor:
        """As torch.nn.Conv1d and Conv2d."""
        module = self.module
        spatial = 1 if self.flat else 2
        if input.dim() != spatial + 2:
            raise ValueError(
                f"PerSampleClipper: layer '{self.name}' got an input of shape "
                f"{tuple(input.shape)}, "
                "which has no batch dimension; give the layer one row per sample"
            )
        x = self.spread(input, spatial + 1)
        if not self.zeros:
            mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
            x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
        weight = module.weight.detach()
        bias = None if module.bias is None else module.bias.detach()
        if self.flat:
            x, weight = x.unsqueeze(2), weight.unsqueeze(2)
        out: Tensor = apply(_Conv, x, weight, bias, self.tape.anchor, self)
        return out.squeeze(2) if self.flat else out

    def record(self, x: Tensor, weight: Tensor, grad: Tensor) -> None:
        """Tells the listener."""
        listener, module = self.tape.listener, self.module
        if listener is None:
            return
        out = listener.layout(grad, 0, 3, self.name)
        if module.weight.requires_grad:
            use = ConvUse(
                listener.layout(x, 0, 3, self.name),
                out,
                weight,
                module.weight.shape,
                self.stride,
                self.padding,
                self.dilation,
                module.groups,
            )
            listener.add(module.weight, use, self.name)
        if module.bias is not None and module.bias.requires_grad:
            listener.add(module.bias, DenseUse(out.sum((1, 3, 4))), self.name)

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        """Whether module is a plain convolution."""
        return type(module).forward in (nn.Conv1d.forward, nn.Conv2d.forward)
