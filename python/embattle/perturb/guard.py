"""Leave the model as it was: buffers, random state, modes, gradient flags; and be able to run.

What is kept is torch's: a model that draws from Python's `random` or from numpy draws on in an
attack, as it does in any other pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

Mode = Literal["as_is", "same", "eval"]
MODES: tuple[Mode, ...] = ("as_is", "same", "eval")


@dataclass(frozen=True)
class RandomState:
    """The state of torch's global generators: the CPU's and those of all CUDA devices.

    A model may be on another device than the current one, or on several.
    """

    cpu: torch.Tensor
    cuda: list[torch.Tensor] | None

    @classmethod
    def capture(cls) -> RandomState:
        """Copy the states now (host memory only: no synchronisation)."""
        used = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state_all() if used else None)

    def restore(self) -> None:
        """Put the states back."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state_all(self.cuda)


@contextmanager
def preserved_random_state() -> Iterator[RandomState]:
    """Undo whatever the block draws from the global generators, also when it raises."""
    state = RandomState.capture()
    try:
        yield state
    finally:
        state.restore()


# What every module has in its __dict__ (its hooks, its `training` flag): not looked at.
_OWN = frozenset(vars(nn.Module()))
_ABSENT = object()


class _Tensor:
    """A buffer, or a tensor that is an attribute, and a copy of its values.

    `.data` shares the memory but has a version of its own: it still knows the memory, shape and
    strides after the module gave the tensor others, and writing through it tells autograd nothing.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        # A sparse, quantised or meta tensor, or one of a class of its own (DTensor), is put back
        # as a whole, and only if its version says that it was written.
        self.dense = (
            type(tensor) is Tensor
            and tensor.layout is torch.strided
            and not tensor.is_quantized
            and not tensor.is_meta
        )
        self.version = None if tensor.is_inference() else tensor._version
        self.data = tensor.data
        self.memory = _memory(self.data) if self.dense else tensor
        self.copy = self.memory.clone()

    @property
    def written(self) -> bool:
        """Whether autograd knows of a write."""
        return self.version is not None and self.tensor._version != self.version

    @property
    def moved(self) -> bool:
        """Whether it was resized, or given other memory."""
        now, was = self.tensor, self.data
        return self.dense and (
            now.data_ptr() != was.data_ptr()
            or now.shape != was.shape
            or now.stride() != was.stride()
            or now.dtype != was.dtype
        )

    def rewind(self, *, last: bool) -> None:
        """Put the values back; the `last` time the version too, which only rises until then.

        Batch norms write their statistics, and `.data` is written, without a new version: on a CPU
        the values are compared; elsewhere, where that would wait for the device, they are copied.
        """
        written = self.written
        if self.moved:
            self.tensor.data = self.data
            written = True
        if written or (self.dense and not self._same()):
            with torch.inference_mode(self.version is None), torch.no_grad():
                self.memory.copy_(self.copy)
        if written and self.version is not None:
            if last:
                torch._C._autograd._unsafe_set_version_counter((self.tensor,), (self.version,))
            else:
                torch.autograd.graph.increment_version(self.tensor)

    def _same(self) -> bool:
        return self.memory.is_cpu and torch.equal(self.memory, self.copy)


def _memory(tensor: Tensor) -> Tensor:
    """Give the elements that lie in memory, each once (of an expanded tensor, the one row)."""
    if tensor.is_contiguous():
        return tensor
    span = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((span,), (1,)) if span < tensor.numel() else tensor


class _Module:
    """Which tensors a module holds, as buffers and as attributes."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.buffers = dict(module._buffers)
        # A tensor that stands for a parameter is a weight, whoever put it there.
        own = _OWN.union(module._parameters) if module._parameters else _OWN
        self.attributes = {k: v for k, v in vars(module).items() if k not in own}
        self.size = len(vars(module))
        self.own = own

    def tensors(self) -> Iterator[Tensor]:
        """Give those whose values can be kept: what requires a gradient is a weight."""
        for one in (*self.buffers.values(), *self.attributes.values()):
            if isinstance(one, Tensor) and not one.requires_grad and not is_lazy(one):
                yield one

    def rewind(self) -> None:
        """Hold the same tensors again."""
        now = self.module._buffers
        was = self.buffers
        if len(now) != len(was) or any(now.get(k, _ABSENT) is not v for k, v in was.items()):
            self.module._non_persistent_buffers_set.difference_update(now.keys() - was.keys())
            now.clear()
            now.update(was)
        attributes = vars(self.module)
        for name, value in self.attributes.items():
            found = attributes.get(name, _ABSENT)
            if found is not value and (_holds_tensor(found) or _holds_tensor(value)):
                attributes[name] = value
        if len(attributes) != self.size:
            new = attributes.keys() - self.attributes.keys() - self.own
            for name in new:
                if _holds_tensor(attributes[name]):
                    del attributes[name]


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(_holds_tensor(one) for one in value)
    return isinstance(value, Tensor)


