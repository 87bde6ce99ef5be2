"""Which samples of a batch are meant."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# What takes rows of a tensor: a slice gives a view.
Key: TypeAlias = "slice | Tensor"


class Rows:
    """Rows of a tensor whose dim 0 holds samples. A run of rows is a view, and costs nothing.

    Args:
        numbers: int64 `[n]`, none of them twice; or a run of rows.
    """

    def __init__(self, numbers: NDArray[np.int64] | range) -> None:
        self._run: slice | None = None
        self._numbers: NDArray[np.int64] | None = None
        self._count = len(numbers)
        if isinstance(numbers, range):
            self._run = slice(numbers.start, numbers.start + self._count)
        else:
            self._numbers = numbers
        self._index: Tensor | None = None

    @classmethod
    def where(cls, there: NDArray[np.bool_]) -> Rows:
        """Return those that are there, bool `[B]`, ascending."""
        count = int(np.count_nonzero(there))
        first = int(there.argmax()) if count else 0
        if np.count_nonzero(there[first : first + count]) == count:
            return cls(range(first, first + count))
        return cls(there.nonzero()[0])

    @property
    def numbers(self) -> NDArray[np.int64]:
        """The numbers of the rows."""
        if self._numbers is None:
            assert self._run is not None
            self._numbers = np.arange(self._run.start, self._run.stop)
        return self._numbers

    @property
    def array_key(self) -> slice | NDArray[np.int64]:
        """What takes these rows of an array."""
        return self.numbers if self._run is None else self._run

    def __len__(self) -> int:
        return self._count

    def key(self, device: torch.device) -> Key:
        """Return what takes these rows of a tensor: `values[rows.key(values.device)]`."""
        return self.index(device) if self._run is None else self._run

    def index(self, device: torch.device) -> Tensor:
        """Return the numbers as a tensor."""
        if self._index is None or self._index.device != device:
            self._index = torch.from_numpy(self.numbers).to(device, non_blocking=True)
        return self._index

    def of(self, values: Tensor) -> Tensor:
        """Return these rows."""
        return values[self.key(values.device)]

    def add_to(self, values: Tensor, added: Tensor) -> None:
        """Add to these rows in place."""
        if self._run is None:
            values.index_add_(0, self.index(values.device), added)
        else:
            values[self._run].add_(added)

    def write(self, values: Tensor, rows: Tensor) -> None:
        """Write these rows in place."""
        values[self.key(values.device)] = rows

    def rest(self, count: int) -> Rows:
        """Return the other ones of `count` rows."""
        if self._run is not None and self._run.stop == count:
            return Rows(range(self._run.start))
        there = np.ones(count, dtype=bool)
        there[self.array_key] = False
        return Rows.where(there)

    def common(self, other: Rows) -> tuple[Rows, Rows] | None:
        """Return where the rows are that both have, in each of them; None where there is none."""
        if not len(self) or not len(other):
            return None
        if self._run is not None and other._run is not None and self._run.stop <= other._run.start:
            return None
        _, mine, theirs = np.intersect1d(
            self.numbers, other.numbers, assume_unique=True, return_indices=True
        )
        return Rows(mine), Rows(theirs)
