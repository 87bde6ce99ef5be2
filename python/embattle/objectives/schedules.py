"""Schedules: a factor for each step: on eps and step size, on lambda, or on the attack's steps."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from embattle import checks


class Schedule(Protocol):
    """A factor for each step; with a method `update` it gets the metrics, too."""

    def __call__(self, step: int) -> float:
        """Return the factor at a step, counted from 0."""
        ...


def factor_at(who: str, name: str, schedule: Schedule, step: int) -> float:
    """Ask a schedule for its factor at a step; True and False are 1 and 0.

    Raises:
        TypeError: it is no number.
        ValueError: it is negative, or not finite.
    """
    found: Any = schedule(step)
    if isinstance(found, (Tensor, np.ndarray, np.generic)) and math.prod(found.shape) == 1:
        found = found.item()
    if isinstance(found, bool):
        found = float(found)
    return checks.real(who, f"the factor of {name} at step {step}", found, 0)


def _at_least(name: str, value: float, least: float) -> None:
    if not value >= least:
        raise ValueError(f"{name} must be at least {least:g}, got {value}")


@dataclass(frozen=True)
class Constant:
    """The same factor at every step."""

    value: float = 1.0

    def __post_init__(self) -> None:
        _at_least("Constant: value", self.value, 0)

    def __call__(self, step: int) -> float:
        return self.value


@dataclass(frozen=True)
class WarmUp:
    """Linear from `start` to 1 over `steps` steps, then 1.

    Args:
        steps: length of the ramp; the factor is 1 from this step on.
        start: factor at step 0.
        delay: steps that are spent at `start` before the ramp.
    """

    steps: int
    start: float = 0.0
    delay: int = 0

    def __post_init__(self) -> None:
        _at_least("WarmUp: steps", self.steps, 0)
        _at_least("WarmUp: start", self.start, 0)
        _at_least("WarmUp: delay", self.delay, 0)

    def __call__(self, step: int) -> float:
        if step >= self.delay + self.steps:
            return 1.0
        if step <= self.delay:
            return self.start
        return self.start + (1 - self.start) * (step - self.delay) / self.steps


@dataclass(frozen=True)
class Cosine:
    """From `start` to `end` over `steps` steps along half a cosine, then `end`."""

    steps: int
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        _at_least("Cosine: steps", self.steps, 1)
        _at_least("Cosine: start", self.start, 0)
        _at_least("Cosine: end", self.end, 0)

    def __call__(self, step: int) -> float:
        share = min(step / self.steps, 1.0)
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * share)) / 2


@dataclass
class Adaptive:
    """Grow while the model holds a robust accuracy, back off when it falls below.

    Every `every` steps the mean robust accuracy of those steps is compared with `target`: the
    factor grows by `grow` if it is held, else it is multiplied by `shrink`. Only then is a value
    read back from the device. Needs a loss function that returns outputs, and labels.

    Args:
        target: robust accuracy to hold, in (0, 1).
        start: first factor.
        grow: added when the target is held.
        shrink: multiplied with when it is not.
        every: steps between decisions.
        highest, lowest: bounds of the factor.
    """

    target: float
    start: float = 0.1
    grow: float = 0.1
    shrink: float = 0.7
    every: int = 20
    highest: float = 1.0
    lowest: float = 0.0
    factor: float = field(init=False)
    _seen: list[Tensor] = field(init=False, default_factory=list, repr=False)

    def __post_init__(self) -> None:
        if not 0 < self.target < 1:
            raise ValueError(f"Adaptive: target must lie between 0 and 1, got {self.target}")
        if not 0 < self.shrink < 1:
            raise ValueError(f"Adaptive: shrink must lie between 0 and 1, got {self.shrink}")
        _at_least("Adaptive: start", self.start, 0)
        _at_least("Adaptive: grow", self.grow, 0)
        _at_least("Adaptive: every", self.every, 1)
        _at_least("Adaptive: lowest", self.lowest, 0)
        _at_least("Adaptive: highest", self.highest, self.lowest)
        self.factor = min(max(self.start, self.lowest), self.highest)

    def __call__(self, step: int) -> float:
        return self.factor

    def update(self, metrics: dict[str, Tensor]) -> None:
        """Collect the robust accuracy of a step; one without an attack (lam 0) has none."""
        if "robust_accuracy" not in metrics:
            if "adversarial_loss" not in metrics:
                return
            raise ValueError(
                "Adaptive: needs the robust accuracy; let loss_fn return (losses, logits) and pass "
                "labels to the objective"
            )
        self._seen.append(metrics["robust_accuracy"].detach())
        if len(self._seen) < self.every:
            return
        # A batch in which no label counts has no accuracy.
        known = [x for x in map(float, self._seen) if math.isfinite(x)]
        self._seen.clear()
        if not known:
            return
        accuracy = sum(known) / len(known)
        if accuracy >= self.target:
            self.factor = min(self.factor + self.grow, self.highest)
        else:
            self.factor = max(self.factor * self.shrink, self.lowest)

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs."""
        return {"factor": self.factor, "seen": [float(value) for value in self._seen]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state."""
        import torch

        self.factor = float(state["factor"])
        self._seen = [torch.tensor(value) for value in state["seen"]]
