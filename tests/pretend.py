"""A pretend device: tensors that say they are elsewhere, and hold a CPU tensor that does the work.

Code that keeps to one device runs on it as on the CPU. Code that does not is refused as CUDA would
refuse it: an op that gets tensors of both devices (a CPU tensor of no dims is let through, and so
are CPU indices and the keys of random numbers), a CPU generator for numbers drawn on the device,
`numpy()` without `cpu()`. What is beyond it: streams, graphs, real kernels, compiled code,
autocast, recurrent layers, storages and memory addresses.
"""

from __future__ import annotations

import warnings
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

NAME = "pretend:0"
COPIES = {"aten::copy_", "aten::_to_copy"}
RECURRENT = {
    "aten::_pack_padded_sequence",
    "aten::_thnn_fused_gru_cell",
    "aten::_thnn_fused_lstm_cell",
}
# Of tensors of layout torch.sparse_coo.
SPARSE = torch._C.DispatchKeySet(torch._C.DispatchKey.SparsePrivateUse1)
INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}


class PretendTensor(Tensor):
    """A tensor of the pretend device; `held` is the CPU tensor with its values."""

    held: Tensor
    is_cuda = True  # type: ignore[assignment]  # what depends on it is tested here as well
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, held: Tensor) -> PretendTensor:
        dense = held.layout == torch.strided
        made = Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride() if dense else None,
            storage_offset=held.storage_offset() if dense else None,
            dtype=held.dtype,
            device=torch.device(NAME),
            _extra_dispatch_keys=None if dense else SPARSE,
        )
        made.held = held
        return made

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = PretendTensor(self.held.detach().clone()).requires_grad_(self.requires_grad)
        copied.__dict__.update({k: v for k, v in self.__dict__.items() if k != "held"})
        return memo.setdefault(id(self), copied)

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        return PretendTensor(self.held.data)

    @data.setter
    def data(self, value: PretendTensor) -> None:
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.held.data = value.held

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __format__(self, spec: str) -> str:
        return self.held.__format__(spec) if self.dim() == 0 else object.__format__(self, spec)

    def __repr__(self, **options: Any) -> str:
        return f"pretend {self.held!r}"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def elsewhere(device: Any) -> bool:
    return device is not None and torch.device(device).type == "pretend"


def refuse_mixed(func: Any, args: Any, kwargs: Any) -> None:
    """Raises RuntimeError where CUDA would: for CPU tensors among those of the device."""
    name = func._schema.name
    if name in COPIES:
        return
    if name in INDEXED:
        args = (args[0], *args[2:])
    least = 0 if func.namespace == "embattle" else 1
    if func.namespace == "embattle":
        # A key of random numbers is read on the CPU.
        args = [v for a, v in zip(func._schema.arguments, args, strict=False) if a.name != "key"]
    for leaf in tree_leaves((args, kwargs)):
        if not isinstance(leaf, Tensor) or isinstance(leaf, PretendTensor):
            continue
        if leaf.dim() >= least:
            raise RuntimeError(
                f"{name}: expected all tensors to be on the same device, found {NAME} and "
                f"a tensor {tuple(leaf.shape)} on {leaf.device}"
            )


def run(func: Any, args: Any, kwargs: Any) -> Any:
    """Runs an op that takes or makes tensors of the device on what they hold."""
    if func._schema.name in RECURRENT:
        pytest.skip("the pretend device has no recurrent layers")
    refuse_mixed(func, args, kwargs)
    given = {a.name: v for a, v in zip(func._schema.arguments, args, strict=False)} | kwargs
    generator = given.get("generator")
    if generator is not None and generator.device.type != "pretend":
        raise RuntimeError(f"expected a {NAME} generator, found one of {generator.device}")
    owners = {id(t.held): t for t in tree_leaves((args, kwargs)) if isinstance(t, PretendTensor)}
    target = kwargs.get("device")
    leaves = target is not None and not elsewhere(target)
    plain_args, plain = tree_map_only(PretendTensor, lambda t: t.held, (args, kwargs))
    plain_args, plain = tree_map(
        lambda v: torch.device("cpu") if isinstance(v, torch.device) and elsewhere(v) else v,
        (plain_args, plain),
    )
    if func is torch.ops.aten._to_copy.default:
        plain["device"] = target if leaves else torch.device("cpu")
    result = func(*plain_args, **plain)
    if leaves or (func is torch.ops.aten.copy_.default and not isinstance(args[0], PretendTensor)):
        return result

    def owned(held: Tensor) -> PretendTensor:
        owner = owners.get(id(held))  # in-place ops return what they were given
        if owner is None:
            return PretendTensor(held)
        if held.layout == torch.strided and owner.shape != held.shape:
            owner.data = PretendTensor(held)
        return owner

    return tree_map_only(Tensor, owned, result)


@cache
def set_up() -> tuple[torch.library.Library, torch.library.Library]:
    """Registers the device in this process; keep what it returns."""
    from torch.utils import backend_registration

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        backend_registration._setup_privateuseone_for_python_backend("pretend")
    library = torch.library.Library("_", "IMPL")

    def made(func: Any, *args: Any, **kwargs: Any) -> Any:
        return run(func, args, kwargs)

    library.fallback(made, "PrivateUse1")
    # What torch calls in places where tensor subclasses are switched off has no fallback.
    others = torch.library.Library("aten", "IMPL")
    others.impl("copy_", partial(made, torch.ops.aten.copy_.default), "PrivateUse1")
    module = torch.pretend  # type: ignore[attr-defined]
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    torch.__future__.set_swap_module_params_on_conversion(True)
    return library, others
