"""The audit job: all models of a run under every attack of its recipe, and the report."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from embattle.audit.environment import command, environment
from embattle.audit.examine import labels_of, note_of
from embattle.audit.html import Fallen
from embattle.audit.outcomes import Attacked
from embattle.audit.report import document
from embattle.audit.schema import SCHEMA
from embattle.audit.scores import OUTCOMES, add_scores, outcomes_of, plain, write_outcomes
from embattle.audit.sections import curve
from embattle.audit.summary import summary_lines
from embattle.audit.trust import CHECKED, check_victims
from embattle.audit.victim import Victim
from embattle.data.account import Account
from embattle.data.batch import Batch, first_samples
from embattle.errors import InputError, closest, need
from embattle.files import remove_unfinished, sha256
from embattle.jobs import explain, provenance
from embattle.jobs import recipe as recipes
from embattle.jobs.bounds import Bound, check_names, unmet
from embattle.jobs.certificates import certificate_lines, certificates, check_fakes, of_fakes
from embattle.jobs.column_recipe import check_columns, column_lines, examine_columns
from embattle.jobs.examine import examine
from embattle.jobs.recipe import STANDARD, Recipe
from embattle.jobs.run_folder import Run, locked, put, put_picture
from embattle.jobs.train import read
from embattle.jobs.trained import chosen_device
from embattle.progress import say
from embattle.tasks.base import Task

# Of an example so many characters are in the report.
SHOWN = 4000


def audit_all(
    folders: Sequence[Path],
    *,
    bounds: Sequence[Bound] = (),
    trust: bool = False,
    certify: bool = False,
) -> list[str]:
    """Audits several runs, one after the other, each into its own folder.

    All runs are looked at before the first attack.

    Args:
        folders: of runs that `embattle train` finished, or of some of their models: then a run's
            audit is of these and of its standard one.
        bounds: what the models must reach.
        trust: whether a task that is code of one's own may be run.
        certify: prove what can be proven of the models, too.

    Returns:
        A line for each bound that is not met.

    Raises:
        InputError: see `audit`; a bound is on something that is not measured.
    """
    chosen: dict[Path, list[str]] = {}
    whole: list[Path] = []
    for folder in folders:
        run, model = _run_and_model(folder)
        chosen.setdefault(run, [])
        if model is None:
            whole.append(run)
        else:
            chosen[run].append(model)
    chosen |= {run: [] for run in whole}
    found = []
    for run, models in chosen.items():
        with locked(run, "audit"):
            found.append((run, *_look_at(run, models, trust)))
    check_names(bounds, found, certify=certify)
    failed = []
    for run, models in chosen.items():
        facts = audit(run, models=models, trust=trust, certify=certify)
        lines = unmet(bounds, facts)
        failed += [f"{run}: {line}" for line in lines] if len(chosen) > 1 else lines
    return failed


def _run_and_model(folder: Path) -> tuple[Path, str | None]:
    """A run's folder and None; or, of one of its models, the run's folder and the model's name."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a run folder; give one that `embattle train` wrote")
    if (folder / "run.json").is_file():
        return folder, None
    place = folder if folder.name not in ("", "..") else folder.resolve()
    return (place.parent, place.name) if (place.parent / "run.json").is_file() else (folder, None)


def audit(
    folder: Path, *, models: Sequence[str] = (), trust: bool = False, certify: bool = False
) -> dict[str, Any]:
    """Audits a run and writes `metrics.json`, `outcomes.safetensors`, `curves.svg`, `report.html`.

    The files are written when everything is known, each of them whole or not at all.

    Args:
        folder: a run that `embattle train` finished.
        models: those of its models that are audited beside the standard one; all if none is named.
        trust: whether a task that is code of one's own may be run.
        certify: prove what can be proven of the models, too.

    Returns:
        What `metrics.json` holds.

    Raises:
        InputError: if the folder is no finished run, or the data is no longer the same.
    """
    with locked(folder, "audit"):
        return _audit(folder, models, trust, certify)


def _look_at(folder: Path, models: Sequence[str], trust: bool) -> tuple[Recipe, Run]:
    """A run's recipe and what it says of itself, if the models are there."""
    run = Run.read(folder)
    recipe = recipes.load(folder / "recipe.yaml", trust=trust)
    wanted = _wanted(recipe, models)
    unknown = [name for name in models if name not in recipe.variants]
    if unknown:
        raise InputError(
            f"{folder} has no model {unknown[0]!r}; {closest(unknown[0], recipe.variants)}"
        )
    unfinished = [name for name in wanted if name not in run.variants]
    if unfinished:
        raise InputError(
            f"{folder} is not finished ({', '.join(unfinished)} missing); "
            "go on with `embattle train --resume`"
        )
    return recipe, run


def _wanted(recipe: Recipe, models: Sequence[str]) -> list[str]:
    return [name for name in recipe.variants if name in {STANDARD, *models} or not models]


