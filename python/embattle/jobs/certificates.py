"""What is proven of a run's models, for the facts of its audit: `embattle audit RUN --certify`."""

from __future__ import annotations

import time
from typing import Any, cast

import torch
from torch import Tensor, nn

from embattle.certify import (
    Balls,
    Ranker,
    Smoothed,
    attacked_ranks,
    certified_radii,
    certified_ranks,
    worst_swaps,
)
from embattle.data.batch import Batch
from embattle.jobs.attack_recipe import ThreatRecipe
from embattle.jobs.recipe import Recipe
from embattle.models import FM, MF, LightGCN
from embattle.perturb.site import as_sites
from embattle.tasks.base import Task
from embattle.tasks.clicks import ClickThrough
from embattle.tasks.hybrid import HybridRanking
from embattle.tasks.item_ranking import ItemRanking
from embattle.tasks.tabular import Tabular
from embattle.tasks.text import TextClassification

# Multiples of the threat's eps beside those of the audit's sweep: certificates end early.
SCALES = (0.125, 0.25, 0.5, 1.0)
# Fields that may be swapped at once, and rows of which the worst swaps are sought.
SWAPS, ROWS = (1, 2, 3), 1000
# Deviation of the noise as a share of eps: models not trained under noise stand little of it.
NOISE = 0.25
# Samples that are smoothed, noisy copies by which a class is chosen and certified, and the
# probability that a sample's certificate is wrong.
SMOOTHED, CHOOSING, COPIES, ALPHA = 50, 50, 500, 0.001


def certificates(
    recipe: Recipe, task: Task, model: nn.Module, batches: list[Batch], norm: float
) -> list[dict[str, Any]]:
    """Certify one model; an empty list where nothing is known to be provable.

    Args:
        recipe: of the run.
        task: has read the data.
        model: in evaluation mode.
        batches: of the audited part.
        norm: mean norm of the vectors that the threat is about, see `embattle.audit.measure`.
    """
    threat = recipe.threat
    if isinstance(model, FM):
        return [_of_swaps(model, batches)]
    if threat.norm != "l2":
        return []
    if isinstance(task, ItemRanking):
        if isinstance(task, HybridRanking) and task.model_options.attacked == "texts":
            return []
        return _of_ranks(recipe, task, model)
    if isinstance(task, TextClassification | Tabular | ClickThrough):
        sites = as_sites(task.sites(model, threat.group))
        if all(site.scope == "output" for site in sites) and threat.unit != "mean_norm":
            return [_of_noise(recipe, task, model, batches, norm)]
    return []


def ranker_of(task: ItemRanking, model: nn.Module, part: str) -> Ranker:
    """Give the vectors that a ranker's scores are made of, and the part's users."""
    scoring = cast(MF, task.for_scoring(model))
    users, items = torch.from_numpy(task.parts[part]).T

    def seen(rows: Tensor) -> Tensor:
        return task.batch(model, part, rows).inputs["seen"]

    bias = None if scoring.bias is None else scoring.bias.detach().cpu()
    user, item = (table.weight.detach().cpu() for table in (scoring.user, scoring.item))
    return Ranker(user[users], item, items, seen, bias)


def table_norms(model: nn.Module) -> tuple[float, float]:
    """Give the mean norms of the rows of the user and the item table, as the threat counts them."""
    ranker = cast("MF | LightGCN", model)
    user, item = (table.weight.detach().norm(dim=1) for table in (ranker.user, ranker.item))
    return float(user.mean()), float(item.mean())


def unit_of(threat: ThreatRecipe) -> str:
    """What the eps of a certificate count in, in words."""
    return "absolute" if threat.unit == "absolute" else "times the mean norm of a vector"


def _of_ranks(recipe: Recipe, task: ItemRanking, model: nn.Module) -> list[dict[str, Any]]:
    """Hit rate and NDCG where each row moves in a ball of its own."""
    began, threat, k = time.monotonic(), recipe.threat, task.kind.k
    ranker = ranker_of(task, model, recipe.audit.part)
    norms = (1.0, 1.0) if threat.unit == "absolute" else table_norms(model)
    scales = sorted({0.0, *SCALES, *recipe.audit.sweep})
    radii = [threat.eps * scale for scale in scales]
    balls = [Balls(eps * norms[0], eps * norms[1], eps * norms[1]) for eps in radii]
    certified = [certified_ranks(ranker, ball) for ball in balls]
    seconds = round(time.monotonic() - began, 2)
    attacked = [attacked_ranks(ranker, ball, k=k) for ball in balls]
    note = (
        "Each user's vector and each item's move by at most eps, for each user anew; biases stay. "
        "Attacked: 100 gradient steps on the user's vector with the items' best answers."
    )
    if isinstance(model, LightGCN):
        note += " The vectors are those that LightGCN ends with, not the rows of its tables."
    return [
        {
            "kind": "balls",
            "title": f"certified {title}@{k}",
            "measure": measure,
            "eps": radii,
            "unit": unit_of(threat),
            "certified": [getattr(found, measure)(k) for found in certified],
            "attacked": [getattr(found, measure)(k) for found in attacked],
            "seconds": seconds,
            "note": note,
        }
        for measure, title in (("hit_rate", "hit rate"), ("ndcg", "NDCG"))
    ]


