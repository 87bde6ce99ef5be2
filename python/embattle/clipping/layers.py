"""How a model's forward is watched, and which of its modules are."""

from __future__ import annotations

import functools
import sys
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

# The rules of operators register themselves.
from embattle.clipping import attention, conv, recurrent
from embattle.clipping.context import Context
from embattle.clipping.embedding import look_up
from embattle.clipping.linear import linear
from embattle.clipping.normalisation import layer_norm
from embattle.clipping.operators import Operators

assert attention
assert conv
assert recurrent

# Where a module keeps its layer.
_PLACE = "_embattle_clipping_layer"


def _forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    layer: Layer | None = self.__dict__.get(_PLACE)
    if layer is None or layer.module is not self:  # a copy, or a class made from the stand-in
        kind = next(kind for kind in type(self).__mro__ if "_embattle_own" in vars(kind))
        return kind._embattle_own.forward(self, *args, **kwargs)  # type: ignore[attr-defined]
    return layer.forward(*args, **kwargs)


# Breaks the graph of torch.compile: what a layer does has side effects.
_outside_of_graphs: Any = None


def _forward_or_break(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if torch.compiler.is_compiling():
        return _outside_of_graphs(self, *args, **kwargs)
    return _forward(self, *args, **kwargs)


@functools.cache
def _stand_in_class(own: Hashable, compiler_loaded: bool) -> Any:
    global _outside_of_graphs
    forward: Any = _forward
    if compiler_loaded:
        if _outside_of_graphs is None:
            _outside_of_graphs = torch.compiler.disable(_forward)  # type: ignore[no-untyped-call]
        forward = _forward_or_break
    kind: Any = own
    names = {"forward": forward, "__module__": kind.__module__, "_embattle_own": kind}
    return type(kind.__name__, (kind,), names)


def _set_class(module: nn.Module, kind: Any) -> None:
    # Past Module.__setattr__, which looks for parameters and submodules first.
    object.__setattr__(module, "__class__", kind)


def in_use(module: nn.Module) -> bool:
    """Whether a layer stands in for module's forward now."""
    return _PLACE in module.__dict__


class Layer:
    """Stands in for a module's forward while its gradients are clipped.

    Attributes:
        module: the module.
        context: the clipper's state.
        name: the module's name in the model, or its class where it is the model.
        batch_dim: where the samples are likely to be in its inputs.
        broadcast: whether its input is the same for all samples and has no batch dimension.
        original: the module's own forward.
        spread_dim: where `spread` has just given an input a row for every sample, or None.
        announced: operators without a rule that a log line has been written of.
    """

    def __init__(
        self, module: Any, context: Context, name: str, batch_dim: int, broadcast: bool
    ) -> None:
        self.module = module
        self.context = context
        self.name = name or type(module).__name__
        self.batch_dim = batch_dim
        self.broadcast = broadcast
        self.original = module.forward
        self.spread_dim: int | None = None
        self._kept: Any = None
        self._own: Any = type(module)
        self.announced: set[str] = set()

    def __deepcopy__(self, memo: Any) -> Layer:
        """Itself: a copied module is not this layer's."""
        return self

    def put_in(self) -> None:
        """Makes the module call this instead of its own forward.

        The module gets a subclass of its class rather than another forward: that is what
        torch.compile looks at to tell the two states apart.
        """
        module = self.module
        held = module.__dict__
        self.original = module.forward
        self._kept = held.pop("forward", None)
        held[_PLACE] = self
        self._own = type(module)
        _set_class(module, _stand_in_class(self._own, "torch._dynamo" in sys.modules))

    def take_out(self) -> None:
        """Undoes `put_in`, if it was done."""
        module = self.module
        if module.__dict__.pop(_PLACE, None) is None:
            return
        # Not where the module has changed its class itself, as a lazy one does.
        if "_embattle_own" in vars(type(module)):
            _set_class(module, self._own)
        if self._kept is not None:
            module.forward = self._kept

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The replacement."""
        module = self.module
        kind: Any = type(module)
        if not hasattr(kind, "_embattle_own"):  # a lazy module that has its sizes now
            self._own = kind
            self.original = functools.partial(kind.forward, module)
            _set_class(module, _stand_in_class(kind, "torch._dynamo" in sys.modules))
        if self.context.plain:
            return self.original(*args, **kwargs)
        if self._kept is None and not kwargs and len(args) == 1:
            plain = _PLAIN.get(self._own.forward)
            weight = module._parameters.get("weight")
            if plain is not None and weight is not None:
                context = self.context
                context.silent += 1
                try:
                    return plain(self, args[0], module._parameters)
                finally:
                    context.silent -= 1
        with Operators(self, *args[:1]):
            return self.original(*args, **kwargs)

    def spread(self, x: Tensor, features: int) -> Tensor:
        """Gives every sample its own row of an input that is the same for all samples.

        That is one without a gradient of size 1 where the samples should be, or any in a layer that
        is named in broadcast.

        Args:
            x: the layer's input.
            features: how many of the last dims are the layer's own.

        Raises:
            RuntimeError: the number of samples is needed and unknown, or see note_spread.
        """
        self.spread_dim = None
        outer = x.dim() - features
        dim = min(self.batch_dim, outer - 1)
        if not self.broadcast and (outer == 0 or x.shape[dim] != 1 or x.requires_grad):
            return x
        samples = self.context.batch_size
        if samples is None:
            if not self.broadcast:
                return x
            raise self.unknown_size()
        if outer and x.shape[dim] == 1:
            # Where floats have the samples' number elsewhere, these are the samples.
            if samples == 1 or (not self.broadcast and features and samples in x.shape[:outer]):
                return x
        else:
            if outer > 1 and x.shape[dim] == samples:
                return x
            dim = min(self.batch_dim, outer)
            x = x.unsqueeze(dim)
        sizes = list(x.shape)
        sizes[dim] = samples
        self.spread_dim = dim
        self.note_spread(x)
        return x.expand(sizes)

    def note_spread(self, *inputs: Tensor) -> None:
        """Notes that inputs are taken to be the same for all samples.

        Raises:
            RuntimeError: nobody says so, and no output of the model can show it.
        """
        context = self.context
        context.spread.add(self.name)
        if not self.broadcast:
            context.guessed.add(self.name)
        if not (self.broadcast or context.running or context.backward):
            raise RuntimeError(
                f"PerSampleClipper: layer '{self.name}' is given one row for all samples, "
                f"{[tuple(x.shape) for x in inputs]}, outside of a call of the model itself, whose "
                "output would show whether it is the same for all. Call the model itself, give the "
                "layer a row for each sample, or name it in broadcast"
            )

    def unknown_size(self) -> RuntimeError:
        """The error for a layer that needs the number of samples."""
        return RuntimeError(
            f"PerSampleClipper: the number of samples is not known in layer '{self.name}'; call "
            "the model itself, not only parts of it, or use clipper.expect(batch_size) before"
        )

    def trained(self, *parameters: Any) -> tuple[Any, ...]:
        """Each of them if it is trained, else None."""
        names = self.context.names
        return tuple(
            [p if p is not None and p.requires_grad and p in names else None for p in parameters]
        )


def _linear(layer: Layer, x: Tensor, own: Any) -> Tensor:
    weight, bias = own["weight"], own["bias"]
    sources = layer.trained(weight, bias)
    # Without a record nobody would notice what spreading does. Not by ==: tensors are slow at it.
    if sources[0] is not None or sources[1] is not None:
        x = layer.spread(x, 1)
    return linear(layer, x, weight, bias, sources)


def _look_up(layer: Layer, x: Tensor, own: Any) -> Tensor:
    weight, module = own["weight"], layer.module
    (source,) = layer.trained(weight)
    return look_up(
        layer,
        x if source is None else layer.spread(x, 0),
        weight,
        source,
        module.padding_idx,
        module.max_norm,
        module.norm_type,
        module.scale_grad_by_freq,
        module.sparse,
    )


def _layer_norm(layer: Layer, x: Tensor, own: Any) -> Tensor:
    module, weight, bias = layer.module, own["weight"], own.get("bias")
    return layer_norm(
        layer, x, module.normalized_shape, weight, bias, module.eps, layer.trained(weight, bias)
    )


# The forwards that are quicker done directly than watched.
_PLAIN: dict[Any, Any] = {
    nn.Linear.forward: _linear,
    nn.Embedding.forward: _look_up,
    nn.LayerNorm.forward: _layer_norm,
}


def refuse_batch_statistics(module: nn.Module, name: str) -> None:
    """Raises:
    ValueError: module is a BatchNorm that normalises over the batch.
    """
    if not isinstance(module, nn.modules.batchnorm._BatchNorm):
        return
    if module.training or not module.track_running_stats:
        raise ValueError(
            f"PerSampleClipper: layer '{name}' ({type(module).__name__}) normalises over the "
            "batch, so there are no per-sample gradients; use LayerNorm, or put it in eval mode"
        )


# Modules whose parameters the module around them uses.
_HOLDERS = (nn.ParameterList, nn.ParameterDict)


def _parametrizations(module: nn.Module) -> nn.Module | None:
    # Scripted modules keep their parts in something that is no dict.
    found = getattr(module, "parametrizations", None)
    return found if isinstance(found, nn.Module) else None


def _uses_parameters(module: nn.Module) -> bool:
    own = list(module._parameters.values())
    if isinstance(module, nn.MultiheadAttention):
        own += module.out_proj.parameters()
    for child in module.children():
        if isinstance(child, _HOLDERS):
            own += child.parameters()
    parametrizations = _parametrizations(module)
    if parametrizations is not None:
        own += parametrizations.parameters()
    return any(p is not None and p.requires_grad for p in own)


def watched(
    model: nn.Module, context: Context, batch_dims: Mapping[str, int], broadcast: Iterable[str]
) -> list[Layer]:
    """The modules of model that use parameters to train themselves.

    Args:
        model: the model.
        context: the clipper's state.
        batch_dims: module name -> where the samples are likely to be in its inputs; holds for what
            is inside of it too, the longest name wins; "" for the whole model.
        broadcast: names of modules whose input is the same for all samples.
    """
    found = []
    spread = set(broadcast)
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        refuse_batch_statistics(module, name)
        held = _parametrizations(module)
        if held is not None:
            inside.update(held.modules())
        if module in inside or isinstance(module, _HOLDERS) or not _uses_parameters(module):
            continue
        found.append(Layer(module, context, name, _batch_dim(batch_dims, name), name in spread))
    return found


def _batch_dim(batch_dims: Mapping[str, int], name: str) -> int:
    best, found = -1, 0
    for prefix, dim in batch_dims.items():
        inside = not prefix or name == prefix or name.startswith(prefix + ".")
        if inside and len(prefix) > best:
            best, found = len(prefix), dim
    return found
