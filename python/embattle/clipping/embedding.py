"""Embedding tables: the cost follows the batch, never the number of rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from embattle.clipping.functional import FunctionalLayer
from embattle.clipping.graph import Record, alias, note
from embattle.clipping.layer import Layer, apply, once
from embattle.clipping.tape import Listener
from embattle.clipping.uses import BagUse, RowUse


class _LookUp(Record):
    """One look-up in a table."""

    __slots__ = ()

    def deliver(self, listener: Listener, grad: Tensor) -> None:
        """See Record."""
        layer = self.layer
        module = layer.module
        ids = listener.layout(self.checked_input(), layer.batch_dim, 0, layer.name)
        rows = listener.layout(grad, layer.batch_dim, 1, layer.name)
        use = RowUse(ids, rows, module.padding_idx, module.sparse)
        listener.add(module._parameters["weight"], use, layer.name)


def _refuse_frequency_scaling(module: nn.Module, name: str) -> None:
    if module.scale_grad_by_freq:
        raise ValueError(
            f"PerSampleClipper: layer '{name}' has scale_grad_by_freq=True, which makes the "
            f"gradient of "
            "a sample depend on the rest of the batch; set it to False"
        )


class EmbeddingLayer(Layer):
    """torch.nn.Embedding: padding_idx, max_norm, sparse gradients, indices of any rank."""

    def forward(self, input: Tensor) -> Tensor:
        """As torch.nn.Embedding."""
        return self.look_up(self.spread(input, 0))

    def look_up(self, indices: Tensor) -> Tensor:
        """Rows of the table, whose gradients are clipped."""
        module = self.module
        _refuse_frequency_scaling(module, self.name)
        table = module._parameters["weight"]
        weight = alias(table.detach(), table.requires_grad)
        if module.max_norm is None:
            out = torch.embedding(weight, indices)
        else:
            out = F.embedding(
                indices, weight, module.padding_idx, module.max_norm, module.norm_type
            )
        note(out, _LookUp(self, indices))
        return out

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        """Whether module is a plain embedding."""
        return type(module).forward is nn.Embedding.forward


class _LookUps(TorchFunctionMode):
    """Lets a layer do the look-ups in its table that its module's forward asks for."""

    def __init__(self, layer: DerivedEmbeddingLayer) -> None:
        super().__init__()
        self.layer = layer
        self.seen = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        module = self.layer.module
        if (
            func is F.embedding
            and len(args) > 1
            and args[1] is module.weight
            and (args[2] if len(args) > 2 else kwargs.get("padding_idx")) == module.padding_idx
        ):
            self.seen = True
            return self.layer.look_up(self.layer.spread(args[0], 0))
        return func(*args, **kwargs)


class DerivedEmbeddingLayer(EmbeddingLayer):
    """A subclass of torch.nn.Embedding that does something before or after the look-up.

    Where its forward uses the table in another way altogether it goes through torch.func.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._other: FunctionalLayer | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own."""
        if self._other is None:
            with _LookUps(self) as look_ups:
                out = self.original(*args, **kwargs)
            if look_ups.seen:
                return out
            self._other = FunctionalLayer(
                self.module, self.tape, self.name, self.batch_dim, self.broadcast
            )
            self._other.original = self.original
        return self._other.forward(*args, **kwargs)

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        """Whether module is an embedding with a forward of its own."""
        return isinstance(module, nn.Embedding)


