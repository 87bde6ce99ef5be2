"""The audit job: both models of a run under every attack of its recipe, and the report."""

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
from torch import Tensor

from embattle import data
from embattle.audit import figures
from embattle.audit.evaluation import evaluate, predict, sweep
from embattle.audit.honesty import order_checks, transfer_check, unbounded_check
from embattle.audit.html import Fallen
from embattle.audit.metrics import score, success_rate
from embattle.audit.report import UNITS, document, summary_rows, threat_words
from embattle.data.batch import Batch
from embattle.errors import InputError
from embattle.files import remove_unfinished, replacing, write_text
from embattle.jobs import recipe as recipes
from embattle.jobs.doctor import version_of
from embattle.jobs.recipe import AttackRecipe, Recipe
from embattle.jobs.run_folder import Run, locked
from embattle.jobs.threat import make_attack
from embattle.jobs.train import VARIANTS
from embattle.models import TextClassifier, load
from embattle.perturb.site import Site
from embattle.progress import bar, say

# Examples on which the checks that need further attacks are made.
CHECKED = 100


@dataclass
class Victim:
    """A model under audit.

    Attributes:
        model: the model.
        site: where it is attacked.
        clean: logits without attack, [N, C].
        attacked: logits under each attack, by the attack's label.
    """

    model: TextClassifier
    site: Site
    clean: Tensor
    attacked: dict[str, Tensor]


