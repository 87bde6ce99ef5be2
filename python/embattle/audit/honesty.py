"""Checks on the attacks themselves: robustness that rests on a weak attack is none.

Athalye, Carlini and Wagner (ICML 2018, section 3.1) list how a defence that only hides its
gradients gives itself away: each sign is a check here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from embattle.attacks import Attack
from embattle.audit.evaluation import Sites, evaluate, examined, run_attack, sweep
from embattle.data.batch import Batch
from embattle.perturb.perturbation import Perturbation
from embattle.tasks.evaluator import Evaluator


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: what is demanded.
        passed: whether it holds.
        detail: the figures it was decided by.
    """

    name: str
    passed: bool
    detail: str


def order_checks(
    title: str,
    accuracies: Mapping[str, float],
    *,
    noise: Sequence[str],
    gradient: Sequence[str],
    measure: str = "accuracy",
) -> list[Check]:
    """Noise must not beat the strongest gradient attack, nor fewer steps more steps.

    Args:
        title: the model's name.
        accuracies: accuracy under each attack, or what corresponds, by name.
        noise: names of the attacks without gradients.
        gradient: names of the gradient attacks, from the weakest to the strongest.
        measure: what the accuracies are called.

    Returns:
        The checks that these attacks allow.
    """
    checks = []
    if gradient and noise:
        best, random = gradient[-1], min(noise, key=lambda name: accuracies[name])
        checks.append(
            Check(
                f"{title}: random noise does not beat {best}",
                accuracies[best] <= accuracies[random],
                f"{measure} {accuracies[random]:.3f} under {random}, "
                f"{accuracies[best]:.3f} under {best}",
            )
        )
    for weak, strong in pairwise(gradient):
        checks.append(
            Check(
                f"{title}: {strong} is no weaker than {weak}",
                accuracies[strong] <= accuracies[weak],
                f"{measure} {accuracies[weak]:.3f} under {weak}, "
                f"{accuracies[strong]:.3f} under {strong}",
            )
        )
    return checks


def unbounded_check(
    title: str,
    model: nn.Module,
    batches: Sequence[Batch],
    sites: Sites,
    attacks: Sequence[Attack],
    *,
    evaluator: Evaluator | None = None,
) -> Check:
    """Attacks up to a ball so large that it bounds nothing must fool every sample.

    Several sizes are tried: from afar a model may be so sure that it has no gradient any more.

    Args:
        title: the model's name.
        model, batches, sites, evaluator: see `embattle.audit.evaluation.evaluate`.
        attacks: from the smallest ball to the largest, whose radius is far beyond the size of the
            embeddings.

    Returns:
        The check.
    """
    # Nearly all fall at once: the whole attacks are for those that do not.
    tries = [*(replace(attack, steps=min(attack.steps, 2)) for attack in attacks), *attacks]
    total = sum(len(batch) for batch in batches)
    standing = round(sweep(model, batches, sites, tries, evaluator=evaluator)[-1] * total)
    return Check(
        f"{title}: an attack without a bound fools every example",
        standing == 0,
        f"{total - standing} of {total} fooled",
    )


def transfer_check(
    title: str,
    target: tuple[nn.Module, Sites],
    source: tuple[nn.Module, Sites],
    batches: Sequence[Batch],
    attack: Attack,
    *,
    origin: str = "the other model",
    right: Tensor | None = None,
    evaluator: Evaluator | None = None,
) -> Check:
    """Perturbations found on another model must not fool more samples than the model's own.

    Args:
        title: the attacked model's name.
        target: the attacked model and its sites.
        source: the model that the perturbations are transferred from, with its sites.
        batches: the samples; the two models must embed them in the same shape.
        attack: run on the source, and on the target unless `right` is given.
        origin: the source's name.
        right: whether each sample is right under an attack on the target that is no weaker, bool
            [N], where that is known.
        evaluator: see `embattle.audit.evaluation.evaluate`.

    Returns:
        The check.
    """
    model, sites = target
    own = moved = total = 0
    with examined(model), examined(source[0]):
        for batch in batches:
            batch = batch.to(next(model.parameters()).device)
            these = slice(total, total + len(batch))
            total += len(batch)
            found = run_attack(
                source[0], batch, source[1], attack, evaluator=evaluator, evaluate=False
            )
            given = _Given(norm=attack.norm, eps=math.inf, steps=0, deltas=found.deltas)
            tries = {"moved": given} if right is not None else {"moved": given, "own": attack}
            done = evaluate(model, [batch], sites, tries, evaluator=evaluator)
            moved += int((~done["moved"].right).sum())
            own += int((~(done["own"].right if right is None else right[these])).sum())
    return Check(
        f"{title}: an attack transferred from {origin} is no stronger than its own",
        moved <= own,
        f"{moved} of {total} wrong under the transferred attack, {own} under its own",
    )


@dataclass(kw_only=True, repr=False)
class _Given(Attack):
    """Perturbations that are known already, in the order of the perturbed outputs."""

    deltas: Sequence[Tensor]

    def __post_init__(self) -> None:
        super().__post_init__()
        self._next = iter(self.deltas)

    def start(
        self, perturbation: Perturbation, state: dict[str, Any], generator: torch.Generator | None
    ) -> None:
        """Take the next one."""
        perturbation.set(next(self._next))
