"""The loop for `stop_when_fooled`: samples leave the batch as soon as they reach the goal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from embattle.attacks.opening import Look, Opened
from embattle.criteria import Criterion
from embattle.criteria.base import ascended, reached
from embattle.perturb.blocks import Block
from embattle.perturb.evaluation import Evaluation
from embattle.perturb.stage import Stage

if TYPE_CHECKING:
    from embattle.attacks.base import Attack


class _Worst:
    """The worst deltas of the whole batch so far, written row by row; zero at first."""

    def __init__(self, stage: Stage, goal: Criterion, clean: Evaluation) -> None:
        self.values = ascended(goal, clean, clean).detach().clone()
        self.reached = torch.zeros_like(self.values, dtype=torch.bool)
        self.deltas = [torch.zeros_like(block.delta) for block in stage.blocks]
        self.losses: Tensor = clean.losses if clean.losses is not None else self.values
        self.losses = self.losses.clone()

    def write(
        self, rows: Tensor, blocks: list[Block], at: Evaluation, values: Tensor, wins: Tensor
    ) -> None:
        """Take over the samples where `wins` is True."""
        to = rows[wins]
        self.values[to] = values[wins]
        self.losses[to] = (values if at.losses is None else at.losses)[wins]
        for delta, block in zip(self.deltas, blocks, strict=True):
            delta[to] = block.delta.detach()[wins]


def search_leaving(
    attack: Attack,
    stage: Stage,
    goal: Criterion,
    opened: Opened,
    generator: torch.Generator | None,
    scale: float,
) -> tuple[Evaluation, Tensor]:
    """Run the steps of `attack`; the stage's blocks then hold the deltas.

    Returns:
        Evaluation of the deltas that are kept, with the whole batch, and the steps made for each
        sample, `[B]`. Samples that reach the goal without perturbation are not attacked.

    Raises:
        ValueError: the criterion has no goal, samples cannot leave, the model draws random numbers,
            or samples depend on each other.
    """
    whole, clean = stage.blocks, opened.clean
    assert clean is not None
    remaining = _attacked(stage, goal, clean)
    worst = _Worst(stage, goal, clean)
    steps = torch.zeros_like(worst.reached, dtype=torch.int64)
    for restart in range(attack.restarts):
        # Strengths and starts are those of the whole batch, whoever has left it.
        states = [attack.begin(block, scale) for block in whole]
        for block, state in zip(whole, states, strict=True):
            attack.start(block, state, generator)
        rows = remaining
        blocks = [block.narrow(rows) for block in whole]
        states = narrow_all(states, whole, rows)
        for number in range(attack.steps + 1):
            if not rows.numel():
                break
            part, some = stage.narrow(rows, blocks), goal.select(rows)
            known = Opened(clean.select(rows))
            over = number == attack.steps
            grads: list[Tensor] = []
            if over:
                at = part.evaluate(grad=False).detach()
                values = ascended(some, at, known.clean)
            else:
                if restart == 0 and number == 0 and opened.first is not None:
                    first = opened.first
                    known.first = Look(
                        first.at.select(rows), first.values[rows], [g[rows] for g in first.grads]
                    )
                at, values, grads = known.look(part, some, gradient=attack.climbs)
            fooled = reached(some, at, known.clean)
            assert fooled is not None
            kept = attack.keep == "best" or attack.restarts > 1
            worst.write(
                rows, blocks, at, values,
                fooled | (values > worst.values[rows] if kept else torch.full_like(fooled, over)),
            )  # fmt: skip
            worst.reached[rows[fooled]] = True
            stay = (~fooled).nonzero().squeeze(1)
            if stay.numel() < rows.numel():
                note(whole, blocks, rows)
                remaining = remaining[~torch.isin(remaining, rows[fooled])]
                states = narrow_all(states, blocks, stay)
                blocks = [block.narrow(stay) for block in blocks]
                rows, values = rows[stay], values[stay]
                grads = [grad[stay] for grad in grads]
            if over or not rows.numel():
                break
            for block, grad, state in zip(blocks, grads, states, strict=True):
                attack.step(block, grad, state, number, values)
            steps[rows] += 1
        note(whole, blocks, rows)
    for block in whole:  # whoever was not attacked did not lack a gradient
        block.moved |= block.per_group(steps == 0)
    stage.found.set(worst.deltas)
    now = stage.evaluate(grad=False).detach()
    _check_independent(goal, clean, now, worst)
    return now, steps


def _attacked(stage: Stage, goal: Criterion, clean: Evaluation) -> Tensor:
    """Find the samples to attack, `[n]`, and refuse batches that samples cannot leave."""
    if stage.subset is None:
        raise ValueError(
            "stop_when_fooled needs the loss function of the samples that are left: run(..., "
            "subset=lambda rows: loss_fn_of_those_rows)"
        )
    if stage.geometry.packed or any(
        block.coupled or block.geometry["offsets"] is not None for block in stage.blocks
    ):
        raise ValueError(
            "stop_when_fooled: samples of packed rows, or that share deltas (scope 'row', "
            "parameters), cannot leave the batch"
        )
    there = reached(goal, clean, clean)
    if there is None:
        raise ValueError(
            f"stop_when_fooled: {goal!r} has no goal that a sample can reach; give a criterion "
            "that has, such as Misclassify(labels)"
        )
    if stage.drew_random_numbers:
        raise ValueError(
            "stop_when_fooled: the model draws random numbers (dropout), so that a sample's loss "
            "depends on which others are left; use mode='eval', or stop_when_fooled=False"
        )
    counted = goal.counted(clean)
    wanted = ~there if counted is None else ~there & counted
    return wanted.nonzero().squeeze(1)


def _check_independent(goal: Criterion, clean: Evaluation, now: Evaluation, worst: _Worst) -> None:
    """Refuse results that the whole batch does not confirm."""
    there = reached(goal, now, clean)
    losses = ascended(goal, now, clean) if now.losses is None else now.losses
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-3}.get(losses.dtype, 5e-2)
    same = torch.isclose(losses, worst.losses, rtol=tolerance, atol=tolerance, equal_nan=True)
    assert there is not None
    if not bool(same.all()) or bool((worst.reached & ~there).any()):
        raise ValueError(
            "stop_when_fooled: samples depend on each other (batch norm in train mode, negatives "
            "from the batch): their losses changed when others left it; use mode='eval', or "
            "stop_when_fooled=False"
        )


def narrow_all(
    states: list[dict[str, Any]], blocks: list[Block], rows: Tensor
) -> list[dict[str, Any]]:
    """Keep of the states what belongs to some of the samples (tensors by sample or by group)."""
    return [
        {key: _narrow(value, block, rows) for key, value in state.items()}
        for state, block in zip(states, blocks, strict=True)
    ]


def _narrow(value: Any, block: Block, rows: Tensor) -> Any:
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    if value.shape[0] == block.samples or not block.samples:
        return value[rows]
    return value.reshape(block.samples, -1)[rows].reshape(-1)


def note(whole: list[Block], blocks: list[Block], rows: Tensor) -> None:
    """Add what was noted of some samples' gradients to what is known of the batch, and clear it."""
    for all_of, some in zip(whole, blocks, strict=True):
        each = all_of.groups // max(all_of.samples, 1)
        counts, moved = (x.view(all_of.samples, each) for x in (all_of.nonfinite, all_of.moved))
        counts[rows] += some.nonfinite.reshape(rows.numel(), each)
        moved[rows] |= some.moved.reshape(rows.numel(), each)
        some.nonfinite.zero_()
        some.moved.zero_()
