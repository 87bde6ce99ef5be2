"""What follows for a parameter's per-sample gradients from the operators that use it.

`Operators` watches a module's own forward and replaces the operators that take a trained parameter
by ones that leave a record. Rules know: linear, matmul, embedding, embedding_bag, convolutions,
normalisations, attention, recurrent layers and cells, and whatever is elementwise, where the
parameter is first spread over the shape of the result. A function of parameters and constants alone
(a slice, a view, a parametrisation) is a parameter too. Anything else is `Unknown`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from embattle.clipping.context import Layout
from embattle.clipping.grad_sample import DenseGradSample, GradSample, LinearGradSample, squares
from embattle.clipping.graph import Add, Record, note

if TYPE_CHECKING:
    from embattle.clipping.layers import Layer


class Unknown(Exception):
    """A trained parameter meets an operator without a rule."""


@dataclass(frozen=True, eq=False)
class Derived:
    """A function of parameters and constants, as a recipe.

    Attributes:
        value: what it gave; the recipe's results are told by it.
        function, args, kwargs: the recipe; parameters and other derived tensors among the args.
        part: which of several results it is.
        origin: the recipes of the derived tensors among the args, by their id.
    """

    value: Tensor
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    part: int | None
    origin: dict[int, Derived]

    def roots(self) -> list[Parameter]:
        """The parameters it is a function of."""
        found = {id(t): t for t in _tensors(self.args, self.kwargs) if id(t) not in self.origin}
        roots = {key: t for key, t in found.items() if isinstance(t, Parameter) and t.requires_grad}
        for each in self.origin.values():
            roots |= {id(p): p for p in each.roots()}
        return list(roots.values())

    def evaluate(self, values: dict[int, Tensor]) -> Tensor:
        """The function; values: what stands for the parameters, by their id."""

        def instead(t: Any) -> Any:
            if isinstance(t, Tensor):
                if id(t) in self.origin:
                    return self.origin[id(t)].evaluate(values)
                return values.get(id(t), t)
            return t

        out = self.function(*tree_map(instead, self.args), **tree_map(instead, self.kwargs))
        found: Tensor = out if self.part is None else out[self.part]
        return found


Source: TypeAlias = Parameter | Derived | None


def _tensors(args: Any, kwargs: Any) -> list[Tensor]:
    return [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]


def put(add: Add, source: Source, found: GradSample) -> None:
    """Adds the per-sample gradient of a parameter, or those of what a derived tensor is made of."""
    if source is None:
        return
    if not isinstance(source, Derived):
        add(source, found)
        return
    roots = source.roots()
    grads = found.dense(source.value.shape).to(source.value.dtype)

    def pulled(grad: Tensor) -> tuple[Tensor, ...]:
        def function(*values: Tensor) -> Tensor:
            by_id = {id(p): v for p, v in zip(roots, values, strict=True)}
            return source.evaluate(by_id)

        back: Any = torch.func.vjp(function, *(p.detach() for p in roots))[1]
        own: tuple[Tensor, ...] = back(grad)
        return own

    with torch.enable_grad():
        parts = torch.vmap(pulled)(grads)
    for p, part in zip(roots, parts, strict=True):
        # On the way much may cancel: a normalised weight has no gradient along itself.
        add(p, DenseGradSample(part.detach(), squares(grads, 1)))


# --- the linear layer -----------------------------------------------------------------------------


class _Linear(Record):
    __slots__ = ("bias", "bias_rows", "rows", "transposed", "weight")

    weight: Source
    bias: Source
    rows: tuple[int, int] | None
    bias_rows: tuple[int, int] | None
    transposed: bool

    def shaped(self, grad: Tensor) -> Tensor:
        x = self.x
        return grad if x is None or x.dim() == 2 else grad.reshape(*x.shape[:-1], grad.shape[-1])

    def sample_dims(self, dims: int) -> Sequence[int]:
        return range(dims - 1)

    def deliver(self, add: Add, grad: Tensor, layout: Layout, samples: int) -> None:
        out = layout.tokens(grad, samples, 1)
        shift = None
        if self.bias is not None:
            summed = out.flatten(1) if out.shape[1] == 1 else out.sum(1)
            if self.bias_rows is not None:
                size = _shape(self.bias)[0]
                before, after = self.bias_rows[0], size - self.bias_rows[1]
                summed = F.pad(summed, (before, after))
            shift = DenseGradSample(summed, out if self.layer.context.probed else None)
            put(add, self.bias, shift)
        if self.weight is not None:
            x = layout.tokens(self.checked_input(), samples, 1)
            if x.dtype != out.dtype:
                x = x.to(out.dtype)
            if self.transposed:
                put(add, self.weight, LinearGradSample(out, x, (0, x.shape[-1])))
                return
            rows = self.rows or (0, out.shape[-1])
            put(add, self.weight, LinearGradSample(x, out, rows, shift))


def _shape(source: Source) -> torch.Size:
    assert source is not None
    return source.value.shape if isinstance(source, Derived) else source.shape


def linear(
    layer: Layer,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sources: tuple[Source, Source],
    *,
    rows: tuple[int, int] | None = None,
    bias_rows: tuple[int, int] | None = None,
    transposed: bool = False,
) -> Tensor:
    """F.linear with parameters whose gradients are clipped.

    Args:
        layer: where it happens.
        x: [*, I].
        weight: [O, I], or [I, O] where transposed.
        bias: [O] or None.
        sources: what the weight and the bias are, None where not trained.
        rows: the half-open range of the weight's rows to use; all by default.
        bias_rows: the same of the bias; the weight's by default.
        transposed: how the weight is stored.
    """
    bias_rows = bias_rows or rows
    used, shift = weight, bias
    if rows is not None:
        used = used[rows[0] : rows[1]]
    if transposed:
        used = used.t()
    if bias is not None and bias_rows is not None:
        shift = bias[bias_rows[0] : bias_rows[1]]
    x = _lowered(x)
    outer = x.shape[:-1]
    # What F.linear returns for other inputs may be a view.
    out = F.linear(x if len(outer) == 1 else x.reshape(outer.numel(), x.shape[-1]), used, shift)
    own, own_bias = sources
    if own is not None or own_bias is not None:
        record = _Linear(
            layer, x, weight if own is None else None, bias if own_bias is None else None
        )
        record.weight, record.bias = own, own_bias
        record.rows, record.bias_rows, record.transposed = rows, bias_rows, transposed
        note(out, record)
    return out if len(outer) == 1 else out.reshape(*outer, out.shape[-1])


def _lowered(x: Tensor) -> Tensor:
    """x as autocast would have it, so that what is kept is what was multiplied."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return x
    return x.to(torch.get_autocast_dtype(kind))


