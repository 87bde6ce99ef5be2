"""The table of adversarial personalised ranking (APR) on MovieLens 100K, with balls that are alike.

    python benchmarks/apr_table.py [--seeds 0 1 2] [--epochs 300] [--out FILE.json]

As He et al. (SIGIR 2018) set it up: each user's last film is held out, BPR-MF of width 64 is
trained by Adagrad (rate .05, batches of 512, no decay), and goes on for as many epochs by BPR or by
APR (eps .5, lambda 1). Both are then attacked: every row of both tables moves within a ball, by the
gradient of the BPR loss of all training pairs. The figure is the change of nDCG@100 among all films
that the user has not met. Beside them staggered replays, which take the passes of BPR alone.

MSAP (Anelli et al., FLAIRS 2021) is shown twice: within the l2 ball of the other attacks, and
clipped to a box of the same eps, as its authors' code does, whose perturbations are longer.

Training with eps .5 makes rows longer, which by itself helps against a fixed eps: the second table
has eps relative to the mean norm of the rows of each table.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from itertools import count
from pathlib import Path

import embattle as eb
import torch
from embattle import MSAP, Relative, Site, StaggeredBatches
from embattle.attacks import Attack, UniformNoise
from embattle.data import movielens
from embattle.data.negatives import NegativeSampler
from embattle.data.ratings import hold_out_latest
from embattle.models import MF, Interactions
from embattle.models.ranking import evaluate
from origin import in_words, origin
from torch import Tensor

BATCH, RATE, EPS, K = 512, 0.05, 0.5, 100
ABSOLUTE, RELATIVE = (0.5, 1.0, 2.0), (0.1, 0.2, 0.4)
Figures = dict[str, dict[str, list[float]]]


class Training:
    """The pairs of the training part, and the models' training on them."""

    def __init__(self, seed: int) -> None:
        train, test = hold_out_latest(movielens.ratings())
        self.seen, self.relevant = Interactions.of(train), Interactions.of(test)
        self.users, self.items = train.user_count, train.item_count
        self.negatives = NegativeSampler(
            train.users, train.items, user_count=self.users, item_count=self.items, seed=seed
        )
        self.seed, self.draws = seed, count()

    def triplets(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pairs of the training part, each with a film that the user has not met."""
        users = self.seen.users[rows]
        drawn = torch.from_numpy(self.negatives.draw(users, 1, next(self.draws))).squeeze(1)
        return users, self.seen.items[rows], drawn

    def plain(self, model: MF, epochs: int) -> None:
        """BPR."""
        optimizer = _optimizer(model)
        for _ in range(epochs):
            for rows in torch.randperm(len(self.seen)).split(BATCH):
                loss = model.losses(*self.triplets(rows)).sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    def apr(self, model: MF, epochs: int) -> None:
        """APR: the clean loss, and that under one step on the batch's rows."""
        optimizer = _optimizer(model)
        sites = [Site(table, scope="row", group="token") for table in (model.user, model.item)]
        objective = eb.AdversarialObjective(eb.FGM(eps=EPS), sites, form="apr", lam=1.0)
        for _ in range(epochs):
            for rows in torch.randperm(len(self.seen)).split(BATCH):
                triplets = self.triplets(rows)
                loss, _ = objective(lambda: model.losses(*triplets))  # noqa: B023
                optimizer.zero_grad()
                (loss * len(rows)).backward()
                optimizer.step()

    def staggered(self, model: MF, epochs: int) -> None:
        """Two visits of each triplet, over half as many epochs."""
        optimizer = _optimizer(model)
        sites = [Site(table, group="token") for table in (model.user, model.item)]
        objective = eb.AdversarialObjective(
            eb.FGM(eps=EPS), sites, form=eb.StaggeredReplays(visits=2)
        )
        batches = StaggeredBatches(len(self.seen), BATCH, 2, seed=self.seed)
        for epoch in range(epochs // 2):
            users, positive, negative = self.triplets(torch.arange(len(self.seen)))
            for samples in batches.batches(epoch):
                rows = torch.tensor(samples)
                loss, _ = objective(
                    lambda: model.losses(users[rows], positive[rows], negative[rows]),  # noqa: B023
                    samples=rows,
                )
                optimizer.zero_grad()
                (loss * len(rows)).backward()
                optimizer.step()


def _optimizer(model: MF) -> torch.optim.Optimizer:
    return torch.optim.Adagrad(model.parameters(), lr=RATE, initial_accumulator_value=0.1)


def attacks(eps: float | Relative, generator: torch.Generator) -> dict[str, Attack]:
    """The attacks within one ball, and MSAP's box."""
    return {
        "noise": UniformNoise(eps=eps, generator=generator),
        "FGM": eb.FGM(eps=eps),
        "PGD-40": eb.PGD(eps=eps, steps=40),
        "MSAP-10, ball": MSAP(eps=eps, steps=10),
        "MSAP-10, box": MSAP(eps=eps, steps=10, projection="box"),
    }


def judge(training: Training, model: MF) -> dict[str, float]:
    """nDCG without attack, its change under each attack in percent, and the mean row norms."""

    def ndcg() -> float:
        found = evaluate(model.scores, training.relevant, training.seen, k=K)
        return found.means()["ndcg"]

    clean = ndcg()
    found = {"clean": clean}
    for name, table in (("user", model.user), ("item", model.item)):
        found[f"mean norm, {name}"] = float(table.weight.detach().norm(dim=-1).mean())
    sites = [Site.weight(model.user), Site.weight(model.item)]
    generator = torch.Generator().manual_seed(training.seed)
    triplets = training.triplets(torch.arange(len(training.seen)))
    balls: list[tuple[str, float | Relative]] = [(f"eps {eps:g}", eps) for eps in ABSOLUTE]
    balls += [(f"{eps:.0%} of the mean norm", Relative(eps, to="mean_norm")) for eps in RELATIVE]
    for ball, eps in balls:
        for name, attack in attacks(eps, generator).items():
            result = attack.run(lambda: model.losses(*triplets), sites, evaluate=False)
            with result.applied():
                found[f"{ball}: {name}"] = 100 * (ndcg() / clean - 1)
            found[f"{ball}: {name}, norm"] = statistics.mean(
                float(norms.mean()) for norms in result.norms
            )
    return found


def measure(seeds: list[int], epochs: int) -> Figures:
    """Method to figure to its value for each seed."""
    found: Figures = {}
    for seed in seeds:
        torch.manual_seed(seed)
        training = Training(seed)
        first = MF(training.users, training.items, dim=64, bias=False)
        training.plain(first, epochs)
        for name, go in (
            ("BPR", training.plain),
            ("APR", training.apr),
            ("staggered", training.staggered),
        ):
            model = copy.deepcopy(first)
            torch.manual_seed(seed)
            go(model, epochs)
            for figure, value in judge(training, model).items():
                found.setdefault(name, {}).setdefault(figure, []).append(value)
            print(f"seed {seed}, {name}: nDCG@{K} {found[name]['clean'][-1]:.4f}", flush=True)
    return found


def spread(values: list[float], digits: int) -> str:
    """The mean and half the range."""
    half = (max(values) - min(values)) / 2
    return f"{statistics.mean(values):.{digits}f} +- {half:.{digits}f}"


def table(found: Figures) -> list[str]:
    """A line for each attack, a column for each way of training."""
    lines = ["| | " + " | ".join(found) + " |", "|---" * (1 + len(found)) + "|"]
    for figure in next(iter(found.values())):
        if figure.endswith(", norm"):
            continue
        digits = 1 if ":" in figure else (4 if figure == "clean" else 2)
        title = f"nDCG@{K}, no attack" if figure == "clean" else figure
        cells = [spread(figures[figure], digits) for figures in found.values()]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found = measure(options.seeds, options.epochs)
    lines = table(found)
    print("\n".join(lines))
    if options.out is not None:
        about = origin(torch.get_num_threads())
        facts = {
            "origin": about,
            "epochs": options.epochs,
            "seeds": options.seeds,
            "figures": found,
        }
        options.out.write_text(json.dumps(facts, indent=1) + "\n")
        head = [
            "# APR on MovieLens 100K",
            "",
            f"`python benchmarks/apr_table.py --epochs {options.epochs} --seeds "
            f"{' '.join(map(str, options.seeds))}`: {in_words(about)}.",
            f"Means over {len(options.seeds)} seeds, +- half the range. Under an attack: change "
            f"of nDCG@{K} in percent. Staggered: two visits, {options.epochs // 2} epochs.",
            "",
        ]
        options.out.with_suffix(".md").write_text("\n".join([*head, *lines]) + "\n")


if __name__ == "__main__":
    main()
