"""Attacks that draw instead of climbing: what any real attack must beat."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from embattle import ops
from embattle.attacks.base import Attack
from embattle.perturb.blocks import Block
from embattle.perturb.strength import Strength, words


@dataclass(kw_only=True, repr=False)
class _Noise(Attack):
    random_start: bool = True
    steps: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps or not self.random_start:
            raise ValueError(f"{type(self).__name__}: makes no steps, and always starts at random")

    def _words(self) -> list[str]:
        return []


@dataclass(kw_only=True, repr=False)
class GaussianNoise(_Noise):
    """Gaussian noise of standard deviation `std` per element, projected on the ball.

    Args:
        std: in the conventions of `eps`.
        eps: radius of the ball; none by default.
    """

    std: Strength
    eps: Strength = math.inf

    def _words(self) -> list[str]:
        return [f"standard deviation {words(self.std)}"]

    def begin(self, block: Block, scale: float) -> dict[str, Any]:
        return super().begin(block, scale) | {"std": self._resolve(self.std, block, scale)}

    def start(self, block: Block, state: dict[str, Any], generator: torch.Generator | None) -> None:
        block.set(
            ops.gaussian_noise(
                torch.zeros_like(block.delta),
                std=state["std"],
                eps=state["eps"],
                norm=self.norm,
                generator=generator,
                **block.geometry,
            )
        )


@dataclass(kw_only=True, repr=False)
class UniformNoise(_Noise):
    """Uniform noise in the ball."""


@dataclass(kw_only=True, repr=False)
class NEFTune(_Noise):
    """NEFTune (Jain et al., 2023): uniform noise in `+- alpha / sqrt(L * d)`, L unmasked tokens.

    Args:
        alpha: the paper's alpha, 5 to 15. Give a mask (or offsets): padding and packing otherwise
            change L, and with it the scale.
    """

    alpha: float = 5.0
    eps: Strength = math.inf
    norm: Any = "linf"

    def __post_init__(self) -> None:
        from embattle.perturb.strength import PerDim

        self.eps = PerDim(self.alpha)
        super().__post_init__()
