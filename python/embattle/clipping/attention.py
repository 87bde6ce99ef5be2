"""Multi-head attention: torch's own function, whose projections are linear layers."""

from __future__ import annotations

from types import FunctionType
from typing import Any

import torch.nn.functional as F

from embattle.clipping.operators import Operators, rule

# Torch's body without the look at who else would run it, which is what has led here.
_body = FunctionType(
    F.multi_head_attention_forward.__code__,
    F.multi_head_attention_forward.__globals__ | {"has_torch_function": lambda _: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)


@rule(F.multi_head_attention_forward)
def _(ops: Operators, *args: Any, **kwargs: Any) -> Any:
    context = ops.layer.context
    silent, context.silent = context.silent, 0
    try:
        with ops:
            return _body(*args, **kwargs)
    finally:
        context.silent = silent
