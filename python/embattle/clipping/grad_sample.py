"""Per-sample gradients of one application of a parameter, in the form that its layer gives them.

That is what went in and the gradient of the losses with respect to what came out, both with the
samples in front. Norms of per-sample gradients and their weighted sum follow from these; the
per-sample gradients themselves are never formed, but for parameters as small as a bias (Bu et al.,
"Differentially private optimization on large model at small cost", ICML 2023: book-keeping).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from embattle import ops
from embattle.clipping.users import Users
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


def squares(x: Tensor, dims: int) -> Tensor:
    """Sums of squares over all but the first dims, float64."""
    if x.dim() <= dims:
        return x.double().square()
    norms: Tensor = torch.linalg.vector_norm(x, dim=tuple(range(dims, x.dim())))
    return norms.double().square()


def dense_norms(grads: Sequence[Tensor], users: Users) -> Tensor:
    """[U] norms over all the per-sample gradients [B, ...] together."""
    if users.of_sample is None:
        return ops.per_sample_norm(grads)

    def norms(*members: Tensor) -> Tensor:
        return ops.per_sample_norm([grad.sum(1) for grad in members])

    return users.gather(norms, [], [grad.unsqueeze(-1).flatten(1)[:, None] for grad in grads])


@dataclass
class GradSample:
    """The per-sample gradients of one application of a parameter.

    Attributes:
        batched: the fields that hold a row for each sample.
        passing: the fields that the same of other samples does without.
    """

    batched: ClassVar[tuple[str, ...]] = ("x", "grad")
    passing: ClassVar[tuple[str, ...]] = ()

    def norms(self, users: Users) -> Tensor:
        """[U] norms of the parameter's gradient."""
        raise NotImplementedError

    def weighted(self, factor: Tensor, shape: torch.Size) -> Tensor:
        """sum_b factor_b g_b, given the parameter's shape and [B] factors."""
        raise NotImplementedError

    def squared_size(self) -> Tensor:
        """[B] sums of the squared norms of what is summed to get a sample's gradient."""
        raise NotImplementedError

    def dense(self, shape: torch.Size) -> Tensor:
        """[B, *shape] per-sample gradients."""
        raise NotImplementedError

    def kind(self) -> Hashable:
        """Equal for uses that `joined` can make one."""
        return id(self)

    def _changed(self, change: Callable[[str], Tensor]) -> GradSample:
        fields = {name: change(name) for name in self.batched}
        return replace(self, **fields, **dict.fromkeys(self.passing))

    def joined(self, others: Sequence[GradSample]) -> GradSample:
        """This use and others of its kind as one, with more tokens."""
        every = (self, *others)
        return self._changed(lambda name: torch.cat([getattr(each, name) for each in every], 1))

    def cleaned(self, bad: Tensor) -> GradSample:
        """The same with the samples marked in bad [B] set to zero."""

        def change(name: str) -> Tensor:
            x: Tensor = getattr(self, name)
            if not x.is_floating_point():
                return x
            return x.masked_fill(bad.reshape(-1, *[1] * (x.dim() - 1)), 0)

        return self._changed(change)

    def select(self, rows: Tensor) -> GradSample:
        """The same of some samples alone."""
        return self._changed(lambda name: getattr(self, name)[rows])


@dataclass
class LinearGradSample(GradSample):
    """``x @ weight[rows].T``; ``grad @ weight`` where a weight is stored as [in, out].

    Attributes:
        x: [B, T, I].
        grad: [B, T, O], in x's dtype.
        rows: the half-open range of the weight's rows in use; O of them.
        bias: the use of the bias that was added in the same application, if any.
    """

    x: Tensor
    grad: Tensor
    rows: tuple[int, int]
    bias: DenseGradSample | None = None
    passing = ("bias",)

    def kind(self) -> Hashable:
        return LinearGradSample, self.rows

    def norms(self, users: Users, *, bias: bool = False) -> Tensor:
        """As any; with bias: of the weight's and the bias' gradient together."""
        return users.gather(partial(ops.linear_grad_norm, bias=bias), [self.x], [self.grad])

    def weighted(self, factor: Tensor, shape: torch.Size) -> Tensor:
        """As any, but [O, I]: of the rows in use alone."""
        x, grad = self.x, self.grad
        if x.shape[-1] < grad.shape[-1]:
            x = _scaled(x, factor)
        else:
            grad = _scaled(grad, factor)
        x, grad = x.flatten(0, 1), grad.flatten(0, 1)
        return grad.t() @ x

    def part(self, start: int, stop: int) -> LinearGradSample:
        """The use of the rows start to stop alone."""
        first = self.rows[0]
        return replace(self, grad=self.grad[..., start - first : stop - first], rows=(start, stop))

    def squared_size(self) -> Tensor:
        return (squares(self.x, 2) * squares(self.grad, 2)).sum(1)

    def dense(self, shape: torch.Size) -> Tensor:
        whole = self.grad.new_zeros(len(self.x), *shape)
        whole[:, self.rows[0] : self.rows[1]] = self.grad.transpose(1, 2) @ self.x
        return whole


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


