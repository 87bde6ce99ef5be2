"""Keep the buffers and the tensor attributes of modules as they were before a pass."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache
from operator import is_
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from embattle.perturb.hooked import only_sites_look

# What modules have in their __dict__, mostly.
_TENSORLESS = frozenset({bool, dict, float, int, set, str, type(None), OrderedDict})
# Those without methods of their own.
_PLAIN = (Tensor, nn.Parameter)
# Where buffers of more than _LARGE_BYTES hold more than _TOTAL_BYTES together, they are not copied
# before something is about to write them (frozen weights: whatever they hold).
_TOTAL_BYTES = 64 << 20
_LARGE_BYTES = 1 << 20


class _Tensor:
    """A buffer, or a tensor that is an attribute, and a copy of its values.

    `.data` shares the memory but has a version of its own: it still knows the memory, shape and
    strides after the module gave the tensor others, and autograd does not count a write through it.
    """

    __slots__ = ("copy", "data", "memory", "plain", "tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        whole = tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta
        self.plain = type(tensor) in _PLAIN and not whole
        self.version = None if tensor.is_inference() else tensor._version
        self.data = tensor.data
        # One that is not strided has more than its memory; a write through `.data` would miss it.
        self.memory = tensor if whole else _memory(self.data) if self.plain else self.data
        self.copy: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """The size of the values (and, of a sparse tensor, of two coordinates for each)."""
        each = self.tensor.element_size()
        if not self.plain and str(self.tensor.layout).startswith("torch.sparse"):
            return self.tensor._nnz() * (each + 16)
        return self.memory.numel() * each

    @property
    def written(self) -> bool:
        """Whether autograd has counted a write."""
        return self.version is not None and self.tensor._version != self.version

    def keep(self) -> None:
        """Copy the values, unless that was done."""
        if self.copy is None:
            self.copy = self.memory.clone()

    def restore(self, *, last: bool) -> bool:
        """Put the values back; the `last` time the version too, which only rises until then.

        Batch norms write their statistics, and `.data` is written, without a new version: on a CPU
        the values are compared.

        Returns:
            Whether they are still to be copied back: on a device comparing would wait for it.
        """
        tensor, version, copy = self.tensor, self.version, self.copy
        written = self.written
        if self.plain and (tensor.dtype != self.data.dtype or not tensor.is_set_to(self.data)):
            tensor.data = self.data  # it was resized, or given other memory
            written = True
        elsewhere = self.plain and copy is not None and _on_device(self.memory)
        if copy is not None and not elsewhere and (written or not self._same(copy)):
            with torch.inference_mode(version is None):
                self.memory.copy_(copy)
        if written and version is not None:
            # A detached tensor shares the version (and is what stands for an inference tensor).
            if last:
                torch._C._autograd._unsafe_set_version_counter((tensor.detach(),), (version,))
            else:
                torch.autograd.graph.increment_version(tensor.detach())
        return elsewhere

    def _same(self, copy: Tensor) -> bool:
        if self.plain:
            return torch.equal(self.memory, copy)
        return self.memory is self.tensor and self.version is not None


def _on_device(tensor: Tensor) -> bool:
    return not tensor.is_cpu


def _memory(tensor: Tensor) -> Tensor:
    """Return the elements that lie in memory, each once (of an expanded tensor, the one row)."""
    if tensor.is_contiguous():
        return tensor
    span = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((span,), (1,)) if span < tensor.numel() else tensor


class _Module:
    """Which tensors a module holds, as buffers and as attributes."""

    __slots__ = ("attributes", "buffers", "held", "module", "parameters")

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.held = vars(module)
        self.attributes = self.held.copy()
        self.buffers = dict(module._buffers.items())  # scripted modules have no more than that
        self.parameters = frozenset(module._parameters.keys())

    def tensors(self) -> list[Tensor]:
        """Return the buffers, and the attributes that are tensors."""
        found = [one for one in self.buffers.values() if one is not None]
        if not _TENSORLESS.issuperset(map(type, self.attributes.values())):
            found += [one for one in self.attributes.values() if isinstance(one, Tensor)]
        return found

    def restore(self) -> None:
        """Put the same tensors back."""
        now = self.module._buffers
        if (now or self.buffers) and not _identical(now, self.buffers):
            self.module._non_persistent_buffers_set -= now.keys() - self.buffers.keys()
            now.clear()
            now.update(self.buffers)
        if _identical(self.held, self.attributes):
            return
        # A tensor that stands for a parameter is a weight, whoever put it there.
        for name in self.held.keys() - self.attributes.keys() - self.parameters:
            if _holds_tensor(self.held[name]):
                del self.held[name]
        for name, value in self.attributes.items():
            found = self.held.get(name)
            if found is not value and (_holds_tensor(found) or _holds_tensor(value)):
                self.held[name] = value


def _collect(model: nn.Module, known: dict[int, nn.Module]) -> list[nn.Module]:
    """Add a model's modules to those known, by id; return those that were not known before.

    In the order of `nn.Module.modules`, which takes many times as long.
    """
    new: list[nn.Module] = []
    todo: list[nn.Module | None] = [model]
    while todo:
        module = todo.pop()
        if module is None or id(module) in known:
            continue
        known[id(module)] = module
        new.append(module)
        if module._modules:
            todo.extend(reversed(module._modules.values()))
    return new


def _is_stateless(module: nn.Module) -> bool:
    """Return whether no pass changes the module: one of torch's own without buffers and hooks."""
    if module._buffers or module._forward_pre_hooks or not _of_torch(type(module)):  # type: ignore[arg-type]
        return False
    return only_sites_look(module)


