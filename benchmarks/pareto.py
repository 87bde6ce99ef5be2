"""What hardening buys, and what it costs: the methods beside each other on the recipes.

    python benchmarks/pareto.py [--kinds reviews clicks income] [--seeds 11 12 13]
        [--only "staggered, 2 visits"] [--out FILE.json]
    python benchmarks/pareto.py --time [--kinds ...] --out FILE.json   # wall time of the steps

Every method trains with the steps, batches and rates of the recipe; a seed decides the division of
the data, the first weights and the order. Nothing is chosen on the test part, which is attacked by
PGD-20 with two restarts and by the ensemble (texts: PGD-10, the ensemble with ten steps); each
sample's worst counts. The gain is what a method adds to plain training under attack, in shares of
what mixed PGD-3 adds. Texts are also attacked by `TokenSwap`: two of the texts' own content words,
for similar ones.

`--time` makes steps of all methods in turn, one round after the other, in one process, and keeps
each round's ratio to the plain step, times the share of the steps that the method is trained for.
With `--out` figures are added to those that FILE holds, and a table and a picture are written
beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from embattle import Evaluation, Site, TokenSwap
from embattle.audit.examine import labels_of
from embattle.data.account import Account
from embattle.data.batch import Batch
from embattle.errors import need
from embattle.explain.swaps import content_words
from embattle.jobs.examine import examine
from embattle.jobs.fit import Fit
from embattle.jobs.recipe import STANDARD, Recipe
from embattle.jobs.train import make_accelerator, read
from embattle.models.words import Words
from embattle.tasks.base import Task
from origin import in_words, origin
from pareto_methods import GOAL, KINDS, METHODS, TUNED, recipe_of
from torch import nn

#: The kinds in the picture.
SHOWN = ("reviews", "deep", "clicks", "income")
#: Samples that are attacked at most.
ATTACKED = 2000


def begin(recipe: Recipe, variant: str, out: Path) -> tuple[Task, Fit]:
    """A training of a variant, with its data."""
    task = recipe.make_task()
    read(task, Account(), "train", recipe.audit.part)
    return task, Fit(recipe, variant, task, out, make_accelerator(recipe, task, out))


def measure(kind: str, method: str, seed: int) -> dict[str, float]:
    """Train by a method, and attack what comes of it."""
    recipe, variant = recipe_of(kind, method, seed)
    with tempfile.TemporaryDirectory() as folder:
        task, fit = begin(recipe, variant, Path(folder))
        fit.fit()
    model = fit.bare.eval()
    batches = task.batches(model, recipe.audit.part, recipe.audit.batch_size)
    batches = batches[: -(-ATTACKED // len(batches[0]))]
    victim, facts = examine(recipe, variant, model, task, batches)
    key = KINDS[kind][2]
    worst = facts["worst"][key]
    assert len(labels_of(batches)) == len(victim.right)
    found = {"clean": facts["clean"][key], "attacked": worst, "seconds": fit.seconds}
    words = task.words(model)
    return found if words is None else found | {"words": exchanged(model, batches, words, task)}


def exchanged(model: nn.Module, batches: list[Batch], words: Words, task: Task) -> float:
    """Accuracy where two words of each text may be exchanged."""
    ids, mask = words.ids, words.mask
    texts = [batch.inputs[ids] for batch in batches]
    allowed = content_words(words, texts, words.embedding.num_embeddings)
    attack = TokenSwap(swaps=2, tries=16, allowed=allowed, similarity=0.4)
    right = count = 0.0
    for batch, tokens in zip(batches, texts, strict=True):

        def loss_of(tokens: torch.Tensor, batch: Batch = batch) -> Callable[[], Evaluation]:
            moved = replace(batch, inputs={**batch.inputs, ids: tokens})
            return lambda: task.evaluate(model, moved)

        movable = batch.inputs[mask].bool() & allowed[tokens]
        with Site(words.embedding) as site:
            found = attack.run(loss_of, site, tokens, mask=movable, criterion=task.criterion(batch))
        assert found.robust_accuracy is not None
        right += float(found.robust_accuracy) * len(batch)
        count += len(batch)
    return right / count


def timed(kind: str, methods: list[str], rounds: int) -> dict[str, list[float]]:
    """Each round's time of four steps of each method, to the plain one's, times its duration."""
    found: dict[str, list[float]] = {method: [] for method in methods}
    with tempfile.TemporaryDirectory() as folder:
        fits, durations = {}, {}
        for method in [STANDARD, *methods]:
            recipe, variant = recipe_of(kind, method, 1)
            durations[method] = recipe.variants[variant].duration
            fits[method] = begin(recipe, variant, Path(folder) / str(len(fits)))[1]
        step = 0  # staggered replays know only samples that they have met
        for number in range(rounds + 2):
            spent = {}
            for method, fit in fits.items():
                began = time.perf_counter()
                for k in range(4):  # some attack in one of them
                    fit._step(step + 4 * number + k)
                spent[method] = time.perf_counter() - began
            if number >= 2:
                for method in methods:
                    found[method].append(durations[method] * spent[method] / spent[STANDARD])
    return found


def summary(kind: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Means over the seeds that a method shares with plain training and mixed PGD-3."""
    rows = kind["figures"]
    found = {}
    for method, row in rows.items():
        seeds = [s for s in row if s in rows[STANDARD] and s in rows.get(GOAL, row)]
        if not seeds:
            continue

        def of(name: str, what: str, seeds: list[str] = seeds) -> float:
            return statistics.mean(rows[name][seed][what] for seed in seeds)

        values = [row[seed]["attacked"] for seed in seeds]
        found[method] = {
            "seeds": len(seeds),
            "clean": of(method, "clean"),
            "lost": of(STANDARD, "clean") - of(method, "clean"),
            "attacked": statistics.mean(values),
            "spread": (max(values) - min(values)) / 2,
        }
        if all("words" in row[seed] for seed in seeds):
            found[method]["words"] = of(method, "words")
        if GOAL in rows:
            gain = of(GOAL, "attacked") - of(STANDARD, "attacked")
            found[method]["gain"] = (of(method, "attacked") - of(STANDARD, "attacked")) / gain
        ratios = kind.get("times", {}).get(method)
        if ratios:
            found[method]["time"] = statistics.median(ratios)
    return found


