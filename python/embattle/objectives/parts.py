"""What each sample adds to an objective."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
