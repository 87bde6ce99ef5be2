"""Per-sample gradients of embedding tables: rows, and where they belong."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from embattle import ops
from embattle.clipping.grad_sample import GradSample, scaled, squares
from embattle.clipping.users import Users
from embattle.ops.embedding import embedding_grad_rows

# Elements of a sparse gradient from which on an optimiser gains more from distinct rows than it
# takes to sum the equal ones.
_COALESCED = 1 << 16


@dataclass
class EmbeddingGradSample(GradSample):
    """``weight[indices]``.

    Attributes:
        indices: [B, L], integers.
        grad: [B, L, D]; zero wherever the index is padding.
        padding_idx: the row without a gradient, if any.
        sparse: whether the gradient is wanted as rows.
    """

    indices: Tensor
    grad: Tensor
    padding_idx: int | None
    sparse: bool
    batched = ("indices", "grad")

    def kind(self) -> Hashable:
        return EmbeddingGradSample

    def joined(self, others: Sequence[Any]) -> EmbeddingGradSample:
        """As any; padding rows may differ: the padding of each has a zero gradient."""
        every = (self, *others)
        paddings = {each.padding_idx for each in every}
        return EmbeddingGradSample(
            torch.cat([each.indices for each in every], 1),
            torch.cat([each.masked() for each in every], 1),
            paddings.pop() if len(paddings) == 1 else None,
            all(each.sparse for each in every),
        )

    def norms(self, users: Users) -> Tensor:
        norms = partial(ops.embedding_grad_norm, padding_idx=self.padding_idx)
        return users.gather(norms, [self.indices], [self.grad])

    def apart(self, users: Users) -> bool:
        """Whether no user can have a row twice: the table's gradient is then `masked`'s rows."""
        return users.of_sample is None and self.indices.shape[1] == 1

    def masked(self) -> Tensor:
        """grad, zero at padding."""
        if self.padding_idx is None:
            return self.grad
        return self.grad.masked_fill((self.indices == self.padding_idx)[..., None], 0)

    def weighted(self, factor: Tensor | None, shape: torch.Size) -> Tensor:
        """As any; a sparse tensor where sparse, a large one coalesced. None: factors of 1."""
        rows = shape[0]
        if not self.sparse:
            return ops.embedding_grad_sum(
                self.indices, self.grad, rows, weights=factor, padding_idx=self.padding_idx
            )
        # Elsewhere, how many rows there are is known to the device alone.
        coalesced = self.grad.device.type == "cpu" and self.grad.numel() >= _COALESCED
        if coalesced:
            indices, grad = embedding_grad_rows(
                self.indices, self.grad, rows, weights=factor, padding_idx=self.padding_idx
            )
        else:
            grad = self.grad if factor is None else scaled(self.grad, factor)
            indices, grad = self.indices.flatten(), grad.flatten(0, 1)
            if self.padding_idx is not None:
                keep = indices != self.padding_idx
                indices, grad = indices[keep], grad[keep]
        return torch.sparse_coo_tensor(
            indices[None],
            grad,
            (rows, grad.shape[-1]),
            is_coalesced=coalesced,
            check_invariants=False,
        )

    def squared_size(self) -> Tensor:
        return squares(self.masked(), 1)

    def dense(self, shape: torch.Size) -> Tensor:
        whole = self.grad.new_zeros(len(self.grad), *shape)
        kept = self.masked()
        return whole.scatter_add_(1, self.indices[..., None].expand_as(kept), kept)


@dataclass
class BagGradSample(GradSample):
    """One bag of rows per sample, summed or averaged.

    Attributes:
        indices: [N] integers, the bags one after the other.
        offsets: [B + 1], where each bag starts and the last one ends.
        grad: [B, D].
        mode: "sum" or "mean" (over what is not padding).
        weights: [N] factors of the rows, mode "sum" only.
        padding_idx: the row that does not count, if any.
        sparse: whether the gradient is wanted as rows.
    """

    indices: Tensor
    offsets: Tensor
    grad: Tensor
    mode: Literal["sum", "mean"]
    weights: Tensor | None
    padding_idx: int | None
    sparse: bool
    batched = ("grad",)

    def norms(self, users: Users) -> Tensor:
        if users.of_sample is not None:
            return self.padded().norms(users)
        return ops.embedding_grad_norm(
            self.indices,
            self.grad,
            padding_idx=self.padding_idx,
            offsets=self.offsets,
            mode=self.mode,
            per_sample_weights=self.weights,
        )

    def owners(self) -> Tensor:
        """[N] the bag of each index."""
        sizes = self.offsets.diff()
        bags = torch.arange(len(sizes), device=sizes.device)
        return bags.repeat_interleave(sizes, output_size=len(self.indices))

    def _coefficients(self, owners: Tensor) -> Tensor:
        """[N] what multiplies the bag's gradient in each row."""
        kept = torch.ones_like(self.indices, dtype=self.grad.dtype)
        if self.padding_idx is not None:
            kept = (self.indices != self.padding_idx).to(self.grad.dtype)
        if self.weights is not None:
            kept = kept * self.weights.to(kept.dtype)
        if self.mode == "mean":
            counts = kept.new_zeros(len(self.grad)).index_add_(0, owners, kept)
            kept = kept / counts.clamp(min=1)[owners]
        return kept

    def weighted(self, factor: Tensor, shape: torch.Size) -> Tensor:
        owners = self.owners()
        scale = self._coefficients(owners) * factor.to(self.grad.dtype)[owners]
        grad = self.grad[owners] * scale[:, None]
        # One row for each of N samples, their factors in it.
        use = EmbeddingGradSample(
            self.indices[:, None], grad[:, None], self.padding_idx, self.sparse
        )
        return use.weighted(None, shape)

    def select(self, rows: Tensor) -> GradSample:
        return self.padded().select(rows)

    def squared_size(self) -> Tensor:
        return self.padded().squared_size()

    def dense(self, shape: torch.Size) -> Tensor:
        return self.padded().dense(shape)

    def places(self) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """[B, longest bag] zeros in indices' dtype, and where each index belongs in it."""
        owners = self.owners()
        place = torch.arange(len(owners), device=owners.device) - self.offsets[:-1][owners]
        longest = max(int(self.offsets.diff().max()), 1) if len(self.grad) else 1
        return self.indices.new_zeros(len(self.grad), longest), (owners, place)

    def padded(self) -> EmbeddingGradSample:
        """The same as rows of an embedding: [B, longest bag], zero gradient behind a bag's end."""
        indices, place = self.places()
        if self.padding_idx is not None:
            indices.fill_(self.padding_idx)
        owners = place[0]
        grad = self.grad[owners] * self._coefficients(owners)[:, None]
        indices[place] = self.indices
        padded = grad.new_zeros(*indices.shape, grad.shape[-1])
        padded[place] = grad
        return EmbeddingGradSample(indices, padded, self.padding_idx, self.sparse)
