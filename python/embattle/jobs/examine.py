"""How the audit examines one model: under every attack of the recipe, and over eps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from embattle.attacks.minimum import NoSmallestError
from embattle.audit.evaluation import evaluate, sweep
from embattle.audit.measure import Measurement, measure
from embattle.audit.outcomes import Attacked, success_rate, worst_of
from embattle.audit.smallest import smallest, standing
from embattle.audit.victim import Victim
from embattle.data.batch import Batch
from embattle.jobs.attack_recipe import AttackRecipe, attack_recipe
from embattle.jobs.recipe import Recipe
from embattle.jobs.threat import make_attack, strength_of
from embattle.progress import bar
from embattle.tasks.base import Task

# Points of a curve that costs nothing.
_POINTS = 24


def examine(
    recipe: Recipe, name: str, model: nn.Module, task: Task, batches: list[Batch]
) -> tuple[Victim, dict[str, Any]]:
    """Scores one model without attack, under each attack, and over eps."""
    return _Examination(recipe, name, model, task, batches).run()


@dataclass
class _Examination:
    """One model, and what is found of it.

    Attacks with figures of their own come first, each on all samples. Then the attack of the curve,
    and the ensemble, which leaves alone what has fallen: its figure is that of all attacks.
    """

    recipe: Recipe
    name: str
    model: nn.Module
    task: Task
    batches: list[Batch]

    def run(self) -> tuple[Victim, dict[str, Any]]:
        recipe, kind, threat = self.recipe, self.task.kind, self.recipe.threat
        sites = self.task.sites(self.model, threat.group)
        self.size: Measurement = measure(
            self.model,
            self.batches,
            sites,
            to=None if threat.unit == "absolute" else threat.unit,
            norm=threat.norm,
            evaluator=self.task,
        )
        self.labels = labels_of(self.batches)
        self.generator = torch.Generator().manual_seed(recipe.seed)
        eps = strength_of(threat, threat.eps, self.size.unit)
        right = kind.right(self.size.outputs, self.labels)
        self.victim = Victim(self.model, sites, self.size.outputs, right, threat.norm, eps)
        # What turned samples in which multiple of the threat's ball.
        self.found: list[tuple[float, Attacked]] = []
        table = recipe.audit.table()
        parts = len(table) + (1 if self._searches else len(self._scales))
        facts: dict[str, Any] = {"clean": kind.scores(self.size.outputs, self.labels)}
        with bar(f"attacking {self.name}", len(self.batches) * parts) as show:
            done = 0

            def tick() -> None:
                nonlocal done
                done += 1
                show(min(done, len(self.batches) * parts), {})

            for label, (attack, scale) in table.items():
                if attack.kind != "ensemble":
                    self._attack(label, attack, scale, tick)
            searched = self._searches and self._search(tick)
            for label, (attack, scale) in table.items():
                if attack.kind == "ensemble":
                    self._attack(label, attack, scale, tick)
            self.victim.attacked = {label: self.victim.attacked[label] for label in table}
            curve = self._joined() if searched else self._sweep(tick)
        facts["attacks"] = {
            label: self._row(self.victim.attacked[label])
            | {"eps": scale * threat.eps, "eps_absolute": self._absolute(scale)}
            for label, (_, scale) in table.items()
        }
        self.victim.worst = self._worst(1.0)
        facts["worst"] = self._row(self.victim.worst)
        facts["sweep"] = curve
        facts["vector_norm"] = self.size.vector_norm
        return self.victim, facts

    @property
    def _searches(self) -> bool:
        return self.recipe.audit.sweep_attack.kind == "minimum_norm"

    @property
    def _scales(self) -> list[float]:
        return sorted(scale for scale in self.recipe.audit.sweep if scale > 0)

    def _attack(
        self, label: str, attack: AttackRecipe, scale: float, tick: Callable[[], None]
    ) -> None:
        """Run an attack of the table: an ensemble on what stands, another one for its own row."""
        victim, kind = self.victim, self.task.kind
        whole = attack.kind == "ensemble"
        made = make_attack(
            attack,
            self.recipe.threat,
            self.generator,
            scale=scale,
            best=True,
            unit=self.size.unit,
        )
        known = self._worst(scale) if whole else victim.unattacked
        under = evaluate(
            victim.model,
            self.batches,
            victim.sites,
            {label: made},
            evaluator=self.task,
            # Where measures depend on how wrong samples are, those that are wrong are attacked too.
            known=known if whole or not kind.graded else None,
            leave=not kind.graded,
            tick=tick,
        )[label]
        if whole:
            under = replace(
                worst_of(kind, self.labels, [known, under]),
                steps=under.steps,
                seconds=under.seconds,
                by=under.by,
            )
        victim.attacked[label] = under
        if scale == 1.0:
            victim.attacks[label] = made
        self.found.append((scale, under))

    def _search(self, tick: Callable[[], None]) -> bool:
        """Search the smallest perturbations; False where samples have none of their own."""
        victim, threat = self.victim, self.recipe.threat
        attack: Any = make_attack(
            self.recipe.audit.sweep_attack, threat, self.generator, unit=self.size.unit
        )
        try:
            found = smallest(
                victim.model,
                self.batches,
                victim.sites,
                attack,
                known=victim.unattacked,
                radius=threat.eps,
                evaluator=self.task,
                tick=tick,
            )
        except NoSmallestError:
            return False
        victim.radii = found.radii / threat.eps if threat.eps else found.radii
        for scale in sorted({*self.recipe.audit.strengths, 1.0}):
            self.found.append((scale, found.within(scale * threat.eps)))
        self.found.append((1.0, found.edge))
        return True

    def _joined(self) -> dict[str, Any]:
        """The curve: from the smallest perturbations, and from what fixed balls turned."""
        radii, eps = self.victim.radii, self.recipe.threat.eps
        assert radii is not None
        for scale, under in self.found:
            radii = torch.where(under.right, radii, radii.clamp(max=scale))
        self.victim.radii = radii
        largest = max(self._scales)
        fine = (largest * k / _POINTS for k in range(1, _POINTS + 1))
        scales = sorted({0.0, *self._scales, *(round(scale, 9) for scale in fine)})
        fallen = radii[self.victim.right & radii.isfinite()]
        return {
            "attack": self.recipe.audit.sweep_attack.label,
            "kind": "minimum_norm",
            "eps": [scale * eps for scale in scales],
            self.task.kind.measures[0][0]: standing(radii, scales),
            "median_eps": float(fallen.median()) * eps if len(fallen) else None,
        }

    def _sweep(self, tick: Callable[[], None]) -> dict[str, Any]:
        """The curve: an attack at each eps on the samples that stand."""
        victim, audit, key = self.victim, self.recipe.audit, self.task.kind.measures[0][0]
        attack, scales = audit.sweep_attack, self._scales
        if attack.kind == "minimum_norm":
            attack, tick = attack_recipe(kind="pgd", steps=attack.steps), lambda: None
        fallen = [
            torch.stack(found).any(0) if found else None
            for found in (
                [~under.right for at, under in self.found if at <= scale] for scale in scales
            )
        ]
        balls = [
            # There the attacks of the table have been.
            None
            if scale == 1.0 and self._as_strong(attack)
            else make_attack(
                attack,
                self.recipe.threat,
                self.generator,
                scale=scale,
                unit=self.size.unit,
            )
            for scale in scales
        ]
        shares = sweep(
            victim.model,
            self.batches,
            victim.sites,
            balls,
            fallen=fallen,
            evaluator=self.task,
            tick=tick,
        )
        return {
            "attack": attack.label,
            "kind": "sweep",
            "eps": [0.0, *(scale * self.recipe.threat.eps for scale in scales)],
            key: [float(victim.right.double().mean()), *shares],
        }

    def _as_strong(self, curve: AttackRecipe) -> bool:
        """Whether the table has an attack that is no weaker than that of the curve."""
        return any(
            attack.kind in (curve.kind, "ensemble")
            and attack.steps >= curve.steps
            and attack.restarts >= curve.restarts
            for attack in self.recipe.audit.attacks
        )

    def _worst(self, scale: float) -> Attacked:
        """Each sample's worst so far in a ball: over all attacks in it, and in smaller ones."""
        found = [under for at, under in self.found if at <= scale]
        return worst_of(self.task.kind, self.labels, [self.victim.unattacked, *found])

    def _row(self, under: Attacked) -> dict[str, Any]:
        """What is said of an outcome."""
        return {
            **self.task.kind.scores(under.outputs, self.labels),
            "success_rate": success_rate(self.victim.right, under.right),
            "perturbation_norm": under.norm,
            "seconds": round(under.seconds, 2),
        }

    def _absolute(self, scale: float) -> float | list[float]:
        """The radius as a number: one for each place, where embeddings at several are attacked."""
        threat, unit = self.recipe.threat, self.size.unit
        if threat.unit == "absolute":
            return threat.eps * scale
        radii = [threat.eps * scale * unit.at(place) for place in unit.values]
        return radii[0] if len(set(radii)) == 1 else radii


def labels_of(batches: Sequence[Batch]) -> Tensor:
    """The labels of batches, [N, ...]."""
    return torch.cat([batch.known_labels() for batch in batches])
