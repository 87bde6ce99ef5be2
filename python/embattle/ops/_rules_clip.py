"""Fake, autograd and vmap rules of the ops on per-sample gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from embattle.ops._rules import outside_autograd, register_fake, register_vmap

_ops = torch.ops.embattle


def _norm_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


# ---- Shapes ----


@register_fake("embattle::per_sample_norm")
def _(grads: list[Tensor]) -> Tensor:
    return grads[0].new_empty([grads[0].shape[0]], dtype=_norm_dtype(grads))


@register_fake("embattle::clip_and_sum")
def _(
    grads: list[Tensor],
    max_norm: list[float],
    mode: str = "flat",
    weights: Tensor | None = None,
    gamma: float = 0.01,
) -> tuple[list[Tensor], Tensor]:
    shape = [grads[0].shape[0], len(grads)] if mode == "per_layer" else [grads[0].shape[0]]
    norms = grads[0].new_empty(shape, dtype=_norm_dtype(grads))
    return [g.new_empty(g.shape[1:]) for g in grads], norms


@register_fake("embattle::linear_grad_norm")
def _(input: Tensor, grad_output: Tensor, *options: object, **named: object) -> Tensor:
    return input.new_empty([input.shape[0]], dtype=_norm_dtype([input, grad_output]))


# ---- Gradients ----


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[list[Tensor], Tensor]) -> None:
    grads, ctx.max_norm, ctx.mode, weights, ctx.gamma = inputs
    ctx.count = len(grads)
    ctx.weighted = weights is not None
    ctx.save_for_backward(*grads, output[1], *([] if weights is None else [weights]))


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    """[B] as [B, 1, ...], to be multiplied with [B, ...]."""
    return values.reshape(-1, *[1] * (like.dim() - 1))


def _inner(grads: Sequence[Tensor], cotangents: Sequence[Tensor | None]) -> Tensor:
    """<cotangent, g_b> of every sample over a list, [B] in the norms' dtype."""
    dtype = _norm_dtype(grads)
    out = grads[0].new_zeros([grads[0].shape[0]], dtype=dtype)
    for g, cotangent in zip(grads, cotangents, strict=True):
        if cotangent is not None:
            product = g.to(dtype) * cotangent.to(dtype)
            out = out + product.reshape(*product.shape, 1).flatten(1).sum(1)
    return out


def _one_norm(
    grads: Sequence[Tensor],
    cotangents: Sequence[Tensor | None],
    norm_cotangent: Tensor,
    norms: Tensor,
    bound: float,
    automatic: bool,
    gamma: float,
    weights: Tensor | None,
) -> tuple[list[Tensor], Tensor]:
    """The gradients of the clipped sum of one list under one norm: to grads, and to weights [B].

    With c the factor of sample b: d/dg_b = w c G + (w c'(n) <G, g_b> + N) g_b / n.
    """
    finite = norms.isfinite()
    safe = torch.where(finite & (norms > 0), norms, 1.0)
    if automatic:
        padded = torch.where(finite, norms, 1.0) + gamma
        factor = bound / padded
        slope = -factor / padded
    else:
        clipped = norms > bound
        factor = torch.where(clipped, bound / safe, 1.0)
        slope = torch.where(clipped, -factor / safe, 0.0)
    factor = torch.where(finite, factor, 0.0)
    used = finite if weights is None else finite & (weights != 0)
    weight = torch.ones_like(norms) if weights is None else weights.to(norms.dtype)
    # A sample that counts nothing may hold anything: its gradient is zero, not 0 * NaN.
    tame = [torch.where(_per_sample(finite, g), g, 0.0) for g in grads]
    inner = _inner(tame, cotangents)
    along = (torch.where(used, weight * slope * inner, 0.0) + norm_cotangent) / safe
    along = torch.where(finite & (norms > 0), along, 0.0)
    scale = torch.where(used, weight * factor, 0.0)
    out = []
    for g, cotangent in zip(tame, cotangents, strict=True):
        dg = _per_sample(along, g) * g.to(norms.dtype)
        if cotangent is not None:
            dg = dg + _per_sample(scale, g) * cotangent.to(norms.dtype)
        out.append(dg.to(g.dtype))
    return out, factor * inner


