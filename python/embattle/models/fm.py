"""A factorisation machine on categorical fields, and, without pairs, logistic regression."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from embattle import checks, losses
from embattle.models.fields import Fields


class FM(nn.Module):
    """Rendle, "Factorization Machines", ICDM 2010, eq. 1, for fields of one value each.

    The logit is a bias, the sum of the values' weights, and the inner products of all pairs of
    their vectors. What no swap of values can do to it is known: `embattle.certify.certified_swaps`.

    `Site.embeddings(model)` perturbs the fields' vectors, or the weights where there are none.

    Args:
        sizes: how many values each categorical field has.
        dim: width of the vectors; 0 is logistic regression.
    """

    def __init__(self, sizes: Sequence[int], *, dim: int = 16) -> None:
        super().__init__()
        dim = checks.integer("FM", "dim", dim, 0)
        self.embedding = Fields(sizes, dim) if dim else None
        self.first = Fields(sizes, 1)
        self.bias = nn.Parameter(torch.zeros(()))

    def get_input_embeddings(self) -> nn.Module:
        """Give the module whose output an attacker perturbs."""
        return self.first if self.embedding is None else self.embedding

    def forward(self, values: Tensor) -> Tensor:
        """Give the logits `[B]` of values `[B, fields]` int64."""
        logits: Tensor = self.bias + self.first(values).sum((1, 2))
        if self.embedding is not None:
            vectors = self.embedding(values)
            logits = logits + (vectors.sum(1).square() - vectors.square().sum(1)).sum(1) / 2
        return logits

    def losses(self, values: Tensor, labels: Tensor) -> Tensor:
        """Give the binary cross-entropies `[B]` for labels `[B]`, integers 0 or 1."""
        return losses.cross_entropy(self(values), labels)
