"""What an attack found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from embattle.perturb.stage import Stage


@dataclass(frozen=True)
class AttackResult:
    """The worst perturbations that an attack found for one batch.

    Everything stays on the device; nothing waits for it until you read a value.

    Attributes:
        deltas: one tensor for each perturbed output (row scope: `[distinct rows, dim]`).
        clean_losses: losses without perturbation, `[B]`.
        losses: losses under `deltas`, `[B]`.
        clean_predictions, predictions: predictions without and with it; None if the loss function
            returns no outputs.
        success: bool `[B]`: right before and wrong now where `labels` were given, else changed.
            None without predictions.
        steps: gradient steps made for each sample, int64 `[B]`.
    """

    deltas: list[Tensor]
    clean_losses: Tensor
    losses: Tensor
    clean_predictions: Tensor | None
    predictions: Tensor | None
    success: Tensor | None
    steps: Tensor
    norm: str | float = field(repr=False)
    stage: Stage = field(repr=False)

    @property
    def norms(self) -> list[Tensor]:
        """The norms of each delta's groups, `[groups]` each."""
        return [block.norms(self.norm) for block in self.stage.blocks]

    @property
    def nonfinite(self) -> Tensor:
        """How many groups ever had a gradient with a NaN or Inf (a 0-d int64 tensor)."""
        counts = [(block.nonfinite > 0).sum() for block in self.stage.blocks]
        return torch.stack(counts).sum()

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Perturb the model inside the block: its forward passes then see the deltas.

        The deltas are constants there: gradients reach the model's weights, as training needs it.
        """
        with self.stage.applied():
            yield
