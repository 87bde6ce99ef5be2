"""What all kinds of prediction have."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, ClassVar

import torch
from torch import Tensor

from embattle.criteria import Criterion
from embattle.losses import wide
from embattle.perturb.evaluation import Evaluation
from embattle.tasks.kinds.weighted import Mean, Measure


class Kind(ABC):
    """A kind of prediction.

    Attributes:
        measures: the keys of `scores` that belong in a table, each with its title; the first is the
            share of samples that are right.
        smaller_is_better: the keys of `scores` that are errors.
        note: a sentence about them.
        shown: what `show` tells, in words.
        graded: whether a measure depends on how wrong a sample is, not only on whether it is, so
            that an attack has to go on with samples that have fallen.
    """

    measures: ClassVar[tuple[tuple[str, str], ...]]
    smaller_is_better: ClassVar[frozenset[str]] = frozenset(("loss",))
    note: ClassVar[str] = ""
    shown: ClassVar[str]
    graded: ClassVar[bool] = True

    @abstractmethod
    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Give the loss of each sample, [B], with a graph."""

    @abstractmethod
    def criterion(self, labels: Tensor) -> Criterion:
        """Give what an attack is for: reached where a sample is wrong."""

    @abstractmethod
    def _scores(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        """Give the measures but the loss."""

    @abstractmethod
    def describe(self, outputs: Tensor) -> list[dict[str, Any]]:
        """Give the columns of a prediction for each sample of outputs [B, ...]."""

    @abstractmethod
    def show(self, output: Tensor, label: Tensor) -> str:
        """Show one sample's output beside its label, in a few characters."""

    def titled(self) -> list[list[str]]:
        """Give the keys of `measures` with titles that say what counts as right.

        Figures are compared under equal titles alone.
        """
        return [list(measure) for measure in self.measures]

    def show_label(self, label: Tensor) -> str:
        """Show one sample's label."""
        return str(label.tolist())

    def chance(self, labels: Tensor) -> float | None:
        """Give the share that is right if the same is always predicted; None: it is not known."""
        return None

    def learnt_nothing(self, outputs: Tensor, labels: Tensor) -> bool:
        """Tell whether one answer for all samples would be no worse; False: it is not known."""
        return False

    def scores(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        """Score outputs [N, ...] against labels [N, ...].

        Returns:
            The measures by key, and `loss`, the mean loss. NaN where a measure is not defined.

        Raises:
            ValueError: there are no samples.
        """
        if not len(labels):
            raise ValueError("scores: there are no samples to score; give at least one")
        outputs = wide(outputs)
        loss = float(self.losses(outputs, labels).mean())
        return {**self._scores(outputs, labels), "loss": loss}

    def weighted(self, outputs: Tensor, labels: Tensor) -> Mapping[str, Measure]:
        """Give the measures of `scores` as functions of how often each sample counts.

        Those that are missing here have no intervals and are not tested. By default these are the
        headline and the loss.
        """
        outputs = wide(outputs)
        return {
            self.measures[0][0]: Mean(self.right(outputs, labels)),
            "loss": Mean(self.losses(outputs, labels)),
        }

    def badness(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Tell which of a sample's outcomes under several attacks is the worst, [N]: the largest.

        Of outcomes that are as right as each other, that is. By default their losses are compared.
        """
        return self.losses(outputs, labels)

    def details(self, outputs: Tensor, labels: Tensor) -> dict[str, Any]:
        """Give what there is to say beside the scores, as JSON: `per_class`, `calibration`."""
        return {}

    def right(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Tell for each sample whether it is right, bool [N]."""
        at = Evaluation(outputs=outputs)
        reached = self.criterion(labels).reached(at, at)
        return torch.ones(len(labels), dtype=torch.bool) if reached is None else ~reached

    def to_json(self) -> dict[str, Any]:
        """Give the kind as JSON, for `from_json`."""
        return {"name": type(self).__name__, **asdict(self)}  # type: ignore[call-overload]
