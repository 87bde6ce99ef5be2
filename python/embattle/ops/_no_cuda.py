"""What CUDA tensors meet where an op has no CUDA kernel: an error that helps, or the CPU.

With ``EMBATTLE_CPU_FALLBACK=1`` such an op copies its tensors to the CPU, runs there and copies the
results back, with one warning per process.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

_FALLBACK = "EMBATTLE_CPU_FALLBACK"
_warned = False


def _missing(op: str) -> RuntimeError:
    from embattle import _C

    if _C.build_info()["cuda"]:
        return RuntimeError(
            f"embattle.{op}: there is no CUDA kernel for it yet. Set {_FALLBACK}=1 to run it on "
            f"the CPU, which copies its tensors there and back."
        )
    return RuntimeError(
        f"embattle.{op}: this build has no CUDA kernels. Rebuild where nvcc is on the PATH, with "
        f"EMBATTLE_CUDA=ON pip install --no-build-isolation . ; or set {_FALLBACK}=1 to run it on "
        f"the CPU, which copies its tensors there and back."
    )


def through_the_cpu(overload: torch._ops.OpOverload) -> Callable[..., Any]:
    """An implementation of an op for tensors of any device, by way of the CPU.

    Args:
        overload: an op of torch.ops.embattle.

    Returns:
        A function with the op's arguments. It raises RuntimeError unless the environment allows it.
    """
    name = overload._schema.name.removeprefix("embattle::")

    def run(*args: Any, **kwargs: Any) -> Any:
        global _warned
        if os.environ.get(_FALLBACK) != "1":
            raise _missing(name)
        if not _warned:
            _warned = True
            warnings.warn(
                f"embattle.{name} runs on the CPU: it has no CUDA kernel in this build "
                f"({_FALLBACK}=1)",
                RuntimeWarning,
                stacklevel=2,
            )
        device = _device_of((args, kwargs))
        moved: list[tuple[Tensor, Tensor]] = []

        def to_cpu(t: Tensor) -> Tensor:
            moved.append((t, t.detach().to("cpu", copy=True)))
            return moved[-1][1]

        cpu_args, cpu_kwargs = tree_map_only(Tensor, to_cpu, (args, kwargs))
        result = overload(*cpu_args, **cpu_kwargs)
        written = [a.name for a in overload._schema.arguments if a.alias_info is not None]
        if written:
            names = [a.name for a in overload._schema.arguments]
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            for argument in written:
                for original, copy in moved:
                    if original is given.get(argument):
                        original.copy_(copy)
        return tree_map_only(Tensor, lambda t: t.to(device), result)

    return run


def _device_of(values: Any) -> torch.device:
    devices = [t.device for t in torch.utils._pytree.tree_leaves(values) if isinstance(t, Tensor)]
    return next((d for d in devices if d.type != "cpu"), torch.device("cpu"))


def register() -> torch.library.Library:
    """Gives every op that has no CUDA kernel the implementation above; keep what it returns."""
    library = torch.library.Library("embattle", "IMPL")  # type: ignore[no-untyped-call]
    for name in torch._C._dispatch_get_all_op_names():
        has = torch._C._dispatch_has_kernel_for_dispatch_key
        if name.startswith("embattle::") and not has(name, "CUDA") and has(name, "CPU"):
            op = name.removeprefix("embattle::")
            run = through_the_cpu(getattr(torch.ops.embattle, op).default)
            library.impl(op, run, "CUDA")  # type: ignore[no-untyped-call]
    return library
