"""Running attacks over data, and keeping each sample's worst outcome."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from embattle.attacks import FMN, Attack, AttackResult, AutoAttack
from embattle.attacks.auto import EnsembleResult
from embattle.attacks.early_stopping import CannotLeaveError
from embattle.audit.outcomes import Attacked
from embattle.criteria import Criterion
from embattle.criteria.base import ascended, reached
from embattle.data.batch import Batch
from embattle.perturb.evaluation import Evaluation, LossFn
from embattle.perturb.site import Site
from embattle.tasks.evaluator import Evaluator

Sites: TypeAlias = "Site | Sequence[Site]"
Tick: TypeAlias = Callable[[], None]


@contextmanager
def examined(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and no gradients for the weights, within the block."""
    training = [(module, module.training) for module in model.modules()]
    wanted = [(weight, weight.requires_grad) for weight in model.parameters()]
    try:
        model.eval()
        model.requires_grad_(False)
        yield
    finally:
        for module, flag in training:
            module.training = flag
        for weight, flag in wanted:
            weight.requires_grad_(flag)


def predict(
    model: nn.Module, batches: Sequence[Batch], evaluator: Evaluator | None = None
) -> Tensor:
    """Outputs [N, ...] of a model, on the CPU.

    Args:
        model: the model.
        batches: the samples.
        evaluator: runs the model; by default it is called as `model(**batch.inputs)`.
    """
    evaluator = evaluator or Evaluator()
    device = device_of(model)
    with examined(model), torch.no_grad():
        found = [evaluator.evaluate(model, batch.to(device)).outputs for batch in batches]
    return torch.cat([needed(outputs).cpu() for outputs in found])


def evaluate(
    model: nn.Module,
    batches: Sequence[Batch],
    sites: Sites,
    attacks: Mapping[str, Attack],
    *,
    evaluator: Evaluator | None = None,
    known: Attacked | None = None,
    leave: bool = False,
    tick: Tick = lambda: None,
) -> dict[str, Attacked]:
    """Attacks a model.

    Of each sample the worst of all that was evaluated counts, if the attacks keep their best
    iterate: a wrong output before a right one, then the largest value of the criterion.

    Args:
        model: the model.
        batches: the samples, with labels.
        sites: where the attacks perturb the model.
        attacks: name to attack.
        evaluator: runs the model, and says what is right; by default a classifier that gives
            logits [B, C] when called as `model(**batch.inputs)`.
        known: what is known of the samples before: those that are wrong there are not attacked,
            and stay as they are.
        leave: samples are left alone as soon as they are wrong. They leave the batch where the
            model allows it, and all further restarts, of those that stand, are one pass, as far as
            they fit into a batch. The same share of them falls, for less, but their outputs are
            then those of the first success, not the worst.
        tick: called after each batch of each attack.

    Returns:
        Name to outcome, the samples in the order of the batches.
    """
    evaluator = evaluator or Evaluator()
    results = {}
    with examined(model):
        for name, attack in attacks.items():
            began = time.monotonic()
            run = _Run(evaluator, model, sites, attack, leave)
            found: list[Attacked] = []
            total = 0
            for batch in batches:
                these = slice(total, total + len(batch))
                total += len(batch)
                batch = batch.to(device_of(model))
                found.append(run.all(batch) if known is None else run.rest(batch, known, these))
                tick()
            results[name] = Attacked.joined(found, time.monotonic() - began)
    return results


