"""What fake users do to MF and LightGCN on MovieLens 100K, by attack and by defence.

    python benchmarks/poisoning.py [--shares 0.2] [--seeds 0 1 2] [--only MF] [--out FILE.json]
    python benchmarks/poisoning.py --join A.json B.json --seeds 0 1 --out FILE.json

Each seed draws five films of at most 20 ratings as targets, the fakes, and the models' first
weights. Fakes are made from what the models train on: all films but each user's last, which says
what the fakes do to everybody's recommendations (delta-NDCG). The models learn by BPR from who met
what, so that `average` and `love_hate` are `random` to them, and the optimised kinds aim at
implicit feedback. Where LightGCN's gradients are clipped, this is done at the vectors that scores
are products of, and so are its losses made adversarial then: there each user's gradient is known,
and spreading it over the graph makes it no longer. The settings of training were chosen by eye on
seed 0 without fakes; none of the defences was tuned. With `--out` the figures are written after
each training, with a table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import embattle as eb
import numpy as np
import torch
from embattle import losses
from embattle.clipping import PerSampleClipper
from embattle.data import movielens
from embattle.data.profiles import inject
from embattle.data.ratings import Ratings, hold_out_latest
from embattle.data.suspicion import detection, suspicion
from embattle.models import MF, Interactions, LightGCN
from embattle.models.exposure import exposure
from embattle.models.ranking import evaluate
from embattle.poisoning.profiles import OPTIMISED, make_fakes
from origin import in_words, origin
from torch import Tensor

FILLERS, K, TARGETS = 36, 50, 5
EPS, CLIP = 0.5, 1.0
# Batch, learning rate and weight decay of AdamW, epochs; from half of these on losses are
# adversarial.
SETTINGS = {"MF": (4096, 0.01, 0.1, 20), "LightGCN": (8192, 0.02, 0.01, 30)}
ATTACKS = ("random", "bandwagon", "segment", *OPTIMISED)
# RDMA looks at ratings, which tell these from `random`.
FOUND_ONLY = ("average", "love_hate")
DEFENCES = ("plain", "APR", "user-clipped", "APR and user-clipped", "VAT-rec", "PamaCF")


def vectors(model: Any, *triplets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the scores of triplets are products of."""
    users, positive, negative = triplets
    tables = (
        model.propagate() if isinstance(model, LightGCN) else (model.user.weight, model.item.weight)
    )
    return tables[0][users], tables[1][positive], tables[1][negative]


