"""Forms in which ascent and training share their passes: FreeLB and "free" adversarial training."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from embattle import ops
from embattle.attacks.base import Attack
from embattle.attacks.box import box
from embattle.criteria import Criterion
from embattle.criteria.base import ascended
from embattle.objectives.batch import Batch
from embattle.objectives.precomputed import accumulate, attach_gradients, next_number, reached
from embattle.perturb.attacked_batch import AttackedBatch
from embattle.perturb.evaluation import Evaluation
from embattle.perturb.perturbation import Perturbation


def free(batch: Batch) -> Tensor:
    """FreeLB (Zhu et al., ICLR 2020, algorithm 1): gradients averaged over the ascent steps.

    `g = 1/K sum_t grad L(x + delta_t)` for t = 0 .. K-1, with delta moved between, so that K steps
    take K passes. Start with `random_start=BoxStart(PerDim(eps))`, mode "same" for the same dropout
    masks in all steps. The authors' code differs: a magnitude of its own for the start, no
    projection at eps = 0 (here: `eps=math.inf`), a shared norm over padding (here: give the mask).
    """
    return _passes(batch, batch.attack.steps, None)[0]


class FreeAT:
    """Free adversarial training (Shafahi et al., NeurIPS 2019, algorithm 1).

    Every call is one replay: one pass gives the gradients of the weights and moves the delta, which
    is kept for the next call (and the next batch, where shapes agree; rows of a table keep theirs
    wherever they come again), with the velocity of an attack that has one. Call the objective m
    times for each batch, with an optimiser step after each. The attack's step size should be its
    eps, as in the paper; `steps` is not used.
    """

    name: ClassVar[str] = "freeat"

    def __init__(self) -> None:
        self.kept: list[_Kept] = []

    @property
    def deltas(self) -> list[Tensor]:
        """The deltas that the next call starts from."""
        return [one.delta for one in self.kept]

    def __call__(self, batch: Batch) -> Tensor:
        if batch.attack.carries is None:
            raise ValueError(
                f"form 'freeat' makes one step of the attack in each call, and {batch.attack!r} is "
                "more than single steps along gradients: use PGD or MIFGSM, or form='mixed'. An "
                "attack of your own names what its steps keep from one to the next: carries = ()"
            )
        loss, self.kept = _passes(batch, 1, self.kept)
        return loss

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state that a resumed run needs: what is kept, by number."""
        state: dict[str, Tensor] = {}
        for number, (delta, carried, rows) in enumerate(self.kept):
            parts = {f"{number}.{name}": value for name, value in carried.items()}
            if rows is not None:
                parts[f"{number}.rows"] = rows
            state |= {name: value.clone() for name, value in {str(number): delta, **parts}.items()}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore a state."""
        found: list[dict[str, Tensor]] = [{} for name in state if "." not in name]
        for name, value in state.items():
            number, _, part = name.partition(".")
            found[int(number)][part] = value.clone()
        self.kept = [_Kept(one.pop(""), one, one.pop("rows", None)) for one in found]


class _Kept(NamedTuple):
    """What lives on of a perturbation.

    Attributes:
        delta: the delta.
        carried: what the attack's steps keep beside it, of its shape.
        rows: which rows of a table they are of; None where they are of no rows.
    """

    delta: Tensor
    carried: dict[str, Tensor]
    rows: Tensor | None

    @classmethod
    def of(cls, perturbation: Perturbation, attack: Attack, state: dict[str, Any]) -> _Kept:
        """Return what lives on after a step."""
        carried = {name: state[name] for name in attack.carries or ()}
        return cls(perturbation.delta.detach(), carried, perturbation.rows)

    def take_up(self, perturbation: Perturbation, attack: Attack, state: dict[str, Any]) -> None:
        """Give another pass, that begins with this one, what fits it."""
        delta = self._fitted(self.delta, perturbation.delta.detach(), perturbation.rows)
        if delta is None:
            return
        # Another batch has another mask, and perhaps another radius.
        perturbation.set(
            ops.project(
                delta, eps=state["eps"], norm=attack.ball, **perturbation.geometry, **box(state)
            )
        )
        for name in attack.carries or ():
            fitted = self._fitted(self.carried.get(name), state[name], perturbation.rows)
            if fitted is not None:
                state[name] = fitted

    def _fitted(self, kept: Tensor | None, fresh: Tensor, rows: Tensor | None) -> Tensor | None:
        """Return what is kept, with the fresh values where there is none; None: nothing fits."""
        if kept is None:
            return None
        old = kept.to(fresh.device, fresh.dtype)
        if self.rows is None or rows is None:
            return old if self.rows is rows and old.shape == fresh.shape else None
        if old.shape[1:] != fresh.shape[1:] or not len(old):
            return None
        before = self.rows.to(rows.device)  # ascending
        place = torch.searchsorted(before, rows).clamp(max=len(before) - 1)
        return torch.where((before[place] == rows).unsqueeze(1), old[place], fresh)


def _passes(batch: Batch, count: int, kept: list[_Kept] | None) -> tuple[Tensor, list[_Kept]]:
    """Run `count` passes with gradients of weights and deltas, and step the deltas after each.

    Args:
        batch: the batch.
        count: passes.
        kept: what to start from where it fits; a step then follows the last pass, too.

    Returns:
        The loss, and what may live on.
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
        if kept and place < len(kept):
            kept[place].take_up(perturbation, attack, states[-1])

    total: list[Tensor | None] = []
    params: list[Tensor] = []
    losses: list[Tensor] = []
    evaluation: Evaluation | None = None
    shares, before = False, next_number()
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
                graph = reached(mean)
                params = [p for p in graph.leaves if not any(p is d for d in deltas)]
                # What was made outside of the loss function is in all passes.
                shares = graph.oldest < before
            deltas = [p.delta for p in attacked.perturbations]
            attacked.check_graph(losses_now, deltas)
            # A share of the mean is differentiated, so that the sum is the average as it is.
            grads = torch.autograd.grad(
                mean / count, [*deltas, *params], retain_graph=shares, allow_unused=True
            )
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
    loss = attach_gradients(
        value, [*sources, *params], [*places, *total[len(attacked.perturbations) :]]
    )
    pairs = zip(attacked.perturbations, states, strict=True)
    return loss, [_Kept.of(perturbation, attack, state) for perturbation, state in pairs]


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
