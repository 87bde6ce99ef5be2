"""Ops on embedding tables: their cost follows the rows touched, never the table."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from embattle.ops._arguments import argument_error, refuse_tangents, written

_ops = torch.ops.embattle


def _padding(op: str, padding_idx: int | None) -> int:
    if padding_idx is None:
        return -1
    if padding_idx < 0:
        raise ValueError(
            f"embattle.{op}: padding_idx must be a row of the table, got {padding_idx}; None for "
            "no padding"
        )
    return padding_idx


def embedding_grad_norm(
    indices: Tensor,
    grad_output: Tensor,
    *,
    padding_idx: int | None = None,
    offsets: Tensor | None = None,
    mode: Literal["sum", "mean"] = "sum",
    per_sample_weights: Tensor | None = None,
) -> Tensor:
    """Per-sample l2 norm of an embedding's weight gradient, repeated indices summed first.

    Args:
        indices: ``[B, *]`` int64 or int32; with `offsets` (an EmbeddingBag's ragged bags) ``[N]``.
        grad_output: ``[B, *, D]``; with `offsets` the bags' gradient ``[B, D]``.
        padding_idx: the index whose row gets no gradient.
        offsets: ``[B]`` (starts) or ``[B + 1]`` int64; one bag is one sample.
        mode: how a bag is reduced.
        per_sample_weights: ``[N]``, each index's weight in its bag (mode "sum" only).

    Returns:
        ``[B]``, float64 for a float64 gradient and float32 otherwise.

    Raises:
        ValueError: for shapes, dtypes or an argument that do not fit.
    """
    if mode not in ("sum", "mean"):
        raise ValueError(
            f"embattle.embedding_grad_norm: mode must be 'sum' or 'mean', got {mode!r}"
        )
    padding = _padding("embedding_grad_norm", padding_idx)
    try:
        out: Tensor = _ops.embedding_grad_norm(
            indices,
            grad_output,
            padding_idx=padding,
            offsets=offsets,
            mean=mode == "mean",
            per_sample_weights=per_sample_weights,
        )
    except RuntimeError as error:
        raise argument_error(error) from None
    return out


def embedding_grad_sum(
    indices: Tensor,
    grad_output: Tensor,
    rows: int,
    *,
    weights: Tensor | None = None,
    padding_idx: int | None = None,
) -> Tensor:
    """An embedding's weight gradient, each sample's part times its weight: ``sum_b w_b g_b``.

    Args:
        indices: ``[B, *]`` int64 or int32; any shape without `weights`.
        grad_output: ``[B, *, D]``.
        rows: of the table.
        weights: ``[B]``, any float dtype; None for ones.
        padding_idx: the index whose row gets no gradient.

    Returns:
        ``[rows, D]`` in the dtype of `grad_output`; summed in float64, in the order of the batch.

    Raises:
        ValueError: for shapes, dtypes or an argument that do not fit, or an index out of range
            (CPU).
    """
    padding = _padding("embedding_grad_sum", padding_idx)
    try:
        out: Tensor = _ops.embedding_grad_sum(indices, grad_output, rows, weights, padding)
    except RuntimeError as error:
        raise argument_error(error) from None
    return out


def embedding_grad_rows(
    indices: Tensor,
    grad_output: Tensor,
    rows: int,
    *,
    weights: Tensor | None = None,
    padding_idx: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The rows that `embedding_grad_sum` would write, ascending, and their sums; CPU only."""
    padding = _padding("embedding_grad_rows", padding_idx)
    try:
        found, sums = _ops.embedding_grad_rows(indices, grad_output, rows, weights, padding)
    except RuntimeError as error:
        raise argument_error(error) from None
    return found, sums


def embedding_perturb(weight: Tensor, indices: Tensor, delta: Tensor, inverse: Tensor) -> Tensor:
    """``weight[indices] + delta[inverse]``, in one pass.

    The gradient with respect to `delta` is a segment sum over `inverse`; that with respect to
    `weight` is the embedding's own.

    Args:
        weight: the table, ``[rows, D]``.
        indices: int64, any shape.
        delta: ``[U, D]``: one perturbation per distinct row of the batch.
        inverse: int64, shape of `indices`: which row of `delta`; -1 for none.

    Returns:
        ``[*indices.shape, D]`` in the dtype of `weight`.

    Raises:
        ValueError: for shapes or dtypes that do not fit, or an index out of range (CPU).
    """
    refuse_tangents("embedding_perturb", weight, delta)
    try:
        out: Tensor = _ops.embedding_perturb(weight, indices, delta, inverse)
    except RuntimeError as error:
        raise argument_error(error) from None
    return out


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
    """A sparse row-wise Adagrad step on the rows of a batch; repeated indices are summed first.

    For every distinct row r: ``g`` the summed gradient, clipped to `max_norm`;
    ``state_r += mean(g^2)``; ``weight_r -= lr * g / (sqrt(state_r) + eps)``.

    Args:
        weight: the table, ``[rows, D]``; written.
        state: ``[rows]`` float32 (float64 for a float64 table); written.
        indices: int64, any shape.
        grad: ``[*indices.shape, D]``.
        lr: learning rate.
        eps: stabiliser.
        max_norm: bound on each row's summed gradient's l2 norm; None for none.

    Returns:
        `weight`.

    Raises:
        ValueError: for shapes or dtypes that do not fit, or an index out of range (CPU).

    Source: row-wise Adagrad as in Gupta et al., "Training Recommender Systems at Scale"
    (arXiv 1907.04840 and FBGEMM's exact row-wise Adagrad).
    """
    try:
        _ops.rowwise_adagrad_(
            weight,
            state,
            indices,
            grad,
            lr=lr,
            eps=eps,
            max_norm=max_norm,
        )
    except RuntimeError as error:
        raise argument_error(error) from None
    written(weight, state)
    return weight
