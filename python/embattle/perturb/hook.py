"""What sits on a site's modules: it watches the pass that opens an attack, and perturbs others."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from embattle.perturb.calls import Call, Layout, is_lookup, is_plain
from embattle.perturb.outputs import Key, Part, parts_of, replace_parts

# What is added at a call: a tensor, or what makes the perturbed output from the output.
Addition: TypeAlias = Tensor | Callable[[Tensor], Tensor]
LayoutOf: TypeAlias = Callable[[Call], Layout]

# Gives the saved-tensors hooks in force, where this torch tells.
_saved_tensors_hooks: Callable[[bool], Any] = getattr(
    torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: None
)


class Use(Protocol):
    """What a hook does while an attack uses its site."""

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Give the output that the model goes on with, or None to leave it alone."""
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


class _Turns:
    """What both uses share: whose calls they are, and which is next."""

    def __init__(self, modules: Sequence[nn.Module], key: Key, own: set[Node] | None) -> None:
        self.modules, self.key, self.own = list(modules), key, own
        self.thread = threading.get_ident()

    def perturbed(self, value: Tensor, addition: Tensor) -> Tensor:
        """Add to an output, and note the node that does, if anyone asks."""
        if self.own is None:
            return value + addition.to(value.dtype)
        value = value + addition.to(value.dtype)
        if value.grad_fn is not None:
            self.own.add(value.grad_fn)
        return value

    def foreign(self, module: nn.Module) -> bool:
        """Whether a call is made by another thread, whose model stays unperturbed.

        Raises:
            RuntimeError: the module is a replica (`nn.DataParallel`).
        """
        if module is not self.modules[0] and not any(module is one for one in self.modules):
            raise RuntimeError(
                f"Site: a replica of {type(module).__name__} was called during an attack: "
                "nn.DataParallel is not supported; use DistributedDataParallel"
            )
        return threading.get_ident() != self.thread


