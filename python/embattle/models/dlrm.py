"""DLRM: inner products of the vectors of all fields between two perceptrons."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embattle import checks, losses
from embattle.models.fields import Fields, perceptron


class DLRM(nn.Module):
    """DLRM: Naumov et al., "Deep Learning Recommendation Model for Personalization and
    Recommendation Systems", arXiv 1906.00091, 2019.

    A perceptron makes one more vector of the dense features; the inner products of all pairs of
    vectors, joined with that vector, go through a second one, which gives the logit (section 2.2).

    `Site.embeddings(model)` perturbs the fields' vectors, `Site(model.numbers)` the dense features,
    there `[B, dense, 1]`: a mask `[B, dense]` says which may move.

    Args:
        sizes: how many values each categorical field has.
        dense: how many dense features there are.
        dim: width of the vectors.
        bottom, top: widths of the perceptrons' hidden layers.
        dropout: in the perceptrons.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        dense: int,
        *,
        dim: int = 16,
        bottom: Sequence[int] = (32,),
        top: Sequence[int] = (64, 32),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        dense = checks.integer("DLRM", "dense", dense, 1)
        self.embedding = Fields(sizes, dim)
        self.numbers = nn.Identity()
        self.bottom = perceptron([dense, *bottom, dim], dropout=dropout)
        count = len(sizes) + 1
        self.top = perceptron([dim + count * (count - 1) // 2, *top, 1], dropout=dropout)
        self.register_buffer("pairs", torch.tril_indices(count, count, -1), persistent=False)

    def get_input_embeddings(self) -> nn.Module:
        """Give the module whose output an attacker perturbs."""
        return self.embedding

    def forward(self, values: Tensor, dense: Tensor) -> Tensor:
        """Give the logits `[B]` of values `[B, fields]` int64 and features `[B, dense]`."""
        dense = self.numbers(dense.unsqueeze(2)).squeeze(2)
        own = F.relu(self.bottom(dense))
        vectors = torch.cat([own.unsqueeze(1), self.embedding(values)], dim=1)
        one, two = self.get_buffer("pairs")
        products = (vectors @ vectors.mT)[:, one, two]
        logits: Tensor = self.top(torch.cat([own, products], dim=1)).squeeze(1)
        return logits

    def losses(self, values: Tensor, dense: Tensor, labels: Tensor) -> Tensor:
        """Give the binary cross-entropies `[B]` for labels `[B]`, integers 0 or 1."""
        return losses.cross_entropy(self(values, dense), labels)
