"""Gradient masking: which samples' adversarial part is left out of the update.

A policy takes a batch's outcome and returns bool `[B]`, True where the sample takes part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from embattle.losses import two_sided


@dataclass(frozen=True)
class Outcome:
    """What a policy takes; everything is detached.

    Attributes:
        losses: adversarial losses, `[B]`.
        clean_losses: losses without perturbation, `[B]`, or None where no clean pass was made.
        outputs: outputs under attack, or None.
        norms: l2 norm of each sample's whole perturbation, `[B]`.
        agreement: returns, for each sample, the share of its perturbed embeddings whose nearest
            embedding of the table is still the original one, `[B]`; None without a table.
    """

    losses: Tensor
    clean_losses: Tensor | None = None
    outputs: Tensor | None = None
    norms: Tensor | None = None
    agreement: Agreement | None = None


class Agreement(Protocol):
    """Compute the nearest-embedding agreement when a policy asks for it."""

    def __call__(self) -> Tensor:
        """Return shares `[B]` in [0, 1]."""
        ...


class Masking(Protocol):
    """A policy."""

    def __call__(self, outcome: Outcome) -> Tensor:
        """Return bool `[B]`: True where the adversarial loss of the sample takes part."""
        ...


def _need(value: Tensor | None, policy: str, what: str) -> Tensor:
    if value is None:
        raise ValueError(f"{policy}: {what}")
    return value


@dataclass(frozen=True)
class LossQuantile:
    """Leave out the samples whose adversarial loss is above the batch's `quantile`."""

    quantile: float

    def __post_init__(self) -> None:
        if not 0 < self.quantile <= 1:
            raise ValueError(f"LossQuantile: quantile must lie in (0, 1], got {self.quantile}")

    def __call__(self, outcome: Outcome) -> Tensor:
        losses = outcome.losses.double()
        if losses.numel() == 0:
            return torch.ones_like(losses, dtype=torch.bool)
        # The k-th smallest, not an interpolation: with equal losses nobody is left out.
        kth = max(math.ceil(round(self.quantile * losses.numel(), 9)), 1)
        return losses <= losses.kthvalue(kth).values


@dataclass(frozen=True)
class LossBound:
    """Leave out the samples whose adversarial loss is above `bound`."""

    bound: float

    def __call__(self, outcome: Outcome) -> Tensor:
        return outcome.losses <= self.bound


@dataclass(frozen=True)
class LossRatio:
    """Leave out the samples whose adversarial loss is more than `ratio` times their clean loss."""

    ratio: float

    def __call__(self, outcome: Outcome) -> Tensor:
        clean = _need(
            outcome.clean_losses, "LossRatio", "needs clean losses; use a form with a clean pass"
        )
        return outcome.losses <= self.ratio * clean


@dataclass(frozen=True)
class NormBound:
    """Leave out the samples whose whole perturbation has an l2 norm above `bound`."""

    bound: float

    def __call__(self, outcome: Outcome) -> Tensor:
        norms = _need(
            outcome.norms, "NormBound", "needs a perturbation per sample (not scope='row')"
        )
        return norms <= self.bound


@dataclass(frozen=True)
class Confidence:
    """Leave out the samples that the model is surer of, under attack, than `highest`.

    The confidence is the largest class probability: samples that the attack has driven to a sure
    answer carry little but noise, or labels that are wrong.
    """

    highest: float

    def __post_init__(self) -> None:
        if not 0 < self.highest <= 1:
            raise ValueError(f"Confidence: highest must lie in (0, 1], got {self.highest}")

    def __call__(self, outcome: Outcome) -> Tensor:
        outputs = _need(
            outcome.outputs, "Confidence", "needs outputs; let loss_fn return (losses, logits)"
        )
        sure = two_sided(outputs).softmax(-1).amax(-1)
        return (sure if sure.dim() == 1 else sure.flatten(1).mean(1)) <= self.highest


@dataclass(frozen=True)
class NearestAgreement:
    """Leave out the samples that moved too far in meaning.

    A sample takes part if at least the share `least` of its perturbed embeddings still has the
    original row of the table as its nearest one.
    """

    least: float = 0.5

    def __call__(self, outcome: Outcome) -> Tensor:
        if outcome.agreement is None:
            raise ValueError("NearestAgreement: needs a site on an nn.Embedding, of scope 'output'")
        return outcome.agreement() >= self.least
