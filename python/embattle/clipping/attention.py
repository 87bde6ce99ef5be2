"""Multi-head attention: its projections are linear layers."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from embattle.clipping.operators import Operators, expand, linear, rule


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask to be added to scores: boolean True means "do not look"."""
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, -math.inf)
    return mask.to(dtype)


@rule(F.multi_head_attention_forward)
def _(
    ops: Operators,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> Any:
    """F.multi_head_attention_forward on [T, B, E], which torch.nn.MultiheadAttention calls."""
    layer = ops.layer
    if any(ops.source(t) is not None for t in (query, key, value)):
        return NotImplemented
    if query.dim() != 3 or static_k is not None or static_v is not None:
        raise ValueError(
            f"PerSampleClipper: layer '{layer.name}' got a query of shape {tuple(query.shape)}, "
            "which has no batch dimension, or static keys; give the layer one row per sample"
        )
    if is_causal and attn_mask is None:
        raise ValueError(
            f"PerSampleClipper: layer '{layer.name}' got is_causal=True without attn_mask; "
            "torch.nn.MultiheadAttention needs the mask too"
        )
    width = query.shape[-1]

    def project(x: Tensor, weight: Tensor, part: int, parts: int = 1) -> Tensor:
        rows = (part * width, (part + parts) * width)
        own = ops.sources(weight, in_proj_bias)
        if use_separate_proj_weight:
            return linear(layer, x, weight, in_proj_bias, own, bias_rows=rows)
        return linear(layer, x, weight, in_proj_bias, own, rows=rows)

    if use_separate_proj_weight:
        assert q_proj_weight is not None
        assert k_proj_weight is not None
        assert v_proj_weight is not None
        q = project(query, q_proj_weight, 0)
        k, v = project(key, k_proj_weight, 1), project(value, v_proj_weight, 2)
    else:
        assert in_proj_weight is not None
        if query is key and key is value:
            q, k, v = project(query, in_proj_weight, 0, 3).chunk(3, -1)
        else:
            q = project(query, in_proj_weight, 0)
            k, v = project(key, in_proj_weight, 1), project(value, in_proj_weight, 2)
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    n, length, _ = q.shape
    extra = 0
    if bias_k is not None and bias_v is not None:
        k, v = (
            torch.cat([x, expand(layer, bias, ops.source(bias), (n, 1, width))], 1)
            for x, bias in ((k, bias_k), (v, bias_v))
        )
        extra += 1
    if add_zero_attn:
        k, v = (torch.cat([x, x.new_zeros(n, 1, width)], 1) for x in (k, v))
        extra += 1
    q, k, v = (x.reshape(n, x.shape[1], num_heads, -1).transpose(1, 2) for x in (q, k, v))
    mask = None
    if attn_mask is not None:
        mask = F.pad(_additive(attn_mask, q.dtype), (0, extra))
        mask = mask.reshape(n, num_heads, *mask.shape[1:]) if mask.dim() == 3 else mask
    if key_padding_mask is not None:
        padding = F.pad(_additive(key_padding_mask, q.dtype), (0, extra))[:, None, None, :]
        mask = padding if mask is None else mask + padding
    dropout = dropout_p if training else 0.0
    weights = None
    if need_weights:
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        scores = scores if mask is None else scores + mask
        weights = F.dropout(scores.softmax(-1), dropout)
        mixed = weights @ v
        weights = weights.mean(1) if average_attn_weights else weights
    else:
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    mixed = mixed.permute(2, 0, 1, 3).reshape(length, n, width)
    own = ops.sources(out_proj_weight, out_proj_bias)
    return linear(layer, mixed, out_proj_weight, out_proj_bias, own), weights
