"""Fake (meta), autograd and vmap rules, attached to the ops themselves.

Direct callers of ``torch.ops.embattle.*`` get them too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

_F = TypeVar("_F", bound=Callable[..., Any])


def register_fake(op: str) -> Callable[[_F], _F]:
    """`torch.library.register_fake`, typed."""
    rule: Callable[[_F], _F] = torch.library.register_fake(op)
    return rule


def _groups(x: Tensor, token: bool, offsets: Tensor | None) -> int | torch.SymInt:
    if offsets is not None:
        return offsets.shape[0] - 1
    if token:
        return x.shape[:-1].numel() if x.dim() else 1
    return x.shape[0] if x.dim() > 1 else 1


@register_fake("embattle::group_norm")
def _(
    x: Tensor,
    norm: float = 2.0,
    *,
    token: bool = False,
    offsets: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty([_groups(x, token, offsets)], dtype=dtype)