def _backward(
    ctx: Any, sum_cotangents: list[Tensor | None], norm_cotangent: Tensor | None
) -> tuple[object, ...]:
    saved = list(ctx.saved_tensors)
    grads, norms = saved[: ctx.count], saved[ctx.count]
    weights = saved[ctx.count + 1] if ctx.weighted else None
    if norm_cotangent is None:
        norm_cotangent = torch.zeros_like(norms)
    to_weights: Tensor | None
    if ctx.mode == "per_layer":
        bounds = list(ctx.max_norm) * (ctx.count if len(ctx.max_norm) == 1 else 1)
        parts = [
            _one_norm(
                [grads[i]],
                [sum_cotangents[i]],
                norm_cotangent[:, i],
                norms[:, i],
                bounds[i],
                False,
                ctx.gamma,
                weights,
            )
            for i in range(ctx.count)
        ]
        to_grads = [part[0][0] for part in parts]
        to_weights = torch.stack([part[1] for part in parts]).sum(0)
    else:
        to_grads, to_weights = _one_norm(
            grads,
            sum_cotangents,
            norm_cotangent,
            norms,
            ctx.max_norm[0],
            ctx.mode == "automatic",
            ctx.gamma,
            weights,
        )
    to_weights = None if weights is None else to_weights.to(weights.dtype)
    # The dispatcher drops trailing arguments that have their default value.
    return (to_grads, None, None, to_weights, None)[: len(ctx.needs_input_grad)]


torch.library.register_autograd("embattle::clip_and_sum", _backward, setup_context=_save)


# ---- vmap ----


def moved(x: Tensor, dim: int | None, size: int) -> Tensor:
    """The mapped dim in front, whether the tensor has it or not."""
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


def split(x: Tensor, size: int) -> Tensor:
    """Splits the mapped dim off dim 0 again."""
    return x.reshape(size, x.shape[0] // max(size, 1), *x.shape[1:])


@register_vmap("embattle::per_sample_norm")
def _(info: Any, in_dims: tuple[list[int | None]], grads: list[Tensor]) -> tuple[Tensor, int]:
    # More samples, and nothing else.
    size = info.batch_size
    merged = [moved(g, d, size).flatten(0, 1) for g, d in zip(grads, in_dims[0], strict=True)]
    return split(_ops.per_sample_norm(merged), size), 0


@register_vmap("embattle::linear_grad_norm")
def _(
    info: Any,
    in_dims: tuple[int | None, ...],
    input: Tensor,
    grad_output: Tensor,
    bias: bool = False,
    method: str = "auto",
) -> tuple[Tensor, int]:
    size = info.batch_size
    merged = [
        moved(t, d, size).flatten(0, 1) for t, d in zip((input, grad_output), in_dims, strict=False)
    ]
    return split(_ops.linear_grad_norm(*merged, bias, method), size), 0


@register_vmap("embattle::clip_and_sum")
def _(
    info: Any,
    in_dims: tuple[Any, ...],
    grads: list[Tensor],
    max_norm: list[float],
    mode: str = "flat",
    weights: Tensor | None = None,
    gamma: float = 0.01,
) -> tuple[tuple[list[Tensor], Tensor], tuple[list[int], int]]:
    size = info.batch_size
    lists = [moved(g, d, size) for g, d in zip(grads, in_dims[0], strict=True)]
    weight_dim = in_dims[3] if len(in_dims) > 3 else None
    per_slice = None if weights is None else moved(weights, weight_dim, size)
    results = [
        _ops.clip_and_sum(
            [g[i] for g in lists],
            max_norm,
            mode,
            None if per_slice is None else per_slice[i],
            gamma,
        )
        for i in range(size)
    ]
    sums = [torch.stack([r[0][i] for r in results]) for i in range(len(grads))]
    norms = torch.stack([r[1] for r in results])
    return (sums, norms), ([0] * len(grads), 0)


outside_autograd(
    "per_sample_norm",
    "linear_grad_norm",
)
