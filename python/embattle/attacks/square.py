"""A gradient-free attack: random search in the ball, greedy for each sample."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from embattle import checks, ops
from embattle.attacks.base import Attack
from embattle.attacks.box import box
from embattle.perturb.perturbation import Perturbation
from embattle.perturb.strength import group_sizes

# The paper's schedule: after so many of 10,000 queries the share of coordinates is halved.
_HALVED = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


@dataclass(kw_only=True, repr=False)
class Square(Attack):
    """Random search on the surface of the ball (Square Attack, Andriushchenko et al., ECCV 2020).

    Needs no gradients, so that masked gradients do not protect a model. Algorithm 1: a
    random part of the coordinates is changed, and the change is kept where the objective rises, for
    each sample by itself. linf (algorithm 2): the part gets new signs at the border. l2 and l1
    (algorithm 3): the part is turned, and takes over the norm of another part that is zeroed. The
    paper's parts are squares of pixels; embeddings have no neighbourhoods, so here any coordinates
    of the group that may move are drawn.

    With `stop_when_fooled` the steps are drawn for the samples that are left: where one leaves, the
    draws of the others are other ones than without it, of the same distribution.

    Args:
        steps: queries, each a forward pass.
        share: of the coordinates that change at first, the paper's p; it is halved nine times on
            the way.
    """

    uses_gradient: ClassVar[bool] = False

    steps: int = 1000
    share: float = 0.8
    random_start: bool = True
    keep: Literal["last", "best"] = field(init=False, default="best")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.share = checks.share("Square", "share", self.share)
        if self.random_start is not True:
            raise ValueError("Square: starts at random, on the surface of the ball")
        endless = isinstance(self.eps, Tensor) and bool(self.eps.isinf().any())
        if endless or (isinstance(self.eps, float) and math.isinf(self.eps)):
            raise ValueError("Square: eps must be finite, got inf")

    def _words(self) -> list[str]:
        return [f"{self.steps} quer" + ("ies" if self.steps != 1 else "y")]

    def begin(self, perturbation: Perturbation, scale: float) -> dict[str, Any]:
        return super().begin(perturbation, scale) | {
            "share": 1 / group_sizes(perturbation.base, perturbation.geometry).clamp(min=1)
        }

    def start(
        self, perturbation: Perturbation, state: dict[str, Any], generator: torch.Generator | None
    ) -> None:
        state["generator"] = generator
        perturbation.had_gradient.fill_(True)  # attacked, without a gradient
        drawn = self._drawn(perturbation, state)
        radius = self._radius(perturbation, state)
        if self.norm == "linf":
            start = drawn.sign() * radius
        else:
            start = (drawn / self._norm(perturbation, drawn)) * radius
        perturbation.set(self._inside(perturbation, start, state))

    def step(
        self,
        perturbation: Perturbation,
        grad: Tensor,
        state: dict[str, Any],
        number: int,
        values: Tensor,
    ) -> None:
        delta = perturbation.delta.detach()
        values = perturbation.per_delta(values)
        if number == 0:
            state["kept"], state["value"] = delta, values
        else:
            up = values > state["value"]
            state["kept"] = torch.where(perturbation.per_row(up), delta, state["kept"])
            state["value"] = torch.where(up, values, state["value"])
        queries = 10000 * number / max(self.steps, 1)
        share = self.share / 2 ** sum(queries > after for after in _HALVED)
        perturbation.set(
            self._inside(perturbation, self._changed(perturbation, state, share), state)
        )

    def _changed(self, perturbation: Perturbation, state: dict[str, Any], share: float) -> Tensor:
        kept: Tensor = state["kept"]
        drawn = self._drawn(perturbation, state)
        # Two coordinates of a group at least are changed, on average.
        shares = perturbation.per_group_row((2 * state["share"]).clamp(min=share).to(kept.dtype))
        part = drawn.abs() < shares
        radius = self._radius(perturbation, state)
        if self.norm == "linf":
            return torch.where(part, drawn.sign() * radius, kept)
        emptied = self._drawn(perturbation, state).abs() < shares
        order = 2 if self.norm == "l2" else 1
        moved = self._norm(perturbation, kept * (part | emptied)) ** order
        unused = (radius**order - self._norm(perturbation, kept) ** order).clamp(min=0)
        here = kept * part
        # With equal weights a single coordinate could not change its sign.
        turned = here / self._norm(perturbation, here)
        drawn_size = self._norm(perturbation, part.to(kept.dtype))
        turned = turned + drawn.sign() * part * (1.25 / drawn_size)
        size = (moved + unused) ** (1 / order)
        changed = kept * ~(part | emptied) + (turned / self._norm(perturbation, turned)) * size
        # A group of which no coordinate was drawn stays as it is.
        return torch.where(drawn_size > 0.5, changed, kept)

    def _drawn(self, perturbation: Perturbation, state: dict[str, Any]) -> Tensor:
        """Draw uniformly in [-1, 1], 0 where nothing may move."""
        return ops.random_start(
            perturbation.delta.detach(),
            eps=1.0,
            norm="linf",
            generator=state["generator"],
            **perturbation.geometry,
        )

    def _norm(self, perturbation: Perturbation, value: Tensor) -> Tensor:
        """Compute the norms of the groups, above 0, broadcastable to the delta."""
        norms = ops.group_norm(value, norm=self.norm, **perturbation.geometry)
        return perturbation.per_group_row(norms.clamp(min=torch.finfo(value.dtype).tiny)).to(
            value.dtype
        )

    def _radius(self, perturbation: Perturbation, state: dict[str, Any]) -> float | Tensor:
        eps = state["eps"]
        return (
            perturbation.per_group_row(eps).to(perturbation.delta.dtype)
            if isinstance(eps, Tensor)
            else eps
        )

    def _inside(self, perturbation: Perturbation, delta: Tensor, state: dict[str, Any]) -> Tensor:
        return ops.project(
            delta, eps=state["eps"], norm=self.norm, **perturbation.geometry, **box(state)
        )
