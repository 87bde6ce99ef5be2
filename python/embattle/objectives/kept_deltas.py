"""Deltas of single samples, kept from one batch to the next, whatever the padding."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embattle.criteria.base import require
from embattle.errors import InputError
from embattle.objectives.rows import Rows
from embattle.perturb.perturbation import Perturbation


class KeptDeltas(NamedTuple):
    """The deltas of some samples. Of a padded batch nothing is moved, and no device is waited for.

    Attributes:
        values: `[n, W, D]`.
        mask: bool `[n, W]`, which vectors may move; None: all.
    """

    values: Tensor
    mask: Tensor | None

    @classmethod
    def take(
        cls, perturbation: Perturbation, rows: Rows, values: Tensor | None = None
    ) -> KeptDeltas:
        """Return the deltas of some samples of a batch; without offsets, maybe views of them.

        Args:
            perturbation: of an output, whose samples have deltas of their own.
            rows: which samples of the batch.
            values: taken instead of the deltas, of their shape.
        """
        found = (perturbation.delta if values is None else values).detach()
        mask, offsets = perturbation.geometry["mask"], perturbation.geometry["offsets"]
        if offsets is not None:
            index, there = _packed(perturbation, rows)
            return cls(found.reshape(-1, found.shape[-1])[index], there)
        found = rows.of(found)
        found = found.reshape(len(rows), found.shape[1:-1].numel(), found.shape[-1])
        return cls(found, None if mask is None else rows.of(mask).reshape(found.shape[:2]))

    def of(self, rows: Rows) -> KeptDeltas:
        """Return those of some of the samples."""
        return KeptDeltas(rows.of(self.values), None if self.mask is None else rows.of(self.mask))

    def fitted(self, perturbation: Perturbation, rows: Rows, samples: NDArray[np.int64]) -> Tensor:
        """Return the deltas as a batch has them, whose padding may be another one.

        Args:
            perturbation: of the batch.
            rows: where the samples are in it, in the order that they are kept in.
            samples: of the batch, their indices in the data, for errors.

        Returns:
            The values of these rows, of their shape; of packed rows `[n, most, D]`, padded.

        Raises:
            InputError: a sample has another number or width of vectors than it had. On a GPU a
                number that the mask gives is checked late, and raises an error of the device.
        """
        base, mask = perturbation.base, perturbation.geometry["mask"]
        if self.values.shape[-1] != base.shape[-1]:
            raise InputError(
                f"StaggeredReplays: embeddings of width {base.shape[-1]}, which had "
                f"{self.values.shape[-1]} at the samples' visit before"
            )
        values = self.values.to(base.device, perturbation.dtype)
        if perturbation.geometry["offsets"] is not None:
            _, there = _packed(perturbation, rows)
            return self._moved(values, there, samples[rows.numbers])
        shape = (len(rows), *base.shape[1:])
        count = base.shape[1:-1].numel()
        if mask is None and self.mask is None and values.shape[1] == count:
            return values.reshape(shape)
        if mask is None:
            there = torch.ones(len(rows), count, dtype=torch.bool, device=base.device)
        else:
            there = rows.of(mask).reshape(len(rows), count)
        return self._moved(values, there, samples[rows.numbers]).reshape(shape)

    def _moved(self, values: Tensor, there: Tensor, samples: NDArray[np.int64]) -> Tensor:
        """Put each sample's vectors where they may move now, bool `[n, W]`; zeros elsewhere."""
        before = self._mask().to(values.device)
        if before.is_cpu and before.shape == there.shape and torch.equal(before, there):
            return values * there.unsqueeze(-1)
        had, has = before.sum(1), there.sum(1)
        if had.is_cpu and not torch.equal(had, has):
            first = int((had != has).nonzero()[0])
            raise InputError(
                f"StaggeredReplays: sample {samples[first]} has {int(has[first])} vectors that may "
                f"move, and had {int(had[first])} at its visit before: give the mask of the "
                "padding, and the same input at each visit"
            )
        require(
            had == has,
            has,
            "StaggeredReplays: a sample has another number of vectors that may move than it had at "
            "its visit before",
        )
        # From the number of a vector, among those of its sample that may move, to its place.
        places = before.logical_not().byte().argsort(dim=1, stable=True)
        numbers = (there.cumsum(1) - 1).clamp(0, before.shape[1] - 1)
        places = places.gather(1, numbers).unsqueeze(-1)
        found = values.gather(1, places.expand(-1, -1, values.shape[-1]))
        return found * there.unsqueeze(-1)

    def _mask(self) -> Tensor:
        if self.mask is not None:
            return self.mask
        return torch.ones(self.values.shape[:2], dtype=torch.bool, device=self.values.device)

    def state(self) -> dict[str, Tensor]:
        """Return `rows` `[R, D]`, the vectors that may move, and `lengths` `[n]` of the samples."""
        mask = self._mask()
        return {"rows": self.values[mask], "lengths": mask.sum(1)}

    @classmethod
    def of_state(cls, rows: Tensor, lengths: Tensor) -> KeptDeltas:
        """Make them of such a state."""
        most = int(lengths.max()) if len(lengths) else 0
        mask = torch.arange(most, device=lengths.device) < lengths.unsqueeze(1)
        values = rows.new_zeros(len(lengths), most, rows.shape[1])
        values[mask.to(rows.device)] = rows
        return cls(values, None if bool(mask.all()) else mask.to(rows.device))


def write_packed(perturbation: Perturbation, rows: Rows, into: Tensor, values: Tensor) -> None:
    """Write what `KeptDeltas.fitted` gave of packed rows into values of a batch, in place."""
    index, there = _packed(perturbation, rows)
    flat = into.view(-1, into.shape[-1])
    flat[index[there]] = values[there]


def _packed(perturbation: Perturbation, rows: Rows) -> tuple[Tensor, Tensor]:
    """Find the packed rows of some samples: places `[n, W]`, and which may move, bool `[n, W]`."""
    offsets, mask = perturbation.geometry["offsets"], perturbation.geometry["mask"]
    offsets = offsets.to(perturbation.base.device)
    count = perturbation.base.shape[:-1].numel()
    starts, lengths = rows.of(offsets[:-1]), rows.of(offsets.diff())
    most = int(lengths.max()) if len(rows) else 0
    steps = torch.arange(most, device=offsets.device)
    there = steps < lengths.unsqueeze(1)
    index = (starts.unsqueeze(1) + steps).clamp(max=max(count - 1, 0))
    if mask is not None:
        there = there & mask.reshape(-1)[index]
    return index, there
