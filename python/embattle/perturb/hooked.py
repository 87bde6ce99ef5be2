"""Modules with the hooks of sites: whose hooks they have, and look-ups that are not repeated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.modules import module as of_all_modules

from embattle.perturb.calls import is_plain
from embattle.perturb.hook import Hook, Perturb, Recorder, Use


def _uses(model: nn.Module) -> list[Use]:
    hooks = [hook for m in model.modules() for hook in m._forward_hooks.values()]
    found = [hook.use for hook in hooks if type(hook) is Hook]
    return [use for use in found if use is not None]


def records(model: nn.Module) -> bool:
    """Return whether an attack's first pass is running, which counts the calls of modules."""
    return any(type(use) is Recorder for use in _uses(model))


@contextmanager
def kept_places(model: nn.Module) -> Iterator[None]:
    """Expect the same call next after the block, in which the model runs once more."""
    uses = [use for use in _uses(model) if isinstance(use, Perturb)]
    places = [use.index for use in uses]
    try:
        yield
    finally:
        for use, place in zip(uses, places, strict=True):
            use.index = place


def cached_forward(hook: Hook, module: nn.Module) -> Callable[[Tensor], Tensor]:
    """Make a forward method for an `nn.Embedding` that skips look-ups whose rows are cached."""

    def forward(input: Tensor) -> Tensor:
        use = hook.use
        known = use.cached_rows(module, input) if isinstance(use, Perturb) else None
        return nn.Embedding.forward(module, input) if known is None else known  # type: ignore[arg-type]

    return forward


def can_cache_forward(module: nn.Module) -> bool:
    """Return whether `cached_forward` may replace a module's forward method."""
    return is_plain(module) and "forward" not in module.__dict__ and only_sites_look(module)


def only_sites_look(module: nn.Module) -> bool:
    """Return whether no hook but those of sites sees, or changes, what a module returns."""
    hooks = module._forward_hooks.values()
    return not of_all_modules._global_forward_hooks and all(type(hook) is Hook for hook in hooks)
