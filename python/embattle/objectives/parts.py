"""What each sample adds to an objective."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from embattle.objectives.rows import Key


@dataclass(frozen=True)
class Parts:
    """What each sample adds to an objective, with its graph.

    Attributes:
        clean: clean losses `[B]`; None for the form "adversarial".
        adversarial: losses under the perturbations, `[B]`.
        kept: `[B]` factors of the adversarial losses, 0 for a masked sample; None without masking.
        lam: weight of the adversarial part.
    """

    clean: Tensor | None
    adversarial: Tensor
    kept: Tensor | None
    lam: float

    @property
    def summed(self) -> Tensor:
        """Each sample's share of the objective, `[B]`: a call returns the mean of it."""
        part = self.adversarial
        if self.kept is not None:
            part = torch.where(self.kept > 0, part, torch.zeros_like(part))
        return part if self.clean is None else self.clean + self.lam * part

    @classmethod
    def of_rows(cls, losses: Tensor, rows: Tensor, kept: Tensor | None, lam: float) -> Parts:
        """Return the parts of a batch in which some samples are perturbed and the rest is clean.

        Their sum is `sum L_rest + lam * sum L_rows`, over `(B - n + lam * n) / B`.

        Args:
            losses: `[B]`, of the training pass.
            rows: int64 `[n]`, the perturbed samples.
            kept: `[n]`, their masking; None without.
            lam: weight of a perturbed sample beside a clean one.
        """
        size, total = len(losses), len(losses) - len(rows) + lam * len(rows)
        if lam != 1 and total > 0:
            losses = losses * (size / total)
        nothing = torch.zeros_like(losses)
        chosen = torch.zeros_like(losses, dtype=torch.bool)
        chosen[rows] = True
        if kept is not None:
            kept = nothing.detach().index_copy(0, rows, kept)
        return cls(
            torch.where(chosen, nothing, losses), torch.where(chosen, losses, nothing), kept, lam
        )


def mean_of_rows(losses: Tensor, rows: Key, kept: Tensor | None, lam: float) -> Tensor:
    """Return the mean of what `Parts.of_rows` gives, in fewer ops.

    Args:
        losses, kept, lam: as there.
        rows: which samples are perturbed.
    """
    if kept is not None:  # a sample that is left out adds nothing, not even a NaN
        left_out = torch.zeros_like(losses, dtype=torch.bool)
        left_out[rows] = kept <= 0
        losses = losses.masked_fill(left_out, 0.0)
    if lam == 1:
        return losses.mean()
    weights = torch.ones_like(losses)
    weights[rows] = lam
    size = len(losses)
    count = rows.stop - rows.start if isinstance(rows, slice) else len(rows)
    total = size - count + lam * count
    return (losses * weights).sum() / (total if total > 0 else size)
