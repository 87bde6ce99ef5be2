"""Explanations of a run's models: in the audit, and as a command of their own."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from embattle.audit import evidence, html
from embattle.audit.evaluation import evaluate, examined, predict
from embattle.audit.examine import labels_of
from embattle.audit.scores import plain
from embattle.data.account import Account
from embattle.data.batch import Batch
from embattle.errors import InputError, closest, first_line
from embattle.explain import pictures
from embattle.explain.examine import explain as explain_model
from embattle.files import remove_unfinished
from embattle.jobs import recipe as recipes
from embattle.jobs.attack_recipe import AttackRecipe, attack_recipe
from embattle.jobs.explain_recipe import ExplainRecipe
from embattle.jobs.provenance import trained_weights
from embattle.jobs.recipe import Recipe
from embattle.jobs.run_folder import Run, locked, put, put_picture
from embattle.jobs.threat import make_attack
from embattle.jobs.train import read
from embattle.jobs.trained import chosen_device
from embattle.perturb.site import Site
from embattle.progress import say
from embattle.tasks.base import Task

# Samples that the command attacks, to find the worst.
SEARCHED = 200
# Texts whose words are exchanged: each exchange is tried exactly.
EXCHANGED = 3


def explain(
    folder: Path, *, model: str | None = None, samples: int | None = None, trust: bool = False
) -> None:
    """Explains models of a run; writes `explanations.json`, `explanations.html` and pictures.

    Args:
        folder: a run that `embattle train` finished.
        model: the name of one model; None explains all.
        samples: how many samples are explained one by one; None takes the recipe's number.
        trust: whether a task that is code of one's own may be run.

    Raises:
        InputError: the folder is no run, has no such model, or the data is no longer the same.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a run folder; give one that `embattle train` wrote")
    with locked(folder, "explain"):
        run = Run.read(folder)
        remove_unfinished(folder)
        recipe = recipes.load(folder / "recipe.yaml", trust=trust)
        if model is not None and model not in run.variants:
            raise InputError(
                f"--model: {folder} has no finished model {model!r}; {closest(model, run.variants)}"
            )
        names = [name for name in recipe.variants if name in run.variants]
        task, account, part = recipe.make_task(), Account(), recipe.audit.part
        read(task, account, part)
        run.require(Run.of(task, account), folder)
        options = recipe.audit.explain or ExplainRecipe()
        if samples is not None:
            options = options.model_copy(update={"samples": samples})
        found = {}
        chosen = names if model is None else [model]
        trained_weights(folder, run, chosen)
        for name in chosen:
            made = task.load(folder / name).to(chosen_device())
            found[name] = _of_model(recipe, options, task, made)
            say(f"explained {name}")
        write(folder, recipe, {name: {"explanations": one} for name, one in found.items()})
        put(folder, "explanations.html", page(recipe, task, found))
        say(f"explanations: {folder / 'explanations.html'}")


def of_audit(
    recipe: Recipe,
    task: Task,
    model: nn.Module,
    sites: Sequence[Site],
    batches: Sequence[Batch],
    outputs: tuple[Tensor, Tensor],
) -> dict[str, Any] | None:
    """Explain a model whose part was attacked already.

    Args:
        recipe: with `audit.explain`.
        task: has read the data.
        model: the model.
        sites: where it is attacked.
        batches: the part.
        outputs: without attack and under the strongest one, `[N, ...]` each, on the CPU.

    Returns:
        The explanations; None where the model cannot be explained, which is said: an audit of
        minutes does not fail at its last, least part.
    """
    options = recipe.audit.explain
    assert options is not None
    labels = labels_of(batches)
    try:
        return _explained(recipe, options, task, model, sites, batches, (*outputs, labels))
    except (ValueError, RuntimeError) as error:
        say(f"not explained: {first_line(error)}")
        return None


def worst_of(task: Task, outputs: tuple[Tensor, Tensor], labels: Tensor, count: int) -> list[int]:
    """Find the samples that an attack turned, those whose loss rose most first; then the others.

    Args:
        task: knows losses and what is right.
        outputs: without and under the attack.
        labels: of the samples.
        count: how many are wanted, at most.
    """
    before, after = (task.kind.losses(found.float(), labels) for found in outputs)
    rise = (after - before).double()
    turned = task.kind.right(outputs[0], labels) & ~task.kind.right(outputs[1], labels)
    usable = rise.isfinite()
    order = rise.where(usable, -math.inf).argsort(descending=True, stable=True)
    order = order[turned[order].int().argsort(descending=True, stable=True)]
    return [int(i) for i in order if bool(usable[i])][:count]