def adaptive(model: Any, strength: Callable[..., Tensor], *triplets: Tensor) -> Tensor:
    """BPR losses, and those where each vector is moved by its triplet's own eps; [B]."""
    found = vectors(model, *triplets)

    def bpr(user: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        return losses.bpr((user * positive).sum(1), (user * negative).sum(1))

    clean = bpr(*found)
    grads = torch.autograd.grad(clean.sum(), found, retain_graph=True)
    eps = strength(found[0].detach(), triplets[0], clean.detach())[:, None]
    moved = [x + eps * torch.nn.functional.normalize(g) for x, g in zip(found, grads, strict=True)]
    return clean + bpr(*moved)


def by_loss(vector: Tensor, users: Tensor, clean: Tensor) -> Tensor:
    """VAT-rec's: users whom the model serves well get more, up to twice eps (RecSys 2024)."""
    _, place, count = users.unique(return_inverse=True, return_counts=True)
    mean = torch.zeros(len(count)).index_add(0, place, clean)[place] / count[place]
    return EPS * 2 * torch.sigmoid(clean.mean() / mean - 1)


def by_norm(vector: Tensor, users: Tensor, clean: Tensor) -> Tensor:
    """PamaCF's: users with long vectors get more, up to twice eps (NeurIPS 2024)."""
    norm = vector.square().sum(1)
    return EPS * 2 * torch.sigmoid(norm / norm.mean() - 1)


def trained(kind: str, defence: str, ratings: Ratings, seed: int) -> Any:
    """A model after its epochs, ready to score."""
    torch.manual_seed(seed)
    seen = Interactions.of(ratings)
    batch, rate, decay, epochs = SETTINGS[kind]
    clipped = "clipped" in defence
    model: Any
    if kind == "MF":
        model = flat = MF(ratings.user_count, ratings.item_count, std=0.1, bias=False)
    else:
        model = LightGCN(seen, layers=2)
        flat = MF(ratings.user_count, ratings.item_count, bias=False)  # of what it spreads
    rows = kind == "MF" or clipped
    tables = (flat.user, flat.item) if rows else (model.user, model.item)
    sites = [eb.Site(table, scope="row") if rows else eb.Site.weight(table) for table in tables]
    apr = eb.AdversarialObjective(eb.FGM(eps=EPS), sites, form="apr" if rows else "mixed", lam=1.0)
    clipper = PerSampleClipper(flat, CLIP, verify="first")
    strength = {"VAT-rec": by_loss, "PamaCF": by_norm}.get(defence)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay)
    met = seen.mask(torch.arange(seen.user_count))
    for epoch in range(epochs):
        hard = epoch >= epochs // 2
        for places in torch.randperm(len(seen)).split(batch):
            users, items = seen.users[places], seen.items[places]
            other = torch.randint(seen.item_count, places.shape)
            while bool((again := met[users, other]).any()):
                other[again] = torch.randint(seen.item_count, (int(again.sum()),))
            triplets = (users, items, other)

            def loss_fn(of: Any = flat if clipped else model, triplets: Any = triplets) -> Any:
                return eb.Evaluation(of.losses(*triplets))

            optimizer.zero_grad()
            if clipped:
                spread = () if flat is model else model.propagate()
                for table, now in zip(tables, spread, strict=False):
                    table.weight.data.copy_(now)
                    table.weight.grad = None
                with clipper:
                    both = hard and "APR" in defence
                    each = apr.parts(loss_fn)[0].summed if both else loss_fn().losses
                    clipper.backward(each, users=users)
                if spread:
                    torch.autograd.backward(spread, [table.weight.grad for table in tables])
            elif hard and defence == "APR":
                apr(loss_fn)[0].backward()
            elif hard and strength is not None:
                adaptive(model, strength, *triplets).mean().backward()
            else:
                model.losses(*triplets).mean().backward()
            optimizer.step()
    return model.for_scoring() if kind == "LightGCN" else model.eval()


def measured(model: Any, targets: Tensor, train: Ratings, test: Ratings) -> dict[str, float]:
    """T-HR and T-NDCG of the targets, and NDCG@10 of each genuine user's last film."""
    seen, users = Interactions.of(train), torch.arange(train.user_count)
    gained = exposure(model.scores, targets, users, seen, k=K).means()
    kept = evaluate(model.scores, Interactions.of(test), seen, k=10).means()["ndcg"]
    return {f"T-HR@{K}": gained["hit_rate"], f"T-NDCG@{K}": gained["ndcg"], "NDCG@10": kept}


def fakes_of(kind: str, train: Ratings, targets: np.ndarray, share: float, seed: int) -> Any:
    """The fakes of an attack."""
    more: dict[str, Any] = {}
    if kind == "segment":
        column = 5 + movielens.GENRES.index("Horror")
        films = np.unique(train.items[movielens.context(train).values[:, column] == 1])
        films = films[~np.isin(films, targets)]
        more = {"segment": films[np.argsort(-train.popularity()[films], kind="stable")][:5]}
    if kind in OPTIMISED:
        more = {"feedback": "implicit"}
    return make_fakes(train, targets, kind=kind, share=share, fillers=FILLERS, seed=seed, **more)