def sweep(
    model: nn.Module,
    batches: Sequence[Batch],
    sites: Sites,
    attacks: Sequence[Attack | None],
    *,
    fallen: Sequence[Tensor | None] = (),
    evaluator: Evaluator | None = None,
    tick: Tick = lambda: None,
) -> list[float]:
    """Share of samples that are right under attacks of growing strength, each ball in the next.

    A sample that fell to a smaller ball counts as fallen in the larger ones, which hold the same
    perturbation; so only those that stand are attacked again.

    Args:
        model, batches, sites, evaluator: see `evaluate`.
        attacks: from the smallest ball to the largest; None where `fallen` tells enough.
        fallen: for each attack, which samples are known to be turned by a perturbation in its ball,
            bool [N], or None: they are not attacked again.
        tick: called after each batch of each attack.

    Returns:
        The share under each attack: of a classifier, its accuracy.
    """
    evaluator = evaluator or Evaluator()
    standing = [0] * len(attacks)
    known = [*fallen, *[None] * (len(attacks) - len(fallen))]
    total = 0
    with examined(model):
        for batch in batches:
            these = slice(total, total + len(batch))
            total += len(batch)
            batch = batch.to(device_of(model))
            with torch.no_grad():
                clean = evaluator.evaluate(model, batch)
            rows = torch.nonzero(_right(evaluator.criterion(batch), clean, clean)).flatten()
            for k, (attack, turned) in enumerate(zip(attacks, known, strict=True)):
                if turned is not None:
                    rows = rows[~turned[these].to(rows.device)[rows]]
                if attack is not None and len(rows):
                    run = _Run(evaluator, model, sites, attack, leave=True)
                    rows = rows[run.worst(batch.take(rows)).right]
                standing[k] += len(rows)
                tick()
    return [count / max(1, total) for count in standing]


class _Found(NamedTuple):
    """The worst of a batch of B samples.

    Attributes:
        outputs: [B, ...].
        right: bool [B].
        values: what was ascended, [B].
        norms, steps: see `Attacked`.
        by: see `Attacked`.
        shared: whether samples share deltas.
    """

    outputs: Tensor
    right: Tensor
    values: Tensor
    norms: Tensor
    steps: Tensor
    by: tuple[str, ...]
    shared: bool


