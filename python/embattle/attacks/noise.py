"""Attacks that draw noise and use no gradient: baselines that any real attack must beat."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from embattle import checks, ops
from embattle.attacks.base import Attack
from embattle.attacks.box import box
from embattle.perturb.perturbation import Perturbation
from embattle.perturb.strength import PerDim, Strength, check_strength, resolve, words


@dataclass(kw_only=True, repr=False)
class _Noise(Attack):
    random_start: bool = True
    steps: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps or self.random_start is not True:
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

    def __post_init__(self) -> None:
        super().__post_init__()
        self.std = check_strength("GaussianNoise", "std", self.std)

    def _words(self) -> list[str]:
        return [f"standard deviation {words(self.std)}"]

    def begin(self, perturbation: Perturbation, scale: float) -> dict[str, Any]:
        return super().begin(perturbation, scale) | {
            "std": perturbation.strength(self.std, self.norm, scale)
        }

    def start(
        self, perturbation: Perturbation, state: dict[str, Any], generator: torch.Generator | None
    ) -> None:
        perturbation.set(
            ops.gaussian_noise(
                torch.zeros_like(perturbation.delta),
                std=state["std"],
                eps=state["eps"],
                norm=self.norm,
                generator=generator,
                **perturbation.geometry,
                **box(state),
            )
        )


@dataclass(kw_only=True, repr=False)
class UniformNoise(_Noise):
    """Uniform noise in the ball."""


@dataclass(kw_only=True, repr=False)
class NEFTune(_Noise):
    """NEFTune (Jain et al., 2023): uniform noise in `+- alpha / sqrt(L * d)`, L unmasked tokens.

    L counts the tokens of the sample, whatever has a ball of its own. There is no `eps` to give.

    Args:
        alpha: the paper's alpha, 5 to 15. Give a mask (or offsets) where no `padding_idx` marks
            padding: padding and packing otherwise change L, and with it the scale.
    """

    alpha: float = 5.0
    eps: Strength = field(init=False, default=math.inf)
    norm: Any = field(init=False, default="linf")

    def __post_init__(self) -> None:
        self.alpha = checks.real("NEFTune", "alpha", self.alpha, 0)
        self.eps = PerDim(self.alpha)
        super().__post_init__()

    def begin(self, perturbation: Perturbation, scale: float) -> dict[str, Any]:
        state = super().begin(perturbation, scale)
        if perturbation.geometry["group"] == "token" and perturbation.geometry["offsets"] is None:
            if perturbation.coupled:
                raise ValueError("NEFTune: noises the tokens of samples, not rows or parameters")
            geometry = perturbation.geometry | {"group": "sample"}
            size = resolve(self.eps, perturbation.base, norm="linf", geometry=geometry, scale=scale)
            assert isinstance(size, Tensor)
            state["eps"] = perturbation.per_group(size).contiguous()
        return state
