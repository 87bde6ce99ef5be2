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
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from embattle import ops
from embattle.clipping.users import Users

# Largest temporary of an unfolded convolution input, in elements.
_CHUNK = 1 << 24


def scaled(x: Tensor, factor: Tensor) -> Tensor:
    """x [B, ...] times factor [B] (float32 or float64), in x's dtype."""
    found = x * factor.reshape(-1, *[1] * (x.dim() - 1))
    return found if found.dtype == x.dtype else found.to(x.dtype)


def squares(x: Tensor, dims: int) -> Tensor:
    """Sums of squares over all but the first dims, float64."""
    if x.dim() <= dims:
        return x.double().square()
    # Squares of float32 would vanish below 1e-23; the op's sums are in double.
    rows = x.reshape(x.shape[:dims].numel(), -1)
    return ops.group_norm(rows, norm="l2").double().square().reshape(x.shape[:dims])


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
            x = scaled(x, factor)
        else:
            grad = scaled(grad, factor)
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
            scaled(self.grad, factor).flatten(0, 1),
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
