"""The audit job: all models of a run under every attack of its recipe, and the report."""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from embattle.audit import figures
from embattle.audit.evaluation import (
    Attacked,
    evaluate,
    predict,
    success_rate,
    sweep,
    vector_norm,
)
from embattle.audit.honesty import order_checks, transfer_check, unbounded_check
from embattle.audit.html import Fallen
from embattle.audit.report import document, summary_rows, threat_words, unit_words
from embattle.data.account import Account
from embattle.data.batch import Batch
from embattle.errors import InputError
from embattle.files import remove_unfinished, replacing, write_text
from embattle.jobs import recipe as recipes
from embattle.jobs.attack_recipe import attack_recipe
from embattle.jobs.column_recipe import check_columns, column_lines, examine_columns
from embattle.jobs.doctor import version_of
from embattle.jobs.recipe import STANDARD, AuditRecipe, Recipe
from embattle.jobs.run_folder import Run, locked
from embattle.jobs.threat import make_attack
from embattle.jobs.train import read
from embattle.perturb.site import Site
from embattle.progress import bar, say
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


def audit(folder: Path, *, trust: bool = False) -> None:
    """Audits a run and writes `metrics.json`, `curves.png` and `report.html` into its folder.

    The files are written when everything is known, each of them whole or not at all.

    Args:
        folder: a run that `embattle train` finished.
        trust: whether a task that is code of one's own may be run.

    Raises:
        InputError: if the folder is no finished run, or the data is no longer the same.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a run folder; give one that `embattle train` wrote")
    with locked(folder, "audit"):
        _audit(folder, trust)


def _audit(folder: Path, trust: bool) -> None:
    """The same, in a folder that no other process works in."""
    began = time.monotonic()
    run = Run.read(folder)
    remove_unfinished(folder)
    recipe = recipes.load(folder / "recipe.yaml", trust=trust)
    unfinished = [name for name in recipe.variants if name not in run.variants]
    if unfinished:
        raise InputError(
            f"{folder} is not finished ({', '.join(unfinished)} missing); "
            "go on with `embattle train --resume`"
        )
    task, account = recipe.make_task(), Account()
    part = recipe.audit.part
    read(task, account, part)
    run.require(Run.of(task, account), folder)
    # Everything that is needed is looked at before the first attack, which may take minutes.
    models = {name: task.load(folder / name).to(_device()) for name in recipe.variants}
    for model in models.values():
        check_columns(recipe.audit.columns, task, model)
    facts: dict[str, Any] = {
        "name": recipe.name,
        "seed": recipe.seed,
        "part": part,
        "examples": len(task.parts[part]),
        "task": recipe.task,
        "words": {"sample": task.sample, "vector": task.vector},
        "measures": [list(measure) for measure in task.kind.measures],
        "note": task.kind.note,
        "shown": task.kind.shown,
        "facts": run.facts,
        "counts": run.counts,
        "threat": recipe.threat.model_dump(),
        "variants": {name: variant.words for name, variant in recipe.variants.items()},
        "models": {},
        "checks": [],
    }
    victims: dict[str, Victim] = {}
    batches: list[Batch] = []
    for name, model in models.items():
        batches = task.batches(model, part, recipe.audit.batch_size)
        victims[name], facts["models"][name] = _examine(recipe, name, model, task, batches)
        facts["models"][name] |= examine_columns(recipe.audit.columns, task, model, batches)
    few = batches[: math.ceil(CHECKED / len(batches[0]))]
    facts["checks"] = _check(recipe, task, victims, few, facts)
    facts |= {
        "train_seconds": {name: run.variants[name].seconds for name in recipe.variants},
        "audit_seconds": round(time.monotonic() - began, 1),
        "environment": _environment(),
    }
    labels = _labels(batches)
    curves = _curves(recipe, facts, task.kind.chance(labels))
    histories = {name: run.variants[name].history for name in recipe.variants}
    losses = figures.losses_over_steps(histories)
    html = document(
        facts,
        settings=recipe.to_yaml(),
        curves=curves,
        losses=losses,
        samples=_samples(task, part, labels, victims),
    )
    write_text(folder / "metrics.json", json.dumps(_plain(facts), indent=2) + "\n")
    with replacing(folder / "curves.png") as unfinished_file:
        unfinished_file.write_bytes(curves)
    write_text(folder / "report.html", html)
    for line in column_lines(task, facts["models"]):
        say(line)
    _print(facts, folder)


def _examine(
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
    clean, labels = predict(model, batches, task), _labels(batches)
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


def _check(
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


def _samples(task: Task, part: str, labels: Tensor, victims: dict[str, Victim]) -> list[list[str]]:
    """Samples that all models get right and the strongest attack turns on the standard one."""
    standard = victims[STANDARD]
    last = list(standard.attacked)[-1]
    turned = torch.stack([victim.right for victim in victims.values()]).all(0)
    turned &= ~standard.attacked[last].right
    rows = []
    for i in torch.nonzero(turned).flatten()[:8].tolist():
        shown = task.show(part, i)
        shown = shown if len(shown) <= 160 else shown[:157] + "..."
        cells = [shown, task.kind.show_label(labels[i])]
        for victim in victims.values():
            under = victim.attacked[last]
            for outputs, right in ((victim.clean, victim.right), (under.outputs, under.right)):
                text = task.kind.show(outputs[i], labels[i])
                cells.append(text if right[i] else Fallen(text))
        rows.append(cells)
    return rows


def _labels(batches: Sequence[Batch]) -> Tensor:
    return torch.cat([batch.known_labels() for batch in batches])


def _curves(recipe: Recipe, facts: dict[str, Any], chance: float | None) -> bytes:
    models, (key, title) = facts["models"], facts["measures"][0]
    return figures.accuracy_over_eps(
        {name: model["sweep"][key] for name, model in models.items()},
        models[STANDARD]["sweep"]["eps"],
        trained=recipe.threat.eps,
        chance=chance,
        unit=unit_words(facts),
        attack=models[STANDARD]["sweep"]["attack"],
        measure=title,
    )


def _environment() -> dict[str, Any]:
    packages = ("embattle", "torch", "transformers", "accelerate", "numpy")
    device = _device()
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else None
    return {
        "python": platform.python_version(),
        **{name: version_of(name) for name in packages if version_of(name)},
        "device": gpu or f"CPU, {torch.get_num_threads()} threads of {os.cpu_count()} cores",
        "machine": platform.machine(),
    }


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _plain(value: Any) -> Any:
    """The same value with NaN as None: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _print(facts: dict[str, Any], folder: Path) -> None:
    """The table, the checks and the path, as text."""
    say(f"{facts['name']}, seed {facts['seed']}, {facts['examples']} {facts['part']} examples")
    say(f"attacks: {threat_words(facts)}")
    titles = [*(title for _, title in facts["measures"]), "flipped"]
    widths = [max(7, len(title) + 2) for title in titles]
    columns = "".join(f"{title:>{width}}" for title, width in zip(titles, widths, strict=True))
    names = list(facts["models"])
    # Two models stand side by side.
    for pair in (names[i : i + 2] for i in range(0, len(names), 2)):
        rows = summary_rows(facts, pair)
        first = max(len(row[0]) for row in rows)
        say("")
        say(" " * first + "".join(f"{name:^{len(columns)}}" for name in pair).rstrip())
        say(" " * first + columns * len(pair))
        for row in rows:
            every = zip(row[1:], widths * len(pair), strict=True)
            say(f"{row[0]:<{first}}{''.join(f'{cell:>{width}}' for cell, width in every)}".rstrip())
    say("")
    for check in facts["checks"]:
        if not check["passed"]:
            say(f"check fails: {check['name']} ({check['detail']})")
    held = sum(check["passed"] for check in facts["checks"])
    spent = sum(facts["train_seconds"].values())
    say(f"checks on the attacks: {held} of {len(facts['checks'])} hold")
    say(f"training {spent:.0f} s, audit {facts['audit_seconds']:.0f} s")
    say(f"report: {folder / 'report.html'}")
