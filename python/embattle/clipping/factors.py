"""From the norms of the users' gradients to what the gradients are multiplied by."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Mode = Literal["flat", "per_layer", "automatic"]
Bound = float | tuple[float, ...]


@dataclass(frozen=True)
class Rule:
    """How gradients are clipped.

    Attributes:
        mode: see PerSampleClipper.
        bound: C, one number or one for each parameter.
        gamma: of "automatic".
    """

    mode: Mode
    bound: Bound
    gamma: float

    def factors(self, norms: Tensor, finite: bool) -> Tensor:
        """The factors of gradients with these norms; finite: whether all norms are."""
        limit: float | Tensor
        if isinstance(self.bound, float):
            limit, positive = self.bound, self.bound > 0
        else:
            limit = torch.as_tensor(self.bound, dtype=norms.dtype, device=norms.device)
            positive = min(self.bound) > 0
        if self.mode == "automatic":
            positive = positive and self.gamma > 0
            factors = (norms + self.gamma).reciprocal_().mul_(limit)
        else:
            factors = norms.reciprocal().mul_(limit).clamp_(max=1)
        if finite and positive:
            return factors
        # 0 / 0, and norms that are not finite: NaN gives NaN, Inf gives 0, or NaN without a bound.
        # "automatic" without gamma has infinity for a gradient of zero.
        return factors.nan_to_num_(nan=0.0, posinf=0.0)

    def sensitivity(self, parameters: int) -> float:
        """The largest norm of what one user adds to the sum."""
        if not isinstance(self.bound, float):
            return math.sqrt(sum(c * c for c in self.bound))
        return self.bound * math.sqrt(parameters) if self.mode == "per_layer" else self.bound


def noticeable(factors: Tensor, norms: Tensor) -> Tensor:
    """Factors that are NaN if most users overflowed, so that a loss scaler lowers its scale."""
    bad = ~norms.isfinite()
    lost = bad.double().mean() > 0.5
    return torch.where(lost, torch.full_like(factors, math.nan), factors)
