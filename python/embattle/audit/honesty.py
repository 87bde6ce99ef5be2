"""Checks on the attacks themselves: robustness that rests on a weak attack is none.

Athalye, Carlini and Wagner (ICML 2018, section 3.1) list how a defence that only hides its
gradients gives itself away: each sign is a check here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from embattle.attacks import Attack
from embattle.audit.evaluation import evaluate, examined, run_attack
from embattle.data.batch import Batch
from embattle.perturb.site import Site


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
    title: str, accuracies: Mapping[str, float], *, noise: Sequence[str], gradient: Sequence[str]
) -> list[Check]:
    """Noise must not beat the strongest gradient attack, nor fewer steps more steps.

    Args:
        title: the model's name.
        accuracies: accuracy under each attack, by name.
        noise: names of the attacks without gradients.
        gradient: names of the gradient attacks, from the weakest to the strongest.

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
                f"accuracy {accuracies[random]:.3f} under {random}, "
                f"{accuracies[best]:.3f} under {best}",
            )
        )
    for weak, strong in pairwise(gradient):
        checks.append(
            Check(
                f"{title}: {strong} is no weaker than {weak}",
                accuracies[strong] <= accuracies[weak],
                f"accuracy {accuracies[weak]:.3f} under {weak}, "
                f"{accuracies[strong]:.3f} under {strong}",
            )
        )
    return checks


def unbounded_check(
    title: str, model: nn.Module, batches: Sequence[Batch], site: Site, attack: Attack
) -> Check:
    """An attack whose ball is so large that it bounds nothing must fool every example.

    Args:
        title: the model's name.
        model, batches, site: see `embattle.audit.evaluation.evaluate`.
        attack: with a radius far beyond the size of the embeddings.

    Returns:
        The check.
    """
    logits = evaluate(model, batches, site, {"unbounded": attack})["unbounded"].logits
    labels = torch.cat([batch.labels for batch in batches]).cpu()
    standing = int((logits.argmax(1) == labels).sum())
    return Check(
        f"{title}: an attack without a bound fools every example",
        standing == 0,
        f"{len(labels) - standing} of {len(labels)} fooled",
    )


def transfer_check(
    title: str,
    target: tuple[nn.Module, Site],
    source: tuple[nn.Module, Site],
    batches: Sequence[Batch],
    attack: Attack,
) -> Check:
    """Perturbations found on another model must not fool more examples than the model's own.

    Args:
        title: the attacked model's name.
        target: the attacked model and its site.
        source: the model that the perturbations are transferred from, with its site.
        batches: the examples; the two models must embed them in the same shape.
        attack: run on both models.

    Returns:
        The check.
    """
    model, site = target
    own = moved = total = 0
    with examined(model), examined(source[0]):
        for batch in batches:
            batch = batch.to(next(model.parameters()).device)
            total += len(batch)
            delta = run_attack(source[0], batch, source[1], attack, evaluate=False).delta
            handle = site.module.register_forward_hook(_adding(delta))
            try:
                with torch.no_grad():
                    moved += int((model(**batch.inputs).argmax(1) != batch.labels).sum())
            finally:
                handle.remove()
            worst = evaluate(model, [batch], site, {"own": attack})["own"].logits
            own += int((worst.argmax(1) != batch.labels.cpu()).sum())
    return Check(
        f"{title}: an attack transferred from the other model is no stronger than its own",
        moved <= own,
        f"{moved} of {total} wrong under the transferred attack, {own} under its own",
    )


def _adding(delta: Tensor) -> Callable[[nn.Module, object, Tensor], Tensor]:
    def hook(module: nn.Module, args: object, output: Tensor) -> Tensor:
        return output + delta

    return hook
