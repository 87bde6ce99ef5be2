"""Running attacks over data, and keeping each sample's worst outcome."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from embattle.attacks import Attack, AttackResult
from embattle.criteria import Criterion
from embattle.criteria.base import ascended, reached
from embattle.data.batch import Batch
from embattle.perturb.evaluation import Evaluation
from embattle.perturb.outputs import parts_of
from embattle.perturb.site import Site, as_sites
from embattle.tasks.evaluator import Evaluator

Sites: TypeAlias = "Site | Sequence[Site]"
Tick: TypeAlias = Callable[[], None]


@dataclass(frozen=True)
class Attacked:
    """What an attack achieved.

    Attributes:
        outputs: each sample's worst, [N, ...], on the CPU.
        right: whether a sample is still right under the attack, bool [N], on the CPU.
        norm: mean norm of the perturbations that gave them (the attack's norm; of the groups that
            may be moved).
        seconds: time it took.
    """

    outputs: Tensor
    right: Tensor
    norm: float
    seconds: float


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
    device = _device(model)
    with examined(model), torch.no_grad():
        found = [evaluator.evaluate(model, batch.to(device)).outputs for batch in batches]
    return torch.cat([_needed(outputs).cpu() for outputs in found])


def evaluate(
    model: nn.Module,
    batches: Sequence[Batch],
    sites: Sites,
    attacks: Mapping[str, Attack],
    *,
    evaluator: Evaluator | None = None,
    tick: Tick = lambda: None,
) -> dict[str, Attacked]:
    """Attacks a model.

    An attack with restarts tries again only the samples that still stand, which gives the same
    count of fooled samples as trying all of them.

    Args:
        model: the model.
        batches: the samples, with labels.
        sites: where the attacks perturb the model.
        attacks: name to attack.
        evaluator: runs the model, and says what is right; by default a classifier that gives
            logits [B, C] when called as `model(**batch.inputs)`.
        tick: called after each batch of each attack.

    Returns:
        Name to outcome, the samples in the order of the batches.
    """
    evaluator = evaluator or Evaluator()
    results = {}
    with examined(model):
        for name, attack in attacks.items():
            began = time.monotonic()
            found = []
            for batch in batches:
                batch = batch.to(_device(model))
                one = _attack_batch(evaluator, model, batch, sites, attack)
                found.append([tensor.cpu() for tensor in one])
                tick()
            seconds = time.monotonic() - began
            outputs, right, norms = (torch.cat(parts) for parts in zip(*found, strict=True))
            results[name] = Attacked(outputs, right, float(norms.mean()), seconds)
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
            batch = batch.to(_device(model))
            with torch.no_grad():
                clean = evaluator.evaluate(model, batch)
            rows = torch.nonzero(_right(evaluator.criterion(batch), clean, clean)).flatten()
            for k, (attack, turned) in enumerate(zip(attacks, known, strict=True)):
                if turned is not None:
                    rows = rows[~turned[these].to(rows.device)[rows]]
                if attack is not None and len(rows):
                    part = batch.take(rows)
                    rows = rows[_attack_batch(evaluator, model, part, sites, attack)[1]]
                standing[k] += len(rows)
                tick()
    return [count / max(1, total) for count in standing]


class _Found(NamedTuple):
    """The worst of a batch.

    Attributes:
        at: losses and outputs.
        clean: the same without perturbation.
        norms: mean norm of each sample's perturbation, [B].
    """

    at: Evaluation
    clean: Evaluation
    norms: Tensor


def _attack_batch(
    evaluator: Evaluator, model: nn.Module, batch: Batch, sites: Sites, attack: Attack
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs of each sample's worst try, whether it is right there, and the mean norm."""
    once = replace(attack, restarts=1)
    goal = evaluator.criterion(batch)
    at, clean, norms = _try(evaluator, model, batch, sites, once)
    for _ in range(attack.restarts - 1):
        rows = torch.nonzero(_right(goal, at, clean)).flatten()
        if not len(rows):
            break
        some, old, before = goal.select(rows), at.select(rows), clean.select(rows)
        new = _try(evaluator, model, batch.take(rows), sites, once)
        worse = ascended(some, new.at, before) > ascended(some, old, before)
        worse |= ~_right(some, new.at, before)
        losses = None if at.losses is None else _put(at.losses, rows, new.at.losses, worse)
        at = Evaluation(losses, _put(at.outputs, rows, new.at.outputs, worse))
        norms = _put(norms, rows, new.norms, worse)
    return _needed(at.outputs), _right(goal, at, clean), norms


def _put(base: Tensor | None, rows: Tensor, other: Tensor | None, chosen: Tensor) -> Tensor:
    """`base` with the chosen entries of `other`, which are at `rows`."""
    made = _needed(base).clone()
    made[rows[chosen]] = _needed(other)[chosen]
    return made


def _try(
    evaluator: Evaluator, model: nn.Module, batch: Batch, sites: Sites, attack: Attack
) -> _Found:
    result = run_attack(model, batch, sites, attack, evaluator=evaluator)
    return _Found(
        Evaluation(result.losses, _needed(result.outputs)),
        Evaluation(result.clean_losses, result.clean_outputs),
        _mean_norms(result.norms, batch),
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
    return attack.run(
        lambda: evaluator.evaluate(model, batch),
        sites,
        criterion=evaluator.criterion(batch),
        mask=evaluator.mask(batch),
        **options,
    )


def success_rate(clean: Tensor, attacked: Tensor) -> float:
    """Share of the samples that are right, bool [N], which an attack turns; 0 if none was right."""
    return int((clean & ~attacked).sum()) / max(1, int(clean.sum()))


def vector_norm(
    model: nn.Module,
    batches: Sequence[Batch],
    sites: Sites,
    evaluator: Evaluator | None = None,
) -> float:
    """Mean l2 norm of the embeddings at the sites; of those that may move, where that is known."""
    evaluator = evaluator or Evaluator()
    norms: list[Tensor] = []
    movable: Tensor | None = None

    def note(value: Tensor) -> None:
        norm = value.detach().float().norm(dim=-1)
        fits = movable is not None and movable.shape == norm.shape
        norms.append((norm[movable] if fits else norm).flatten().cpu())

    with ExitStack() as stack:
        for site in as_sites(sites):
            if site.scope == "weight":
                assert site.table is not None
                note(site.table)
                continue
            for module in site.modules:

                def hook(m: nn.Module, args: object, output: Any, key: Any = site.key) -> None:
                    for part in parts_of(output, key):
                        note(part.value)

                stack.callback(module.register_forward_hook(hook).remove)
        with examined(model), torch.no_grad():
            for batch in batches:
                batch = batch.to(_device(model))
                movable = batch.movable
                evaluator.evaluate(model, batch)
    return float(torch.cat(norms).mean())


def _right(goal: Criterion, at: Evaluation, clean: Evaluation) -> Tensor:
    """Whether each sample is right, bool [B]: an attack's goal is not reached there."""
    there = reached(goal, at, clean)
    if there is None:
        return torch.ones(at.batch, dtype=torch.bool, device=at.device)
    return ~there


def _mean_norms(norms: Sequence[Tensor], batch: Batch) -> Tensor:
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


def _needed(outputs: Tensor | None) -> Tensor:
    if outputs is None:
        raise ValueError(
            "an audit needs outputs: let the evaluator give Evaluation(losses, outputs)"
        )
    return outputs


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
