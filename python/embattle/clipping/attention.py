"""torch.nn.MultiheadAttention: its projections are linear layers."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter

from embattle.clipping.functional import per_sample
from embattle.clipping.layer import Layer
from embattle.clipping.linear import linear


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask to be added to scores: boolean True means "do not look"."""
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, -math.inf)
    return mask.to(dtype)


class AttentionLayer(Layer):
    """torch.nn.MultiheadAttention with all its options."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As torch.nn.MultiheadAttention."""
        module = self.module
        if query.dim() != 3:
            raise ValueError(
                f"PerSampleClipper: layer '{self.name}' got a query of shape {tuple(query.shape)}, "
                f"which "
                "has no batch dimension; give the layer one row per sample"
            )
        if is_causal and attn_mask is None:
            raise ValueError(
                f"PerSampleClipper: layer '{self.name}' got is_causal=True without attn_mask; "
                "torch.nn.MultiheadAttention needs the mask too"
            )
        batch = 0 if module.batch_first else 1
        same = query is key and key is value
        q, k, v = self._projected(query, key, value, batch, same)
        if batch == 1:
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        n, length, width = q.shape
        extra = 0
        if module.bias_k is not None:
            k = torch.cat([k, self._extra(module.bias_k, n)], 1)
            v = torch.cat([v, self._extra(module.bias_v, n)], 1)
            extra += 1
        if module.add_zero_attn:
            k, v = (torch.cat([x, x.new_zeros(n, 1, width)], 1) for x in (k, v))
            extra += 1
        heads = module.num_heads
        q, k, v = (x.reshape(n, x.shape[1], heads, -1).transpose(1, 2) for x in (q, k, v))
        mask = None
        if attn_mask is not None:
            mask = F.pad(_additive(attn_mask, q.dtype), (0, extra))
            mask = mask.reshape(n, heads, *mask.shape[1:]) if mask.dim() == 3 else mask
        if key_padding_mask is not None:
            padding = F.pad(_additive(key_padding_mask, q.dtype), (0, extra))[:, None, None, :]
            mask = padding if mask is None else mask + padding
        dropout = module.dropout if module.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
            scores = scores if mask is None else scores + mask
            weights = F.dropout(scores.softmax(-1), dropout)
            mixed = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        mixed = mixed.transpose(1, 2).reshape(n, length, width)
        out = linear(self, mixed, module.out_proj.weight, module.out_proj.bias, batch_dim=0)
        return out if batch == 0 else out.transpose(0, 1), weights

    def _extra(self, parameter: Parameter, samples: int) -> Tensor:
        """A learned key or value behind the others, [samples, 1, width]."""
        return per_sample(self, parameter, parameter.detach()[0], samples)

    def _projected(
        self, query: Tensor, key: Tensor, value: Tensor, batch: int, same: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        module = self.module
        bias, width = module.in_proj_bias, module.embed_dim

        def project(x: Tensor, weight: Parameter, part: int, parts: int = 1) -> Tensor:
            rows = (part * width, (part + parts) * width)
            x = self.tape.spread(x, batch, 1, declared=self.broadcast, name=self.name)
            return linear(self, x, weight, bias, batch_dim=batch, rows=rows)

        def separate(x: Tensor, weight: Parameter, part: int) -> Tensor:
            x = self.tape.spread(x, batch, 1, declared=self.broadcast, name=self.name)
            rows = (part * width, (part + 1) * width)
            return linear(self, x, weight, bias, batch_dim=batch, bias_rows=rows)

        if module.in_proj_weight is None:
            return (
                separate(query, module.q_proj_weight, 0),
                separate(key, module.k_proj_weight, 1),
                separate(value, module.v_proj_weight, 2),
            )
        if same:
            q, k, v = project(query, module.in_proj_weight, 0, 3).chunk(3, -1)
            return q, k, v
        return (
            project(query, module.in_proj_weight, 0),
            project(key, module.in_proj_weight, 1),
            project(value, module.in_proj_weight, 2),
        )

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        """Whether module is a plain attention."""
        return type(module).forward is nn.MultiheadAttention.forward
