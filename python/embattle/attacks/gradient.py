"""Attacks by projected steepest ascent: FGM, FGSM, PGD, MSAP."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from embattle import checks, ops
from embattle.attacks.base import Attack, Norm
from embattle.attacks.box import box
from embattle.ops.group import plain_step_
from embattle.perturb.perturbation import Perturbation
from embattle.perturb.strength import Strength, check_strength, words


@dataclass(kw_only=True, repr=False)
class PGD(Attack):
    """Projected gradient descent on the negative loss (Madry et al., ICLR 2018, eq. 3).

    `delta <- P_eps(delta + step_size * u(grad))`, with `u = sign(g)` for linf, `g / ||g||_2` for l2
    and the `top` largest coordinates for l1, each sample (or token) in its own ball. Differs from
    the authors' code in nothing but generality; no constant is added to a norm that is divided by.

    Args:
        step_size: of one step, in the conventions of `eps`; `2.5 * eps / steps` by default (then
            `eps` must be finite).
        top: l1 only: how many coordinates move at once, or the share of the group's that do.
        max_groups: with one ball per token: at most so many tokens of a sample may move, those of
            largest gradient.
    """

    steps: int = 10
    step_size: Strength | None = None
    top: float = 1
    max_groups: int | None = None

    carries: ClassVar[tuple[str, ...] | None] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        if self.step_size is None and isinstance(self.eps, float) and math.isinf(self.eps):
            raise ValueError(f"{name}: eps=inf needs a step_size")
        if self.step_size is not None:
            self.step_size = check_strength(name, "step_size", self.step_size)
            if isinstance(self.step_size, float) and math.isinf(self.step_size):
                raise ValueError(f"{name}: step_size must be finite, got {self.step_size}")
        self.top = checks.real(name, "top", self.top, 0)
        if self.top == 0 or (self.top > 1 and self.top != int(self.top)):
            raise ValueError(
                f"{name}: top must be a whole number or a share in (0, 1), got {self.top}"
            )
        if self.max_groups is not None:
            self.max_groups = checks.integer(name, "max_groups", self.max_groups, 1)

    def _words(self) -> list[str]:
        size = "2.5 x eps / steps" if self.step_size is None else words(self.step_size)
        count = f"{self.steps} step" + ("s" if self.steps != 1 else "")
        found = [f"{count} of {size}"]
        if self.max_groups is not None:
            found.append(f"at most {self.max_groups} tokens")
        return found

    def begin(self, perturbation: Perturbation, scale: float) -> dict[str, Any]:
        state = super().begin(perturbation, scale)
        if self.step_size is None:
            state["step_size"] = state["eps"] * (2.5 / max(self.steps, 1))
        else:
            state["step_size"] = perturbation.strength(self.step_size, self.norm, scale)
        return state

    @property
    def uses_direction_alone(self) -> bool:
        return type(self).step is PGD.step

    def step(
        self,
        perturbation: Perturbation,
        grad: Tensor,
        state: dict[str, Any],
        number: int,
        values: Tensor,
    ) -> None:
        # Written in place: an addition saves nothing for its backward pass.
        delta, nonfinite = perturbation.delta.detach(), perturbation.nonfinite
        size, eps, geometry = state["step_size"], state["eps"], perturbation.geometry
        if (
            geometry["offsets"] is geometry["mask"] is self.max_groups is None
            and self.top == 1
            and type(size) is type(eps) is float
            and not ("lower" in state or "upper" in state)
        ):
            plain_step_(delta, grad, size, eps, self.norm, geometry["group"], nonfinite)
            return
        ops.pgd_step_(
            delta,
            grad,
            step_size=size,
            eps=eps,
            norm=self.norm,
            top=self.top,
            max_groups=self.max_groups,
            nonfinite=nonfinite,
            **geometry,
            **box(state),
        )


@dataclass(kw_only=True, repr=False)
class FGM(PGD):
    """Fast gradient method: one step to the border of the ball (Miyato et al., ICLR 2017, eq. 2).

    `delta = eps * g / ||g||_2` over each sample's sequence. (Code in circulation under this name
    scales the gradient of the whole embedding matrix by one norm for the batch: not this.)
    """

    steps: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps != 1:
            raise ValueError(f"{type(self).__name__}: makes one step, got {self.steps}; use PGD")

    def begin(self, perturbation: Perturbation, scale: float) -> dict[str, Any]:
        state = super().begin(perturbation, scale)
        if self.step_size is None:
            state["step_size"] = state["eps"]
        return state

    def _words(self) -> list[str]:
        return ["1 step" + (f" of {words(self.step_size)}" if self.step_size is not None else "")]


@dataclass(kw_only=True, repr=False)
class FGSM(FGM):
    """Fast gradient sign method (Goodfellow et al., ICLR 2015): `delta = eps * sign(g)`.

    With `random_start=True` and `step_size=1.25 * eps` it is the one-step attack that trains
    without catastrophic overfitting in Wong et al. (ICLR 2020).
    """

    norm: Norm = "linf"


@dataclass(kw_only=True, repr=False)
class MSAP(PGD):
    """Multi-step perturbations of recommenders' embeddings (Anelli et al., FLAIRS 2021).

    Steps `eps / 4 * g / ||g||_2` by default, in sites of scope "row" or "output". The authors' code
    then clips every coordinate to `+- eps`: `projection="box"`, whose perturbations are up to
    `sqrt(d)` times longer than those of the one-step attack that they are compared with. The
    default is the l2 ball of that attack, so that equal eps means equal strength.

    Args:
        projection: "ball" (l2) or "box" (linf, after steps of l2).
    """

    projection: Literal["ball", "box"] = "ball"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm != "l2":
            raise ValueError(f"MSAP: steps are of norm 'l2', got {self.norm!r}")
        checks.one_of("MSAP", "projection", self.projection, ("ball", "box"))

    @property
    def ball(self) -> Norm:
        return "linf" if self.projection == "box" else self.norm

    def _words(self) -> list[str]:
        size = "eps / 4" if self.step_size is None else words(self.step_size)
        found = [f"{self.steps} step" + ("s" if self.steps != 1 else "") + f" of {size}"]
        return [*found, "clipped to a box of eps"] if self.projection == "box" else found

    def begin(self, perturbation: Perturbation, scale: float) -> dict[str, Any]:
        state = super().begin(perturbation, scale)
        if self.step_size is None:
            state["step_size"] = state["eps"] * 0.25
        return state

    def step(
        self,
        perturbation: Perturbation,
        grad: Tensor,
        state: dict[str, Any],
        number: int,
        values: Tensor,
    ) -> None:
        if self.projection == "ball":
            super().step(perturbation, grad, state, number, values)
            return
        super().step(perturbation, grad, state | {"eps": math.inf}, number, values)
        ops.project_(
            perturbation.delta.detach(),
            eps=state["eps"],
            norm=self.ball,
            **perturbation.geometry,
            **box(state),
        )
