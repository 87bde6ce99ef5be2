"""From per-sample gradients of all parameters to their norms, and to the weighted gradients."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from embattle import ops
from embattle.clipping.grad_sample import DenseGradSample, GradSample, LinearGradSample, dense_norms
from embattle.clipping.table_grad_sample import BagGradSample, EmbeddingGradSample
from embattle.clipping.tables import JointTable, join_tables
from embattle.clipping.users import Users

Named = Sequence[tuple[str, Parameter]]


def merge(found: Sequence[GradSample], shape: torch.Size) -> list[GradSample]:
    """Merges the grad samples of one parameter that can be treated as one, exactly.

    Linear layers on the same rows become one with more tokens, embeddings one with more indices,
    convolutions alike one with more images; whatever else meets becomes dense. Overlapping ranges
    of rows are cut so that any two are equal or disjoint.
    """
    if len(found) == 1:
        return list(found)
    kinds: dict[Hashable, list[GradSample]] = {}
    for each in _cut([use.padded() if isinstance(use, BagGradSample) else use for use in found]):
        kinds.setdefault(each.kind(), []).append(each)
    merged = [same[0].joined(same[1:]) if len(same) > 1 else same[0] for same in kinds.values()]
    linear = [each for each in merged if isinstance(each, LinearGradSample)]
    if len(merged) == 1 or len(merged) == len(linear):
        return merged
    tables = [each for each in merged if isinstance(each, EmbeddingGradSample)]
    if len(merged) == 2 and linear and tables and linear[0].rows == (0, shape[0]):
        return [linear[0], tables[0]]
    squared = torch.stack([each.squared_size() for each in merged]).sum(0)
    total = merged[0].dense(shape)
    for each in merged[1:]:
        total = total + each.dense(shape)
    return [DenseGradSample(total, squared)]


def _cut(found: Sequence[GradSample]) -> Iterator[GradSample]:
    """The same with linear layers cut at the ends of others' rows."""
    cuts = sorted({e for each in found if isinstance(each, LinearGradSample) for e in each.rows})
    for each in found:
        if not isinstance(each, LinearGradSample):
            yield each
            continue
        inner = [edge for edge in cuts if each.rows[0] <= edge <= each.rows[1]]
        for rows in itertools.pairwise(inner):
            yield each if rows == each.rows else each.part(*rows)


def _cross(x: Tensor, indices: Tensor, grad: Tensor, rows: Tensor) -> Tensor:
    """[n] inner products of the gradients of a table's two uses, as a layer and as an embedding.

    <sum_s G_s x_s^T, sum_t e(i_t) r_t^T> = sum_{s,t} G_s[i_t] <x_s, r_t>.
    """
    picked = grad.gather(2, indices[:, None].long().expand(-1, grad.shape[1], -1))
    return (picked.double() * (x.double() @ rows.double().transpose(1, 2))).sum((1, 2))


def _tied_norms(linear: LinearGradSample, row: EmbeddingGradSample, users: Users) -> Tensor:
    rows = row.masked()

    def norms(x: Tensor, indices: Tensor, grad: Tensor, rows: Tensor) -> Tensor:
        layer = ops.linear_grad_norm(x, grad).double()
        table = ops.embedding_grad_norm(indices, rows).double()
        square = layer.square() + table.square() + 2 * _cross(x, indices, grad, rows)
        # clamp keeps a NaN
        return square.clamp(min=0).sqrt()

    return users.gather(norms, [linear.x, row.indices], [linear.grad, rows])


def _joint_norms(parts: Sequence[Tensor]) -> Tensor:
    """[U] norms, float64, of gradients that consist of parts.

    Args:
        parts: [U] norms of some; gradients [U, ...] themselves. Their squares add up.
    """
    return ops.per_sample_norm(parts).double()


def parameter_norms(found: list[GradSample], users: Users) -> Tensor:
    """[U] norms of one parameter's gradient, float32 or float64.

    Args:
        found: what `merge` left.
        users: the samples' users.
    """
    first = found[0]
    if len(found) == 1:
        return first.norms(users)
    if isinstance(first, LinearGradSample) and isinstance(found[1], EmbeddingGradSample):
        return _tied_norms(first, found[1], users)
    return _joint_norms([each.norms(users) for each in found])


