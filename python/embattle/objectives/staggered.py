"""Staggered replays: robust training in which no pass is added to those of plain training."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from embattle import checks, ops
from embattle.attacks.base import Attack, box
from embattle.errors import InputError
from embattle.objectives.batch import Batch, Samples
from embattle.objectives.free import ascended_losses
from embattle.objectives.kept_deltas import KeptDeltas
from embattle.perturb.evaluation import Evaluation
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
    attack, norm, eps, start, step size and box count (`steps` for the default step size alone);
    with `visits=2` the step should reach the border of the ball, as that of `FGM` and `FGSM`.
    `lam` is not used.

    Args:
        visits: how often each sample comes in a row; 1 is plain training.

    Raises:
        TypeError, ValueError: about `visits`.
    """

    name: ClassVar[str] = "staggered"

    def __init__(self, visits: int = 2) -> None:
        self.visits = checks.integer("StaggeredReplays", "visits", visits, 1)
        self.reset()

    def __repr__(self) -> str:
        return f"StaggeredReplays(visits={self.visits})"

    def reset(self) -> None:
        """Forget the samples that await another visit, where an epoch is left early."""
        self._samples: list[int] = []  # those that come again in the next batch
        self._seen: list[int] = []  # how often they came
        # Their deltas at each place; None until `backward()` has moved them.
        self._kept: list[KeptDeltas | None] = []
        self._nonfinite: list[Tensor] = []
        self._without: list[Tensor] = []

    def __call__(self, batch: Batch) -> Tensor:
        """Run the training pass, and let its `backward()` move the deltas.

        Returns:
            The mean loss of all rows, to be backpropagated once before the next call.

        Raises:
            InputError: samples that do not fit those of the batch before; or attack, sites or
                masking that this form cannot have.
            RuntimeError: the loss of the call before was not backpropagated.
        """
        attacked, attack = batch.attacked, batch.attack
        _refuse(batch)
        samples = _checked(batch.samples)
        kept = self._moved()
        numbers = self._numbers(samples)
        replayed = [row for row, sample in enumerate(samples) if sample in numbers]
        generator = attack.own_generator()
        states: list[dict[str, Any]] = []

        def start(perturbation: Perturbation) -> None:
            place = len(states)
            _refuse_perturbation(perturbation, samples)
            states.append(attack.begin(perturbation, batch.scale))
            attack.start(perturbation, states[-1], generator)
            if not replayed or place >= len(kept):
                return
            device = perturbation.base.device
            again = [samples[row] for row in replayed]
            delta = kept[place].put(
                perturbation,
                torch.tensor(replayed, device=device),
                torch.tensor([numbers[sample] for sample in again], device=device),
                again,
            )
            # The radius may be another one than at the visit before.
            eps = states[-1]["eps"]
            perturbation.set(
                ops.project(
                    delta, eps=eps, norm=attack.norm, **perturbation.geometry, **box(states[-1])
                )
            )

        recorded = attacked.record(start=start)
        if not recorded.perturbed:
            raise RuntimeError(
                "StaggeredReplays: the embeddings are not seen in the training pass: give the "
                "model uncompiled"
            )
        if kept and len(kept) != len(states):
            raise RuntimeError(
                f"StaggeredReplays: {len(states)} outputs are perturbed, and {len(kept)} were in "
                "the call before"
            )
        losses = ascended_losses(attack.goal(batch.criterion), batch, recorded.evaluation)
        attacked.check_graph(losses, [p.delta for p in attacked.perturbations])
        self._report(batch, recorded.evaluation, replayed)
        self._await(batch, samples, numbers, states, losses.detach())
        batch.frozen = True  # what `backward()` finds is reported by the next call
        return losses.mean()

    def _numbers(self, samples: Sequence[int]) -> dict[int, int]:
        """Return the places, among those kept, of the samples that are visited again."""
        missing = set(self._samples).difference(samples)
        if missing:
            raise InputError(
                f"StaggeredReplays: sample {min(missing)} awaits another visit and is not in this "
                "batch: take the batches of StaggeredBatches with the same visits in their order; "
                "or call reset() on the form where an epoch is left early"
            )
        return {sample: number for number, sample in enumerate(self._samples)}

    def _moved(self) -> list[KeptDeltas]:
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
        states: list[dict[str, Any]],
        losses: Tensor,
    ) -> None:
        """Let the coming `backward()` move the deltas of the samples that come again."""
        seen = [self._seen[numbers[s]] + 1 if s in numbers else 1 for s in samples]
        again = [row for row, count in enumerate(seen) if count < self.visits]
        self.reset()
        if not again:
            return
        self._samples, self._seen = [samples[r] for r in again], [seen[r] for r in again]
        self._kept = [None] * len(states)
        rows = torch.tensor(again, device=losses.device)
        # A hook that held the batch would keep its graph until the garbage collector comes.
        found, attack = zip(batch.attacked.perturbations, states, strict=True), batch.attack
        for place, (perturbation, state) in enumerate(found):
            move = partial(self._move, self._kept, place, attack, perturbation, state, losses, rows)
            perturbation.delta.register_post_accumulate_grad_hook(move)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def _move(
        self,
        kept: list[KeptDeltas | None],
        place: int,
        attack: Attack,
        perturbation: Perturbation,
        state: dict[str, Any],
        losses: Tensor,
        rows: Tensor,
        delta: Tensor,
    ) -> None:
        """Make the attack's step with the gradient that `backward()` has left at a delta."""
        grad, delta.grad = delta.grad, None
        if grad is None or kept is not self._kept or kept[place] is not None:
            return  # backpropagated again, or after `reset`
        # The loss is a mean. Another factor (of a gradient scaler) does not matter to the step.
        grad = grad * len(losses)
        perturbation.mark_gradients(grad)
        attack.step(perturbation, grad, state, 0, losses)
        perturbation.delta = delta.detach()  # the leaf, whose hook this is, goes with its graph
        kept[place] = KeptDeltas.take(perturbation, rows)
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
        for place, kept in enumerate(self._moved()):
            state[f"{place}.rows"] = kept.rows.clone()
            state[f"{place}.lengths"] = kept.lengths.clone()
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore a state."""
        self.reset()
        self._samples, self._seen = state["samples"].tolist(), state["seen"].tolist()
        places = range(sum(key.endswith(".rows") for key in state))
        self._kept = [
            KeptDeltas(state[f"{place}.rows"].clone(), state[f"{place}.lengths"].clone())
            for place in places
        ]


def _refuse(batch: Batch) -> None:
    """Refuse what this form cannot have, or would pass over."""
    attacked, attack = batch.attacked, batch.attack
    if not torch.is_grad_enabled():
        raise RuntimeError("StaggeredReplays: computes gradients: not under torch.no_grad()")
    for wrong, words in (
        (not attack.uses_direction_alone, f"{attack!r}: its steps need more than a direction"),
        (batch.masking is not None, "masking"),
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
    given = samples.tolist() if isinstance(samples, Tensor) else samples
    found = [checks.integer("StaggeredReplays", "each of samples", one, 0) for one in given]
    if len(set(found)) < len(found):
        raise InputError("StaggeredReplays: a sample is twice in the batch: samples must differ")
    return found
