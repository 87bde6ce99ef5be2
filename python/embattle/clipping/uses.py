"""What one backward pass leaves behind for each parameter, and what follows from it.

A *use* is one application of a parameter in the forward pass: what went in, and the gradient of the
losses with respect to what came out, both with the samples in front. From its uses follow a
parameter's per-sample gradient norms and its weighted gradient; the per-sample gradients themselves
are never formed, but for parameters as small as a bias (Bu et al., "Differentially private
optimization on large model at small cost", ICML 2023: book-keeping).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from embattle import ops
from embattle.clipping.units import Units
from embattle.ops.embedding import embedding_grad_rows

# Largest temporary of an unfolded convolution input, in elements.
_CHUNK = 1 << 24
# Elements of a sparse gradient from which on an optimiser gains more from distinct rows than it
# takes to sum the equal ones.
_COALESCED = 1 << 16


def _scaled(x: Tensor, factor: Tensor) -> Tensor:
    """x [B, ...] times factor [B] (float32 or float64), in x's dtype."""
    scaled = x * factor.reshape(-1, *[1] * (x.dim() - 1))
    return scaled if scaled.dtype == x.dtype else scaled.to(x.dtype)


def _tokens(x: Tensor) -> Tensor:
    """[n, M, groups, K, L] -> [n, groups, M L, K]."""
    return x.permute(0, 2, 1, 4, 3).flatten(2, 3)


@dataclass
class LinearUse:
    """``x @ weight[rows].T``, or ``x @ weight`` where transposed.

    Attributes:
        x: [B, T, I].
        grad: [B, T, O], in x's dtype.
        rows: the half-open range of the weight's rows in use; O of them.
        transposed: whether the weight is stored as [I, O]; then rows covers everything.
        bias: the use of the bias that was added in the same application, if any.
    """

    x: Tensor
    grad: Tensor
    rows: tuple[int, int]
    transposed: bool = False
    bias: DenseUse | None = None

    def norms(self, units: Units, *, bias: bool = False) -> Tensor:
        """[units] norms of the weight's gradient; with bias: of the weight's and the bias'."""
        if units.of_sample is None:
            return ops.linear_grad_norm(self.x, self.grad, bias=bias)
        return units.gather(
            lambda x, grad: ops.linear_grad_norm(x, grad, bias=bias), [self.x], [self.grad]
        )

    def weighted(self, factor: Tensor) -> Tensor:
        """sum_b factor_b g_b, [O, I] (or [I, O] where transposed)."""
        x, grad = self.x, self.grad
        if x.shape[-1] < grad.shape[-1]:
            x = _scaled(x, factor)
        else:
            grad = _scaled(grad, factor)
        x, grad = x.flatten(0, 1), grad.flatten(0, 1)
        return x.t() @ grad if self.transposed else grad.t() @ x

    def part(self, start: int, stop: int) -> LinearUse:
        """The use of the rows start to stop alone."""
        first = self.rows[0]
        return replace(self, grad=self.grad[..., start - first : stop - first], rows=(start, stop))

    def cleaned(self, bad: Tensor) -> LinearUse:
        """The same with the samples marked in bad [B] set to zero."""
        mask = bad.reshape(-1, 1, 1)
        return replace(self, x=self.x.masked_fill(mask, 0), grad=self.grad.masked_fill(mask, 0))

    def dense(self, shape: torch.Size) -> Tensor:
        """[B, *shape] per-sample gradients."""
        if self.transposed:
            return self.x.transpose(1, 2) @ self.grad
        whole = self.grad.new_zeros(len(self.x), *shape)
        whole[:, self.rows[0] : self.rows[1]] = self.grad.transpose(1, 2) @ self.x
        return whole


@dataclass
class RowUse:
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

    def norms(self, units: Units) -> Tensor:
        """[units] norms of the table's gradient; repeated indices are summed first."""
        return units.gather(
            lambda indices, grad: ops.embedding_grad_norm(
                indices, grad, padding_idx=self.padding_idx
            ),
            [self.indices],
            [self.grad],
        )

    def apart(self, units: Units) -> bool:
        """Whether no unit can have a row twice: the table's gradient is then `masked`'s rows."""
        return units.of_sample is None and self.indices.shape[1] == 1

    def masked(self) -> Tensor:
        """grad, zero at padding."""
        if self.padding_idx is None:
            return self.grad
        return self.grad.masked_fill((self.indices == self.padding_idx)[..., None], 0)

    def weighted(self, factor: Tensor | None, rows: int) -> Tensor:
        """sum_b factor_b g_b, [rows, D]; a sparse tensor where sparse, a large one coalesced.

        Without factors, the sum of g_b.
        """
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
            grad = self.grad if factor is None else _scaled(self.grad, factor)
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

    def cleaned(self, bad: Tensor) -> RowUse:
        """The same with the samples marked in bad [B] set to zero."""
        return replace(self, grad=self.grad.masked_fill(bad.reshape(-1, 1, 1), 0))

    def dense(self, shape: torch.Size) -> Tensor:
        """[B, *shape] per-sample gradients."""
        whole = self.grad.new_zeros(len(self.grad), *shape)
        kept = self.masked()
        return whole.scatter_add_(1, self.indices[..., None].expand_as(kept), kept)


