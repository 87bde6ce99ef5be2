"""Batches: named tensors for any model, with labels and a mask of what an attacker may move."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Samples ready for a model.

    Attributes:
        inputs: the model's keyword arguments, each [B, ...].
        labels: what is right, [B, ...]: class numbers in int64, values, items; None where that is
            not known.
        movable: which embeddings an attacker may move, bool of the embeddings' shape without their
            last dim, [B, T] for tokens; None lets all be moved.
    """

    inputs: dict[str, Tensor]
    labels: Tensor | None = None
    movable: Tensor | None = None

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    def known_labels(self) -> Tensor:
        """Give the labels.

        Raises:
            ValueError: there are none.
        """
        if self.labels is None:
            raise ValueError("this batch has no labels: it can be predicted, and nothing else")
        return self.labels

    def take(self, rows: Tensor, *, cut: bool = True) -> Batch:
        """The samples at `rows` ([n] int64).

        Inputs as wide as their `attention_mask` ([B, T], padded on the right) are cut to the
        longest of the samples taken, unless `cut` is False.
        """
        inputs = {name: x[rows] for name, x in self.inputs.items()}
        labels = None if self.labels is None else self.labels[rows]
        movable = None if self.movable is None else self.movable[rows]
        attention = inputs.get("attention_mask")
        if cut and attention is not None and len(rows):
            width, shape = max(1, int(attention.sum(1).amax())), attention.shape
            inputs = {
                name: x[:, :width] if x.shape[:2] == shape else x for name, x in inputs.items()
            }
            movable = None if movable is None else movable[:, :width]
        return Batch(inputs, labels, movable)

    def split(self, size: int) -> list[Batch]:
        """The same samples in order, at most `size` in a batch."""
        rows = torch.arange(len(self))
        return [self.take(rows[i : i + size]) for i in range(0, len(self), size)]

    def to(self, device: torch.device) -> Batch:
        """The same samples on a device."""
        inputs = {name: x.to(device) for name, x in self.inputs.items()}
        labels = None if self.labels is None else self.labels.to(device)
        movable = None if self.movable is None else self.movable.to(device)
        return Batch(inputs, labels, movable)


def first_samples(batches: Sequence[Batch], count: int) -> list[Batch]:
    """The first samples of batches, `count` at most."""
    found: list[Batch] = []
    for batch in batches:
        if count <= 0:
            break
        found.append(batch if len(batch) <= count else batch.take(torch.arange(count)))
        count -= len(batch)
    return found
