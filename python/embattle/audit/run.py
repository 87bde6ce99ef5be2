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
from embattle import recipe as recipes
from embattle.audit import figures, report
from embattle.audit.evaluate import evaluate, predict, sweep
from embattle.audit.honesty import order_checks, transfer_check, unbounded_check
from embattle.audit.metrics import score, success_rate
from embattle.data.batch import Batch
from embattle.doctor import version_of
from embattle.errors import InputError, need
from embattle.files import replacing, write_text
from embattle.models import TextClassifier, load
from embattle.perturb import Site
from embattle.progress import bar, say
from embattle.recipe import AttackRecipe, Recipe
from embattle.threat import make_attack
from embattle.train import VARIANTS, Run, fingerprint

# Examples on which the checks that need further attacks are made.
CHECKED = 100
UNITS = {
    "token_norm": "in mean norms of a token embedding",
    "mean_norm": "in mean norms of a group",
    "absolute": "absolute",
}


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
    began = time.monotonic()
    run = Run.read(folder)
    unfinished = [name for name in VARIANTS if name not in run.variants]
    if unfinished:
        raise InputError(
            f"{folder} is not finished ({', '.join(unfinished)} missing); "
            "go on with `embattle train --resume`"
        )
    recipe = recipes.load(folder / "recipe.yaml")
    splits = data.load(recipe.data, recipe.seed)
    if fingerprint(splits) != run.fingerprint:
        raise InputError(f"the data is not what {folder} was trained on; restore it or train again")
    examples = splits.parts[recipe.audit.part]
    facts: dict[str, Any] = {"models": {}, "checks": []}
    victims: dict[str, Victim] = {}
    batches: list[Batch] = []
    for name in VARIANTS:
        model = load(folder / name).to(_device())
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
        "train_seconds": {name: run.variants[name]["seconds"] for name in VARIANTS},
        "audit_seconds": round(time.monotonic() - began, 1),
        "environment": _environment(),
    }
    curves = _curves(recipe, facts, examples.labels)
    histories = {name: run.variants[name]["history"] for name in VARIANTS}
    losses = figures.losses_over_steps(histories)
    samples = _samples(examples.texts, torch.tensor(examples.labels), victims, run.classes)
    html = _report(recipe, facts, curves, losses, samples)
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
        attack.label: make_attack(attack, recipe.threat, generator, best=True)
        for attack in recipe.audit.attacks
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
    noise = [a.label for a in recipe.audit.attacks if a.kind == "noise"]
    gradient = [a.label for a in recipe.audit.attacks if a.kind != "noise"]
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
                cells.append(
                    ("" if int(logits[i].argmax()) == int(labels[i]) else "!") + f"{share:.0%}"
                )
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


def _rows(facts: dict[str, Any]) -> list[list[str]]:
    """The table standard against hardened: one row for no attack and for each attack."""
    models = facts["models"]
    rows = []
    for label in ("no attack", *models["standard"]["attacks"]):
        row = [label]
        for name in VARIANTS:
            entry = (
                models[name]["clean"] if label == "no attack" else models[name]["attacks"][label]
            )
            row += [f"{entry['accuracy']:.3f}", f"{entry['f1']:.3f}", f"{entry['auc']:.3f}"]
            row.append(f"{entry['success_rate']:.1%}" if "success_rate" in entry else "")
        rows.append(row)
    return rows


def _threat_words(recipe: Recipe) -> str:
    threat = recipe.threat
    who = "each text as a whole" if threat.group == "sample" else "each token on its own"
    return f"{threat.norm} ball of eps {threat.eps:g} ({UNITS[threat.unit]}) around {who}"


