"""Sequences of torch ops for the ops' jobs, as users and other libraries write them.

Steps and projections are on ``[groups, ...]``, a group for each sample.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def wide(values: Tensor, like: Tensor) -> Tensor:
    """[groups] as a column that broadcasts over `like`."""
    return values.view(-1, *[1] * (like.dim() - 1))


def _norms(x: Tensor) -> Tensor:
    return wide(torch.linalg.vector_norm(x.flatten(1), dim=1), x)


# ---- Groups ----


def l2_step(delta: Tensor, grad: Tensor, step: float, eps: float) -> Tensor:
    moved = delta + step * grad / (_norms(grad) + 1e-10)
    return moved * (eps / (_norms(moved) + 1e-10)).clamp(max=1)


def linf_step(delta: Tensor, grad: Tensor, step: float, eps: float) -> Tensor:
    return (delta + step * grad.sign()).clamp(-eps, eps)


def l1_step(delta: Tensor, grad: Tensor, step: float, eps: float) -> Tensor:
    flat = grad.flatten(1)
    at = flat.abs().argmax(1, keepdim=True)
    moved = delta.flatten(1).scatter_add(1, at, step * flat.gather(1, at).sign())
    return l1_project(moved, eps).view_as(delta)


def l1_project(x: Tensor, eps: float) -> Tensor:
    """By sorting."""
    flat = x.flatten(1)
    ordered = flat.abs().sort(1, descending=True).values.float()
    sums = ordered.cumsum(1) - eps
    count = torch.arange(1, flat.shape[1] + 1, device=x.device)
    kept = (ordered * count > sums).sum(1, keepdim=True)
    threshold = (sums.gather(1, kept - 1) / kept).clamp(min=0)
    return (flat.sign() * (flat.abs() - threshold).clamp(min=0)).to(x.dtype).view_as(x)


def l2_start(x: Tensor) -> Tensor:
    """Uniform in the unit ball."""
    z = torch.randn_like(x)
    radius = torch.rand(len(x), device=x.device) ** (1 / x[0].numel())
    return (z * (wide(radius, z) / _norms(z))).to(x.dtype)


# ---- Per-sample gradients and tables ----


def list_norms(grads: list[Tensor]) -> Tensor:
    """[B] norms over a list of per-sample gradients, as Opacus has it."""
    return torch.stack([g.flatten(1).norm(2, dim=-1) for g in grads], dim=1).norm(2, dim=1)


def opacus_clip(grads: list[Tensor], bound: float) -> list[Tensor]:
    """Clipping of materialised per-sample gradients."""
    factor = (bound / (list_norms(grads) + 1e-6)).clamp(max=1.0)
    return [torch.einsum("i,i...", factor.to(g.dtype), g) for g in grads]


def embedding_norms(ids: Tensor, grad: Tensor) -> Tensor:
    """[B] norms of a table's gradients by (sample, row) pairs."""
    batch, tokens = ids.shape
    samples = torch.arange(batch, device=ids.device).repeat_interleave(tokens)
    pairs = torch.stack([samples, ids.flatten()], 1)
    pairs, inverse = torch.unique(pairs, dim=0, return_inverse=True)
    summed = grad.new_zeros(len(pairs), grad.shape[-1]).index_add_(0, inverse, grad.flatten(0, 1))
    return grad.new_zeros(batch).index_add_(0, pairs[:, 0], summed.square().sum(1)).sqrt()


def row_sums(ids: Tensor, grad: Tensor, rows: int, weights: Tensor) -> Tensor:
    """[rows, D] a table's gradient, samples weighted."""
    scaled = (grad * wide(weights, grad)).flatten(0, 1)
    return scaled.new_zeros(rows, grad.shape[-1]).index_add_(0, ids.flatten(), scaled)


def perturbed_rows(weight: Tensor, ids: Tensor, delta: Tensor, inverse: Tensor) -> Tensor:
    return F.embedding(ids, weight) + F.embedding(inverse, delta)


def adagrad(weight: Tensor, state: Tensor, ids: Tensor, grad: Tensor) -> Tensor:
    """Row-wise, with a rate of 1e-6."""
    distinct, inverse = torch.unique(ids, return_inverse=True)
    summed = grad.new_zeros(len(distinct), grad.shape[1]).index_add_(0, inverse, grad)
    state.index_add_(0, distinct, summed.float().square().mean(1))
    scale = 1e-6 / (state[distinct].sqrt() + 1e-8)
    return weight.index_add_(0, distinct, -(summed * scale.unsqueeze(1)).to(weight.dtype))
