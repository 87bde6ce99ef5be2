"""Embedding tables: the cost follows the batch, never the number of rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from embattle.clipping.context import Layout
from embattle.clipping.derived import Source, put
from embattle.clipping.graph import Add, Record, note
from embattle.clipping.operators import Operators, rule
from embattle.clipping.table_grad_sample import BagGradSample, EmbeddingGradSample

if TYPE_CHECKING:
    from embattle.clipping.layers import Layer


def _refuse_frequency_scaling(layer: Layer, scaled: bool) -> None:
    if scaled:
        raise ValueError(
            f"PerSampleClipper: layer '{layer.name}' has scale_grad_by_freq=True, which makes the "
            "gradient of a sample depend on the rest of the batch; set it to False"
        )


class _LookUp(Record):
    __slots__ = ("padding_idx", "source", "sparse")

    source: Source
    padding_idx: int | None
    sparse: bool

    def sample_dims(self, dims: int) -> Sequence[int]:
        return range(dims - 1)

    def deliver(self, add: Add, grad: Tensor, layout: Layout, samples: int) -> None:
        ids = layout.tokens(self.checked_input(), samples, 0)
        rows = layout.tokens(grad, samples, 1)
        put(add, self.source, EmbeddingGradSample(ids, rows, self.padding_idx, self.sparse))


def look_up(
    layer: Layer,
    indices: Tensor,
    weight: Tensor,
    source: Source,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """F.embedding with a table whose gradient is clipped."""
    if source is not None:
        _refuse_frequency_scaling(layer, scale_grad_by_freq)
    if padding_idx is not None and padding_idx < 0:
        padding_idx += len(weight)
    if max_norm is None:
        place = -1 if padding_idx is None else padding_idx
        out = torch.embedding(weight, indices, place, scale_grad_by_freq, sparse)
    else:
        out = F.embedding(
            indices, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse
        )
    if source is not None:
        record = _LookUp(layer, indices)
        record.source, record.padding_idx, record.sparse = source, padding_idx, sparse
        note(out, record)
    return out


@rule(F.embedding)
def _(ops: Operators, input: Tensor, weight: Tensor, *args: Any, **options: Any) -> Any:
    return look_up(
        ops.layer, ops.layer.spread(input, 0), weight, ops.source(weight), *args, **options
    )


class _BagLookUp(Record):
    __slots__ = ("ends", "mode", "padding_idx", "source", "sparse", "weights")

    source: Source
    ends: Tensor
    mode: Literal["sum", "mean"]
    weights: Tensor | None
    padding_idx: int | None
    sparse: bool

    @property
    def size(self) -> object:
        """The number of bags, whatever is in them."""
        return self.ends.shape

    def sample_dims(self, dims: int) -> Sequence[int]:
        return [0]

    def deliver(self, add: Add, grad: Tensor, layout: Layout, samples: int) -> None:
        weights = None if self.weights is None else self.weights.detach()
        bag = BagGradSample(
            self.checked_input(), self.ends, grad, self.mode, weights, self.padding_idx, self.sparse
        )
        if len(grad) == samples:
            put(add, self.source, bag)
            return
        rows = bag.padded()  # several bags a sample
        ids = layout.tokens(rows.indices, samples, 0)
        values = layout.tokens(rows.grad, samples, 1)
        put(add, self.source, EmbeddingGradSample(ids, values, rows.padding_idx, rows.sparse))


@rule(F.embedding_bag)
def _(
    ops: Operators,
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Any:
    layer, source = ops.layer, ops.source(weight)
    if source is None:
        return NotImplemented
    _refuse_frequency_scaling(layer, scale_grad_by_freq)
    if padding_idx is not None and padding_idx < 0:
        padding_idx += len(weight)
    if input.dim() == 2:
        if offsets is not None:
            raise ValueError(
                f"PerSampleClipper: layer '{layer.name}' got 2-D indices of shape "
                f"{tuple(input.shape)} with offsets; offsets belong to 1-D indices"
            )
        input = layer.spread(input, 0)
        bags, length = input.shape
        ends = torch.arange(bags + 1, device=input.device) * length
        input = input.flatten()
        if per_sample_weights is not None:
            per_sample_weights = per_sample_weights.expand(bags, length).flatten()
    elif offsets is None:
        raise ValueError(f"PerSampleClipper: layer '{layer.name}' got 1-D indices without offsets")
    elif include_last_offset:
        ends = offsets.long()
        left = len(input) - int(ends[-1])
        if left:
            # The last bag's, as torch has it where it is of one mind.
            if mode != "max" and weight.dtype != torch.float64:
                raise ValueError(
                    f"PerSampleClipper: layer '{layer.name}' got {len(input)} indices, of which "
                    f"its last offset leaves out {left}. In {weight.dtype} torch's forward and "
                    "backward disagree on which bag they belong to; leave them out of the indices"
                )
            ends = torch.cat([ends[:-1], ends.new_full((1,), len(input))])
    else:
        ends = torch.cat([offsets.long(), offsets.new_full((1,), len(input)).long()])
    if mode == "max":
        bounded = (max_norm, norm_type)
        return _largest(layer, input, ends, weight, source, padding_idx, bounded, sparse)
    out = F.embedding_bag(
        input,
        weight,
        ends.to(input.dtype),
        max_norm,
        norm_type,
        False,
        mode,
        sparse,
        per_sample_weights,
        True,
        padding_idx,
    )
    record = _BagLookUp(layer, input, per_sample_weights)
    record.source, record.ends, record.weights = source, ends, per_sample_weights
    record.mode = "sum" if mode == "sum" else "mean"
    record.padding_idx, record.sparse = padding_idx, sparse
    note(out, record)
    return out


def _largest(
    layer: Layer,
    indices: Tensor,
    ends: Tensor,
    weight: Tensor,
    source: Source,
    padding_idx: int | None,
    bounded: tuple[float | None, float],
    sparse: bool,
) -> Tensor:
    """The largest of each coordinate in each bag, from looked-up rows."""
    empty = weight.detach().new_zeros(len(ends) - 1, 1)
    bag = BagGradSample(indices, ends, empty, "sum", None, padding_idx, sparse)
    padded, place = bag.places()
    padded[place] = indices
    absent = torch.ones_like(padded, dtype=torch.bool)
    absent[place] = False
    if padding_idx is not None:
        absent |= padded == padding_idx
    rows = look_up(layer, padded, weight, source, padding_idx, *bounded, False, sparse)
    rows = rows.masked_fill(absent[..., None], -torch.inf)
    return rows.max(1).values.masked_fill(absent.all(1)[:, None], 0)
