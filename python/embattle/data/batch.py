"""Batches: named tensors for any model, with labels and a mask of what an attacker may move."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Examples ready for a model.

    Attributes:
        inputs: the model's keyword arguments, each [B, ...].
        labels: class numbers, [B] int64.
        movable: which embeddings an attacker may move, bool of the embeddings' shape without their
            last dim, [B, T] for tokens; None lets all be moved.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    movable: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Tensor) -> Batch:
        """The examples at `rows` ([n] int64).

        Inputs with an `attention_mask` ([B, T], padded on the right) are cut to the longest of the
        examples taken.
        """
        inputs = {name: x[rows] for name, x in self.inputs.items()}
        movable = None if self.movable is None else self.movable[rows]
        attention = inputs.get("attention_mask")
        if attention is not None and len(rows):
            width = max(1, int(attention.sum(1).amax()))
            inputs = {name: x[:, :width] for name, x in inputs.items()}
            movable = None if movable is None else movable[:, :width]
        return Batch(inputs, self.labels[rows], movable)

    def split(self, size: int) -> list[Batch]:
        """The same examples in order, at most `size` in a batch."""
        rows = torch.arange(len(self))
        return [self.take(rows[i : i + size]) for i in range(0, len(self), size)]

    def to(self, device: torch.device) -> Batch:
        """The same examples on a device."""
        inputs = {name: x.to(device) for name, x in self.inputs.items()}
        movable = None if self.movable is None else self.movable.to(device)
        return Batch(inputs, self.labels.to(device), movable)
