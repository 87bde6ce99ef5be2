"""What the files of rules share; importing it attaches none.

The rules (fake, autograd, vmap) are attached to the ops themselves, in ``_rules_*.py``: direct
callers of ``torch.ops.embattle.*`` get them too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch.utils._pytree import tree_leaves

_F = TypeVar("_F", bound=Callable[..., Any])


def register_fake(op: str, *, one_device: bool = True) -> Callable[[_F], _F]:
    """`torch.library.register_fake`, typed.

    Args:
        op: its name.
        one_device: all tensors must be on one device, as the kernels want them. (The key of a draw
            may be elsewhere.)
    """

    def attach(rule: _F) -> _F:
        @wraps(rule)
        def checked(*args: Any, **kwargs: Any) -> Any:
            found = {x.device for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
            if one_device and len(found) > 1:
                where = " and ".join(sorted(map(str, found)))
                raise RuntimeError(
                    f"{op.replace('::', '.')}: tensors are on {where}, not on one device"
                )
            return rule(*args, **kwargs)

        torch.library.register_fake(op)(checked)
        return rule

    return attach


def register_vmap(op: str) -> Callable[[_F], _F]:
    """`torch.library.register_vmap`, typed."""
    rule: Callable[[_F], _F] = torch.library.register_vmap(op)
    return rule


_autograd: Any = torch.library.Library("embattle", "IMPL")  # type: ignore[no-untyped-call]


def outside_autograd(*ops: str) -> None:
    """Makes what the ops return constants to autograd, whatever their inputs require.

    Without this their results would require a gradient, which the backward pass cannot give.
    """
    for op in ops:
        _autograd.impl(op, torch.library.fallthrough_kernel, "Autograd")
