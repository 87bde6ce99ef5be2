"""SASRec: self-attention over what a user met, to tell what comes next."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embattle import checks, losses


class SASRec(nn.Module):
    """SASRec: Kang and McAuley, "Self-Attentive Sequential Recommendation", ICDM 2018.

    Vectors of items and of positions (their eq. 1) go through blocks of causal self-attention and a
    point-wise feed-forward network, with layer norms, dropout and residual connections (eq. 2-5).
    The score of an item is the inner product of its vector and the last state (eq. 6).

    `Site.embeddings(model)` perturbs the vectors of the items met, `Site.weight(model.item)` the
    items' table, which the scores read as well.

    Args:
        items: how many there are. In sequences the number `items` is padding.
        length: items that are looked at; sequences are padded at the end.
        dim: width of the vectors.
        blocks, heads: of self-attention.
        dropout: everywhere.
    """

    def __init__(
        self,
        items: int,
        *,
        length: int = 50,
        dim: int = 64,
        blocks: int = 2,
        heads: int = 1,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        self.items = checks.integer("SASRec", "items", items, 1)
        self.length = checks.integer("SASRec", "length", length, 1)
        self.item = nn.Embedding(items + 1, dim, padding_idx=items)
        self.position = nn.Parameter(torch.empty(length, dim))
        with torch.no_grad():
            self.item.weight[:items].normal_(std=0.02)
            self.position.normal_(std=0.02)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(dim, heads, dim, dropout, batch_first=True, norm_first=True)
            for _ in range(blocks)
        )
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def get_input_embeddings(self) -> nn.Module:
        """Give the module whose output an attacker perturbs."""
        return self.item

    def forward(self, sequences: Tensor) -> Tensor:
        """Give the states `[B, T, dim]` after each item of sequences `[B, T]`, T <= length.

        No mask is needed for padding: it comes last, and no state looks ahead.

        Raises:
            ValueError: sequences of more than `length` items.
        """
        steps = sequences.shape[1]
        if steps > self.length:
            raise ValueError(
                f"SASRec: sequences {tuple(sequences.shape)} have more places than length="
                f"{self.length}; give the latest {self.length} items of each, padded at the end"
            )
        states = self.dropout(self.item(sequences) + self.position[:steps])
        ahead = torch.ones(steps, steps, dtype=torch.bool, device=states.device).triu(1)
        for block in self.blocks:
            states = block(states, src_mask=ahead)
        normed: Tensor = self.norm(states)
        return normed

    def scores(self, sequences: Tensor) -> Tensor:
        """Give the scores `[B, items]` of all items to come next after sequences `[B, T]`."""
        last = ((sequences != self.items).sum(1) - 1).clamp(min=0)
        states = self(sequences)
        return self._all(states[torch.arange(states.shape[0], device=states.device), last])

    def losses(self, sequences: Tensor, targets: Tensor, negatives: Tensor | None = None) -> Tensor:
        """Give the next-item losses `[B]`, each the mean over a sequence's targets.

        Args:
            sequences: [B, T] items met.
            targets: [B, T] what came next after each; padding counts nowhere.
            negatives: [B, T] items that did not come: the paper's binary cross-entropy (section
                III.E) of both. Without them it is the cross-entropy over all items, which makes the
                better model (Klenitskiy and Vasilev, RecSys 2023).
        """
        states, counts = self(sequences), targets != self.items
        if negatives is None:
            return losses.cross_entropy(self._all(states), targets, ignore_index=self.items)
        right, wrong = ((states * self.item(items)).sum(-1) for items in (targets, negatives))
        return losses.per_counted(F.softplus(-right) + F.softplus(wrong), counts)

    def _all(self, states: Tensor) -> Tensor:
        return states @ self.item.weight[: self.items].T
