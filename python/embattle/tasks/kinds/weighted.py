"""Measures as functions of how often each sample counts.

A bootstrap draws the samples anew some thousand times, and a permutation test exchanges the outputs
of two models as often: with weights, [R, N], each of these is one pass of matrices over all draws.
Weights of one give the measure itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class Measure(ABC):
    """A measure of N samples."""

    @abstractmethod
    def __call__(self, weights: Tensor) -> Tensor:
        """Give the measure for each row of weights.

        Args:
            weights: how often each sample counts, [R, N] float64, at least 0.

        Returns:
            [R] float64; NaN where it is not defined.
        """


class Mean(Measure):
    """The mean of a value of each sample.

    Args:
        values: [N]; of truth values it is a share.
    """

    def __init__(self, values: Tensor) -> None:
        self.is_share = values.dtype == torch.bool
        self.values = values.double()

    def __call__(self, weights: Tensor) -> Tensor:
        """Give the weighted mean."""
        return weights @ self.values / weights.sum(1)


class Root(Mean):
    """The root of a mean: of squared errors, the RMSE."""

    def __call__(self, weights: Tensor) -> Tensor:
        """Give the root of the weighted mean."""
        return super().__call__(weights).sqrt()


class MeanOf(Measure):
    """The mean of several measures.

    Args:
        parts: the measures.
        every: all must be defined; else the mean is of those that are.
    """

    def __init__(self, parts: Sequence[Measure], *, every: bool = False) -> None:
        self._parts, self._every = parts, every

    def __call__(self, weights: Tensor) -> Tensor:
        """Give the mean, NaN where none is defined, or where `every` one must be and is not."""
        found = torch.stack([part(weights) for part in self._parts], dim=1)
        return found.mean(1) if self._every else found.nanmean(1)


class F1(Measure):
    """The mean of the F1 scores of several labels, 2 TP / (2 TP + FP + FN).

    Args:
        predicted, true: whether a sample is predicted to have, and has, each label: bool [N, C].
        absent: what a label counts that is neither predicted nor there; None: it is left out.
    """

    def __init__(self, predicted: Tensor, true: Tensor, absent: float | None = None) -> None:
        self._hits = (predicted & true).double()
        self._named = predicted.double() + true.double()
        self._absent = absent

    def __call__(self, weights: Tensor) -> Tensor:
        """Give the mean over the labels."""
        named = weights @ self._named
        missing = float("nan") if self._absent is None else self._absent
        scores = torch.where(named > 0, 2 * (weights @ self._hits) / named, missing)
        return scores.nanmean(1)


class Area(Measure):
    """The area under the ROC curve: the share of pairs in the right order, equal scores half.

    Args:
        scores: [N]; higher for positives.
        positive: bool [N].
        known: bool [N], the samples that count; None: all.
    """

    def __init__(self, scores: Tensor, positive: Tensor, known: Tensor | None = None) -> None:
        # A score that is no number is as bad as can be.
        scores = torch.where(scores.isnan(), torch.where(positive, -torch.inf, torch.inf), scores)
        self._positive = positive.nonzero().flatten()
        others = ~positive if known is None else known & ~positive
        negative = others.nonzero().flatten()
        below, order = scores[negative].sort()
        self._negative = negative[order]
        mine = scores[self._positive]
        self._lower = torch.searchsorted(below, mine)
        self._upper = torch.searchsorted(below, mine, right=True)

    def __call__(self, weights: Tensor) -> Tensor:
        """Give the weighted share, NaN where positives or negatives are missing."""
        ours = weights[:, self._positive]
        theirs = weights[:, self._negative].cumsum(1)
        theirs = torch.cat([theirs.new_zeros(len(theirs), 1), theirs], dim=1)
        before = (theirs[:, self._lower] + theirs[:, self._upper]) / 2
        pairs = ours.sum(1) * theirs[:, -1]
        return (ours * before).sum(1) / pairs  # 0 / 0 is NaN


class Determination(Measure):
    """The coefficient of determination, R2.

    Args:
        errors, labels: [N].
    """

    def __init__(self, errors: Tensor, labels: Tensor) -> None:
        self._squares = errors.double().square()
        # About the mean of all: sums of squares of large numbers would lose their digits.
        labels = labels.double()
        self._labels = labels - labels.mean()
        # What rounding leaves where all labels are one: of this sample, and of one drawn from it.
        rounding = (1e-14 * labels.abs().amax()).square()
        self._floor = (1e-12 * self._labels.square().mean()).clamp(min=rounding)

    def __call__(self, weights: Tensor) -> Tensor:
        """Give R2, NaN where all labels are one."""
        total = weights.sum(1)
        mean = weights @ self._labels / total
        spread = weights @ self._labels.square() - total * mean.square()
        spread = torch.where(spread > self._floor * total, spread, float("nan"))
        return 1 - weights @ self._squares / spread


def at_once(measures: Mapping[str, Measure], labels: Tensor) -> dict[str, float]:
    """Measures of the samples with labels [N, ...], each of which counts once."""
    once = torch.ones(1, len(labels), dtype=torch.float64, device=labels.device)
    return {key: float(measure(once)) for key, measure in measures.items()}
