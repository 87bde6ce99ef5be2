"""The batches of staggered replays: each holds samples at their first, second, ... visit."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from embattle import checks
from embattle.data.buckets import LengthBuckets
from embattle.data.epochs import EpochBatches
from embattle.errors import InputError


class StaggeredBatches(EpochBatches):
    """Batches in which each sample comes `visits` times in a row, for `StaggeredReplays`.

    The samples are shuffled and cut into groups. Batch t holds group t at its first visit, then
    group t - 1 at its second one, and so on. The first and last `visits - 1` batches of an epoch
    are smaller. For `DataLoader(batch_sampler=...)`.

    Args:
        count: samples.
        batch_size: samples in a full batch; a multiple of `visits`.
        visits: how often each sample comes in an epoch.
        seed: with the epoch, decides the order.
        share: of a group, how many samples come again (rounded; one at least): a part of each batch
            is replayed then. A full batch may be smaller than `batch_size` by a few.
        lengths: `[count]`, of the samples: groups of similar length follow each other, so that
            little is padding.
        rank, ranks: of several processes each has its share of the samples, in batches of
            `batch_size`; what cannot be divided is left out of the epoch.

    Raises:
        TypeError: a number that is not whole.
        ValueError: a number below 1, a share of 0, or a `batch_size` that `visits` does not divide.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        visits: int = 2,
        *,
        seed: int = 0,
        share: float = 1.0,
        lengths: ArrayLike | None = None,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        name = type(self).__name__
        self.ranks = checks.integer(name, "ranks", ranks, 1)
        self.rank = checks.integer(name, "rank", rank, 0)
        self.count = checks.integer(name, "count", count, self.ranks) // self.ranks
        self.batch_size = checks.integer(name, "batch_size", batch_size, 1)
        self.visits = checks.integer(name, "visits", visits, 1)
        self.seed = checks.integer(name, "seed", seed, 0)
        self.share = checks.share(name, "share", share)
        if self.rank >= self.ranks:
            raise InputError(f"{name}: rank={rank} must be below ranks={ranks}")
        if self.share == 1 and self.batch_size % self.visits:
            raise InputError(
                f"{name}: batch_size={batch_size} must be a multiple of visits={visits}: a batch "
                "holds as many samples of each visit"
            )
        if self.batch_size < self.visits:
            raise InputError(
                f"{name}: batch_size={batch_size} must be at least visits={visits}: a batch holds "
                "samples of each visit"
            )
        # Samples that come for the first time in a full batch.
        self._group = int(self.batch_size / (1 + (self.visits - 1) * self.share) + 1e-9)
        while self._group + (self.visits - 1) * self._again(self._group, 2) > self.batch_size:
            self._group -= 1
        self._total = count
        # Runs of several groups are of similar length.
        self._buckets: LengthBuckets | None = None
        if lengths is not None:
            self._buckets = LengthBuckets(lengths, 8 * self.batch_size * self.ranks, seed=seed)
            if len(self._buckets.lengths) != count:
                raise InputError(
                    f"{name}: {len(self._buckets.lengths)} lengths for count={count} samples"
                )
        super().__init__()

    @property
    def _groups(self) -> int:
        return -(-self.count // self._group)

    def _again(self, size: int, visit: int) -> int:
        """Return how many samples of a group come at a visit, from 1."""
        return size if visit == 1 else max(round(self.share * size), 1)

    def __len__(self) -> int:
        """Batches in an epoch."""
        return self._groups + self.visits - 1

    def batches(self, epoch: int) -> list[list[int]]:
        """Return all batches of an epoch, in its order; the newest samples come first in each."""
        return [batch.tolist() for batch in self.arrays(epoch)]

    def arrays(self, epoch: int) -> list[NDArray[np.int64]]:
        """Return the same as arrays, int64."""
        if self._buckets is not None:
            order = np.concatenate([np.array(run) for run in self._buckets.batches(epoch)])
        else:
            order = np.random.default_rng([self.seed, epoch]).permutation(self._total)
        order = order[self.rank : self.count * self.ranks : self.ranks]
        cut = [order[i : i + self._group] for i in range(0, self.count, self._group)]
        return [
            np.concatenate(
                [
                    cut[group][: self._again(len(cut[group]), position - group + 1)]
                    for group in self._groups_of(position)
                ]
            )
            for position in range(len(self))
        ]

    def visit_numbers(self, position: int) -> list[int]:
        """Return at which visit each row of a batch is, from 1; the same in all epochs.

        Args:
            position: of the batch in its epoch, from 0.
        """
        sizes = [min(self._group, self.count - g * self._group) for g in range(self._groups)]
        return [
            position - group + 1
            for group in self._groups_of(position)
            for _ in range(self._again(sizes[group], position - group + 1))
        ]

    def _groups_of(self, position: int) -> range:
        """Return the groups of a batch, the newest first."""
        newest = min(position, self._groups - 1)
        return range(newest, max(position - self.visits, -1), -1)