def _report(
    recipe: Recipe, facts: dict[str, Any], curves: bytes, losses: bytes, samples: list[list[str]]
) -> str:
    models, seed = facts["models"], facts["seed"]
    last = list(models["standard"]["attacks"])[-1]
    clean = [models[name]["clean"]["accuracy"] for name in VARIANTS]
    robust = [models[name]["attacks"][last]["accuracy"] for name in VARIANTS]
    flips = [models[name]["attacks"][last]["success_rate"] for name in VARIANTS]
    lead = (
        f"A model trained as usual and one hardened under the same budget, on {facts['examples']} "
        f"{facts['part']} examples that neither has seen; seed {seed}."
    )
    four = ["accuracy", "F1", "AUC", "flipped"]
    did = [
        [
            label,
            name,
            f"{entry['perturbation_norm']:.3f}",
            f"{models[name]['clean']['loss']:.3f}",
            f"{entry['loss']:.3f}",
            f"{entry['success_rate']:.1%}",
            f"{entry['seconds']:.1f} s",
        ]
        for label in models["standard"]["attacks"]
        for name in VARIANTS
        for entry in [models[name]["attacks"][label]]
    ]
    failed = [check for check in facts["checks"] if not check["passed"]]
    verdict = (
        f"{len(failed)} of {len(facts['checks'])} checks fail: do not trust the figures above."
        if failed
        else "All checks hold."
    )
    train = recipe.harden.attack
    honest = (
        f"The hardened model was trained against {train.label}; it is judged by stronger attacks "
        f"({', '.join(models['standard']['attacks'])}) that see everything: weights, gradients and "
        "labels, and the worst outcome of each example counts. Still, an attack only shows that an "
        "example can be fooled, never that it cannot: the accuracies under attack are upper bounds. "
        "The attacker moves embeddings, which is more than rewriting a text allows. This is one "
        f"run with one seed: with {facts['examples']} examples, differences below "
        f"{_margin(facts['examples']):.1%} are noise."
    )
    sections = [
        heading(f"{recipe.name}: robustness report", lead),
        tiles_of(clean, robust, flips, last),
        section(
            "Standard against hardened",
            report.table(
                ["", *(f"{name[:3]}. {what}" for name in VARIANTS for what in four)], _rows(facts)
            ),
            note=f"Attacks: {_threat_words(recipe)}. Flipped: share of the rightly classified "
            "examples that the attack turns.",
        ),
        section("Accuracy over eps", report.picture(curves, "accuracy over eps, both models")),
        section(
            "What each attack did",
            report.table(
                ["attack", "model", "mean norm", "loss before", "loss under", "flipped", "time"],
                did,
                text=[1],
            ),
            note="Mean norm: of the perturbations found, absolute. A token embedding's mean norm is "
            + ", ".join(f"{models[name]['token_norm']:.3f} ({name})" for name in VARIANTS)
            + ".",
        ),
    ]
    if samples:
        sections.append(
            section(
                "Examples",
                report.table(
                    ["text", "label", "standard", "attacked", "hardened", "attacked"],
                    samples,
                    text=[0],
                ),
                note=f"Confidence in the true label without attack and under {last}: the first "
                "examples that both models get right and that the attack turns on the standard one.",
            )
        )
    sections += [
        section("How far to trust this", report.checks(facts["checks"]), note=verdict),
        f'<p class="soft">{report.escape(honest)}</p>',
        section("Training", report.picture(losses, "training losses, both models")),
        section("Settings", report.source(recipe.to_yaml())),
        section(
            "Environment",
            report.table(
                ["", ""], [[k, str(v)] for k, v in facts["environment"].items()], text=[1]
            ),
        ),
    ]
    return report.page(f"{recipe.name}: robustness report", sections)


def tiles_of(
    clean: Sequence[float], robust: Sequence[float], flips: Sequence[float], last: str
) -> str:
    """The three figures at the head of the report."""
    return report.tiles(
        [
            ("Accuracy without attack", *(f"{x:.1%}" for x in clean)),  # type: ignore[list-item]
            (f"Accuracy under {last}", *(f"{x:.1%}" for x in robust)),  # type: ignore[list-item]
            (f"Flipped by {last}", *(f"{x:.1%}" for x in flips)),  # type: ignore[list-item]
        ]
    )


def _margin(count: int) -> float:
    """Two standard errors of a difference of two accuracies near 0.8 on `count` examples."""
    return 2 * math.sqrt(2 * 0.8 * 0.2 / count)


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
    box = need("rich.box")
    console = need("rich.console").Console(width=None)
    shown = need("rich.table").Table(
        title=f"{recipe.name}, seed {recipe.seed}, {facts['examples']} {facts['part']} examples",
        box=box.SIMPLE_HEAD,
        caption=_threat_words(recipe),
    )
    shown.add_column("")
    for name in VARIANTS:
        for what in ("acc", "F1", "AUC", "flipped"):
            shown.add_column(f"{name}\n{what}" if what == "acc" else f"\n{what}", justify="right")
    for row in _rows(facts):
        shown.add_row(*row)
    console.print(shown)
    for check in facts["checks"]:
        if not check["passed"]:
            say(f"check fails: {check['name']} ({check['detail']})")
    held = sum(check["passed"] for check in facts["checks"])
    spent = sum(facts["train_seconds"].values())
    say(f"checks on the attacks: {held} of {len(facts['checks'])} hold")
    say(f"training {spent:.0f} s, audit {facts['audit_seconds']:.0f} s")
    say(f"report: {folder / 'report.html'}")
