"""Forms in which ascent and training share their passes: FreeLB and "free" adversarial training."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from embattle import ops
from embattle.attacks.box import box
from embattle.criteria import Criterion
from embattle.criteria.base import ascended
from embattle.objectives.batch import Batch
from embattle.objectives.precomputed import accumulate, attach_gradients, leaves
from embattle.perturb.attacked_batch import AttackedBatch
from embattle.perturb.evaluation import Evaluation
from embattle.perturb.perturbation import Perturbation


def free(batch: Batch) -> Tensor:
    """FreeLB (Zhu et al., ICLR 2020, algorithm 1): gradients averaged over the ascent steps.

    `g = 1/K sum_t grad L(x + delta_t)` for t = 0 .. K-1, with delta moved between, so that K steps
    take K passes. Start with `random_start=BoxStart(PerDim(eps))`, mode "same" for the same dropout
    masks in all steps. The authors' code differs: a magnitude of its own for the start, no
    projection at eps = 0 (here: `eps=math.inf`), a shared norm over padding (here: give the mask).
    `lam` is not used.
    """
    return _passes(batch, batch.attack.steps, None)


class FreeAT:
    """Free adversarial training (Shafahi et al., NeurIPS 2019, algorithm 1).

    Every call is one replay: one pass gives the gradients of the weights and moves the delta, which
    is kept for the next call (and the next batch, where shapes agree; rows of a table keep theirs
    wherever they come again). Call the objective m times for each batch, with an optimiser step
    after each. The attack's step size should be its eps, as in the paper; `steps` and `lam` are not
    used.
    """

    name: ClassVar[str] = "freeat"

    def __init__(self) -> None:
        self.kept: list[_Kept] = []

    @property
    def deltas(self) -> list[Tensor]:
        """The deltas that the next call starts from."""
        return [one.delta for one in self.kept]

    def __call__(self, batch: Batch) -> Tensor:
        loss = _passes(batch, 1, self.kept)
        self.kept = [_Kept(p.delta.detach(), p.rows) for p in batch.attacked.perturbations]
        return loss

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state that a resumed run needs: the deltas, by number, and their rows."""
        state = {str(number): one.delta.clone() for number, one in enumerate(self.kept)}
        for number, one in enumerate(self.kept):
            if one.rows is not None:
                state[f"{number}.rows"] = one.rows.clone()
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore a state."""
        rows = {name: value.clone() for name, value in state.items() if name.endswith(".rows")}
        self.kept = [
            _Kept(state[str(number)].clone(), rows.get(f"{number}.rows"))
            for number in range(len(state) - len(rows))
        ]


class _Kept(NamedTuple):
    """A delta that lives on, and which rows of a table it is of; None where it is of no rows."""

    delta: Tensor
    rows: Tensor | None

    def taken_up(self, perturbation: Perturbation) -> Tensor | None:
        """Return the delta of another pass that begins with this one; None where nothing fits."""
        fresh, rows = perturbation.delta.detach(), perturbation.rows
        old = self.delta.to(fresh.device, fresh.dtype)
        if self.rows is None or rows is None:
            return old if self.rows is rows and old.shape == fresh.shape else None
        if old.shape[1:] != fresh.shape[1:] or not len(old):
            return None
        before = self.rows.to(rows.device)  # ascending
        place = torch.searchsorted(before, rows).clamp(max=len(before) - 1)
        return torch.where((before[place] == rows).unsqueeze(1), old[place], fresh)


def _passes(batch: Batch, count: int, kept: list[_Kept] | None) -> Tensor:
    """Run `count` passes with gradients of weights and deltas, and step the deltas after each.

    Args:
        batch: the batch.
        count: passes.
        kept: deltas to start from where they fit; a step then follows the last pass, too.
    """
    attacked, attack = batch.attacked, batch.attack
    if count < 1:
        raise ValueError(f"this form needs an attack with steps, not {attack!r}")
    if not torch.is_grad_enabled():
        raise RuntimeError("this form computes gradients: not under torch.no_grad()")
    generator = attack.own_generator()
    states: list[dict[str, Any]] = []

    def start(perturbation: Perturbation) -> None:
        states.append(attack.begin(perturbation, batch.scale))
        attack.start(perturbation, states[-1], generator)
        place = len(states) - 1
        old = kept[place].taken_up(perturbation) if kept and place < len(kept) else None
        if old is not None:
            # Another batch has another mask, and perhaps another radius.
            eps = states[-1]["eps"]
            perturbation.set(
                ops.project(
                    old, eps=eps, norm=attack.ball, **perturbation.geometry, **box(states[-1])
                )
            )

    total: list[Tensor | None] = []
    params: list[Tensor] = []
    losses: list[Tensor] = []
    evaluation: Evaluation | None = None
    attacked.save_random_state()
    # The weights of a plain lookup get their gradient in one go, from the sum over the passes.
    plain = attacked.plain
    try:
        recorded = attacked.record(attach=plain, start=start)
        _refuse_unused_parameters(attacked)
        for number in range(count):
            # Training passes: dropout, batch norm and random state act as in any other.
            if number == 0 and recorded.perturbed:
                evaluation = recorded.evaluation
            else:
                evaluation = attacked.evaluate(
                    grad=True, lookups="detached" if plain else "fresh", detach=plain
                )
            losses_now = ascended_losses(attack.goal(batch.criterion), batch, evaluation)
            mean = losses_now.mean()
            if not params:
                deltas = [p.delta for p in attacked.perturbations]
                params = [p for p in leaves(mean) if not any(p is d for d in deltas)]
            deltas = [p.delta for p in attacked.perturbations]
            attacked.check_graph(losses_now, deltas)
            # A share of the mean is differentiated, so that the sum is the average as it is.
            grads = torch.autograd.grad(mean / count, [*deltas, *params], allow_unused=True)
            moves = number < count - 1 or kept is not None
            # Each sample's own gradient is count * B times that of its share of the mean.
            own = attacked.rescale_at_deltas(
                grads[: len(deltas)], count * evaluation.batch if moves else 1
            )
            total = accumulate(total, grads)
            losses.append(mean.detach())
            if moves:
                values = losses_now.detach()
                if attacked.perturbed.coupled:
                    values = values.sum().expand_as(values)
                for perturbation, grad, state in zip(
                    attacked.perturbations, own, states, strict=True
                ):
                    attack.step(perturbation, grad, state, number, values)
    finally:
        attacked.clear()
    assert evaluation is not None
    batch.report("adversarial", evaluation)
    batch.metrics["ascent_losses"] = torch.stack(losses)
    sources: list[Tensor] = []
    places: list[Tensor | None] = []
    if plain:
        for perturbation, one in zip(attacked.perturbations, total, strict=False):
            spread = perturbation.spread(
                torch.zeros_like(perturbation.delta) if one is None else one
            )
            for (site, call), grad in zip(perturbation.places, spread, strict=True):
                source = attacked.perturbed.calls[site][call].source
                assert source is not None
                sources.append(source)
                places.append(grad.to(source.dtype))
    value = torch.stack(losses).mean()
    return attach_gradients(
        value, [*sources, *params], [*places, *total[len(attacked.perturbations) :]]
    )


def ascended_losses(goal: Criterion, batch: Batch, evaluation: Evaluation) -> Tensor:
    """Return the losses `[B]` of a pass that both trains and ascends.

    Raises:
        ValueError: the goal ascends something else.
    """
    losses = batch.losses(evaluation)
    if goal.needs_clean or ascended(goal, evaluation, None) is not losses:
        raise ValueError(
            f"this form trains on what it ascends, the losses; {goal!r} ascends something else"
        )
    return losses


def _refuse_unused_parameters(attacked: AttackedBatch) -> None:
    if any(call.unused_parameters for recorded in attacked.perturbed.calls for call in recorded):
        raise RuntimeError(
            "this form trains in the attack's passes, which DistributedDataParallel with "
            "find_unused_parameters=True does not allow: it waits for gradients that never come; "
            "use find_unused_parameters=False, or form='mixed'"
        )
