"""The smallest perturbation of each sample that reaches the goal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from embattle import checks, ops
from embattle.attacks.base import Attack
from embattle.attacks.box import box
from embattle.attacks.ensemble import without_gradient
from embattle.attacks.margins import Margins, SmoothMargin, margins_of
from embattle.attacks.result import AttackResult
from embattle.criteria import Criterion, Diverge
from embattle.criteria.base import ascended, reached
from embattle.perturb.attacked_batch import AttackedBatch, Masks, Subset
from embattle.perturb.evaluation import Evaluation, LossFn
from embattle.perturb.perturbation import Perturbation
from embattle.perturb.site import Site
from embattle.perturb.strength import Strength, check_strength, group_sizes, words

# How often deltas that their evaluation in the whole batch does not confirm are made longer.
_TRIES = 5
# The largest share by which a radius changes in a step once the goal was reached.
_LARGEST = 0.5


class NoSmallestError(ValueError):
    """What is attacked has no smallest perturbation of each sample that could be searched."""


class MinimumNormResult(AttackResult):
    """The smallest perturbations found. `deltas` are zero where none was found.

    Attributes:
        eps: `[B]`, the smallest radius at which each sample reached the goal, in the attack's unit;
            0 where the goal holds without perturbation, inf where it was never reached.
    """

    eps: Tensor

    def robust_accuracy_at(self, eps: float | Tensor) -> Tensor:
        """Return the share of samples with a label that do not reach the goal at a radius.

        Args:
            eps: one radius, or `[K]`.

        Returns:
            0-d, or `[K]`, float64.
        """
        radius = torch.as_tensor(eps, dtype=torch.float64, device=self.eps.device)
        counted = self._number("counted")
        if counted is None:
            counted = torch.ones_like(self.eps, dtype=torch.bool)
        robust = (self.eps.double() > radius.unsqueeze(-1)) & counted
        return robust.sum(-1).double() / counted.sum()

    def curve(self) -> tuple[Tensor, Tensor]:
        """Return the radii where robust accuracy falls (ascending, 0 first), and its values there.

        Returns:
            Two tensors `[K]`, float64.
        """
        radii = self.eps[self.eps.isfinite()].double()
        radii = torch.unique(torch.cat([radii.new_zeros(1), radii]))
        return radii, self.robust_accuracy_at(radii)


@dataclass(kw_only=True, repr=False)
class FMN(Attack):
    """Fast minimum-norm attack (Pintor et al., NeurIPS 2021, algorithm 1), for l2, linf and l1.

    Each sample has a radius of its own. A step goes up along the gradient and is projected on the
    ball; then the radius shrinks where the goal is reached and grows where it is not, by a share of
    at least `gamma`, which falls to `gamma / 50` on a cosine; before the goal is first reached the
    radius is where a linear model puts it (eq. 5). One attack gives robust accuracy at every eps.

    Differs from the paper: the radius goes to where the linear model puts the border afterwards as
    well, by half of itself at most, which falls to nothing on the cosine: a dozen steps come near
    to what a hundred find; the ascent is a smooth maximum of the margins (the paper's is the
    maximum), which does not jump between classes; steps have the length of the radius, from 1 down
    to 1/100 of it on a cosine, so that embeddings may be of any size; until the goal is reached the
    radius grows at every step; l2 iterates lie on the sphere, as in DDN (Rony et al., CVPR 2019).

    Where a sample has several balls (tokens, several outputs) its eps is the largest of its groups'
    norms: all of them have the same radius. Deltas that samples share have no smallest eps of each
    sample, and are refused.

    Args:
        norm: "l2", "linf" or "l1".
        unit: what eps is measured in: 1, or `Relative(1.0)`: as a multiple of what it names.
        steps: each one forward and one backward pass.
        gamma: by which share the radius changes at first, at least.
        step_size: of the first step, as a share of the radius.
        lower, upper, mode, compile: as for every attack. Random numbers are the same in all passes.
    """

    draws: ClassVar[bool] = True  # directions for samples without a gradient

    unit: Strength = 1.0
    eps: Strength = field(init=False, default=1.0)
    steps: int = 100
    gamma: float = 0.05
    step_size: float = 1.0
    random_start: bool = field(init=False, default=False)
    restarts: int = field(init=False, default=1)
    keep: Literal["last", "best"] = field(init=False, default="best")
    stop_when_fooled: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self.unit = self.eps = check_strength("FMN", "unit", self.unit)
        if isinstance(self.unit, float) and not 0 < self.unit < math.inf:
            raise ValueError(f"FMN: unit must be above 0 and finite, got {self.unit:g}")
        super().__post_init__()
        checks.integer("FMN", "steps", self.steps, 1)
        self.gamma = checks.real("FMN", "gamma", self.gamma, 0, 0.9)
        self.step_size = checks.real("FMN", "step_size", self.step_size, 0)

    def __repr__(self) -> str:
        unit = "" if self.unit == 1.0 else f", in units of {words(self.unit)}"
        return f"FMN(smallest {self.norm} norm{unit}, {self.steps} steps)"

    def checked_goal(self, criterion: Criterion | None) -> Criterion:
        """Check what the attack is for.

        Raises:
            TypeError: not a criterion.
            ValueError: it has no gradient at zero, where the search starts.
        """
        if isinstance(criterion, Diverge):  # attacked by the margin over the clean predictions
            return criterion
        if isinstance(criterion, Criterion) and criterion.needs_clean:
            raise NoSmallestError(
                f"FMN: {criterion!r} has no gradient at zero, where the search starts; use "
                "AutoAttack at the radii of interest"
            )
        return super().checked_goal(criterion)

    def run(
        self,
        loss_fn: LossFn,
        sites: Site | Sequence[Site],
        *,
        criterion: Criterion | None = None,
        mask: Masks = None,
        offsets: Masks = None,
        joint: bool = False,
        scale: float = 1.0,
        subset: Subset | None = None,
        evaluate: bool = True,
    ) -> MinimumNormResult:
        """Find the smallest perturbations of one batch; the arguments are those of `Attack.run`.

        `scale` is a factor on the unit. Samples do not leave the batch: `subset` is not used.

        Returns:
            The result, with the eps of each sample.

        Raises:
            RuntimeError: the losses do not depend on a site.
            ValueError: the criterion has no goal, samples share deltas, or depend on each other.
        """
        goal = self.checked_goal(criterion)
        batch = AttackedBatch(
            loss_fn,
            sites,
            mask=mask,
            offsets=offsets,
            joint=joint,
            mode=self.mode,
            same_random=True,
            compile=self.compile,
        )
        with batch.attacking(self.own_generator) as generator:
            evaluation = batch.record(attach=True).evaluation
            goal.check(evaluation)
            clean = evaluation.detach()
            _check(batch, goal, clean)
            search = _Search(self, batch, goal, clean, scale, generator)
            search.run(evaluation)
            now = search.finish()
            batch.free_masks()
            steps = torch.full((batch.size,), self.steps, device=clean.device)
            result = MinimumNormResult(
                batch.perturbed,
                goal,
                self.norm,
                steps,
                clean if evaluate else None,
                now if evaluate else None,
            )
            result.eps = search.best
        if evaluate:
            result.warn()
        return result


class _Search:
    """One run: the radius of each sample, and its smallest delta that reached the goal."""

    def __init__(
        self,
        attack: FMN,
        batch: AttackedBatch,
        goal: Criterion,
        clean: Evaluation,
        scale: float,
        generator: torch.Generator | None,
    ) -> None:
        self.generator = generator
        self.attack, self.batch, self.goal, self.clean = attack, batch, goal, clean
        self.margins: Margins | None = margins_of(goal, clean)
        self.ascent: Criterion = goal if self.margins is None else SmoothMargin(self.margins)
        self.states = [attack.begin(p, scale) for p in batch.perturbations]
        for perturbation, state in zip(batch.perturbations, self.states, strict=True):
            state["unit"] = torch.as_tensor(
                state["eps"], dtype=perturbation.delta.dtype, device=clean.device
            ).expand(perturbation.groups)
            sizes = group_sizes(perturbation.base, perturbation.geometry)
            state["diagonal"] = sizes.to(perturbation.delta.dtype).sqrt()
        # The largest radius that is tried first: the embeddings' own size, but at least the mean
        # one, as rows that were never trained are next to nothing; 1 where all are zero.
        own = self._sample_norms(
            [ops.group_norm(b.base, norm=attack.norm, **b.geometry) for b in batch.perturbations]
        )
        mean = own.where(own.isfinite(), math.nan).nanmean().nan_to_num()
        self.far = own.maximum(mean) + (mean == 0)
        self.eps = torch.full_like(self.far, math.inf)
        self.best = torch.full_like(self.far, math.inf)
        self.deltas = [torch.zeros_like(p.delta.detach()) for p in batch.perturbations]

    def run(self, evaluation: Evaluation) -> None:
        """Run the steps; the first one takes the attack's first pass."""
        attack, batch = self.attack, self.batch
        lacking = False  # whether any sample had no gradient at the start
        for number in range(attack.steps):
            grads = None
            if number == 0:
                grads = batch.gradients_at_zero(ascended(self.ascent, evaluation, self.clean))
                at = self.clean
            if grads is None:
                now = batch.evaluate_for_gradients()
                grads = batch.gradients(ascended(self.ascent, now, self.clean))
                at = now.detach()
            if number == 0:
                lacking = bool(without_gradient(batch.perturbations, grads).any())
            if lacking:
                grads = self._with_random_directions(grads)
            cosine = (1 + math.cos(math.pi * number / attack.steps)) / 2
            least = attack.gamma * (0.02 + 0.98 * cosine)
            self._change_radius(at, grads, least, max(least, _LARGEST * cosine))
            self._step(grads, attack.step_size * (0.01 + 0.99 * cosine))

    def _change_radius(
        self, at: Evaluation, grads: list[Tensor], least: float, most: float
    ) -> None:
        """Keep what is smaller, and change the radius by a share between `least` and `most`."""
        fooled = self._reached(at)
        size = self._sample_norms([p.norms(self.attack.norm) for p in self.batch.perturbations])
        before = self.best.isfinite()
        smaller = fooled & (size < self.best)
        self.best = torch.where(smaller, size, self.best)
        for delta, perturbation in zip(self.deltas, self.batch.perturbations, strict=True):
            delta.copy_(
                torch.where(perturbation.per_row(smaller), perturbation.delta.detach(), delta)
            )
        distance, eps = self._distance(at, grads), self.eps
        grown = torch.where(eps.isfinite(), eps * (1 + least), 0.01 * self.far)
        sought = torch.maximum(grown, size + distance)
        if self.margins is None:  # nothing is known of the distance
            most = least
        smaller_eps = (eps - distance).clamp(eps * (1 - most), eps * (1 - least))
        larger_eps = (eps + distance).clamp(eps * (1 + least), eps * (1 + most))
        self.eps = torch.where(
            fooled,
            torch.minimum(smaller_eps, self.best),
            torch.where(before, larger_eps, sought),
        )

    def _distance(self, at: Evaluation, grads: list[Tensor]) -> Tensor:
        """Compute how far a linear model puts the goal, `[B]`; half the radius without margins."""
        if self.margins is None:
            return torch.where(self.eps.isfinite(), self.eps * 0.5, torch.zeros_like(self.eps))
        dual = {"l2": "l2", "linf": "l1", "l1": "linf"}[self.attack.norm]  # type: ignore[index]
        slope = torch.zeros_like(self.far)
        for perturbation, grad, state in zip(
            self.batch.perturbations, grads, self.states, strict=True
        ):
            norms = ops.group_norm(grad, norm=dual, **perturbation.geometry) * state["unit"]
            slope = slope + _of_samples(perturbation, norms).sum(1).to(slope.dtype)
        distance = self.margins.largest(at).abs().to(slope.dtype) / slope
        # Beyond the embeddings' size a radius is doubled at most.
        most = torch.where(self.eps.isfinite(), self.eps.maximum(self.far), self.far)
        return torch.where(slope > 0, torch.minimum(distance, most), torch.zeros_like(slope))

    def _with_random_directions(self, grads: list[Tensor]) -> list[Tensor]:
        """Replace the gradients of samples that have none by random directions."""
        empty = without_gradient(self.batch.perturbations, grads)
        found = []
        for perturbation, grad in zip(self.batch.perturbations, grads, strict=True):
            noise = ops.gaussian_noise(
                torch.zeros_like(grad), std=1.0, generator=self.generator, **perturbation.geometry
            )
            found.append(torch.where(perturbation.per_row(empty), noise, grad))
        return found

    def _step(self, grads: list[Tensor], share: float) -> None:
        norm = self.attack.norm
        for perturbation, grad, state in zip(
            self.batch.perturbations, grads, self.states, strict=True
        ):
            radius = perturbation.per_group(self.eps) * state["unit"]
            radius = radius.to(perturbation.delta.dtype).contiguous()
            length = radius * share
            if norm == "linf":  # of the ball's diagonal
                length = length * state["diagonal"]
            delta = ops.pgd_step(
                perturbation.delta.detach(),
                grad,
                step_size=length,
                eps=math.inf,
                norm="l2",
                nonfinite=perturbation.nonfinite,
                **perturbation.geometry,
            )
            if norm == "l2":
                norms = ops.group_norm(delta, norm="l2", **perturbation.geometry).to(radius.dtype)
                factor = torch.where(norms > 0, radius / norms, torch.zeros_like(radius))
                delta = delta * perturbation.per_group_row(factor)
            perturbation.set(
                ops.project(delta, eps=radius, norm=norm, **perturbation.geometry, **box(state))
            )

    def finish(self) -> Evaluation:
        """Write the smallest deltas into the perturbations, and evaluate them in the whole batch.

        Raises:
            ValueError: the goal is not reached there where it was.
        """
        found, perturbations = self.best.isfinite(), self.batch.perturbations
        self.batch.perturbed.set(self.deltas)
        for _ in range(_TRIES):
            now = self.batch.evaluate(grad=False, lookups="detached").detach()
            lost = found & ~self._reached(now)
            if not bool(lost.any()):
                norms = self._sample_norms([b.norms(self.attack.norm) for b in perturbations])
                self.best = torch.where(found, norms, self.best)
                return now
            # At the border of the goal the last bits decide.
            for perturbation in perturbations:
                delta = perturbation.delta.detach()
                perturbation.set(torch.where(perturbation.per_row(lost), delta * 1.0001, delta))
        raise NoSmallestError(
            "FMN: samples depend on each other (batch norm in train mode, negatives from the "
            "batch): a sample that reached the goal does not when the others have changed, so "
            "that it has no smallest eps of its own. Use mode='eval', or AutoAttack at the "
            "radii of interest"
        )

    def _reached(self, at: Evaluation) -> Tensor:
        fooled = reached(self.goal, at, self.clean)
        assert fooled is not None
        return fooled

    def _sample_norms(self, norms: list[Tensor]) -> Tensor:
        """Compute the largest norm of each sample's groups, in the unit, `[B]`."""
        found: Tensor | None = None
        for perturbation, state, each in zip(
            self.batch.perturbations, self.states, norms, strict=True
        ):
            unit = state["unit"]
            size = torch.where(each > 0, each / unit, torch.zeros_like(each))
            size = _of_samples(perturbation, size).amax(1)
            found = size if found is None else torch.maximum(found, size)
        assert found is not None
        return found


def _check(batch: AttackedBatch, goal: Criterion, clean: Evaluation) -> None:
    if reached(goal, clean, clean) is None:
        raise NoSmallestError(
            f"FMN: {goal!r} has no goal that a sample can reach; give a criterion that has, such "
            "as Misclassify(labels)"
        )
    if batch.perturbed.coupled:
        raise NoSmallestError(
            "FMN: samples share deltas (scope 'row', parameters, samples=None), so that none has a "
            "smallest eps of its own; use AutoAttack at the radii of interest"
        )


def _of_samples(perturbation: Perturbation, values: Tensor) -> Tensor:
    """View one value per group as `[B, groups of a sample]`."""
    samples = perturbation.samples
    return values.reshape(samples, len(values) // samples if samples else 1)
