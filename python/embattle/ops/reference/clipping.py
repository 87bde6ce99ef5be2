"""Norms, and per-sample clipping."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from embattle.ops._arguments import Group, Norm
from embattle.ops.reference.groups import Groups, norm_name, norms_of


def norm_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    double = any(t.dtype == torch.float64 for t in tensors)
    return torch.float64 if double else torch.float32


def group_norm(
    x: Tensor,
    *,
    norm: Norm = "l2",
    group: Group = "sample",
    offsets: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """The norm of every group, in one read.

    Args:
        x: any shape.
        norm, group, offsets, mask: as for :func:`pgd_step`.

    Returns:
        ``[groups]``, float64 for a float64 input and float32 otherwise (half types overflow).

    Raises:
        ValueError: for a wrong shape, dtype or value; the message names the argument.
    """
    groups = Groups.of(x, group, offsets, mask)
    return norms_of(groups.pack(x), norm_name(norm))[:, 0].to(norm_dtype([x]))


def sample_norms(grads: Sequence[Tensor]) -> Tensor:
    """[B] float64 norms of samples over all tensors [B, ...]."""
    flat = [g.double().reshape(len(g), math.prod(g.shape[1:])) for g in grads]
    return norms_of(torch.cat(flat, 1), "l2")[:, 0]


def per_sample_norm(grads: Sequence[Tensor]) -> Tensor:
    """[B] l2 norms of each sample's gradient over all [B, ...]; float64 if any is, else float32."""
    return sample_norms(grads).to(norm_dtype(grads))


def clip_and_sum(
    grads: Sequence[Tensor],
    *,
    max_norm: float | Sequence[float],
    mode: Literal["flat", "per_layer", "automatic"] = "flat",
    weights: Tensor | None = None,
    gamma: float = 0.01,
) -> tuple[list[Tensor], Tensor]:
    """sum_b w_b * factor_b * g_b for every tensor [B, ...], and the norms.

    The factor is ``min(1, C / ||g_b||)`` for "flat" (Abadi et al., "Deep learning with differential
    privacy", CCS 2016), the same with each tensor's own norm (and C, if a sequence) for
    "per_layer", and ``C / (||g_b|| + gamma)`` for "automatic" (Bu et al., "Automatic clipping",
    NeurIPS 2023; never infinite). A sample with norm zero adds zero, even with C = 0 or gamma = 0,
    and one whose norm is not finite nothing. Whatever has factor or weight 0 adds exactly nothing.

    Returns:
        The sums, in the dtypes of the grads and without the batch dimension, and the norms: [B], or
        [B, tensors] for "per_layer"; float32, or float64 if any grad is.
    """
    if mode == "per_layer":
        norms = torch.stack([sample_norms([g]) for g in grads], 1)
        limit = torch.as_tensor(max_norm, dtype=norms.dtype, device=norms.device)
        factors = clip_factor(norms, limit.expand(len(grads)))
    else:
        norms = sample_norms(grads)
        limit = torch.as_tensor(max_norm, dtype=norms.dtype, device=norms.device)
        if mode == "flat":
            factor = clip_factor(norms, limit)
        else:
            total = norms + gamma
            factor = limit / torch.where(total > 0, total, 1.0)
            factor = factor.clamp_max(torch.finfo(norms.dtype).max)
            factor = torch.where(norms.isfinite(), factor, 0.0)
        factors = factor[:, None].expand(len(norms), len(grads))
    if weights is not None:
        factors = factors * weights.double()[:, None]
    sums = []
    for grad, factor in zip(grads, factors.unbind(1), strict=True):
        factor = factor.reshape(-1, *[1] * (grad.dim() - 1))
        sums.append(torch.where(factor == 0, 0.0, factor * grad.double()).sum(0).to(grad.dtype))
    return sums, norms.to(norm_dtype(grads))


def clip_factor(norms: Tensor, limit: Tensor) -> Tensor:
    over = norms > limit
    factor = torch.where(over, limit / torch.where(over, norms, 1.0), 1.0)
    return torch.where(norms.isfinite(), factor, 0.0)


def linear_grad_norm(
    input: Tensor,
    grad_output: Tensor,
    *,
    bias: bool = False,
    method: Literal["auto", "gram", "direct"] = "auto",
) -> Tensor:
    """[B] l2 norms of each sample's gradient of a linear layer's weight (and bias).

    Args:
        input: [B, *, I], what went into the layer.
        grad_output: [B, *, O], the gradient of the loss with respect to what came out.
        bias: whether the layer has a bias, whose gradient then counts.
        method: how the native op computes it; the value is the same.
    """
    tokens = math.prod(input.shape[1:-1])
    a = input.double().reshape(len(input), tokens, input.shape[-1])
    g = grad_output.double().reshape(len(input), tokens, grad_output.shape[-1])
    grads = [torch.einsum("bti,bto->bio", a, g)]
    if bias:
        grads.append(g.sum(1))
    return sample_norms(grads).to(norm_dtype([input, grad_output]))
