"""Batches of texts of similar length, so that little of a batch is padding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from embattle.data.epochs import EpochBatches
from embattle.errors import InputError


class LengthBuckets(EpochBatches):
    """Batches of similar length in random order, each example once in an epoch.

    The examples are shuffled and taken in windows of many batches; a window is sorted by length and
    cut into batches, and all batches are shuffled. For `DataLoader(batch_sampler=...)`.

    Args:
        lengths: [N] length of each example.
        batch_size: examples in a batch; the last one of an epoch may have fewer.
        seed: with the epoch, decides the order.
        window: batches in a window. More of them have less padding, fewer mix more.

    Raises:
        InputError: about an argument.
    """

    def __init__(
        self, lengths: ArrayLike, batch_size: int, *, seed: int = 0, window: int = 50
    ) -> None:
        self.lengths = np.asarray(lengths)
        if self.lengths.ndim != 1 or (self.lengths.size and self.lengths.dtype.kind not in "iuf"):
            raise InputError(
                f"LengthBuckets: lengths must be one row of numbers, got {self.lengths.dtype} of "
                f"shape {self.lengths.shape}"
            )
        for name, value in (("batch_size", batch_size), ("window", window)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"LengthBuckets: {name} must be a whole number > 0, got {value!r}")
        self.batch_size, self.seed, self.window = batch_size, seed, window
        super().__init__()

    def __len__(self) -> int:
        """Batches in an epoch."""
        return -(-len(self.lengths) // self.batch_size)

    def batches(self, epoch: int) -> list[list[int]]:
        """All batches of an epoch, in its order."""
        count = len(self.lengths)
        rng = np.random.default_rng([self.seed, epoch])
        mixed = rng.permutation(count)
        window = np.arange(count) // (self.batch_size * self.window)
        order = mixed[np.lexsort((self.lengths[mixed], window))]
        cut = range(0, count, self.batch_size)
        found = [order[i : i + self.batch_size].tolist() for i in cut]
        return [found[i] for i in rng.permutation(len(found))]


def padding(lengths: ArrayLike, batches: Sequence[Sequence[int]]) -> float:
    """The share of padding in batches that are padded to their longest example.

    Args:
        lengths: [N] length of each example.
        batches: positions of the examples of each batch.

    Returns:
        Padded cells by all cells; 0 where there are none.
    """
    found = np.asarray(lengths)
    cells = sum(len(batch) * int(found[list(batch)].max()) for batch in batches if len(batch))
    filled = sum(int(found[list(batch)].sum()) for batch in batches if len(batch))
    return 1 - filled / cells if cells else 0.0