def table(results: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = ["# What hardening buys and costs\n"]
    lines.append(
        "`benchmarks/pareto.py`: means over the seeds, +- half the range. Gain: of mixed PGD-3's "
        "in the measure under attack. Passes: of a step, to plain training's; time: of the "
        "training, the median of rounds of `--time`. Nothing was chosen on the test part.\n"
    )
    for name, kind in results["kinds"].items():
        if STANDARD not in kind["figures"]:
            continue
        recipe, changes, measure = KINDS[name]
        changed = f", {', '.join(changes)}" if changes else ""
        lines.append(f"## {name.capitalize()}: `{recipe}`{changed}, {measure}\n")
        timed_at = f"; times: {in_words(kind['timed'])}" if "timed" in kind else ""
        tuned = "".join(
            f"; {objective}, tuned: " + ", ".join(f"{key} {value}" for key, value in chosen.items())
            for objective, chosen in TUNED.get(name, {}).items()
        )
        lines.append(f"{in_words(kind['origin'])}{timed_at}{tuned}\n")
        swapped = any("words" in row for row in summary(kind).values())
        more = " exchanged words |" if swapped else ""
        lines.append(f"| method | passes | time | seeds | clean | under attack | gain |{more}")
        lines.append("|---" * (7 + swapped) + "|")
        for method, row in sorted(summary(kind).items(), key=lambda entry: -entry[1]["attacked"]):
            passes = 1.0 if method == STANDARD else METHODS[method].passes
            spent = f"{row['time']:.2f}" if "time" in row else ""
            gain = f"{row['gain']:.0%}" if "gain" in row else ""
            spread = f" +- {row['spread']:.3f}" if row["seeds"] > 1 else ""
            words = f" {row['words']:.3f} |" if "words" in row else "  |" if swapped else ""
            lines.append(
                f"| {method} | {passes:.2f} | {spent} | {row['seeds']:.0f} | {row['clean']:.3f} | "
                f"{row['attacked']:.3f}{spread} | {gain} |{words}"
            )
        lines.append("")
    return "\n".join(lines)


def picture(results: dict[str, Any], path: Path) -> None:
    """Gain over cost, a panel for each of some kinds."""
    kinds = {name: summary(results["kinds"][name]) for name in SHOWN if name in results["kinds"]}
    kinds = {name: rows for name, rows in kinds.items() if GOAL in rows}
    if not kinds:
        return
    across, down = min(2, len(kinds)), -(-len(kinds) // 2)
    canvas = need("matplotlib.figure", "test").Figure(
        figsize=(5.2 * across, 4.6 * down), layout="constrained"
    )
    for place, (name, rows) in enumerate(kinds.items(), 1):
        axes = canvas.add_subplot(down, across, place)
        most = max(row["seeds"] for row in rows.values())
        # Those of fewer seeds are means of other divisions of the data.
        points = {
            method: (row.get("time", 1.0), row["attacked"])
            for method, row in rows.items()
            if row["seeds"] == most and ("time" in row or method == STANDARD)
        }
        height = max(y for _, y in points.values()) - min(y for _, y in points.values())
        column = max(x for x, _ in points.values() if x < 3) + 0.25
        lowest = float("inf")  # label in the column so far
        for method, (x, y) in sorted(points.items(), key=lambda point: -point[1][1]):
            free = method.startswith(("staggered", "Free-"))
            color = "#c2410c" if free else "#1d4ed8"
            at = x, y - 0.06 * height
            if x < 3:
                lowest = min(y, lowest - 0.045 * height)
                at = column, lowest
            axes.plot(x, y, "o", color=color)
            axes.annotate(
                method,
                (x, y),
                xytext=at,
                ha="left" if x < 3 else "center",
                va="center",
                fontsize=8,
                arrowprops={"arrowstyle": "-", "color": color, "lw": 0.5},
            )
        axes.set_title(f"{name} ({KINDS[name][2]} under attack)")
        axes.set_xlabel("time of the training, to plain training's")
        axes.margins(x=0.25)
        axes.grid(alpha=0.3)
    canvas.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=["reviews", "clicks"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13, 14, 15])
    parser.add_argument("--only", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    results: dict[str, Any] = {"kinds": {}}
    if options.out is not None and options.out.exists():
        results = json.loads(options.out.read_text())

    def keep() -> None:
        if options.out is not None:
            options.out.write_text(json.dumps(results, indent=1) + "\n")
            options.out.with_suffix(".md").write_text(table(results))
            picture(results, options.out.with_suffix(".png"))

    for kind in options.kinds:
        held = results["kinds"].setdefault(kind, {"figures": {}})
        held["timed" if options.time else "origin"] = origin(torch.get_num_threads())
        if options.time:
            held["times"] = held.get("times", {}) | timed(kind, options.only, options.rounds)
            keep()
            continue
        for seed in map(str, options.seeds):
            for method in [STANDARD, *options.only]:
                row = held["figures"].setdefault(method, {})
                if seed not in row:
                    row[seed] = measure(kind, method, int(seed))
                    print(kind, seed, method, row[seed], flush=True)
                    keep()
    print(table(results))


if __name__ == "__main__":
    main()
