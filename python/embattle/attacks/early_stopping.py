"""Early stopping, `stop_when_fooled`: samples leave the batch as soon as they reach the goal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from embattle.attacks.first_pass import FirstPass, Iterate
from embattle.criteria import Criterion
from embattle.criteria.base import ascended, reached
from embattle.perturb.attacked_batch import AttackedBatch
from embattle.perturb.evaluation import Evaluation
from embattle.perturb.perturbation import Perturbation

if TYPE_CHECKING:
    from embattle.attacks.base import Attack


class CannotLeaveError(ValueError):
    """Samples of this batch, or of this model, cannot leave it one by one."""


class _Worst:
    """The worst deltas of the whole batch so far, written row by row; zero at first."""

    def __init__(self, batch: AttackedBatch, goal: Criterion, clean: Evaluation) -> None:
        self.values = ascended(goal, clean, clean).detach().clone()
        self.reached = torch.zeros_like(self.values, dtype=torch.bool)
        self.deltas = [torch.zeros_like(p.delta) for p in batch.perturbations]
        self.losses: Tensor = clean.losses if clean.losses is not None else self.values
        self.losses = self.losses.clone()

    def write(
        self,
        rows: Tensor,
        perturbations: list[Perturbation],
        at: Evaluation,
        values: Tensor,
        wins: Tensor,
    ) -> None:
        """Write the samples where `wins` is True."""
        to = rows[wins]
        self.values[to] = values[wins]
        self.losses[to] = (values if at.losses is None else at.losses)[wins]
        for delta, perturbation in zip(self.deltas, perturbations, strict=True):
            delta[to] = perturbation.delta.detach()[wins]


def search_early_stopping(
    attack: Attack,
    batch: AttackedBatch,
    goal: Criterion,
    first_pass: FirstPass,
    generator: torch.Generator | None,
    scale: float,
) -> tuple[Evaluation, Tensor]:
    """Run the steps of `attack`; the batch's perturbations then hold the deltas.

    Returns:
        Evaluation of the deltas that are kept, with the whole batch, and the steps made for each
        sample, `[B]`. Samples that reach the goal without perturbation are not attacked.

    Raises:
        ValueError: the criterion has no goal, samples cannot leave, the model draws random numbers,
            or samples depend on each other.
    """
    whole, clean = batch.perturbations, first_pass.clean
    assert clean is not None
    remaining = _samples_to_attack(batch, goal, clean)
    worst = _Worst(batch, goal, clean)
    steps = torch.zeros_like(worst.reached, dtype=torch.int64)
    for restart in range(attack.restarts):
        # Strengths and starts are those of the whole batch, also after samples have left it.
        states = [attack.begin(p, scale) for p in whole]
        for perturbation, state in zip(whole, states, strict=True):
            attack.start(perturbation, state, generator)
        rows = remaining
        perturbations = [p.select(rows) for p in whole]
        states = select_states(states, whole, rows)
        for number in range(attack.steps + 1):
            if not rows.numel():
                break
            part, some = batch.select(rows, perturbations), goal.select(rows)
            known = FirstPass(clean.select(rows))
            over = number == attack.steps
            grads: list[Tensor] = []
            if over:
                at = part.evaluate(grad=False).detach()
                values = ascended(some, at, known.clean)
            else:
                if restart == 0 and number == 0 and first_pass.start is not None:
                    first = first_pass.start
                    known.start = Iterate(
                        first.at.select(rows), first.values[rows], [g[rows] for g in first.grads]
                    )
                at, values, grads = known.evaluate(part, some, gradient=attack.uses_gradient)
                at = at.detach()
            fooled = reached(some, at, known.clean)
            assert fooled is not None
            wins = fooled
            if over or attack.keep == "best":
                worse = values > worst.values[rows]
                wins = fooled | worse if attack.compares else torch.ones_like(fooled)
            worst.write(rows, perturbations, at, values, wins)
            worst.reached[rows[fooled]] = True
            stay = (~fooled).nonzero().squeeze(1)
            if stay.numel() < rows.numel():
                merge_marks(whole, perturbations, rows)
                remaining = remaining[~torch.isin(remaining, rows[fooled])]
                states = select_states(states, perturbations, stay)
                perturbations = [p.select(stay) for p in perturbations]
                rows, values = rows[stay], values[stay]
                grads = [grad[stay] for grad in grads]
            if over or not rows.numel():
                break
            for perturbation, grad, state in zip(perturbations, grads, states, strict=True):
                attack.step(perturbation, grad, state, number, values)
            steps[rows] += 1
        merge_marks(whole, perturbations, rows)
    for perturbation in whole:  # a sample that was not attacked lacks no gradient
        perturbation.had_gradient |= perturbation.per_group(steps == 0)
    batch.perturbed.set(worst.deltas)
    now = batch.evaluate(grad=False).detach()
    _check_independent(goal, clean, now, worst)
    return now, steps


def _samples_to_attack(batch: AttackedBatch, goal: Criterion, clean: Evaluation) -> Tensor:
    """Find the samples to attack, `[n]`, and refuse batches that samples cannot leave."""
    if batch.subset is None:
        raise ValueError(
            "stop_when_fooled needs the loss function of the samples that are left: run(..., "
            "subset=lambda rows: loss_fn_of_those_rows)"
        )
    if batch.packed or batch.perturbed.coupled:
        raise CannotLeaveError(
            "stop_when_fooled: samples of packed rows, or that share deltas (scope 'row', "
            "parameters), cannot leave the batch"
        )
    fooled = reached(goal, clean, clean)
    if fooled is None:
        raise CannotLeaveError(
            f"stop_when_fooled: {goal!r} has no goal that a sample can reach; give a criterion "
            "that has, such as Misclassify(labels)"
        )
    if batch.drew_random_numbers:
        raise CannotLeaveError(
            "stop_when_fooled: the model draws random numbers (dropout), so that a sample's loss "
            "depends on which others are left; use mode='eval', or stop_when_fooled=False"
        )
    counted = goal.counted(clean)
    wanted = ~fooled if counted is None else ~fooled & counted
    return wanted.nonzero().squeeze(1)


def _check_independent(goal: Criterion, clean: Evaluation, now: Evaluation, worst: _Worst) -> None:
    """Refuse results that the whole batch does not confirm."""
    fooled = reached(goal, now, clean)
    losses = ascended(goal, now, clean) if now.losses is None else now.losses
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-3}.get(losses.dtype, 5e-2)
    same = torch.isclose(losses, worst.losses, rtol=tolerance, atol=tolerance, equal_nan=True)
    assert fooled is not None
    if not bool(same.all()) or bool((worst.reached & ~fooled).any()):
        raise CannotLeaveError(
            "stop_when_fooled: samples depend on each other (batch norm in train mode, negatives "
            "from the batch): their losses changed when others left it; use mode='eval', or "
            "stop_when_fooled=False"
        )


def select_states(
    states: list[dict[str, Any]], perturbations: list[Perturbation], rows: Tensor
) -> list[dict[str, Any]]:
    """Select from the attack's states the entries of some samples (tensors `[B]` or `[groups]`)."""
    return [
        {key: _select(value, p, rows) for key, value in state.items()}
        for state, p in zip(states, perturbations, strict=True)
    ]


def _select(value: Any, perturbation: Perturbation, rows: Tensor) -> Any:
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    if value.shape[0] == perturbation.samples or not perturbation.samples:
        return value[rows]
    return value.reshape(perturbation.samples, -1)[rows].reshape(-1)


def merge_marks(whole: list[Perturbation], perturbations: list[Perturbation], rows: Tensor) -> None:
    """Add the gradient counts of some samples to those of the batch, and reset them."""
    for all_of, some in zip(whole, perturbations, strict=True):
        each = all_of.groups // max(all_of.samples, 1)
        counts, moved = (
            x.view(all_of.samples, each) for x in (all_of.nonfinite, all_of.had_gradient)
        )
        counts[rows] += some.nonfinite.reshape(rows.numel(), each)
        moved[rows] |= some.had_gradient.reshape(rows.numel(), each)
        some.nonfinite.zero_()
        some.had_gradient = torch.zeros_like(some.had_gradient)
