"""The directions of virtual adversarial training and of SMART."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from embattle import checks, ops
from embattle.attacks.base import Attack, Norm
from embattle.attacks.box import box
from embattle.attacks.starts import BoxStart, GaussianStart
from embattle.criteria import Criterion, Diverge
from embattle.perturb.evaluation import Evaluation
from embattle.perturb.perturbation import Perturbation
from embattle.perturb.strength import Strength, check_strength, words


class Surrogate(Criterion):
    """Ascend one criterion as a surrogate, with the goal and the predictions of another."""

    def __init__(self, ascent: Criterion, target: Criterion) -> None:
        self.ascent, self.target = ascent, target
        self.needs_outputs = True  # type: ignore[misc]
        self.needs_clean = ascent.needs_clean  # type: ignore[misc]

    def check(self, clean: Evaluation) -> None:
        """Check both."""
        self.ascent.check(clean)
        self.target.check(clean)

    def objective(self, now: Evaluation, clean: Evaluation | None) -> Tensor:
        """Return what the first ascends."""
        return self.ascent.objective(now, clean)

    def reached(self, now: Evaluation, clean: Evaluation | None) -> Tensor | None:
        """Return where the second's goal holds."""
        return self.target.reached(now, clean)

    def predict(self, outputs: Tensor) -> Tensor | None:
        """Return the second's predictions."""
        return self.target.predict(outputs)

    def accuracy(self, now: Evaluation) -> Tensor | None:
        """Return the second's accuracy."""
        return self.target.accuracy(now)

    def counted(self, evaluation: Evaluation) -> Tensor | None:
        """Return which samples count for the second."""
        return self.target.counted(evaluation)


@dataclass(kw_only=True, repr=False)
class VAT(Attack):
    """The virtual adversarial direction (Miyato et al., ICLR 2017, eq. 5-8).

    A random unit vector d is turned `steps` times into `g / ||g||`, g being the gradient of
    `KL(p || p(x + xi * d))` (power iteration); the perturbation is `eps * d`. Needs no labels, but
    outputs; a criterion says what counts as success. The authors' text code agrees; it draws one
    vector and makes one iteration. The paper normalises the embeddings first, which is the model's
    business here: see `Relative`.

    Args:
        xi: size of the finite difference.
    """

    steps: int = 1
    random_start: bool | GaussianStart | BoxStart = True
    xi: Strength = 0.1

    def goal(self, criterion: Criterion | None) -> Criterion:
        return _diverging("kl", criterion)

    def _words(self) -> list[str]:
        count = f"{self.steps} power iteration" + ("s" if self.steps != 1 else "")
        return [f"{count} at {words(self.xi)}"]

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.integer("VAT", "steps", self.steps, 1)
        self.xi = check_strength("VAT", "xi", self.xi)
        for option, given in (
            ("keep='best'", self.keep == "best"),
            ("stop_when_fooled=True", self.stop_when_fooled),
        ):
            if given:
                raise ValueError(
                    f"VAT: {option} has no meaning: its iterates are directions, of length xi"
                )
        if self.norm != "l2" or not isinstance(self.random_start, bool) or not self.random_start:
            raise ValueError("VAT: the direction is of norm 'l2', from a random start")

    def begin(self, perturbation: Perturbation, scale: float) -> dict[str, Any]:
        return super().begin(perturbation, scale) | {
            "xi": perturbation.strength(self.xi, self.norm)
        }

    def start(
        self, perturbation: Perturbation, state: dict[str, Any], generator: torch.Generator | None
    ) -> None:
        like = torch.zeros_like(perturbation.delta.detach())
        noise = ops.gaussian_noise(like, std=1.0, generator=generator, **perturbation.geometry)
        perturbation.set(self._scaled(perturbation, noise, state["xi"], {}))

    def step(
        self,
        perturbation: Perturbation,
        grad: Tensor,
        state: dict[str, Any],
        number: int,
        values: Tensor,
    ) -> None:
        last = number == self.steps - 1
        size = state["eps"] if last else state["xi"]
        perturbation.set(self._scaled(perturbation, grad, size, box(state) if last else {}))

    def _scaled(
        self,
        perturbation: Perturbation,
        direction: Tensor,
        size: float | Tensor,
        bounds: dict[str, Any],
    ) -> Tensor:
        zero = torch.zeros_like(perturbation.delta.detach())
        return ops.pgd_step(
            zero,
            direction,
            step_size=size,
            eps=torch.inf,
            norm="l2",
            nonfinite=perturbation.nonfinite,
            **perturbation.geometry,
            **bounds,
        )


