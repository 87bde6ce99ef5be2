"""Any other module with parameters of its own: torch.func on that module alone."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from embattle.clipping.layer import Layer, apply, once
from embattle.clipping.uses import DenseUse

_log = logging.getLogger("embattle.clipping")


class _PerSample(torch.autograd.Function):
    """A parameter once per sample, not copied; what comes back are per-sample gradients."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, value: Tensor, parameter: Any, samples: int, layer: Any
    ) -> Tensor:
        ctx.parameter, ctx.layer = parameter, layer
        ctx.set_materialize_grads(False)
        return value.expand(samples, *value.shape)

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor | None) -> tuple[None, ...]:
        listener = ctx.layer.tape.listener
        if grad is not None and listener is not None:
            grad = grad.reshape(len(grad), *ctx.parameter[0].shape)
            listener.add(ctx.parameter[0], DenseUse(grad), ctx.layer.name)
        return None, None, None, None, None


def per_sample(layer: Layer, parameter: Parameter, value: Tensor, samples: int) -> Tensor:
    """[samples, *value.shape]: value, from parameter, with the parameter's clipped gradient.

    Args:
        layer: where it happens.
        parameter: the parameter; its shape holds as many numbers as value's.
        value: the parameter without gradient, reshaped at will.
        samples: how many.
    """
    # In a tuple, so that autograd does not take the parameter for an input.
    out: Tensor = apply(_PerSample, layer.tape.anchor, value, (parameter,), samples, layer)
    return out


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


