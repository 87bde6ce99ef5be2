"""Running attacks over data, and keeping each example's worst outcome."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embattle.attacks import Attack, AttackResult
from embattle.criteria import Misclassify
from embattle.data.batch import Batch
from embattle.perturb.evaluation import Evaluation
from embattle.perturb.site import Site

Tick = Callable[[], None]


@dataclass(frozen=True)
class Attacked:
    """What an attack achieved.

    Attributes:
        logits: each example's worst, [N, C], on the CPU.
        norm: mean norm of the perturbations that gave them (the attack's norm; of the groups that
            may be moved).
        seconds: time it took.
    """

    logits: Tensor
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


def predict(model: nn.Module, batches: Sequence[Batch]) -> Tensor:
    """Logits [N, C] of a model called as `model(**batch.inputs)`, on the CPU."""
    device = _device(model)
    with examined(model), torch.no_grad():
        return torch.cat([model(**b.to(device).inputs).float().cpu() for b in batches])


def evaluate(
    model: nn.Module,
    batches: Sequence[Batch],
    site: Site,
    attacks: Mapping[str, Attack],
    *,
    tick: Tick = lambda: None,
) -> dict[str, Attacked]:
    """Attacks a model.

    An attack with restarts tries again only the examples that still stand, which gives the same
    count of fooled examples as trying all of them.

    Args:
        model: gives logits [B, C] when called as `model(**batch.inputs)`.
        batches: the examples.
        site: where the attacks perturb the model.
        attacks: name to attack.
        tick: called after each batch of each attack.

    Returns:
        Name to outcome, the examples in the order of the batches.
    """
    results = {}
    with examined(model):
        for name, attack in attacks.items():
            began = time.monotonic()
            logits, norms = [], []
            for batch in batches:
                worst, norm = _attack_batch(model, batch.to(_device(model)), site, attack)
                logits.append(worst.cpu())
                norms.append(norm.cpu())
                tick()
            seconds = time.monotonic() - began
            results[name] = Attacked(torch.cat(logits), float(torch.cat(norms).mean()), seconds)
    return results


def sweep(
    model: nn.Module,
    batches: Sequence[Batch],
    site: Site,
    attacks: Sequence[Attack],
    *,
    tick: Tick = lambda: None,
) -> list[float]:
    """Accuracy under attacks of growing strength, whose balls lie within each other.

    An example that fell to a smaller ball counts as fallen in the larger ones, which hold the same
    perturbation; so only those that stand are attacked again.

    Args:
        model, batches, site: see `evaluate`.
        attacks: from the smallest ball to the largest.
        tick: called after each batch of each attack.

    Returns:
        The accuracy under each attack.
    """
    standing = [0] * len(attacks)
    total = 0
    with examined(model):
        for batch in batches:
            total += len(batch)
            batch = batch.to(_device(model))
            with torch.no_grad():
                rows = torch.nonzero(model(**batch.inputs).argmax(1) == batch.labels).flatten()
            for k, attack in enumerate(attacks):
                if len(rows):
                    part = batch.take(rows)
                    worst, _ = _attack_batch(model, part, site, attack)
                    rows = rows[worst.argmax(1) == part.labels]
                standing[k] += len(rows)
                tick()
    return [count / max(1, total) for count in standing]


def _attack_batch(
    model: nn.Module, batch: Batch, site: Site, attack: Attack
) -> tuple[Tensor, Tensor]:
    """The worst logits [B, C] of all tries, and the norms of the perturbations that gave them."""
    once = replace(attack, restarts=1)
    logits, norms = _try(model, batch, site, once)
    for _ in range(attack.restarts - 1):
        rows = torch.nonzero(logits.argmax(1) == batch.labels).flatten()
        if not len(rows):
            break
        part = batch.take(rows)
        again, norms_again = _try(model, part, site, once)
        old = F.cross_entropy(logits[rows], part.labels, reduction="none")
        new = F.cross_entropy(again, part.labels, reduction="none")
        worse = (again.argmax(1) != part.labels) | (new > old)
        logits[rows[worse]] = again[worse]
        norms[rows[worse]] = norms_again[worse]
    return logits, norms


def _try(model: nn.Module, batch: Batch, site: Site, attack: Attack) -> tuple[Tensor, Tensor]:
    result = run_attack(model, batch, site, attack)
    assert result.outputs is not None
    return result.outputs, _mean_norms(result.norms[0], batch)


def run_attack(
    model: nn.Module, batch: Batch, site: Site, attack: Attack, **options: Any
) -> AttackResult:
    """Attack a batch so that the model errs; `options` are those of `Attack.run`."""

    def logits() -> Evaluation:
        return Evaluation(outputs=model(**batch.inputs).float())

    goal = Misclassify(batch.labels)
    return attack.run(logits, site, criterion=goal, mask=batch.movable, **options)


def _mean_norms(norms: Tensor, batch: Batch) -> Tensor:
    """Per example [B], the mean norm of its movable groups."""
    if norms.numel() == len(batch):
        return norms.reshape(-1)
    table = norms.reshape(len(batch), -1)
    if batch.movable is None or batch.movable.shape != table.shape:
        return table.mean(1)
    count = batch.movable.sum(1).clamp(min=1)
    return (table * batch.movable).sum(1) / count


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
