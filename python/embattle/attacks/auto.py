"""An ensemble of attacks that do not share their weaknesses."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from embattle import checks
from embattle.attacks.ascents import Entropy, Switch, Way, ways_to
from embattle.attacks.base import Attack
from embattle.attacks.best import Best
from embattle.attacks.leaving import narrow_all, note
from embattle.attacks.momentum import APGD
from embattle.attacks.opening import open_attack
from embattle.attacks.result import AttackResult, AttackWarning, warn_of_rounding
from embattle.attacks.square import Square
from embattle.criteria import Criterion, Deviate, Misclassify, MultiLabel, Target
from embattle.criteria.base import ascended, reached
from embattle.perturb.blocks import Block
from embattle.perturb.evaluation import Evaluation, LossFn
from embattle.perturb.gradients import NoGradient
from embattle.perturb.site import Site
from embattle.perturb.stage import Masks, Stage, Subset

# After how many steps it is asked whether any sample stands, which waits for the device.
_EVERY = 16
# By how much two passes may differ that should give the same, relative to their size.
_SAME = {torch.float64: 1e-9, torch.float32: 1e-4}


class EnsembleResult(AttackResult):
    """What an ensemble found. `zero_gradient` counts groups that only the gradient-free part moved.

    Attributes:
        randomised: whether two clean passes differed (dropout, sampled negatives).
    """

    randomised: bool = False
    _names: tuple[str, ...] = ()
    _by: Tensor | None = None

    @property
    def felled_by(self) -> list[str | None]:
        """The name of the attack that made each sample reach the goal, `[B]`; this waits.

        "clean" where the goal holds without perturbation, None where it does not hold.
        """
        there, clean = self.reached, self.clean_reached
        if there is None or clean is None or self._by is None:
            return [None] * self.steps.shape[0]
        by = torch.where(clean, 0, self._by)
        found = torch.where(there | clean, by, -1).tolist()
        return [None if number < 0 else self._names[number] for number in found]

    def warn(self) -> EnsembleResult:
        """Warn of groups that no gradient moved; this waits for the device."""
        zero = int(self.zero_gradient)
        if zero:
            warnings.warn(
                f"{zero} groups had no gradient other than zero (rounding, saturation): only the "
                "attack without gradients moved them, which is weaker. They may look more robust "
                "than they are",
                AttackWarning,
                stacklevel=3,
            )
        warn_of_rounding(self._found, self._norm)
        return self


@dataclass(frozen=True)
class _Part:
    """One attack of the ensemble: its name, its steps, and what it ascends."""

    name: str
    attack: Attack
    ascent: Criterion
    fallback: Criterion | None = None  # for samples without a gradient of `ascent`


@dataclass(kw_only=True, repr=False)
class AutoAttack(Attack):
    """Several strong attacks, one after the other, on the samples that still stand.

    After AutoAttack (Croce and Hein, ICML 2020, section 5): APGD on the cross-entropy, on the
    margin, and on the margins of the likeliest other classes one by one (section 4.2; without the
    ratio, which changes no direction); then a gradient-free search (`Square`). Theirs has FAB
    besides, and DLR for the margin. Other criteria have what corresponds: several labels one by
    one, too high and too low values; a user's own, APGD on its objective, and `Square`.

    Models that hide their gradients are met with: samples without a gradient switch to another
    objective, and start anew at every step as long as they have none; the cross-entropy of
    saturated logits is taken of cooler ones; `Square` needs no gradient at all, nor even a graph.
    Where two clean passes differ, values and gradients are means over `eot` draws (Athalye et al.,
    ICML 2018), classes are not attacked one by one, and `queries` counts the draws. What counts as
    reached is evaluated from the random numbers of the clean evaluation all the same; among those
    deltas the ones with the largest mean are kept. In mode "same" the model has one set of random
    numbers, and nothing is averaged.

    With `subset` samples leave the batch as they fall, unless the model is randomised or samples
    depend on each other (which is tried). Otherwise they stay in it, as they fell.

    Args:
        steps: of each gradient attack.
        queries: of the gradient-free attack.
        targets: how many of the likeliest other classes (or labels) are attacked one by one.
        restarts: how often the gradient attacks are run.
        eot: draws for each evaluation of a randomised model.
        norm, eps, lower, upper, mode, generator, compile: as for every attack.
    """

    steps: int = 100
    queries: int = 5000
    targets: int = 9
    eot: int = 20
    random_start: bool = field(init=False, default=True)
    keep: Literal["last", "best"] = field(init=False, default="best")
    stop_when_fooled: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.queries = checks.integer("AutoAttack", "queries", self.queries, 0)
        self.targets = checks.integer("AutoAttack", "targets", self.targets, 0)
        self.eot = checks.integer("AutoAttack", "eot", self.eot, 1)
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
            The result; it says which attack felled each sample.

        Raises:
            RuntimeError: the losses do not depend on a site.
            ValueError: shapes that do not belong together.
        """
        goal = self.checked_goal(criterion)
        stage = Stage(
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
        with stage.attacking(self.own_generator) as generator:
            clean = open_attack(self, stage, goal, generator, scale, clean=True).clean
            assert clean is not None
            assert generator is not None
            ensemble = _Ensemble(stage, goal, clean, generator, scale, self.eot)
            parts = self._parts(goal, clean, ensemble.draws)
            for number, part in enumerate(parts, start=1):
                ensemble.attack(part, number)
            now, by = ensemble.settle(evaluate)
            stage.forget_masks()
            result = EnsembleResult(
                stage.found, goal, self.norm, ensemble.steps, clean if evaluate else None, now
            )
        result.randomised = ensemble.randomised
        result._names, result._by = ("clean", *(part.name for part in parts)), by
        return result.warn() if evaluate else result

    def _parts(self, goal: Criterion, clean: Evaluation, draws: int) -> list[_Part]:
        apgd, ways = self._apgd(), ways_to(goal, clean)
        found = []
        if ways is None:
            found.append(_Part("apgd-loss", apgd, goal))
        else:
            if isinstance(ways.goal, (Misclassify, MultiLabel)):
                found.append(_Part("apgd-ce", apgd, Entropy(ways, clean), ways))
            elif isinstance(ways.goal, (Deviate, Target)):
                found.append(_Part("apgd-loss", apgd, goal, ways))
            found.append(_Part("apgd-margin", apgd, ways))
            if ways.count > 1 and self.targets and draws == 1:
                nearest = ways.distances(clean).detach()
                indices = nearest.topk(min(self.targets, ways.count), dim=1).indices
                found += [_Part("apgd-t", apgd, Way(ways, i), ways) for i in indices.unbind(1)]
        found *= self.restarts
        if self.queries >= draws:
            box = {"lower": self.lower, "upper": self.upper}
            square = Square(norm=self.norm, eps=self.eps, steps=self.queries // draws, **box)  # type: ignore[arg-type]
            found.append(_Part("square", square, goal if ways is None else ways))
        return found


class _Ensemble:
    """A batch under one attack after the other, and the worst of each sample."""

    def __init__(
        self,
        stage: Stage,
        goal: Criterion,
        clean: Evaluation,
        generator: torch.Generator,
        scale: float,
        eot: int,
    ) -> None:
        self.stage, self.goal, self.clean = stage, goal, clean
        self.generator, self.scale = generator, scale
        self.steps = torch.zeros(clean.batch, dtype=torch.int64, device=clean.device)
        self.by = torch.zeros_like(self.steps)  # the attack that felled each sample
        self.hidden: NoGradient | None = None
        self.moved = False  # whether an evaluation was ever another than the clean one
        # Which samples have fallen in the last evaluation, and stay as they are in the next steps.
        self.there = reached(goal, clean, clean)
        self.randomised = self._draws_matter()
        self.draws = eot if self.randomised else 1
        self.rows: Tensor | None = None
        if self._can_leave():
            assert self.there is not None
            counted = goal.counted(clean)
            standing = ~self.there if counted is None else ~self.there & counted
            self.rows = standing.nonzero().squeeze(1)
            self.worst: Best | _Rows = _Rows(stage, goal, clean)
            self.there = None
        else:
            self.worst = Best(stage, goal, clean)
            if stage.found.coupled or self.draws > 1:
                self.there = None

    # --- what the batch is like ------------------------------------------------------------------

    def _draws_matter(self) -> bool:
        """Compare two clean passes that draw other random numbers."""
        if self.stage.mode == "same":
            return False
        with self.stage.drawing(self._seed()), torch.no_grad():
            other = self.stage.run().detach()
        return not _same(self.clean, other)

    def _can_leave(self) -> bool:
        """Whether samples can leave: try whether half of them give what they gave in the batch."""
        stage, blocks = self.stage, self.stage.blocks
        packed = stage.geometry.packed or any(b.geometry["offsets"] is not None for b in blocks)
        if stage.subset is None or self.randomised or self.there is None:
            return False
        if packed or stage.found.coupled or stage.batch < 2:
            return False
        rows = torch.arange(0, stage.batch, 2, device=self.clean.device)
        part = stage.narrow(rows, [block.narrow(rows) for block in blocks])
        some = part.evaluate(grad=False).detach()
        stage.rest()
        return _same(self.clean.select(rows), some)

    def _seed(self) -> int:
        return int(torch.randint(2**62, (), generator=self.generator))

    # --- one attack ------------------------------------------------------------------------------

    def attack(self, part: _Part, number: int) -> None:
        """Run the steps of one attack on the samples that stand."""
        if self._over() or (self.hidden is not None and part.attack.climbs):
            return
        whole, rows = self.stage.blocks, self.rows
        noted = [block.moved.clone() for block in whole]
        states = [part.attack.begin(block, self.scale) for block in whole]
        self._start(part.attack, whole, states)
        now = _Standing(self.stage, self.goal, part.ascent, self.clean, whole, states)
        now = now if rows is None else now.narrow(self.stage, whole, rows, rows)
        still = False  # whether any sample had no gradient at the start
        for step in range(part.attack.steps + 1):
            try:
                at, values, rank, grads = self._look(part, now)
                if step == 0 and part.attack.climbs:
                    empty = without_gradient(now.blocks, grads)
                    still = bool(empty.any())
                    if still and part.fallback is not None:
                        other = part.fallback if rows is None else part.fallback.select(rows)
                        now.ascent = Switch(now.ascent, other, empty)
                        at, values, rank, grads = self._look(part, now)
            except NoGradient as error:
                self.hidden = error
                break
            if self.hidden is not None and not self.moved:
                self.moved = not _equal(at, now.clean)
            there = reached(now.goal, at, now.clean)
            self._offer(at, now, number, rank)
            if rows is None:
                self.there = None if self.stage.found.coupled or self.draws > 1 else there
            else:
                assert there is not None
                stay = (~there).nonzero().squeeze(1)
                if stay.numel() < rows.numel():
                    note(whole, now.blocks, rows)
                    rows = self.rows = rows[stay]
                    now = now.narrow(self.stage, now.blocks, stay, rows)
                    values, grads = values[stay], [grad[stay] for grad in grads]
            if step == part.attack.steps or (
                (rows is not None or step % _EVERY == 0) and self._over()
            ):
                break
            self._step(part.attack, step, now, grads, values, still)
            self.steps[slice(None) if rows is None else rows] += 1
        if rows is not None:
            note(whole, now.blocks, rows)
        if not part.attack.climbs:
            for block, before in zip(whole, noted, strict=True):
                block.moved = before

    def _over(self) -> bool:
        if self.rows is not None:
            return not self.rows.numel()
        return self.there is not None and bool(self.there.all())

    def _start(self, attack: Attack, blocks: list[Block], states: list[dict[str, Any]]) -> None:
        """Start at random; samples that have fallen stay where they are."""
        for block, state in zip(blocks, states, strict=True):
            before = block.delta.detach()
            attack.start(block, state, self.generator)
            _keep(block, before, self.there)

    def _look(
        self, part: _Part, now: _Standing
    ) -> tuple[Evaluation, Tensor, Tensor | None, list[Tensor]]:
        """Evaluate the current deltas.

        Returns:
            The evaluation from the random numbers of the clean one; and means over the draws: of
            what is ascended, of the goal's objective (None for one draw), and of the gradients.
        """
        climbs, total = part.attack.climbs, None
        at: Evaluation | None = None
        for draw in range(self.draws):
            with now.stage.drawing(self._seed()) if draw else nullcontext():
                seen = now.stage.evaluate(grad=climbs, lookups="detached", detach=climbs)
                values = ascended(now.ascent, seen, now.clean)
                found = now.stage.gradients(values) if climbs else []
            seen = seen.detach()
            at = seen if at is None else at
            rank = ascended(now.goal, seen, now.clean) if self.draws > 1 else values
            found += [values.detach().clone(), rank.detach().clone()]
            # Not in place: gradients may share memory.
            total = found if total is None else list(torch._foreach_add(total, found))
        assert at is not None
        assert total is not None
        if self.draws > 1:
            torch._foreach_div_(total, self.draws)
        *grads, values, rank = total
        grads = grads or [torch.zeros_like(block.delta) for block in now.blocks]
        return at, self._values(values), rank if self.draws > 1 else None, grads

    def _values(self, values: Tensor) -> Tensor:
        return values.sum().expand_as(values) if self.stage.found.coupled else values

    def _step(
        self,
        attack: Attack,
        number: int,
        now: _Standing,
        grads: list[Tensor],
        values: Tensor,
        still: bool,
    ) -> None:
        """Step; samples that have fallen stay, and those without a gradient start anew."""
        empty = without_gradient(now.blocks, grads) if still else None
        for block, grad, state in zip(now.blocks, grads, now.states, strict=True):
            before = block.delta.detach().clone()
            attack.step(block, grad, state, number, values)
            if empty is not None:
                stepped = block.delta.detach()
                attack.start(block, state, self.generator)
                _keep(block, stepped, ~empty)
            _keep(block, before, self.there)

    # --- what was found --------------------------------------------------------------------------

    def _offer(self, at: Evaluation, now: _Standing, mark: int, rank: Tensor | None) -> None:
        if not isinstance(self.worst, Best):
            assert self.rows is not None
            self.worst.offer(self.rows, at, now, mark)
            return
        # A sample that had fallen before stays with the attack that felled it.
        marks = torch.full_like(self.steps, mark)
        self.by = marks if self.there is None else torch.where(self.there, self.by, marks)
        self.worst.offer(at, self.by, rank)

    def settle(self, evaluate: bool) -> tuple[Evaluation | None, Tensor]:
        """Leave the worst deltas in the blocks; give their evaluation, and who found them."""
        if self.hidden is not None and not self.moved:
            raise self.hidden
        for block in self.stage.blocks:  # whoever was not attacked did not lack a gradient
            block.moved |= block.per_group(self.steps == 0)
        if isinstance(self.worst, Best):
            found = self.worst.settle()
            return (found.at if evaluate else None), found.mark
        self.stage.found.set(self.worst.deltas)
        now = self.stage.evaluate(grad=False, lookups="detached").detach() if evaluate else None
        return now, self.worst.mark


@dataclass
class _Standing:
    """The samples that one attack is at work on, and what it keeps for them."""

    stage: Stage
    goal: Criterion
    ascent: Criterion
    clean: Evaluation
    blocks: list[Block]
    states: list[dict[str, Any]]

    def narrow(self, whole: Stage, blocks: list[Block], stay: Tensor, rows: Tensor) -> _Standing:
        """Keep some of the samples: `stay` of those here, which are `rows` of the whole batch."""
        some = [block.narrow(stay) for block in blocks]
        return _Standing(
            whole.narrow(rows, some),
            self.goal.select(stay),
            self.ascent.select(stay),
            self.clean.select(stay),
            some,
            narrow_all(self.states, blocks, stay),
        )


class _Rows:
    """The worst deltas of the whole batch so far, written row by row; zero at first."""

    def __init__(self, stage: Stage, goal: Criterion, clean: Evaluation) -> None:
        self.deltas = [torch.zeros_like(block.delta.detach()) for block in stage.blocks]
        self.value = ascended(goal, clean, clean).detach().clone()
        self.mark = torch.zeros(clean.batch, dtype=torch.int64, device=clean.device)

    def offer(
        self,
        rows: Tensor,
        at: Evaluation,
        now: _Standing,
        mark: int,
    ) -> None:
        """Take over the samples that fell, or whose objective has risen. Nobody fell before."""
        value = ascended(now.goal, at, now.clean).detach()
        wins = value > self.value[rows]
        there = reached(now.goal, at, now.clean)
        wins = wins if there is None else wins | there
        self.value[rows] = torch.where(wins, value, self.value[rows])
        self.mark[rows] = torch.where(wins, mark, self.mark[rows])
        for delta, block in zip(self.deltas, now.blocks, strict=True):
            won = block.per_row(wins)
            delta[rows] = torch.where(won, block.delta.detach(), delta[rows])


def _keep(block: Block, before: Tensor, rows: Tensor | None) -> None:
    """Put `before` back for some of the samples, bool `[B]`."""
    if rows is not None:
        block.set(torch.where(block.per_row(rows), before, block.delta.detach()))


def without_gradient(blocks: list[Block], grads: list[Tensor]) -> Tensor:
    """Give bool `[B]`: samples whose gradients are zero (or not finite) everywhere."""
    found: Tensor | None = None
    for block, grad in zip(blocks, grads, strict=True):
        offsets = block.geometry["offsets"]
        some = ((grad != 0) & grad.isfinite()).flatten(1).any(1)
        if offsets is not None:
            total = torch.cat([some.new_zeros(1).long(), some.long().cumsum(0)])
            some = total[offsets[1:]] > total[offsets[:-1]]
        elif block.coupled:
            some = some.any().reshape(1)
        found = some if found is None else found | some
    assert found is not None
    return ~found


def _same(one: Evaluation, two: Evaluation) -> bool:
    """Whether two evaluations agree, up to rounding."""
    for a, b in ((one.losses, two.losses), (one.outputs, two.outputs)):
        if a is None or b is None:
            continue
        if not a.is_floating_point():
            if not torch.equal(a, b):
                return False
            continue
        off = _SAME.get(a.dtype, 2e-2)
        size = float(a[a.isfinite()].abs().max()) if bool(a.isfinite().any()) else 1.0
        if not torch.allclose(a, b, rtol=off, atol=off * size, equal_nan=True):
            return False
    return True


def _equal(one: Evaluation, two: Evaluation) -> bool:
    """Whether two evaluations are the same, bit by bit."""
    pairs = ((one.losses, two.losses), (one.outputs, two.outputs))
    return all(a is None or b is None or torch.equal(a, b) for a, b in pairs)
