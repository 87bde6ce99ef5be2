"""How the audit examines one model: under every attack, over eps, and the checks on the attacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from embattle.audit.evaluation import (
    Attacked,
    evaluate,
    predict,
    success_rate,
    sweep,
    vector_norm,
)
from embattle.audit.honesty import order_checks, transfer_check, unbounded_check
from embattle.data.batch import Batch
from embattle.jobs.attack_recipe import attack_recipe
from embattle.jobs.recipe import AuditRecipe, Recipe
from embattle.jobs.threat import make_attack
from embattle.perturb.site import Site
from embattle.progress import bar
from embattle.tasks.base import Task

# Examples on which the checks that need further attacks are made.
CHECKED = 100


@dataclass
class Victim:
    """A model under audit.

    Attributes:
        model: the model.
        sites: where it is attacked.
        clean: outputs without attack, [N, ...].
        right: where those are right, bool [N].
        attacked: what each attack achieved, by the attack's label.
    """

    model: nn.Module
    sites: list[Site]
    clean: Tensor
    right: Tensor
    attacked: dict[str, Attacked]


def examine(
    recipe: Recipe, name: str, model: nn.Module, task: Task, batches: list[Batch]
) -> tuple[Victim, dict[str, Any]]:
    """Scores one model without attack, under each attack, and over eps."""
    sites = task.sites(model, recipe.threat.group)
    generator = torch.Generator().manual_seed(recipe.seed)
    attacks = {
        label: make_attack(attack, recipe.threat, generator, best=True)
        for label, attack in recipe.audit.labelled().items()
    }
    scales = sorted(scale for scale in recipe.audit.sweep if scale > 0)
    # At the threat's own eps the attacks of the table have been.
    swept = [
        None
        if scale == 1 and _as_strong(recipe.audit)
        else make_attack(recipe.audit.sweep_attack, recipe.threat, generator, scale=scale)
        for scale in scales
    ]
    clean, labels = predict(model, batches, task), labels_of(batches)
    scores = task.kind.scores(clean, labels)
    facts: dict[str, Any] = {"clean": scores, "attacks": {}}
    victim = Victim(model, sites, clean, task.kind.right(clean, labels), {})
    total = len(batches) * (len(attacks) + len(swept))
    with bar(f"attacking {name}", total) as show:
        done = 0

        def tick() -> None:
            nonlocal done
            done += 1
            show(done, {})

        for label, attack in attacks.items():
            found = evaluate(model, batches, sites, {label: attack}, evaluator=task, tick=tick)
            result = found[label]
            victim.attacked[label] = result
            facts["attacks"][label] = {
                **task.kind.scores(result.outputs, labels),
                "success_rate": success_rate(victim.right, result.right),
                "perturbation_norm": result.norm,
                "seconds": round(result.seconds, 2),
            }
        turned = torch.stack([~under.right for under in victim.attacked.values()]).any(0)
        fallen = [turned if scale >= 1 else None for scale in scales]
        shares = sweep(model, batches, sites, swept, fallen=fallen, evaluator=task, tick=tick)
    facts["sweep"] = {
        "attack": recipe.audit.sweep_attack.label,
        "eps": [0.0, *(scale * recipe.threat.eps for scale in scales)],
        task.kind.measures[0][0]: [scores[task.kind.measures[0][0]], *shares],
    }
    facts["vector_norm"] = vector_norm(model, batches, sites, task)
    return victim, facts


def _as_strong(audit: AuditRecipe) -> list[str]:
    """The labels of the table's attacks that are no weaker than that of the curve."""
    curve = audit.sweep_attack
    return [
        label
        for label, attack in audit.labelled().items()
        if attack.kind == curve.kind
        and attack.steps >= curve.steps
        and attack.restarts >= curve.restarts
    ]


def check_attacks(
    recipe: Recipe,
    task: Task,
    victims: dict[str, Victim],
    batches: list[Batch],
    facts: dict[str, Any],
) -> list[dict[str, Any]]:
    """The honesty checks of all models."""
    generator = torch.Generator().manual_seed(recipe.seed)
    labelled = recipe.audit.labelled()
    noise = [label for label, attack in labelled.items() if attack.kind == "noise"]
    gradient = [label for label, attack in labelled.items() if attack.kind != "noise"]
    strong = recipe.audit.sweep_attack
    key, title = task.kind.measures[0]
    checks = []
    far = attack_recipe(kind="pgd", steps=20, step_size=0.1)
    for name, victim in victims.items():
        shares = {label: entry[key] for label, entry in facts["models"][name]["attacks"].items()}
        checks += order_checks(name, shares, noise=noise, gradient=gradient, measure=title)
        huge = [
            make_attack(far, recipe.threat, generator, scale=scale, best=True)
            for scale in (10.0, 100.0, 1000.0)
        ]
        checks.append(
            unbounded_check(name, victim.model, batches, victim.sites, huge, evaluator=task)
        )
        attack = make_attack(strong, recipe.threat, generator)
        best = [victim.attacked[label].right for label in _as_strong(recipe.audit)]
        right = best[-1] if best else None
        for origin, other in victims.items():
            if other is not victim:
                pair = (victim.model, victim.sites), (other.model, other.sites)
                checks.append(
                    transfer_check(
                        name, *pair, batches, attack, origin=origin, right=right, evaluator=task
                    )
                )
    return [asdict(check) for check in checks]


def labels_of(batches: Sequence[Batch]) -> Tensor:
    return torch.cat([batch.known_labels() for batch in batches])
