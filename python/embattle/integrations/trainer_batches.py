"""Batches of the transformers Trainer for forms that know a sample again, or attack some alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from embattle.data.staggered_batches import StaggeredBatches
from embattle.errors import need
from embattle.objectives import Partial, StaggeredReplays

# The key of a batch under which the numbers of its samples in the data set are.
SAMPLES = "embattle_samples"


class _Numbered(Dataset[tuple[int, Any]]):
    """A data set whose items come with their number."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> tuple[int, Any]:
        return number, self.dataset[number]


class _Collate:
    """What a collator makes of the items, and their numbers."""

    def __init__(self, collator: Callable[[list[Any]], Any]) -> None:
        self.collator = collator

    def __call__(self, items: Sequence[tuple[int, Any]]) -> Any:
        numbers, features = zip(*items, strict=True)
        batch = self.collator(list(features))
        batch[SAMPLES] = torch.tensor(numbers)
        return batch


def needs_numbers(form: Any) -> bool:
    """Whether a form must be told which samples a batch holds."""
    return isinstance(form, StaggeredReplays) or (
        isinstance(form, Partial) and form.choose != "random"
    )


def numbered_loader(trainer: Any, form: StaggeredReplays | Partial) -> Any:
    """Make the training batches of a Trainer, with the samples' numbers, for a form.

    Those of staggered replays are of `StaggeredBatches`: an epoch has `visits` visits of each
    sample, and each process its share of the samples. The Trainer's grouping by length is kept.

    Raises:
        ValueError: the data set has no length, the batch size does not divide by the visits, or
            batches that are not full are to be dropped.
    """
    dataset, args = trainer.train_dataset, trainer.args
    if dataset is None or not hasattr(dataset, "__len__"):
        raise ValueError(
            f"AdversarialTrainer: {form!r} must know samples again, and the train_dataset has no "
            "length; give one that has, or another form"
        )
    if hasattr(dataset, "remove_columns"):  # of the library datasets
        dataset = trainer._remove_unused_columns(dataset, description="Training")
        collator = trainer.data_collator
    else:
        collator = trainer._get_collator_with_removed_columns(
            trainer.data_collator, description="Training"
        )
    options: dict[str, Any] = {
        "collate_fn": _Collate(collator),
        "num_workers": args.dataloader_num_workers,
        "pin_memory": args.dataloader_pin_memory,
        "persistent_workers": args.dataloader_persistent_workers,
        "prefetch_factor": args.dataloader_prefetch_factor,
    }
    if isinstance(form, StaggeredReplays):
        if args.dataloader_drop_last:
            raise ValueError(
                "AdversarialTrainer: dataloader_drop_last=True would leave out visits of staggered "
                "replays, whose first and last batches of an epoch are not full; leave it out"
            )
        options["batch_sampler"] = StaggeredBatches(
            len(dataset),
            trainer._train_batch_size,
            form.visits,
            seed=args.seed if args.data_seed is None else args.data_seed,
            share=form.share,
            lengths=_lengths(dataset) if _by_length(args) else None,
            rank=args.process_index,
            ranks=max(args.world_size, 1),
        )
    else:
        options |= {
            "batch_size": trainer._train_batch_size,
            "sampler": trainer._get_train_sampler(dataset),
            "drop_last": args.dataloader_drop_last,
        }
    accelerator, loader = trainer.accelerator, DataLoader(_Numbered(dataset), **options)
    if "batch_sampler" not in options:
        return accelerator.prepare(loader)
    # Lightning, which uses this module too, does not bring it.
    prepare: Any = need("accelerate.data_loader").prepare_data_loader
    # The batches are this process's own: Accelerate must not divide them again, nor leave those
    # out that are not full.
    return prepare(
        loader,
        accelerator.device,
        num_processes=1,
        process_index=0,
        put_on_device=accelerator.device_placement,
    )


def _by_length(args: Any) -> bool:
    named = getattr(args, "train_sampling_strategy", None) == "group_by_length"
    return named or bool(getattr(args, "group_by_length", False))


def _lengths(dataset: Any) -> list[int]:
    return [len(dataset[number]["input_ids"]) for number in range(len(dataset))]


def take(batch: Any, rows: Tensor) -> Any:
    """Take some samples of a batch: of every tensor as long as the first one, these rows.

    Args:
        batch: a tensor, or tensors in mappings, dataclasses, lists and tuples, whose dim 0 holds
            the samples.
        rows: int64 `[n]`.
    """
    size = count(batch)

    def chosen(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[rows.to(value.device)] if value.dim() and len(value) == size else value
        if isinstance(value, MutableMapping):
            found = copy(value)  # of its class, such as a tokenizer's BatchEncoding
            found.update({key: chosen(one) for key, one in value.items()})
            return found
        if _is_dataclass(value):
            fields = [one.name for one in dataclasses.fields(value) if one.init]
            return dataclasses.replace(
                value, **{name: chosen(getattr(value, name)) for name in fields}
            )
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*map(chosen, value))
        return type(value)(map(chosen, value)) if isinstance(value, (list, tuple)) else value

    return chosen(batch)


def count(batch: Any) -> int:
    """How many samples a batch holds: the length of its first tensor.

    Raises:
        ValueError: there is none.
    """
    todo = [batch]
    while todo:
        one = todo.pop(0)
        if isinstance(one, Tensor) and one.dim():
            return len(one)
        if isinstance(one, Mapping):
            todo = [*one.values(), *todo]
        elif _is_dataclass(one):
            todo = [*(getattr(one, each.name) for each in dataclasses.fields(one)), *todo]
        elif isinstance(one, (list, tuple)):
            todo = [*one, *todo]
    raise ValueError(
        f"in a batch of type {type(batch).__name__} no tensors are found, so that its samples "
        "cannot be counted: say how many they are (samples=), and how some are taken (subset=, or "
        "in Lightning take)"
    )


def _is_dataclass(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)
