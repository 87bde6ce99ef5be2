"""Small tables of one width, worked on as one table: a few operations for all of them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import Parameter

from embattle.clipping.grad_sample import GradSample
from embattle.clipping.table_grad_sample import EmbeddingGradSample
from embattle.clipping.users import Users

# Elements of tables, and of gradients of their rows, that are worked on as one.
_TOGETHER = 1 << 18
_DTYPES = (torch.float32, torch.float64)


@dataclass
class JointTable:
    """Per-sample gradients of several tables as those of one that holds all their rows.

    Attributes:
        members: the tables.
        indices: [B, L] of each, into its own table.
        grad: [B, L, D], all their L side by side; zero wherever an index is padding.
    """

    members: list[Parameter]
    indices: list[Tensor]
    grad: Tensor

    def _table(self) -> EmbeddingGradSample:
        rows = tuple([p.shape[0] for p in self.members])
        columns = tuple([indices.shape[1] for indices in self.indices])
        starts = _starts(rows, columns, self.grad.device)
        return EmbeddingGradSample(torch.cat(self.indices, 1).add_(starts), self.grad, None, False)

    def apart(self, users: Users) -> bool:
        """Whether no user has a row twice: grad is then what its norm is that of."""
        return users.of_sample is None and all(ids.shape[1] == 1 for ids in self.indices)

    def norms(self, users: Users) -> Tensor:
        """[U] norms of the tables' joint gradient."""
        return self._table().norms(users)

    def cleaned(self, bad: Tensor) -> JointTable:
        """The same with the samples marked in bad [B] set to zero."""
        return replace(self, grad=self.grad.masked_fill(bad.reshape(-1, 1, 1), 0))

    def weighted(self, factor: Tensor) -> Iterator[tuple[Parameter, Tensor]]:
        """Every table's sum_b factor_b g_b; all of them are parts of one tensor."""
        sizes = [p.shape[0] for p in self.members]
        whole = self._table().weighted(factor, torch.Size([sum(sizes)]))
        return zip(self.members, torch.split(whole, sizes), strict=True)


Key: TypeAlias = tuple[int, torch.dtype]


def join_tables(of: dict[Parameter, list[GradSample]]) -> list[JointTable]:
    """Takes small tables, where there are two or more of a kind, out of `of`."""
    groups: dict[Key, list[list[tuple[Parameter, EmbeddingGradSample]]]] = {}
    room: dict[Key, int] = {}
    for p, own in of.items():
        found = own[0]
        if len(own) > 1 or not isinstance(found, EmbeddingGradSample) or found.sparse:
            continue
        size = max(p.numel(), found.grad.numel())
        if size > _TOGETHER // 2 or found.grad.dtype != p.dtype or p.dtype not in _DTYPES:
            continue
        key = (p.shape[1], p.dtype)
        if size > room.get(key, 0):
            groups.setdefault(key, []).append([])
            room[key] = _TOGETHER
        groups[key][-1].append((p, found))
        room[key] -= size
    joint = []
    for members in (part for parts in groups.values() for part in parts):
        if len(members) > 1:
            grad = side_by_side([found.masked() for _, found in members])
            indices = [found.indices for _, found in members]
            joint.append(JointTable([p for p, _ in members], indices, grad))
            for p, _ in members:
                del of[p]
    return joint


def side_by_side(grads: list[Tensor]) -> Tensor:
    """[B, L, D] tensors as one of all their L; a view where they are parts of one already.

    That is what they are where the model joins what the tables return.
    """
    first = grads[0]
    row, _, one = first.stride()
    width = first.shape[2]
    place = first.storage_offset()
    storage = first.untyped_storage()._cdata
    columns = 0
    for grad in grads:
        strides, own = grad.stride(), grad.shape[1]
        if (
            grad.storage_offset() != place + columns * width
            or strides[0] != row
            or strides[2] != one
            or (own > 1 and strides[1] != width)
            or grad.untyped_storage()._cdata != storage
        ):
            return torch.cat(grads, 1)
        columns += own
    return first.as_strided((first.shape[0], columns, width), (row, width, one))


@functools.lru_cache(maxsize=256)
def _starts(rows: tuple[int, ...], columns: tuple[int, ...], device: torch.device) -> Tensor:
    """Each table's first row, as often as it has columns of indices."""
    firsts = itertools.accumulate(rows[:-1], initial=0)
    found = [first for first, count in zip(firsts, columns, strict=True) for _ in range(count)]
    return torch.tensor(found, device=device)
