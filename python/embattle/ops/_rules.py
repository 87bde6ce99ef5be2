"""What the files of rules share; importing it attaches none.

The rules (fake, autograd, vmap) are attached to the ops themselves, in ``_rules_*.py``: direct
callers of ``torch.ops.embattle.*`` get them too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

_F = TypeVar("_F", bound=Callable[..., Any])


def register_fake(op: str) -> Callable[[_F], _F]:
    """`torch.library.register_fake`, typed."""
    rule: Callable[[_F], _F] = torch.library.register_fake(op)
    return rule


def register_vmap(op: str) -> Callable[[_F], _F]:
    """`torch.library.register_vmap`, typed."""
    rule: Callable[[_F], _F] = torch.library.register_vmap(op)
    return rule
