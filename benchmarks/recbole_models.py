"""RecBole's models on its MovieLens 100K, without and under attack.

    PYTHONPATH=python .venv-recbole/bin/python benchmarks/recbole_models.py [--only BPR] [--out F]

A short training each (`STEPS` batches of RecBole's own loader, AdamW at RecBole's learning rate):
it shows that the models run, train and are attacked, not how good they get. Divisions, negatives
and first weights are RecBole's. The attack is PGD-5 at the eps that `embattle recbole` takes, in
mean norms of the model's embeddings, on 200 held-out interactions.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import embattle as eb
import torch
from embattle.audit.evaluation import evaluate, predict
from embattle.data.account import Account
from embattle.integrations.recbole import RecBoleData, RecBoleModel, RecBoleTask
from embattle.jobs.recbole import THREATS
from origin import in_words, origin

STEPS = 150
#: Family -> models, RecBole's keys for them, and the size of a batch.
MODELS: dict[str, tuple[str, dict[str, Any], int]] = {
    "general": ("BPR LightGCN NGCF SpectralCF NeuMF", {}, 2048),
    "context": (
        "FM AFM NFM DeepFM DCN xDeepFM WideDeep AutoInt",
        {"threshold": {"rating": 4}},
        1024,
    ),
    "sequential": (
        "SASRec GRU4Rec NARM STAMP Caser LightSANs HGN",
        {"MAX_ITEM_LIST_LENGTH": 20, "train_neg_sample_args": None},
        128,
    ),
}


def measure(name: str, family: str) -> dict[str, Any]:
    """Train one model shortly and attack it."""
    _, overrides, size = MODELS[family]
    began = time.perf_counter()
    data = RecBoleData(dataset="ml-100k", overrides=overrides, limits={"test": 200})
    task = RecBoleTask(data, RecBoleModel(name=name), seed=0)
    task.read(Account())
    model = task.build().train()
    read = time.perf_counter()
    rate = task.prepared.config["learning_rate"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    count = len(task.parts["train"])
    draw = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        rows = torch.randint(count, (size,), generator=draw)
        losses = task.evaluate(model, task.batch(model, "train", rows, seed=step)).losses
        assert losses is not None
        optimizer.zero_grad(set_to_none=True)
        losses.mean().backward()
        optimizer.step()
    trained = time.perf_counter()
    model.eval()
    threat: Any = THREATS[family]
    sites = task.sites(model, threat["group"])
    unit = eb.Relative(threat["eps"], to="token_norm")
    step_size = eb.Relative(threat["eps"] / 2, to="token_norm")
    attack = eb.PGD(eps=unit, step_size=step_size, steps=5, keep="best")
    batches = task.batches(model, "test", 100)
    labels = torch.cat([batch.known_labels() for batch in batches])
    clean = task.kind.scores(predict(model, batches, task), labels)
    leave = not task.kind.graded
    run = evaluate(model, batches, sites, {"PGD-5": attack}, evaluator=task, leave=leave)
    found = run["PGD-5"]
    key = "auc" if family == "context" else "hit_rate"
    return {
        "family": family,
        "measure": key,
        "eps": threat["eps"],
        "clean": clean[key],
        "attacked": task.kind.scores(found.outputs, labels)[key],
        "read_seconds": read - began,
        "train_seconds": trained - read,
        "attack_seconds": found.seconds,
    }


def table(results: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [
        f"# RecBole's models on MovieLens 100K, {STEPS} training steps each\n",
        f"{in_words(results['origin'])}\n",
        "`benchmarks/recbole_models.py` gives them, one seed. Too short a training for figures of "
        "merit: it shows that the models train and are attacked. PGD-5 on 200 held-out "
        "interactions, eps in mean norms of the model's embeddings.\n",
        "| model | family | measure | clean | eps | PGD-5 | read, s | train, s | attack, s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in results["models"].items():
        times = [f"{row[f'{what}_seconds']:.1f}" for what in ("read", "train", "attack")]
        title = {"auc": "AUC", "hit_rate": "hit rate at 10"}[row["measure"]]
        lines.append(
            f"| {name} | {row['family']} | {title} | {row['clean']:.3f} | {row['eps']:g} | "
            f"{row['attacked']:.3f} | {' | '.join(times)} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    known = [(name, family) for family, entry in MODELS.items() for name in entry[0].split()]
    parser.add_argument("--only", nargs="+", choices=[name for name, _ in known])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {"origin": origin(1), "models": {}}
    for name, family in known:
        if options.only is None or name in options.only:
            results["models"][name] = measure(name, family)
            print(name, results["models"][name], flush=True)
    if options.out is not None:
        options.out.write_text(json.dumps(results, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(table(results))


if __name__ == "__main__":
    main()