class Gradients:
    """The per-sample gradients of all parameters.

    Attributes:
        named: the trained parameters, in the model's order.
        of: parameter -> what `merge` left of its grad samples; without the tables in joint.
        joint: small tables, worked on as one.
        users: the samples' users.
    """

    def __init__(
        self, named: Named, found: dict[Parameter, list[GradSample]], users: Users
    ) -> None:
        """Takes over what a backward pass found.

        Args:
            named: the trained parameters.
            found: their grad samples; emptied, so that memory goes when it can.
            users: the samples' users.
        """
        self.named = named
        self.users = users
        self.of: dict[Parameter, list[GradSample]] = {}
        for _, p in named:
            own = found.pop(p, None)
            if own is not None:
                self.of[p] = merge(own, p.shape)
        self.joint: list[JointTable] = []

    def norms(self, device: torch.device, *, apart: bool) -> Tensor:
        """[U] norms of the whole gradient, float64; where apart, [U, parameters] of each."""
        if apart:
            return self._parameters_norms(device)
        self.joint = join_tables(self.of)
        users, of = self.users, self.of
        # The norm of a bias that is used nowhere else comes with its weight's, from the same read.
        alone = {id(found[0]) for found in of.values() if len(found) == 1}
        joined = {
            id(found[0].bias)
            for found in of.values()
            if len(found) == 1
            and isinstance(found[0], LinearGradSample)
            and id(found[0].bias) in alone
        }
        small = [table.grad for table in self.joint if table.apart(users)]
        parts = [table.norms(users) for table in self.joint if not table.apart(users)]
        for found in of.values():
            first = found[0]
            if id(first) in joined:
                continue
            if len(found) == 1 and isinstance(first, LinearGradSample):
                parts.append(first.norms(users, bias=id(first.bias) in joined))
            elif isinstance(first, DenseGradSample):
                small.append(first.grad)
            elif len(found) == 1 and isinstance(first, EmbeddingGradSample) and first.apart(users):
                small.append(first.masked())
            else:
                parts.append(parameter_norms(found, users))
        if small and users.of_sample is not None:
            parts.append(dense_norms(small, users))
        elif small:
            parts += small
        if not parts:
            return torch.zeros(users.count, dtype=torch.float64, device=device)
        return _joint_norms(parts)

    def _parameters_norms(self, device: torch.device) -> Tensor:
        zeros = torch.zeros(self.users.count, dtype=torch.float64, device=device)
        columns = [
            parameter_norms(self.of[p], self.users).double() if p in self.of else zeros
            for _, p in self.named
        ]
        return torch.stack(columns, 1)

    def clean(self, norms: Tensor) -> None:
        """Sets what samples left to zero where a norm is not finite: times zero it would be NaN.

        So it may be of a user's sample of weight zero, of which the user's norm says nothing.

        Args:
            norms: [U], or [U, parameters].
        """
        bad = ~norms.isfinite()
        of_sample = self.users.of_sample
        if of_sample is not None:
            bad = bad[of_sample]
        left_out = self.users.left_out
        if left_out is not None:
            bad = bad | (left_out if bad.dim() == 1 else left_out[:, None])
        for column, (_, p) in enumerate(self.named):
            if p in self.of:
                marked = bad if bad.dim() == 1 else bad[:, column]
                self.of[p] = [each.cleaned(marked) for each in self.of[p]]
        self.joint = [table.cleaned(bad) for table in self.joint]

    def weighted(
        self, factors: Tensor, weights: Tensor | None, scale: float
    ) -> dict[Parameter, Tensor]:
        """The gradients, sum_b w_b factor_b g_b times scale; nothing is left of the samples'.

        Args:
            factors: [U], or [U, parameters].
            weights: [B] of the samples, or None.
            scale: of the result.
        """

        def final(factor: Tensor, dtype: torch.dtype) -> Tensor:
            own = self.users.sample_factors(factor) * scale
            if weights is None and self.users.weights is None:
                return own.to(dtype)
            own = own if weights is None else own * weights
            # Of a sample that adds nothing a weight may be infinite or NaN.
            return own.where(self.users.each(factor) != 0, 0.0).to(dtype)

        if factors.dim() == 2:
            columns = {p: column for column, (_, p) in enumerate(self.named)}

            def of(p: Parameter) -> Tensor:
                return final(factors[:, columns[p]], _summed_in(p))

        else:
            shared: dict[torch.dtype, Tensor] = {}

            def of(p: Parameter) -> Tensor:
                dtype = _summed_in(p)
                if dtype not in shared:
                    shared[dtype] = final(factors, dtype)
                return shared[dtype]

        # Tables come last: what the other layers hold is gone then.
        found = _weighted_gradients(self.of, of)
        while self.joint:
            table = self.joint.pop()
            found.update(table.weighted(of(table.members[0])))
        return found


def _summed_in(parameter: Parameter) -> torch.dtype:
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def _order(item: tuple[Parameter, Sequence[GradSample]]) -> tuple[bool, int]:
    """Sorts parameters so that the peak of memory stays low when grad samples go as sums come.

    First those that give back more than their gradient takes, the least need first; then the
    others, the largest growth first.
    """
    parameter, found = item
    own = parameter.numel()
    growth, copied = own, 0  # a scaled copy of the smaller tensor stands beside the gradient
    for each in found:
        held = [getattr(each, name) for name in each.batched]
        sizes = [t.numel() for t in held if t.is_floating_point()]
        growth -= sum(sizes)
        copied = max(copied, min(sizes))
    return (growth > 0, growth - own - copied if growth > 0 else own + copied)


def _weighted_gradients(
    of: dict[Parameter, list[GradSample]], factor_of: Callable[[Parameter], Tensor]
) -> dict[Parameter, Tensor]:
    """sum_b factor_b g_b of all parameters; empties `of` as it goes."""
    items = sorted(of.items(), key=_order)
    of.clear()
    items.reverse()
    found = {}
    while items:
        p, own = items.pop()
        found[p] = weighted_gradient(own, factor_of(p), p)
    return found


def weighted_gradient(found: list[GradSample], factor: Tensor, parameter: Tensor) -> Tensor:
    """sum_b factor_b g_b in the parameter's shape and dtype; sparse if every use wants rows.

    Args:
        found: what `merge` left.
        factor: [B] factors of the samples.
        parameter: the parameter, for its shape and dtype.
    """
    total: Tensor | None = None
    for each in found:
        part = each.weighted(factor, parameter.shape)
        if part.dtype != parameter.dtype:
            part = part.to(parameter.dtype)
        if isinstance(each, LinearGradSample) and part.shape[0] != parameter.shape[0]:
            whole = torch.zeros_like(parameter) if total is None else total
            whole[each.rows[0] : each.rows[1]] += part
            total = whole
        elif total is None:
            total = part
        else:
            total = part + total if part.layout == torch.strided else total + part
    assert total is not None
    return total
