"""Which recommender holds best on MovieLens 100K? The package's models and RecBole's, under attack.

    PYTHONPATH=python .venv-recbole/bin/python benchmarks/leaderboard.py --out FILE.json
        [--seeds 0 1 2] [--only NeuMF FM] [--steps 1000]

(`make recbole` makes the environment.) The package's models are trained by their recipes, as usual
and hardened; RecBole's by its own loaders, losses and rates, as usual. Nothing is tuned. All of one
family are attacked alike, within balls whose radius is given in mean norms of the model's own
embeddings:

- general: every row of the tables of users and items, each in a ball of its own;
- sequential: the vectors of a history, in one ball;
- context: the vectors of a sample's fields, in one ball.

The division is RecBole's for its models and the recipe's for the package's: compare rows of one
protocol. With `--out` each model's figures are added to those that FILE holds, and a table is
written beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from embattle.audit.evaluation import evaluate, predict
from embattle.data.account import Account
from embattle.jobs import recipe as recipes
from embattle.jobs.attack_recipe import attack_recipe
from embattle.jobs.fit import Fit
from embattle.jobs.recbole import recipe_for
from embattle.jobs.recipe import STANDARD, Recipe
from embattle.jobs.threat import make_attack
from embattle.jobs.train import make_accelerator, read
from origin import in_words, origin

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
#: Samples that are attacked.
ATTACKED = 500
#: Radii, in the family's own.
SCALES = (0.5, 1.0)
ATTACKS = (
    attack_recipe(kind="noise", restarts=5),
    attack_recipe(kind="fgm"),
    attack_recipe(kind="pgd", steps=20, random_start=True, restarts=2),
)
# Both general models are hardened alike; half of a batch can be perturbed for the first alone.
_APR = "variants.hardened={objective: apr, attack: {kind: fgm}, lam: 8, eps_schedule: {share: 0.1}}"
#: Name -> family, recipe, and what is changed in it.
OURS: dict[str, tuple[str, str, list[str]]] = {
    "BPR-MF": ("general", "films_ranking", [_APR]),
    "LightGCN": (
        "general",
        "films_ranking",
        [_APR, "model.kind=lightgcn", "model.layers=3", "model.l2=1.0e-4"],
    ),
    "SASRec": ("sequential", "films_sequential", []),
    "DeepFM": ("context", "films_ctr", []),
}
#: Family -> RecBole's models, and its keys for them.
RECBOLE: dict[str, tuple[str, dict[str, Any]]] = {
    "general": ("BPR NGCF NeuMF", {}),
    "sequential": (
        "GRU4Rec NARM STAMP",
        {
            "MAX_ITEM_LIST_LENGTH": 20,
            "train_neg_sample_args": None,
            "train_batch_size": 128,
        },
    ),
    "context": ("FM NFM DCN WideDeep", {"threshold": {"rating": 4}}),
}


def entries(seed: int, steps: int, folder: Path) -> Iterator[tuple[str, str, str, Recipe, str]]:
    """Name, family, protocol, recipe and variant of every model; `folder` holds RecBole's keys."""
    for name, (family, file, changes) in OURS.items():
        recipe = recipes.load(RECIPES / f"{file}.yaml", changes=[f"seed={seed}", *changes])
        for variant in recipe.variants:
            title = name if variant == STANDARD else f"{name}, {variant}"
            yield title, family, "the recipe's", recipe, variant
    for family, (names, keys) in RECBOLE.items():
        config = folder / f"{family}.yaml"
        config.write_text(yaml.safe_dump(keys))
        for name in names.split():
            changes = [
                f"seed={seed}",
                f"train.steps={steps}",
                f"data.limits.test={ATTACKED}",
                "data.limits.validation=100",
            ]
            recipe = recipe_for([config], model=name, dataset="ml-100k", changes=changes)
            yield f"{name} (RecBole)", family, "RecBole's", recipe, STANDARD


