"""How the audit examines one model: by its recipe."""

from __future__ import annotations

from functools import partial
from itertools import count
from typing import Any

import torch
from torch import nn

from embattle.attacks import Attack
from embattle.audit.examine import POINTS, Curve, Examination
from embattle.audit.victim import Victim
from embattle.data.batch import Batch
from embattle.jobs.attack_recipe import AttackRecipe, attack_recipe
from embattle.jobs.audit_recipe import AuditRecipe
from embattle.jobs.recipe import Recipe
from embattle.jobs.threat import make_attack
from embattle.perturb.strength import Measured, Strength, scaled
from embattle.progress import bar
from embattle.tasks.base import Task


def examine(
    recipe: Recipe, name: str, model: nn.Module, task: Task, batches: list[Batch]
) -> tuple[Victim, dict[str, Any]]:
    """Scores one model without attack, under each attack, and over eps."""
    audit, threat = recipe.audit, recipe.threat
    one = Examination(
        model,
        batches,
        task.sites(model, threat.group),
        evaluator=task,
        norm=threat.norm,
        eps=threat.eps,
        unit=threat.unit,
        go_on=audit.go_on,
    )
    generator = torch.Generator().manual_seed(recipe.seed)
    make = partial(make_attack, threat=threat, generator=generator, unit=one.unit)
    table = audit.table()
    attacks = {
        label: (make(attack, scale=scale, best=True), scale)
        for label, (attack, scale) in table.items()
    }
    scales, curve = sorted(audit.sweep), audit.sweep_attack
    search: Any = (curve.label, make(curve)) if curve.kind == "minimum_norm" else None
    balls = curve if search is None else attack_recipe(kind="pgd", steps=curve.steps)
    strong: dict[float, Attack | None] = {scale: make(balls, scale=scale) for scale in scales}
    if 1.0 in strong and _as_strong(audit, balls):  # there the attacks of the table have been
        strong[1.0] = None
    fine = (round(scales[-1] * k / POINTS, 9) for k in range(1, POINTS + 1))
    eps = [scale * threat.eps for scale in sorted({0.0, *scales, *fine})]
    steps = len(batches) * (len(table) + (1 if search else len(scales)))
    with bar(f"attacking {name}", steps) as show:
        done = count(1)
        facts = one.run(
            attacks,
            Curve(search, eps, (balls.label, strong)),
            lambda: show(min(next(done), steps), {}),
        )
    victim = one.victim
    for label, (_, scale) in table.items():
        absolute = _absolute(scaled(victim.eps, scale))
        facts["attacks"][label] |= {"eps": scale * threat.eps, "eps_absolute": absolute}
    if victim.radii is not None:
        fallen = victim.radii[victim.right & victim.radii.isfinite()]
        median = float(fallen.median()) * threat.eps if len(fallen) else None
        facts["sweep"]["median_eps"] = median
    return victim, facts


def _as_strong(audit: AuditRecipe, curve: AttackRecipe) -> bool:
    """Whether the table has an attack that is no weaker than that of the curve."""
    return any(
        attack.kind in (curve.kind, "ensemble")
        and attack.steps >= curve.steps
        and attack.restarts >= curve.restarts
        for attack in audit.attacks
    )


def _absolute(eps: Strength) -> float | list[float]:
    """A radius as a number: one for each place, where embeddings at several are attacked."""
    if not isinstance(eps, Measured):
        return float(eps)  # type: ignore[arg-type]
    radii = [eps.at(place) for place in eps.values]
    return radii[0] if len(set(radii)) == 1 else radii
