"""A configuration of RecBole's as a job: trained, hardened, audited; or a checkpoint attacked."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from embattle.audit.evaluation import evaluate, predict
from embattle.audit.examine import labels_of
from embattle.audit.outcomes import success_rate
from embattle.data.account import Account
from embattle.errors import InputError
from embattle.files import write_text
from embattle.integrations import recbole_data
from embattle.jobs import recipe as recipes
from embattle.jobs.audit import audit
from embattle.jobs.recipe import Recipe
from embattle.jobs.threat import make_attack
from embattle.jobs.train import read, train
from embattle.jobs.trained import chosen_device
from embattle.progress import say

# What an attacker may do to a model of each family; eps in mean norms of the model's embeddings.
THREATS = {
    "general": {"group": "token", "eps": 0.05},
    "context": {"group": "sample", "eps": 0.5},
    "sequential": {"group": "sample", "eps": 1.0},
}


def recipe_for(
    files: Sequence[Path],
    *,
    model: str | None = None,
    dataset: str | None = None,
    checkpoint: Path | None = None,
    changes: Sequence[str] = (),
) -> Recipe:
    """Make the recipe of a job from a configuration of RecBole's.

    The batch size, the learning rate and the weight decay are RecBole's; so are the division of the
    data and the negatives. 1,000 steps are trained, and 1,000 interactions attacked.

    Args:
        files: its YAML files, later ones over earlier ones.
        model, dataset: what the files do not name.
        checkpoint: weights to begin with, as safetensors.
        changes: assignments `section.key=value` to the recipe.

    Raises:
        InputError: RecBole cannot read the files, or the model is not served.
    """
    named = {"model": model, "dataset": dataset}
    given = {key: value for key, value in named.items() if value is not None}
    values = recbole_data.merged([str(path) for path in files], given)
    config = recbole_data.make_config(values)
    family = config["MODEL_TYPE"].name.lower()
    name = re.sub(r"[^A-Za-z0-9._-]", "-", f"{values['model']}-{values['dataset']}")
    made: dict[str, Any] = {
        "name": name,
        "seed": config["seed"],
        "task": "recbole",
        "data": {
            "config": [str(path) for path in files],
            "dataset": dataset,
            "limits": {"validation": 1000, "test": 1000},
        },
        "model": {"name": model, "checkpoint": None if checkpoint is None else str(checkpoint)},
        "threat": THREATS[family],
        "train": {
            "steps": 1000,
            "batch_size": config["train_batch_size"],
            "learning_rate": config["learning_rate"],
            "weight_decay": config["weight_decay"],
            "max_grad_norm": None,
        },
        "audit": {
            "batch_size": 250,
            "attacks": [
                {"kind": "noise", "restarts": 3},
                {"kind": "fgm"},
                {"kind": "pgd", "steps": 10, "random_start": True, "restarts": 2},
            ],
            "sweep": [0.5, 1.0, 2.0, 4.0],
            "sweep_attack": {"kind": "pgd", "steps": 5},
        },
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(yaml.safe_dump(made), encoding="utf-8")
        return recipes.load(path, changes=changes)


def harden_and_audit(recipe: Recipe, out: Path, *, resume: bool, overwrite: bool) -> None:
    """Train a standard and a hardened model, attack both, and write the report into a folder."""
    train(recipe, out, resume=resume, overwrite=overwrite)
    audit(out)


def attack_checkpoint(recipe: Recipe, out: Path) -> None:
    """Attack a checkpoint as it is, print the table, and write it to `metrics.json` in a folder.

    Raises:
        InputError: the recipe names no checkpoint, or it does not fit; there is such a file.
    """
    options, file = recipe.model_dump()["model"], out / "metrics.json"
    if options["checkpoint"] is None:
        raise InputError("--as-is attacks a checkpoint: name it, --checkpoint FILE.safetensors")
    if file.exists():
        raise InputError(f"{file} is there already; choose another folder with --out")
    task, account, part = recipe.make_task(), Account(), recipe.audit.part
    read(task, account, part)
    for line in account.lines():
        say(line)
    model = task.build().to(chosen_device())
    batches = task.batches(model, part, recipe.audit.batch_size)
    labels = labels_of(batches)
    clean = predict(model, batches, task)
    right = task.kind.right(clean, labels)
    rows: dict[str, dict[str, float]] = {"no attack": task.kind.scores(clean, labels)}
    sites = task.sites(model, recipe.threat.group)
    generator = torch.Generator().manual_seed(recipe.seed)
    for label, attack in recipe.audit.labelled().items():
        made = {label: make_attack(attack, recipe.threat, generator, best=True)}
        found = evaluate(model, batches, sites, made, evaluator=task, leave=not task.kind.graded)[
            label
        ]
        rows[label] = task.kind.scores(found.outputs, labels)
        rows[label]["success_rate"] = success_rate(right, found.right)
    measures = task.kind.measures
    width = max(map(len, rows))
    say(" " * width + "".join(f"{title:>12}" for _, title in measures))
    for label, scores in rows.items():
        say(f"{label:<{width}}" + "".join(f"{scores[key]:>12.4f}" for key, _ in measures))
    facts = {"recipe": recipe.model_dump(mode="json"), "samples": len(labels), "results": rows}
    write_text(file, json.dumps(facts, indent=2) + "\n")
    say(f"figures: {file}")
