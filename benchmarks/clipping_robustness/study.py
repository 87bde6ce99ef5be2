"""The experiment's order: tune on clean validation data, then train under attack on other seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import embattle as eb
import torch
from torch import Tensor, nn

TUNING_SEED = 1000  # no seed of the reported runs


@dataclass(frozen=True)
class Clip:
    """What is clipped: nothing ("none"), each sample, or each user's joint gradient."""

    unit: str = "none"
    max_norm: float = math.inf


@dataclass(frozen=True)
class Fit:
    """One training run.

    Attributes:
        validation: the clean validation figure after each epoch.
        test: name of a figure to its value at the end.
        norms: norms of the last epoch's units, where something was clipped.
    """

    validation: list[float]
    test: dict[str, float]
    norms: list[float]


class Task(Protocol):
    """A model, its data, and the attacks on them.

    Attributes:
        name: for the report.
        about: what is trained and measured, a sentence or two.
        quality: which figure of `Fit.test` says how good the model is.
        smaller_is_better: whether a small `quality` (and validation figure) is a good one.
        attacks: name to what it does; "none" comes first.
        units: units of clipping that the data allows.
        rates: learning rates to choose from.
        epochs: epochs to choose from: 1 to this.
    """

    name: str
    about: str
    quality: str
    smaller_is_better: bool
    attacks: dict[str, str]
    units: tuple[str, ...]
    rates: tuple[float, ...]
    epochs: int

    def fit(self, clip: Clip, rate: float, epochs: int, seed: int, attack: str) -> Fit:
        """Trains once; the seed decides first weights, batches, and the attack's draws."""
        ...


@dataclass
class Arm:
    """One way to clip, tuned, and its figures under every attack.

    Attributes:
        unit: see `Clip`.
        share: max_norm over the median norm of the plainly trained model's units.
        max_norm: see `Clip`.
        rate: the chosen learning rate.
        epochs: the chosen number of epochs.
        validation: the clean validation figure that they were chosen for.
        chosen: whether this is the strength that the rule of `run` picks for its unit.
        figures: attack to figure to its values, one for each seed.
    """

    unit: str
    share: float
    max_norm: float
    rate: float = 0.0
    epochs: int = 0
    validation: float = math.nan
    chosen: bool = False
    figures: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def mean(self, attack: str, figure: str) -> float:
        return statistics.fmean(self.figures[attack][figure])

    def spread(self, attack: str, figure: str) -> float:
        """Standard deviation over the seeds."""
        values = self.figures[attack][figure]
        return statistics.stdev(values) if len(values) > 1 else 0.0


def fits(task: Task, shares: Sequence[float], seeds: int) -> int:
    """How many training runs `run` makes."""
    arms = 1 + len(task.units) * len(shares)
    return arms * (len(task.rates) + seeds * len(task.attacks)) + len(task.units)


def run(
    task: Task,
    shares: Sequence[float],
    seeds: int,
    tolerance: float,
    tick: Callable[[], None],
) -> dict[str, Any]:
    """Tunes and measures all arms.

    Learning rate and number of epochs of every arm, and the strength that counts as chosen, come
    from clean validation data alone: the chosen strength is the smallest max_norm whose validation
    figure is at most `tolerance` (relative) worse than without clipping.

    Args:
        task: what to train.
        shares: strengths: max_norm over the median norm of the plain model's units.
        seeds: runs for each arm and attack.
        tolerance: see above.
        tick: called after each training run.

    Returns:
        What the report needs, ready for JSON.
    """
    plain = Arm("none", math.inf, math.inf)
    _tune(task, plain, tick)
    arms = [plain]
    sign = 1.0 if task.smaller_is_better else -1.0
    for unit in task.units:
        seen = task.fit(Clip(unit), plain.rate, plain.epochs, TUNING_SEED, "none").norms
        tick()
        median = statistics.median(seen)
        own = [Arm(unit, share, share * median) for share in sorted(shares)]
        for arm in own:
            _tune(task, arm, tick)
        bound = plain.validation + sign * tolerance * plain.validation
        near = [arm for arm in own if sign * arm.validation <= sign * bound]
        if near:
            near[0].chosen = True
        arms += own
    for arm in arms:
        for attack in task.attacks:
            found = arm.figures.setdefault(attack, {})
            for seed in range(seeds):
                fit = task.fit(Clip(arm.unit, arm.max_norm), arm.rate, arm.epochs, seed, attack)
                for figure, value in fit.test.items():
                    found.setdefault(figure, []).append(value)
                tick()
    return {
        "name": task.name,
        "about": task.about,
        "quality": task.quality,
        "smaller_is_better": task.smaller_is_better,
        "attacks": task.attacks,
        "rates": task.rates,
        "epochs": task.epochs,
        "arms": [asdict(arm) for arm in arms],
    }


def _tune(task: Task, arm: Arm, tick: Callable[[], None]) -> None:
    """Gives the arm the rate and the number of epochs with the best clean validation figure."""
    sign = 1.0 if task.smaller_is_better else -1.0
    best = math.inf
    for rate in task.rates:
        clip = Clip(arm.unit, arm.max_norm)
        figures = task.fit(clip, rate, task.epochs, TUNING_SEED, "none").validation
        tick()
        for epoch, figure in enumerate(figures, 1):
            if sign * figure < best:
                best = sign * figure
                arm.rate, arm.epochs, arm.validation = rate, epoch, figure
    if best == math.inf:
        raise RuntimeError(f"{task.name}: no learning rate of {task.rates} trains {arm.unit}")


class Stepper:
    """Optimiser steps with or without clipping; the same scale of gradients either way."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, clip: Clip) -> None:
        self._model, self._optimizer, self._clip = model, optimizer, clip
        self._clipper = eb.PerSampleClipper(model, clip.max_norm, reduction="sum")
        self.norms: list[Tensor] = []

    def step(self, losses: Callable[[], Tensor], users: Tensor | None = None) -> None:
        """One step on the mean of the losses [B].

        Args:
            losses: calls the model.
            users: [B] whose sample each is.
        """
        self._optimizer.zero_grad()
        if self._clip.unit == "none":
            losses().mean().backward()
        else:
            with self._clipper:
                found = losses()
                own = users if self._clip.unit == "user" else None
                result = self._clipper.backward(found, users=own, scale=1 / len(found))
            self.norms.append(result.norms)
        self._optimizer.step()

    def take_norms(self) -> list[float]:
        """The norms since the last call."""
        taken, self.norms = self.norms, []
        return torch.cat(taken).tolist() if taken else []
