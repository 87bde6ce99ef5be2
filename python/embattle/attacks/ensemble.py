"""Run several attacks on one batch, and keep the worst perturbation of each sample."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from embattle.attacks.base import Attack
from embattle.attacks.best import Best
from embattle.attacks.early_stopping import merge_marks, select_states
from embattle.attacks.margins import Switch
from embattle.criteria import Criterion
from embattle.criteria.base import ascended, reached
from embattle.perturb.attacked_batch import AttackedBatch
from embattle.perturb.evaluation import Evaluation
from embattle.perturb.gradients import NoGradient
from embattle.perturb.perturbation import Perturbation

# After how many steps it is tested whether all samples are fooled, which waits for the device.
_EVERY = 16
# By how much two passes may differ that should give the same, relative to their size.
_SAME = {torch.float64: 1e-9, torch.float32: 1e-4}


@dataclass(frozen=True)
class Member:
    """One attack of the ensemble: its name, its steps, and what it ascends."""

    name: str
    attack: Attack
    ascent: Criterion
    fallback: Criterion | None = None  # for samples without a gradient of `ascent`


class Ensemble:
    """A batch under one attack after the other, with the worst perturbation of each sample."""

    def __init__(
        self,
        batch: AttackedBatch,
        goal: Criterion,
        clean: Evaluation,
        generator: torch.Generator,
        scale: float,
        eot: int,
        go_on: bool = False,
    ) -> None:
        self.batch, self.goal, self.clean = batch, goal, clean
        self.generator, self.scale, self.go_on = generator, scale, go_on
        self.steps = torch.zeros(clean.batch, dtype=torch.int64, device=clean.device)
        self.by = torch.zeros_like(self.steps)  # the attack that fooled each sample
        self.no_gradient: NoGradient | None = None
        self.changed = False  # whether an evaluation was ever another than the clean one
        # Which samples the last evaluation fooled: their deltas are kept in the next steps.
        self.fooled = reached(goal, clean, clean)
        self.randomised = self._draws_matter()
        self.draws = eot if self.randomised else 1
        self.rows: Tensor | None = None
        # Whether samples have goals of their own that stay reached; else nothing is said of when.
        each = not batch.perturbed.coupled and self.draws == 1
        self.turned = self.fooled if each else None  # which were fooled by any evaluation
        self.move_all = go_on or not each
        if not go_on and self._can_leave():
            assert self.fooled is not None
            counted = goal.counted(clean)
            remaining = ~self.fooled if counted is None else ~self.fooled & counted
            self.rows = remaining.nonzero().squeeze(1)
            self.worst: Best | _WorstRows = _WorstRows(batch, goal, clean)
            self.fooled = None
        else:
            self.worst = Best(batch, goal, clean)
            if self.move_all:
                self.fooled = None

    # --- properties of the batch -----------------------------------------------------------------

    def _draws_matter(self) -> bool:
        """Compare two clean passes that draw other random numbers."""
        if self.batch.mode == "same":
            return False
        with self.batch.with_seed(self._seed()), torch.no_grad():
            other = self.batch.run().detach()
        return not same_evaluation(self.clean, other)

    def _can_leave(self) -> bool:
        """Return whether samples can leave: half of them must evaluate as they do in the batch."""
        batch, perturbations = self.batch, self.batch.perturbations
        if batch.subset is None or self.randomised or self.fooled is None:
            return False
        if batch.packed or batch.perturbed.coupled or batch.size < 2:
            return False
        rows = torch.arange(0, batch.size, 2, device=self.clean.device)
        part = batch.select(rows, [p.select(rows) for p in perturbations])
        some = part.evaluate(grad=False).detach()
        batch.clear()
        return same_evaluation(self.clean.select(rows), some)

    def _seed(self) -> int:
        return int(torch.randint(2**62, (), generator=self.generator))

    # --- one attack ------------------------------------------------------------------------------

    def attack(self, member: Member, number: int) -> None:
        """Run the steps of one attack on the samples that are not fooled yet."""
        if self._done() or (self.no_gradient is not None and member.attack.uses_gradient):
            return
        whole, rows = self.batch.perturbations, self.rows
        marks = [p.had_gradient.clone() for p in whole]
        states = [member.attack.begin(p, self.scale) for p in whole]
        self._start(member.attack, whole, states)
        now = _Remaining(self.batch, self.goal, member.ascent, self.clean, whole, states)
        now = now if rows is None else now.select(self.batch, whole, rows, rows)
        lacking = False  # whether any sample had no gradient at the start
        for step in range(member.attack.steps + 1):
            try:
                over = step == member.attack.steps
                at, values, rank, grads = self._evaluate(
                    member, now, gradient=not over or step == 0
                )
                if step == 0 and member.attack.uses_gradient:
                    empty = without_gradient(now.perturbations, grads)
                    lacking = bool(empty.any())
                    if lacking and member.fallback is not None:
                        other = member.fallback if rows is None else member.fallback.select(rows)
                        now.ascent = Switch(now.ascent, other, empty)
                        at, values, rank, grads = self._evaluate(member, now)
            except NoGradient as error:
                self.no_gradient = error
                break
            if self.no_gradient is not None and not self.changed:
                self.changed = not _equal(at, now.clean)
            fooled = reached(now.goal, at, now.clean)
            self._update_worst(at, now, number, rank)
            if rows is None:
                if self.turned is not None and fooled is not None:
                    self.turned = self.turned | fooled
                self.fooled = None if self.move_all else fooled
            else:
                assert fooled is not None
                stay = (~fooled).nonzero().squeeze(1)
                if stay.numel() < rows.numel():
                    merge_marks(whole, now.perturbations, rows)
                    rows = self.rows = rows[stay]
                    now = now.select(self.batch, now.perturbations, stay, rows)
                    values, grads = values[stay], [grad[stay] for grad in grads]
            if over or ((rows is not None or step % _EVERY == 0) and self._done()):
                break
            self._step(member.attack, step, now, grads, values, lacking)
            if self.go_on and self.turned is not None:
                self.steps += ~self.turned
            else:
                self.steps[slice(None) if rows is None else rows] += 1
        if rows is not None:
            merge_marks(whole, now.perturbations, rows)
        if not member.attack.uses_gradient:
            for perturbation, before in zip(whole, marks, strict=True):
                perturbation.had_gradient = before

    def _done(self) -> bool:
        if self.rows is not None:
            return not self.rows.numel()
        return self.fooled is not None and bool(self.fooled.all())

    def _start(
        self, attack: Attack, perturbations: list[Perturbation], states: list[dict[str, Any]]
    ) -> None:
        """Start at random; fooled samples keep their deltas."""
        for perturbation, state in zip(perturbations, states, strict=True):
            before = perturbation.delta.detach()
            attack.start(perturbation, state, self.generator)
            _keep(perturbation, before, self.fooled)

    def _evaluate(
        self, member: Member, now: _Remaining, gradient: bool = True
    ) -> tuple[Evaluation, Tensor, Tensor | None, list[Tensor]]:
        """Evaluate the current deltas.

        Returns:
            The evaluation from the random numbers of the clean one; and means over the draws: of
            what is ascended, of the goal's objective (None for one draw), and of the gradients.
        """
        uses_gradient, total = member.attack.uses_gradient and gradient, None
        at: Evaluation | None = None
        for draw in range(self.draws):
            with now.batch.with_seed(self._seed()) if draw else nullcontext():
                if uses_gradient:
                    seen = now.batch.evaluate_for_gradients()
                else:
                    seen = now.batch.evaluate(grad=False, lookups="detached")
                values = ascended(now.ascent, seen, now.clean)
                found = now.batch.gradients(values) if uses_gradient else []
            seen = seen.detach()
            at = seen if at is None else at
            rank = ascended(now.goal, seen, now.clean) if self.draws > 1 else values
            found += [values.detach().clone(), rank.detach().clone()]
            # Added apart: gradients may share memory.
            total = found if total is None else list(torch._foreach_add(total, found))
        assert at is not None
        assert total is not None
        if self.draws > 1:
            torch._foreach_div_(total, self.draws)
        *grads, values, rank = total
        grads = grads or [torch.zeros_like(p.delta) for p in now.perturbations]
        return at, self._values(values), rank if self.draws > 1 else None, grads

    def _values(self, values: Tensor) -> Tensor:
        return values.sum().expand_as(values) if self.batch.perturbed.coupled else values

    def _step(
        self,
        attack: Attack,
        number: int,
        now: _Remaining,
        grads: list[Tensor],
        values: Tensor,
        lacking: bool,
    ) -> None:
        """Step; fooled samples keep their deltas, and those without a gradient start again."""
        empty = without_gradient(now.perturbations, grads) if lacking else None
        for perturbation, grad, state in zip(now.perturbations, grads, now.states, strict=True):
            before = perturbation.delta.detach().clone()
            attack.step(perturbation, grad, state, number, values)
            if empty is not None:
                stepped = perturbation.delta.detach()
                attack.start(perturbation, state, self.generator)
                _keep(perturbation, stepped, ~empty)
            _keep(perturbation, before, self.fooled)

    # --- results ---------------------------------------------------------------------------------

    def _update_worst(
        self, at: Evaluation, now: _Remaining, mark: int, rank: Tensor | None
    ) -> None:
        if not isinstance(self.worst, Best):
            assert self.rows is not None
            self.worst.update(self.rows, at, now, mark)
            return
        # A sample that was fooled before keeps the attack that fooled it.
        marks = torch.full_like(self.steps, mark)
        self.by = marks if self.turned is None else torch.where(self.turned, self.by, marks)
        self.worst.update(at, self.by, rank)

    def finish(self, evaluate: bool) -> tuple[Evaluation | None, Tensor]:
        """Write the worst deltas into the perturbations.

        Returns:
            Their evaluation, if asked for, and the number of the attack that found each, `[B]`.
        """
        if self.no_gradient is not None and not self.changed:
            raise self.no_gradient
        for perturbation in self.batch.perturbations:  # not attacked: none was lacking
            perturbation.had_gradient |= perturbation.per_group(self.steps == 0)
        if isinstance(self.worst, Best):
            found = self.worst.finish()
            return (found.at if evaluate else None), found.mark
        self.batch.perturbed.set(self.worst.deltas)
        now = self.batch.evaluate(grad=False, lookups="detached").detach() if evaluate else None
        return now, self.worst.mark


@dataclass
class _Remaining:
    """The samples that are not fooled yet, and what the current attack keeps for them."""

    batch: AttackedBatch
    goal: Criterion
    ascent: Criterion
    clean: Evaluation
    perturbations: list[Perturbation]
    states: list[dict[str, Any]]

    def select(
        self, whole: AttackedBatch, perturbations: list[Perturbation], stay: Tensor, rows: Tensor
    ) -> _Remaining:
        """Keep some of the samples: `stay` of those here, which are `rows` of the whole batch."""
        some = [p.select(stay) for p in perturbations]
        return _Remaining(
            whole.select(rows, some),
            self.goal.select(stay),
            self.ascent.select(stay),
            self.clean.select(stay),
            some,
            select_states(self.states, perturbations, stay),
        )


class _WorstRows:
    """The worst deltas of the whole batch so far, written row by row; zero at first."""

    def __init__(self, batch: AttackedBatch, goal: Criterion, clean: Evaluation) -> None:
        self.deltas = [torch.zeros_like(p.delta.detach()) for p in batch.perturbations]
        self.value = ascended(goal, clean, clean).detach().clone()
        self.mark = torch.zeros(clean.batch, dtype=torch.int64, device=clean.device)

    def update(
        self,
        rows: Tensor,
        at: Evaluation,
        now: _Remaining,
        mark: int,
    ) -> None:
        """Write the samples that are fooled now (none was before), or whose objective has risen."""
        value = ascended(now.goal, at, now.clean).detach()
        wins = value > self.value[rows]
        fooled = reached(now.goal, at, now.clean)
        wins = wins if fooled is None else wins | fooled
        self.value[rows] = torch.where(wins, value, self.value[rows])
        self.mark[rows] = torch.where(wins, mark, self.mark[rows])
        for delta, perturbation in zip(self.deltas, now.perturbations, strict=True):
            won = perturbation.per_row(wins)
            delta[rows] = torch.where(won, perturbation.delta.detach(), delta[rows])


def _keep(perturbation: Perturbation, before: Tensor, rows: Tensor | None) -> None:
    """Put `before` back for some of the samples, bool `[B]`."""
    if rows is not None:
        perturbation.set(
            torch.where(perturbation.per_row(rows), before, perturbation.delta.detach())
        )


def without_gradient(perturbations: list[Perturbation], grads: list[Tensor]) -> Tensor:
    """Return bool `[B]`: samples whose gradients are zero (or not finite) everywhere."""
    found: Tensor | None = None
    for perturbation, grad in zip(perturbations, grads, strict=True):
        offsets, mask = perturbation.geometry["offsets"], perturbation.geometry["mask"]
        usable = (grad != 0) & grad.isfinite()
        if mask is not None:
            usable &= mask.reshape(*grad.shape[:-1], 1)
        some = usable.flatten(1).any(1)
        if offsets is not None:
            total = torch.cat([some.new_zeros(1).long(), some.long().cumsum(0)])
            some = total[offsets[1:]] > total[offsets[:-1]]
        elif perturbation.coupled:
            some = some.any().reshape(1)
        found = some if found is None else found | some
    assert found is not None
    return ~found


def same_evaluation(one: Evaluation, two: Evaluation) -> bool:
    """Return whether two evaluations agree, up to rounding."""
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
    """Return whether two evaluations are the same, bit by bit."""
    pairs = ((one.losses, two.losses), (one.outputs, two.outputs))
    return all(a is None or b is None or torch.equal(a, b) for a, b in pairs)
