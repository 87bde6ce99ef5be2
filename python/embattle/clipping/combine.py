"""From the uses of one parameter to its gradient: norms per unit, and the weighted sum."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import Parameter

from embattle import ops
from embattle.clipping.units import Units
from embattle.clipping.uses import BagUse, ConvUse, DenseUse, LinearUse, RowUse

Use: TypeAlias = LinearUse | RowUse | BagUse | ConvUse | DenseUse


def simplify(uses: Sequence[Use], units: Units) -> list[Use]:
    """Merges the uses of one parameter that can be treated as one, exactly.

    Linear uses of the same rows become one with more tokens, embeddings one with more indices,
    dense gradients their sum. Overlapping ranges of rows are cut so that any two are equal or
    disjoint.
    """
    if len(uses) == 1 and not isinstance(uses[0], BagUse):
        return list(uses)
    found: list[Use] = [
        use.padded()
        if isinstance(use, BagUse) and (len(uses) > 1 or units.of_sample is not None)
        else use
        for use in uses
    ]
    if len(found) == 1:
        return found
    linear = [use for use in found if isinstance(use, LinearUse)]
    rows = [use for use in found if isinstance(use, RowUse)]
    convs = [use for use in found if isinstance(use, ConvUse)]
    dense = [use for use in found if isinstance(use, DenseUse)]
    merged: list[Use] = [*_merge_linear(linear), *_merge_rows(rows), *_merge_convs(convs)]
    if dense:
        merged.append(DenseUse(torch.stack([use.grad for use in dense]).sum(0)))
    return merged


def _merge_linear(uses: list[LinearUse]) -> list[LinearUse]:
    if len(uses) < 2:
        return uses
    cuts = sorted({edge for use in uses for edge in use.rows})
    parts: dict[tuple[tuple[int, int], bool], list[LinearUse]] = {}
    for use in uses:
        inner = [edge for edge in cuts if use.rows[0] <= edge <= use.rows[1]]
        for start, stop in itertools.pairwise(inner):
            part = use if (start, stop) == use.rows else use.part(start, stop)
            parts.setdefault((part.rows, part.transposed), []).append(part)
    return [
        LinearUse(
            torch.cat([use.x for use in same], 1), torch.cat([use.grad for use in same], 1), *key
        )
        for key, same in parts.items()
    ]


def _merge_rows(uses: list[RowUse]) -> list[RowUse]:
    """Embeddings with different padding rows: the padding of each has a zero gradient."""
    if len(uses) < 2:
        return uses
    grads = [use.masked() for use in uses]
    paddings = {use.padding_idx for use in uses}
    return [
        RowUse(
            torch.cat([use.indices for use in uses], 1),
            torch.cat(grads, 1),
            paddings.pop() if len(paddings) == 1 else None,
            all(use.sparse for use in uses),
        )
    ]


def _merge_convs(uses: list[ConvUse]) -> list[Use]:
    """Convolutions of the same images' size are one with more images, others become dense."""
    if len(uses) < 2:
        return list(uses)
    first = uses[0]

    def signature(use: ConvUse) -> tuple[object, ...]:
        return (use.x.shape[2:], use.stride, use.padding, use.dilation, use.groups)

    if all(signature(use) == signature(first) for use in uses):
        first = ConvUse(
            torch.cat([use.x for use in uses], 1),
            torch.cat([use.grad for use in uses], 1),
            first.kernel,
            first.shape,
            first.stride,
            first.padding,
            first.dilation,
            first.groups,
        )
        return [first]
    return [DenseUse(torch.stack([use.dense(use.shape) for use in uses]).sum(0))]


def _cross(x: Tensor, indices: Tensor, grad: Tensor, rows: Tensor) -> Tensor:
    """[n] inner products of the gradients of a table's two uses, as a layer and as an embedding.

    <sum_s G_s x_s^T, sum_t e(i_t) r_t^T> = sum_{s,t} G_s[i_t] <x_s, r_t>.
    """
    picked = grad.gather(2, indices[:, None].expand(-1, grad.shape[1], -1))
    return (picked.double() * (x.double() @ rows.double().transpose(1, 2))).sum((1, 2))


