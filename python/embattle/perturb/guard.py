"""Leave the model as it was: random state, modes, batch-norm statistics and gradient flags."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.module import register_module_forward_pre_hook

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


def _tracks(module: nn.Module) -> bool:
    return isinstance(module, _NormBase) and module.training and module.track_running_stats


@contextmanager
def frozen_statistics(models: Sequence[nn.Module]) -> Iterator[None]:
    """Keep the running statistics of batch and instance norms from changing.

    In train mode the layers go on normalising by the batch. With no model given, the layers are
    found as they are called, which a compiled model does not show: give the model there.
    """
    found: list[_NormBase] = []

    def freeze(module: nn.Module) -> None:
        if isinstance(module, _NormBase) and _tracks(module):
            module.track_running_stats = False
            found.append(module)

    def on_call(module: nn.Module, args: Any) -> None:
        freeze(module)

    with ExitStack() as stack:
        if models:
            for model in models:
                for module in model.modules():
                    freeze(module)
        else:
            stack.callback(register_module_forward_pre_hook(on_call).remove)
        try:
            yield
        finally:
            for module in found:
                module.track_running_stats = True


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
