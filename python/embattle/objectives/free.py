"""Forms in which ascent and training share their passes: FreeLB and "free" adversarial training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from embattle import ops
from embattle.attacks.base import box
from embattle.criteria import Criterion
from embattle.criteria.base import ascended
from embattle.objectives.batch import Batch
from embattle.objectives.carry import add_up, carry, leaves
from embattle.perturb.blocks import Block
from embattle.perturb.evaluation import Evaluation
from embattle.perturb.stage import Stage


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

    def state_dict(self) -> dict[str, Tensor]:
        """Give what a resumed run needs: the deltas, by number."""
        return {str(number): delta.clone() for number, delta in enumerate(self.deltas)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a state."""
        self.deltas = [state[str(number)].clone() for number in range(len(state))]


def _passes(batch: Batch, count: int, kept: list[Tensor] | None) -> Tensor:
    """Make `count` passes that give weight and delta gradients alike, moving the delta after each.

    Args:
        batch: the batch.
        count: passes.
        kept: deltas to start from where the shapes agree; then the last pass moves them too.
    """
    stage, attack = batch.stage, batch.attack
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
        if not kept or place >= len(kept) or block.coupled:
            return
        old = kept[place].to(block.delta.device, block.delta.dtype)
        if old.shape == block.delta.shape:
            # Another batch has another mask, and perhaps another radius.
            eps = states[-1]["eps"]
            block.set(
                ops.project(old, eps=eps, norm=attack.norm, **block.geometry, **box(states[-1]))
            )

    total: list[Tensor | None] = []
    params: list[Tensor] = []
    losses: list[Tensor] = []
    evaluation: Evaluation | None = None
    stage.remember_random_state()
    # The weights of a plain lookup get their gradient in one go, from the sum over the passes.
    plain = stage.plain
    try:
        opening = stage.open(attach=plain, start=start)
        _refuse_unused_parameters(stage)
        for number in range(count):
            # Training passes: dropout, batch norm and random state are the model's own business.
            if number == 0 and opening.perturbed:
                evaluation = opening.evaluation
            else:
                evaluation = stage.evaluate(
                    grad=True, lookups="detached" if plain else "fresh", detach=plain
                )
            losses_now = _ascends_losses(attack.goal(batch.criterion), batch, evaluation)
            mean = losses_now.mean()
            if not params:
                deltas = [block.delta for block in stage.blocks]
                params = [p for p in leaves(mean) if not any(p is d for d in deltas)]
            deltas = [block.delta for block in stage.blocks]
            stage.check_graph(losses_now, deltas)
            # A share of the mean is differentiated, so that the sum is the average as it is.
            grads = torch.autograd.grad(mean / count, [*deltas, *params], allow_unused=True)
            moves = number < count - 1 or kept is not None
            # Each sample's own gradient is count * B times that of its share of the mean.
            own = stage.of_blocks(grads[: len(deltas)], count * evaluation.batch if moves else 1)
            total = add_up(total, grads)
            losses.append(mean.detach())
            if moves:
                values = losses_now.detach()
                if stage.found.coupled:
                    values = values.sum().expand_as(values)
                for block, grad, state in zip(stage.blocks, own, states, strict=True):
                    attack.step(block, grad, state, number, values)
    finally:
        stage.rest()
    assert evaluation is not None
    batch.report("adversarial", evaluation)
    batch.metrics["ascent_losses"] = torch.stack(losses)
    sources: list[Tensor] = []
    places: list[Tensor | None] = []
    if plain:
        for block, one in zip(stage.blocks, total, strict=False):
            spread = block.spread(torch.zeros_like(block.delta) if one is None else one)
            for (site, call), grad in zip(block.places, spread, strict=True):
                source = stage.found.calls[site][call].source
                assert source is not None
                sources.append(source)
                places.append(grad.to(source.dtype))
    value = torch.stack(losses).mean()
    return carry(value, [*sources, *params], [*places, *total[len(stage.blocks) :]])


def _ascends_losses(goal: Criterion, batch: Batch, evaluation: Evaluation) -> Tensor:
    losses = batch.losses(evaluation)
    if goal.needs_clean or ascended(goal, evaluation, None) is not losses:
        raise ValueError(
            f"this form trains on what it ascends, the losses; {goal!r} ascends something else"
        )
    return losses


def _refuse_unused_parameters(stage: Stage) -> None:
    if any(call.unused_parameters for recorded in stage.found.calls for call in recorded):
        raise RuntimeError(
            "this form trains in the attack's passes, which DistributedDataParallel with "
            "find_unused_parameters=True does not allow: it waits for gradients that never come; "
            "use find_unused_parameters=False, or form='mixed'"
        )
