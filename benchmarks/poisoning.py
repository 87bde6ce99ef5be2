"""What fake users do to BPR-MF on MovieLens 100K, and how many of them RDMA finds.

    python benchmarks/poisoning.py [--shares 0.05 0.2] [--seeds 0 1 2] [--out FILE.json]

Each seed draws five films of at most 20 ratings as targets, the fakes, and the model's first
weights. BPR-MF reads who rated what and no values, so that `random`, `average` and `love_hate` are
one attack on it. With `--out` a table is written beside the figures.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from embattle.data import movielens
from embattle.data.negatives import NegativeSampler
from embattle.data.profiles import TEMPLATES, fake_profiles, inject
from embattle.data.ratings import Ratings
from embattle.data.suspicion import suspicion
from embattle.models import MF, Interactions
from embattle.models.exposure import exposure
from origin import in_words, origin

FILLERS, K = 36, 50
# As benchmarks/baselines.py chose them for the last film.
EPOCHS, BATCH, RATE, L2 = 28, 2048, 0.005, 0.02
ON_BPR = ("random", "bandwagon", "segment")


def horror(ratings: Ratings, but: np.ndarray) -> np.ndarray:
    """The five most rated horror films that are no targets."""
    column = 5 + movielens.GENRES.index("Horror")
    films = np.unique(ratings.items[movielens.context(ratings).values[:, column] == 1])
    films = films[~np.isin(films, but)]
    return films[np.argsort(-ratings.popularity()[films], kind="stable")][:5]


def trained(ratings: Ratings, seed: int) -> MF:
    """BPR-MF after `EPOCHS` epochs."""
    torch.manual_seed(seed)
    seen = Interactions.of(ratings)
    model = MF(ratings.user_count, ratings.item_count, std=0.1)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    negatives = NegativeSampler(
        ratings.users,
        ratings.items,
        user_count=ratings.user_count,
        item_count=ratings.item_count,
        seed=seed,
    )
    steps = count()
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(seen)).split(BATCH):
            users, items = seen.users[rows], seen.items[rows]
            drawn = torch.from_numpy(negatives.draw(users, 1, next(steps))).squeeze(1)
            batch = (users, items, drawn)
            loss = (model.losses(*batch) + L2 * model.penalty(*batch)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def measure(shares: list[float], seeds: list[int]) -> dict[str, dict[str, list[float]]]:
    """For no fakes, and for each template and share, the figures of each seed."""
    genuine = movielens.ratings()
    rare = np.flatnonzero(genuine.popularity() <= 20)
    users = torch.arange(genuine.user_count)
    seen = Interactions.of(genuine)
    found: dict[str, dict[str, list[float]]] = {}

    def note(fakes: str, name: str, figure: float) -> None:
        found.setdefault(fakes, {}).setdefault(name, []).append(float(figure))
        print(f"{fakes}: {name} {figure:.4f}", flush=True)

    def train(fakes: str, ratings: Ratings, targets: np.ndarray, seed: int) -> None:
        model = trained(ratings, seed)
        gained = exposure(model.scores, torch.from_numpy(targets), users, seen, k=K).means()
        note(fakes, f"T-HR@{K}", gained["hit_rate"])
        note(fakes, f"T-NDCG@{K}", gained["ndcg"])

    for seed in seeds:
        targets = np.random.default_rng(seed).choice(rare, 5, replace=False)
        train("none", genuine, targets, seed)
        for share, template in itertools.product(shares, TEMPLATES):
            more: dict[str, Any] = {}
            if template == "segment":
                more = {"segment": horror(genuine, targets)}
            fakes = fake_profiles(
                genuine,
                targets,
                template=template,
                share=share,
                fillers=FILLERS,
                seed=seed,
                **more,
            )
            ratings = inject(genuine, fakes.ratings)
            name = f"{template}, {share:.0%}"
            if template in ON_BPR:
                train(name, ratings, targets, seed)
            order = np.argsort(-suspicion(ratings), kind="stable")
            note(name, "RDMA, recall", np.isin(order[: len(fakes.users)], fakes.users).mean())
    return found


def table(found: dict[str, dict[str, list[float]]]) -> list[str]:
    """The means over the seeds, and the lowest and highest."""
    names = (f"T-HR@{K}", f"T-NDCG@{K}", "RDMA, recall")
    lines = ["| fakes | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for fakes, figures in found.items():
        cells = [
            f"{statistics.mean(f):.3f} ({min(f):.3f} to {max(f):.3f})" if f else ""
            for f in (figures.get(name, []) for name in names)
        ]
        lines.append(f"| {fakes} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.05, 0.2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found = measure(options.shares, options.seeds)
    lines = table(found)
    print("\n".join(lines))
    if options.out is not None:
        about = origin(torch.get_num_threads())
        facts = {"origin": about, "seeds": options.seeds, "figures": found}
        options.out.write_text(json.dumps(facts, indent=1) + "\n")
        head = [
            "# Fake users on MovieLens 100K",
            "",
            in_words(about),
            "",
            f"Five targets of at most 20 ratings, {FILLERS} fillers; shares are per genuine user. "
            f"BPR-MF, {EPOCHS} epochs. Means over {len(options.seeds)} seeds, the lowest and the "
            "highest. Recall: the share of the fakes among as many most suspicious users.",
            "",
        ]
        options.out.with_suffix(".md").write_text("\n".join([*head, *lines]) + "\n")


if __name__ == "__main__":
    main()
