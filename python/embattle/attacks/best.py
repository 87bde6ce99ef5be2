"""The worst perturbations of an attack so far: the best ones for the attacker."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from embattle.criteria import Criterion
from embattle.criteria.base import ascended, reached
from embattle.perturb.attacked_batch import AttackedBatch
from embattle.perturb.evaluation import Evaluation

# By how much an evaluation may differ from the one of the same deltas in another batch of iterates.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


class _Candidate:
    """Deltas and their evaluation; candidates compare by the goal first, then by the rank.

    The rank is the objective `value`, unless it is known better: as a mean over random numbers.
    """

    def __init__(
        self,
        deltas: list[Tensor],
        at: Evaluation,
        value: Tensor,
        goal: Tensor | None,
        mark: Tensor | None = None,
        rank: Tensor | None = None,
    ) -> None:
        self.deltas, self.at, self.value, self.goal = deltas, at, value, goal
        self.rank = value if rank is None else rank
        self.mark = torch.zeros_like(value, dtype=torch.int64) if mark is None else mark

    def beaten_by(self, other: _Candidate) -> Tensor:
        """Return bool `[B]` (or 0-d, of the batches): where the other is worse for the model."""
        wins = other.rank > self.rank
        if self.goal is None or other.goal is None:
            return wins
        return torch.where(other.goal == self.goal, wins, other.goal > self.goal)


class Best:
    """The worst deltas so far, for each sample and for the batch as a whole.

    Each sample has its worst iterate where samples do not depend on each other. Where they do
    (batch norm in train mode, negatives from the batch, deltas that samples share), joining
    iterates gives a batch that was never evaluated: then the worst iterate of the whole batch
    counts. An evaluation of what was joined shows which (`evaluate_joined`). The clean point is a
    candidate.

    Args:
        batch: the batch.
        goal: what counts.
        clean: the evaluation without perturbation.
    """

    def __init__(self, batch: AttackedBatch, goal: Criterion, clean: Evaluation) -> None:
        self.batch, self.goal, self.clean = batch, goal, clean
        zeros = [torch.zeros_like(p.delta) for p in batch.perturbations]
        self.joined = self._candidate(zeros, clean)
        self.whole = self.joined
        self.evaluated: _Candidate | None = None  # what was joined, as it really is
        self.interact = torch.zeros((), dtype=torch.bool, device=self.joined.value.device)

    def update(
        self, at: Evaluation, mark: Tensor | None = None, rank: Tensor | None = None
    ) -> None:
        """Keep the current deltas where they are worse for the model than those kept so far.

        `mark` (int64 `[B]`) says where they come from; the clean point has mark 0. `rank` (`[B]`)
        takes the objective's place in the comparison.
        """
        perturbations = self.batch.perturbations
        now = self._candidate([p.delta.detach().clone() for p in perturbations], at)
        now.mark = now.mark if mark is None else mark
        now.rank = now.rank if rank is None else rank
        worse = self._summed(self.whole).beaten_by(self._summed(now))
        self.whole = _where(worse, now, self.whole, [worse] * len(perturbations))
        if not self.batch.perturbed.coupled:
            wins = self.joined.beaten_by(now)
            self.joined = _where(wins, now, self.joined, [p.per_row(wins) for p in perturbations])
            self.evaluated = None

    def evaluate_joined(self) -> None:
        """Evaluate what was joined, after a restart.

        As long as no interaction shows it is a candidate for the whole batch as well: samples may
        interact at some deltas alone, and what counted after few restarts must not be lost where
        later ones show that.
        """
        if self.batch.perturbed.coupled or self.evaluated is not None:
            return
        self.batch.perturbed.set(self.joined.deltas)
        at = self.batch.evaluate(grad=False, lookups="detached").detach()
        now = self._candidate(self.joined.deltas, at)
        now.mark = self.joined.mark
        differ = ~torch.isclose(
            now.value, self.joined.value, rtol=self._tolerance, atol=self._tolerance
        )
        if now.goal is not None and self.joined.goal is not None:
            differ = differ | (now.goal != self.joined.goal)
        # The ranks of samples that interact were those of other batches.
        now.rank = torch.where(differ, now.value, self.joined.rank)
        self.interact = self.interact | differ.any()
        worse = self._summed(self.whole).beaten_by(self._summed(now)) & ~self.interact
        self.whole = _where(worse, now, self.whole, [worse] * len(now.deltas))
        self.evaluated = now

    def finish(self) -> _Candidate:
        """Write the best deltas into the perturbations; return them with their evaluation."""
        self.evaluate_joined()
        chosen = self.whole
        if self.evaluated is not None:
            each = [self.interact] * len(chosen.deltas)
            chosen = _where(self.interact, self.whole, self.evaluated, each)
        self.batch.perturbed.set(chosen.deltas)
        return chosen

    @staticmethod
    def _summed(one: _Candidate) -> _Candidate:
        """Return a candidate's sums over the batch, 0-d."""
        goal = None if one.goal is None else one.goal.sum()
        return _Candidate([], one.at, one.value.sum(), goal, rank=one.rank.sum())

    @property
    def _tolerance(self) -> float:
        return _TOLERANCE.get(self.joined.value.dtype, 1e-2)

    def _candidate(self, deltas: list[Tensor], at: Evaluation) -> _Candidate:
        value = ascended(self.goal, at, self.clean).detach()
        # A loss that is no number is not the worst there is.
        value = torch.where(value.isnan(), -torch.inf, value)
        return _Candidate(deltas, at, value, reached(self.goal, at, self.clean))


def _where(wins: Tensor, one: _Candidate, two: _Candidate, rows: list[Any]) -> _Candidate:
    goal = None
    if one.goal is not None and two.goal is not None:
        goal = torch.where(wins, one.goal, two.goal)
    return _Candidate(
        [torch.where(r, a, b) for r, a, b in zip(rows, one.deltas, two.deltas, strict=True)],
        one.at.where(wins.expand(one.at.batch), two.at),
        torch.where(wins, one.value, two.value),
        goal,
        torch.where(wins, one.mark, two.mark),
        torch.where(wins, one.rank, two.rank),
    )
