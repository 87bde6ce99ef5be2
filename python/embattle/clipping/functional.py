"""Modules that use parameters in ways without a rule: torch.func on such a module alone."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from embattle.clipping.context import tolerance
from embattle.clipping.operators import expand

if TYPE_CHECKING:
    from embattle.clipping.layers import Layer

_log = logging.getLogger("embattle.clipping")
_DROPOUTS = {
    getattr(place, name)
    for place, names in (
        (F, ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout")),
        (F, ("feature_alpha_dropout",)),
        (torch, ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")),
    )
    for name in names
}


@contextmanager
def _swapped(module: nn.Module, values: dict[Parameter, Tensor]) -> Iterator[None]:
    """module with other tensors in place of its parameters."""
    kept = []
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter in values:
                kept.append((part._parameters, name, parameter))
    try:
        for held, name, parameter in kept:
            held[name] = values[parameter]  # type: ignore[assignment]
        yield
    finally:
        for held, name, parameter in kept:
            held[name] = parameter


class _Functions(TorchFunctionMode):
    """Embeddings keep their padding row without gradient; under vmap torch forgets about it.

    With `still`, nothing is dropped.
    """

    def __init__(self, still: bool) -> None:
        super().__init__()
        self.still = still

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if self.still:
            if func in _DROPOUTS:
                return args[0] if args else kwargs["input"]
            if func is F.scaled_dot_product_attention:
                kwargs["dropout_p"] = 0.0
                return func(*args[:4], **kwargs)
        return _embedding(*args, **kwargs) if func is F.embedding else func(*args, **kwargs)


def _embedding(
    input: Tensor, weight: Tensor, padding_idx: int | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    """As F.embedding."""
    rows = F.embedding(input, weight, None, *args, **kwargs)
    if padding_idx is None:
        return rows
    place = padding_idx if padding_idx >= 0 else len(weight) + padding_idx
    return torch.where((input == place).unsqueeze(-1), rows.detach(), rows)


class Functional:
    """Runs a module under torch.func.vmap over the samples.

    The module sees one sample at a time (with a batch dimension of size 1). Its per-sample
    gradients are held in memory.
    """

    def __init__(self, layer: Layer, why: str) -> None:
        """For a layer, because of `why`: what its module does that has no rule."""
        self.layer = layer
        self.module: nn.Module = layer.module
        self.why = why
        self._compared: set[object] = set()
        _log.info(
            "layer '%s' (%s) has no clipping rule for %s: its per-sample gradients (%d numbers a "
            "sample) come from torch.func",
            layer.name,
            type(self.module).__name__,
            why,
            sum(p.numel() for p in self.module.parameters() if p.requires_grad),
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward."""
        layer, context = self.layer, self.layer.context
        if not torch.is_grad_enabled():
            context.ran_without_grad = True
        trained = [p for p in self.module.parameters() if p in context.names]
        leaves, spec = tree_flatten((args, kwargs))
        samples, spread = self._samples(leaves)
        values = [expand(layer, p, p, (samples, *p.shape), 0 if spread else None) for p in trained]
        outs, out_spec = self._mapped(leaves, spec, samples, trained, values, still=False)
        sizes = tuple(leaf.shape for leaf in leaves if isinstance(leaf, Tensor))
        key = (sizes, self.module.training)
        if context.compare or key not in self._compared:
            self._compare(outs, leaves, spec, samples, trained, values)
            self._compared.add(key)
        return tree_unflatten(outs, out_spec)

    def _mapped(
        self,
        leaves: list[Any],
        spec: Any,
        samples: int,
        trained: list[Parameter],
        values: list[Tensor],
        *,
        still: bool,
    ) -> tuple[list[Any], Any]:
        dims = [self._dim(leaf, samples) for leaf in leaves]
        form: list[Any] = []

        def one(inputs: list[Any], own: list[Tensor]) -> list[Tensor]:
            inputs = [
                x if dim is None else x.unsqueeze(dim) for x, dim in zip(inputs, dims, strict=True)
            ]
            args, kwargs = tree_unflatten(inputs, spec)
            with _swapped(self.module, dict(zip(trained, own, strict=True))), _Functions(still):
                out = self.layer.original(*args, **kwargs)
            outs, out_spec = tree_flatten(out)
            form[:] = [out_spec, [None if isinstance(x, Tensor) else x for x in outs]]
            return [self._without_batch(x) for x in outs if isinstance(x, Tensor)]

        context = self.layer.context
        context.inside_vmap += 1
        try:
            with warnings.catch_warnings():
                # Operators without a batching rule: the log line has said that this layer is slow.
                warnings.filterwarnings("ignore", message="There is a performance drop")
                mapped = torch.vmap(one, in_dims=(dims, 0), randomness="different")(leaves, values)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise RuntimeError(
                f"PerSampleClipper: layer '{self.layer.name}' ({type(self.module).__name__}) has "
                f"no clipping rule for {self.why}, and cannot run under torch.func.vmap either: "
                f"{error}. Build it from known layers, or freeze its parameters"
            ) from error
        finally:
            context.inside_vmap -= 1
        out_spec, fixed = form
        found = iter(mapped)
        outs = []
        for other in fixed:
            x = other if other is not None else next(found)
            outs.append(x if other is not None else x.movedim(0, self._place(x)))
        return outs, out_spec

    def _compare(
        self,
        outs: list[Any],
        leaves: list[Any],
        spec: Any,
        samples: int,
        trained: list[Parameter],
        values: list[Tensor],
    ) -> None:
        """Whether one sample at a time gives what the module gives for the batch.

        Without dropout in either; other randomness makes the two differ.
        """
        context = self.layer.context
        args, kwargs = tree_unflatten(leaves, spec)
        context.inside_vmap += 1
        try:
            with torch.no_grad():
                if any(
                    isinstance(m, nn.modules.dropout._DropoutNd) or getattr(m, "dropout", 0)
                    for m in self.module.modules()
                ):
                    outs, _ = self._mapped(leaves, spec, samples, trained, values, still=True)
                with _Functions(still=True):
                    whole = tree_flatten(self.layer.original(*args, **kwargs))[0]
        finally:
            context.inside_vmap -= 1
        for found, wanted in zip(outs, whole, strict=True):
            if not isinstance(wanted, Tensor):
                continue
            same = found.shape == wanted.shape
            if not same and found.dim() == wanted.dim():
                same = wanted.shape[self._place(wanted)] == 1
            if not same or not _alike(found, wanted):
                raise ValueError(
                    f"PerSampleClipper: layer '{self.layer.name}' ({type(self.module).__name__}) "
                    "gives other values for single samples than for the batch: it couples samples, "
                    "one of its arguments has the number of samples as another size, or it is "
                    "random other than by dropout. Build it from known layers, so that it needs no "
                    "torch.func, or freeze its parameters"
                )

    def _place(self, x: Tensor) -> int:
        return min(self.layer.batch_dim, max(x.dim() - 1, 0))

    def _without_batch(self, x: Tensor) -> Tensor:
        dim = self._place(x)
        if x.dim() == 0 or x.shape[dim] != 1:
            raise ValueError(f"for one sample it returned a tensor of shape {tuple(x.shape)}")
        return x.squeeze(dim)

    def _samples(self, leaves: list[Any]) -> tuple[int, bool]:
        """How many samples there are, and whether the inputs are the same for all of them."""
        layer = self.layer
        inputs = [x for x in leaves if isinstance(x, Tensor) and x.dim() > layer.batch_dim]
        sizes = [x.shape[layer.batch_dim] for x in inputs]
        known = layer.context.batch_size
        if known in sizes and not layer.broadcast:
            assert known is not None
            return known, False
        same = all(size == 1 for size in sizes) and not any(x.requires_grad for x in inputs)
        if known is not None and (same or layer.broadcast):
            layer.context.spread.add(layer.name)
            return known, True
        if sizes and not layer.broadcast:
            return int(sizes[0]), False
        raise layer.unknown_size()

    def _dim(self, leaf: Any, samples: int) -> int | None:
        """Which dim of an argument to map over; None for what all samples share (a mask [T, T]).

        With as many positions as samples the two look alike; `_compare` tells.
        """
        if not isinstance(leaf, Tensor) or leaf.dim() == 0 or self.layer.broadcast:
            return None
        dim = self._place(leaf)
        return dim if leaf.shape[dim] == samples else None


def _alike(found: Tensor, wanted: Tensor) -> bool:
    if not wanted.is_floating_point():
        return bool((found == wanted).all())
    wanted = wanted.expand_as(found)
    scale = float(wanted.double().abs().nan_to_num(posinf=0).max()) if wanted.numel() else 0.0
    limit = tolerance(wanted.dtype)
    return torch.allclose(
        found.double(), wanted.double(), rtol=limit, atol=limit * scale, equal_nan=True
    )
