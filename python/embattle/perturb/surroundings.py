"""What runs around a site's module: gradient checkpoints, distributed training, autocast."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# Returns the saved-tensors hooks in force, where this torch has such a function.
saved_tensors_hooks: Callable[[bool], Any] = getattr(
    torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: None
)

_DDP = nn.parallel.DistributedDataParallel


def refuse_checkpoints(module: nn.Module) -> None:
    """Refuse modules in a gradient checkpoint, which runs them again without the perturbation.

    Raises:
        RuntimeError: the call is inside one.
    """
    if in_checkpoint():
        raise RuntimeError(
            f"Site: {type(module).__name__} is called inside a gradient checkpoint, which runs it "
            "again in the backward pass, without the perturbation: put the site's module outside "
            "the checkpointed part"
        )


def in_checkpoint() -> bool:
    """Return whether the caller runs inside a gradient checkpoint's first pass."""
    hooks = saved_tensors_hooks(False)
    if hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint":
        return True
    # A reentrant checkpoint runs its segment without a graph, and has no hooks.
    return not torch.is_grad_enabled() and _called_by_checkpoint()


def _called_by_checkpoint() -> bool:
    frame = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def finds_unused_parameters(module: nn.Module) -> bool:
    """Return whether the model runs in DDP with `find_unused_parameters`.

    Raises:
        RuntimeError: it runs in DDP with a static graph, which an attack's passes break without a
            word.
    """
    wrapper = _DDP._active_ddp_module
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
    """Return whether the model computes in float16 from here on."""
    if value.dtype == torch.float16:
        return True
    device = value.device.type
    return torch.is_autocast_enabled(device) and (torch.get_autocast_dtype(device) == torch.float16)
