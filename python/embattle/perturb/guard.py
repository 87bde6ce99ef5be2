"""How an attack's passes run: train or eval mode, gradient flags, autocast, inference mode."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

Mode = Literal["as_is", "same", "eval"]
MODES: tuple[Mode, ...] = ("as_is", "same", "eval")


@contextmanager
def eval_mode(models: Sequence[nn.Module], modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put models in eval mode; every one of their modules gets its own flag back afterwards."""
    flags = [(module, module.training) for module in modules]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in flags:
            module.training = training


_PARAMETERS = frozenset({nn.Parameter})
_parametrize = torch.nn.utils.parametrize
_distributed: Any = torch.distributed if torch.distributed.is_available() else None


class frozen_weights:
    """Turn the weights' `requires_grad` off: passes for the delta alone then save less.

    Done only where nothing else depends on the flags: not with sharded or otherwise special
    parameters, not in distributed runs, not while parametrised weights are cached.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        weights = [p for p in parameters if p.requires_grad]
        cached = getattr(_parametrize, "_cache_enabled", 0)
        if (
            cached
            or (_distributed and _distributed.is_initialized())
            or not _PARAMETERS.issuperset(map(type, weights))
        ):
            weights = []
        self._weights = weights

    def __enter__(self) -> None:
        for weight in self._weights:
            weight.requires_grad = False

    def __exit__(self, *exc: object) -> None:
        for weight in self._weights:
            weight.requires_grad = True


class fresh_autocast_cache:
    """Forget the low-precision copies of weights that autocast keeps, before and after the block.

    In a user's own autocast block they live until its end: a pass would see weights as they were
    before a swap or a step, and copies from a pass without gradients would cut the next one off
    (https://github.com/pytorch/pytorch/issues/65766).
    """

    def __enter__(self) -> None:
        torch.clear_autocast_cache()

    def __exit__(self, *exc: object) -> None:
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
def autograd_enabled() -> Iterator[None]:
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