class _EmbeddingBag(torch.autograd.Function):
    """F.embedding_bag, sum or mean, that gives the gradient of the per-sample weights alone."""

    @staticmethod
    def forward(
        ctx: Any,
        table: Tensor,
        indices: Tensor,
        offsets: Tensor,
        weights: Tensor | None,
        anchor: Tensor,
        layer: Any,
    ) -> Tensor:
        module = layer.module
        out = F.embedding_bag(
            indices,
            table,
            offsets,
            max_norm=module.max_norm,
            norm_type=module.norm_type,
            mode=module.mode,
            per_sample_weights=weights,
            include_last_offset=True,
            padding_idx=module.padding_idx,
        )
        ctx.save_for_backward(table, indices, offsets, weights)
        ctx.layer = layer
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 6
        table, indices, offsets, weights = ctx.saved_tensors
        ctx.layer.record(indices, offsets, weights, grad)
        to_weights = None
        if ctx.needs_input_grad[3]:
            bag = BagUse(indices, offsets, grad, "sum", None, None, False)
            to_weights = (table[indices].to(grad.dtype) * grad[bag.owners()]).sum(-1)
            if ctx.layer.module.padding_idx is not None:
                to_weights = to_weights.masked_fill(indices == ctx.layer.module.padding_idx, 0)
            to_weights = to_weights.to(weights.dtype)
        return None, None, None, to_weights, None, None


class EmbeddingBagLayer(Layer):
    """torch.nn.EmbeddingBag: sum, mean and max, offsets, per-sample weights, padding_idx."""

    def forward(
        self,
        input: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        """As torch.nn.EmbeddingBag."""
        module = self.module
        _refuse_frequency_scaling(module, self.name)
        if input.dim() == 2:
            if offsets is not None:
                raise ValueError(
                    f"PerSampleClipper: layer '{self.name}' got 2-D indices of shape "
                    f"{tuple(input.shape)} with offsets; offsets belong to 1-D indices"
                )
            input = self.spread(input, 0)
            bags, length = input.shape
            ends = torch.arange(bags + 1, device=input.device) * length
            input = input.flatten()
            if per_sample_weights is not None:
                per_sample_weights = per_sample_weights.expand(bags, length).flatten()
        elif offsets is None:
            raise ValueError(
                f"PerSampleClipper: layer '{self.name}' got 1-D indices without offsets"
            )
        elif module.include_last_offset:
            ends = offsets.long()
        else:
            ends = torch.cat([offsets.long(), offsets.new_full((1,), len(input)).long()])
        if module.mode == "max":
            return self._max(input, ends)
        out: Tensor = apply(
            _EmbeddingBag,
            module.weight.detach(),
            input,
            ends,
            per_sample_weights,
            self.tape.anchor,
            self,
        )
        return out

    def _max(self, indices: Tensor, ends: Tensor) -> Tensor:
        """The largest of each coordinate in each bag, from looked-up rows."""
        module = self.module
        empty = module.weight.new_zeros(len(ends) - 1, 1)
        bag = BagUse(indices, ends, empty, "sum", None, module.padding_idx, module.sparse)
        owners = bag.owners()
        place = torch.arange(len(indices), device=indices.device) - ends[:-1][owners]
        longest = max(int(ends.diff().max()), 1) if len(empty) else 1
        padded = indices.new_zeros(len(empty), longest)
        padded[owners, place] = indices
        absent = torch.ones_like(padded, dtype=torch.bool)
        absent[owners, place] = False
        if module.padding_idx is not None:
            absent |= padded == module.padding_idx
        rows = EmbeddingLayer(module, self.tape, self.name).look_up(padded)
        rows = rows.masked_fill(absent[..., None], -torch.inf)
        return rows.max(1).values.masked_fill(absent.all(1)[:, None], 0)

    def record(self, indices: Tensor, ends: Tensor, weights: Tensor | None, grad: Tensor) -> None:
        """Tells the listener."""
        listener, module = self.tape.listener, self.module
        if listener is None:
            return
        use = BagUse(indices, ends, grad, module.mode, weights, module.padding_idx, module.sparse)
        laid_out = listener.layout(grad, 0, 1, self.name)
        if laid_out.shape[1] == 1:
            listener.add(module.weight, use, self.name)
            return
        rows = use.padded()
        samples = listener.samples
        rows = replace(
            rows,
            indices=rows.indices.reshape(samples, -1),
            grad=rows.grad.reshape(samples, -1, grad.shape[-1]),
        )
        listener.add(module.weight, rows, self.name)

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        """Whether module is a plain embedding bag."""
        return type(module).forward is nn.EmbeddingBag.forward