class _Run:
    """One attack on all batches."""

    def __init__(
        self, evaluator: Evaluator, model: nn.Module, sites: Sites, attack: Attack, leave: bool
    ) -> None:
        self.evaluator, self.model, self.sites = evaluator, model, sites
        several = isinstance(attack, (AutoAttack, FMN))
        if isinstance(attack, AutoAttack):
            attack = replace(attack, go_on=not leave)
        self.standing_alone = leave
        self.leave = leave and attack.steps != 1 and not several
        # An ensemble's own restarts go on with the samples that stand; draws of noise need no more
        # than a pass each, and no clean one.
        own = isinstance(attack, AutoAttack) or (self.leave and not attack.steps)
        self.restarts = 1 if own else attack.restarts
        self.once = attack if self.restarts == 1 else replace(attack, restarts=1)

    def all(self, batch: Batch) -> Attacked:
        """The outcome for a whole batch, on the CPU."""
        one = self.worst(batch)
        return Attacked(
            one.outputs.cpu(), one.right.cpu(), one.norms.cpu(), one.steps.cpu(), by=one.by
        )

    def rest(self, batch: Batch, known: Attacked, these: slice) -> Attacked:
        """The outcome where the samples that are known to be wrong are left alone."""
        right = known.right[these]
        rows = torch.nonzero(right).flatten()
        outputs, norms = known.outputs[these].clone(), known.norms[these].clone()
        right, steps = right.clone(), torch.zeros_like(right, dtype=torch.int64)
        by = [""] * len(batch)
        if len(rows):
            one = self.all(batch if len(rows) == len(batch) else batch.take(rows.to(_on(batch))))
            outputs[rows], right[rows] = one.outputs.to(outputs.dtype), one.right
            norms[rows], steps[rows] = one.norms.to(norms.dtype), one.steps
            for row, name in zip(rows.tolist(), one.by, strict=bool(one.by)):
                by[row] = name
        return Attacked(outputs, right, norms, steps, by=tuple(by))

    def worst(self, batch: Batch) -> _Found:
        """Each sample's worst try."""
        best, left = self._try(batch), self.restarts - 1
        while left:
            again = best.right if self.standing_alone else torch.ones_like(best.right)
            rows = torch.nonzero(again).flatten()
            if not len(rows):
                break
            # Samples that share deltas are attacked together, once each.
            copies = 1 if best.shared else min(left, max(1, len(batch) // len(rows)))
            new = self._try(batch.take(rows.repeat(copies)))
            for k in range(copies):
                part = slice(k * len(rows), (k + 1) * len(rows))
                tried = best.right[rows] | (not self.standing_alone)
                best = _merge(best, rows, new, part, tried)
            left -= copies
        return best

    def _try(self, batch: Batch) -> _Found:
        attack = replace(self.once, stop_when_fooled=True) if self.leave else self.once
        run = partial(run_attack, self.model, batch, self.sites, evaluator=self.evaluator)
        try:
            result = run(attack)
        except CannotLeaveError:
            if not self.leave:
                raise
            self.leave = False
            result = run(self.once)
        goal = self.evaluator.criterion(batch)
        at = Evaluation(result.losses, needed(result.outputs))
        clean = Evaluation(result.clean_losses, result.clean_outputs)
        by: tuple[str, ...] = ()
        if isinstance(result, EnsembleResult):
            by = tuple(name or "" for name in result.fooled_by)
        return _Found(
            needed(at.outputs),
            _right(goal, at, clean),
            ascended(goal, at, clean).detach(),
            mean_norms(result.norms, batch),
            result.steps,
            by,
            result.shared,
        )


def _merge(best: _Found, rows: Tensor, new: _Found, part: slice, tried: Tensor) -> _Found:
    """The worst so far, of which the samples at `rows` were tried again: `part` of `new`.

    `tried`, bool [n], says whose steps count.
    """
    right, values = best.right[rows], best.values[rows]
    wins = (right & ~new.right[part]) | ((right == new.right[part]) & (new.values[part] > values))

    def put(base: Tensor, other: Tensor) -> Tensor:
        made = base.clone()
        made[rows[wins]] = other[part][wins]
        return made

    steps = best.steps.clone()
    steps[rows[tried]] += new.steps[part][tried]
    return best._replace(
        outputs=put(best.outputs, new.outputs),
        right=put(best.right, new.right),
        values=put(best.values, new.values),
        norms=put(best.norms, new.norms),
        steps=steps,
    )


def run_attack(
    model: nn.Module,
    batch: Batch,
    sites: Sites,
    attack: Attack,
    *,
    evaluator: Evaluator | None = None,
    **options: Any,
) -> AttackResult:
    """Attack a batch so that the model errs; `options` are those of `Attack.run`."""
    evaluator = evaluator or Evaluator()

    def of(rows: Tensor) -> LossFn:
        part = batch.take(rows, cut=False)
        return lambda: evaluator.evaluate(model, part)

    return attack.run(
        lambda: evaluator.evaluate(model, batch),
        sites,
        subset=of,
        criterion=evaluator.criterion(batch),
        mask=evaluator.mask(batch),
        **options,
    )


def _right(goal: Criterion, at: Evaluation, clean: Evaluation) -> Tensor:
    """Whether each sample is right, bool [B]: an attack's goal is not reached there."""
    there = reached(goal, at, clean)
    if there is None:
        return torch.ones(at.batch, dtype=torch.bool, device=at.device)
    return ~there


def mean_norms(norms: Sequence[Tensor], batch: Batch) -> Tensor:
    """Per sample [B], the mean norm of its movable groups; of groups that are shared, of all."""
    means = []
    for found in norms:
        if found.numel() % len(batch):
            means.append(found.mean().expand(len(batch)))
            continue
        table = found.reshape(len(batch), -1)
        movable = batch.movable
        if movable is None or movable.shape != table.shape:
            means.append(table.mean(1))
        else:
            means.append((table * movable).sum(1) / movable.sum(1).clamp(min=1))
    return torch.stack(means).mean(0)


def needed(outputs: Tensor | None) -> Tensor:
    """Outputs that are there.

    Raises:
        ValueError: the evaluator gave none.
    """
    if outputs is None:
        raise ValueError(
            "an audit needs outputs: let the evaluator give Evaluation(losses, outputs)"
        )
    return outputs


def _on(batch: Batch) -> torch.device:
    return next(iter(batch.inputs.values())).device


def device_of(model: nn.Module) -> torch.device:
    """Where a model's weights are."""
    return next(model.parameters()).device
