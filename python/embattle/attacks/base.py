"""The one loop of all gradient attacks; an attack adds its start and its step."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from embattle import checks, ops
from embattle.attacks.best import Best
from embattle.attacks.box import Bound, bounds_of_delta, box, checked_bounds
from embattle.attacks.early_stopping import search_early_stopping
from embattle.attacks.first_pass import FirstPass, run_first_pass
from embattle.attacks.result import AttackResult
from embattle.attacks.starts import BoxStart, GaussianStart
from embattle.criteria import Criterion, MaximizeLoss
from embattle.perturb.attacked_batch import AttackedBatch, Masks, Subset
from embattle.perturb.evaluation import Evaluation, LossFn
from embattle.perturb.guard import MODES, Mode
from embattle.perturb.perturbation import Perturbation
from embattle.perturb.site import Site
from embattle.perturb.strength import Strength, check_strength, words

Norm: TypeAlias = Literal["l2", "linf", "l1"] | float

_NORMS = {"l1": "l1", "l2": "l2", "linf": "linf", 1: "l1", 2: "l2", math.inf: "linf"}


@dataclass(kw_only=True, repr=False)
class Attack:
    """What all attacks share: a ball, a number of steps, and how the model is treated.

    Args:
        norm: of the ball and of the steepest ascent: "l2", "linf", "l1" (or 2, inf, 1).
        eps: radius of the ball: a number, one value per group, `Relative` or `PerDim`; inf: none.
        steps: gradient steps, each one forward pass and one backward pass to the delta alone.
        random_start: start uniformly in the ball instead of at zero; or a `GaussianStart` or
            `BoxStart`.
        restarts: number of starts; the worst one of each sample counts.
        keep: "last" takes the last iterate; "best" the worst one of all, the clean point included:
            the criterion's goal first, then its objective, for each sample, or for the batch as a
            whole where samples depend on each other. That takes a clean pass more, and two for each
            restart.
        lower, upper: bounds of the perturbed embeddings: a number, or a tensor that broadcasts to
            the embeddings (samples first). An embedding that lies outside already may stay there.
        stop_when_fooled: samples that reach the criterion's goal leave the batch, and cost nothing
            in later steps. `run` then needs `subset`; the model must draw no random numbers, and
            samples must not depend on each other. Waits for the device at every step.
        mode: the model in the attack's passes. "as_is": as it is, each of them draws its own
            dropout masks. "same": as it is, all passes have the same random numbers, so the same
            dropout masks (drawn only once on a CPU). "eval": in eval mode (the site must know its
            model).
            Iterates are compared (`keep="best"`, `restarts`) and evaluated under the same random
            numbers in any mode. State of the model other than its weights never changes during an
            attack, and the global random state is put back.
        generator: source of the attack's own random numbers; torch's CPU generator by default,
            which then advances by one draw per run.
        compile: `torch.compile` the loss function, model and all (give the model uncompiled). The
            first pass of the attack, which shows where the embeddings are, is compiled in parts:
            up to them, and from there. The site must know its model.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value, by name.
    """

    norm: Norm = "l2"
    eps: Strength
    steps: int = 1
    random_start: bool | GaussianStart | BoxStart = False
    restarts: int = 1
    keep: Literal["last", "best"] = "last"
    lower: Bound = None
    upper: Bound = None
    stop_when_fooled: bool = False
    mode: Mode = "as_is"
    generator: torch.Generator | None = field(default=None, compare=False)
    compile: bool = False

    def __post_init__(self) -> None:
        name = type(self).__name__
        key = self.norm.lower() if isinstance(self.norm, str) else self.norm
        known = isinstance(key, (str, numbers.Real)) and not isinstance(key, bool)
        if not known or key not in _NORMS:
            raise ValueError(
                f"{name}: norm must be 'l2', 'linf' or 'l1' (or 2, inf, 1); got {self.norm!r}"
            )
        self.norm = _NORMS[key]  # type: ignore[assignment]
        self.eps = check_strength(name, "eps", self.eps)
        self.steps = checks.integer(name, "steps", self.steps, 0)
        self.restarts = checks.integer(name, "restarts", self.restarts, 1)
        if not isinstance(self.random_start, (GaussianStart, BoxStart)):
            checks.flag(name, "random_start", self.random_start)
        if self.restarts > 1 and not self.random_start:
            raise ValueError(f"{name}: restarts={self.restarts} needs random_start=True")
        checks.one_of(name, "keep", self.keep, ("last", "best"))
        self.lower, self.upper = checked_bounds(name, self.lower, self.upper)  # type: ignore[assignment]
        checks.flag(name, "stop_when_fooled", self.stop_when_fooled)
        checks.one_of(name, "mode", self.mode, MODES)
        checks.flag(name, "compile", self.compile)
        if self.generator is not None and not isinstance(self.generator, torch.Generator):
            raise TypeError(f"{name}: generator must be a torch.Generator, got {self.generator!r}")

    def __repr__(self) -> str:
        parts = [f"{self.norm} ball of radius {words(self.eps)}", *self._words()]
        if self.random_start:
            given = self.random_start
            parts.append("random start" if isinstance(given, bool) else str(given))
        if self.restarts > 1:
            parts.append(f"worst of {self.restarts} restarts")
        if self.keep == "best":
            parts.append("best iterate")
        if self.lower is not None or self.upper is not None:
            parts.append("inside a box")
        if self.stop_when_fooled:
            parts.append("until fooled")
        if self.mode != "as_is":
            parts.append({"same": "same dropout masks", "eval": "eval mode"}[self.mode])
        return f"{type(self).__name__}({', '.join(parts)})"

    def _words(self) -> list[str]:
        return [f"{self.steps} step" + ("s" if self.steps != 1 else "")]

    # --- what subclasses override ----------------------------------------------------------------

    # Whether the attack draws numbers although it starts at zero.
    draws: ClassVar[bool] = False
    # Whether the steps need a gradient; otherwise they are given none.
    uses_gradient: ClassVar[bool] = True

    # What a step keeps in its state for the next one beside the delta, each of the delta's shape;
    # None where single steps, far apart, are not what the attack is.
    carries: ClassVar[tuple[str, ...] | None] = None

    @property
    def ball(self) -> Norm:
        """The norm of the ball that the deltas lie in."""
        return self.norm

    @property
    def uses_direction_alone(self) -> bool:
        """Whether a step is the same for any positive multiple of its gradient."""
        return False

    def goal(self, criterion: Criterion | None) -> Criterion:
        """Return the criterion that the attack ascends; `MaximizeLoss` by default."""
        return MaximizeLoss() if criterion is None else criterion

    def begin(self, perturbation: Perturbation, scale: float) -> dict[str, Any]:
        """Compute what the steps on a perturbation need: a dict that they may change between steps.

        It holds `eps`, and `lower` and `upper` where there is a box, as bounds of the delta.
        """
        state: dict[str, Any] = {"eps": perturbation.strength(self.eps, self.norm, scale)}
        if self.lower is not None or self.upper is not None:
            state |= bounds_of_delta(type(self).__name__, self.lower, self.upper, perturbation)
        return state

    def start(
        self, perturbation: Perturbation, state: dict[str, Any], generator: torch.Generator | None
    ) -> None:
        """Set the delta that the steps start from; it is zero before."""
        if not self.random_start:
            return
        if isinstance(self.random_start, (GaussianStart, BoxStart)):
            start = self.random_start.draw(
                perturbation,
                eps=state["eps"],
                norm=self.norm,
                box=box(state),
                generator=generator,
            )
        else:
            start = ops.random_start(
                perturbation.delta.detach(),
                eps=state["eps"],
                norm=self.norm,
                generator=generator,
                **perturbation.geometry,
                **box(state),
            )
        perturbation.set(start)

    def step(
        self,
        perturbation: Perturbation,
        grad: Tensor,
        state: dict[str, Any],
        number: int,
        values: Tensor,
    ) -> None:
        """Make step `number`: `values` `[B]` and `grad` belong to the current delta.

        `grad` is, for each sample, the gradient of its own value (not of a mean over the batch);
        zeros for an attack that needs none.
        """
        raise NotImplementedError(f"{type(self).__name__} makes no gradient steps")

    def with_steps(self, share: float) -> Attack:
        """Return the attack with `share` of its steps, rounded up; one at least."""
        steps = min(self.steps, 1) if share <= 0 else math.ceil(round(share * self.steps, 9))
        return self if steps == self.steps else replace(self, steps=steps)

    # --- the loop --------------------------------------------------------------------------------

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
    ) -> AttackResult:
        """Find the perturbation of one batch that the criterion asks for.

        Args:
            loss_fn: runs the model on the batch. Takes nothing; returns one loss per sample, `[B]`,
                or an `Evaluation` of losses and the model's outputs.
            sites: where to perturb.
            criterion: what the attack is for, such as `Misclassify(labels)`; by default the losses
                are made large, and there is no success.
            mask: bool, shape of the embeddings without their last dim: True where a vector may
                move. A tensor where there is one call of the site's modules; a function of the
                call; a sequence with an entry for each call; for several sites a sequence of these.
            offsets: int64 `[B + 1]`, bounds of the samples in packed rows; given like `mask`.
            joint: one ball around all outputs of a sample together, not one each.
            scale: factor on eps and step size, as a schedule gives it.
            subset: gives the loss function of some of the samples, from their rows (int64 `[n]`);
                `stop_when_fooled` needs it.
            evaluate: evaluate what was found, and the clean point where no pass has shown it. False
                makes no pass beyond the search; the result then has deltas alone.

        Returns:
            The result; the model is as it was.

        Raises:
            RuntimeError: the losses do not depend on a site.
            ValueError: shapes that do not belong together, or a criterion without a gradient at the
                start.
        """
        goal = self.checked_goal(criterion)
        batch = AttackedBatch(
            loss_fn,
            sites,
            mask=mask,
            offsets=offsets,
            joint=joint,
            mode=self.mode,
            same_random=self.compares or self.stop_when_fooled,
            compile=self.compile,
            subset=subset,
        )
        with batch.attacking(self.own_generator) as generator:
            needed = evaluate or self.compares or self.stop_when_fooled or goal.needs_clean
            first_pass = run_first_pass(self, batch, goal, generator, scale, clean=needed)
            found: Evaluation | None
            steps: Tensor | int
            if self.stop_when_fooled:
                found, steps = search_early_stopping(
                    self, batch, goal, first_pass, generator, scale
                )
            else:
                found = self.search(batch, goal, first_pass, generator, scale, evaluate=evaluate)
                made = steps = self.steps * self.restarts
                if not made:  # not attacked: none was lacking
                    for perturbation in batch.perturbations:
                        perturbation.had_gradient.fill_(True)
            batch.free_masks()
            clean, now = (first_pass.clean, found) if evaluate else (None, None)
            if clean is not None:
                _ignore_unlabelled(batch, goal.counted(clean))
            result = AttackResult(batch.perturbed, goal, self.norm, steps, clean, now, batch.size)
        return result.warn() if evaluate else result

    def search(
        self,
        batch: AttackedBatch,
        goal: Criterion,
        first_pass: FirstPass,
        generator: torch.Generator | None,
        scale: float,
        *,
        evaluate: bool = False,
    ) -> Evaluation | None:
        """Run the attack's steps; the batch's perturbations then hold the deltas.

        Args:
            batch: recorded, and inside `attacking`.
            goal: what is ascended, and what counts.
            first_pass: what the first pass gave.
            generator: of the attack's random numbers.
            scale: factor on the strengths.
            evaluate: evaluate the deltas that are returned.

        Returns:
            Evaluation of the final deltas, if `evaluate` is set or iterates were compared.
        """
        best = Best(batch, goal, first_pass.clean) if self.compares and first_pass.clean else None
        known, later, coupled = first_pass, first_pass.after(), batch.perturbed.coupled
        for _ in range(self.restarts):
            states = known.states
            if states is None:
                states = [self.begin(p, scale) for p in batch.perturbations]
                for perturbation, state in zip(batch.perturbations, states, strict=True):
                    self.start(perturbation, state, generator)
            for number in range(self.steps):
                # A group without a gradient at first and at last is taken to have none.
                mark = number in (0, self.steps - 1)
                at, values, grads = known.evaluate(
                    batch, goal, gradient=self.uses_gradient, mark=mark
                )
                known = later
                if coupled:  # no sample has a value of its own then
                    values = values.sum().expand_as(values)
                if best is not None and self.keep == "best":
                    best.update(at.detach())
                for perturbation, grad, state in zip(
                    batch.perturbations, grads, states, strict=True
                ):
                    self.step(perturbation, grad, state, number, values)
            known = later
            if best is not None:
                best.update(batch.evaluate(grad=False, lookups="detached").detach())
                best.evaluate_joined()
        if best is not None:
            return best.finish().at
        if evaluate:
            return batch.evaluate(grad=False, lookups="detached", first=True).detach()
        return None

    @property
    def compares(self) -> bool:
        """Whether the attack compares iterates by their values."""
        return self.keep == "best" or self.restarts > 1

    @property
    def starts_at_zero(self) -> bool:
        """Whether the first step's gradient is the one at the unperturbed embeddings."""
        return not self.random_start

    def checked_goal(self, criterion: Criterion | None) -> Criterion:
        """Check what the attack is for.

        Raises:
            TypeError: not a criterion.
            ValueError: it has no gradient where the attack starts.
        """
        if criterion is not None and not isinstance(criterion, Criterion):
            raise TypeError(
                "criterion must be an embattle.Criterion, such as Misclassify(labels); got "
                f"{type(criterion).__name__}"
            )
        goal = self.goal(criterion)
        if goal.needs_clean and self.starts_at_zero and self.steps:
            raise ValueError(
                f"{goal!r} measures from the clean outputs, and has no gradient at zero: give "
                f"{type(self).__name__} a random_start, such as GaussianStart(0.001)"
            )
        return goal

    def own_generator(self) -> torch.Generator | None:
        """Seed a generator for one run, so that the global one can be put back."""
        if self.starts_at_zero and not self.draws:
            return None
        seed = torch.randint(
            2**62,
            (),
            generator=self.generator,
            device="cpu" if self.generator is None else self.generator.device,
        )
        return torch.Generator().manual_seed(int(seed))


def _ignore_unlabelled(batch: AttackedBatch, counted: Tensor | None) -> None:
    """Leave samples without a label out of those that lack a gradient."""
    if counted is not None:
        for perturbation in batch.perturbations:
            if not perturbation.coupled:
                perturbation.had_gradient |= perturbation.per_group(~counted)