def _of_swaps(model: FM, batches: list[Batch]) -> dict[str, Any]:
    """Accuracy where values of some fields are replaced."""
    began = time.monotonic()
    values = torch.cat([batch.inputs["values"].cpu() for batch in batches])[:ROWS]
    labels = torch.cat([batch.known_labels().cpu() for batch in batches])[:ROWS]
    with torch.no_grad():
        logits = model(values.to(model.bias.device)).cpu()
    clean = float((logits > 0).eq(labels == 1).double().mean())
    found = [worst_swaps(model, values, labels, k) for k in SWAPS]
    with torch.no_grad():
        worst = [model(some.values.to(model.bias.device)).cpu() for some in found]
    whole = min(float(some.exact.double().mean()) for some in found)
    how = "exact" if whole == 1 else f"exact for {whole:.1%} of the rows at least, else a bound"
    return {
        "kind": "swaps",
        "title": "certified accuracy",
        "measure": "accuracy",
        "eps": [0.0, *map(float, SWAPS)],
        "unit": "fields whose value is replaced by any other",
        "certified": [clean, *(float((some.margins > 0).double().mean()) for some in found)],
        "attacked": [
            clean,
            *(float((logits > 0).eq(labels == 1).double().mean()) for logits in worst),
        ],
        "seconds": round(time.monotonic() - began, 2),
        "note": f"Worst margins are {how}; {len(labels)} rows.",
    }


def _of_noise(
    recipe: Recipe, task: Task, model: nn.Module, batches: list[Batch], norm: float
) -> dict[str, Any]:
    """Accuracy of the smoothed classifier over radii."""
    began, threat = time.monotonic(), recipe.threat
    length = 1.0 if threat.unit == "absolute" else norm
    sigma = NOISE * threat.eps * length
    generator = torch.Generator().manual_seed(recipe.seed)
    sites = task.sites(model, threat.group)
    smoothed = Smoothed(model, sites, sigma, evaluator=task, batch_size=256)
    parts, labels, left = [], [], SMOOTHED
    for batch in batches:
        some = batch.take(torch.arange(min(left, len(batch))))
        if not len(some):
            break
        left -= len(some)
        labels.append(some.known_labels().cpu())
        parts.append(
            certified_radii(smoothed, some, n=COPIES, n0=CHOOSING, alpha=ALPHA, generator=generator)
        )
    radii = [0.0, *(threat.eps * scale for scale in (0.125, 0.25, 0.375, 0.5))]
    right = [
        sum(
            found.accuracy(of, eps * length) * len(of)
            for found, of in zip(parts, labels, strict=True)
        )
        for eps in radii
    ]
    count = sum(map(len, labels))
    return {
        "kind": "smoothing",
        "title": "certified accuracy of the smoothed classifier",
        "measure": "accuracy",
        "eps": radii,
        "unit": unit_of(threat),
        "certified": [share / count for share in right],
        "attacked": None,
        "seconds": round(time.monotonic() - began, 2),
        "note": (
            f"Radii are of a whole {task.sample}, all its vectors as one; noise of "
            f"{NOISE * threat.eps:g} in each coordinate, {COPIES} copies, {count} samples, each "
            f"certificate wrong with a probability of at most {ALPHA:g}. It is of the classifier "
            "under noise, not of the model as it is."
        ),
    }


def certificate_lines(models: dict[str, dict[str, Any]]) -> list[str]:
    """Show the certificates of an audit's models, a line for each."""
    lines: list[str] = []
    for name, facts in models.items():
        if "certificates" not in facts:
            continue
        if not facts["certificates"]:
            lines.append(f"{name}: nothing can be certified of this model and threat")
        for found in facts["certificates"]:
            pairs = zip(found["eps"], found["certified"], strict=True)
            shown = ", ".join(f"{share:.3f} at {eps:g}" for eps, share in pairs)
            lines.append(f"{name}: {found['title']} {shown} ({found['unit']})")
    return ["", *lines] if lines else []
