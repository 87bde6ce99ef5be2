"""Forms in which ascent and training share their passes: FreeLB and "free" adversarial training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from embattle.perturb.blocks import Block
from embattle.objectives.carry import add_up, carry, leaves
from embattle.objectives.batch import Batch
from embattle.perturb.stage import Evaluation


def free(batch: Batch) -> Tensor:
    """FreeLB (Zhu et al., ICLR 2020, algorithm 1): gradients averaged over the ascent steps.

    `g = 1/K sum_t grad L(x + delta_t)` for t = 0 .. K-1, with delta moved between, so that K steps
    take K passes. Start with `random_start=BoxStart(PerDim(eps))`, mode "same" for the same dropout
    masks in all steps. The authors' code differs: a magnitude of its own for the start, no
    projection at eps = 0 (here: `eps=math.inf`), a shared norm over padding (here: give the mask).
    `lam` and the masking are not used.
    """
    return _passes(batch, batch.attack.steps, None)


class FreeAT:
    """Free adversarial training (Shafahi et al., NeurIPS 2019, algorithm 1).

    Every call is one replay: one pass gives the gradients of the weights and moves the delta, which
    lives on to the next call (and the next batch, where shapes agree). Call the objective m times
    for each batch, with an optimiser step after each. The attack's step size should be its eps, as
    in the paper; `steps` is not used.
    """

    def __init__(self) -> None:
        self.deltas: list[Tensor] = []

    def __call__(self, batch: Batch) -> Tensor:
        loss = _passes(batch, 1, self.deltas)
        self.deltas = [block.delta.detach() for block in batch.stage.blocks]
        return loss


def _passes(batch: Batch, count: int, kept: list[Tensor] | None) -> Tensor:
    """Make `count` passes that give weight and delta gradients alike, moving the delta after each.

    Args:
        batch: the batch.
        count: passes.
        kept: deltas to start from where the shapes agree; then the last pass moves them too.
    """
    stage, attack = batch.stage, batch.attack
    if attack.ascend != "loss":
        raise ValueError(f"this form ascends the loss itself, not ascend={attack.ascend!r}")
    if count < 1:
        raise ValueError(f"this form needs an attack with steps, not {attack!r}")
    if not torch.is_grad_enabled():
        raise RuntimeError("this form computes gradients: not under torch.no_grad()")
    generator = attack.own_generator()
    states: list[dict[str, Any]] = []

    def start(block: Block) -> None:
        states.append(attack.begin(block, batch.scale))
        attack.start(block, states[-1], generator)
        place = len(states) - 1
        usable = kept and place < len(kept) and not block.coupled
        if kept and usable and kept[place].shape == block.delta.shape:
            block.set(kept[place])

    total: list[Tensor | None] = []
    params: list[Tensor] = []
    losses: list[Tensor] = []
    evaluation: Evaluation | None = None
    stage.remember_random_state()
    # The weights of a plain lookup get their gradient in one go, from the sum over the passes.
    plain = stage.plain
    try:
        opening = stage.open(attach=plain, start=start)
        for number in range(count):
            # Training passes: dropout, batch norm and random state are the model's own business.
            if number == 0 and opening.perturbed:
                evaluation = opening.evaluation
            else:
                evaluation = stage.evaluate(
                    grad=True, lookups="detached" if plain else "fresh", detach=plain
                )
            mean = evaluation.losses.mean()
            if not params:
                deltas = [block.delta for block in stage.blocks]
                params = [p for p in leaves(mean) if not any(p is d for d in deltas)]
            deltas = [block.delta for block in stage.blocks]
            # A share of the mean is differentiated, so that the sum is the average as it is.
            grads = torch.autograd.grad(mean / count, [*deltas, *params], allow_unused=True)
            steps = [None if g is None else g * count for g in grads[: len(deltas)]]
            total = add_up(total, grads)
            losses.append(mean.detach())
            if number < count - 1 or kept is not None:
                values = attack.values_of(stage, batch.judge, evaluation.detach())
                for block, grad, state in zip(stage.blocks, steps, states, strict=True):
                    attack.step(
                        block,
                        torch.zeros_like(block.delta) if grad is None else grad,
                        state,
                        number,
                        values,
                    )
    finally:
        stage.rest()
    assert evaluation is not None
    batch.report("adversarial", evaluation)
    batch.metrics["ascent_losses"] = torch.stack(losses)
    sources: list[Tensor] = []
    places: list[Tensor | None] = []
    if plain:
        for block, one in zip(stage.blocks, total, strict=False):
            found = [stage.calls[site][call].source for site, call in block.places]
            spread = block.spread(torch.zeros_like(block.delta) if one is None else one)
            sources.extend(found)
            places.extend(g.to(s.dtype) for g, s in zip(spread, found, strict=True))
    value = torch.stack(losses).mean()
    return carry(value, [*sources, *params], [*places, *total[len(stage.blocks) :]])