def unsure_of(task: Task, outputs: Tensor, labels: Tensor, count: int) -> list[int]:
    """Find the samples that are right, but with the largest losses.

    Args:
        task: knows losses and what is right.
        outputs: without attack.
        labels: of the samples.
        count: how many are wanted, at most.
    """
    losses = task.kind.losses(outputs.float(), labels).double()
    usable = losses.isfinite() & task.kind.right(outputs, labels)
    order = losses.where(usable, -math.inf).argsort(descending=True, stable=True)
    return [int(i) for i in order[:count] if bool(usable[i])]


def attack_of(recipe: Recipe) -> AttackRecipe:
    """The attack that is explained: the audit's last of many steps by one rule, else PGD."""
    for attack in reversed(recipe.audit.attacks):
        if attack.kind in ("pgd", "msap", "mifgsm", "apgd"):
            return attack.model_copy(update={"restarts": 1})
    return attack_recipe(kind="pgd", steps=10)


def _of_model(
    recipe: Recipe, options: ExplainRecipe, task: Task, model: nn.Module
) -> dict[str, Any]:
    """Explain a model of which nothing is known yet."""
    part, size = recipe.audit.part, recipe.audit.batch_size
    sites = task.sites(model, recipe.threat.group)
    batches = task.batches(model, part, size)
    some = batches[: math.ceil(SEARCHED / size)]
    generator = torch.Generator().manual_seed(recipe.seed)
    attack = make_attack(attack_of(recipe), recipe.threat, generator, best=True)
    attacked = evaluate(
        model, some, sites, {"": attack}, evaluator=task, leave=not task.kind.graded
    )[""]
    outputs = predict(model, some, task), attacked.outputs
    labels = labels_of(some)
    return _explained(recipe, options, task, model, sites, batches, (*outputs, labels))


def _explained(
    recipe: Recipe,
    options: ExplainRecipe,
    task: Task,
    model: nn.Module,
    sites: Sequence[Site],
    batches: Sequence[Batch],
    known: tuple[Tensor, Tensor, Tensor],
) -> dict[str, Any]:
    """Explain a model; `known` are outputs without and under attack, and labels, from the first."""
    part, (clean, attacked, labels) = recipe.audit.part, known
    generator = torch.Generator().manual_seed(recipe.seed)
    chosen = attack_of(recipe)
    attack = make_attack(chosen, recipe.threat, generator, best=True)
    total = len(task.parts[part])
    count = min(options.samples, total)
    spread = [i * total // count for i in range(count)]
    with examined(model):
        found = explain_model(
            model,
            task,
            part,
            sites,
            attack,
            worst=worst_of(task, (clean, attacked), labels, options.samples),
            spread=spread,
            unsure=unsure_of(task, clean, labels, EXCHANGED) if options.swaps else (),
            texts=batches,
            plane=options.landscape,
            seed=recipe.seed,
        )
    return {"attack": chosen.label, **found}


def write(folder: Path, recipe: Recipe, models: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes `explanations.json`, and of each model its pictures, each file whole or not at all.

    Args:
        folder: the run's.
        recipe: of the run.
        models: their facts by name; those without `explanations` are left out. Nothing is written
            if that is all of them.
    """
    found = {name: one["explanations"] for name, one in models.items() if "explanations" in one}
    if not found:
        return
    facts = {"name": recipe.name, "part": recipe.audit.part, "models": found}
    put(folder, "explanations.json", json.dumps(plain(facts), indent=2) + "\n")
    for name, one in found.items():
        for what, svg in drawn(name, one).items():
            put_picture(folder, f"{name}.{what}", svg)


def drawn(name: str, found: Mapping[str, Any]) -> dict[str, str]:
    """Draw the pictures of a model: `carried`, and `worst` and `landscape` where there are such."""
    made = {"carried": pictures.bars(f"{name}: what raised the loss", found["carried"])}
    if found["samples"]:
        first = found["samples"][0]
        title = f"{name}, label {first['label']}: {first['before']} to {first['after']}"
        made["worst"] = pictures.word_heat(title, first["parts"])
    if found["landscape"]:
        title = f"{name}: mean loss of {found['landscape']['samples']} samples"
        made["landscape"] = pictures.heat_map(title, found["landscape"])
    return made


def page(recipe: Recipe, task: Task, found: Mapping[str, dict[str, Any]]) -> str:
    """Make a page of the explanations, drawn as in the audit's report."""
    facts = {
        "words": {"sample": task.sample, "vector": task.vector},
        "models": {name: {"explanations": one} for name, one in found.items()},
    }
    lead = (
        f"What an attack on {task.vector} embeddings does to the models, on the "
        f"{recipe.audit.part} part."
    )
    title = f"{recipe.name}: explanations"
    return html.page(title, [html.heading(title, lead), evidence.explanations(facts)])
