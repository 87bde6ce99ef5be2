"""Small tables of one width, worked on as one table: a few operations for all of them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import Parameter

from embattle.clipping.combine import Use, dense_norms
from embattle.clipping.units import Units
from embattle.clipping.uses import RowUse

# Elements of tables, and of gradients of their rows, that are worked on as one.
_TOGETHER = 1 << 18


@dataclass
class JointTable:
    """The uses of several tables as the use of one that holds their rows, one after the other.

    Attributes:
        use: with indices into the joint table.
        members: the tables, and the first row of each.
        single: whether each sample uses one row of each table.
    """

    use: RowUse
    members: list[tuple[Parameter, int]]
    single: bool

    def norms(self, units: Units) -> Tensor:
        """[units] norms of the tables' joint gradient."""
        if self.single and units.of_sample is None:
            # Nothing to add up.
            return dense_norms([self.use.grad], units)
        return self.use.norms(units)

    def cleaned(self, bad: Tensor) -> JointTable:
        """The same with the samples marked in bad [B] set to zero."""
        return replace(self, use=self.use.cleaned(bad))

    def weighted(self, factor: Tensor) -> Iterator[tuple[Parameter, Tensor]]:
        """Every table's sum_b factor_b g_b; all of them are parts of one tensor."""
        rows = sum(len(p) for p, _ in self.members)
        whole = self.use.weighted(factor, rows)
        pieces = torch.split(whole, [len(p) for p, _ in self.members])
        return ((p, piece) for (p, _), piece in zip(self.members, pieces, strict=True))


Key: TypeAlias = tuple[int, torch.dtype]


def join_tables(uses: dict[Parameter, list[Use]]) -> list[JointTable]:
    """Takes small tables, where there are two or more of a kind, out of uses."""
    groups: dict[Key, list[list[tuple[Parameter, RowUse]]]] = {}
    room: dict[Key, int] = {}
    for p, own in uses.items():
        use = own[0]
        if len(own) > 1 or not isinstance(use, RowUse) or not _is_small(p, use):
            continue
        key = (p.shape[1], p.dtype)
        size = max(p.numel(), use.grad.numel())
        if size > room.get(key, 0):
            groups.setdefault(key, []).append([])
            room[key] = _TOGETHER
        groups[key][-1].append((p, use))
        room[key] -= size
    joint = []
    for members in (part for parts in groups.values() for part in parts):
        if len(members) > 1:
            joint.append(_joined(members))
            for p, _ in members:
                del uses[p]
    return joint


def _is_small(parameter: Parameter, use: RowUse) -> bool:
    return (
        not use.sparse
        and use.grad.dtype == parameter.dtype
        and parameter.dtype in (torch.float32, torch.float64)
        and max(parameter.numel(), use.grad.numel()) <= _TOGETHER // 2
    )


def _joined(members: list[tuple[Parameter, RowUse]]) -> JointTable:
    firsts, first = [], 0
    for p, _ in members:
        firsts.append(first)
        first += len(p)
    grad = torch.cat([use.masked() for _, use in members], 1)
    indices = torch.cat([use.indices for _, use in members], 1)
    columns = [use.indices.shape[1] for _, use in members]
    indices = indices + _starts(tuple(firsts), tuple(columns), indices.device)
    return JointTable(
        RowUse(indices, grad, None, False),
        [(p, first) for (p, _), first in zip(members, firsts, strict=True)],
        max(columns) == 1,
    )


@functools.lru_cache(maxsize=256)
def _starts(firsts: tuple[int, ...], columns: tuple[int, ...], device: torch.device) -> Tensor:
    """Each table's first row, as often as it has columns of indices."""
    rows = [first for first, count in zip(firsts, columns, strict=True) for _ in range(count)]
    return torch.tensor(rows, device=device)
