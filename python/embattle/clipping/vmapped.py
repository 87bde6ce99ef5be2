"""Operators without a rule: torch.func.vmap over the samples, with per-sample copies of parameters.

Each sample's parameter is a row of the parameter spread over the batch, so that the per-sample
gradients of that parameter are in memory.
"""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from embattle.clipping.context import alike, tolerance
from embattle.clipping.derived import tensors
from embattle.clipping.expand import expand

if TYPE_CHECKING:
    from embattle.clipping.layers import Layer
    from embattle.clipping.operators import Operators

_log = logging.getLogger("embattle.clipping")


def vmapped(ops: Operators, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """func(*args, **kwargs), one sample at a time, compared with what it gives for the batch.

    Args:
        ops: where it happens.
        func: torch's function.
        args, kwargs: its arguments.

    Raises:
        RuntimeError: func cannot run under vmap.
        ValueError: the values differ from the batch's.
    """
    layer = ops.layer
    whole = func(*args, **kwargs)
    wanted = tensors(whole)
    if not any(t.requires_grad for t in wanted):
        layer.context.ran_without_grad |= not torch.is_grad_enabled()
        return whole
    name = f"{getattr(func, '__name__', func)}"
    leaves, spec = tree_flatten((args, kwargs))
    if any(out is leaf for out in wanted for leaf in leaves):
        raise RuntimeError(
            f"PerSampleClipper: layer '{layer.name}' changes a tensor in place by {name}, together "
            "with a trained parameter, for which there is no clipping rule; write it without _"
        )
    own = ops.sources(*leaves)
    trained = [leaf for leaf, source in zip(leaves, own, strict=True) if source is not None]
    _announce(layer, name, sum(p.numel() for p in trained))
    inputs = [t for t in tensors(leaves) if ops.source(t) is None and id(t) not in ops.constants]
    samples, spread = _samples(layer, inputs)
    rows, dims = [], []
    for leaf, source in zip(leaves, own, strict=True):
        row, dim = leaf, None
        if source is not None:
            row = expand(layer, leaf, source, (samples, *leaf.shape), 0 if spread else None)
            dim = 0
        elif not spread and any(leaf is t for t in inputs) and leaf.dim():
            place = min(layer.batch_dim, leaf.dim() - 1)
            dim = place if leaf.shape[place] == samples else None
        rows.append(row)
        dims.append(dim)
    places: list[int] = []

    def one(*row: Any) -> list[Tensor]:
        # Samples keep a batch dimension of size 1; parameters have none.
        unmapped = [
            x if dim is None or source is not None else x.unsqueeze(dim)
            for x, dim, source in zip(row, dims, own, strict=True)
        ]
        given, named = tree_unflatten(unmapped, spec)
        found = tensors(func(*given, **named))
        places[:] = [_place(layer, x, w, samples) for x, w in zip(found, wanted, strict=True)]
        return [x.squeeze(place) for x, place in zip(found, places, strict=True)]

    try:
        with warnings.catch_warnings():
            # Operators without a batching rule: the log line has said that this one is slow.
            warnings.filterwarnings("ignore", message="There is a performance drop")
            outs = torch.vmap(one, in_dims=tuple(dims), randomness="different")(*rows)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise RuntimeError(
            f"PerSampleClipper: layer '{layer.name}' ({type(layer.module).__name__}) has no "
            f"clipping rule for {name}, and cannot run it under torch.func.vmap either: {error}. "
            "Build it from known layers, or freeze its parameters"
        ) from error
    outs = [x.movedim(0, place) for x, place in zip(outs, places, strict=True)]
    if not all(alike(x, w.detach(), tolerance(w.dtype)) for x, w in zip(outs, wanted, strict=True)):
        raise ValueError(
            f"PerSampleClipper: in layer '{layer.name}' ({type(layer.module).__name__}) {name} "
            "gives other values for single samples than for the batch: it couples samples, one of "
            "its arguments has the number of samples as another size, or it is random. Build the "
            "layer from known ones, or freeze its parameters"
        )
    flat, out_spec = tree_flatten(whole)
    found = iter(outs)
    return tree_unflatten([next(found) if isinstance(x, Tensor) else x for x in flat], out_spec)


def _announce(layer: Layer, name: str, numbers: int) -> None:
    """Writes one log line of an operator, the first time."""
    if name not in layer.announced:
        layer.announced.add(name)
        _log.info(
            "layer '%s' (%s) has no clipping rule for %s: its per-sample gradients (%d numbers a "
            "sample) come from torch.func",
            layer.name,
            type(layer.module).__name__,
            name,
            numbers,
        )


def _samples(layer: Layer, inputs: list[Tensor]) -> tuple[int, bool]:
    """How many samples there are, and whether the inputs are the same for all of them."""
    inputs = [x for x in inputs if x.dim() > layer.batch_dim]
    sizes = [x.shape[layer.batch_dim] for x in inputs]
    known = layer.context.batch_size
    if known in sizes and not layer.broadcast:
        assert known is not None
        return known, False
    same = all(size == 1 for size in sizes) and not any(x.requires_grad for x in inputs)
    if known is not None and (same or layer.broadcast):
        layer.note_spread(*inputs)
        return known, True
    if sizes and not layer.broadcast:
        return sizes[0], False
    raise layer.unknown_size()


def _place(layer: Layer, x: Tensor, whole: Tensor, samples: int) -> int:
    """Which dim of size 1 of a single sample's result holds the samples in that of the batch."""
    own = layer.batch_dim
    for dim in sorted(range(x.dim()), key=lambda dim: dim != own):
        rest = x.shape[:dim] + x.shape[dim + 1 :]
        if (
            x.shape[dim] == 1
            and whole.dim() == x.dim()
            and whole.shape[dim] in (1, samples)
            and whole.shape[:dim] + whole.shape[dim + 1 :] == rest
        ):
            return dim
    raise ValueError(
        f"for one sample it returned a tensor of shape {tuple(x.shape)}, for the batch "
        f"{tuple(whole.shape)}"
    )
