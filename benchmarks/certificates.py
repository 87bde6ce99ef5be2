"""Certificates on MovieLens 100K: ranks under moved vectors, and bagged MF under fake users.

    python benchmarks/certificates.py ranks RUN [--eps 0.0125 ...] [--models NAME] [--out FILE.json]
    python benchmarks/certificates.py attacks RUN [--attacks 500000] [--out FILE.json]
    python benchmarks/certificates.py fused [--out FILE.json]
    python benchmarks/certificates.py fakes [--submodels 10000] [--each 1] [--out FILE.json]

`ranks` takes a run of `embattle train recipes/films_ranking.yaml --out RUN`: how long certified
ranks take, and how far they are from what 100 gradient steps reach: of `attacked_ranks`, and of the
audit's own PGD through the task's sites, each user attacked alone; `attacks`, whether any of so
many random and first-order moves (on each of its models) gets below them. `fused` compares the
trainer of many submodels with a loop of single models, in turns. `fakes` trains an ensemble on the
split of benchmarks/baselines.py and certifies its precision at 10. With `--out` the figures are
added to those that FILE holds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from baselines import stratified
from embattle.audit.evaluation import evaluate
from embattle.audit.measure import measure
from embattle.certify import (
    Balls,
    Ranker,
    Ranks,
    SubmodelSettings,
    attacked_ranks,
    certified_overlap,
    certified_ranks,
    collect_votes,
    mean_share,
    train_submodels,
)
from embattle.data import movielens
from embattle.data.account import Account
from embattle.data.ratings import together
from embattle.jobs import recipe as recipes
from embattle.jobs.attack_recipe import attack_recipe
from embattle.jobs.certificates import ranker_of, table_norms
from embattle.jobs.recipe import Recipe
from embattle.jobs.threat import make_attack
from embattle.jobs.train import read
from embattle.models import MF, Interactions
from embattle.tasks.item_ranking import ItemRanking
from origin import origin
from torch import Tensor, nn

SIZE = 200  # users in a submodel, as in the paper
EPS = [0.0, 0.01, 0.0125, 0.015, 0.02, 0.025, 0.05]
FAKES = [0, 1, 2, 3, 4, 5, 6, 8, 10, 15, 20]


@dataclass(frozen=True)
class Examined:
    """A model of a run: its vectors, and the mean norms of both tables."""

    recipe: Recipe
    task: ItemRanking
    model: nn.Module
    ranker: Ranker
    norms: tuple[float, float]


def rankers(run: Path) -> Iterator[tuple[str, Examined]]:
    """Each model of a run by its name."""
    recipe = recipes.load(run / "recipe.yaml")
    task = recipe.make_task()
    assert isinstance(task, ItemRanking)
    read(task, Account(), recipe.audit.part)
    for name in recipe.variants:
        model = task.load(run / name)
        ranker = ranker_of(task, model, recipe.audit.part)
        yield name, Examined(recipe, task, model, ranker, table_norms(model))


def pgd_ranks(one: Examined, eps: float, clean: Ranks) -> Ranks:
    """What the audit's PGD-100 leaves, in the certificate's set: every user is attacked alone.

    Who is not recommended her item anyway keeps her rank.
    """
    recipe, task, model, part = one.recipe, one.task, one.model, one.recipe.audit.part
    rows = (clean.ranks <= task.kind.k).nonzero().flatten()
    alone = [task.batch(model, part, row) for row in rows.split(1)]
    sites = task.sites(model, recipe.threat.group)
    unit = measure(model, alone[:1], sites, to="token_norm", evaluator=task).unit
    attack = make_attack(
        attack_recipe(kind="pgd", steps=100, random_start=True),
        recipe.threat,
        torch.Generator().manual_seed(recipe.seed),
        scale=eps / recipe.threat.eps,
        best=True,
        unit=unit,
    )
    outputs = evaluate(model, alone, sites, {"": attack}, evaluator=task)[""].outputs
    own = outputs.gather(1, one.ranker.held[rows][:, None])
    ranks = clean.ranks.clone()
    ranks[rows] = (outputs > own).sum(1) + 1
    return Ranks(ranks)


def ranks(run: Path, radii: Sequence[float], models: Sequence[str]) -> dict[str, Any]:
    """For each model and eps (times the tables' mean norms): certified, attacked, seconds."""
    found: dict[str, Any] = {}
    for name, one in rankers(run):
        if models and name not in models:
            continue
        ranker, norms = one.ranker, one.norms
        clean = certified_ranks(ranker, Balls(0.0, 0.0, 0.0))
        for eps in radii:
            balls = Balls(eps * norms[0], eps * norms[1], eps * norms[1])
            began = time.perf_counter()
            certified = certified_ranks(ranker, balls)
            seconds = time.perf_counter() - began
            attacked = attacked_ranks(ranker, balls)
            began_pgd = time.perf_counter()
            pgd = pgd_ranks(one, eps, clean) if eps else clean
            found[f"{name}, eps {eps:g}"] = {
                "certified_hit_rate": certified.hit_rate(),
                "attacked_hit_rate": attacked.hit_rate(),
                "certified_ndcg": certified.ndcg(),
                "attacked_ndcg": attacked.ndcg(),
                "pgd_hit_rate": pgd.hit_rate(),
                "pgd_ndcg": pgd.ndcg(),
                "below": sum(
                    int((ranks > certified.ranks).sum()) for ranks in (attacked.ranks, pgd.ranks)
                ),
                "seconds": seconds,
                "pgd_seconds": time.perf_counter() - began_pgd,
            }
            print(name, eps, found[f"{name}, eps {eps:g}"], flush=True)
    return found


def moves(run: Path, attacks: int) -> dict[str, Any]:
    """So many moves on each model, at the eps where attacks cost about a quarter."""
    found = {}
    for name, one in rankers(run):
        norms = one.norms
        balls = Balls(0.0125 * norms[0], 0.0125 * norms[1], 0.0125 * norms[1])
        found[name] = many(one.ranker, balls, attacks)
        print(name, found[name], flush=True)
    return found


def many(ranker: Ranker, balls: Balls, attacks: int) -> dict[str, int]:
    """Random and first-order moves of all vectors at once, each on one user; violations."""
    certified = certified_ranks(ranker, balls).ranks
    users, items = ranker.users.double(), ranker.items.double()
    bias = torch.zeros(len(items)) if ranker.bias is None else ranker.bias.double()
    draw = torch.Generator().manual_seed(0)
    made = violations = equal = turn = 0
    while made < attacks:
        rows = torch.randint(len(users), (256,), generator=draw)
        u, held, allowed = users[rows], ranker.held[rows], ranker.rivals(rows)
        own = items[held]
        step = torch.randn(u.shape, generator=draw, dtype=u.dtype)
        if turn % 2:  # towards a random rival, with some noise
            aim = torch.randint(len(items), (256,), generator=draw)
            step = items[aim] - own + 0.1 * step
        x = u + balls.user * step / step.norm(dim=1, keepdim=True).clamp(min=1e-12)
        length = x.norm(dim=1, keepdim=True)
        # What the items' moves add to the scores: their best, or what random ones do.
        gain = balls.others * length
        loss = balls.item * length
        if turn % 4 < 2:
            angle = torch.randn(256, len(items) + 1, generator=draw, dtype=u.dtype)
            angle = (angle / u.shape[1] ** 0.5).clamp(-1, 1)
            gain, loss = gain * angle[:, 1:], loss * angle[:, :1]
        at = (x * own).sum(1, keepdim=True) + bias[held][:, None] - loss
        place = ((x @ items.T + bias + gain > at) & allowed).sum(1) + 1
        violations += int((place > certified[rows]).sum())
        equal += int((place == certified[rows]).sum())
        made, turn = made + 256, turn + 1
    return {"attacks": made, "violations": violations, "as_bad_as_certified": equal}


def parts() -> tuple[Interactions, Interactions]:
    """The training part (with validation) and the test part of the stratified split."""
    split = stratified(movielens.ratings())
    return Interactions.of(together(split.train, split.validation)), Interactions.of(split.test)


def loop(pairs: Interactions, members: Tensor, steps: int, dim: int) -> float:
    """Train single models as one writes them: MF, autograd, Adam; seconds of a step."""
    began = time.perf_counter()
    first = pairs.counts.cumsum(0) - pairs.counts
    for users in members:
        met, size = pairs.mask(users), len(users)
        model = MF(size, pairs.item_count, dim=dim - 1, std=0.1)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
        for _ in range(steps):
            place = first[users] + (torch.rand(size) * pairs.counts[users]).long()
            negative = torch.randint(pairs.item_count, (size,))
            usable = ~met.gather(1, negative[:, None]).squeeze(1)
            batch = (torch.arange(size), pairs.items[place], negative)
            loss = (model.losses(*batch) + 0.01 * model.penalty(*batch)) * usable
            optimizer.zero_grad()
            loss.sum().backward()
            optimizer.step()
    return (time.perf_counter() - began) / len(members) / steps


def fused() -> dict[str, Any]:
    """Microseconds of a step of one model (200 users, 1,682 items), medians of five turns."""
    pairs, _ = parts()
    draw = torch.Generator().manual_seed(0)
    members = torch.stack(
        [torch.randperm(pairs.user_count, generator=draw)[:SIZE] for _ in range(16)]
    )
    found: dict[str, Any] = {}
    for dim in (16, 32, 64):
        times: dict[str, list[float]] = {}
        for _ in range(5):
            times.setdefault("loop", []).append(loop(pairs, members[:1], 60, dim))
            for together_ in (1, 4, 8, 16):
                settings = SubmodelSettings(dim=dim, steps=200, at_once=together_)
                began = time.perf_counter()
                list(train_submodels(pairs, members, settings, generator=draw))
                seconds = (time.perf_counter() - began) / len(members) / settings.steps
                times.setdefault(f"{together_} at once", []).append(seconds)
        micro = {name: 1e6 * statistics.median(values) for name, values in times.items()}
        found[f"dim {dim}"] = micro | {"ratio_8": micro["loop"] / micro["8 at once"]}
    return found


def fakes(submodels: int, each: int) -> dict[str, Any]:
    """Certified precision at 10 and overlap with the list without attack, by fake users."""
    pairs, test = parts()
    began = time.perf_counter()
    votes = collect_votes(pairs, submodels=submodels, size=SIZE, each=each)
    seconds = time.perf_counter() - began
    everyone = torch.arange(pairs.user_count)
    liked = test.mask(everyone)
    best = votes.best(10)
    listed = torch.zeros_like(liked).scatter(1, best, True)
    return {
        "submodels": submodels,
        "each": each,
        "seconds": seconds,
        "precision": float(liked.gather(1, best).double().mean()),
        "fakes": FAKES,
        "certified_precision": mean_share(certified_overlap(votes, liked, FAKES), 10),
        "certified_overlap": mean_share(certified_overlap(votes, listed, FAKES), 10),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["ranks", "attacks", "fused", "fakes"])
    parser.add_argument("run", type=Path, nargs="?")
    parser.add_argument("--eps", type=float, nargs="+", default=EPS)
    parser.add_argument("--models", nargs="+", default=[])
    parser.add_argument("--attacks", type=int, default=500_000)
    parser.add_argument("--submodels", type=int, default=10_000)
    parser.add_argument("--each", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what in ("ranks", "attacks"):
        if options.run is None:
            parser.error(f"{options.what} needs a RUN of recipes/films_ranking.yaml")
        key, run = options.what, options.run
        if key == "ranks":
            found = ranks(run, options.eps, options.models)
        else:
            found = moves(run, options.attacks)
    elif options.what == "fused":
        found, key = fused(), "fused"
    else:
        found = fakes(options.submodels, options.each)
        key = f"fakes, {options.each} each of {options.submodels}"
    print(json.dumps({key: found}, indent=2))
    if options.out:
        kept = json.loads(options.out.read_text()) if options.out.exists() else {}
        kept[key] = {"origin": origin(1), **found}
        options.out.write_text(json.dumps(kept, indent=2) + "\n")


if __name__ == "__main__":
    main()