def _tied_norms(linear: LinearUse, row: RowUse, units: Units) -> Tensor:
    rows = row.masked()

    def norms(x: Tensor, indices: Tensor, grad: Tensor, rows: Tensor) -> Tensor:
        layer = ops.linear_grad_norm(x, grad).double()
        table = ops.embedding_grad_norm(indices, rows).double()
        square = layer.square() + table.square() + 2 * _cross(x, indices, grad, rows)
        # clamp keeps a NaN
        return square.clamp(min=0).sqrt()

    return units.gather(norms, [linear.x, row.indices], [linear.grad, rows])


def dense_norms(grads: Sequence[Tensor], units: Units) -> Tensor:
    """[units] norms over all the per-sample gradients [B, ...] together."""
    if units.of_sample is None:
        return ops.per_sample_norm(grads)

    def norms(*members: Tensor) -> Tensor:
        return ops.per_sample_norm([grad.sum(1) for grad in members])

    return units.gather(norms, [], [grad.reshape(len(grad), 1, -1) for grad in grads])


def joint_norms(parts: Sequence[Tensor]) -> Tensor:
    """[units] norms, float64, of gradients that consist of parts.

    Args:
        parts: [units] norms of some; gradients [units, ...] themselves. Their squares add up.
    """
    return ops.per_sample_norm(parts).double()


def unit_norms(uses: list[Use], units: Units, shape: torch.Size) -> Tensor:
    """[units] norms of one parameter's gradient, float32 or float64.

    Args:
        uses: what `simplify` left.
        units: the samples' units.
        shape: the parameter's.
    """
    if all(isinstance(use, LinearUse) for use in uses):
        return joint_norms([use.norms(units) for use in uses if isinstance(use, LinearUse)])
    if len(uses) == 1:
        use = uses[0]
        if isinstance(use, BagUse):
            return use.norms()
        if isinstance(use, (RowUse, ConvUse)):
            return use.norms(units)
    if len(uses) == 2:
        linear = next((use for use in uses if isinstance(use, LinearUse)), None)
        row = next((use for use in uses if isinstance(use, RowUse)), None)
        if linear and row and not linear.transposed and linear.rows == (0, shape[0]):
            return _tied_norms(linear, row, units)
    whole = torch.stack([use.dense(shape) for use in uses if not isinstance(use, BagUse)])
    return dense_norms([whole.sum(0)], units)


def _order(item: tuple[Parameter, Sequence[Use]]) -> tuple[bool, int]:
    """Sorts parameters so that the peak of memory stays low when uses go as gradients come.

    First those that give back more than their gradient takes, the least need first; then the
    others, the largest growth first.
    """
    parameter, uses = item
    own = parameter.numel()
    growth, copied = own, 0  # a scaled copy of the smaller tensor stands beside the gradient
    for use in uses:
        smaller = size = use.grad.numel()
        if isinstance(use, (LinearUse, ConvUse)):
            inputs = use.x.numel()
            size += inputs
            smaller = min(smaller, inputs)
        growth -= size
        copied = max(copied, smaller)
    return (growth > 0, growth - own - copied if growth > 0 else own + copied)


def weighted_gradients(
    uses: dict[Parameter, list[Use]], factor_of: Callable[[Parameter], Tensor]
) -> dict[Parameter, Tensor]:
    """sum_b factor_b g_b of all parameters; empties uses as it goes.

    Args:
        uses: what `simplify` left.
        factor_of: the samples' factors [B] for a parameter.
    """
    items = sorted(uses.items(), key=_order)
    uses.clear()
    items.reverse()
    found = {}
    while items:
        p, own = items.pop()
        found[p] = weighted_gradient(own, factor_of(p), p)
    return found


def weighted_gradient(uses: list[Use], factor: Tensor, parameter: Tensor) -> Tensor:
    """sum_b factor_b g_b in the parameter's shape and dtype; sparse if every use wants rows.

    Args:
        uses: what `simplify` left.
        factor: [B] factors of the samples.
        parameter: the parameter, for its shape and dtype.
    """
    total: Tensor | None = None
    for use in uses:
        if isinstance(use, (RowUse, BagUse)):
            part = use.weighted(factor, len(parameter))
        else:
            part = use.weighted(factor)
        if part.dtype != parameter.dtype:
            part = part.to(parameter.dtype)
        if isinstance(use, LinearUse) and part.shape[0] != parameter.shape[0]:
            whole = torch.zeros_like(parameter) if total is None else total
            whole[use.rows[0] : use.rows[1]] += part
            total = whole
        elif total is None:
            total = part
        else:
            total = part + total if part.layout == torch.strided else total + part
    assert total is not None
    return total
