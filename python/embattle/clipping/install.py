"""Exchanging a model's forwards for the duration of a with block."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from embattle import checks
from embattle.clipping.context import Context
from embattle.clipping.layers import Layer, in_use, watched
from embattle.clipping.plain import Comparison
from embattle.clipping.verify import Verifier

# How many states of a model are remembered: those that it alternates between.
_STATES = 8


class _State(NamedTuple):
    """A model as it was once, and what was found out about it.

    Attributes:
        seen, named: its modules and trained parameters; what is held keeps its id.
        layers: those that are watched.
        version: its number.
    """

    seen: list[object]
    named: list[tuple[str, Parameter]]
    layers: list[Layer]
    version: int

    def held(self) -> list[nn.Module | Parameter]:
        """The modules, and the trained parameters."""
        return [*(x for x in self.seen if isinstance(x, nn.Module)), *(p for _, p in self.named)]


class Installer:
    """Watches a model's layers, and puts its own forwards back.

    Attributes:
        named: the trained parameters and their names, as of the last `put_in`.
        version: tells the model's states apart.
        ddp: the model, if it is wrapped in DistributedDataParallel.
        core: the module inside of that and of torch.compile.
    """

    def __init__(
        self,
        model: nn.Module,
        context: Context,
        batch_dim: int | Mapping[str, int],
        broadcast: Iterable[str],
        verifier: Verifier,
    ) -> None:
        """As PerSampleClipper.

        Raises:
            TypeError: a dim that is no integer.
            ValueError: one below 0; or a name of a module that the model does not have; or a
                wrapper that takes part in backward passes.
        """
        self.named: list[tuple[str, Parameter]] = []
        self.version = 0
        self.ddp = model if isinstance(model, nn.parallel.DistributedDataParallel) else None
        if self.ddp is not None and self.ddp.static_graph:
            raise ValueError(
                "PerSampleClipper: DistributedDataParallel(static_graph=True) waits in its first "
                "backward pass for gradients of the batch, which are never made; leave it out"
            )
        core: Any = model.module if self.ddp is not None else model
        compiled: Any = getattr(core, "_orig_mod", None)
        self.core: nn.Module = core if compiled is None else compiled
        self._compiled = compiled is not None
        self._context = context
        dims = batch_dim if isinstance(batch_dim, Mapping) else {"": batch_dim}
        self._batch_dims = {
            name: checks.integer("PerSampleClipper", "batch_dim", dim, 0)
            for name, dim in dims.items()
        }
        self._broadcast = (broadcast,) if isinstance(broadcast, str) else tuple(broadcast)
        known = dict(self.core.named_modules())
        for name in (*self._batch_dims, *self._broadcast):
            if name not in known:
                raise ValueError(f"PerSampleClipper: the model has no module named {name!r}")
        self._comparison = Comparison(self.core, context, verifier, compiled=self._compiled)
        self._layers: list[Layer] = []
        self._seen: list[object] | None = None
        self._states: dict[object, _State] = {}
        self._versions = 0
        self._guard: Any = OrderedDict({0: partial(_refuse_other_passes, context)})

    def put_in(self, stack: ExitStack) -> None:
        """Exchanges the forwards until stack is closed.

        Raises:
            RuntimeError: another clipper is at work on the model.
            ValueError: a layer couples the samples of a batch, or a parameter has a gradient hook.
        """
        current: list[object] = []
        for module in _modules(self.core):
            held = module.__dict__
            if in_use(module):
                raise RuntimeError(
                    "PerSampleClipper: the model is inside another clipper's with block"
                )
            current += (module, type(module), module.training, "forward" in held)
            after, before = held["_forward_hooks"], held["_forward_pre_hooks"]
            current += (len(after), len(before))
            if after or before:
                current += map(_code, (*after.values(), *before.values()))
            for p in held["_parameters"].values():
                current += (id(p), p is not None and p.requires_grad)
        if current != self._seen:
            self._enter(current)
        if self.ddp is not None:
            stack.enter_context(self.ddp.no_sync())
        if self._compiled:
            # A graph that is checked is differentiated twice.
            stack.enter_context(torch._functorch.config.patch(donated_buffer=False))
        for name, p in self.named:
            if p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None):
                raise ValueError(
                    f"PerSampleClipper: parameter '{name}' has a gradient hook, which would be "
                    "skipped: it is meant for the gradient of the batch. Remove it, and change "
                    "the gradient after clipper.backward"
                )
        stack.callback(self._take_out, [p for _, p in self.named], self._layers)
        for _, p in self.named:
            p._backward_hooks = self._guard
        for layer in self._layers:
            layer.put_in()
        first = self.core.register_forward_pre_hook(self._before, prepend=True, with_kwargs=True)
        last = self.core.register_forward_hook(self._after)
        stack.callback(self._end, first, last)

    def _enter(self, current: list[object]) -> None:
        """Looks the model up in a state that it was not in the last time, but may have been in."""
        key = tuple(id(x) if isinstance(x, nn.Module) else x for x in current)
        state = self._states.get(key)
        self._seen = None  # if it is refused
        named = [(n, p) for n, p in self.core.named_parameters() if p.requires_grad]
        self._context.names = {p: name for name, p in named}
        if state is None:
            layers = watched(self.core, self._context, self._batch_dims, self._broadcast)
            # A state holds its modules and weights: those that the model has no more are let go.
            own = {*self.core.modules(), *self.core.parameters()}
            kept = {k: s for k, s in self._states.items() if own.issuperset(s.held())}
            self._states = {} if len(kept) == _STATES else kept
            self._versions += 1
            state = self._states[key] = _State(current, named, layers, self._versions)
        self.named, self._layers, self.version = named, state.layers, state.version
        self._seen = current

    @staticmethod
    def _take_out(parameters: list[Parameter], layers: list[Layer]) -> None:
        for layer in layers:
            layer.take_out()
        for p in parameters:
            p._backward_hooks = None

    def _end(self, *hooks: RemovableHandle) -> None:
        for hook in hooks:
            hook.remove()
        self._comparison.forget()

    def _before(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        context = self._context
        if context.plain:
            return
        context.running = True
        plain = not kwargs and all(isinstance(x, Tensor) for x in args)  # quicker
        leaves = list(args) if plain else tree_leaves((args, kwargs))
        self._note_batch(leaves)
        # What is computed again in a backward pass has been compared.
        if not context.backward:
            _outside_of_graphs(self._comparison.before)(args, kwargs, leaves, self.version)

    def _after(self, _: nn.Module, args: Any, output: Any) -> None:
        context = self._context
        if context.plain:
            return
        context.running = False
        if not context.backward:
            _outside_of_graphs(self._comparison.after)(output)

    def _note_batch(self, leaves: list[Any]) -> None:
        context, dim = self._context, self._batch_dims.get("", 0)
        if context.declared:
            return
        for leaf in leaves:
            if isinstance(leaf, Tensor) and leaf.dim() > dim:
                context.batch_size = leaf.shape[dim]
                return


def _refuse_other_passes(context: Context, _: Tensor) -> None:
    """Hooked to the parameters inside of the block."""
    if not context.backward:
        raise RuntimeError(
            "PerSampleClipper: a backward pass other than clipper.backward reaches a parameter of "
            "the model inside the with block, where its gradient would not be clipped. Ask for "
            "other gradients by torch.autograd.grad(loss, inputs), or do it outside of the block"
        )


def _outside_of_graphs(function: Any) -> Any:
    if torch.compiler.is_compiling():
        return torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return function


def _code(hook: Any) -> object:
    """What tells a hook from another one, and not from one that is made anew in every step."""
    return getattr(hook, "__code__", type(hook))


def _modules(root: nn.Module) -> list[nn.Module]:
    """All modules of a model, each once; plainer than Module.modules, which a step can feel."""
    found = {id(root): root}
    stack = [root]
    while stack:
        for child in stack.pop()._modules.values():
            if child is not None and id(child) not in found:
                found[id(child)] = child
                stack.append(child)
    return list(found.values())
