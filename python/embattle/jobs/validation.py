"""Looks at the validation part during a training: which weights are taken, and when it ends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from embattle.audit.evaluation import evaluate, predict
from embattle.audit.examine import labels_of
from embattle.data.batch import Batch, first_samples
from embattle.jobs.checkpoint import model_tensors, restore_model
from embattle.jobs.recipe import Recipe
from embattle.jobs.threat import make_attack
from embattle.jobs.variant_recipe import AttackedVariant
from embattle.perturb.site import Site
from embattle.tasks.base import Task

_CHOSEN = "chosen."


class Validation:
    """What was seen on the validation part, and the weights that were best there.

    Args:
        recipe: the job; its `train.validation` is there.
        name: the variant's.
        task: has read its data.
        model: the model, not wrapped.
        sites: where it is attacked.

    Attributes:
        looks: the figures of each look: `step` (how many were made), each measure of the task's
            kind, and each under attack, as `robust_*`.
        chosen: the step of the best look so far; None where the last weights are taken.
    """

    def __init__(
        self, recipe: Recipe, name: str, task: Task, model: nn.Module, sites: Sequence[Site]
    ) -> None:
        assert recipe.train.validation is not None
        self.recipe, self.options = recipe, recipe.train.validation
        self.steps = recipe.steps_of(name)
        self.task, self.model, self.sites = task, model, sites
        # Nobody hardens a plain model: chosen by its robustness it would only be one that learned
        # less.
        attacked = isinstance(recipe.variants[name], AttackedVariant)
        self.rule = self.options.choose
        if self.rule == "robust" and not attacked:
            self.rule = "clean"
        self.looks: list[dict[str, float]] = []
        self.chosen: int | None = None
        self._weights: dict[str, Tensor] = {}
        self._batches: list[Batch] | None = None

    def due(self, done: int) -> bool:
        """Whether to look after so many steps."""
        return done % self.options.every == 0 or done == self.steps

    @property
    def batches(self) -> list[Batch]:
        """What is looked at."""
        if self._batches is None:
            batches = self.task.batches(self.model, "validation", 100)
            count = self.options.samples
            self._batches = batches if count is None else first_samples(batches, count)
        return self._batches

    def look(self, done: int) -> dict[str, float]:
        """Examines the model; random numbers go on as if it had not.

        Args:
            done: how many steps were made.

        Returns:
            The figures.
        """
        batches = self.batches
        generator = torch.Generator().manual_seed(self.recipe.seed)
        attack = make_attack(self.options.attack, self.recipe.threat, generator, best=True)
        device = next(self.model.parameters()).device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            clean = predict(self.model, batches, self.task)
            attacks = {"robust": attack}
            under = evaluate(self.model, batches, self.sites, attacks, evaluator=self.task)
        labels = labels_of(batches)
        kind = self.task.kind
        robust = kind.scores(under["robust"].outputs, labels)
        return {
            "step": float(done),
            **kind.scores(clean, labels),
            **{f"robust_{key}": value for key, value in robust.items()},
        }

    def note(self, figures: dict[str, float]) -> None:
        """Adds a look, and keeps the weights if it is the best one."""
        figures = {key: value for key, value in figures.items() if math.isfinite(value)}
        best = max((self._rank(look) for look in self.looks), default=None)
        self.looks.append(figures)
        if self.rule != "last" and (best is None or self._rank(figures) > best):
            self.chosen = int(figures["step"])
            self._weights = {k: x.cpu() for k, x in model_tensors(self.model).items()}

    def _rank(self, look: dict[str, float]) -> tuple[float, float]:
        """What looks are compared by: the share that is right, then the loss."""
        prefix = "robust_" if self.rule == "robust" else ""
        return look[f"{prefix}{self.task.kind.measures[0][0]}"], -look.get(
            f"{prefix}loss", math.inf
        )

    @property
    def exhausted(self) -> bool:
        """Whether there was no better look for as long as the recipe has patience."""
        if self.options.patience is None or self.chosen is None:
            return False
        since = [look for look in self.looks if look["step"] > self.chosen]
        return len(since) >= self.options.patience

    def take(self) -> None:
        """Puts the chosen weights into the model."""
        if self._weights:
            restore_model(self.model, self._weights)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a resumed run needs: tensors `chosen.*`, and JSON."""
        tensors = {f"{_CHOSEN}{name}": x for name, x in self._weights.items()}
        return tensors, {"looks": self.looks, "chosen": self.chosen}

    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Puts a state back."""
        self.looks = [{k: float(v) for k, v in look.items()} for look in facts["looks"]]
        self.chosen = None if facts["chosen"] is None else int(facts["chosen"])
        self._weights = {
            name.removeprefix(_CHOSEN): x for name, x in tensors.items() if name.startswith(_CHOSEN)
        }
