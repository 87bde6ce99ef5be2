"""The directions of virtual adversarial training and of SMART."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from embattle import ops
from embattle.attacks.base import Attack, Norm
from embattle.attacks.judge import Ascend
from embattle.attacks.starts import BoxStart, GaussianStart
from embattle.perturb.blocks import Block
from embattle.perturb.strength import Strength, words


@dataclass(kw_only=True, repr=False)
class VAT(Attack):
    """The virtual adversarial direction (Miyato et al., ICLR 2017, eq. 5-8).

    A random unit vector d is turned `steps` times into `g / ||g||`, g being the gradient of
    `KL(p || p(x + xi * d))` (power iteration); the perturbation is `eps * d`. Needs no labels, but
    outputs. The authors' text code agrees; it draws one vector and makes one iteration.

    Args:
        xi: size of the finite difference.
    """

    steps: int = 1
    random_start: bool | GaussianStart | BoxStart = True
    ascend: Ascend = "kl"
    xi: Strength = 0.1

    def _words(self) -> list[str]:
        count = f"{self.steps} power iteration" + ("s" if self.steps != 1 else "")
        return [f"{count} at {words(self.xi)}"]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise ValueError(f"VAT: steps must be at least 1, got {self.steps}")
        if self.norm != "l2" or not isinstance(self.random_start, bool) or not self.random_start:
            raise ValueError("VAT: the direction is of norm 'l2', from a random start")

    def begin(self, block: Block, scale: float) -> dict[str, Any]:
        return super().begin(block, scale) | {"xi": self._resolve(self.xi, block, scale=1.0)}

    def start(self, block: Block, state: dict[str, Any], generator: torch.Generator | None) -> None:
        like = torch.zeros_like(block.delta.detach())
        noise = ops.gaussian_noise(like, std=1.0, generator=generator, **block.geometry)
        block.set(self._scaled(block, noise, state["xi"]))

    def step(
        self, block: Block, grad: Tensor, state: dict[str, Any], number: int, values: Tensor
    ) -> None:
        size = state["eps"] if number == self.steps - 1 else state["xi"]
        block.set(self._scaled(block, grad, size))

    def _scaled(self, block: Block, direction: Tensor, size: float | Tensor) -> Tensor:
        zero = torch.zeros_like(block.delta.detach())
        return ops.pgd_step(
            zero,
            direction,
            step_size=size,
            eps=torch.inf,
            norm="l2",
            nonfinite=block.nonfinite,
            **block.geometry,
        )


@dataclass(kw_only=True, repr=False)
class SMARTStep(Attack):
    """SMART's inner ascent (Jiang et al., ACL 2020, algorithm 1) of the symmetric KL.

    `delta ~ N(0, sigma^2)`, then `delta <- P_eps(delta + step_size * g)` with the raw gradient and
    the linf ball. The authors' code never projects: `projection="code"` scales each token's
    `delta + step_size * g` to a largest coordinate of 1 instead, and ignores eps.

    Args:
        step_size: the paper's eta.
        sigma: of the start.
        projection: "paper" or "code".
    """

    norm: Norm = "linf"
    eps: Strength = 1e-5
    ascend: Ascend = "symmetric_kl"
    random_start: bool | GaussianStart | BoxStart = True
    step_size: float = 1e-3
    sigma: float = 1e-5
    projection: Literal["paper", "code"] = "paper"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.projection not in ("paper", "code"):
            raise ValueError(
                f"SMARTStep: projection must be 'paper' or 'code', got {self.projection!r}"
            )

    def _words(self) -> list[str]:
        count = f"{self.steps} raw step" + ("s" if self.steps != 1 else "")
        return [f"{count} of {self.step_size:g} x gradient"]

    def start(self, block: Block, state: dict[str, Any], generator: torch.Generator | None) -> None:
        like = torch.zeros_like(block.delta.detach())
        block.set(ops.gaussian_noise(like, std=self.sigma, generator=generator, **block.geometry))

    def step(
        self, block: Block, grad: Tensor, state: dict[str, Any], number: int, values: Tensor
    ) -> None:
        moved = block.delta.detach() + self.step_size * grad
        if self.projection == "paper":
            block.set(ops.project(moved, eps=state["eps"], norm=self.norm, **block.geometry))
            return
        largest = moved.abs().amax(-1, keepdim=True)
        scaled = torch.where(largest > 0, moved / largest, torch.zeros_like(moved))
        mask = block.geometry["mask"]
        block.set(scaled if mask is None else scaled * mask.unsqueeze(-1))
