"""What follows for a parameter's per-sample gradients from the operators that use it.

`Operators` watches a module's own forward and replaces the operators that take a trained parameter
by ones that leave a record. Rules know: linear, matmul, embedding, embedding_bag, convolutions,
normalisations, attention, recurrent layers and cells, and whatever is elementwise, where the
parameter is first spread over the shape of the result. A function of parameters and constants alone
(a slice, a view, a parametrisation) is a parameter too. Anything else runs sample by sample.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from embattle.clipping.derived import Derived, Source, tensors
from embattle.clipping.expand import expand
from embattle.clipping.vmapped import vmapped
from embattle.perturb.surroundings import in_checkpoint

if TYPE_CHECKING:
    from embattle.clipping.layers import Layer

Rule: TypeAlias = Callable[..., Any]
RULES: dict[Any, Rule] = {}


def rule(*functions: Any) -> Callable[[Rule], Rule]:
    """Registers what stands in for torch's functions where a trained parameter is among the args.

    A rule is called with the `Operators` at work and the function's own arguments.
    """

    def register(found: Rule) -> Rule:
        RULES.update(dict.fromkeys(functions, found))
        return found

    return register


_ELEMENTWISE = {
    getattr(place, name)
    for name in (
        *("add", "sub", "mul", "div", "true_divide", "pow", "where", "maximum", "minimum", "lerp"),
        *("add_", "sub_", "mul_", "div_", "__add__", "__radd__", "__iadd__", "__sub__", "__rsub__"),
        *("__mul__", "__rmul__", "__imul__", "__truediv__", "__rtruediv__", "__pow__", "rsub"),
        *("addcmul", "multiply", "subtract", "divide", "__rpow__", "masked_fill"),
    )
    for place in (torch, Tensor)
    if hasattr(place, name)
}
_CONSTANT = {torch.zeros_like, torch.ones_like, torch.full_like, torch.empty_like}
_CONSTANT |= {Tensor.new_zeros, Tensor.new_ones, Tensor.new_full, Tensor.new_tensor}


class Operators(TorchFunctionMode):
    """Lets rules do what a module's forward asks of operators on trained parameters.

    Attributes:
        layer: the module's.
        packed: the module's input, if it is a PackedSequence: that knows the samples' order.
    """

    def __init__(self, layer: Layer, input: Any = None) -> None:
        super().__init__()
        self.layer = layer
        self.packed = input if isinstance(input, PackedSequence) else None
        self.names = layer.context.names
        self.constants = self._held()
        self.derived: dict[int, Derived] = {}

    def _held(self) -> dict[int, Tensor]:
        module = self.layer.module
        return {id(t): t for t in (*module.buffers(), *module.parameters())}

    def source(self, t: Any) -> Source:
        """What t is: a trained parameter, derived from one, or None."""
        if not isinstance(t, Tensor) or not t.requires_grad:
            return None
        if isinstance(t, Parameter) and t in self.names:
            return t
        return self.derived.get(id(t))

    def sources(self, *given: Tensor | None) -> tuple[Any, ...]:
        """What each of the tensors is."""
        return tuple(self.source(t) for t in given)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        context = self.layer.context
        if context.silent:
            return func(*args, **kwargs)
        given = tensors(args, kwargs)
        if not any(self.source(t) is not None for t in given):
            out = func(*args, **kwargs)
            if func in _CONSTANT or all(id(t) in self.constants for t in given):
                self.constants.update({id(t): t for t in tensors(out)})
            return out
        if not context.backward and in_checkpoint():
            context.ran_without_grad |= not torch.is_grad_enabled()
            again = context.again.get(self.layer.name)
            if again is None:
                again = context.again[self.layer.name] = Recomputed(self.layer)
            own = [t for t in given if isinstance(t, Parameter) and t in self.names]
            again.names.update((t, self.names[t]) for t in own)
        # Modules around this one may watch too.
        context.silent += 1
        try:
            return self._replaced(func, args, kwargs, given)
        finally:
            context.silent -= 1

    def _replaced(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], given: list[Tensor]
    ) -> Any:
        found = RULES.get(func)
        if found is not None:
            out = found(self, *args, **kwargs)
            if out is not NotImplemented:
                return out
        if all(self.source(t) is not None or id(t) in self.constants for t in given):
            return self._derive(func, args, kwargs)
        if func in _ELEMENTWISE:
            shape: Any = torch.broadcast_shapes(*(t.shape for t in given))  # type: ignore[no-untyped-call]
            own = [t for t in given if self.source(t) is not None]
            # A parameter of the result's own shape is not spread over samples.
            if not any(t.shape == shape and 1 not in shape and shape for t in own):

                def spread(t: Any) -> Any:
                    source = self.source(t)
                    return t if source is None else expand(self.layer, t, source, shape)

                return func(*tree_map(spread, args), **tree_map(spread, kwargs))
        return vmapped(self, func, args, kwargs)

    def _derive(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = func(*args, **kwargs)
        known = self.derived
        origin = {id(t): known[id(t)] for t in tensors(args, kwargs) if id(t) in known}
        several = isinstance(out, (tuple, list))
        parts: list[tuple[int | None, Any]] = list(enumerate(out)) if several else [(None, out)]
        for i, part in parts:
            if isinstance(part, Tensor) and part.requires_grad:
                known[id(part)] = Derived(part, func, args, kwargs, i, origin)
            elif isinstance(part, Tensor):  # of parameters, without a gradient: a norm, a mask
                self.constants[id(part)] = part
        return out


class Recomputed(Operators):
    """The same for what a checkpoint runs again in a backward pass, outside of the forward."""

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        self.names: dict[Any, str] = {}

    def __enter__(self) -> Recomputed:
        self.constants, self.derived = self._held(), {}
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if torch.is_grad_enabled():
            return super().__torch_function__(func, types, args, kwargs)
        return func(*args, **(kwargs or {}))  # an operator's own backward


@rule(Tensor.expand, torch.broadcast_to, Tensor.broadcast_to)
def _(ops: Operators, value: Tensor, *sizes: Any, **named: Any) -> Any:
    wanted: Any = sizes or (named.get("size", named.get("sizes")),)
    wanted = wanted[0] if isinstance(wanted[0], (tuple, list)) else wanted
    missing = len(wanted) - value.dim()
    shape = [value.shape[i - missing] if size == -1 else int(size) for i, size in enumerate(wanted)]
    return expand(ops.layer, value, ops.source(value), shape)


@rule(Tensor.expand_as)
def _(ops: Operators, value: Tensor, other: Tensor) -> Any:
    return expand(ops.layer, value, ops.source(value), other.shape)


@rule(Tensor.repeat, torch.tile, Tensor.tile)
def _(ops: Operators, value: Tensor, *repeats: Any) -> Any:
    times = list(repeats[0]) if isinstance(repeats[0], (tuple, list)) else list(repeats)
    times = [1] * (value.dim() - len(times)) + times
    own = [1] * (len(times) - value.dim()) + list(value.shape)
    if any(size != 1 and count != 1 for size, count in zip(own, times, strict=True)):
        return NotImplemented
    shape = [size * count for size, count in zip(own, times, strict=True)]
    return expand(ops.layer, value, ops.source(value), shape).clone()


@rule(operator.getitem, Tensor.__getitem__)
def _(ops: Operators, value: Tensor, index: Any) -> Any:
    # Rows for samples: what an embedding does.
    if isinstance(index, Tensor) and index.dtype in (torch.int64, torch.int32) and value.dim() == 2:
        return RULES[F.embedding](ops, index, value)
    return NotImplemented
