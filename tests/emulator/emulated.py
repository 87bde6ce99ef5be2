"""The functions of embattle.ops, run by the CUDA kernels in the emulator.

Everything is the package's own: the fronts in Python, the checks, dtypes and workspaces of
csrc/ops. The emulator's library registers the ops a second time, with launchers that emulate; a
dispatch mode sends the calls there.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from types import ModuleType
from typing import Any

import emulator_build as build
import torch
from embattle import ops
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def compiled() -> Path:
    """The library as a module; EMBATTLE_EMULATOR chooses the variant ("watch" or "asan")."""
    variant = os.environ.get("EMBATTLE_EMULATOR", "watch")
    sources = [build.HERE / "registered.cpp"]
    sources += sorted((build.ROOT / "csrc" / "cuda").glob("*.cu"))
    return build.build("emulated_kernels", sources, variant, module=True)


@cache
def kernels() -> ModuleType:
    """The library, loaded: torch.ops.embattle_emulated, and here what tests steer and count."""
    path = compiled()
    spec = importlib.util.spec_from_file_location("emulated_kernels", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Emulating(TorchDispatchMode):
    """Within it, the package's ops are those of the emulator."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "embattle":
            kernels()
            func = getattr(torch.ops.embattle_emulated, func._opname).default
        return func(*args, **(kwargs or {}))


def __getattr__(name: str) -> Callable[..., Any]:
    function = getattr(ops, name)

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with Emulating():
            return function(*args, **kwargs)

    return run


def segment_sum(grad: Tensor, inverse: Tensor, rows: int) -> Tensor:
    """What the backward of embedding_perturb runs."""
    with Emulating():
        out: Tensor = torch.ops.embattle.embedding_perturb_backward(grad, inverse, rows)
    return out
