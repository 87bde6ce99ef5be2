"""Goals about values: away from a regression's targets, or from the clean outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from embattle import checks, losses
from embattle.criteria.base import Criterion, any_of, constant, largest, require, required_outputs
from embattle.criteria.classes import logits
from embattle.perturb.evaluation import Evaluation


@dataclass(frozen=True, eq=False, repr=False)
class Deviate(Criterion):
    """A wrong value: reached where any output of a sample is more than `by` off its target.

    Args:
        targets: the right values, of the outputs' shape; integers or floating point.
        by: how far off counts, above 0: one number, or `[B]`.
        ascend: `"loss"`: the losses that the loss function returns, or the distance if it returns
            none; `"distance"`: the largest `|outputs - targets|` of each sample. Where they are
            equal its gradient is that of larger outputs, not 0, so that clean outputs can be
            targets.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: targets that are no finite values, `by` is not above 0, or `ascend` is unknown.
    """

    targets: Tensor
    by: float | Tensor
    ascend: Literal["loss", "distance"] = "loss"

    per_sample: ClassVar[tuple[str, ...]] = ("targets", "by")
    needs_outputs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        targets, by = self.targets, self.by
        if not isinstance(targets, Tensor):
            raise TypeError(f"Deviate: targets must be a tensor, got {type(targets).__name__}")
        if targets.dtype == torch.bool or targets.is_complex():
            raise ValueError(
                f"Deviate: targets must be values, got {tuple(targets.shape)} of {targets.dtype}; "
                "embattle.Misclassify and embattle.MultiLabel take labels"
            )
        require(
            targets.isfinite(),
            targets,
            "Deviate: targets must be finite; leave out samples without a target",
        )
        object.__setattr__(self, "targets", constant(targets))
        if isinstance(by, Tensor):
            if by.dim() != 1 or by.dtype == torch.bool or by.is_complex():
                raise ValueError(
                    f"Deviate: by must be a number or [B] numbers, got {tuple(by.shape)} of "
                    f"{by.dtype}"
                )
            require((by > 0) & by.isfinite(), by, "Deviate: by must be above 0 and finite")
            object.__setattr__(self, "by", constant(by))
        else:
            number = checks.real("Deviate", "by", by, 0)
            if number == 0:
                raise ValueError("Deviate: by must be above 0, got 0")
            object.__setattr__(self, "by", number)
        checks.one_of("Deviate", "ascend", self.ascend, ("loss", "distance"))

    def check(self, clean: Evaluation) -> None:
        """Check the shape of the targets.

        Raises:
            ValueError: another shape than the outputs', or `by` for another number of samples.
        """
        self._distances(logits("Deviate", clean))
        super().check(clean)

    def objective(self, now: Evaluation, clean: Evaluation | None) -> Tensor:
        """Return the losses, or what `ascend` names."""
        if self.ascend == "loss" and now.losses is not None:
            return now.losses
        return largest(self._distances(required_outputs("Deviate", now)))

    def reached(self, now: Evaluation, clean: Evaluation | None) -> Tensor:
        """Return True where an output is more than `by` off, or no number."""
        distances, by = self._both(now)
        return any_of((distances <= by).logical_not())

    def predict(self, outputs: Tensor) -> Tensor:
        """Return the outputs: the values are the predictions."""
        return outputs

    def accuracy(self, now: Evaluation) -> Tensor:
        """Return the share of outputs that are at most `by` off."""
        distances, by = self._both(now)
        return (distances <= by).to(torch.get_default_dtype()).mean()

    def _both(self, now: Evaluation) -> tuple[Tensor, Tensor | float]:
        distances, by = self._distances(required_outputs("Deviate", now)), self.by
        if isinstance(by, Tensor):
            by = by.reshape(-1, *[1] * (distances.dim() - 1))
        return distances, by

    def _distances(self, outputs: Tensor) -> Tensor:
        targets = self.targets
        if targets.shape != outputs.shape:
            hint = ""
            if targets.numel() == outputs.numel():
                hint = f"; use targets.reshape({tuple(outputs.shape)}) if they are in that order"
            raise ValueError(
                f"Deviate: targets must have the outputs' shape {tuple(outputs.shape)}; got "
                f"targets {tuple(targets.shape)}{hint}"
            )
        off = outputs - targets
        return torch.where(off < 0, -off, off)


@dataclass(frozen=True, eq=False, repr=False)
class Diverge(Criterion):
    """Other outputs than the clean ones, without labels, as virtual adversarial training has it.

    Reached where the predicted class is another one, at any place of a sequence (padding is one:
    leave it out of the outputs). The squared distance is for outputs that are no logits: it has no
    goal, and makes no predictions.

    Args:
        divergence: from the clean outputs to those under attack: `"kl"`, `"symmetric_kl"` or
            `"squared_distance"` (see `embattle.losses`).

    Raises:
        ValueError: unknown divergence.
    """

    divergence: Literal["kl", "symmetric_kl", "squared_distance"] = "kl"

    needs_outputs: ClassVar[bool] = True
    needs_clean: ClassVar[bool] = True

    def __post_init__(self) -> None:
        checks.one_of("Diverge", "divergence", self.divergence, tuple(losses.DIVERGENCES))

    def check(self, clean: Evaluation) -> None:
        """Check that there are outputs in floating point."""
        logits("Diverge", clean)
        super().check(clean)

    def objective(self, now: Evaluation, clean: Evaluation | None) -> Tensor:
        """Return the divergence from the clean outputs, which count as constant."""
        divergence = losses.DIVERGENCES[self.divergence]
        return divergence(_clean(clean).detach(), required_outputs("Diverge", now))

    def reached(self, now: Evaluation, clean: Evaluation | None) -> Tensor | None:
        """Return True where the predicted class is not the clean one, or is none."""
        if self.divergence == "squared_distance":
            return None
        before, after = (
            losses.predict(_clean(clean)),
            losses.predict(required_outputs("Diverge", now)),
        )
        return any_of((before != after) & (before >= 0))

    def predict(self, outputs: Tensor) -> Tensor | None:
        """Return the class with the largest logit; -1 where one is NaN."""
        return None if self.divergence == "squared_distance" else losses.predict(outputs)


def _clean(clean: Evaluation | None) -> Tensor:
    if clean is None:
        raise ValueError("Diverge: compares with the clean outputs, and there are none")
    return required_outputs("Diverge", clean)
