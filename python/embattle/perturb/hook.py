"""The forward hooks of a site's modules: they record an attack's first pass, and perturb others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import get_ident
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.compiler import is_compiling

from embattle.perturb.calls import Call, Layout, is_lookup
from embattle.perturb.outputs import Key, Part, parts_of, replace_parts
from embattle.perturb.surroundings import (
    computes_in_half,
    finds_unused_parameters,
    refuse_checkpoints,
    saved_tensors_hooks,
)


class OfCall:
    """What is added at a call, made from the inputs of that call."""

    def __init__(self, make: Callable[[tuple[Any, ...], dict[str, Any]], Tensor]) -> None:
        self.make = make


# What is added at a call: a tensor, or what makes the perturbed output from the output.
Addition: TypeAlias = Tensor | Callable[[Tensor], Tensor]
# What a pass adds at a call: also what the call's own inputs make.
PassAddition: TypeAlias = Addition | OfCall
LayoutOf: TypeAlias = Callable[[Call], Layout]


class Use(Protocol):
    """What a hook does while an attack uses its site."""

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Return the output that replaces the module's, or None to keep it."""
        ...


class Hook:
    """The forward hook of a site's modules: idle unless `use` is set.

    A copy of the model gets an idle hook that belongs to no site, whatever the original is doing.
    """

    def __init__(self) -> None:
        self.use: Use | None = None

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        use = self.use
        return None if use is None else use(module, args, kwargs, output)

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return Hook()

    def __reduce__(self) -> tuple[Any, ...]:
        return Hook, ()


class _SiteCalls:
    """What both uses share: the modules, the thread, and the nodes of perturbed outputs."""

    def __init__(self, modules: Sequence[nn.Module], key: Key, nodes: set[Node] | None) -> None:
        self.modules, self.key, self.nodes = list(modules), key, nodes
        self.first, self.thread = self.modules[0], get_ident()

    def perturbed(self, value: Tensor, addition: Tensor) -> Tensor:
        """Add to an output, and collect the autograd node of the sum if `nodes` are given."""
        if addition.dtype != value.dtype:
            addition = addition.to(value.dtype)
        value = value + addition
        if self.nodes is not None and value.grad_fn is not None:
            self.nodes.add(value.grad_fn)
        return value

    def from_other_thread(self, module: nn.Module) -> bool:
        """Return whether a call is made by another thread, whose model stays unperturbed.

        Raises:
            RuntimeError: the module is a replica (`nn.DataParallel`).
        """
        if module is not self.first and not any(module is one for one in self.modules):
            raise RuntimeError(
                f"Site: a replica of {type(module).__name__} was called during an attack: "
                "nn.DataParallel is not supported; use DistributedDataParallel"
            )
        return get_ident() != self.thread


