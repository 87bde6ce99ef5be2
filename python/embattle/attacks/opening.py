"""The pass that opens an attack, and what the first step can take from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from embattle.criteria import Criterion
from embattle.criteria.base import ascended
from embattle.perturb.blocks import Block
from embattle.perturb.evaluation import Evaluation
from embattle.perturb.stage import Stage

if TYPE_CHECKING:
    from embattle.attacks.base import Attack


@dataclass
class Opened:
    """What is known of the first start.

    Attributes:
        clean: the evaluation without perturbation, detached; None where nobody needs it.
        first: evaluation (detached) and gradients at the first start.
        graph: the evaluation at the first start, with its graph.
        states: what the attack keeps for each block, where the first start is drawn already.
    """

    clean: Evaluation | None = None
    first: tuple[Evaluation, list[Tensor]] | None = None
    graph: Evaluation | None = None
    states: list[dict[str, Any]] | None = None

    def look(
        self, stage: Stage, goal: Criterion, *, gradient: bool = True
    ) -> tuple[Evaluation, list[Tensor]]:
        """Evaluate the current deltas, with the gradients there (or zeros); both detached."""
        if self.first is not None:
            return self.first
        if not gradient:
            seen = stage.evaluate(grad=False, lookups="detached").detach()
            return seen, [torch.zeros_like(block.delta) for block in stage.blocks]
        at = self.graph
        if at is None:
            at = stage.evaluate(grad=True, lookups="detached", detach=True)
        grads = stage.gradients(ascended(goal, at, self.clean))
        return at.detach(), grads

    def after(self) -> Opened:
        """Give what is still known after the first step: the clean evaluation."""
        return Opened(self.clean)


def open_attack(
    attack: Attack,
    stage: Stage,
    goal: Criterion,
    generator: torch.Generator | None,
    scale: float,
    *,
    clean: bool,
) -> Opened:
    """Make the first pass of an attack.

    From zero it is the clean pass and the first step's pass in one. From a random start it is a
    clean pass if one is needed, and otherwise the first step's pass.

    Args:
        attack: the attack.
        stage: of the batch; attacking.
        goal: what is ascended.
        generator: of the attack's random numbers.
        scale: factor on the strengths.
        clean: the clean evaluation is needed.
    """
    if attack.starts_at_zero and attack.steps > 0:
        evaluation = stage.open(attach=True).evaluation
        goal.check(evaluation)
        at = evaluation.detach()
        grads = stage.gradients_at_zero(ascended(goal, evaluation, at))
        return Opened(at, first=None if grads is None else (at, grads))
    if clean or not attack.climbs:
        evaluation = stage.open().evaluation.detach()
        goal.check(evaluation)
        return Opened(evaluation)
    states: list[dict[str, Any]] = []

    def start(block: Block) -> None:
        states.append(attack.begin(block, scale))
        attack.start(block, states[-1], generator)

    drawn = None if generator is None else generator.get_state()
    opening = stage.open(start=start)
    goal.check(opening.evaluation)
    if opening.perturbed:
        return Opened(graph=opening.evaluation, states=states)
    if generator is not None and drawn is not None:
        generator.set_state(drawn)  # the search draws the starts anew
    return Opened()
