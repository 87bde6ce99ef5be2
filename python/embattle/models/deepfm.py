"""DeepFM: a factorisation machine and a perceptron on the same embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from embattle import losses
from embattle.models.fields import Fields, perceptron


class DeepFM(nn.Module):
    """DeepFM: Guo et al., "DeepFM: A Factorization-Machine based Neural Network for CTR
    Prediction", IJCAI 2017.

    The logit is `y_FM + y_DNN` (their eq. 1): `y_FM` the sum of the values' weights and of the
    inner products of all pairs of their vectors (eq. 2), `y_DNN` a perceptron of the vectors joined
    (eq. 3-4).

    `Site.embeddings(model)` perturbs the fields' vectors.

    Args:
        sizes: how many values each categorical field has.
        dim: width of the vectors.
        hidden: widths of the perceptron's hidden layers.
        dropout: in the perceptron.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        dim: int = 16,
        hidden: Sequence[int] = (64, 64),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.embedding = Fields(sizes, dim)
        self.first = Fields(sizes, 1)
        self.bias = nn.Parameter(torch.zeros(()))
        self.deep = perceptron([len(sizes) * dim, *hidden, 1], dropout=dropout)

    def get_input_embeddings(self) -> nn.Module:
        """Give the module whose output an attacker perturbs."""
        return self.embedding

    def forward(self, values: Tensor) -> Tensor:
        """Give the logits `[B]` of values `[B, fields]` int64."""
        vectors = self.embedding(values)
        pairs = (vectors.sum(1).square() - vectors.square().sum(1)).sum(1) / 2
        first = self.first(values).sum((1, 2))
        deep: Tensor = self.deep(vectors.flatten(1)).squeeze(1)
        logits: Tensor = self.bias + first + pairs + deep
        return logits

    def losses(self, values: Tensor, labels: Tensor) -> Tensor:
        """Give the binary cross-entropies `[B]` for labels `[B]`, integers 0 or 1."""
        return losses.cross_entropy(self(values), labels)