def measure(options: argparse.Namespace, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """For each model, defence and attack the figures of each seed, and what RDMA finds."""
    train, test = hold_out_latest(movielens.ratings())
    rare = np.flatnonzero((train.popularity() <= 20) & (train.popularity() > 0))
    found: dict[str, Any] = {"models": {}, "detection": {}, "seconds": {}}

    def note(section: str, keys: tuple[str, ...], figures: dict[str, float]) -> None:
        place = found[section]
        for key in keys:
            place = place.setdefault(key, {})
        for name, figure in figures.items():
            place.setdefault(name, []).append(float(figure))
        print(*keys, {name: round(x, 4) for name, x in figures.items()}, flush=True)
        save(found)

    for seed in options.seeds:
        targets = np.random.default_rng(seed).choice(rare, TARGETS, replace=False)
        made: dict[str, Ratings] = {"none": train}
        for share in options.shares:
            for kind in options.attacks:
                name, began = f"{kind}, {share:.0%}", time.perf_counter()
                fakes = fakes_of(kind, train, targets, share, seed)
                note("seconds", (name,), {"making": time.perf_counter() - began})
                ratings = inject(train, fakes.ratings)
                told = detection(suspicion(ratings), fakes.users, flagged=len(fakes.users))
                note("detection", (name,), {"F1": told.f1})
                if kind in ATTACKS:
                    made[name] = ratings
        for model in options.only:
            shares = options.shares if model == "MF" else options.shares[-1:]
            for name, ratings in made.items():
                if name != "none" and not any(name.endswith(f", {s:.0%}") for s in shares):
                    continue
                for defence in options.defences:
                    began = time.perf_counter()
                    victim = trained(model, defence, ratings, seed)
                    figures = measured(victim, torch.from_numpy(targets), train, test)
                    figures["seconds"] = time.perf_counter() - began
                    note("models", (model, defence, name), figures)
    return found


def table(found: dict[str, Any]) -> list[str]:
    """Means over the seeds with the lowest and highest, in Markdown."""

    def spread(figures: list[float], scale: float = 100.0) -> str:
        low, mean, high = min(figures), statistics.mean(figures), max(figures)
        return f"{scale * mean:.2f} ({scale * low:.2f} to {scale * high:.2f})"

    lines = []
    for model, defences in found["models"].items():
        names = list(next(iter(defences.values())))
        head = "| fakes | " + " | ".join(defences) + " |"
        rule = "|---" * (len(defences) + 1) + "|"
        lines += ["", f"## {model}: T-HR@{K} in percent", "", head, rule]
        for name in names:
            cells = [d[name][f"T-HR@{K}"] if name in d else [] for d in defences.values()]
            lines.append(f"| {name} | " + " | ".join(spread(c) if c else "" for c in cells) + " |")
        lines += ["", f"## {model}: NDCG@10 of genuine users in percent (none), delta-NDCG", ""]
        lines += [head, rule]
        for name in names:
            cells = []
            for figures in defences.values():
                if name not in figures:
                    cells.append("")
                    continue
                now, clean = figures[name]["NDCG@10"], figures["none"]["NDCG@10"]
                change = [b - a for a, b in zip(clean, now, strict=False)]
                cells.append(spread(now) if name == "none" else spread(change))
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", "## Found by RDMA among as many suspects, and seconds to make", ""]
    lines += ["| fakes | F1 | seconds |", "|---|---|---|"]
    for name, figures in found["detection"].items():
        seconds = statistics.mean(found["seconds"][name]["making"])
        lines.append(f"| {name} | {spread(figures['F1'], 1.0)} | {seconds:.1f} |")
    return lines


def write(path: Path, options: argparse.Namespace, about: Any, found: dict[str, Any]) -> None:
    """Write the figures, and the table beside them."""
    facts = {"origin": about, "seeds": options.seeds, "figures": found}
    path.write_text(json.dumps(facts, indent=1) + "\n")
    head = [
        "# Fake users on MovieLens 100K",
        "",
        in_words(about),
        "",
        f"{TARGETS} targets of at most 20 ratings, {FILLERS} fillers; shares are per genuine user. "
        f"Seeds {', '.join(map(str, options.seeds))}: mean, lowest and highest. eps {EPS} of all "
        f"adversarial losses, from half of the epochs on; user-clipped: norm {CLIP} for each user "
        "and batch. The seconds are those of one thread of a busy machine.",
    ]
    path.with_suffix(".md").write_text("\n".join([*head, *table(found)]) + "\n")


def joined(paths: list[Path]) -> dict[str, Any]:
    """What several runs of one commit wrote, the seeds one after the other."""

    def add(to: dict[str, Any], more: dict[str, Any]) -> None:
        for key, value in more.items():
            if isinstance(value, dict):
                add(to.setdefault(key, {}), value)
            else:
                to.setdefault(key, []).extend(value)

    found: dict[str, Any] = {}
    for path in paths:
        add(found, json.loads(path.read_text())["figures"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--attacks", nargs="+", default=[*ATTACKS, *FOUND_ONLY])
    parser.add_argument("--defences", nargs="+", choices=DEFENCES, default=DEFENCES)
    parser.add_argument("--join", nargs="+", type=Path, help="files of runs, in place of a run")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    about = origin(1)
    save = (
        (lambda found: None) if options.out is None else partial(write, options.out, options, about)
    )
    if options.join:
        found = joined(options.join)
        save(found)
    else:
        found = measure(options, save)
    print("\n".join(table(found)))


if __name__ == "__main__":
    main()
