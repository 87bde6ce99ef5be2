"""The first pass of an attack, and what the first step can take from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from embattle.criteria import Criterion
from embattle.criteria.base import ascended
from embattle.perturb.attacked_batch import AttackedBatch
from embattle.perturb.evaluation import Evaluation
from embattle.perturb.perturbation import Perturbation

if TYPE_CHECKING:
    from embattle.attacks.base import Attack


class Iterate(NamedTuple):
    """An iterate of the search.

    Attributes:
        at: what the loss function returned; perhaps with a graph, which is of no use any more.
        values: what is ascended, `[B]`, detached.
        grads: of each perturbation, of its delta's shape, detached.
    """

    at: Evaluation
    values: Tensor
    grads: list[Tensor]


@dataclass
class FirstPass:
    """What the first pass gave for the first step.

    Attributes:
        clean: the evaluation without perturbation, detached; None where it is not needed.
        start: the iterate at the first start.
        graph: the evaluation at the first start, with its graph.
        states: what the attack keeps for each perturbation, where the first start is drawn already.
    """

    clean: Evaluation | None = None
    start: Iterate | None = None
    graph: Evaluation | None = None
    states: list[dict[str, Any]] | None = None

    def evaluate(
        self, batch: AttackedBatch, goal: Criterion, *, gradient: bool = True, mark: bool = True
    ) -> Iterate:
        """Evaluate the current deltas, with the gradients there (or zeros).

        Args:
            batch: the batch.
            goal: what is ascended.
            gradient: whether gradients are needed.
            mark: record which groups have a gradient other than zero.
        """
        if self.start is not None:
            return self.start
        if not gradient:
            at = batch.evaluate(grad=False, lookups="detached")
            zeros = [torch.zeros_like(p.delta) for p in batch.perturbations]
            return Iterate(at, ascended(goal, at, self.clean).detach(), zeros)
        graph = self.graph
        if graph is None:
            graph = batch.evaluate_for_gradients()
        values = ascended(goal, graph, self.clean)
        return Iterate(graph, values.detach(), batch.gradients(values, mark=mark))

    def after(self) -> FirstPass:
        """Return what holds after the first step, too: the clean evaluation."""
        return FirstPass(self.clean)


def run_first_pass(
    attack: Attack,
    batch: AttackedBatch,
    goal: Criterion,
    generator: torch.Generator | None,
    scale: float,
    *,
    clean: bool,
) -> FirstPass:
    """Run the first pass of an attack.

    From zero it is the clean pass and the first step's pass in one. From a random start it is a
    clean pass if one is needed, and otherwise the first step's pass.

    Args:
        attack: the attack.
        batch: the batch, inside `attacking`.
        goal: what is ascended.
        generator: of the attack's random numbers.
        scale: factor on the strengths.
        clean: the clean evaluation is needed.
    """
    if attack.starts_at_zero and attack.steps > 0:
        evaluation = batch.record(attach=True).evaluation
        goal.check(evaluation)
        at = evaluation.detach()
        values = ascended(goal, evaluation, at)
        grads = batch.gradients_at_zero(values)
        return FirstPass(at, start=None if grads is None else Iterate(at, values.detach(), grads))
    if clean or not attack.uses_gradient:
        evaluation = batch.record().evaluation.detach()
        goal.check(evaluation)
        _check_without_steps(attack, batch, goal, evaluation)
        return FirstPass(evaluation)
    states: list[dict[str, Any]] = []

    def start(perturbation: Perturbation) -> None:
        states.append(attack.begin(perturbation, scale))
        attack.start(perturbation, states[-1], generator)

    drawn = None if generator is None else generator.get_state()
    recorded = batch.record(start=start)
    goal.check(recorded.evaluation)
    _check_without_steps(attack, batch, goal, None)
    if recorded.perturbed:
        return FirstPass(graph=recorded.evaluation, states=states)
    if generator is not None and drawn is not None:
        generator.set_state(drawn)  # the search draws the starts again
    return FirstPass()


def _check_without_steps(
    attack: Attack, batch: AttackedBatch, goal: Criterion, clean: Evaluation | None
) -> None:
    if not (attack.uses_gradient and attack.steps):
        batch.check_without_steps(
            lambda at: ascended(goal, at, at.detach() if clean is None else clean)
        )
