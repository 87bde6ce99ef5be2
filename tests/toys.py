"""Small models that the attack tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from embattle import Evaluation
from embattle.losses import cross_entropy
from torch import Tensor, nn


class Encoder(nn.Module):
    """Embeddings, one transformer layer, mean pooling, logits."""

    def __init__(self, dropout: float = 0.0, vocab: int = 40, dim: int = 8, classes: int = 3):
        super().__init__()
        self.embedding = nn.Embedding(vocab, dim, padding_idx=0)
        self.layer = nn.TransformerEncoderLayer(
            dim, 2, 2 * dim, dropout, batch_first=True, activation="gelu"
        )
        self.head = nn.Linear(dim, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        padding = tokens == 0
        hidden = self.layer(self.embedding(tokens), src_key_padding_mask=padding)
        kept = (~padding).unsqueeze(-1).to(hidden.dtype)
        return self.head((hidden * kept).sum(1) / kept.sum(1))


class Factors(nn.Module):
    """Matrix factorisation."""

    def __init__(self, users: int = 12, items: int = 20, dim: int = 6):
        super().__init__()
        self.user = nn.Embedding(users, dim)
        self.item = nn.Embedding(items, dim)

    def forward(self, users: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
        u = self.user(users)
        return (u * self.item(positive)).sum(-1), (u * self.item(negative)).sum(-1)


class Sampled(nn.Module):
    """Matrix factorisation under a sampled softmax: a user's scores of a few drawn items."""

    def __init__(self, candidates: Tensor, users: int = 12, items: int = 20, dim: int = 8) -> None:
        super().__init__()
        self.embedding, self.item = nn.Embedding(users, dim), nn.Embedding(items, dim)
        self.candidates = candidates

    def forward(self, users: Tensor) -> Tensor:
        return (self.embedding(users) * self.item(self.candidates)).sum(-1)


def sampled(batch: int = 6, candidates: int = 3) -> tuple[Sampled, Tensor, Tensor]:
    """The model in float64, users `[B, 1]`, and which of the candidates is the right one."""
    torch.manual_seed(0)
    model = Sampled(torch.randint(0, 20, (batch, candidates))).double()
    return model, torch.randint(0, 12, (batch, 1)), torch.randint(0, candidates, (batch,))


def tiny_bert(**options: Any) -> Any:
    """A classifier with random weights."""
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        **options,
    )
    return transformers.BertForSequenceClassification(config)


def encoder(dropout: float = 0.0, dtype: torch.dtype = torch.float64, seed: int = 0) -> Encoder:
    torch.manual_seed(seed)
    return Encoder(dropout).to(dtype)


def text_batch(batch: int = 6, length: int = 7, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Tokens padded on the right with 0, and labels."""
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 40, (batch, length), generator=g)
    lengths = torch.randint(2, length + 1, (batch,), generator=g)
    tokens[torch.arange(length) >= lengths[:, None]] = 0
    return tokens, torch.randint(0, 3, (batch,), generator=g)


def classify(model: nn.Module, tokens: Tensor, labels: Tensor) -> Callable[[], Evaluation]:
    def loss() -> Evaluation:
        logits = model(tokens)
        return Evaluation(cross_entropy(logits, labels), logits)

    return loss


def factors(dtype: torch.dtype = torch.float64, seed: int = 0) -> Factors:
    torch.manual_seed(seed)
    return Factors().to(dtype)


def triplets(batch: int = 9, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randint(0, 12, (batch,), generator=g),
        torch.randint(0, 20, (batch,), generator=g),
        torch.randint(0, 20, (batch,), generator=g),
    )


def rank(model: Factors, batch: tuple[Tensor, Tensor, Tensor]) -> Callable[[], Tensor]:
    def loss() -> Tensor:
        positive, negative = model(*batch)
        return F.softplus(negative - positive)

    return loss
