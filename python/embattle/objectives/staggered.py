"""Staggered replays: robust training in which no pass is added to those of plain training."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from embattle import checks
from embattle.attacks.base import Attack
from embattle.criteria.base import ascended
from embattle.errors import InputError
from embattle.objectives.batch import Batch, Samples
from embattle.objectives.kept_deltas import KeptDeltas
from embattle.objectives.moving import Moving, Place, add, carries, put
from embattle.objectives.parts import Parts
from embattle.perturb.build_perturbations import perturbation_of_call
from embattle.perturb.calls import Call
from embattle.perturb.chosen import run_moved
from embattle.perturb.evaluation import Evaluation
from embattle.perturb.hook import Addition
from embattle.perturb.perturbation import Perturbation, total


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
    `FGSM`. The loss is that of `Partial`: `lam` weighs a replayed sample against a new one. A
    masked sample's delta stays where it is.

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
        self.share = checks.real("StaggeredReplays", "share", share, 0, 1)
        self.reset()

    def __repr__(self) -> str:
        return f"StaggeredReplays(visits={self.visits})"

    def reset(self) -> None:
        """Forget the samples that await another visit, where an epoch is left early."""
        self._samples: list[int] = []  # those that come again in the next batch
        self._seen: list[int] = []  # how often they came
        # What is kept of them at each place; None until the gradient there has moved the deltas.
        self._kept: list[Place | None] = []
        self._nonfinite: list[Tensor] = []
        self._without: list[Tensor] = []

    def __call__(self, batch: Batch) -> Tensor:
        """Run the training pass, and let its `backward()` move the deltas.

        Returns:
            The mean loss of all rows, to be backpropagated once before the next call.

        Raises:
            InputError: samples that do not fit those of the batch before; or attack or sites that
                this form cannot have.
            RuntimeError: the loss of the call before was not backpropagated.
        """
        return self.parts(batch).summed.mean()

    def parts(self, batch: Batch) -> Parts:
        """Do the same; nothing is averaged.

        The gradient must reach the perturbed outputs, also in `PerSampleClipper.backward`: with
        clipping, their modules must be trained.
        """
        attacked, attack = batch.attacked, batch.attack
        _refuse(batch)
        samples = _checked(batch.samples)
        kept = self._moved()
        numbers = self._numbers(samples)
        replayed = [row for row, sample in enumerate(samples) if sample in numbers]
        generator = attack.own_generator()
        moving: list[Moving] = []
        outputs: list[Tensor] = []
        edges: list[GradientEdge] = []

        def begin(index: int, number: int, call: Call) -> Addition:
            perturbation = perturbation_of_call(
                attacked.sites[index], call, (index, number), attacked.geometry
            )
            _refuse_perturbation(perturbation, samples)
            state = attack.begin(perturbation, batch.scale)
            attack.start(perturbation, state, generator)
            place = len(moving)
            moving.append(Moving(perturbation, state))
            if replayed and place < len(kept):
                again = [samples[row] for row in replayed]
                put(attack, moving[-1], kept[place], replayed, [numbers[s] for s in again], again)
            perturbation.delta = perturbation.delta.detach()
            return partial(add, outputs, edges, perturbation)

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
        attacked.check_graph(losses, outputs)
        self._report(batch, evaluation, replayed)
        goal = attack.goal(batch.criterion)
        ascent = ascended(goal, evaluation, None)
        self._await(batch, samples, numbers, moving, edges, losses, ascent)
        batch.frozen = True  # what `backward()` finds is reported by the next call
        rows = torch.tensor(replayed, dtype=torch.int64, device=losses.device)
        masked = None
        if replayed:
            masked = batch.weights(evaluation.select(rows), None, rows)
        for recorded in calls:
            for call in recorded:
                call.release()
        return Parts.of_rows(losses, rows, masked, batch.lam)

    def _numbers(self, samples: Sequence[int]) -> dict[int, int]:
        """Return the places, among those kept, of the samples that are visited again."""
        missing = set(self._samples).difference(samples)
        if missing and self.share == 1:
            raise InputError(
                f"StaggeredReplays: sample {min(missing)} awaits another visit and is not in this "
                "batch: take the batches of StaggeredBatches with the same visits in their order; "
                "or call reset() on the form where an epoch is left early"
            )
        return {s: number for number, s in enumerate(self._samples) if s not in missing}

    def _moved(self) -> list[Place]:
        """Return the deltas, which the call before has moved.

        Raises:
            RuntimeError: it has not.
        """
        moved = [kept for kept in self._kept if kept is not None]
        if len(moved) != len(self._kept):
            raise RuntimeError(
                "StaggeredReplays: the loss of the call before gave no gradient at the embeddings. "
                "Call loss.backward() once after each call; the losses must depend on all sites"
            )
        return moved

    def _await(
        self,
        batch: Batch,
        samples: list[int],
        numbers: dict[int, int],
        moving: list[Moving],
        edges: list[GradientEdge],
        losses: Tensor,
        ascent: Tensor,
    ) -> None:
        """Let the coming `backward()` move the deltas of the samples that come again."""
        seen = [self._seen[numbers[s]] + 1 if s in numbers else 1 for s in samples]
        again = [row for row, count in enumerate(seen) if count < self.visits]
        self.reset()
        if not again:
            return
        self._samples, self._seen = [samples[r] for r in again], [seen[r] for r in again]
        self._kept = [None] * len(moving)
        rows = torch.tensor(again, device=losses.device)
        values = ascent.detach()
        # A hook that held the batch would keep its graph until the garbage collector comes.
        moves = [
            partial(self._move, self._kept, place, batch.attack, one, values, rows)
            for place, one in enumerate(moving)
        ]
        if ascent is losses:
            for move, edge in zip(moves, edges, strict=True):
                edge.node.register_prehook(move)
            return
        # What trains is not what is ascended: its gradient is computed by itself, right away.
        grads = torch.autograd.grad(ascent.mean(), edges, retain_graph=True, allow_unused=True)
        for move, grad in zip(moves, grads, strict=True):
            move((grad,))

    @torch.no_grad()
    def _move(
        self,
        kept: list[Place | None],
        place: int,
        attack: Attack,
        moving: Moving,
        values: Tensor,
        rows: Tensor,
        arrived: Sequence[Tensor | None],
    ) -> None:
        """Make the attack's step with the gradient that has arrived at an output."""
        if kept is not self._kept or kept[place] is not None:
            return  # backpropagated again, or after `reset`
        perturbation, state = moving
        # The loss is a mean. Another factor (of a gradient scaler) does not matter to the step.
        (grad,) = arrived
        if grad is None:
            grad = torch.zeros_like(perturbation.additions()[0])
        grad = perturbation.gather([grad]).to(perturbation.delta.dtype) * len(values)
        perturbation.mark_gradients(grad)
        attack.step(perturbation, grad, state, 0, values)
        perturbation.delta = perturbation.delta.detach()
        carried = {key: KeptDeltas.take(perturbation, rows, state[key]) for key in carries(attack)}
        kept[place] = Place(KeptDeltas.take(perturbation, rows), carried)
        self._nonfinite.append(perturbation.nonfinite.count_nonzero())
        self._without.append(perturbation.count_without_gradient())

    def _report(self, batch: Batch, evaluation: Evaluation, replayed: Sequence[int]) -> None:
        """Record the losses and accuracies of first and later visits, and the last step's faults.

        The faults are of the call before, whose gradients came after it.
        """
        first = sorted(set(range(evaluation.batch)).difference(replayed))
        for name, rows in (("clean", first), ("adversarial", replayed)):
            if rows:
                batch.report(name, evaluation, torch.tensor(rows, device=evaluation.device))
        batch.metrics["replayed"] = torch.tensor(len(replayed))
        if self._nonfinite:
            batch.metrics["nonfinite"] = total(self._nonfinite)
            batch.metrics["zero_gradient"] = total(self._without)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state that a resumed run needs: the samples that come again, and their deltas.

        Raises:
            RuntimeError: between a call and its `backward()`.
        """
        state = {
            "samples": torch.tensor(self._samples, dtype=torch.int64),
            "seen": torch.tensor(self._seen, dtype=torch.int64),
        }
        for place, (deltas, carried) in enumerate(self._moved()):
            for key, kept in {"": deltas, **carried}.items():
                state[f"{place}.{key}{'.' if key else ''}rows"] = kept.rows.clone()
                state[f"{place}.{key}{'.' if key else ''}lengths"] = kept.lengths.clone()
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore a state."""
        self.reset()
        self._samples, self._seen = state["samples"].tolist(), state["seen"].tolist()
        found: dict[int, dict[str, KeptDeltas]] = {}
        for name in state:
            if name.endswith(".rows"):
                place, *key = name.removesuffix(".rows").split(".")
                lengths = state[name.removesuffix("rows") + "lengths"]
                found.setdefault(int(place), {})[".".join(key)] = KeptDeltas(
                    state[name].clone(), lengths.clone()
                )
        for _, parts in sorted(found.items()):
            self._kept.append(Place(parts.pop(""), parts))


