"""Attacks with memory: MI-FGSM and APGD."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from embattle import checks, ops
from embattle.attacks.base import Attack, Norm
from embattle.attacks.box import box
from embattle.attacks.gradient import PGD
from embattle.attacks.starts import BoxStart, GaussianStart
from embattle.perturb.perturbation import Perturbation


@dataclass(kw_only=True, repr=False)
class MIFGSM(PGD):
    """Momentum iterative FGSM (Dong et al., CVPR 2018, eq. 6-7).

    `v <- decay * v + g / ||g||_1` and `delta <- P_eps(delta + step_size * u(v))`, u the steepest
    ascent of the norm. `step_size` is `eps / steps` by default, as in the paper. (The authors' code
    divides by the mean of |g| instead of its sum: the same direction.)

    Args:
        decay: the paper's mu.
    """

    carries: ClassVar[tuple[str, ...] | None] = ("velocity",)

    norm: Norm = "linf"
    decay: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.decay = checks.real("MIFGSM", "decay", self.decay, 0)
        if self.max_groups is not None:
            raise ValueError(
                f"MIFGSM: max_groups={self.max_groups} is not offered, as the velocity moves all "
                "tokens; use PGD"
            )

    def _words(self) -> list[str]:
        size = (
            super()._words()[0]
            if self.step_size is not None
            else f"{self.steps} steps of eps / steps"
        )
        return [size, f"momentum {self.decay:g}"]

    def begin(self, perturbation: Perturbation, scale: float) -> dict[str, Any]:
        state = super().begin(perturbation, scale)
        if self.step_size is None:
            state["step_size"] = state["eps"] * (1 / max(self.steps, 1))
        state["velocity"] = torch.zeros_like(perturbation.base, dtype=perturbation.dtype)
        return state

    def step(
        self,
        perturbation: Perturbation,
        grad: Tensor,
        state: dict[str, Any],
        number: int,
        values: Tensor,
    ) -> None:
        delta, state["velocity"] = ops.momentum_step(
            perturbation.delta.detach(),
            state["velocity"],
            grad,
            decay=self.decay,
            step_size=state["step_size"],
            eps=state["eps"],
            norm=self.norm,
            top=self.top,
            nonfinite=perturbation.nonfinite,
            **perturbation.geometry,
            **box(state),
        )
        perturbation.set(delta)


@dataclass(kw_only=True, repr=False)
class APGD(Attack):
    """Auto-PGD (Croce and Hein, ICML 2020, algorithm 1): no step size to choose.

    The step starts at `2 * eps`; at the checkpoints of the paper it is halved, and the search goes
    back to the best point, for each sample that has stopped improving. On a cross-entropy it is
    APGD-CE, with `Misclassify(labels, ascend="dlr")` APGD-DLR. Needs a finite eps. The authors'
    code differs from the paper in the checkpoints (computed in whole steps) and in `<=` for the
    share of improvements (condition 1): `checkpoints="code"` gives theirs. It also starts on the
    surface of the ball where this starts uniformly inside, and its l1 form is another algorithm.

    Args:
        momentum: the paper's alpha.
        share: the paper's rho.
        checkpoints: "paper" or "code".
    """

    steps: int = 20
    random_start: bool | GaussianStart | BoxStart = True
    keep: Literal["last", "best"] = "best"
    momentum: float = 0.75
    share: float = 0.75
    checkpoints: Literal["paper", "code"] = "paper"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.eps, float) and math.isinf(self.eps):
            raise ValueError("APGD: eps must be finite, got inf")
        self.momentum = checks.real("APGD", "momentum", self.momentum, 0, 1)
        self.share = checks.real("APGD", "share", self.share, 0, 1)
        checks.one_of("APGD", "checkpoints", self.checkpoints, ("paper", "code"))
        self._checks = (
            paper_checkpoints(self.steps)
            if self.checkpoints == "paper"
            else code_checkpoints(self.steps)
        )

    def begin(self, perturbation: Perturbation, scale: float) -> dict[str, Any]:
        delta = perturbation.delta.detach()
        batch = (1,) if perturbation.coupled else (perturbation.samples,)
        return super().begin(perturbation, scale) | {
            "previous": delta,
            "ratio": delta.new_ones(batch),  # of the step to 2 * eps
            "ups": delta.new_zeros(batch),
            "halved": torch.zeros(batch, dtype=torch.bool, device=delta.device),
        }

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
            state |= {
                "last": values,
                "top": values,
                "top_before": values,
                "best": delta.clone(),
                "best_grad": grad,
                "previous": delta.clone(),
            }
        else:
            # What the paper's iteration `number - 1` ends with: x^(number) is evaluated now.
            up = values > state["top"]
            state["top"] = torch.where(up, values, state["top"])
            rows = perturbation.per_row(up)
            state["best"] = torch.where(rows, delta, state["best"])
            state["best_grad"] = torch.where(rows, grad, state["best_grad"])
            if self.checkpoints == "code":
                state["ups"] = state["ups"] + (values > state["last"])
            if number - 1 in self._checks:
                delta, grad = self._check(perturbation, delta, grad, state, number - 1)
                if self.checkpoints == "paper":
                    values = torch.where(state["halved"], state["top"], values)
            if self.checkpoints == "paper":
                state["ups"] = state["ups"] + (values > state["last"])
            state["last"] = values
        step_size = state["eps"] * 2.0 * perturbation.per_group(state["ratio"]).to(delta.dtype)
        moved, state["previous"] = ops.momentum_step(
            delta,
            state["previous"],
            grad,
            decay=self.momentum if number else 1.0,
            step_size=step_size,
            eps=state["eps"],
            style="apgd",
            norm=self.norm,
            nonfinite=perturbation.nonfinite,
            **perturbation.geometry,
            **box(state),
        )
        perturbation.set(moved)

    def _check(
        self,
        perturbation: Perturbation,
        delta: Tensor,
        grad: Tensor,
        state: dict[str, Any],
        number: int,
    ) -> tuple[Tensor, Tensor]:
        """Halve the step where the conditions of the paper hold, and go back to the best there."""
        length = self._checks[number]
        few = state["ups"] < self.share * length
        if self.checkpoints == "code":
            few = state["ups"] <= self.share * length
        stuck = ~state["halved"] & (state["top"] <= state["top_before"])
        halve = few | stuck
        state["ratio"] = torch.where(halve, state["ratio"] / 2, state["ratio"])
        state["halved"], state["top_before"] = halve, state["top"]
        state["ups"] = torch.zeros_like(state["ups"])
        rows = perturbation.per_row(halve)
        return (
            torch.where(rows, state["best"], delta),
            torch.where(rows, state["best_grad"], grad),
        )


def paper_checkpoints(steps: int) -> dict[int, int]:
    """Compute the checkpoints w_j = ceil(p_j * steps), each with the steps since the last one."""
    shares = [0.0, 0.22]
    while shares[-1] < 1:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
    # Rounded first: 0.22 * 50 is a little more than 11 in floating point.
    points = [math.ceil(round(share * steps, 9)) for share in shares]
    return {after: after - before for before, after in pairwise(points) if before < after < steps}


def code_checkpoints(steps: int) -> dict[int, int]:
    """Compute the checkpoints of the authors' code; the first after max(0.22 * steps, 1) steps."""
    length, shorter, least = (max(int(share * steps), 1) for share in (0.22, 0.03, 0.06))
    found: dict[int, int] = {}
    done = 0
    while done + length <= steps:
        done += length
        found[done - 1] = length
        length = max(length - shorter, least)
    return found
