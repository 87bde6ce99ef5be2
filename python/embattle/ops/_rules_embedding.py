"""Fake, autograd and vmap rules of the ops on embedding tables."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from embattle.ops._rules import outside_autograd, register_fake, register_vmap
from embattle.ops._rules_clip import moved, split

_ops = torch.ops.embattle


# ---- Shapes ----


@register_fake("embattle::embedding_grad_norm")
def _(
    indices: Tensor,
    grad_output: Tensor,
    padding_idx: int = -1,
    offsets: Tensor | None = None,
    mean: bool = False,
    per_sample_weights: Tensor | None = None,
) -> Tensor:
    dtype = torch.float64 if grad_output.dtype == torch.float64 else torch.float32
    return grad_output.new_empty([grad_output.shape[0]], dtype=dtype)


@register_fake("embattle::embedding_grad_sum")
def _(
    indices: Tensor,
    grad_output: Tensor,
    rows: int,
    weights: Tensor | None = None,
    padding_idx: int = -1,
) -> Tensor:
    return grad_output.new_empty([rows, grad_output.shape[-1]])


@register_fake("embattle::embedding_grad_rows")
def _(
    indices: Tensor,
    grad_output: Tensor,
    rows: int,
    weights: Tensor | None = None,
    padding_idx: int = -1,
) -> tuple[Tensor, Tensor]:
    found = torch.library.get_ctx().new_dynamic_size()
    dim = grad_output.shape[-1]
    return indices.new_empty([found], dtype=torch.int64), grad_output.new_empty([found, dim])


@register_fake("embattle::embedding_perturb")
def _(weight: Tensor, indices: Tensor, delta: Tensor, inverse: Tensor) -> Tensor:
    return weight.new_empty([*indices.shape, weight.shape[1]])


@register_fake("embattle::embedding_perturb_backward")
def _(grad_output: Tensor, inverse: Tensor, delta_rows: int) -> Tensor:
    return grad_output.new_empty([delta_rows, grad_output.shape[-1]])


@register_fake("embattle::rowwise_adagrad_")
def _(weight: Tensor, *args: object, **options: object) -> None:
    return None


# ---- Gradients ----


def _save_perturb(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor], output: Tensor) -> None:
    weight, indices, delta, inverse = inputs
    ctx.save_for_backward(indices, inverse)
    ctx.rows, ctx.delta_rows, ctx.delta_dtype = weight.shape[0], delta.shape[0], delta.dtype


def _perturb_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
    indices, inverse = ctx.saved_tensors
    to_weight = to_delta = None
    if ctx.needs_input_grad[0]:
        to_weight = _ops.embedding_perturb_backward(grad, indices, ctx.rows)
    if ctx.needs_input_grad[2]:
        wide = grad.to(torch.promote_types(grad.dtype, ctx.delta_dtype))
        to_delta = _ops.embedding_perturb_backward(wide, inverse, ctx.delta_rows)
        to_delta = to_delta.to(ctx.delta_dtype)
    return to_weight, None, to_delta, None


torch.library.register_autograd(
    "embattle::embedding_perturb", _perturb_backward, setup_context=_save_perturb
)


def _save_segments(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _segments_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (inverse,) = ctx.saved_tensors
    if grad.shape[0] == 0:
        return grad.new_zeros([*inverse.shape, grad.shape[1]]), None, None
    rows = grad[inverse.clamp_min(0)]
    return torch.where((inverse >= 0)[..., None], rows, 0.0), None, None


torch.library.register_autograd(
    "embattle::embedding_perturb_backward", _segments_backward, setup_context=_save_segments
)


# ---- vmap: the mapped tables stand below one another, and the indices point into them ----


def _shifted(indices: Tensor, rows: int, size: int) -> Tensor:
    """Indices [size, ...] into tables of `rows` rows each, made to point into all of them."""
    shift = torch.arange(size, device=indices.device) * rows
    shift = shift.reshape(-1, *[1] * (indices.dim() - 1))
    return torch.where(indices < 0, indices, indices + shift)


@register_vmap("embattle::embedding_grad_norm")
def _(
    info: Any,
    in_dims: tuple[int | None, ...],
    indices: Tensor,
    grad_output: Tensor,
    padding_idx: int = -1,
    offsets: Tensor | None = None,
    mean: bool = False,
    per_sample_weights: Tensor | None = None,
) -> tuple[Tensor, int]:
    size = info.batch_size
    dims = [*in_dims, *[None] * (6 - len(in_dims))]
    indices = moved(indices, dims[0], size)
    grad_output = moved(grad_output, dims[1], size)
    starts = None if offsets is None else moved(offsets, dims[3], size)
    weights = None if per_sample_weights is None else moved(per_sample_weights, dims[5], size)
    if starts is None:
        norms = _ops.embedding_grad_norm(
            indices.flatten(0, 1), grad_output.flatten(0, 1), padding_idx, None, mean
        )
        return split(norms, size), 0
    slices = [
        _ops.embedding_grad_norm(
            indices[i],
            grad_output[i],
            padding_idx,
            starts[i],
            mean,
            None if weights is None else weights[i],
        )
        for i in range(size)
    ]
    return torch.stack(slices), 0


@register_vmap("embattle::embedding_grad_sum")
def _(
    info: Any,
    in_dims: tuple[int | None, ...],
    indices: Tensor,
    grad_output: Tensor,
    rows: int,
    weights: Tensor | None = None,
    padding_idx: int = -1,
) -> tuple[Tensor, int]:
    size = info.batch_size
    indices = moved(indices, in_dims[0], size)
    indices = _shifted(indices, rows, size)
    grad_output = moved(grad_output, in_dims[1], size)
    if indices.dim() > 1:
        indices, grad_output = indices.flatten(0, 1), grad_output.flatten(0, 1)
    if weights is not None:
        weights = moved(weights, in_dims[3], size).flatten()
    out: Tensor = _ops.embedding_grad_sum(indices, grad_output, rows * size, weights)
    out = out.reshape(size, rows, out.shape[1])
    if padding_idx >= 0:
        out[:, padding_idx] = 0
    return out, 0


@register_vmap("embattle::embedding_perturb")
def _(
    info: Any,
    in_dims: tuple[int | None, ...],
    weight: Tensor,
    indices: Tensor,
    delta: Tensor,
    inverse: Tensor,
) -> tuple[Tensor, int]:
    size = info.batch_size
    indices, inverse = moved(indices, in_dims[1], size), moved(inverse, in_dims[3], size)
    if in_dims[0] is not None:
        weight = weight.movedim(in_dims[0], 0)
        indices = _shifted(indices, weight.shape[1], size)
        weight = weight.flatten(0, 1)
    if in_dims[2] is not None:
        delta = delta.movedim(in_dims[2], 0)
        inverse = _shifted(inverse, delta.shape[1], size)
        delta = delta.flatten(0, 1)
    return _ops.embedding_perturb(weight, indices, delta, inverse), 0


@register_vmap("embattle::embedding_perturb_backward")
def _(
    info: Any, in_dims: tuple[int | None, ...], grad_output: Tensor, inverse: Tensor, rows: int
) -> tuple[Tensor, int]:
    size = info.batch_size
    grad_output = moved(grad_output, in_dims[0], size)
    inverse = _shifted(moved(inverse, in_dims[1], size), rows, size)
    out: Tensor = _ops.embedding_perturb_backward(grad_output, inverse, rows * size)
    return out.reshape(size, rows, out.shape[1]), 0


@register_vmap("embattle::rowwise_adagrad_")
def _(
    info: Any,
    in_dims: tuple[int | None, ...],
    weight: Tensor,
    state: Tensor,
    indices: Tensor,
    grad: Tensor,
    *options: Any,
) -> tuple[None, None]:
    size = info.batch_size
    written = []
    for name, table, dim in (("weight", weight, in_dims[0]), ("state", state, in_dims[1])):
        if dim is None:
            raise ValueError(f"embattle.rowwise_adagrad_: {name} is written, and has to be mapped")
        written.append(table.movedim(dim, 0))
    rows = written[0].shape[1]
    flat = [table.flatten(0, 1) for table in written]
    places = _shifted(moved(indices, in_dims[2], size), rows, size)
    _ops.rowwise_adagrad_(*flat, places, moved(grad, in_dims[3], size), *options)
    for table, own in zip(written, flat, strict=True):
        if own.data_ptr() != table.data_ptr():
            table.copy_(own.reshape(table.shape))
    return None, None


outside_autograd(
    "embedding_grad_norm",
    "embedding_grad_sum",
    "embedding_grad_rows",
    "rowwise_adagrad_",
)
