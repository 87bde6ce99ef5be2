"""Which samples of the training part a step of a variant sees, in all passes and processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from embattle.data.buckets import LengthBuckets
from embattle.data.staggered_batches import StaggeredBatches
from embattle.errors import InputError
from embattle.jobs.recipe import Recipe
from embattle.jobs.variant_recipe import StaggeredVariant
from embattle.tasks.base import Task


class Order:
    """The samples of each step, which its number alone decides.

    Args:
        recipe: the job.
        variant: its name in the recipe.
        task: has read its data.
        model: brings what belongs to it, such as a tokenizer.
        rank, ranks: this process, and how many there are.

    Attributes:
        replays: optimiser steps on each batch.

    Raises:
        InputError: the batches cannot be made as the recipe wants them.
    """

    def __init__(
        self,
        recipe: Recipe,
        variant: str,
        task: Task,
        model: nn.Module,
        *,
        rank: int,
        ranks: int,
    ) -> None:
        self.recipe, self.task, self.model = recipe, task, model
        self.rank, self.ranks = rank, ranks
        self.replays: int = getattr(recipe.variants[variant], "replays", 1)
        # The epoch that is under way, with its batches.
        self._epoch: tuple[int, Sequence[Tensor]] | None = None
        self._buckets: LengthBuckets | None = None
        self._staggered = self._staggered_batches(variant)

    def places(self, step: int) -> list[Tensor]:
        """The places in the training part of this process's samples of a step, by pass."""
        step //= self.replays
        passes, count = self.recipe.train.accumulate, len(self.task.parts["train"])
        if self._staggered is not None:
            return [self._staggered_places(step * passes + i) for i in range(passes)]
        size = min(self.recipe.train.batch_size, count)
        epoch, position = divmod(step, count // size)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, self._batches(epoch, size)
        rows = self._epoch[1][position][self.rank :: self.ranks]
        if len(rows) % passes:
            raise InputError(
                f"train.accumulate: the {len(rows)} samples of a step (the training part has no "
                f"more) cannot be divided among {passes} passes"
            )
        return list(torch.split(rows, len(rows) // passes))

    def _staggered_places(self, number: int) -> Tensor:
        """The same of a pass of staggered replays, counted from 0 over all steps."""
        assert self._staggered is not None
        epoch, position = divmod(number, len(self._staggered))
        if self._epoch is None or self._epoch[0] != epoch:
            batches = [torch.from_numpy(rows) for rows in self._staggered.arrays(epoch)]
            self._epoch = epoch, batches
        return self._epoch[1][position]

    def _batches(self, epoch: int, size: int) -> Sequence[Tensor]:
        """The places of an epoch's samples, batch by batch; what fills no batch is left out."""
        count = len(self.task.parts["train"])
        if self.recipe.train.batches == "random":
            shuffle = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + epoch)
            order = torch.randperm(count, generator=shuffle)[: count // size * size]
            return torch.split(order, size)
        if self._buckets is None:
            self._buckets = LengthBuckets(self._lengths(), size, seed=self.recipe.seed)
        return [torch.tensor(b) for b in self._buckets.batches(epoch) if len(b) == size]

    def _staggered_batches(self, name: str) -> StaggeredBatches | None:
        """The order of a variant of staggered replays, whose steps have as many samples."""
        variant, train = self.recipe.variants[name], self.recipe.train
        if not isinstance(variant, StaggeredVariant):
            return None
        passes = self.ranks * train.accumulate
        if train.batch_size % (passes * variant.visits) and variant.share == 1:
            raise InputError(
                f"train.batch_size: {train.batch_size} cannot be divided among {passes} passes of "
                f"{variant.visits} visits (variants.{name}.visits)"
            )
        return StaggeredBatches(
            len(self.task.parts["train"]),
            train.batch_size // passes,
            variant.visits,
            seed=self.recipe.seed,
            share=variant.share,
            lengths=self._lengths() if train.batches == "by_length" else None,
            rank=self.rank,
            ranks=self.ranks,
        )

    def _lengths(self) -> Sequence[int]:
        """The lengths of the training part's samples."""
        lengths = self.task.lengths(self.model, "train")
        if lengths is None:
            raise InputError(
                f"train.batches: the samples of task {self.recipe.task} have no lengths; use random"
            )
        return lengths
