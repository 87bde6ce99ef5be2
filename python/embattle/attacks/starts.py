"""Random starts other than uniform in the ball."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from embattle import ops
from embattle.perturb.perturbation import Perturbation
from embattle.perturb.strength import Strength, check_strength, words


@dataclass(frozen=True)
class GaussianStart:
    """Gaussian noise of standard deviation `std`, projected on the ball.

    TRADES (Zhang et al., ICML 2019) starts at `0.001 * N(0, 1)`, SMART at `N(0, sigma^2)`.
    """

    std: Strength

    def __post_init__(self) -> None:
        object.__setattr__(self, "std", check_strength("GaussianStart", "std", self.std))

    def draw(
        self,
        perturbation: Perturbation,
        *,
        eps: float | Tensor,
        norm: Any,
        box: dict[str, Any],
        generator: torch.Generator | None,
    ) -> Tensor:
        """Draw a start of the delta's shape."""
        return ops.gaussian_noise(
            torch.zeros_like(perturbation.delta.detach()),
            std=perturbation.strength(self.std, norm),
            eps=eps,
            norm=norm,
            generator=generator,
            **perturbation.geometry,
            **box,
        )

    def __str__(self) -> str:
        return f"gaussian start of standard deviation {words(self.std)}"


@dataclass(frozen=True)
class BoxStart:
    """Uniform in `+- size` in every coordinate, projected on the ball.

    FreeLB (Zhu et al., ICLR 2020) starts uniformly in `+- eps / sqrt(L * d)`:
    `BoxStart(PerDim(eps))`; its authors' code has a magnitude of its own there.
    """

    size: Strength

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", check_strength("BoxStart", "size", self.size))

    def draw(
        self,
        perturbation: Perturbation,
        *,
        eps: float | Tensor,
        norm: Any,
        box: dict[str, Any],
        generator: torch.Generator | None,
    ) -> Tensor:
        """Draw a start of the delta's shape."""
        like, size = perturbation.delta.detach(), perturbation.strength(self.size, norm)
        geometry = perturbation.geometry
        start = ops.random_start(like, eps=size, norm="linf", generator=generator, **geometry)
        return ops.project(start, eps=eps, norm=norm, **geometry, **box)

    def __str__(self) -> str:
        return f"uniform start in +- {words(self.size)}"
