"""Ops on per-sample gradients."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from embattle.ops._arguments import argument_error, refuse_tangents

_ops = torch.ops.embattle


def _listed(op: str, grads: Sequence[Tensor]) -> list[Tensor]:
    # A tensor is a sequence too, of its samples: what it would give is not what was meant.
    if isinstance(grads, Tensor) or not isinstance(grads, Iterable):
        raise TypeError(
            f"embattle.{op}: grads must be a sequence of tensors, got {type(grads).__name__}"
        )
    # The dispatcher finds an op's device by its tensors: an empty list never reaches the op.
    tensors = list(grads)
    if not tensors:
        raise ValueError(f"embattle.{op}: grads must hold at least one tensor, got an empty list")
    for index, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"embattle.{op}: grads[{index}] must be a tensor, got {type(tensor).__name__}"
            )
    return tensors


def _bounds(op: str, max_norm: float | Sequence[float]) -> list[float]:
    try:
        if isinstance(max_norm, (int, float)) or not isinstance(max_norm, Iterable):
            return [float(max_norm)]
        if not isinstance(max_norm, str):
            return [float(bound) for bound in max_norm]
    except (TypeError, ValueError):
        pass
    raise TypeError(
        f"embattle.{op}: max_norm must be a number, or one for each tensor, got {max_norm!r}"
    )


def per_sample_norm(grads: Sequence[Tensor]) -> Tensor:
    """The l2 norm of each sample's whole gradient, over all tensors of a list, in one launch.

    Args:
        grads: tensors ``[B, ...]`` of any shapes and float dtypes.

    Returns:
        ``[B]``, float64 if any input is float64 and float32 otherwise.

    Raises:
        ValueError: for an empty list or batch sizes that differ.
    """
    tensors = _listed("per_sample_norm", grads)
    try:
        out: Tensor = _ops.per_sample_norm(tensors)
    except RuntimeError as error:
        raise argument_error(error) from None
    return out


def clip_and_sum(
    grads: Sequence[Tensor],
    *,
    max_norm: float | Sequence[float],
    mode: Literal["flat", "per_layer", "automatic"] = "flat",
    weights: Tensor | None = None,
    gamma: float = 0.01,
) -> tuple[list[Tensor], Tensor]:
    """``sum_b weights_b * c_b * g_b`` for every tensor, and the norms that gave ``c_b``.

    A sample whose norm is not finite counts nothing (and its norm is returned as it is, so that it
    can be reported); weight 0 removes a sample whatever it holds. Differentiable with respect to
    `grads`.

    Args:
        grads: tensors ``[B, ...]`` of any shapes and float dtypes.
        max_norm: the bound C; for ``mode="per_layer"`` a float or one float per tensor.
        mode: "flat": ``c_b = min(1, C / ||g_b||)`` over all tensors together; "per_layer": every
            tensor has a norm of its own; "automatic": ``c_b = C / (||g_b|| + gamma)``.
        weights: ``[B]``, what each sample counts; None for ones.
        gamma: the stabiliser of "automatic".

    Returns:
        The sums, ``[...]`` each in its tensor's dtype, and the norms: ``[B]``, or ``[B, L]`` for
        "per_layer".

    Raises:
        ValueError: for an empty list, batch sizes that differ, a negative bound, an unknown mode.

    Source: Abadi et al. (arXiv 1607.00133), algorithm 1; automatic: Bu et al. (arXiv 2206.07136),
    AUTO-S.
    """
    tensors = _listed("clip_and_sum", grads)
    bounds = _bounds("clip_and_sum", max_norm)
    refuse_tangents("clip_and_sum", *tensors)
    try:
        sums, norms = _ops.clip_and_sum(tensors, bounds, mode, weights, gamma)
    except RuntimeError as error:
        raise argument_error(error) from None
    return list(sums), norms


def linear_grad_norm(
    input: Tensor,
    grad_output: Tensor,
    *,
    bias: bool = False,
    method: Literal["auto", "gram", "direct"] = "auto",
) -> Tensor:
    """Per-sample l2 norm of a linear layer's weight gradient, without that gradient.

    For sample b it is ``||A_b^T G_b||_F`` with the layer's input A and output gradient G.

    Args:
        input: ``[B, *, I]``.
        grad_output: ``[B, *, O]``, the gradient of the summed loss.
        bias: add the bias' gradient to the norm.
        method: "gram" contracts over pairs of positions, "direct" over features; "auto" takes the
            cheaper one, and the direct one where the Gram form cancels.

    Returns:
        ``[B]``, float64 for float64 inputs and float32 otherwise.

    Raises:
        ValueError: for shapes that do not fit or an unknown method.

    Source: Goodfellow (arXiv 1510.01799); Li et al. (arXiv 2110.05679), section 4.
    """
    try:
        out: Tensor = _ops.linear_grad_norm(input, grad_output, bias=bias, method=method)
    except RuntimeError as error:
        raise argument_error(error) from None
    return out