class _Padding(TorchFunctionMode):
    """Embeddings keep their padding row without gradient; under vmap torch forgets about it."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is not F.embedding:
            return func(*args, **kwargs)
        return _embedding(*args, **kwargs)


def _embedding(
    input: Tensor, weight: Tensor, padding_idx: int | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    """As F.embedding."""
    rows = F.embedding(input, weight, None, *args, **kwargs)
    if padding_idx is None:
        return rows
    place = padding_idx if padding_idx >= 0 else len(weight) + padding_idx
    return torch.where((input == place).unsqueeze(-1), rows.detach(), rows)


class FunctionalLayer(Layer):
    """Per-sample gradients through torch.func.vmap over the samples.

    The module sees one sample at a time (with a batch dimension of size 1). Its per-sample
    gradients are held in memory.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._compared = False
        size = sum(p.numel() for p in self.module.parameters() if p.requires_grad)
        _log.info(
            "layer '%s' (%s) has no clipping rule of its own: its per-sample gradients (%d numbers "
            "a "
            "sample) come from torch.func",
            self.name,
            type(self.module).__name__,
            size,
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own."""
        trained = [p for p in self.module.parameters() if p.requires_grad]
        leaves, spec = tree_flatten((args, kwargs))
        samples = self._samples(leaves)
        dims = [self._dim(leaf, samples) for leaf in leaves]
        values = [per_sample(self, p, p.detach(), samples) for p in trained]
        form: list[Any] = []

        def one(inputs: list[Any], own: list[Tensor]) -> list[Tensor]:
            inputs = [
                x if dim is None else x.unsqueeze(dim) for x, dim in zip(inputs, dims, strict=True)
            ]
            call_args, call_kwargs = tree_unflatten(inputs, spec)
            with _swapped(self.module, dict(zip(trained, own, strict=True))), _Padding():
                out = self.original(*call_args, **call_kwargs)
            outs, out_spec = tree_flatten(out)
            form[:] = [out_spec, [None if isinstance(x, Tensor) else x for x in outs]]
            tensors = [x for x in outs if isinstance(x, Tensor)]
            return [self._without_batch(x) for x in tensors]

        self.tape.inside += 1
        try:
            with warnings.catch_warnings():
                # Operators without a batching rule: the log line has said that this layer is slow.
                warnings.filterwarnings("ignore", message="There is a performance drop")
                mapped = torch.vmap(one, in_dims=(dims, 0), randomness="different")(leaves, values)
        except (RuntimeError, ValueError) as error:
            raise RuntimeError(
                f"PerSampleClipper: layer '{self.name}' ({type(self.module).__name__}) has no "
                f"clipping "
                f"rule of its own and cannot run under torch.func.vmap either: {error}. Build it "
                f"from "
                "known layers, or freeze its parameters"
            ) from error
        finally:
            self.tape.inside -= 1
        out_spec, fixed = form
        found = iter(mapped)
        outs = []
        for other in fixed:
            if other is not None:
                outs.append(other)
                continue
            x = next(found)
            outs.append(x.movedim(0, min(self.batch_dim, x.dim() - 1)))
        if self.tape.check and not self._compared:
            self._compare(outs, args, kwargs)
            self._compared = True
        return tree_unflatten(outs, out_spec)

    def _compare(self, outs: list[Any], args: Any, kwargs: Any) -> None:
        """Whether one sample at a time gives what the module gives for the batch."""
        if any(
            isinstance(m, nn.modules.dropout._DropoutNd) and m.training
            for m in self.module.modules()
        ):
            return
        self.tape.inside += 1
        try:
            with torch.no_grad():
                whole = tree_flatten(self.original(*args, **kwargs))[0]
        finally:
            self.tape.inside -= 1
        for found, wanted in zip(outs, whole, strict=True):
            if not isinstance(wanted, Tensor):
                continue
            wanted = wanted.expand_as(found) if wanted.dim() == found.dim() else wanted
            if found.shape != wanted.shape or not torch.allclose(
                found.double(), wanted.double(), rtol=1e-2, atol=1e-3, equal_nan=True
            ):
                raise ValueError(
                    f"PerSampleClipper: layer '{self.name}' ({type(self.module).__name__}) gives "
                    f"other "
                    "values for single samples than for the batch: it couples samples, one of its "
                    "arguments has the number of samples as another size, or it is random (then "
                    "pass "
                    "check=False)"
                )

    def _without_batch(self, x: Tensor) -> Tensor:
        dim = min(self.batch_dim, x.dim() - 1)
        if x.dim() == 0 or x.shape[dim] != 1:
            raise ValueError(f"for one sample it returned a tensor of shape {tuple(x.shape)}")
        return x.squeeze(dim)

    def _samples(self, leaves: list[Any]) -> int:
        if self.tape.batch_size is not None:
            return self.tape.batch_size
        for leaf in leaves:
            if isinstance(leaf, Tensor) and leaf.dim() > self.batch_dim:
                return leaf.shape[self.batch_dim]
        raise RuntimeError(
            f"PerSampleClipper: the number of samples is not known in layer '{self.name}'; call "
            f"the model "
            "itself, not only parts of it, or use clipper.expect(batch_size) before"
        )

    def _dim(self, leaf: Any, samples: int) -> int | None:
        """Which dim of an argument to map over; None for what all samples share (a mask [T, T]).

        With as many positions as samples the two look alike; `_compare` tells.
        """
        if not isinstance(leaf, Tensor) or leaf.dim() == 0 or self.broadcast:
            return None
        dim = min(self.batch_dim, leaf.dim() - 1)
        return dim if leaf.shape[dim] == samples else None


@contextmanager
def broadcast_parameters(layer: Layer, names: list[str]) -> Iterator[None]:
    """module with parameters of shape [1, ...] spread over the batch, [B, ...].

    For modules that add such parameters (positions, a class token) to their input: their children
    keep their own rules.
    """
    module, samples = layer.module, layer.tape.batch_size
    if samples is None:
        raise RuntimeError(
            f"PerSampleClipper: the number of samples is not known in layer '{layer.name}'; call "
            f"the "
            "model itself, not only parts of it, or use clipper.expect(batch_size) before"
        )
    own = {name: module._parameters[name] for name in names}
    try:
        for name, parameter in own.items():
            value = parameter.detach()[0]
            module._parameters[name] = per_sample(layer, parameter, value, samples)
        yield
    finally:
        module._parameters.update(own)


class BroadcastParameterLayer(Layer):
    """A module whose own parameters all have size 1 where the samples are."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own."""
        own = [
            name for name, p in self.module._parameters.items() if p is not None and p.requires_grad
        ]
        with broadcast_parameters(self, own):
            return self.original(*args, **kwargs)
