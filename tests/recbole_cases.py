"""RecBole's models on a small data set that is made up, as tasks and as RecBole has them."""

from __future__ import annotations

import importlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from embattle.data.account import Account
from embattle.data.batch import Batch
from embattle.integrations import recbole_data, recbole_model
from embattle.integrations.recbole import RecBoleData, RecBoleModel, RecBoleTask
from torch import Tensor, nn

GENERAL = ["BPR", "DGCF", "DMF", "FISM", "LightGCN", "NAIS", "NeuMF", "NGCF", "NNCF", "SpectralCF"]
CONTEXT = [
    "AFM",
    "AutoInt",
    "DCN",
    "DeepFM",
    "DSSM",
    "EulerNet",
    "FFM",
    "FiGNN",
    "FM",
    "FNN",
    "FwFM",
    "LR",
    "NFM",
    "PNN",
    "WideDeep",
    "xDeepFM",
]
SEQUENTIAL = [
    "Caser",
    "CORE",
    "FDSA",
    "FEARec",
    "FOSSIL",
    "FPMC",
    "GCSAN",
    "GRU4Rec",
    "GRU4RecF",
    "HGN",
    "HRM",
    "LightSANs",
    "NARM",
    "NextItNet",
    "NPE",
    "SASRec",
    "SASRecF",
    "SHAN",
    "SINE",
    "SRGNN",
    "STAMP",
    "TransRec",
]
#: Where models without a table of embeddings of the usual kind are attacked.
SITES = {
    "DMF": ["user_linear", "item_linear"],
    "LR": ["first_order_linear.token_embedding_table.embedding"],
}
# Trained on pairs of items instead of all.
PAIRWISE = ("FPMC", "TransRec")


def write_atomic_files(folder: Path, *, users: int = 30, items: int = 40, each: int = 12) -> None:
    """Write `tiny`: who rated what and when, and a little about users and items."""
    draw, place = random.Random(0), folder / "tiny"
    place.mkdir(parents=True)
    lines = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    for user in range(users):
        for time, item in enumerate(draw.sample(range(items), each)):
            lines.append(f"u{user}\ti{item}\t{draw.randint(1, 5)}\t{time}")
    (place / "tiny.inter").write_text("\n".join(lines) + "\n")
    lines = ["user_id:token\tage:token\tgender:token"]
    lines += [f"u{user}\t{user % 4}\t{'MF'[user % 2]}" for user in range(users)]
    (place / "tiny.user").write_text("\n".join(lines) + "\n")
    lines = ["item_id:token\tyear:token\tclass:token_seq"]
    lines += [f"i{i}\t{i % 5}\t{' '.join(draw.sample('abcd', 2))}" for i in range(items)]
    (place / "tiny.item").write_text("\n".join(lines) + "\n")


def values_of(model: str, folder: Path, dataset: str = "tiny") -> dict[str, Any]:
    """RecBole's configuration of a model on a data set in a folder."""
    values: dict[str, Any] = {
        "model": model,
        "dataset": dataset,
        "data_path": str(folder),
        "metric_decimal_place": 6,
        "load_col": {
            "inter": ["user_id", "item_id", "rating", "timestamp"],
            "user": ["user_id", "age", "gender"],
            "item": ["item_id", "year", "class"],
        },
    }
    if model in CONTEXT:
        values["threshold"] = {"rating": 3}
    if model in SEQUENTIAL:
        values["MAX_ITEM_LIST_LENGTH"] = 8
        if model not in PAIRWISE:
            values["train_neg_sample_args"] = None
    if model == "DGCF":
        # It draws as many users as a batch has, of which there are 30 here.
        values |= {"embedding_size": 16, "train_batch_size": 16}
    return values


def task_of(name: str, folder: Path, **options: Any) -> RecBoleTask:
    """A task that has read the data; options are those of its two sections."""
    model = {key: options.pop(key) for key in ("checkpoint", "sites") if key in options}
    values = values_of(name, folder) | options.pop("overrides", {})
    task = RecBoleTask(
        RecBoleData(overrides=values, **options),
        RecBoleModel(**({"sites": SITES.get(name, [])} | model)),
        seed=3,
    )
    task.read(Account())
    return task


def group_of(task: RecBoleTask) -> Any:
    return "token" if task.prepared.family == "general" else "sample"


def interaction_of(batch: Batch) -> Any:
    """The batch as RecBole has it."""
    interaction = importlib.import_module("recbole.data.interaction").Interaction
    return interaction({k: v.clone() for k, v in batch.inputs.items() if not k.startswith("(")})


def own_trainer(task: RecBoleTask, model: nn.Module) -> tuple[Any, Any]:
    """RecBole's own trainer of a model, and its loader of the test part."""
    config = recbole_data.make_config(task.values)
    data, utils = (importlib.import_module(f"recbole.{name}") for name in ("data", "utils"))
    with recbole_data.seeded(config["seed"]), recbole_data.quiet():
        loader = data.data_preparation(config, data.create_dataset(config))[2]
        trainer = utils.get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
    # What its evaluation sets first.
    model.eval()
    trainer.tot_item_num = loader._dataset.item_num
    trainer.item_tensor = loader._dataset.get_item_feature()
    return trainer, loader


def its_scores(trainer: Any, loader: Any) -> Iterator[Any]:
    """Users and the scores of all items that RecBole's evaluation ranks, batch by batch."""
    with torch.no_grad():
        for batch in loader:
            interaction, scores, *_ = trainer._full_sort_batch_eval(batch)
            yield zip(interaction["user_id"], scores, strict=True)


def total_of(model: Any, batch: Batch) -> Tensor:
    """The loss that RecBole trains on."""
    with recbole_data.seeded(5), recbole_model.uncached(model):
        found = model.calculate_loss(interaction_of(batch))
    return (sum(found) if isinstance(found, tuple) else found).reshape(())


def mean_of(task: RecBoleTask, model: nn.Module, batch: Batch) -> Tensor:
    """The mean of the losses; of the terms alone, in evaluation mode."""
    losses = task.evaluate(model, batch).losses
    assert losses is not None
    return losses.mean()


def step_down(
    task: RecBoleTask, model: nn.Module, batch: Batch, gradients: Any, size: Tensor
) -> Tensor:
    """The loss after a step, which is taken back."""
    weights = [p for p in model.parameters() if p.requires_grad]
    moves = [(w, size * g) for w, g in zip(weights, gradients, strict=True) if g is not None]
    with torch.no_grad():
        before = [weight.clone() for weight, _ in moves]
        for weight, move in moves:
            weight -= move
        found = mean_of(task, model, batch)
        for (weight, _), old in zip(moves, before, strict=True):
            weight.copy_(old)
    return found
