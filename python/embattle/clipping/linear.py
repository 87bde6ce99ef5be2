"""Linear layers: anything that multiplies by a weight matrix."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter

from embattle.clipping.graph import Record, alias, note
from embattle.clipping.layer import Layer
from embattle.clipping.tape import Listener
from embattle.clipping.uses import DenseUse, LinearUse


class _LinearRecord(Record):
    """One application of a weight matrix."""

    __slots__ = ("batch_dim", "bias", "bias_rows", "rows", "transposed", "weight")

    def __init__(
        self,
        layer: Layer,
        x: Tensor,
        weight: Parameter,
        bias: Parameter | None,
        batch_dim: int,
        rows: tuple[int, int] | None,
        bias_rows: tuple[int, int] | None,
        transposed: bool,
    ) -> None:
        super().__init__(layer, x)
        self.weight = weight
        self.bias = bias
        self.batch_dim = batch_dim
        self.rows = rows
        self.bias_rows = bias_rows
        self.transposed = transposed

    def deliver(self, listener: Listener, grad: Tensor) -> None:
        """See Record."""
        x, name = self.checked_input(), self.layer.name
        out = grad if x.dim() == 2 else grad.reshape(*x.shape[:-1], grad.shape[-1])
        out = listener.layout(out, self.batch_dim, 1, name)
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
        if self.weight.requires_grad:
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
    used, shift = weight.detach(), None
    bias_rows = bias_rows or rows
    if rows is not None:
        used = used[rows[0] : rows[1]]
    if transposed:
        used = used.t()
    used = alias(used, weight.requires_grad)
    if bias is not None:
        shift = bias.detach()
        if bias_rows is not None:
            shift = shift[bias_rows[0] : bias_rows[1]]
        shift = alias(shift, bias.requires_grad)
    x = _lowered(x)
    flat = x.dim() == 2
    # What F.linear returns for other inputs may be a view.
    out = F.linear(x if flat else x.reshape(math.prod(x.shape[:-1]), x.shape[-1]), used, shift)
    note(out, _LinearRecord(layer, x, weight, bias, batch_dim, rows, bias_rows, transposed))
    return out if flat else out.reshape(*x.shape[:-1], out.shape[-1])


def _lowered(x: Tensor) -> Tensor:
    """x as autocast would have it, so that what is kept is what was multiplied."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return x
    return x.to(torch.get_autocast_dtype(kind))


class LinearLayer(Layer):
    """torch.nn.Linear, on inputs of any rank."""

    def forward(self, input: Tensor) -> Tensor:
        """As torch.nn.Linear."""
        own = self.module._parameters
        x = self.spread(input, 1)
        return linear(self, x, own["weight"], own["bias"], batch_dim=self.batch_dim)

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