class Watch(_Turns):
    """Record the calls of the coming forward pass.

    Args:
        modules: the site's modules.
        key: which element of their outputs.
        layout_of: where the samples are in a call's output.
        attach: give the model leaves instead of the outputs, so that the gradient at zero can be
            asked for there. It then does not reach the modules' weights: `Call.source` does.
        begin: gives for each call what is added to its output at once. A compiled model does not
            call it, and stays unperturbed in this pass.
        aside: where the pass is compiled, step out of it at the module, so that what it returns and
            where its gradient is asked are seen: the code before and after is compiled apart.
        own: takes in the graph's nodes of the perturbed outputs.
        found: the calls of all sites so far: an output may be made from another one.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        key: Key,
        layout_of: LayoutOf,
        *,
        attach: bool,
        begin: Callable[[Call], Tensor] | None = None,
        aside: bool = False,
        own: set[Node] | None = None,
        found: Sequence[Sequence[Call]] = (),
    ) -> None:
        super().__init__(modules, key, own)
        self.calls: list[Call] = []
        self.found = found
        self.layout_of, self.attach, self.begin = layout_of, attach, begin
        self.aside: Callable[..., Any] | None = None
        if aside:
            self.aside = torch.compiler.disable(self._open)  # type: ignore[no-untyped-call]

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        if self.aside is not None:
            return self.aside(module, args, kwargs, output)
        if not torch.compiler.is_compiling():
            return self._open(module, args, kwargs, output)
        for part in parts_of(output, self.key):
            value = part.value
            self.calls.append(
                Call(module, value.detach(), value, True, args, kwargs, part.key, part.offsets)
            )
        return None

    def _open(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        if self.foreign(module):
            return None
        refuse_checkpoints(module)
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
            before = [c.value for calls in [*self.found, self.calls] for c in calls]
            if leads_to(module, value, before):
                # Made from another place: cut off, that one would lose its gradient. The weights
                # between have theirs from the graph, not from the source.
                leaf, source = value, leaf
            else:
                leaf.requires_grad_()
        call = Call(module, leaf, source, False, args, kwargs, part.key, part.offsets)
        call.layout = self.layout_of(call)
        call.unused_parameters = finds_unused_parameters(module)
        call.through_half = computes_in_half(value)
        self.calls.append(call)
        if self.begin is not None:
            return self.perturbed(leaf if self.attach else value, self.begin(call))
        return leaf.clone() if self.attach else value.clone()


class Perturb(_Turns):
    """Perturb the output of the i-th call of a forward pass by `additions[i]`.

    Args:
        modules: the site's modules.
        key: which element of their outputs.
        calls: those of the pass that opened the attack.
        additions: one for each of `calls`.
        known: take the embeddings of calls with the very same inputs from `calls`, where the module
            is an `nn.Embedding`: "attached" to its weights, or "detached"; None looks them up.
        detach: cut the outputs off the modules' weights.
        own: takes in the graph's nodes of the perturbed outputs.
        deltas: of all sites: an output that is made from a perturbed one is not cut off.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        key: Key,
        calls: Sequence[Call],
        additions: Sequence[Addition],
        *,
        known: str | None = None,
        detach: bool = False,
        own: set[Node] | None = None,
        deltas: Sequence[Tensor] = (),
    ) -> None:
        super().__init__(modules, key, own)
        self.calls, self.additions = calls, additions
        self.known, self.detach, self.deltas = known, detach, deltas
        self.turn = 0
        self._handed: Tensor | None = None  # what the call that is being made was given

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        if torch.compiler.is_compiling():
            return self._traced(output)
        if self.foreign(module):
            return None
        refuse_checkpoints(module)
        if type(output) is Tensor and not output.is_nested and output.is_floating_point():
            return self._one(module, args, kwargs, output)
        values = {
            part.key: self._one(module, args, kwargs, part.value)
            for part in parts_of(output, self.key)
        }
        return replace_parts(output, values)

    def _one(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], value: Tensor
    ) -> Tensor:
        turn, repeats = self.turn, value is self._handed  # `look_up` compared the inputs then
        if not repeats:
            turn, repeats = self._which(module, args, kwargs)
            if repeats and self.known is not None:
                value = self._of_opening(turn, value)
        self._handed = None
        self.turn = turn + 1 if turn + 1 < len(self.calls) else 0
        addition = self.additions[turn]
        if self.detach and value.requires_grad and not leads_to(module, value, self.deltas):
            value = value.detach()
        if not isinstance(addition, Tensor):
            return addition(value)
        if value.shape != addition.shape:
            raise RuntimeError(
                f"Site: {type(module).__name__} returned shape {tuple(value.shape)} where the "
                f"perturbation has {tuple(addition.shape)}: the loss function must run the "
                "same batch at every call, and another batch must run outside of `applied()`"
            )
        return self.perturbed(value, addition)

    def _traced(self, output: Any) -> Any:
        values = {}
        for part in parts_of(output, self.key):
            # The counter is left alone for a single call: a compiled model would guard on it.
            turn = 0
            if len(self.additions) > 1:
                turn = self.turn % len(self.additions)
                self.turn += 1
            addition = self.additions[turn]
            value = part.value.detach() if self.detach else part.value
            added = value + addition.to(value.dtype) if isinstance(addition, Tensor) else None
            values[part.key] = addition(value) if added is None else added  # type: ignore[operator]
        return replace_parts(output, values)

    def look_up(self, module: nn.Module, indices: Tensor) -> Tensor | None:
        """Give the rows that an `nn.Embedding` need not look up again."""
        turn = self.turn % len(self.calls)
        call = self.calls[turn]
        if call.module is not module or threading.get_ident() != self.thread:
            return None
        if self.known is None or not call.repeats((indices,), {}):
            return None
        self._handed = self._of_opening(turn, None)
        return self._handed

    def end_pass(self) -> bool:
        """Tell whether the calls so far were whole passes, and expect the first one next."""
        turn, self.turn = self.turn, 0
        return turn == 0 or any(call.compiled for call in self.calls)

    def _which(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[int, bool]:
        """Tell which call this is, and whether it has the very inputs that it had then."""
        for turn in (self.turn % len(self.calls), 0):  # 0: the pass before was broken off
            call = self.calls[turn]
            repeats = call.module is module and call.repeats(args, kwargs)
            if repeats or call.same_batch(module, args, kwargs):
                return turn, repeats
        raise RuntimeError(
            f"Site: {type(module).__name__} was called with other inputs than those of the "
            "attacked batch. The perturbation belongs to that batch alone: leave `applied()` to "
            "run another one (or `generate`), and let the loss function run the same batch in "
            "every pass (draw negatives before it, or use mode='same')"
        )

    def _of_opening(self, turn: int, other: Any) -> Any:
        """Give the output of the opening's call, or another where it is known no more."""
        call = self.calls[turn]
        if self.known == "detached":
            return call.value.detach()
        return other if call.source is None else call.source


def leads_to(module: nn.Module, value: Tensor, leaves: Sequence[Tensor]) -> bool:
    """Whether a module's output was made from one of `leaves` (a look-up's never is)."""
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


def stand_in(hook: Hook, module: nn.Module) -> Callable[[Tensor], Tensor]:
    """Make a forward method for an `nn.Embedding` that leaves out look-ups that are known."""

    def forward(input: Tensor) -> Tensor:
        use = hook.use
        known = use.look_up(module, input) if isinstance(use, Perturb) else None
        return nn.Embedding.forward(module, input) if known is None else known  # type: ignore[arg-type]

    return forward


def can_stand_in(module: nn.Module) -> bool:
    """Whether `stand_in` may replace a module's forward method."""
    return is_plain(module) and "forward" not in module.__dict__


def refuse_checkpoints(module: nn.Module) -> None:
    """Stop where the module would be run again, unperturbed, in the backward pass."""
    hooks = _saved_tensors_hooks(False)
    inside = hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"
    # A reentrant checkpoint runs its segment without a graph, and has no hooks.
    if inside or (not torch.is_grad_enabled() and _called_by_checkpoint()):
        raise RuntimeError(
            f"Site: {type(module).__name__} is called inside a gradient checkpoint, which runs it "
            "again in the backward pass, without the perturbation: put the site's module outside "
            "the checkpointed part"
        )


def _called_by_checkpoint() -> bool:
    frame = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def finds_unused_parameters(module: nn.Module) -> bool:
    """Whether the model runs in DDP with `find_unused_parameters`.

    Raises:
        RuntimeError: it runs in DDP with a static graph, which an attack's passes break without a
            word.
    """
    wrapper = getattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", None)
    if wrapper is None:
        return False
    if getattr(wrapper, "static_graph", False):
        raise RuntimeError(
            f"Site: {type(module).__name__} runs inside DistributedDataParallel with "
            "static_graph=True, which leaves gradients unsynchronised where a model runs several "
            "times before one backward pass: use static_graph=False"
        )
    return bool(getattr(wrapper, "find_unused_parameters", False))


def computes_in_half(value: Tensor) -> bool:
    """Whether the model goes on in float16."""
    if value.dtype == torch.float16:
        return True
    device = value.device.type
    return torch.is_autocast_enabled(device) and (torch.get_autocast_dtype(device) == torch.float16)
