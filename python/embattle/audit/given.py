"""Perturbations that are known already, as an attack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from embattle import ops
from embattle.attacks import Attack
from embattle.attacks.box import box
from embattle.perturb.perturbation import Perturbation


@dataclass(kw_only=True, repr=False)
class Given(Attack):
    """Perturbations that are known already, in the order of the perturbed outputs."""

    deltas: Sequence[Tensor]

    def __post_init__(self) -> None:
        super().__post_init__()
        self._next = iter(self.deltas)

    def start(
        self, perturbation: Perturbation, state: dict[str, Any], generator: torch.Generator | None
    ) -> None:
        """Take the next one, as far as it lies in the ball."""
        perturbation.set(
            ops.project(
                next(self._next),
                eps=state["eps"],
                norm=self.norm,
                **perturbation.geometry,
                **box(state),
            )
        )
