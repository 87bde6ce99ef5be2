"""A gradient-free attack: random search in the ball, greedy for each sample."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from embattle import checks, ops
from embattle.attacks.base import Attack, box
from embattle.perturb.blocks import Block
from embattle.perturb.strength import group_sizes

# The paper's schedule: after so many of 10,000 queries the share of coordinates is halved.
_HALVED = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


@dataclass(kw_only=True, repr=False)
class Square(Attack):
    """Random search on the surface of the ball (Square Attack, Andriushchenko et al., ECCV 2020).

    Needs no gradients, so that models that hide theirs are attacked all the same. Algorithm 1: a
    random part of the coordinates is changed, and the change is kept where the objective rises, for
    each sample by itself. linf (algorithm 2): the part gets new signs at the border. l2 and l1
    (algorithm 3): the part is turned, and takes over the norm of another part that is zeroed. The
    paper's parts are squares of pixels; embeddings have no neighbourhoods, so here any coordinates
    of the group that may move are drawn.

    Args:
        steps: queries, each a forward pass.
        share: of the coordinates that change at first, the paper's p; it is halved nine times on
            the way.
    """

    climbs: ClassVar[bool] = False

    steps: int = 1000
    share: float = 0.8
    random_start: bool = True
    keep: Literal["last", "best"] = field(init=False, default="best")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.share = checks.real("Square", "share", self.share, 0, 1)
        if self.share == 0:
            raise ValueError("Square: share must be above 0, got 0")
        if self.random_start is not True:
            raise ValueError("Square: starts at random, on the surface of the ball")
        if isinstance(self.eps, float) and math.isinf(self.eps):
            raise ValueError("Square: eps must be finite, got inf")

    def _words(self) -> list[str]:
        return [f"{self.steps} quer" + ("ies" if self.steps != 1 else "y")]

    def begin(self, block: Block, scale: float) -> dict[str, Any]:
        return super().begin(block, scale) | {
            "share": 1 / group_sizes(block.base, block.geometry).clamp(min=1)
        }

    def start(self, block: Block, state: dict[str, Any], generator: torch.Generator | None) -> None:
        state["generator"] = generator
        block.moved.fill_(True)  # attacked, without a gradient
        drawn = self._drawn(block, state)
        radius = self._radius(block, state)
        if self.norm == "linf":
            start = drawn.sign() * radius
        else:
            start = drawn * (radius / self._norm(block, drawn))
        block.set(self._inside(block, start, state))

    def step(
        self, block: Block, grad: Tensor, state: dict[str, Any], number: int, values: Tensor
    ) -> None:
        delta = block.delta.detach()
        values = values[:1] if block.coupled else values
        if number == 0:
            state["kept"], state["value"] = delta, values
        else:
            up = values > state["value"]
            state["kept"] = torch.where(block.per_row(up), delta, state["kept"])
            state["value"] = torch.where(up, values, state["value"])
        queries = 10000 * number / max(self.steps, 1)
        share = self.share / 2 ** sum(queries > after for after in _HALVED)
        block.set(self._inside(block, self._changed(block, state, share), state))

    def _changed(self, block: Block, state: dict[str, Any], share: float) -> Tensor:
        kept: Tensor = state["kept"]
        drawn = self._drawn(block, state)
        # Two coordinates of a group at least are changed, on average.
        shares = block.per_group_row((2 * state["share"]).clamp(min=share).to(kept.dtype))
        part = drawn.abs() < shares
        radius = self._radius(block, state)
        if self.norm == "linf":
            return torch.where(part, drawn.sign() * radius, kept)
        emptied = self._drawn(block, state).abs() < shares
        order = 2 if self.norm == "l2" else 1
        moved = self._norm(block, kept * (part | emptied)) ** order
        unused = (radius**order - self._norm(block, kept) ** order).clamp(min=0)
        here = kept * part
        # With equal weights a single coordinate could not change its sign.
        turned = here / self._norm(block, here)
        turned = turned + drawn.sign() * part * (1.25 / self._norm(block, part.to(kept.dtype)))
        size = (moved + unused) ** (1 / order)
        return kept * ~(part | emptied) + turned * (size / self._norm(block, turned))

    def _drawn(self, block: Block, state: dict[str, Any]) -> Tensor:
        """Draw uniformly in [-1, 1], 0 where nothing may move."""
        return ops.random_start(
            block.delta.detach(),
            eps=1.0,
            norm="linf",
            generator=state["generator"],
            **block.geometry,
        )

    def _norm(self, block: Block, value: Tensor) -> Tensor:
        """Norms of the groups, above 0, spread over the rows."""
        norms = ops.group_norm(value, norm=self.norm, **block.geometry)
        return block.per_group_row(norms.clamp(min=torch.finfo(value.dtype).tiny)).to(value.dtype)

    def _radius(self, block: Block, state: dict[str, Any]) -> float | Tensor:
        eps = state["eps"]
        return block.per_group_row(eps).to(block.delta.dtype) if isinstance(eps, Tensor) else eps

    def _inside(self, block: Block, delta: Tensor, state: dict[str, Any]) -> Tensor:
        return ops.project(delta, eps=state["eps"], norm=self.norm, **block.geometry, **box(state))
