"""An ensemble of attacks that do not share their weaknesses."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from embattle import checks
from embattle.attacks.base import Attack
from embattle.attacks.ensemble import Ensemble, Member
from embattle.attacks.first_pass import run_first_pass
from embattle.attacks.margins import SingleMargin, TemperedCrossEntropy, margins_of
from embattle.attacks.momentum import APGD
from embattle.attacks.result import AttackResult, AttackWarning, warn_of_rounding
from embattle.attacks.square import Square
from embattle.criteria import Criterion, Deviate, Misclassify, MultiLabel, Target
from embattle.perturb.attacked_batch import AttackedBatch, Masks, Subset
from embattle.perturb.evaluation import Evaluation, LossFn
from embattle.perturb.site import Site


class EnsembleResult(AttackResult):
    """The result of an ensemble. `zero_gradient` counts groups that only `Square` changed.

    Attributes:
        randomised: whether two clean passes differed (dropout, sampled negatives).
    """

    randomised: bool = False
    _names: tuple[str, ...] = ()
    _by: Tensor | None = None

    @property
    def fooled_by(self) -> list[str | None]:
        """The name of the attack that made each sample reach the goal, `[B]`; waits for the device.

        "clean" where the goal holds without perturbation, None where it does not hold.
        """
        fooled, clean = self.reached, self.clean_reached
        if fooled is None or clean is None or self._by is None:
            return [None] * self.steps.shape[0]
        by = torch.where(clean, 0, self._by)
        found = torch.where(fooled | clean, by, -1).tolist()
        return [None if number < 0 else self._names[number] for number in found]

    def warn(self) -> EnsembleResult:
        """Warn of groups that never had a gradient; this waits for the device."""
        zero = int(self.zero_gradient)
        if zero:
            warnings.warn(
                f"{zero} groups had no gradient other than zero (rounding, saturation): only the "
                "attack without gradients changed them, which is weaker. They may look more robust "
                "than they are",
                AttackWarning,
                stacklevel=3,
            )
        warn_of_rounding(self._perturbed, self._norm)
        return self


@dataclass(kw_only=True, repr=False)
class AutoAttack(Attack):
    """Several strong attacks, one after the other, on the samples that are not fooled yet.

    After AutoAttack (Croce and Hein, ICML 2020, section 5): APGD on the cross-entropy, on the
    margin, and on the margins of the likeliest other classes one by one (section 4.2; without the
    ratio, which changes no direction); then a gradient-free search (`Square`). Theirs has FAB
    besides, and DLR for the margin. Other criteria have what corresponds: several labels one by
    one, too high and too low values; a user's own, APGD on its objective, and `Square`.

    Against masked gradients: samples without a gradient switch to another objective, and start
    again at every step as long as they have none; the cross-entropy of saturated logits is taken
    at a higher temperature; `Square` needs no gradient at all, nor even a graph.
    Where two clean passes differ, values and gradients are means over `eot` draws (Athalye et al.,
    ICML 2018), classes are not attacked one by one, and `queries` counts the draws. What counts as
    reached is evaluated from the random numbers of the clean evaluation all the same; among those
    deltas the ones with the largest mean are kept. In mode "same" the model has one set of random
    numbers, and nothing is averaged.

    With `subset` samples leave the batch once they are fooled, unless the model is randomised or
    samples depend on each other (which is tested). Otherwise they stay in it, with their deltas.
    With `go_on` nothing of this: all attacks are run on all samples to the end, and of those that
    are fooled the perturbation counts that is worst by the criterion's objective. `steps` are then
    those until each was.

    Args:
        steps: of each gradient attack.
        queries: of the gradient-free attack.
        targets: how many of the likeliest other classes (or labels) are attacked one by one.
        restarts: how often the gradient attacks are run.
        eot: draws for each evaluation of a randomised model.
        go_on: attack the samples that are fooled, too, for measures of how wrong they are.
        norm, eps, lower, upper, mode, generator, compile: as for every attack.
    """

    steps: int = 100
    queries: int = 5000
    targets: int = 9
    eot: int = 20
    go_on: bool = False
    random_start: bool = field(init=False, default=True)
    keep: Literal["last", "best"] = field(init=False, default="best")
    stop_when_fooled: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.queries = checks.integer("AutoAttack", "queries", self.queries, 0)
        self.targets = checks.integer("AutoAttack", "targets", self.targets, 0)
        self.eot = checks.integer("AutoAttack", "eot", self.eot, 1)
        checks.flag("AutoAttack", "go_on", self.go_on)
        self._apgd()  # checks eps

    def _words(self) -> list[str]:
        return [f"{self.steps} steps", f"{self.targets} targets", f"{self.queries} queries"]

    def _apgd(self) -> APGD:
        box = {"lower": self.lower, "upper": self.upper}
        return APGD(norm=self.norm, eps=self.eps, steps=self.steps, **box)  # type: ignore[arg-type]

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
    ) -> EnsembleResult:
        """Attack one batch; the arguments are those of `Attack.run`.

        Returns:
            The result; `fooled_by` says which attack fooled each sample.

        Raises:
            RuntimeError: the losses do not depend on a site.
            ValueError: shapes that do not belong together.
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
            subset=subset,
        )
        with batch.attacking(self.own_generator) as generator:
            clean = run_first_pass(self, batch, goal, generator, scale, clean=True).clean
            assert clean is not None
            assert generator is not None
            ensemble = Ensemble(batch, goal, clean, generator, scale, self.eot, go_on=self.go_on)
            members = self._members(goal, clean, ensemble.draws)
            for number, member in enumerate(members, start=1):
                ensemble.attack(member, number)
            now, by = ensemble.finish(evaluate)
            batch.free_masks()
            result = EnsembleResult(
                batch.perturbed, goal, self.norm, ensemble.steps, clean if evaluate else None, now
            )
        result.randomised = ensemble.randomised
        result._names, result._by = ("clean", *(member.name for member in members)), by
        return result.warn() if evaluate else result

    def _members(self, goal: Criterion, clean: Evaluation, draws: int) -> list[Member]:
        apgd, margins = self._apgd(), margins_of(goal, clean)
        found = []
        if margins is None:
            found.append(Member("apgd-loss", apgd, goal))
        else:
            if isinstance(margins.goal, (Misclassify, MultiLabel)):
                found.append(Member("apgd-ce", apgd, TemperedCrossEntropy(margins, clean), margins))
            elif isinstance(margins.goal, (Deviate, Target)):
                found.append(Member("apgd-loss", apgd, goal, margins))
            found.append(Member("apgd-margin", apgd, margins))
            if margins.count > 1 and self.targets and draws == 1:
                nearest = margins.per_alternative(clean).detach()
                indices = nearest.topk(min(self.targets, margins.count), dim=1).indices
                found += [
                    Member("apgd-t", apgd, SingleMargin(margins, i), margins)
                    for i in indices.unbind(1)
                ]
        found *= self.restarts
        if self.queries >= draws:
            box = {"lower": self.lower, "upper": self.upper}
            square = Square(norm=self.norm, eps=self.eps, steps=self.queries // draws, **box)  # type: ignore[arg-type]
            found.append(Member("square", square, goal if margins is None else margins))
        return found
