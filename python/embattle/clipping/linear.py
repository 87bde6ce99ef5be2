"""Linear layers: anything that multiplies by a weight matrix."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter

from embattle.clipping.layer import Layer, apply, once
from embattle.clipping.uses import DenseUse, LinearUse


class _Linear(torch.autograd.Function):
    """F.linear that gives the gradient of its input alone, and lets the layer listen."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, anchor: Tensor, taken: Any
    ) -> Tensor:
        out = F.linear(x, weight, bias)
        # As autograd would under autocast: keep what was multiplied.
        kept = x.to(out.dtype) if taken.weight.requires_grad else None
        ctx.save_for_backward(kept, weight)
        ctx.taken, ctx.dtype = taken, x.dtype
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None, None
        x, weight = ctx.saved_tensors
        ctx.taken.record(x, grad)
        wanted = ctx.needs_input_grad[0]
        out = (grad @ weight.to(grad.dtype)).to(ctx.dtype) if wanted else None
        return out, None, None, None, None


class _Taken:
    """One application of a weight matrix."""

    __slots__ = ("batch_dim", "bias", "bias_rows", "layer", "rows", "transposed", "weight")

    def __init__(
        self,
        layer: Layer,
        weight: Parameter,
        bias: Parameter | None,
        batch_dim: int,
        rows: tuple[int, int] | None,
        bias_rows: tuple[int, int] | None,
        transposed: bool,
    ) -> None:
        self.layer = layer
        self.weight = weight
        self.bias = bias
        self.batch_dim = batch_dim
        self.rows = rows
        self.bias_rows = bias_rows
        self.transposed = transposed

    def record(self, x: Tensor | None, grad: Tensor) -> None:
        listener, name = self.layer.tape.listener, self.layer.name
        if listener is None:
            return
        out = listener.layout(grad, self.batch_dim, 1, name)
        shift = None
        if self.bias is not None and self.bias.requires_grad:
            summed = out.flatten(1) if out.shape[1] == 1 else out.sum(1)
            rows = self.bias_rows
            if rows is not None and rows != (0, len(self.bias)):
                whole = summed.new_zeros(len(summed), len(self.bias))
                whole[:, rows[0] : rows[1]] = summed
                summed = whole
            shift = DenseUse(summed)
            listener.add(self.bias, shift, name)
        if x is not None:
            used = self.rows or (0, out.shape[-1])
            x = listener.layout(x, self.batch_dim, 1, name)
            listener.add(self.weight, LinearUse(x, out, used, self.transposed, shift), name)


def linear(
    layer: Layer,
    x: Tensor,
    weight: Parameter,
    bias: Parameter | None,
    *,
    batch_dim: int,
    rows: tuple[int, int] | None = None,
    bias_rows: tuple[int, int] | None = None,
    transposed: bool = False,
) -> Tensor:
    """F.linear with a parameter (or the given rows of it) whose gradient is clipped.

    Args:
        layer: where it happens.
        x: [*, I], the samples in batch_dim.
        weight: [O, I], or [I, O] where transposed.
        bias: [O] or None.
        batch_dim: the samples' dim of x.
        rows: the half-open range of the weight's rows to use; all by default.
        bias_rows: the same of the bias; the weight's by default.
        transposed: how the weight is stored.
    """
    used, shift = weight.detach(), None if bias is None else bias.detach()
    bias_rows = bias_rows or rows
    if rows is not None:
        used = used[rows[0] : rows[1]]
    if shift is not None and bias_rows is not None:
        shift = shift[bias_rows[0] : bias_rows[1]]
    if transposed:
        used = used.t()
    taken = _Taken(layer, weight, bias, batch_dim, rows, bias_rows, transposed)
    out: Tensor = apply(_Linear, x, used, shift, layer.tape.anchor, taken)
    return out


class LinearLayer(Layer):
    """torch.nn.Linear, on inputs of any rank."""

    def forward(self, input: Tensor) -> Tensor:
        """As torch.nn.Linear."""
        module = self.module
        x = self.spread(input, 1)
        return linear(self, x, module.weight, module.bias, batch_dim=self.batch_dim)

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        """Whether module is a plain linear layer."""
        return type(module).forward is nn.Linear.forward


class TransposedLinearLayer(Layer):
    """transformers' Conv1D, the linear layer of GPT-2: the weight is stored as [in, out]."""

    def forward(self, x: Tensor) -> Tensor:
        """As transformers.pytorch_utils.Conv1D."""
        module = self.module
        return linear(
            self,
            self.spread(x, 1),
            module.weight,
            module.bias,
            batch_dim=self.batch_dim,
            transposed=True,
        )

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        """Whether module is transformers' Conv1D; the module is not imported for it."""
        kind = type(module)
        return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"