@dataclass(kw_only=True, repr=False)
class SMARTStep(Attack):
    """SMART's inner ascent (Jiang et al., ACL 2020, algorithm 1) of the symmetric KL.

    `delta ~ N(0, sigma^2)`, then `delta <- P_eps(delta + step_size * g)` with the raw gradient and
    the linf ball. The authors' code never projects: `projection="code"` scales each token's
    `delta + step_size * g` to a largest coordinate of 1 (times a schedule's factor) instead, and
    ignores eps; it also ascends a divergence of its own (`stable_kl`), where this ascends the
    symmetric KL. A gradient with a NaN or Inf leaves its group's delta as it was.

    Args:
        step_size: the paper's eta.
        sigma: of the start; `random_start` may be another start, but not False.
        projection: "paper" or "code".
    """

    norm: Norm = "linf"
    eps: Strength = 1e-5
    random_start: bool | GaussianStart | BoxStart = True
    step_size: float = 1e-3
    sigma: float = 1e-5
    projection: Literal["paper", "code"] = "paper"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.step_size = checks.real("SMARTStep", "step_size", self.step_size, 0)
        self.sigma = checks.real("SMARTStep", "sigma", self.sigma, 0)
        checks.one_of("SMARTStep", "projection", self.projection, ("paper", "code"))
        if self.random_start is False:
            raise ValueError(
                "SMARTStep: random_start=False: the symmetric KL has no gradient at zero; give "
                "True (N(0, sigma^2)), a GaussianStart or a BoxStart"
            )

    def goal(self, criterion: Criterion | None) -> Criterion:
        return _diverging("symmetric_kl", criterion)

    def _words(self) -> list[str]:
        count = f"{self.steps} raw step" + ("s" if self.steps != 1 else "")
        return [f"{count} of {self.step_size:g} x gradient"]

    def begin(self, perturbation: Perturbation, scale: float) -> dict[str, Any]:
        return super().begin(perturbation, scale) | {"scale": scale}

    def start(
        self, perturbation: Perturbation, state: dict[str, Any], generator: torch.Generator | None
    ) -> None:
        if self.random_start is not True:
            super().start(perturbation, state, generator)
            return
        like = torch.zeros_like(perturbation.delta.detach())
        # The paper projects after a step; a start that may itself be the result is projected too.
        ball: dict[str, Any] = {}
        if self.projection == "paper" and (
            self.keep == "best" or self.stop_when_fooled or not self.steps
        ):
            ball = {"eps": state["eps"], "norm": self.norm, **box(state)}
        perturbation.set(
            ops.gaussian_noise(
                like, std=self.sigma, generator=generator, **perturbation.geometry, **ball
            )
        )

    def step(
        self,
        perturbation: Perturbation,
        grad: Tensor,
        state: dict[str, Any],
        number: int,
        values: Tensor,
    ) -> None:
        finite = ops.group_norm(grad, norm="linf", **perturbation.geometry).isfinite()
        perturbation.nonfinite += ~finite
        usable = perturbation.per_group_row(finite)
        delta = perturbation.delta.detach()
        moved = torch.where(usable, delta + self.step_size * grad.to(delta.dtype), delta)
        if self.projection == "paper":
            eps = state["eps"]
            perturbation.set(
                ops.project(moved, eps=eps, norm=self.norm, **perturbation.geometry, **box(state))
            )
            return
        largest = moved.abs().amax(-1, keepdim=True)
        scaled = torch.where(largest > 0, state["scale"] * moved / largest, 0.0)
        scaled = torch.where(usable, scaled, delta)
        perturbation.set(
            ops.project(scaled, eps=torch.inf, norm="linf", **perturbation.geometry, **box(state))
        )


def _diverging(divergence: Literal["kl", "symmetric_kl"], criterion: Criterion | None) -> Criterion:
    """Return a criterion that ascends a divergence, unless the given one does so itself."""
    if criterion is None:
        return Diverge(divergence)
    return criterion if criterion.needs_clean else Surrogate(Diverge(divergence), criterion)
