"""What is proven of a run's models, for the facts of its audit: `embattle audit RUN --certify`."""

from __future__ import annotations

import time
from typing import Any, cast

import torch
from torch import Tensor, nn

from embattle.audit.evidence import ENSEMBLE
from embattle.certify import (
    Balls,
    Ranker,
    Smoothed,
    SubmodelSettings,
    attacked_ranks,
    certified_overlap,
    certified_radii,
    certified_ranks,
    collect_votes,
    worst_swaps,
)
from embattle.data.batch import Batch, first_samples
from embattle.errors import InputError
from embattle.jobs.attack_recipe import ThreatRecipe
from embattle.jobs.recipe import Recipe
from embattle.jobs.trained import chosen_device
from embattle.models import FM, MF, Interactions, LightGCN
from embattle.perturb.site import as_sites
from embattle.progress import bar
from embattle.tasks.base import Task
from embattle.tasks.clicks import ClickThrough
from embattle.tasks.hybrid import HybridRanking
from embattle.tasks.item_ranking import ItemRanking
from embattle.tasks.ratings import RatingsTask
from embattle.tasks.tabular import Tabular
from embattle.tasks.text import TextClassification

# Multiples of the threat's eps beside those of the audit's sweep: certificates end early.
SCALES = (0.125, 0.25, 0.5, 1.0)
# Fields that may be swapped at once, and rows of which the worst swaps are sought.
SWAPS, ROWS = (1, 2, 3), 1000
# Radii that are told of smoothing, in multiples of the noise.
RADII = (0.0, 0.5, 1.0, 1.5, 2.0)
_AT_ONCE = 5


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
    began, threat, options = time.monotonic(), recipe.threat, recipe.audit.certify.smoothing
    length, noise = 1.0 if threat.unit == "absolute" else norm, options.noise * threat.eps
    sigma = noise * length
    generator = torch.Generator().manual_seed(recipe.seed)
    sites = task.sites(model, threat.group)
    smoothed = Smoothed(model, sites, sigma, evaluator=task, batch_size=256)
    parts, labels = [], []
    chosen = first_samples(batches, options.samples)
    # A few at a time, so that the bar moves.
    some_of = [some for batch in chosen for some in batch.split(_AT_ONCE)]
    with bar("smoothing", len(some_of)) as show:
        for done, some in enumerate(some_of, start=1):
            labels.append(some.known_labels().cpu())
            parts.append(
                certified_radii(
                    smoothed,
                    some,
                    n=options.copies,
                    n0=options.choosing,
                    alpha=options.alpha,
                    generator=generator,
                )
            )
            show(done, {})
    radii = [noise * scale for scale in RADII]
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
            f"{noise:g} in each coordinate, {options.copies} copies, {count} samples, each "
            f"certificate wrong with a probability of at most {options.alpha:g}. It is of the "
            "classifier under noise, not of the model as it is."
        ),
    }


def check_fakes(recipe: Recipe, task: Task) -> None:
    """Check that the ensemble that the recipe asks for can be trained on what the task has read.

    Raises:
        InputError: naming the key.
    """
    options = recipe.audit.certify.fakes
    if options is None:
        return
    if not isinstance(task, RatingsTask):
        raise InputError(
            "audit.certify.fakes: an ensemble of MF models is trained on ratings, and the task has "
            "none; leave audit.certify.fakes out"
        )
    if options.size > len(task.users):
        raise InputError(
            f"audit.certify.fakes.size: {options.size} users of a submodel are more than the "
            f"{len(task.users)} there are; lower it"
        )


def of_fakes(recipe: Recipe, task: Task) -> list[dict[str, Any]]:
    """Certify an ensemble of MF models under fake users, if the recipe asks for it."""
    options = recipe.audit.certify.fakes
    if options is None or not isinstance(task, RatingsTask):
        return []
    began, part, k = time.monotonic(), recipe.audit.part, task.kind.k
    pairs = Interactions.of(task.met_before(part), device=chosen_device())
    with bar("training submodels", options.submodels) as show:
        votes = collect_votes(
            pairs,
            submodels=options.submodels,
            size=options.size,
            each=options.each,
            settings=SubmodelSettings(dim=options.dim, steps=options.steps),
            seed=recipe.seed,
            tick=lambda done: show(done, {}),
        )
    held = Interactions.of(task.held[part]).mask(torch.arange(pairs.user_count))
    best = votes.best(k).cpu()
    listed = torch.zeros_like(held).scatter(1, best, True)
    known = held.any(1)
    fakes, found = [0, *sorted(set(options.fakes))], {}
    for name, wanted in (("hit_rate", held), ("overlap", listed)):
        found[name] = certified_overlap(votes, wanted, fakes, k=k, alpha=options.alpha).double()
    shares = {
        "hit_rate": found["hit_rate"][:, known].mean(1).tolist(),
        "overlap": (found["overlap"] / k).mean(1).tolist(),
    }
    rate = float((held & listed).any(1)[known].double().mean())
    note = (
        f"Of an ensemble of {options.submodels} MF models of {options.size} users each, trained on "
        "what the users met before, not of the models above. The fake users are added, with any "
        "profiles. For all users at once it is wrong with a probability of at most "
        f"{options.alpha:g}; at 0 fake users only certainty is missing. Without an attacker its "
        f"hit rate is {rate:.4f}."
    )
    return [
        {
            "kind": kind,
            "title": title,
            "measure": measure,
            "eps": list(map(float, fakes)),
            "unit": "fake users",
            "certified": shares[measure],
            "attacked": None,
            "seconds": round(time.monotonic() - began, 2),
            "note": note,
        }
        for kind, measure, title in (
            ("fakes", "hit_rate", f"certified hit rate@{k} of the ensemble"),
            ("fakes_overlap", "overlap", f"certified share of the lists of {k} of the ensemble"),
        )
    ]


def certificate_lines(facts: dict[str, Any]) -> list[str]:
    """Show the certificates of an audit, a line for each."""
    lines: list[str] = []
    for name, model in {**facts["models"], ENSEMBLE: facts}.items():
        if "certificates" not in model:
            continue
        if not model["certificates"]:
            lines.append(f"{name}: nothing can be certified of this model and threat")
        for found in model["certificates"]:
            pairs = zip(found["eps"], found["certified"], strict=True)
            shown = ", ".join(f"{share:.3f} at {eps:g}" for eps, share in pairs)
            lines.append(f"{name}: {found['title']} {shown} ({found['unit']})")
    return ["", *lines] if lines else []
