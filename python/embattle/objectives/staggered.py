"""Staggered replays: robust training in which no pass is added to those of plain training."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.graph import GradientEdge

from embattle import checks
from embattle.criteria.base import ascended
from embattle.errors import InputError
from embattle.objectives.batch import Batch, Samples
from embattle.objectives.kept_deltas import KeptDeltas
from embattle.objectives.moving import Again, Moved, Moving, Output, Place
from embattle.objectives.parts import Parts, mean_of_rows
from embattle.objectives.rows import Rows
from embattle.perturb.build_perturbations import perturbation_of_call
from embattle.perturb.calls import Call
from embattle.perturb.chosen import run_moved
from embattle.perturb.evaluation import Evaluation
from embattle.perturb.hook import Addition
from embattle.perturb.perturbation import Perturbation, total

_NONE: NDArray[np.int64] = np.empty(0, dtype=np.int64)


class StaggeredReplays:
    """Each sample comes `visits` times in a row, and its delta moves with each visit's gradient.

    A form for `AdversarialObjective`. The first visit is clean (or at the attack's random start).
    The `backward()` that trains the weights gives the gradient at the embeddings, too; the attack's
    step moves the deltas of the samples that come again with it, and the next batch holds these
    samples under their new deltas. A step thus makes one forward and one backward pass, those of
    plain training; an epoch of `visits` visits takes the time of that many plain ones. As in free
    adversarial training (Shafahi et al., NeurIPS 2019), which repeats whole batches instead.

    `StaggeredBatches` makes the batches; the objective needs `samples=`, their indices. Of the
    attack, norm, eps, start, step size, momentum and box count (`steps` for the default step size
    alone); with `visits=2` the step should reach the border of the ball, as that of `FGM` and
    `FGSM`. The loss is that of `Partial`: `lam` weighs a replayed sample against a new one. The
    gradient of a masked sample is zero: its delta stays where it is, unless momentum carries it on.
    A sample must have the same input at each of its visits.

    Call `skip()` where a loss is not backpropagated.

    A criterion that ascends something else than the losses takes a backward pass to the embeddings
    more in each step; one that measures from clean outputs cannot be had.

    Args:
        visits: how often each sample comes in a row; 1 is plain training.
        share: of the new samples, how many come again, as `StaggeredBatches` has it. Below 1 a
            sample that stays away is forgotten instead of missed.

    Raises:
        TypeError, ValueError: about an argument.
    """

    name: ClassVar[str] = "staggered"

    def __init__(self, visits: int = 2, *, share: float = 1.0) -> None:
        self.visits = checks.integer("StaggeredReplays", "visits", visits, 1)
        self.share = checks.share("StaggeredReplays", "share", share)
        self.reset()

    def __repr__(self) -> str:
        return f"StaggeredReplays(visits={self.visits})"

    def reset(self) -> None:
        """Forget the samples that await another visit, where an epoch is left early.

        Only before the next epoch begins: within one their visits are still to come.
        """
        self._samples, self._seen = _NONE, _NONE  # those that come again, and how often they came
        # What is kept of them at each place; None until the gradient there has moved the deltas.
        self._kept: list[Place | None] = []
        self._faults: list[Moved] = []
        # What the coming gradient moves, and which rows of it; None where it has.
        self._moving: list[Moving | None] = []
        self._rows = Rows(range(0))

    def skip(self) -> None:
        """Leave the step of the last call out, whose loss was not backpropagated.

        It was not finite, say. The samples that come again then do so under the deltas they had.
        """
        for place, one in enumerate(self._moving):
            if one is not None:
                self._kept[place] = one.unmoved(self._rows)
        self._moving = []

    def __call__(self, batch: Batch) -> Tensor:
        """Run the training pass, and let its `backward()` move the deltas.

        Returns:
            The mean loss of all rows, to be backpropagated once before the next call.

        Raises:
            InputError: samples that do not fit those of the batch before; or attack or sites that
                this form cannot have.
            RuntimeError: the loss of the call before was not backpropagated.
        """
        losses, rows, kept = self._run(batch)
        return mean_of_rows(losses, rows.key(losses.device), kept, batch.lam)

    def parts(self, batch: Batch) -> Parts:
        """Do the same; nothing is averaged.

        The gradient must reach the perturbed outputs, also in `PerSampleClipper.backward`.
        """
        losses, rows, kept = self._run(batch)
        return Parts.of_rows(losses, rows.index(losses.device), kept, batch.lam)

    def _run(self, batch: Batch) -> tuple[Tensor, Rows, Tensor | None]:
        """Run the training pass: losses `[B]`, the rows that came again, and their masking."""
        attacked, attack = batch.attacked, batch.attack
        _refuse(batch)
        samples = _checked(batch.samples)
        kept = self._moved()
        again = self._again(samples)
        generator = attack.own_generator()
        moving: list[Moving] = []
        outputs: list[Output] = []

        def begin(index: int, number: int, call: Call) -> Addition:
            perturbation = perturbation_of_call(
                attacked.sites[index], call, (index, number), attacked.geometry
            )
            _refuse_perturbation(perturbation, len(samples))
            state = attack.begin(perturbation, batch.scale)
            attack.start(perturbation, state, generator)
            one = Moving(attack, perturbation, call, state, whole=batch.masking is not None)
            if len(again.rows) and len(moving) < len(kept):
                one.take_up(kept[len(moving)], again)
            moving.append(one)
            return partial(one.add, outputs)

        evaluation, calls = run_moved(attacked, begin)
        attacked.geometry.finish(calls)
        if not all(calls):
            raise RuntimeError(
                "StaggeredReplays: the embeddings are not seen in the training pass: give the "
                "model uncompiled, and sites that it calls"
            )
        if kept and len(kept) != len(moving):
            raise RuntimeError(
                f"StaggeredReplays: {len(moving)} outputs are perturbed, and {len(kept)} were in "
                "the call before"
            )
        attacked.perturbed.calls = calls
        attacked.perturbed.perturbations = [one.perturbation for one in moving]
        attacked.size = evaluation.batch
        if evaluation.batch != len(samples):
            raise InputError(
                f"StaggeredReplays: {len(samples)} indices in samples for {evaluation.batch} losses"
            )
        losses = batch.losses(evaluation)
        attacked.check_graph(losses, [one.value for one in outputs])
        self._report(batch, evaluation, again.rows)
        goal = attack.goal(batch.criterion)
        ascent = ascended(goal, evaluation, None)
        self._await(samples, again, moving, [one.edge for one in outputs], losses, ascent)
        batch.frozen = True  # what `backward()` finds is reported by the next call
        masked = None
        if len(again.rows) and batch.masking is not None:
            rows = again.rows.index(losses.device)
            masked = batch.weights(evaluation.select(rows), None, rows)
        for recorded in calls:
            for call in recorded:
                call.release()
        return losses, again.rows, masked

    def _again(self, samples: NDArray[np.int64]) -> Again:
        """Find the samples of a batch that come again among those kept."""
        rows, numbers = _places(samples, self._samples)
        if len(rows) < len(self._samples) and self.share == 1:
            missing = np.setdiff1d(self._samples, samples).min()
            raise InputError(
                f"StaggeredReplays: sample {missing} awaits another visit and is not in this "
                "batch: take the batches of StaggeredBatches with the same visits in their order; "
                "or call reset() on the form where an epoch is left early"
            )
        return Again(rows, numbers, samples)

    def _moved(self) -> list[Place]:
        """Return the deltas, which the call before has moved.

        Raises:
            RuntimeError: it has not.
        """
        moved = [kept for kept in self._kept if kept is not None]
        if len(moved) != len(self._kept):
            raise RuntimeError(
                "StaggeredReplays: the loss of the call before gave no gradient at the embeddings. "
                "Call loss.backward() once after each call, or skip() on the form where a step is "
                "left out; the losses must depend on all sites"
            )
        return moved

    def _await(
        self,
        samples: NDArray[np.int64],
        again: Again,
        moving: list[Moving],
        edges: list[GradientEdge],
        losses: Tensor,
        ascent: Tensor,
    ) -> None:
        """Let the coming `backward()` move the deltas of the samples that come again."""
        seen = np.ones_like(samples)
        if self.visits == 2:  # those that are new
            rows = again.rows.rest(len(samples))
        else:
            seen[again.rows.array_key] += self._seen[again.numbers.array_key]
            rows = Rows.where(seen < self.visits)
        self.reset()
        if not len(rows):
            return
        self._samples, self._seen = samples[rows.array_key], seen[rows.array_key]
        self._kept = [None] * len(moving)
        self._moving, self._rows = list(moving), rows
        # A hook that held the batch would keep its graph until the garbage collector comes.
        moves = [
            partial(self._move, self._kept, place, one, rows, ascent.detach())
            for place, one in enumerate(moving)
        ]
        if ascent is losses:
            for move, edge in zip(moves, edges, strict=True):
                edge.node.register_prehook(move)
            return
        # What trains is not what is ascended: its gradient is computed by itself, right away.
        grads = torch.autograd.grad(ascent.mean(), edges, retain_graph=True, allow_unused=True)
        for move, edge, grad in zip(moves, edges, grads, strict=True):
            move([None] * edge.output_nr + [grad])

    @torch.no_grad()
    def _move(
        self,
        kept: list[Place | None],
        place: int,
        moving: Moving,
        rows: Rows,
        values: Tensor,
        arrived: Sequence[Tensor | None],
    ) -> None:
        """Make the attack's step with the gradient that has arrived at an output."""
        if kept is not self._kept or kept[place] is not None:
            return  # backpropagated again, or after `reset`
        moved = moving.move(rows, values, arrived)
        kept[place], self._moving[place] = moved.place, None
        self._faults.append(moved)

    def _report(self, batch: Batch, evaluation: Evaluation, replayed: Rows) -> None:
        """Record the losses and accuracies of first and later visits, and the last step's faults.

        The faults are of the call before, whose gradients came after it.
        """
        first = replayed.rest(evaluation.batch)
        for name, rows in (("clean", first), ("adversarial", replayed)):
            if len(rows):
                batch.report(name, evaluation, rows.key(evaluation.device))
        batch.metrics["replayed"] = torch.tensor(len(replayed))
        if self._faults:
            batch.metrics["nonfinite"] = total([one.nonfinite for one in self._faults])
            batch.metrics["zero_gradient"] = total([one.without for one in self._faults])

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state that a resumed run needs: the samples that come again, and their deltas.

        Raises:
            RuntimeError: between a call and its `backward()`.
        """
        state = {
            "samples": torch.from_numpy(self._samples.copy()),
            "seen": torch.from_numpy(self._seen.copy()),
        }
        for place, (deltas, carried) in enumerate(self._moved()):
            for key, kept in {"": deltas, **carried}.items():
                for name, value in kept.state().items():
                    state[f"{place}.{key}{'.' if key else ''}{name}"] = value
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore a state."""
        self.reset()
        self._samples, self._seen = (_numpy(state[name]).copy() for name in ("samples", "seen"))
        found: dict[int, dict[str, KeptDeltas]] = {}
        for name in state:
            if name.endswith(".rows"):
                place, *key = name.removesuffix(".rows").split(".")
                lengths = state[name.removesuffix("rows") + "lengths"]
                found.setdefault(int(place), {})[".".join(key)] = KeptDeltas.of_state(
                    state[name], lengths
                )
        for _, parts in sorted(found.items()):
            self._kept.append(Place(parts.pop(""), parts))


def _refuse(batch: Batch) -> None:
    """Refuse what this form cannot have, or would pass over."""
    attacked, attack = batch.attacked, batch.attack
    if not torch.is_grad_enabled():
        raise RuntimeError("StaggeredReplays: computes gradients: not under torch.no_grad()")
    for wrong, words, instead in (
        (
            attack.carries is None,
            f"{attack!r}, which is more than steps along gradients",
            "mixed",
        ),
        (
            attack.goal(batch.criterion).needs_clean,
            f"{batch.criterion!r}, which measures from clean outputs",
            "mixed",
        ),
        (attacked.joint, "joint=True", "freeat or mixed"),
        (attacked.compile, "compile=True", "freeat or mixed"),
        (
            any(site.scope != "output" for site in attacked.sites),
            "a site of scope 'row' or 'weight', whose deltas the samples share",
            "freeat or mixed",
        ),
    ):
        if wrong:
            raise InputError(f"StaggeredReplays: cannot have {words}; use {instead}")


def _refuse_perturbation(perturbation: Perturbation, count: int) -> None:
    if perturbation.coupled:
        raise InputError(
            "StaggeredReplays: cannot have an output that all samples share (samples=None)"
        )
    if perturbation.samples != count:
        raise InputError(
            f"StaggeredReplays: {count} indices in samples for {perturbation.samples} "
            "samples in the batch: give one for each"
        )


def _checked(samples: Samples) -> NDArray[np.int64]:
    """Return the indices of a batch's samples."""
    if samples is None or isinstance(samples, int):
        raise InputError(
            "StaggeredReplays: needs the indices of the batch's samples: "
            "objective(loss_fn, samples=indices), as StaggeredBatches gives them"
        )
    found = _numpy(samples) if isinstance(samples, Tensor) else np.asarray(samples)
    whole = found.dtype.kind in "iu" and found.ndim == 1
    ordered = np.sort(found) if whole else found
    if not whole or (len(found) and ordered[0] < 0):
        for one in found.tolist() if isinstance(samples, Tensor) else samples:
            checks.integer("StaggeredReplays", "each of samples", one, 0)
    found = found.astype(np.int64, copy=False)
    if bool((ordered[1:] == ordered[:-1]).any()):
        raise InputError("StaggeredReplays: a sample is twice in the batch: samples must differ")
    return found


def _numpy(values: Tensor) -> NDArray[np.int64]:
    found: NDArray[np.int64] = values.detach().cpu().numpy()
    return found


def _places(samples: NDArray[np.int64], kept: NDArray[np.int64]) -> tuple[Rows, Rows]:
    """Find the kept samples that are in a batch: their rows there, ascending, and their numbers."""
    size, count = len(samples), len(kept)
    if np.array_equal(samples[size - count :], kept):  # the order of StaggeredBatches
        return Rows(range(size - count, size)), Rows(range(count))
    order = kept.argsort()
    numbers = order[np.searchsorted(kept, samples, sorter=order).clip(max=count - 1)]
    rows = (kept[numbers] == samples).nonzero()[0]
    return Rows(rows), Rows(numbers[rows])
