"""Embeddings of categorical fields, and multi-layer perceptrons, for CTR models."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from embattle import checks


class Fields(nn.Embedding):
    """One table for all fields, in which each has rows of its own.

    Args:
        sizes: how many values each field has; a field's values are numbered from 0.
        dim: width of the vectors.
        std: standard deviation of the first vectors.
    """

    offsets: Tensor
    counts: Tensor

    def __init__(self, sizes: Sequence[int], dim: int, *, std: float = 0.01) -> None:
        sizes = [checks.integer("Fields", "sizes", size, 1) for size in sizes]
        super().__init__(sum(sizes), dim)
        nn.init.normal_(self.weight, std=std)
        self.sizes = sizes
        starts = torch.tensor([0, *sizes[:-1]]).cumsum(0)
        self.register_buffer("offsets", starts, persistent=False)
        self.register_buffer("counts", torch.tensor(sizes), persistent=False)

    def forward(self, values: Tensor) -> Tensor:
        """Give the vectors `[B, fields, dim]` of values `[B, fields]` int64.

        Raises:
            IndexError: a value that its field does not have (on CUDA it is raised later).
        """
        # What a field does not have would be a value of another one: it is sent past the table.
        there = (values >= 0) & (values < self.counts)
        rows = torch.where(there, values + self.offsets, self.num_embeddings)
        try:
            return super().forward(rows)
        except IndexError as error:
            raise IndexError(
                f"Fields: values must be numbers below the sizes of their fields, {self.sizes}; "
                f"got {values[~there.all(-1)][0].tolist()}"
            ) from error


def perceptron(widths: Sequence[int], *, dropout: float = 0.0) -> nn.Sequential:
    """Linear layers of these widths with ReLU and dropout between them."""
    layers: list[nn.Module] = []
    for number, (inner, outer) in enumerate(pairwise(widths)):
        if number:
            layers += [nn.ReLU(), nn.Dropout(dropout)]
        layers.append(nn.Linear(inner, outer))
    return nn.Sequential(*layers)
