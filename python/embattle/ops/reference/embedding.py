"""Gradients of embedding tables, and steps on their rows."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from embattle.ops.reference.clipping import clip_factor, norm_dtype
from embattle.ops.reference.groups import norms_of


def embedding_grad_norm(
    indices: Tensor,
    grad_output: Tensor,
    *,
    padding_idx: int | None = None,
    offsets: Tensor | None = None,
    mode: Literal["sum", "mean"] = "sum",
    per_sample_weights: Tensor | None = None,
) -> Tensor:
    """[B] l2 norms of each sample's gradient of an embedding table; repeated indices are summed.

    Without offsets (an embedding): indices [B, *], grad_output [B, *, D]. With offsets (an
    embedding bag): indices [N], offsets [B] (starts) or [B + 1], grad_output [B, D], where bag b
    holds indices ``offsets[b]`` up to ``offsets[b + 1]``, ``mode="mean"`` divides by the number of
    them that are not padding, and per_sample_weights [N] multiplies ("sum" only). Entries equal to
    padding_idx have no gradient.
    """
    samples = len(grad_output)
    dtype = norm_dtype([grad_output])
    keep = indices != padding_idx if padding_idx is not None else torch.ones_like(indices).bool()
    norms = []
    for b in range(samples):
        if offsets is None:
            ids = indices[b][keep[b]]
            rows = grad_output[b][keep[b]].double()
        else:
            end = int(offsets[b + 1]) if b + 1 < len(offsets) else len(indices)
            bag = slice(int(offsets[b]), end)
            ids = indices[bag][keep[bag]]
            rows = grad_output[b].double().expand(len(ids), grad_output.shape[1])
            if per_sample_weights is not None:
                rows = rows * per_sample_weights[bag][keep[bag]].double()[:, None]
            if mode == "mean":
                rows = rows / max(len(ids), 1)
        unique, inverse = torch.unique(ids, return_inverse=True)
        summed = rows.new_zeros(len(unique), rows.shape[-1]).index_add(0, inverse, rows)
        norms.append(norms_of(summed.reshape(1, -1), "l2")[0, 0])
    return torch.stack(norms).to(dtype) if norms else grad_output.new_zeros(0, dtype=dtype)


def embedding_grad_sum(
    indices: Tensor,
    grad_output: Tensor,
    rows: int,
    *,
    weights: Tensor | None = None,
    padding_idx: int | None = None,
) -> Tensor:
    """[rows, D]: for every row r of a table, the sum of w_b g over the entries with index r.

    indices [B, *], grad_output [B, *, D], weights [B] (None for ones). The row padding_idx is zero.
    In the dtype of grad_output.
    """
    grads = grad_output.double()
    if weights is not None:
        grads = grads * weights.double().reshape(-1, *[1] * (grads.dim() - 1))
    flat = grads.reshape(indices.numel(), grads.shape[-1])
    total = flat.new_zeros(rows, grads.shape[-1]).index_add(0, indices.flatten(), flat)
    if padding_idx is not None:
        total[padding_idx] = 0
    return total.to(grad_output.dtype)


def embedding_perturb(weight: Tensor, indices: Tensor, delta: Tensor, inverse: Tensor) -> Tensor:
    """[*, D]: ``weight[indices] + delta[inverse]``, and ``weight[indices]`` where inverse is -1.

    Args:
        weight: [V, D], the table.
        indices: [*] int64, rows of the table.
        delta: [U, D], of any float dtype.
        inverse: [*] int64, rows of delta.

    Returns:
        In the dtype of weight. Differentiable with respect to weight and delta.
    """
    if not len(delta):
        return weight[indices]
    moved = torch.where((inverse >= 0)[..., None], delta[inverse.clamp_min(0)].double(), 0.0)
    return (weight[indices].double() + moved).to(weight.dtype)


def rowwise_adagrad_(
    weight: Tensor,
    state: Tensor,
    indices: Tensor,
    grad: Tensor,
    *,
    lr: float,
    eps: float = 1e-8,
    max_norm: float | None = None,
) -> Tensor:
    """A row-wise Adagrad step on the touched rows of a table, in place; returns weight.

    For every row r in indices: G is the sum of its gradients, scaled by ``min(1, max_norm /
    ||G||)``; ``state[r] += mean(G ** 2)``; ``weight[r] -= lr * G / (sqrt(state[r]) + eps)``
    (row-wise Adagrad of Mudigere et al., "Software-hardware co-design for fast and scalable
    training of deep learning recommendation models", ISCA 2022). A row whose G is not finite stays
    as it is.

    Args:
        weight: [V, D].
        state: [V].
        indices: [*] int64.
        grad: [*, D].
        lr: the learning rate.
        eps: added to the root; where both are zero so is the gradient, and the row stays.
        max_norm: the clipping bound of a summed row gradient; None for none.
    """
    rows, inverse = torch.unique(indices.flatten(), return_inverse=True)
    flat = grad.double().reshape(indices.numel(), weight.shape[1])
    total = flat.new_zeros(len(rows), weight.shape[1]).index_add(0, inverse, flat)
    finite = total.isfinite().all(1)
    rows, total = rows[finite], total[finite]
    if max_norm is not None:
        limit = torch.as_tensor(max_norm, dtype=total.dtype, device=total.device)
        total = total * clip_factor(norms_of(total, "l2"), limit)
    with torch.no_grad():
        mean = total.square().sum(1) / max(weight.shape[1], 1)
        new = state[rows].double() + mean
        root = new.sqrt() + eps
        step = lr * total / torch.where(root == 0, 1.0, root)[:, None]
        state[rows] = new.to(state.dtype)
        weight[rows] = (weight[rows].double() - step).to(weight.dtype)
    return weight
