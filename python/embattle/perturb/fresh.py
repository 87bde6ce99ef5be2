"""Whether an output can be perturbed in place."""

from __future__ import annotations

from torch import Tensor, nn

from embattle.perturb.hook import Hook
from embattle.perturb.hooked import only_sites_look


def is_fresh(module: nn.Module, value: Tensor) -> bool:
    """Return whether rows were just looked up, and nobody but the site's hook has seen them yet.

    Such an output may be changed in place, out of autograd's sight: the gradient of a look-up does
    not depend on what it gave.

    Args:
        module: a site's.
        value: what it returned.
    """
    # A class of the user's own may keep what it returns.
    if type(module) is not nn.Embedding or type(value) is not Tensor or value.grad_fn is None:
        return False
    hooks = module._forward_hooks.values()
    return (
        value.grad_fn.name() == "EmbeddingBackward0"
        and "forward" not in module.__dict__  # per-sample clipping keeps what passes
        and only_sites_look(module)
        and sum(isinstance(hook, Hook) and hook.use is not None for hook in hooks) == 1
    )
