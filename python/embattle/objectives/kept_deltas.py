"""Deltas of single samples, kept from one batch to the next, whatever the padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from embattle.errors import InputError
from embattle.perturb.perturbation import Perturbation


class KeptDeltas(NamedTuple):
    """The deltas of some samples, one after the other, without padding.

    Attributes:
        rows: `[R, D]`, the vectors that may move.
        lengths: int64 `[n]`, how many of them each sample has.
    """

    rows: Tensor
    lengths: Tensor

    @classmethod
    def take(
        cls, perturbation: Perturbation, chosen: Tensor, values: Tensor | None = None
    ) -> KeptDeltas:
        """Copy the deltas of some samples of a batch.

        Args:
            perturbation: of an output, whose samples have deltas of their own.
            chosen: int64 `[n]`, their rows in the batch, ascending.
            values: taken instead of the deltas, of their shape.
        """
        positions, lengths = _vectors(perturbation, chosen)
        return cls(_flat(perturbation.delta if values is None else values)[positions], lengths)

    def put(
        self,
        perturbation: Perturbation,
        rows: Tensor,
        numbers: Tensor,
        samples: Sequence[int],
        values: Tensor | None = None,
    ) -> Tensor:
        """Return a batch's deltas, of which those of some samples are kept ones.

        Args:
            perturbation: of the batch.
            rows: int64 `[n]`, the rows of these samples in the batch, ascending.
            numbers: int64 `[n]`, which of the kept samples each of them is.
            samples: their indices in the data, for errors.
            values: of the other samples instead of the deltas, of their shape.

        Raises:
            InputError: a sample has another number or width of vectors than it had.
        """
        positions, lengths = _vectors(perturbation, rows)
        known = self.lengths.to(rows.device)
        delta = _flat(perturbation.delta if values is None else values).clone()
        if self.rows.shape[1] != delta.shape[1]:
            raise InputError(
                f"StaggeredReplays: embeddings of width {delta.shape[1]}, which had "
                f"{self.rows.shape[1]} at the samples' visit before"
            )
        wrong = (lengths != known[numbers]).nonzero()
        if wrong.numel():
            first = int(wrong[0])
            raise InputError(
                f"StaggeredReplays: sample {samples[first]} has {int(lengths[first])} vectors that "
                f"may move, and had {int(known[numbers[first]])} at its visit before: give the "
                "mask of the padding, and the same input at each visit"
            )
        # The places of each sample's vectors among the kept ones, sample by sample.
        shift = (known.cumsum(0) - known)[numbers] - (lengths.cumsum(0) - lengths)
        places = torch.arange(len(positions), device=rows.device)
        places = places + shift.repeat_interleave(lengths, output_size=len(positions))
        kept = self.rows.to(delta.device, delta.dtype)
        delta[positions] = kept[places]
        return delta.view(perturbation.delta.shape)


def _flat(delta: Tensor) -> Tensor:
    delta = delta.detach()
    return delta.reshape(-1, delta.shape[-1])


def _vectors(perturbation: Perturbation, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Find the vectors that may move of some samples: their positions `[R]`, and counts `[n]`."""
    count, batch = perturbation.base.shape[:-1].numel(), perturbation.samples
    offsets, mask = perturbation.geometry["offsets"], perturbation.geometry["mask"]
    owners = torch.arange(batch, device=chosen.device)
    if offsets is None:
        owners = owners.repeat_interleave(count // max(batch, 1))
    else:
        owners = owners.repeat_interleave(offsets.diff(), output_size=count)
    is_chosen = torch.zeros(batch, dtype=torch.bool, device=chosen.device)
    is_chosen[chosen] = True
    wanted = is_chosen[owners]
    if mask is not None:
        wanted = wanted & mask.reshape(-1)
    positions = wanted.nonzero().squeeze(1)
    return positions, owners[positions].bincount(minlength=batch)[chosen]
