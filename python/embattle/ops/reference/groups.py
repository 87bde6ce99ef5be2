"""Groups of vectors as rows of a padded float64 matrix, and their norms."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from embattle.ops._arguments import Strength

_NORMS: dict[object, str] = {
    "l1": "l1",
    "l2": "l2",
    "linf": "linf",
    1: "l1",
    2: "l2",
    math.inf: "linf",
}
DUAL = {"l1": "linf", "l2": "l2", "linf": "l1"}


def norm_name(norm: str | float) -> str:
    return _NORMS[norm.lower() if isinstance(norm, str) else norm]


@dataclass(frozen=True)
class Groups:
    """Which rows of a ``[rows, dim]`` tensor form which group, and which of them are unmasked."""

    shape: torch.Size
    dim: int
    rows: Tensor  # [groups, longest]: row numbers; 0 where there is none
    used: Tensor  # [groups, longest] bool: there is a row, and it is unmasked

    @staticmethod
    def of(x: Tensor, group: str, offsets: Tensor | None, mask: Tensor | None) -> Groups:
        count = math.prod(x.shape[:-1])
        if offsets is not None:
            lengths = offsets.diff()
            longest = int(lengths.max()) if len(lengths) else 0
            steps = torch.arange(longest, device=x.device)
            used = steps < lengths[:, None]
            rows = torch.where(used, offsets[:-1, None] + steps, 0)
        else:
            groups = count if group == "token" or x.dim() < 2 else x.shape[0]
            longest = 1 if group == "token" else math.prod(x.shape[1:-1])
            rows = torch.arange(count, device=x.device).reshape(groups, longest)
            used = torch.ones_like(rows, dtype=torch.bool)
        if mask is not None:
            used = used & mask.reshape(count)[rows]
        return Groups(x.shape, x.shape[-1] if x.dim() else 1, rows, used)

    @property
    def valid(self) -> Tensor:
        """[groups, width] bool: the elements that take part."""
        return self.used[:, :, None].expand(*self.used.shape, self.dim).flatten(1)

    def pack(self, x: Tensor) -> Tensor:
        """Elements of a tensor as [groups, width] float64, 0 where there is none or masked."""
        packed = x.reshape(math.prod(self.shape[:-1]), self.dim)[self.rows].flatten(1)
        return torch.where(self.valid, packed.double(), 0.0)

    def unpack(self, packed: Tensor, base: Tensor) -> Tensor:
        """The inverse of :meth:`pack`; elements that take no part are those of `base`."""
        rows = packed.reshape(*self.used.shape, self.dim)[self.used]
        flat = base.to(packed.dtype).reshape(math.prod(self.shape[:-1]), self.dim)
        return flat.index_put((self.rows[self.used],), rows).reshape(self.shape)

    def column(self, value: Strength) -> Tensor:
        """A float or one value per group as [groups, 1] in float64."""
        column = torch.as_tensor(value, dtype=torch.float64, device=self.rows.device)
        return column.expand(len(self.rows))[:, None]


def max_of(x: Tensor) -> Tensor:
    return x.amax(1, keepdim=True) if x.shape[1] else x.new_zeros(len(x), 1)


def norms_of(z: Tensor, norm: str) -> Tensor:
    """[groups, 1] norms of the rows of z, without overflow or underflow in between."""
    if norm == "l1":
        return z.abs().sum(1, keepdim=True)
    if norm == "linf":
        return max_of(z.abs())
    largest = max_of(z.abs()).detach()
    # A power of two rounds nothing: rows of the same numbers in another order stay equal.
    power = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - 1)
    scale = torch.where((largest > 0) & largest.isfinite(), power, 1.0)
    length: Tensor = torch.linalg.vector_norm(z / scale, dim=1, keepdim=True)
    return length * scale
