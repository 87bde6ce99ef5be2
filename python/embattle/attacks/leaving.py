"""The loop for `stop_when_fooled`: samples leave the batch as soon as they are fooled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from embattle.attacks.judge import Judge
from embattle.perturb.blocks import Block
from embattle.perturb.stage import Evaluation, Stage

if TYPE_CHECKING:
    from embattle.attacks.base import Attack


class _Found:
    """The worst so far of the whole batch, written row by row."""

    def __init__(self, stage: Stage, clean: Evaluation) -> None:
        self.blocks = stage.blocks
        self.losses = clean.losses.clone()
        self.outputs = None if clean.outputs is None else clean.outputs.clone()
        self.values = torch.full_like(clean.losses, -torch.inf)
        self.deltas = [torch.zeros_like(block.delta) for block in stage.blocks]

    def write(
        self, rows: Tensor, blocks: list[Block], at: Evaluation, values: Tensor, fooled: Tensor
    ) -> None:
        """Take over the samples that are fooled, or whose value is the largest yet."""
        wins = fooled | (values > self.values[rows])
        to = rows[wins]
        self.values[to] = values[wins]
        self.losses[to] = at.losses[wins]
        if self.outputs is not None and at.outputs is not None:
            self.outputs[to] = at.outputs[wins]
        for delta, block in zip(self.deltas, blocks, strict=True):
            delta[to] = block.delta.detach()[wins]


def climb_leaving(
    attack: Attack,
    stage: Stage,
    clean: Evaluation,
    *,
    first: tuple[Evaluation, list[Tensor]] | None,
    generator: torch.Generator | None,
    scale: float,
    judge: Judge,
) -> tuple[Evaluation, Tensor]:
    """Run the steps of `attack`; the stage's blocks then hold the deltas.

    Returns:
        Evaluation of the deltas that are kept, and the steps made for each sample, `[B]`. Samples
        that are wrong without perturbation are not attacked.
    """
    whole = stage.blocks
    found = _Found(stage, clean)
    steps = torch.zeros_like(clean.losses, dtype=torch.int64)
    wrong = judge.fooled(clean)
    assert judge.labels is not None
    if wrong is None:
        raise ValueError("stop_when_fooled needs outputs: let loss_fn return (losses, logits)")
    remaining = (~wrong).nonzero().squeeze(1)
    for restart in range(attack.restarts):
        # Strengths and starts are those of the whole batch, whoever has left it.
        states = [attack.begin(block, scale) for block in whole]
        for block, state in zip(whole, states, strict=True):
            attack.start(block, state, generator)
        rows = remaining
        blocks = [block.narrow(rows) for block in whole]
        states = _narrow_all(states, whole, rows)
        for number in range(attack.steps + 1):
            if not rows.numel():
                break
            part = stage.narrow(rows, blocks)
            some = Judge(
                judge.labels[rows],
                judge.predictions,
                None if judge.clean is None else judge.clean[rows],
            )
            over = number == attack.steps
            if over:
                at, grads = part.evaluate(grad=False).detach(), []
            elif restart == 0 and number == 0 and first is not None:
                at = Evaluation(first[0].losses[rows], _rows(first[0].outputs, rows))
                grads = [grad[rows] for grad in first[1]]
            else:
                at, grads = attack.look(part, some)
            fooled = some.fooled(at)
            assert fooled is not None
            values = some.values(at, attack.ascend)
            if attack.keep == "best" or over:
                found.write(rows, blocks, at, values, fooled)
            else:
                found.write(rows, blocks, at, torch.full_like(values, -torch.inf), fooled)
            stay = (~fooled).nonzero().squeeze(1)
            if stay.numel() < rows.numel():
                _count(whole, blocks, rows)
                left = rows[fooled]
                remaining = remaining[~torch.isin(remaining, left)]
                states = _narrow_all(states, blocks, stay)
                blocks = [block.narrow(stay) for block in blocks]
                rows, values = rows[stay], values[stay]
                grads = [grad[stay] for grad in grads]
            if over or not rows.numel():
                break
            for block, grad, state in zip(blocks, grads, states, strict=True):
                attack.step(block, grad, state, number, values)
            steps[rows] += 1
        _count(whole, blocks, rows)
    for block, delta in zip(whole, found.deltas, strict=True):
        block.set(delta)
    return Evaluation(found.losses, found.outputs), steps


def _rows(value: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if value is None else value[rows]


def _narrow_all(
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


def _count(whole: list[Block], blocks: list[Block], rows: Tensor) -> None:
    """Add the counts of non-finite groups of some samples to those of the batch, and clear them."""
    for all_of, some in zip(whole, blocks, strict=True):
        each = all_of.groups // all_of.samples
        counts = all_of.nonfinite.view(all_of.samples, each)
        counts[rows] += some.nonfinite.reshape(rows.numel(), each)
        some.nonfinite.zero_()