def _audit(folder: Path, chosen: Sequence[str], trust: bool, certify: bool) -> dict[str, Any]:
    """The same, in a folder that no other process works in."""
    began = time.monotonic()
    need("scipy.stats")
    Run.read(folder)
    remove_unfinished(folder)
    recipe, run = _look_at(folder, chosen, trust)
    names = _wanted(recipe, chosen)
    task, account = recipe.make_task(), Account()
    part = recipe.audit.part
    read(task, account, part)
    run.require(Run.of(task, account), folder)
    # Everything that is needed is looked at before the first attack, which may take minutes.
    if certify:
        check_fakes(recipe, task)
    models = {name: task.load(folder / name).to(chosen_device()) for name in names}
    for model in models.values():
        check_columns(recipe.audit.columns, task, model)
    found = provenance.fingerprints(folder, run, task, part, names)
    facts: dict[str, Any] = {
        "schema": SCHEMA,
        "command": command(),
        "fingerprint": provenance.together(found),
        "fingerprints": found,
        "reading": run.reading,
        "name": recipe.name,
        "seed": recipe.seed,
        "part": part,
        "examples": len(task.parts[part]),
        "task": recipe.task,
        "words": {"sample": task.sample, "vector": task.vector},
        "measures": task.kind.titled(),
        "note": note_of(task.kind, go_on=recipe.audit.go_on),
        "shown": task.kind.shown,
        "facts": run.facts,
        "counts": run.counts,
        "threat": recipe.threat.model_dump(),
        "variants": {name: recipe.variants[name].words for name in names},
        "models": {},
        "checks": [],
    }
    victims: dict[str, Victim] = {}
    outcomes: dict[str, dict[str, Attacked]] = {}
    batches: list[Batch] = []
    for name, model in models.items():
        batches = task.batches(model, part, recipe.audit.batch_size)
        victims[name], facts["models"][name] = examine(recipe, name, model, task, batches)
        outcomes[name] = outcomes_of(victims[name])
        under, columns = examine_columns(
            recipe.audit.columns, task, model, batches, victims[name].clean
        )
        if columns:
            outcomes[name] |= under
            facts["models"][name]["columns"] = columns
        if certify:
            size = facts["models"][name]["vector_norm"]
            proven = certificates(recipe, task, model, batches, size)
            facts["models"][name]["certificates"] = proven
    if certify and recipe.audit.certify.fakes is not None:
        facts["certificates"] = of_fakes(recipe, task)
    labels = labels_of(batches)
    add_scores(facts, task.kind, labels, outcomes, seed=recipe.seed)
    checks = check_victims(
        victims,
        first_samples(batches, CHECKED),
        evaluator=task,
        measure=task.kind.titled()[0][1],
        seed=recipe.seed,
    )
    facts["checks"] = [asdict(check) for check in checks]
    if recipe.audit.explain is not None:
        for name, victim in victims.items():
            assert victim.worst is not None
            outputs = victim.clean, victim.worst.outputs
            told = explain.of_audit(recipe, task, victim.model, victim.sites, batches, outputs)
            if told is not None:
                facts["models"][name]["explanations"] = told
    facts |= {
        "train_seconds": {name: run.variants[name].seconds for name in names},
        "audit_seconds": round(time.monotonic() - began, 1),
        "chance": task.kind.chance(labels),
        "label": _label_column(task),
        "environment": environment(chosen_device()),
    }
    html = document(
        facts,
        settings=recipe.to_yaml(),
        histories={name: run.variants[name].history for name in names},
        samples=_samples(task, part, labels, victims),
    )
    write_outcomes(folder / OUTCOMES, outcomes, part=found["part"])
    found["outcomes"] = sha256(folder / OUTCOMES)
    facts = plain(facts)
    put(folder, "metrics.json", json.dumps(facts, indent=2) + "\n")
    put_picture(folder, "curves", curve(facts).file())
    put(folder, "report.html", html)
    explain.write(folder, recipe, facts["models"])
    for line in summary_lines(facts):
        say(line)
    for line in column_lines(task, facts["models"]):
        say(line)
    for line in certificate_lines(facts):
        say(line)
    spent = sum(facts["train_seconds"].values())
    say(f"training {spent:.0f} s, audit {facts['audit_seconds']:.0f} s")
    say(f"report: {folder / 'report.html'}")
    return facts


def _samples(task: Task, part: str, labels: Tensor, victims: dict[str, Victim]) -> list[list[str]]:
    """Samples that all models get right and the strongest attack turns on the standard one."""
    standard = victims[STANDARD]
    last = list(standard.attacked)[-1]
    turned = torch.stack([victim.right for victim in victims.values()]).all(0)
    turned &= ~standard.attacked[last].right
    rows = []
    for i in torch.nonzero(turned).flatten()[:8].tolist():
        shown = task.show(part, i)
        shown = shown if len(shown) <= SHOWN else shown[: SHOWN - 1] + "…"
        cells = [shown, task.kind.show_label(labels[i])]
        for victim in victims.values():
            under = victim.attacked[last]
            for outputs, right in ((victim.clean, victim.right), (under.outputs, under.right)):
                text = task.kind.show(outputs[i], labels[i])
                cells.append(text if right[i] else Fallen(text))
        rows.append(cells)
    return rows


def _label_column(task: Task) -> str | None:
    """The name of the column that is predicted, where the task's data has one."""
    name = getattr(task.data_options, "label", None)
    return name if isinstance(name, str) else None
