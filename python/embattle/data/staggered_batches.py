"""The batches of staggered replays: each holds samples at their first, second, ... visit."""

from __future__ import annotations

import numpy as np

from embattle import checks
from embattle.data.epochs import EpochBatches
from embattle.errors import InputError


class StaggeredBatches(EpochBatches):
    """Batches in which each sample comes `visits` times in a row, for `StaggeredReplays`.

    The samples are shuffled and cut into groups of `batch_size / visits`. Batch t holds group t at
    its first visit, then group t - 1 at its second one, and so on. The first and last
    `visits - 1` batches of an epoch are smaller. For `DataLoader(batch_sampler=...)`.

    Args:
        count: samples.
        batch_size: samples in a full batch; a multiple of `visits`.
        visits: how often each sample comes in an epoch.
        seed: with the epoch, decides the order.

    Raises:
        TypeError: a number that is not whole.
        ValueError: a number below 1, or a `batch_size` that `visits` does not divide.
    """

    def __init__(self, count: int, batch_size: int, visits: int = 2, *, seed: int = 0) -> None:
        name = type(self).__name__
        self.count = checks.integer(name, "count", count, 1)
        self.batch_size = checks.integer(name, "batch_size", batch_size, 1)
        self.visits = checks.integer(name, "visits", visits, 1)
        self.seed = checks.integer(name, "seed", seed, 0)
        if self.batch_size % self.visits:
            raise InputError(
                f"{name}: batch_size={batch_size} must be a multiple of visits={visits}: a batch "
                "holds as many samples of each visit"
            )
        super().__init__()

    @property
    def _group(self) -> int:
        return self.batch_size // self.visits

    @property
    def _groups(self) -> int:
        return -(-self.count // self._group)

    def __len__(self) -> int:
        """Batches in an epoch."""
        return self._groups + self.visits - 1

    def batches(self, epoch: int) -> list[list[int]]:
        """Return all batches of an epoch, in its order; the newest samples come first in each."""
        order = np.random.default_rng([self.seed, epoch]).permutation(self.count).tolist()
        cut = [order[i : i + self._group] for i in range(0, self.count, self._group)]
        return [
            [sample for group in self._groups_of(position) for sample in cut[group]]
            for position in range(len(self))
        ]

    def visit_numbers(self, position: int) -> list[int]:
        """Return at which visit each row of a batch is, from 1; the same in all epochs.

        Args:
            position: of the batch in its epoch, from 0.
        """
        sizes = [min(self._group, self.count - g * self._group) for g in range(self._groups)]
        return [
            position - group + 1 for group in self._groups_of(position) for _ in range(sizes[group])
        ]

    def _groups_of(self, position: int) -> range:
        """Return the groups of a batch, the newest first."""
        newest = min(position, self._groups - 1)
        return range(newest, max(position - self.visits, -1), -1)
