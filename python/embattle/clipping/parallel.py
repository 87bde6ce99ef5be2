"""Summing clipped gradients over the ranks of a process group, once."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Elements that travel together.
_BUCKET = 1 << 23


def reduce_gradients(
    grads: list[Tensor | None], likes: list[Tensor], group: Any
) -> list[Tensor | None]:
    """Sums gradients over ranks.

    Args:
        grads: one for each parameter, in the same order on all ranks; None where this rank has
            none.
        likes: the parameters.
        group: the process group; None: the default one.

    Returns:
        The sums; None where no rank has one. A gradient is sparse if it is so wherever it exists.
    """
    device = likes[0].device
    kinds = [0 if g is None else (2 if g.layout == torch.strided else 1) for g in grads]
    kind = torch.tensor(kinds, device=device)
    dist.all_reduce(kind, op=dist.ReduceOp.MAX, group=group)
    found: list[Tensor | None] = list(grads)
    dense: list[int] = []
    for i, (present, like) in enumerate(zip(kind.tolist(), likes, strict=True)):
        grad = grads[i]
        if present == 1:
            found[i] = _reduce_sparse(grad, like, group)
        elif present == 2:
            whole = torch.zeros_like(like) if grad is None else grad
            found[i] = whole if whole.layout == torch.strided else whole.to_dense()
            dense.append(i)
    bucket: list[int] = []
    for i in dense:
        if bucket and (
            likes[i].dtype != likes[bucket[0]].dtype
            or sum(likes[j].numel() for j in bucket) + likes[i].numel() > _BUCKET
        ):
            _reduce_dense(found, bucket, group)
            bucket = []
        bucket.append(i)
    if bucket:
        _reduce_dense(found, bucket, group)
    return found


def _reduce_dense(grads: list[Tensor | None], chosen: list[int], group: Any) -> None:
    parts = [g for i in chosen if (g := grads[i]) is not None]
    flat = torch.cat([part.reshape(-1) for part in parts])
    dist.all_reduce(flat, group=group)
    pieces = torch.split(flat, [part.numel() for part in parts])
    for i, part, piece in zip(chosen, parts, pieces, strict=True):
        grads[i] = piece.reshape(part.shape)


def _reduce_sparse(grad: Tensor | None, like: Tensor, group: Any) -> Tensor:
    """Rows of all ranks together; ranks may have different numbers of them."""
    if grad is None:
        indices = torch.zeros(0, dtype=torch.long, device=like.device)
        values = like.new_zeros(0, *like.shape[1:])
    else:
        grad = grad.coalesce()
        indices, values = grad.indices()[0], grad.values()
    ranks = dist.get_world_size(group)
    count = torch.tensor([len(indices)], device=like.device)
    counts = [torch.zeros_like(count) for _ in range(ranks)]
    dist.all_gather(counts, count, group=group)
    sizes = [int(c) for c in counts]
    longest = max(max(sizes), 1)
    index_buffer = indices.new_zeros(longest)
    value_buffer = values.new_zeros(longest, *values.shape[1:])
    index_buffer[: len(indices)] = indices
    value_buffer[: len(values)] = values
    all_indices = [torch.zeros_like(index_buffer) for _ in range(ranks)]
    all_values = [torch.zeros_like(value_buffer) for _ in range(ranks)]
    dist.all_gather(all_indices, index_buffer, group=group)
    dist.all_gather(all_values, value_buffer, group=group)
    return torch.sparse_coo_tensor(
        torch.cat([x[:n] for x, n in zip(all_indices, sizes, strict=True)])[None],
        torch.cat([x[:n] for x, n in zip(all_values, sizes, strict=True)]),
        like.shape,
        check_invariants=False,
    ).coalesce()


def total(count: int, device: torch.device, group: Any) -> int:
    """The sum of a number over ranks."""
    number = torch.tensor([count], device=device)
    dist.all_reduce(number, group=group)
    return int(number)