def _refuse(batch: Batch) -> None:
    """Refuse what this form cannot have, or would pass over."""
    attacked, attack = batch.attacked, batch.attack
    if not torch.is_grad_enabled():
        raise RuntimeError("StaggeredReplays: computes gradients: not under torch.no_grad()")
    for wrong, words in (
        (attack.carries is None, f"{attack!r}, which is more than steps along gradients"),
        (
            attack.goal(batch.criterion).needs_clean,
            f"{batch.criterion!r}, which measures from clean outputs",
        ),
        (attacked.joint, "joint=True"),
        (attacked.compile, "compile=True"),
        (
            any(site.scope != "output" for site in attacked.sites),
            "a site of scope 'row' or 'weight', whose deltas the samples share",
        ),
    ):
        if wrong:
            raise InputError(f"StaggeredReplays: cannot have {words}; use form='freeat' or 'mixed'")


def _refuse_perturbation(perturbation: Perturbation, samples: Sequence[int]) -> None:
    if perturbation.coupled:
        raise InputError(
            "StaggeredReplays: cannot have an output that all samples share (samples=None)"
        )
    if perturbation.samples != len(samples):
        raise InputError(
            f"StaggeredReplays: {len(samples)} indices in samples for {perturbation.samples} "
            "samples in the batch: give one for each"
        )


def _checked(samples: Samples) -> list[int]:
    """Return the indices of a batch's samples."""
    if samples is None or isinstance(samples, int):
        raise InputError(
            "StaggeredReplays: needs the indices of the batch's samples: "
            "objective(loss_fn, samples=indices), as StaggeredBatches gives them"
        )
    found = samples.tolist() if isinstance(samples, Tensor) else list(samples)
    if not all(type(one) is int and one >= 0 for one in found):
        found = [checks.integer("StaggeredReplays", "each of samples", one, 0) for one in found]
    if len(set(found)) < len(found):
        raise InputError("StaggeredReplays: a sample is twice in the batch: samples must differ")
    return found
