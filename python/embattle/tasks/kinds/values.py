"""Values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from embattle import losses
from embattle.criteria import Criterion, Deviate
from embattle.tasks.kinds.base import Kind
from embattle.tasks.kinds.weighted import Determination, Mean, Measure, Root, at_once


@dataclass(frozen=True)
class Regression(Kind):
    """A value: outputs [B], labels [B] in floating point.

    Args:
        within: a prediction counts as right if it is off by at most this.
    """

    within: float

    measures: ClassVar[tuple[tuple[str, str], ...]] = (
        ("within", "close enough"),
        ("mae", "MAE"),
        ("r2", "R2"),
    )
    smaller_is_better: ClassVar[frozenset[str]] = frozenset(("loss", "mae", "rmse"))
    note: ClassVar[str] = (
        "Close enough: share of predictions that count as right. MAE: mean absolute error."
    )
    shown: ClassVar[str] = "predicted value"

    def titled(self) -> list[list[str]]:
        """Give them with what is close enough: `close enough (0.5)`."""
        (key, title), *others = super().titled()
        return [[key, f"{title} ({self.within:g})"], *others]

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Give the squared error."""
        if outputs.shape != labels.shape:
            raise ValueError(
                f"Regression: outputs {tuple(outputs.shape)} and labels {tuple(labels.shape)} must "
                "have one shape, [B]; squeeze the outputs' last dim"
            )
        return losses.per_sample((outputs - labels.to(outputs)).square())

    def criterion(self, labels: Tensor) -> Criterion:
        """Give the goal of a prediction that is too far off; its distance has a gradient at 0."""
        return Deviate(labels, by=self.within, ascend="distance")

    def _scores(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        """Share that is close enough, mean absolute error, coefficient of determination, RMSE."""
        found = at_once(self.weighted(outputs, labels), labels)
        return {key: found[key] for key in ("within", "mae", "r2", "rmse")}

    def weighted(self, outputs: Tensor, labels: Tensor) -> Mapping[str, Measure]:
        """Give the share that is close enough, MAE, R2, RMSE and the loss."""
        off = outputs.double() - labels.double()
        return {
            "within": Mean(self.right(outputs, labels)),
            "mae": Mean(off.abs()),
            "r2": Determination(off, labels),
            "rmse": Root(off.square()),
            "loss": Mean(self.losses(losses.wide(outputs), labels)),
        }

    def describe(self, outputs: Tensor) -> list[dict[str, Any]]:
        """Give `prediction`, the value."""
        return [{"prediction": value} for value in outputs.tolist()]

    def show(self, output: Tensor, label: Tensor) -> str:
        """Show the value."""
        return f"{float(output):.4g}"

    def show_label(self, label: Tensor) -> str:
        """Show the value."""
        return f"{float(label):.4g}"