def measure(recipe: Recipe, variant: str) -> dict[str, float]:
    """Train a model, and attack it; the headline measure of each attack and radius."""
    began = time.perf_counter()
    task, part = recipe.make_task(), recipe.audit.part
    read(task, Account(), "train", part)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        fit = Fit(recipe, variant, task, out, make_accelerator(recipe, task, out))
        fit.fit()
    model, trained = fit.bare.eval(), time.perf_counter()
    batches = task.batches(model, part, recipe.audit.batch_size)
    batches = batches[: -(-ATTACKED // len(batches[0]))]
    labels = torch.cat([batch.known_labels() for batch in batches])
    key = "auc" if ("auc", "AUC") in task.kind.measures else "hit_rate"
    found = {"clean": task.kind.scores(predict(model, batches, task), labels)[key]}
    sites = task.sites(model, recipe.threat.group)
    generator = torch.Generator().manual_seed(recipe.seed)
    for scale in SCALES:
        for attack in ATTACKS:
            made = make_attack(attack, recipe.threat, generator, scale=scale, best=True)
            leave = not task.kind.graded
            result = evaluate(model, batches, sites, {"": made}, evaluator=task, leave=leave)[""]
            score = task.kind.scores(result.outputs, labels)[key]
            found[f"{attack.label}, eps {scale * recipe.threat.eps:g}"] = score
    ended = time.perf_counter()
    return found | {"train_seconds": trained - began, "attack_seconds": ended - trained}


def table(results: dict[str, Any]) -> str:
    """The figures as Markdown, a table for each family."""
    lines = ["# Leaderboard: MovieLens 100K under attack\n", in_words(results["origin"]) + "\n"]
    lines.append(
        "`benchmarks/leaderboard.py`. Means over the seeds, +- half the range; within a family and "
        "protocol the model that keeps most under PGD at the larger radius comes first. Up to "
        f"{ATTACKED} samples of the test part (and the rest of their last batch). Not tuned.\n"
    )
    for family in RECBOLE:
        chosen = {n: row for n, row in results["models"].items() if row["family"] == family}
        if not chosen:
            continue
        names = [n for n in next(iter(chosen.values()))["figures"] if not n.endswith("_seconds")]
        measured = "AUC" if family == "context" else "hit rate at 10"
        lines.append(f"## {family.capitalize()} ({measured})\n")
        lines.append("| model | protocol | seeds | " + " | ".join(names) + " |")
        lines.append("|---" * (len(names) + 3) + "|")

        def held(row: dict[str, Any], last: str = names[-1]) -> tuple[str, float]:
            return row["protocol"], -statistics.mean(row["figures"][last])

        for name, row in sorted(chosen.items(), key=lambda entry: held(entry[1])):
            cells = [_spread(row["figures"][figure]) for figure in names]
            lines.append(
                f"| {name} | {row['protocol']} | {len(row['seeds'])} | {' | '.join(cells)} |"
            )
        lines.append("")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.3f}"
    half = (max(values) - min(values)) / 2
    return f"{statistics.mean(values):.3f} +- {half:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=[], help="names, or their beginnings")
    parser.add_argument("--steps", type=int, default=1000, help="of RecBole's models")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {"models": {}}
    if options.out is not None and options.out.exists():
        results = json.loads(options.out.read_text())
    results["origin"] = origin(1)
    with tempfile.TemporaryDirectory() as folder:
        fill(results, options, Path(folder))


def fill(results: dict[str, Any], options: argparse.Namespace, folder: Path) -> None:
    """Measure what is not in the results yet."""
    for seed in options.seeds:
        for name, family, protocol, recipe, variant in entries(seed, options.steps, folder):
            if options.only and not name.startswith(tuple(options.only)):
                continue
            row = results["models"].setdefault(
                name, {"family": family, "protocol": protocol, "seeds": [], "figures": {}}
            )
            if seed in row["seeds"]:
                continue
            figures = measure(recipe, variant)
            row["seeds"].append(seed)
            for figure, value in figures.items():
                row["figures"].setdefault(figure, []).append(value)
            shown = {figure: round(value, 3) for figure, value in figures.items()}
            print(f"seed {seed}, {name}: {shown}", flush=True)
            if options.out is not None:
                options.out.write_text(json.dumps(results, indent=1) + "\n")
                options.out.with_suffix(".md").write_text(table(results))


if __name__ == "__main__":
    main()