@lru_cache(maxsize=512)
def _of_torch(kind: type[nn.Module]) -> bool:
    return kind.__module__.startswith("torch.nn.modules.") and kind is not nn.Module


def _identical(now: dict[str, Any], before: dict[str, Any]) -> bool:
    return len(now) == len(before) and all(map(is_, now.values(), before.values()))


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(_holds_tensor(one) for one in value)
    return isinstance(value, Tensor)


class _CopyOnWrite(TorchDispatchMode):
    """Copy large tensors only when they are about to be written: most never are."""

    def __init__(self, tensors: Sequence[_Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tensors: dict[int, list[_Tensor]] = {}
        for one in tensors:
            self._tensors.setdefault(_storage_id(one.tensor), []).append(one)

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let `torch.compile` work as if this were not there."""
        return True

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            for index, spec in enumerate(func._schema.arguments):
                if spec.alias_info is not None and spec.alias_info.is_write:
                    found = args[index] if index < len(args) else kwargs.get(spec.name)
                    for one in found if isinstance(found, (list, tuple)) else [found]:
                        for kept in self._tensors.get(_storage_id(one), ()):
                            kept.keep()
        return func(*args, **kwargs)


def _storage_id(tensor: Tensor | None) -> int:
    """Return an id of the memory a tensor is in (of the tensor itself, if it is no plain one)."""
    if tensor is not None and type(tensor) in _PLAIN and tensor.layout is torch.strided:
        return int(tensor.untyped_storage()._cdata)
    return id(tensor)


class KeptState:
    """The buffers and tensor attributes of modules, as they were when first recorded.

    Attributes:
        modules: those that were recorded, each once, by id.
        parameters: of these modules.
    """

    def __init__(self, also: Sequence[Tensor] = ()) -> None:
        """Record nothing yet; also: tensors, weights among them, that belong to it as well."""
        self._also = {id(tensor): tensor for tensor in also}
        self.modules: dict[int, nn.Module] = {}
        self.parameters: list[nn.Parameter] = []
        self._held: list[_Module] = []
        self._tensors: dict[int, _Tensor] = {}

    def given(self, kept: _Tensor) -> bool:
        """Return whether a tensor is one of those that were named."""
        return id(kept.tensor) in self._also

    def keep(self, model: nn.Module) -> list[_Tensor]:
        """Record what the model and its submodules hold, unless that was done.

        Returns:
            The tensors whose values are not copied yet.
        """
        if id(model) in self.modules:
            return []
        held: list[_Module] = []
        parameters: list[nn.Parameter] = []
        for module in _collect(model, self.modules):
            if module._parameters:
                parameters += [p for p in module._parameters.values() if p is not None]
            if not _is_stateless(module):
                held.append(_Module(module))
        self.parameters += parameters
        self._held += held
        found = {id(tensor): tensor for one in held for tensor in one.tensors()} | self._also
        if not found:
            return []
        # What requires a gradient or is a parameter's memory is a weight; the lazy has no values.
        own = [p for p in parameters if type(p) is nn.Parameter and id(p) not in self._also]
        weights = {p.data_ptr() for p in own}
        new = {
            key: _Tensor(tensor)
            for key, tensor in found.items()
            if not (key in self._tensors or tensor.requires_grad or is_lazy(tensor))
        }
        new = {k: v for k, v in new.items() if not (v.plain and v.data.data_ptr() in weights)}
        self._tensors.update(new)
        return list(new.values())

    def restore(self, *, last: bool = False) -> None:
        """Put everything back between two passes, so that both see the same model.

        Without it a pass under `spectral_norm` in train mode has other weights than the one before.

        Args:
            last: there will be no other pass.
        """
        for held in self._held:
            held.restore()
        if not self._tensors:
            return
        unseen = [kept for kept in self._tensors.values() if kept.copy is None and kept.written]
        with torch.no_grad():
            groups: dict[Any, list[_Tensor]] = {}
            for kept in self._tensors.values():
                if kept.restore(last=last):
                    groups.setdefault((kept.data.device, kept.data.dtype), []).append(kept)
            for group in groups.values():
                copies = [one.copy for one in group if one.copy is not None]
                torch._foreach_copy_([one.memory for one in group], copies)
        if unseen:
            raise RuntimeError(
                f"compiled code has written a buffer of shape {tuple(unseen[0].data.shape)}, which "
                "was not copied before, as it is large. Run this model uncompiled"
            )


class kept_state:
    """Keep all state of the models other than weights from changing, also when the block raises.

    That is every buffer (statistics of norms, vectors of `spectral_norm`, averages and counters of
    the user's own) and every attribute that is a tensor: afterwards they are the same objects with
    the same bits and the same version, and what the block has added is gone. Passes inside run as
    always: a batch norm in train mode normalises by the batch. Plain numbers in Python and weights
    are not kept, but for those that are given in `also`.

    With no model given, modules are found as they are called, which one that is compiled with the
    loss function does not show: give the model there.
    """

    def __init__(self, models: Sequence[nn.Module], also: Sequence[Tensor] = ()) -> None:
        self._models, self._state = models, KeptState(also)
        self._on_write: _CopyOnWrite | None = None
        self._handle: RemovableHandle | None = None
        self._thread = get_ident()

    def __enter__(self) -> KeptState:
        found = [one for model in self._models for one in self._state.keep(model)]
        if found:
            self._keep(found)
        if not self._models:
            self._handle = register_module_forward_pre_hook(self._on_call)
        return self._state

    def _keep(self, found: list[_Tensor]) -> None:
        large = [one for one in found if one.nbytes > _LARGE_BYTES]
        much = sum(one.nbytes for one in large) > _TOTAL_BYTES or any(map(self._state.given, large))
        for one in found:
            if not (much and one.nbytes > _LARGE_BYTES):
                one.keep()
        if much:
            self._on_write = _CopyOnWrite(large)
            self._on_write.__enter__()  # type: ignore[no-untyped-call]

    def _on_call(self, module: nn.Module, args: Any) -> None:
        # What another thread runs meanwhile is none of the attack's.
        if not torch.compiler.is_compiling() and get_ident() == self._thread:
            for one in self._state.keep(module):
                one.keep()

    def __exit__(self, *exc: Any) -> None:
        try:
            if self._handle is not None:
                self._handle.remove()
            self._state.restore(last=True)
        finally:
            if self._on_write is not None:
                self._on_write.__exit__(*exc)  # type: ignore[no-untyped-call]
