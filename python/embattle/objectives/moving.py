"""Outputs whose deltas move with the gradient that arrives there, and what is kept of samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from embattle import ops
from embattle.attacks.base import Attack
from embattle.attacks.box import box
from embattle.objectives.kept_deltas import KeptDeltas, write_packed
from embattle.objectives.rows import Rows
from embattle.perturb.calls import Call
from embattle.perturb.fresh import is_fresh
from embattle.perturb.perturbation import Perturbation


class Place(NamedTuple):
    """What is kept of the samples that come again at one output: deltas, and what steps carry."""

    deltas: KeptDeltas
    carried: dict[str, KeptDeltas]


class Again(NamedTuple):
    """Samples of a batch that come again.

    Attributes:
        rows: where they are in the batch.
        numbers: which of those kept they are, in this order.
        samples: the batch's, their indices in the data.
    """

    rows: Rows
    numbers: Rows
    samples: NDArray[np.int64]


class Moved(NamedTuple):
    """What a step gave.

    Attributes:
        place: what is kept.
        nonfinite, without: how many groups had a gradient that is not finite, or none but zero.
    """

    place: Place
    nonfinite: Tensor
    without: Tensor


class Output(NamedTuple):
    """A perturbed output, and where its gradient arrives."""

    value: Tensor
    edge: GradientEdge


class Moving:
    """An output of the batch, which the gradient that arrives there will move.

    A plain look-up that nothing else has seen has the deltas of the samples that come again added
    in place, and its other rows are left alone; other outputs have all deltas added.

    Args:
        attack: whose steps are made.
        perturbation: the output's.
        call: the call that gave it.
        state: the attack's.
        whole: the deltas of the whole batch are needed.
    """

    def __init__(
        self,
        attack: Attack,
        perturbation: Perturbation,
        call: Call,
        state: dict[str, Any],
        *,
        whole: bool,
    ) -> None:
        self.attack, self.perturbation, self.state = attack, perturbation, state
        assert call.source is not None
        self._packed = perturbation.geometry["offsets"] is not None
        self._whole = (
            whole
            or self._packed
            or perturbation.touched
            or not call.layout.plain
            or perturbation.dtype != call.value.dtype
            or not call.source.requires_grad
            or not is_fresh(call.module, call.source)
        )
        self._again: Rows | None = None
        self._old: Tensor | None = None  # of the samples that come again

    def take_up(self, kept: Place, again: Again) -> None:
        """Give samples that come again what was kept of them."""
        perturbation, rows = self.perturbation, again.rows
        for key, values in kept.carried.items():
            if key in carries(self.attack):
                self._write(self.state[key], self._fitted(values, again), rows)
        old = self._fitted(kept.deltas, again)
        if self._whole:
            self._write(perturbation.delta.detach(), old, rows)
            # The radius may be another one than at the visit before.
            perturbation.set(_projected(self.attack, perturbation, perturbation.delta, self.state))
            return
        some, state = self._some(rows)
        self._again, self._old = rows, _projected(self.attack, some, old, state)

    def _fitted(self, kept: KeptDeltas, again: Again) -> Tensor:
        return kept.of(again.numbers).fitted(self.perturbation, again.rows, again.samples)

    def _write(self, into: Tensor, values: Tensor, rows: Rows) -> None:
        if self._packed:
            write_packed(self.perturbation, rows, into, values)
        else:
            rows.write(into, values)

    def add(self, outputs: list[Output], value: Tensor) -> Tensor:
        """Make the perturbed output, and note it."""
        if not self._whole:
            if self._again is not None and self._old is not None:
                self._again.add_to(value.detach(), self._old)
        else:
            self.perturbation.delta = self.perturbation.delta.detach()
            addition = self.perturbation.additions()[0]
            if not value.requires_grad:  # the modules are not trained
                addition = addition.requires_grad_()
            value = value + addition.to(value.dtype)
        edge = get_gradient_edge(value)  # the model may change the output in place
        # Not the edge itself: a hook that holds this would be held by what it holds.
        self._number = edge.output_nr
        outputs.append(Output(value, edge))
        return value

    def move(self, rows: Rows, values: Tensor, arrived: Sequence[Tensor | None]) -> Moved:
        """Make the attack's step with the gradient that has arrived, for some samples.

        Args:
            rows: which.
            values: of the batch, `[B]`, what is ascended.
            arrived: gradients of their mean at the node of the output's edge. Another factor (of a
                gradient scaler) does not matter to the step.
        """
        attack, perturbation = self.attack, self.perturbation
        grad = arrived[self._number]
        if grad is None:
            grad = torch.zeros_like(perturbation.additions()[0])
        grad = perturbation.gather([grad]).to(perturbation.dtype)
        count = len(values)
        some, state = self._of(rows)
        if not self._packed:
            grad, values = rows.of(grad), rows.of(values)
        if not attack.uses_direction_alone:
            grad = grad * count
        some.mark_gradients(grad)
        attack.step(some, grad, state, 0, values)
        return Moved(
            self._place(some, state, rows),
            some.nonfinite.count_nonzero(),
            some.count_without_gradient(),
        )

    def unmoved(self, rows: Rows) -> Place:
        """Return what is kept of some samples where no gradient has moved them."""
        return self._place(*self._of(rows), rows)

    def _of(self, rows: Rows) -> tuple[Perturbation, dict[str, Any]]:
        """Return what is moved of some samples: of packed rows the whole batch."""
        if self._packed:
            return self.perturbation, self.state
        some, state = self._some(rows)
        self._carry_over(some, rows)
        return some, state

    def _place(self, some: Perturbation, state: dict[str, Any], rows: Rows) -> Place:
        some.delta = some.delta.detach()
        key = rows if self._packed else Rows(range(len(rows)))
        carried = {name: KeptDeltas.take(some, key, state[name]) for name in carries(self.attack)}
        return Place(KeptDeltas.take(some, key), carried)

    def _some(self, rows: Rows) -> tuple[Perturbation, dict[str, Any]]:
        """Return the perturbation of some of the samples, and the attack's state of them."""
        perturbation = self.perturbation
        key, size = rows.key(perturbation.base.device), perturbation.samples

        def of_samples(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.dim():
                return value
            if value.shape == perturbation.base.shape:
                return value[key]
            return value.reshape(size, -1)[key].reshape(-1)  # one for each group

        state = {name: of_samples(value) for name, value in self.state.items()}
        return perturbation.select(key), state

    def _carry_over(self, some: Perturbation, rows: Rows) -> None:
        """Let the deltas of samples that have come again go on from what they were."""
        common = None if self._again is None else rows.common(self._again)
        if common is not None and self._old is not None:
            mine, theirs = common
            mine.write(some.delta.detach(), theirs.of(self._old))


def carries(attack: Attack) -> tuple[str, ...]:
    """Return what the attack's steps keep beside the deltas."""
    assert attack.carries is not None  # the form saw to it
    return attack.carries


def _projected(
    attack: Attack, perturbation: Perturbation, delta: Tensor, state: dict[str, Any]
) -> Tensor:
    return ops.project(
        delta.detach(), eps=state["eps"], norm=attack.ball, **perturbation.geometry, **box(state)
    )