def audit(folder: Path) -> None:
    """Audits a run and writes `metrics.json`, `curves.png` and `report.html` into its folder.

    The files are written when everything is known, each of them whole or not at all.

    Args:
        folder: a run that `embattle train` finished.

    Raises:
        InputError: if the folder is no finished run, or the data is no longer the same.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a run folder; give one that `embattle train` wrote")
    with locked(folder, "audit"):
        _audit(folder)


def _audit(folder: Path) -> None:
    """The same, in a folder that no other process works in."""
    began = time.monotonic()
    run = Run.read(folder)
    remove_unfinished(folder)
    unfinished = [name for name in VARIANTS if name not in run.variants]
    if unfinished:
        raise InputError(
            f"{folder} is not finished ({', '.join(unfinished)} missing); "
            "go on with `embattle train --resume`"
        )
    recipe = recipes.load(folder / "recipe.yaml")
    splits = data.load(recipe.data, recipe.seed)
    run.require(splits, folder)
    # Everything that is needed is looked at before the first attack, which may take minutes.
    models = {name: load(folder / name).to(_device()) for name in VARIANTS}
    for name, model in models.items():
        if model.head.out_features != len(run.classes):
            raise InputError(
                f"{folder / name} names {model.head.out_features} classes and the run "
                f"{len(run.classes)}; train again with --overwrite"
            )
    examples = splits.parts[recipe.audit.part]
    facts: dict[str, Any] = {"models": {}, "checks": []}
    victims: dict[str, Victim] = {}
    batches: list[Batch] = []
    for name, model in models.items():
        batches = model.encode(examples.texts, examples.labels).split(recipe.audit.batch_size)
        labels = torch.tensor(examples.labels)
        victims[name], facts["models"][name] = _examine(recipe, name, model, batches, labels)
    facts["checks"] = _check(
        recipe, victims, batches[: math.ceil(CHECKED / len(batches[0]))], facts
    )
    facts = {
        "name": recipe.name,
        "seed": recipe.seed,
        "part": recipe.audit.part,
        "examples": len(examples),
        "classes": run.classes,
        "counts": run.counts,
        "threat": recipe.threat.model_dump(),
        **facts,
        "train_seconds": {name: run.variants[name].seconds for name in VARIANTS},
        "audit_seconds": round(time.monotonic() - began, 1),
        "environment": _environment(),
    }
    curves = _curves(recipe, facts, examples.labels)
    losses = figures.losses_over_steps({str(name): run.variants[name].history for name in VARIANTS})
    samples = _samples(examples.texts, torch.tensor(examples.labels), victims, run.classes)
    html = document(
        facts,
        settings=recipe.to_yaml(),
        trained_against=recipe.harden.attack.label,
        curves=curves,
        losses=losses,
        samples=samples,
    )
    write_text(folder / "metrics.json", json.dumps(_plain(facts), indent=2) + "\n")
    with replacing(folder / "curves.png") as part:
        part.write_bytes(curves)
    write_text(folder / "report.html", html)
    _print(recipe, facts, folder)


def _examine(
    recipe: Recipe, name: str, model: TextClassifier, batches: list[Batch], labels: Tensor
) -> tuple[Victim, dict[str, Any]]:
    """Scores one model without attack, under each attack, and over eps."""
    site = Site(model.embedding, group=recipe.threat.group)
    generator = torch.Generator().manual_seed(recipe.seed)
    attacks = {
        label: make_attack(attack, recipe.threat, generator, best=True)
        for label, attack in recipe.audit.labelled().items()
    }
    scales = sorted(scale for scale in recipe.audit.sweep if scale > 0)
    swept = [
        make_attack(recipe.audit.sweep_attack, recipe.threat, generator, scale=scale)
        for scale in scales
    ]
    clean = predict(model, batches)
    scores = score(clean, labels)
    facts: dict[str, Any] = {"clean": asdict(scores), "attacks": {}}
    victim = Victim(model, site, clean, {})
    total = len(batches) * (len(attacks) + len(swept))
    with bar(f"attacking {name}", total) as show:
        done = 0

        def tick() -> None:
            nonlocal done
            done += 1
            show(done, {})

        for label, attack in attacks.items():
            result = evaluate(model, batches, site, {label: attack}, tick=tick)[label]
            victim.attacked[label] = result.logits
            facts["attacks"][label] = {
                **asdict(score(result.logits, labels)),
                "success_rate": success_rate(clean, result.logits, labels),
                "perturbation_norm": result.norm,
                "seconds": round(result.seconds, 2),
            }
        accuracies = sweep(model, batches, site, swept, tick=tick)
    facts["sweep"] = {
        "attack": recipe.audit.sweep_attack.label,
        "eps": [0.0, *(scale * recipe.threat.eps for scale in scales)],
        "accuracy": [scores.accuracy, *accuracies],
    }
    facts["token_norm"] = _token_norm(model, batches)
    return victim, facts


@torch.no_grad()
def _token_norm(model: TextClassifier, batches: list[Batch]) -> float:
    """Mean l2 norm of the movable token embeddings."""
    norms = []
    for batch in batches:
        batch = batch.to(_device())
        norm = model.embedding(batch.inputs["input_ids"]).float().norm(dim=-1)
        norms.append(norm if batch.movable is None else norm[batch.movable])
    return float(torch.cat([n.flatten() for n in norms]).mean())


def _check(
    recipe: Recipe, victims: dict[str, Victim], batches: list[Batch], facts: dict[str, Any]
) -> list[dict[str, Any]]:
    """The honesty checks of all models."""
    generator = torch.Generator().manual_seed(recipe.seed)
    labelled = recipe.audit.labelled()
    noise = [label for label, attack in labelled.items() if attack.kind == "noise"]
    gradient = [label for label, attack in labelled.items() if attack.kind != "noise"]
    strong = recipe.audit.sweep_attack
    checks = []
    for name, victim in victims.items():
        accuracies = {
            label: entry["accuracy"] for label, entry in facts["models"][name]["attacks"].items()
        }
        checks += order_checks(name, accuracies, noise=noise, gradient=gradient)
        far = AttackRecipe(kind="pgd", steps=20, step_size=0.1)
        huge = make_attack(far, recipe.threat, generator, scale=1000.0, best=True)
        checks.append(unbounded_check(name, victim.model, batches, victim.site, huge))
        other = next(v for n, v in victims.items() if n != name)
        attack = make_attack(strong, recipe.threat, generator)
        pair = (victim.model, victim.site), (other.model, other.site)
        checks.append(transfer_check(name, *pair, batches, attack))
    return [asdict(check) for check in checks]


def _samples(
    texts: Sequence[str], labels: Tensor, victims: dict[str, Victim], classes: list[str]
) -> list[list[str]]:
    """Examples that both models get right and the strongest attack turns on the standard one."""
    standard, hardened = (victims[name] for name in VARIANTS)
    last = list(standard.attacked)[-1]
    turned = (
        (standard.clean.argmax(1) == labels)
        & (hardened.clean.argmax(1) == labels)
        & (standard.attacked[last].argmax(1) != labels)
    )
    rows = []
    for i in torch.nonzero(turned).flatten()[:8].tolist():
        text = texts[i] if len(texts[i]) <= 160 else texts[i][:157] + "..."
        cells = [text, classes[int(labels[i])]]
        for victim in (standard, hardened):
            for logits in (victim.clean, victim.attacked[last]):
                share = float(logits[i].softmax(0)[labels[i]])
                right = int(logits[i].argmax()) == int(labels[i])
                cells.append(f"{share:.0%}" if right else Fallen(f"{share:.0%}"))
        rows.append(cells)
    return rows


def _curves(recipe: Recipe, facts: dict[str, Any], labels: Sequence[int]) -> bytes:
    models = facts["models"]
    return figures.accuracy_over_eps(
        {name: models[name]["sweep"]["accuracy"] for name in VARIANTS},
        models["standard"]["sweep"]["eps"],
        trained=recipe.threat.eps,
        chance=max(labels.count(c) for c in set(labels)) / len(labels),
        unit=UNITS[recipe.threat.unit],
        attack=models["standard"]["sweep"]["attack"],
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


def _print(recipe: Recipe, facts: dict[str, Any], folder: Path) -> None:
    """The table, the checks and the path, as text."""
    say(f"{recipe.name}, seed {recipe.seed}, {facts['examples']} {facts['part']} examples")
    say(f"attacks: {threat_words(facts['threat'])}")
    rows = summary_rows(facts)
    first = max(len(row[0]) for row in rows)
    columns = "".join(f"{name:>7}" for name in ("acc", "F1", "AUC")) + f"{'flipped':>9}"
    say("")
    say(" " * first + "".join(f"{name:^{len(columns)}}" for name in VARIANTS).rstrip())
    say(" " * first + columns * len(VARIANTS))
    for row in rows:
        cells = "".join(f"{cell:>{9 if i % 4 == 3 else 7}}" for i, cell in enumerate(row[1:]))
        say(f"{row[0]:<{first}}{cells}".rstrip())
    say("")
    for check in facts["checks"]:
        if not check["passed"]:
            say(f"check fails: {check['name']} ({check['detail']})")
    held = sum(check["passed"] for check in facts["checks"])
    spent = sum(facts["train_seconds"].values())
    say(f"checks on the attacks: {held} of {len(facts['checks'])} hold")
    say(f"training {spent:.0f} s, audit {facts['audit_seconds']:.0f} s")
    say(f"report: {folder / 'report.html'}")