# --- a parameter spread over the batch ------------------------------------------------------------


def _summed(
    record: Record,
    x: Tensor,
    spread: Sequence[int],
    layout: Layout,
    samples: int,
    shape: torch.Size,
) -> DenseGradSample:
    """Sums x over the dims in spread but the samples; what is left has the parameter's shape."""
    others = [d for d in range(x.dim()) if not layout.first <= d <= layout.last]
    # [B, K, the other dims in their order], of which the parameter's own stay.
    x = layout.to_front(x, samples)
    out = x.sum([1, *(2 + i for i, d in enumerate(others) if d in spread)])
    return DenseGradSample(out.reshape(samples, *shape), x if record.layer.context.probed else None)


class _Expand(Record):
    __slots__ = ("shape", "source")

    source: Source
    shape: torch.Size

    def sample_dims(self, dims: int) -> Sequence[int]:
        missing = dims - len(self.shape)
        return [d for d in range(dims) if d < missing or self.shape[d - missing] == 1]

    def deliver(self, add: Add, grad: Tensor, layout: Layout, samples: int) -> None:
        """Sums over whatever the parameter was spread over but the samples."""
        spread = self.sample_dims(grad.dim())
        put(add, self.source, _summed(self, grad, spread, layout, samples, self.shape))


def expand(
    layer: Layer, value: Tensor, source: Source, shape: Sequence[int], spread_dim: int | None = None
) -> Tensor:
    """value.expand(shape), whose gradient is clipped; spread_dim: see Record."""
    out = value.expand(shape)
    if source is not None:
        layer.spread_dim = spread_dim
        record = _Expand(layer, out.detach())
        record.source, record.shape = source, value.shape
        note(out, record)
    return out


# --- normalisations -------------------------------------------------------------------------------


