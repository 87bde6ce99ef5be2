"""Normalisation layers: per-sample gradients as small as a bias, kept as they are."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embattle.clipping.layer import Layer, apply, once
from embattle.clipping.uses import DenseUse


class _LayerNorm(torch.autograd.Function):
    """Layer norm with its weight and bias; gives the gradient of its input alone."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, anchor: Tensor, layer: Any
    ) -> Tensor:
        module = layer.module
        out, mean, rstd = torch.native_layer_norm(
            x, module.normalized_shape, weight, bias, module.eps
        )
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.layer = layer
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None, None
        x, weight, bias, mean, rstd = ctx.saved_tensors
        layer = ctx.layer
        if layer.tape.listener is not None:
            layer.record((x - mean) * rstd, grad)
        out = None
        if ctx.needs_input_grad[0]:
            out = torch.ops.aten.native_layer_norm_backward(
                grad.contiguous(),
                x,
                layer.module.normalized_shape,
                mean,
                rstd,
                weight,
                bias,
                [True, False, False],
            )[0]
        return out, None, None, None, None


class _Affine(torch.autograd.Function):
    """x * weight + bias over the last dims; gives the gradient of x alone."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, anchor: Tensor, layer: Any
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.layer = layer
        ctx.set_materialize_grads(False)
        out = x * weight
        return out if bias is None else out + bias

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None, None
        x, weight = ctx.saved_tensors
        if ctx.layer.tape.listener is not None:
            ctx.layer.record(x, grad)
        out = (grad * weight).to(x.dtype) if ctx.needs_input_grad[0] else None
        return out, None, None, None, None


class _NormLayer(Layer):
    def record(self, normalized: Tensor, grad: Tensor) -> None:
        """Tells the listener."""
        listener, module = self.tape.listener, self.module
        if listener is None:
            return
        shape = tuple(module.normalized_shape)
        grad = grad.to(module.weight.dtype)
        out = listener.layout(grad, self.batch_dim, len(shape), self.name)
        if module.weight.requires_grad:
            x = listener.layout(normalized, self.batch_dim, len(shape), self.name)
            # one token: the product itself
            product = x * out
            summed = product[:, 0] if product.shape[1] == 1 else product.sum(1)
            listener.add(module.weight, DenseUse(summed), self.name)
        bias = getattr(module, "bias", None)
        if bias is not None and bias.requires_grad:
            listener.add(bias, DenseUse(out.sum(1)), self.name)


class LayerNormLayer(_NormLayer):
    """torch.nn.LayerNorm, with or without bias."""

    def forward(self, input: Tensor) -> Tensor:
        """As torch.nn.LayerNorm."""
        module = self.module
        x = self.spread(input, len(module.normalized_shape))
        bias = None if module.bias is None else module.bias.detach()
        weight, anchor = module.weight.detach(), self.tape.anchor
        out: Tensor
        if x.dtype == weight.dtype and math.prod(x.shape):
            out = apply(_LayerNorm, x, weight, bias, anchor, self)
            return out
        # Mixed precision: autocast chooses the dtype of the norm.
        plain = F.layer_norm(x, module.normalized_shape, None, None, module.eps)
        out = apply(_Affine, plain, weight, bias, anchor, self)
        return out.to(plain.dtype)

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        """Whether module is a plain layer norm."""
        return type(module).forward is nn.LayerNorm.forward


class RMSNormLayer(_NormLayer):
    """torch.nn.RMSNorm."""

    def forward(self, x: Tensor) -> Tensor:
        """As torch.nn.RMSNorm."""
        module = self.module
        x = self.spread(x, len(module.normalized_shape))
        plain = F.rms_norm(x, module.normalized_shape, None, module.eps)
        out: Tensor = apply(_Affine, plain, module.weight.detach(), None, self.tape.anchor, self)
        return out.to(plain.dtype)

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        """Whether module is a plain RMS norm."""
        return type(module).forward is nn.RMSNorm.forward