@dataclass
class ConvGradSample(GradSample):
    """A convolution over one, two or three spatial dimensions.

    A transposed convolution is one too, with its output's gradient as x and its input as grad.

    Attributes:
        x: [B, M, C, *size], M images a sample.
        grad: [B, M, O, *size'].
        shape: the weight's, [O, C / groups, *kernel].
        stride, padding, dilation: a number for each spatial dimension.
        groups: as in torch.nn.Conv2d.
    """

    x: Tensor
    grad: Tensor
    shape: torch.Size
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def kind(self) -> Hashable:
        sizes = (self.x.shape[2:], self.grad.shape[2:])
        options = (self.stride, self.padding, self.dilation, self.groups)
        return (ConvGradSample, *sizes, *options)

    def _columns(self, x: Tensor) -> Tensor:
        """x [N, C, *size] -> [N, C * kernel, *size'] flat over size'."""
        kernel, spatial = tuple(self.shape[2:]), tuple(self.grad.shape[3:])
        # Views and one copy; F.unfold takes three times as long.
        x = F.pad(x, [p for p in reversed(self.padding) for _ in range(2)])
        sizes = zip(kernel, self.stride, self.dilation, spatial, strict=True)
        for dim, (size, step, gap, length) in enumerate(sizes, start=2):
            x = x.unfold(dim, (size - 1) * gap + 1, step)[..., ::gap].narrow(dim, 0, length)
        n, dims = len(kernel), x.dim()
        x = x.permute(0, 1, *range(2 + n, dims), *range(2, 2 + n))
        return x.reshape(x.shape[0], x.shape[1] * math.prod(kernel), math.prod(spatial))

    def _unfolded(self, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """The same convolution as linear layers, one per group, over M * L positions.

        Args:
            x: [n, M, C, *size].
            grad: [n, M, O, *size'].

        Returns:
            Inputs [n, groups, M L, K] and gradients of outputs [n, groups, M L, O / groups].
        """
        n, images = x.shape[:2]
        columns = self._columns(x.flatten(0, 1))
        places = columns.shape[-1]
        inner = columns.shape[1] // self.groups
        columns = columns.reshape(n, images, self.groups, inner, places)
        grad = grad.reshape(n, images, self.groups, grad.shape[2] // self.groups, places)
        columns, grad = (t.permute(0, 2, 1, 4, 3).flatten(2, 3) for t in (columns, grad))
        return columns, grad

    def _norms(self, x: Tensor, grad: Tensor) -> Tensor:
        per_sample = math.prod(grad.shape[1:]) // max(grad.shape[2], 1)
        per_sample *= math.prod(self.shape[1:]) * self.groups
        step = max(1, _CHUNK // max(per_sample, 1))
        found = []
        for start in range(0, max(len(x), 1), step):
            columns, out = self._unfolded(x[start : start + step], grad[start : start + step])
            each = ops.linear_grad_norm(columns.flatten(0, 1), out.flatten(0, 1)).double()
            found.append(each.reshape(-1, self.groups).square().sum(1).sqrt())
        return torch.cat(found)

    def norms(self, users: Users) -> Tensor:
        return users.gather(self._norms, [self.x], [self.grad])

    def weighted(self, factor: Tensor, shape: torch.Size) -> Tensor:
        found: Tensor = torch.ops.aten.convolution_backward(
            _scaled(self.grad, factor).flatten(0, 1),
            self.x.flatten(0, 1),
            self.x.new_empty(self.shape),
            None,
            self.stride,
            self.padding,
            self.dilation,
            False,
            [0] * len(self.stride),
            self.groups,
            [False, True, False],
        )[1]
        return found

    def squared_size(self) -> Tensor:
        """[B] about the sums of the squared norms of what is summed over positions."""
        places = math.prod(self.grad.shape[3:])
        return squares(self.x, 1) * squares(self.grad, 1) / math.sqrt(max(places, 1))

    def dense(self, shape: torch.Size) -> Tensor:
        columns, out = self._unfolded(self.x, self.grad)
        return (out.transpose(2, 3) @ columns).reshape(len(self.x), *shape)


@dataclass
class DenseGradSample(GradSample):
    """Per-sample gradients as they are: biases, norms, small parameters.

    Attributes:
        grad: [B, *parameter's shape].
        terms: [B, ...] what was summed to get them, or [B] its squared norms, if anything was.
    """

    grad: Tensor
    terms: Tensor | None = None
    batched = ("grad",)
    passing = ("terms",)

    def norms(self, users: Users) -> Tensor:
        return dense_norms([self.grad], users)

    def weighted(self, factor: Tensor, shape: torch.Size) -> Tensor:
        grad = self.grad
        factor = factor.to(grad.dtype)
        if grad.dim() == 2:
            return torch.mv(grad.t(), factor)
        return torch.mv(grad.unsqueeze(-1).flatten(1).t(), factor).reshape(grad.shape[1:])

    def squared_size(self) -> Tensor:
        found = squares(self.grad, 1)
        if self.terms is None:
            return found
        terms = self.terms if self.terms.dim() == 1 else squares(self.terms, 1)
        return torch.maximum(found, terms)

    def dense(self, shape: torch.Size) -> Tensor:
        return self.grad.reshape(len(self.grad), *shape)
