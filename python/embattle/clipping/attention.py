"""Multi-head attention: torch's own function, whose projections are linear layers."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F

from embattle.clipping.context import body_of
from embattle.clipping.operators import Operators, rule

# The look at who else would run it is what has led here.
_body = body_of(F.multi_head_attention_forward)


@rule(F.multi_head_attention_forward)
def _(ops: Operators, *args: Any, **kwargs: Any) -> Any:
    context = ops.layer.context
    silent, context.silent = context.silent, 0
    try:
        with ops:
            return _body(*args, **kwargs)
    finally:
        context.silent = silent