class Recorder(_SiteCalls):
    """Record the calls of the coming forward pass.

    Args:
        modules: the site's modules.
        key: which element of their outputs.
        layout_of: where the samples are in a call's output.
        attach: give the model leaves instead of the outputs, so that the gradient at zero can be
            computed there. The weights' gradients then go through `Call.source`.
        begin: returns for each call what is added to its output at once, or makes the perturbed
            output of it. A compiled model does not call it, and stays unperturbed in this pass.
        graph_break: where the pass is compiled, break the graph at the module, so that its output
            and the gradient there are seen: the code before and after is compiled apart.
        nodes: collects the autograd nodes of the perturbed outputs.
        found: the calls of all sites so far: an output may be computed from another one.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        key: Key,
        layout_of: LayoutOf,
        *,
        attach: bool,
        begin: Callable[[Call], Addition] | None = None,
        graph_break: bool = False,
        nodes: set[Node] | None = None,
        found: Sequence[Sequence[Call]] = (),
    ) -> None:
        super().__init__(modules, key, nodes)
        self.calls: list[Call] = []
        self.found = found
        self.layout_of, self.attach, self.begin = layout_of, attach, begin
        self.graph_break: Callable[..., Any] | None = None
        if graph_break:
            self.graph_break = torch.compiler.disable(self._record_output)  # type: ignore[no-untyped-call]

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        if self.graph_break is not None:
            return self.graph_break(module, args, kwargs, output)
        if not is_compiling():
            return self._record_output(module, args, kwargs, output)
        for part in parts_of(output, self.key):
            value = part.value
            self.calls.append(
                Call(module, value.detach(), value, True, args, kwargs, part.key, part.offsets)
            )
        return None

    def _record_output(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        if self.from_other_thread(module):
            return None
        refuse_checkpoints(module)
        if self.key is None and _is_plain(output):
            return self._record(module, args, kwargs, Part(None, output, None))
        values = {
            part.key: self._record(module, args, kwargs, part)
            for part in parts_of(output, self.key)
        }
        return replace_parts(output, values)

    def _record(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], part: Part
    ) -> Tensor:
        value, leaf = part.value, part.value.detach()
        source = value
        if self.attach and self.begin is None:
            if value.grad_fn is not None and depends_on(
                module, value, [c.value for calls in [*self.found, self.calls] for c in calls]
            ):
                # Computed from another perturbed output, which would lose its gradient if cut off.
                # The weights between have theirs from the graph, not from the source.
                leaf, source = value, leaf
            else:
                leaf.requires_grad_()
        call = Call(module, leaf, source, False, args, kwargs, part.key, part.offsets)
        call.table = module._parameters.get("weight")
        call.layout = self.layout_of(call)
        call.unused_parameters = finds_unused_parameters(module)
        call.through_half = computes_in_half(value)
        self.calls.append(call)
        if self.begin is not None:
            addition = self.begin(call)
            if not isinstance(addition, Tensor):
                return addition(value)
            return self.perturbed(leaf if self.attach else value, addition)
        return leaf.clone() if self.attach else value.clone()


class Perturb(_SiteCalls):
    """Perturb the output of the i-th call of a forward pass by `additions[i]`.

    Args:
        modules: the site's modules.
        key: which element of their outputs.
        calls: those of the attack's first pass.
        additions: one for each of `calls`.
        known: take the embeddings of calls with the very same inputs from `calls`, where the module
            is an `nn.Embedding`: "attached" to its weights, or "detached"; None looks them up.
        detach: cut the outputs off the modules' weights.
        nodes: collects the autograd nodes of the perturbed outputs.
        deltas: of all sites: an output that is computed from a perturbed one is not cut off.
        number: of the site.
        outputs: collects the perturbed outputs of all sites. They are leaves then, at which the
            gradient is that at the deltas, with no addition in the graph.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        key: Key,
        calls: Sequence[Call],
        additions: Sequence[PassAddition],
        *,
        known: str | None = None,
        detach: bool = False,
        nodes: set[Node] | None = None,
        deltas: Sequence[Tensor] = (),
        number: int = 0,
        outputs: dict[tuple[int, int], Tensor] | None = None,
    ) -> None:
        super().__init__(modules, key, nodes)
        self.calls, self.additions = calls, additions
        self.known, self.detach, self.deltas = known, detach, deltas
        self.number, self.outputs = number, outputs
        self.index = 0
        self._cached: Tensor | None = None  # what the current call was given

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        if is_compiling():
            return self._traced(args, kwargs, output)
        # Looked at here first: every step comes this way, and calls take longer than comparisons.
        if (module is not self.first or get_ident() != self.thread) and self.from_other_thread(
            module
        ):
            return None
        if saved_tensors_hooks(False) is not None or not torch.is_grad_enabled():
            refuse_checkpoints(module)
        if _is_plain(output):
            return self._perturb(module, args, kwargs, output)
        values = {
            part.key: self._perturb(module, args, kwargs, part.value)
            for part in parts_of(output, self.key)
        }
        return replace_parts(output, values)

    def _perturb(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], value: Tensor
    ) -> Tensor:
        index = self.index % len(self.calls)
        if value is not self._cached:  # else `cached_rows` compared the inputs
            call = self.calls[index]
            repeats = call.module is module and call.repeats(args, kwargs)
            if not repeats:
                index, repeats = self._find_call(module, args, kwargs)
            if repeats and self.known is not None:
                value = self._first_output(index, value)
        self._cached = None
        self.index = index + 1 if index + 1 < len(self.calls) else 0
        addition = self.additions[index]
        if self.detach and value.requires_grad:
            moved = [] if self.outputs is None else self.outputs.values()
            if not depends_on(module, value, [*self.deltas, *moved]):
                value = value.detach()
        if isinstance(addition, OfCall):
            addition = addition.make(args, kwargs)
        if not isinstance(addition, Tensor):
            return addition(value)
        if value.shape != addition.shape:
            raise RuntimeError(
                f"Site: {type(module).__name__} returned shape {tuple(value.shape)} where the "
                f"perturbation has {tuple(addition.shape)}: the loss function must run the "
                "same batch at every call, and another batch must run outside of `applied()`"
            )
        value = self.perturbed(value, addition)
        if self.outputs is not None:
            self.outputs[self.number, index] = value.requires_grad_()
        return value

    def _traced(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        values = {}
        for part in parts_of(output, self.key):
            # The counter is left alone for a single call: a compiled model would guard on it.
            index = 0
            if len(self.additions) > 1:
                index = self.index % len(self.additions)
                self.index += 1
            addition = self.additions[index]
            if isinstance(addition, OfCall):
                addition = addition.make(args, kwargs)
            value = part.value.detach() if self.detach else part.value
            added = value + addition.to(value.dtype) if isinstance(addition, Tensor) else None
            values[part.key] = addition(value) if added is None else added  # type: ignore[operator]
        return replace_parts(output, values)

    def cached_rows(self, module: nn.Module, indices: Tensor) -> Tensor | None:
        """Return the rows of the first pass where inputs are the same; None: look them up."""
        index = self.index % len(self.calls)
        call = self.calls[index]
        if call.module is not module or get_ident() != self.thread:
            return None
        if self.known is None or not call.repeats((indices,), {}):
            return None
        self._cached = self._first_output(index, None)
        return self._cached

    def end_pass(self) -> bool:
        """Return whether the calls so far were whole passes, and expect the first call next."""
        index, self.index = self.index, 0
        return index == 0 or any(call.compiled for call in self.calls)

    def _find_call(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[int, bool]:
        """Return the number of this call, and whether its inputs are those of the first pass.

        Raises:
            RuntimeError: it is a call with other inputs.
        """
        for index in (self.index % len(self.calls), 0):  # 0: the pass before was broken off
            call = self.calls[index]
            if call.module is module and call.repeats(args, kwargs):
                return index, True
            if call.same_batch(module, args, kwargs):
                return index, False
        raise RuntimeError(
            f"Site: {type(module).__name__} was called with other inputs than those of the "
            "attacked batch. The perturbation belongs to that batch alone: leave `applied()` to "
            "run another one (or `generate`), and let the loss function run the same batch in "
            "every pass (draw negatives before it, or use mode='same'); that of subset(rows) has "
            "the padding of the whole batch"
        )

    def _first_output(self, index: int, other: Any) -> Any:
        """Return the output of a call of the first pass, or `other` where it was freed."""
        call = self.calls[index]
        if self.known == "detached":
            return call.value.detach()
        return other if call.source is None else call.source


def _is_plain(output: Any) -> bool:
    return type(output) is Tensor and not output.is_nested and output.is_floating_point()


def depends_on(module: nn.Module, value: Tensor, leaves: Sequence[Tensor]) -> bool:
    """Return whether a module's output was computed from one of `leaves` (a look-up's never is)."""
    if value.grad_fn is None or is_lookup(module):
        return False
    known = {id(leaf) for leaf in leaves} | {id(leaf.grad_fn) for leaf in leaves if leaf.grad_fn}
    seen: set[Node] = set()
    todo: list[Any] = [value.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if id(node) in known or id(getattr(node, "variable", None)) in known:
            return True
        todo.extend(after for after, _ in node.next_functions)
    return False