class ModelState:
    """The buffers and tensor attributes of modules, as they were when these were first met."""

    def __init__(self) -> None:
        self._modules: dict[int, _Module] = {}
        self._tensors: dict[int, _Tensor] = {}

    def keep(self, model: nn.Module) -> None:
        """Remember what the model and its submodules hold, unless it is known already."""
        if id(model) in self._modules:
            return
        for module in model.modules():
            if id(module) not in self._modules:
                held = self._modules[id(module)] = _Module(module)
                for tensor in held.tensors():
                    if id(tensor) not in self._tensors:
                        self._tensors[id(tensor)] = _Tensor(tensor)

    def rewind(self) -> None:
        """Put everything back between two passes, so that both see the same model.

        Without it a pass under `spectral_norm` in train mode has other weights than the one before.
        """
        self._rewind(last=False)

    def _rewind(self, *, last: bool) -> None:
        for held in self._modules.values():
            held.rewind()
        for kept in self._tensors.values():
            kept.rewind(last=last)


@contextmanager
def kept_state(models: Sequence[nn.Module]) -> Iterator[ModelState]:
    """Keep all state of the models other than weights from changing, also when the block raises.

    That is every buffer (statistics of norms, vectors of `spectral_norm`, averages and counters of
    the user's own) and every attribute that is a tensor: afterwards they are the same objects with
    the same bits and the same version, and what the block has added is gone. Passes inside run as
    always: a batch norm in train mode normalises by the batch. Plain numbers in Python and weights,
    frozen ones included, are not kept.

    With no model given, modules are found as they are called, which one that is compiled with the
    loss function does not show: give the model there.
    """
    state = ModelState()
    with ExitStack() as stack:
        for model in models:
            state.keep(model)
        if not models:

            def on_call(module: nn.Module, args: Any) -> None:
                if not torch.compiler.is_compiling():
                    state.keep(module)

            stack.callback(register_module_forward_pre_hook(on_call).remove)
        stack.callback(state._rewind, last=True)
        yield state


@contextmanager
def eval_mode(models: Sequence[nn.Module]) -> Iterator[None]:
    """Put the models in eval mode; every submodule gets its own flag back afterwards."""
    flags = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def frozen_weights(models: Sequence[nn.Module]) -> Iterator[None]:
    """Turn the weights' `requires_grad` off: passes for the delta alone then save less.

    Done only where nothing else can be told by the flags: not with sharded or otherwise special
    parameters, not in distributed runs, not while parametrised weights are cached.
    """
    weights = [p for model in models for p in model.parameters() if p.requires_grad]
    cached = getattr(torch.nn.utils.parametrize, "_cache_enabled", 0)
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if cached or distributed or any(type(p) is not nn.Parameter for p in weights):
        weights = []
    try:
        for weight in weights:
            weight.requires_grad_(False)
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)


@contextmanager
def fresh_autocast_cache() -> Iterator[None]:
    """Forget the low-precision copies of weights that autocast keeps, before and after the block.

    In a user's own autocast block they live until its end: a pass would see weights as they were
    before a swap or a step, and copies from a pass without gradients would cut the next one off
    (https://github.com/pytorch/pytorch/issues/65766).
    """
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.clear_autocast_cache()


class _Clones(TorchFunctionMode):
    """Use a clone wherever a function is given a tensor that was made in inference mode."""

    def __init__(self) -> None:
        super().__init__()
        self._clones = WeakTensorKeyDictionary()

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled():  # a block of the user's own, inside ours
            return func(*args, **kwargs)
        args, kwargs = tree_map_only(Tensor, self._clone, (args, kwargs))
        return func(*args, **kwargs)

    def _clone(self, tensor: Tensor) -> Tensor:
        if not tensor.is_inference():
            return tensor
        if tensor not in self._clones:
            clone = tensor.detach().clone()
            self._clones[tensor] = clone.requires_grad_(tensor.requires_grad)
        found: Tensor = self._clones[tensor]
        return found


@contextmanager
def usable_tensors() -> Iterator[None]:
    """Let autograd work inside `torch.no_grad` and `torch.inference_mode`, as in an evaluation.

    Tensors that were made in inference mode (the batch, a mask) cannot take part in a graph: each
    is replaced by one and the same clone for the time of the block. What a pass writes into it in
    place is lost afterwards.
    """
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(_Clones())
        stack.enter_context(torch.enable_grad())
        yield