@dataclass
class BagUse:
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

    def norms(self) -> Tensor:
        """[B] norms of the table's gradient."""
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

    def weighted(self, factor: Tensor, rows: int) -> Tensor:
        """sum_b factor_b g_b, as from RowUse."""
        owners = self.owners()
        scale = self._coefficients(owners) * factor.to(self.grad.dtype)[owners]
        grad = self.grad[owners] * scale[:, None]
        # One row for each of N samples, their factors in it.
        use = RowUse(self.indices[:, None], grad[:, None], self.padding_idx, self.sparse)
        return use.weighted(None, rows)

    def cleaned(self, bad: Tensor) -> BagUse:
        """The same with the samples marked in bad [B] set to zero."""
        return replace(self, grad=self.grad.masked_fill(bad[:, None], 0))

    def padded(self) -> RowUse:
        """The same as rows of an embedding: [B, longest bag], zero gradient behind a bag's end."""
        owners = self.owners()
        grad = self.grad[owners] * self._coefficients(owners)[:, None]
        place = torch.arange(len(owners), device=owners.device) - self.offsets[:-1][owners]
        longest = max(int(self.offsets.diff().max()), 1) if len(self.grad) else 1
        # Behind the end any row will do, the gradient there being zero.
        fill = 0 if self.padding_idx is None else self.padding_idx
        indices = self.indices.new_full((len(self.grad), longest), fill)
        indices[owners, place] = self.indices
        padded = grad.new_zeros(len(self.grad), longest, grad.shape[-1])
        padded[owners, place] = grad
        return RowUse(indices, padded, self.padding_idx, self.sparse)


@dataclass
class ConvUse:
    """A convolution over two spatial dimensions (one is a case of two).

    Attributes:
        x: [B, M, C, H, W], M images a sample, padded where the padding is not zeros.
        grad: [B, M, O, H', W'].
        kernel: the weight as [O, C / groups, h, w].
        shape: the weight's own shape.
        stride, padding, dilation: pairs.
        groups: as in torch.nn.Conv2d.
    """

    x: Tensor
    grad: Tensor
    kernel: Tensor
    shape: torch.Size
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    def _unfolded(self, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """The same convolution as linear layers, one per group, over M * L positions.

        Args:
            x: [n, M, C, H, W].
            grad: [n, M, O, H', W'].

        Returns:
            Inputs [n, groups, M L, K] and gradients of outputs [n, groups, M L, O / groups].
        """
        n, images = x.shape[:2]
        columns = F.unfold(
            x.flatten(0, 1), self.kernel.shape[2:], self.dilation, self.padding, self.stride
        )
        columns = columns.reshape(n, images, self.groups, -1, columns.shape[-1])
        grad = grad.reshape(n, images, self.groups, -1, columns.shape[-1])
        return _tokens(columns), _tokens(grad)

    def _norms(self, x: Tensor, grad: Tensor) -> Tensor:
        per_sample = math.prod(grad.shape[1:]) // max(grad.shape[2], 1)
        per_sample *= math.prod(self.kernel.shape[1:]) * self.groups
        step = max(1, _CHUNK // max(per_sample, 1))
        found = []
        for start in range(0, max(len(x), 1), step):
            columns, out = self._unfolded(x[start : start + step], grad[start : start + step])
            each = ops.linear_grad_norm(columns.flatten(0, 1), out.flatten(0, 1)).double()
            found.append(each.reshape(-1, self.groups).square().sum(1).sqrt())
        return torch.cat(found)

    def norms(self, units: Units) -> Tensor:
        """[units] norms of the weight's gradient."""
        return units.gather(self._norms, [self.x], [self.grad])

    def weighted(self, factor: Tensor) -> Tensor:
        """sum_b factor_b g_b, in the weight's shape."""
        grad: Tensor = torch.ops.aten.convolution_backward(
            _scaled(self.grad, factor).flatten(0, 1),
            self.x.flatten(0, 1),
            self.kernel,
            None,
            self.stride,
            self.padding,
            self.dilation,
            False,
            [0, 0],
            self.groups,
            [False, True, False],
        )[1]
        return grad.reshape(self.shape)

    def cleaned(self, bad: Tensor) -> ConvUse:
        """The same with the samples marked in bad [B] set to zero."""
        mask = bad.reshape(-1, 1, 1, 1, 1)
        return replace(self, x=self.x.masked_fill(mask, 0), grad=self.grad.masked_fill(mask, 0))

    def dense(self, shape: torch.Size) -> Tensor:
        """[B, *shape] per-sample gradients."""
        columns, out = self._unfolded(self.x, self.grad)
        return (out.transpose(2, 3) @ columns).reshape(len(self.x), *shape)


@dataclass
class DenseUse:
    """Per-sample gradients as they are: biases, norms, small parameters.

    Attributes:
        grad: [B, *parameter's shape].
    """

    grad: Tensor

    def weighted(self, factor: Tensor) -> Tensor:
        """sum_b factor_b g_b."""
        grad = self.grad
        factor = factor.to(grad.dtype)
        if grad.dim() == 2:
            return torch.mv(grad.t(), factor)
        return torch.mv(grad.reshape(len(grad), -1).t(), factor).reshape(grad.shape[1:])

    def cleaned(self, bad: Tensor) -> DenseUse:
        """The same with the samples marked in bad [B] set to zero."""
        return DenseUse(self.grad.masked_fill(bad.reshape(-1, *[1] * (self.grad.dim() - 1)), 0))

    def dense(self, shape: torch.Size) -> Tensor:
        """[B, *shape] per-sample gradients."""
        return self.grad.reshape(len(self.grad), *shape)
