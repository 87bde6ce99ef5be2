"""The worst that an attack has found so far."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from embattle.attacks.judge import Judge
from embattle.perturb.stage import Evaluation, Stage


@dataclass
class Best:
    """The worst-case deltas so far: per sample, or per batch where samples share a delta."""

    values: Tensor
    evaluation: Evaluation
    fooled: Tensor | None
    deltas: list[Tensor]


def better(stage: Stage, best: Best | None, values: Tensor, now: Evaluation, judge: Judge) -> Best:
    """Take over, sample by sample, what is worse for the model than the best so far.

    A fooled sample outranks one that is not; otherwise the larger value wins.
    """
    fooled = judge.fooled(now)
    if best is None:
        return Best(values, now, fooled, [block.delta.detach().clone() for block in stage.blocks])
    wins = values > best.values
    if fooled is not None and best.fooled is not None:
        if not any(block.coupled for block in stage.blocks):
            wins = torch.where(fooled == best.fooled, wins, fooled)
        fooled = torch.where(wins, fooled, best.fooled)
    old = best.evaluation
    outputs = now.outputs
    if outputs is not None and old.outputs is not None:
        outputs = torch.where(wins.reshape(-1, *[1] * (outputs.dim() - 1)), outputs, old.outputs)
    return Best(
        torch.where(wins, values, best.values),
        Evaluation(torch.where(wins, now.losses, old.losses), outputs),
        fooled,
        [
            torch.where(block.per_row(wins), block.delta.detach(), delta)
            for block, delta in zip(stage.blocks, best.deltas, strict=True)
        ],
    )