class _Norm(Record):
    """normalise(x) times a weight plus a bias, which own some of x's dims."""

    __slots__ = ("bias", "normalise", "own", "weight")

    weight: Source
    bias: Source
    normalise: Callable[[Tensor], Tensor]
    own: tuple[int, ...]

    def sample_dims(self, dims: int) -> Sequence[int]:
        # Channels behind the samples, or features behind everything.
        return (
            [0] if self.own == (1,) and dims > 2 else [d for d in range(dims) if d not in self.own]
        )

    def deliver(self, add: Add, grad: Tensor, layout: Layout, samples: int) -> None:
        spread = [d for d in range(grad.dim()) if d not in self.own]
        for source, normalised in ((self.weight, True), (self.bias, False)):
            if source is None:
                continue
            terms = grad
            if normalised:
                terms = grad * self.normalise(self.checked_input()).to(grad.dtype)
            put(add, source, _summed(self, terms, spread, layout, samples, _shape(source)))


def normalised(
    layer: Layer,
    x: Tensor,
    out: Tensor,
    sources: tuple[Source, Source],
    normalise: Callable[[Tensor], Tensor],
    own: tuple[int, ...],
    others: tuple[Tensor | None, ...] = (),
) -> Tensor:
    """out, whose weight's and bias' gradients are clipped.

    Args:
        layer: where it happens.
        x: what was normalised.
        out: what came out: normalise(x) times the weight plus the bias.
        sources: what the weight and the bias are, None where not trained.
        normalise: the normalisation by itself.
        own: x's dims that the weight and the bias have.
        others: tensors that out was computed from, beside x and the trained ones.
    """
    if sources != (None, None):
        out = out.clone() if out._is_view() else out
        record = _Norm(layer, x, *others)
        record.weight, record.bias = sources
        record.normalise, record.own = normalise, own
        note(out, record)
    return out


# --- a module's own forward, watched --------------------------------------------------------------

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
        held = [*layer.module.buffers(), *layer.module.parameters()]
        self.constants: dict[int, Tensor] = {id(t): t for t in held}
        self.derived: dict[int, Derived] = {}

    def source(self, t: Any) -> Source:
        """What t is: a trained parameter, derived from one, or None."""
        if not isinstance(t, Tensor) or not t.requires_grad:
            return None
        if isinstance(t, Parameter) and t in self.names:
            return t
        return self.derived.get(id(t))

    def sources(self, *tensors: Tensor | None) -> tuple[Any, ...]:
        """What each of the tensors is."""
        return tuple(self.source(t) for t in tensors)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        context = self.layer.context
        if context.silent:
            return func(*args, **kwargs)
        tensors = _tensors(args, kwargs)
        if not any(self.source(t) is not None for t in tensors):
            out = func(*args, **kwargs)
            if func in _CONSTANT or all(id(t) in self.constants for t in tensors):
                self.constants.update({id(t): t for t in _tensors(out, None)})
            return out
        # Modules around this one may watch too.
        context.silent += 1
        try:
            return self._replaced(func, args, kwargs, tensors)
        finally:
            context.silent -= 1

    def _replaced(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor]
    ) -> Any:
        found = RULES.get(func)
        if found is not None:
            out = found(self, *args, **kwargs)
            if out is not NotImplemented:
                return out
        if all(self.source(t) is not None or id(t) in self.constants for t in tensors):
            return self._derive(func, args, kwargs)
        if func in _ELEMENTWISE:
            return self._elementwise(func, args, kwargs, tensors)
        out = func(*args, **kwargs)
        if any(t.requires_grad for t in _tensors(out, None)):
            raise Unknown(f"{getattr(func, '__name__', func)}")
        return out

    def _derive(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = func(*args, **kwargs)
        origin = {
            id(t): self.derived[id(t)] for t in _tensors(args, kwargs) if id(t) in self.derived
        }
        if isinstance(out, Tensor):
            if out.requires_grad and any(out is t for t in _tensors(args, kwargs)):
                raise Unknown(f"{func.__name__}, which changes a parameter in place")
            if out.requires_grad:
                self.derived[id(out)] = Derived(out, func, args, kwargs, None, origin)
        elif isinstance(out, (tuple, list)):
            for i, part in enumerate(out):
                if isinstance(part, Tensor) and part.requires_grad:
                    self.derived[id(part)] = Derived(part, func, args, kwargs, i, origin)
        return out

    def _elementwise(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor]
    ) -> Any:
        shape: Any = torch.broadcast_shapes(*(t.shape for t in tensors))  # type: ignore[no-untyped-call]

        def spread(t: Any) -> Any:
            source = self.source(t)
            if source is None:
                return t
            if t.shape == shape and 1 not in shape and shape:
                raise Unknown(f"{func.__name__} without spreading it over the batch")
            return expand(self.layer, t, source, shape)

        return func(*tree_map(spread, args), **tree_map(spread, kwargs))


