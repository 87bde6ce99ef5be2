"""What the forward replacements of all layers have in common."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from embattle.clipping.tape import Tape


def once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """once_differentiable, without its cost where no second derivative is asked for."""
    guarded = once_differentiable(backward)

    def run(ctx: Any, *grads: Any) -> Any:
        return guarded(ctx, *grads) if torch.is_grad_enabled() else backward(ctx, *grads)

    return run


def apply(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    """function.apply, typed."""
    out: Tensor = function.apply(*args)  # type: ignore[no-untyped-call]
    return out


# Where a module keeps what stands in for its forward.
_PLACE = "_embattle_clipping_layer"


def _forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    layer: Layer = self.__dict__[_PLACE]
    # Inside of torch.func the module's own forward is run.
    run = layer.original if layer.tape.inside else layer.forward
    return run(*args, **kwargs)


# Breaks the graph of torch.compile: what a stand-in does in the backward pass has side effects.
_outside_of_graphs: Any = None


def _forward_or_break(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if torch.compiler.is_compiling():
        return _outside_of_graphs(self, *args, **kwargs)
    return _forward(self, *args, **kwargs)


@functools.cache
def _stand_in_class(own: Any, compiler_loaded: bool) -> Any:
    global _outside_of_graphs
    forward: Any = _forward
    if compiler_loaded:
        if _outside_of_graphs is None:
            _outside_of_graphs = torch.compiler.disable(_forward)  # type: ignore[no-untyped-call]
        forward = _forward_or_break
    return type(own.__name__, (own,), {"forward": forward, "__module__": own.__module__})


def _set_class(module: nn.Module, kind: Any) -> None:
    # Past Module.__setattr__, which looks for parameters and submodules first.
    object.__setattr__(module, "__class__", kind)


def in_use(module: nn.Module) -> bool:
    """Whether something stands in for module's forward now."""
    return _PLACE in module.__dict__


class Layer:
    """Stands in for a module's forward while its gradients are clipped.

    Attributes:
        module: the module.
        tape: the clipper's state.
        name: the module's name in the model, or its class where it is the model.
        batch_dim: where the samples are in its inputs.
        broadcast: whether its input is the same for all samples and has no batch dimension.
    """

    def __init__(
        self, module: Any, tape: Tape, name: str, batch_dim: int = 0, broadcast: bool = False
    ) -> None:
        self.module = module
        self.tape = tape
        self.name = name or type(module).__name__
        self.batch_dim = batch_dim
        self.broadcast = broadcast
        self.original = module.forward
        self._kept: Any = None

    def put_in(self) -> None:
        """Makes the module call this instead of its own forward.

        The module gets a subclass of its class rather than another forward: that is what
        torch.compile looks at to tell the two states apart.
        """
        module = self.module
        held = module.__dict__
        self.original = module.forward
        self._kept = held.pop("forward", None)
        held[_PLACE] = self
        own: Any = type(module)
        _set_class(module, _stand_in_class(own, "torch._dynamo" in sys.modules))

    def take_out(self) -> None:
        """Undoes `put_in`, if it was done."""
        module = self.module
        if not in_use(module):
            return
        _set_class(module, type(module).__mro__[1])
        del module.__dict__[_PLACE]
        if self._kept is not None:
            module.forward = self._kept

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The replacement."""
        raise NotImplementedError

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        """Whether this class can stand in for module."""
        raise NotImplementedError

    def spread(self, x: Tensor, features: int) -> Tensor:
        """See Tape.spread."""
        if not self.batch_dim and not self.broadcast and x.dim() > features and x.shape[0] != 1:
            return x
        return self.tape.spread(
            x, self.batch_dim, features, declared=self.broadcast, name=self.name
        )