@rule(F.linear)
def _(ops: Operators, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if ops.source(input) is not None:
        return NotImplemented
    return linear(ops.layer, ops.layer.spread(input, 1), weight, bias, ops.sources(weight, bias))


@rule(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)
def _(ops: Operators, x: Tensor, weight: Tensor) -> Any:
    if ops.source(x) is not None or weight.dim() != 2 or x.dim() < 2:
        return NotImplemented
    own = (ops.source(weight), None)
    return linear(ops.layer, ops.layer.spread(x, 1), weight, None, own, transposed=True)


@rule(torch.addmm, Tensor.addmm)
def _(ops: Operators, bias: Tensor, x: Tensor, weight: Tensor, **options: Any) -> Any:
    if ops.source(x) is not None or bias.dim() != 1 or options:
        return NotImplemented
    return linear(ops.layer, x, weight, bias, ops.sources(weight, bias), transposed=True)


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


@rule(F.layer_norm)
def _(
    ops: Operators,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    if ops.source(input) is not None:
        return NotImplemented
    return layer_norm(
        ops.layer, input, normalized_shape, weight, bias, eps, ops.sources(weight, bias)
    )


def layer_norm(
    layer: Layer,
    x: Tensor,
    shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    sources: tuple[Source, Source],
) -> Tensor:
    """F.layer_norm with parameters whose gradients are clipped."""
    shape = tuple(shape)
    x = x if sources == (None, None) else layer.spread(x, len(shape))
    out = F.layer_norm(x, shape, weight, bias, eps)
    own = tuple(range(x.dim() - len(shape), x.dim()))

    def normalise(x: Tensor) -> Tensor:
        return F.layer_norm(x, shape, None, None, eps)

    others = (weight if sources[0] is None else None, bias if sources[1] is None else None)
    return normalised(layer, x, out, sources, normalise, own, others)


@rule(F.rms_norm)
def _(
    ops: Operators,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Any:
    shape, layer = tuple(normalized_shape), ops.layer
    if ops.source(input) is not None or weight is None:
        return NotImplemented
    x = layer.spread(input, len(shape))
    # The product by itself, so that the node is one whatever torch makes of the norm.
    out = F.rms_norm(x, shape, None, eps)
    out = (out * weight).to(x.dtype)
    own = tuple(range(x.dim() - len(shape), x.dim()))
    return normalised(
        layer, x, out, ops.sources(weight, None), lambda x: F.rms_norm(x, shape, None, eps), own
    )


def _channels(
    ops: Operators,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    function: Callable[[Tensor, Tensor | None, Tensor | None], Tensor],
    again: Callable[[Tensor], Tensor],
) -> Any:
    sources = ops.sources(weight, bias)
    if ops.source(x) is not None:
        return NotImplemented
    x = ops.layer.spread(x, x.dim() - 1)
    others = (weight if sources[0] is None else None, bias if sources[1] is None else None)
    return normalised(ops.layer, x, function(x, weight, bias), sources, again, (1,), others)


@rule(F.group_norm)
def _(
    ops: Operators,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    def run(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        return F.group_norm(x, num_groups, weight, bias, eps)

    return _channels(ops, input, weight, bias, run, run)


@rule(F.batch_norm)
def _(
    ops: Operators,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if training:
        return NotImplemented

    def run(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        return F.batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)

    return _channels(ops, input, weight, bias, run, run)


@rule(F.instance_norm)
def _(
    ops: Operators,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    statistics = (running_mean, running_var)

    def run(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        return F.instance_norm(x, *statistics, weight, bias, use_input_stats, momentum, eps)

    def again(x: Tensor) -> Tensor:
        used = (None, None) if use_input_stats else statistics
        return F.instance_norm(x, *used, None, None, use_input_stats, momentum, eps)

    return _channels(ops, input, weight, bias, run, again)
