"""What a variant is trained on: from its section of the recipe to a loss and its gradients."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from embattle.audit.evaluation import device_of, examined
from embattle.clipping import PerSampleClipper
from embattle.data.batch import Batch
from embattle.errors import InputError
from embattle.jobs.recipe import Recipe
from embattle.jobs.schedule_recipe import constant
from embattle.jobs.threat import make_attack
from embattle.jobs.variant_recipe import (
    AttackedVariant,
    DivergingVariant,
    PartialVariant,
    PlainVariant,
    SmartVariant,
    StaggeredVariant,
    VariantRecipe,
    WeightedVariant,
)
from embattle.objectives import (
    AWP,
    AdversarialObjective,
    Bregman,
    Form,
    Partial,
    Smart,
    StaggeredReplays,
    Trades,
    Vat,
)
from embattle.objectives.monitor import Monitor, RobustTrainingWarning
from embattle.perturb.evaluation import Evaluation
from embattle.perturb.site import Site
from embattle.tasks.base import Task
from embattle.tasks.kinds import Classification

# Forms that compare outputs.
_COMPARES = ("mart", "alp", "trades", "vat", "smart", "r3f")


class Loss:
    """The loss of a variant, and how its gradients are made.

    Args:
        recipe: the job.
        name: the variant's.
        task: has read its data.
        model: whose weights are trained, not wrapped.
        sites: where it is attacked; the forms that perturb sample by sample ask the task.
        generator: source of random starts.
        processes: how many there are.

    Raises:
        InputError: the variant cannot be trained on this task, or in several processes.
    """

    def __init__(
        self,
        recipe: Recipe,
        name: str,
        task: Task,
        model: nn.Module,
        sites: Sequence[Site],
        generator: torch.Generator,
        *,
        processes: int = 1,
    ) -> None:
        if isinstance(recipe.variants[name], (PartialVariant, StaggeredVariant)):
            sites = task.sample_sites(model, recipe.threat.group)
        self.name, self.task, self.task_name = name, task, recipe.task
        self.variant = variant = recipe.variants[name]
        self._check(processes)
        self.objective: AdversarialObjective | AWP | None = None
        self.eps = 0.0
        if isinstance(variant, AttackedVariant):
            alone = processes == 1 and recipe.train.precision != "fp16"
            self.objective = _objective(recipe, name, model, sites, generator, early=alone)
            self.eps = recipe.threat.eps * variant.scale
        self._monitor = Monitor(sites=sites)
        self._findings: dict[str, str] = {}
        self._told: set[str] = set()
        clipping = getattr(variant, "clipping", None)
        self.clipper: PerSampleClipper | None = None
        if clipping is not None:
            self.clipper = PerSampleClipper(model, **clipping.model_dump())

    def open(self) -> AbstractContextManager[object]:
        """The block in which a batch is computed and differentiated."""
        return nullcontext() if self.clipper is None else self.clipper

    def __call__(
        self, model: nn.Module, batch: Batch, step: int, places: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        """Computes the loss of a batch.

        Args:
            model: the model as it is called: wrapped, with several processes.
            batch: the batch.
            step: number of the step, from 0; schedules depend on it.
            places: of the samples in their part, int64 [B], for what is kept of them.

        Returns:
            The loss, 0-d, or with clipping one for each sample, [B]; and the figures to show.
        """

        def evaluate(some: Batch = batch) -> Evaluation:
            found = self.task.evaluate(model, some)
            if found.losses is None:
                raise InputError(
                    f"task {self.task_name}: the training part has no labels, so no losses"
                )
            if found.outputs is None and self.variant.objective in _COMPARES:
                raise InputError(
                    f"variants.{self.name}.objective: {self.variant.objective} compares outputs, "
                    "and the task gives none in training; use mixed"
                )
            return found

        if self.objective is None:
            losses = evaluate().losses
            assert losses is not None
            loss = losses if self.clipper is not None else losses.mean()
            return loss, {"loss": float(losses.detach().mean())}
        inner = self._inner
        inner.step = step
        assert isinstance(self.variant, AttackedVariant)
        options: dict[str, Any] = {"mask": self.task.mask(batch)}
        if isinstance(self.variant, (PartialVariant, StaggeredVariant)):
            options["samples"] = places
        if isinstance(self.variant, PartialVariant):
            options["subset"] = lambda rows: partial(evaluate, batch.take(rows))
        if self.variant.needs_accuracy:
            options["criterion"] = self.task.criterion(batch)
        if self.clipper is not None:
            parts, metrics = inner.parts(evaluate, **options)
            loss = parts.summed
        else:
            loss, metrics = self.objective(evaluate, **options)
        self._watch(lambda: self._monitor.update(metrics))
        return loss, self._figures(metrics)

    @property
    def _inner(self) -> AdversarialObjective:
        assert self.objective is not None
        return self.objective.objective if isinstance(self.objective, AWP) else self.objective

    def check_held(self, model: nn.Module, batch: Batch) -> None:
        """Lets the monitor attack a batch that is not trained on; where classes are predicted.

        Args:
            model: the model, not wrapped; in eval mode for as long.
            batch: the batch.
        """
        if self.objective is None or not isinstance(self.task.kind, Classification):
            return
        batch = batch.to(device_of(model))
        with examined(model):
            self._watch(
                lambda: self._monitor.check_held(
                    partial(self.task.evaluate, model, batch),
                    criterion=self.task.criterion(batch),
                    attack=self._inner.attack,
                    mask=self.task.mask(batch),
                )
            )

    def _watch(self, look: Callable[[], list[str]]) -> None:
        """Keeps what a look of the monitor finds."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RobustTrainingWarning)
            for text in look():
                self._findings[text.split(":")[0]] = text

    def findings(self) -> list[str]:
        """What the monitor has found, and was not given yet."""
        new = [text for kind, text in self._findings.items() if kind not in self._told]
        self._told.update(self._findings)
        return new

    def backward(self, loss: Tensor, accelerator: Any, *, share: float, last: bool) -> None:
        """Adds the gradients of a batch.

        Args:
            loss: what the call gave.
            accelerator: Accelerate's object.
            share: the batch's share of the step.
            last: whether it is the step's last.
        """
        if self.clipper is not None:
            self.clipper.backward(loss, scale=share, last=last)
        else:
            accelerator.backward(loss)  # it knows the share

    def _figures(self, metrics: dict[str, Tensor]) -> dict[str, float]:
        found = {}
        if "clean_loss" in metrics:
            found["loss"] = float(metrics["clean_loss"])
        # In a ball of no size the clean loss is the robust one; elsewhere a pass without an attack
        # (a schedule of `lam` or `share`, `every`) says nothing of it.
        still = metrics.get("clean_loss") if metrics["eps_scale"] == 0 else None
        under = metrics.get("adversarial_loss", still)
        if under is not None:
            found["robust_loss"] = float(under)
        found["eps"] = self.eps * float(metrics["eps_scale"])
        if "masked" in metrics:
            found["masked"] = float(metrics["masked"])
        return found

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a resumed run needs besides random states: tensors `objective.*`, and JSON."""
        if self.objective is None:
            return {}, {}
        tensors: dict[str, Tensor] = {}
        facts: dict[str, Any] = {}
        for part, state in self.objective.state_dict().items():
            if part in ("step", "generator"):
                continue
            for key, value in state.items():
                if isinstance(value, Tensor):
                    tensors[f"objective.{part}.{key}"] = value
                else:
                    facts.setdefault(part, {})[key] = value
        return tensors, facts

    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Puts a state back."""
        if self.objective is None:
            return
        state: dict[str, Any] = {part: dict(values) for part, values in facts.items()}
        for name, value in tensors.items():
            if name.startswith("objective."):
                _, part, key = name.split(".", 2)
                state.setdefault(part, {})[key] = value
        self.objective.load_state_dict({**state, "step": 0})

    def _check(self, processes: int) -> None:
        variant, kind = self.variant, self.task.kind
        key = f"variants.{self.name}"
        classes = isinstance(kind, Classification)
        divergence = getattr(variant, "divergence", "squared_distance")
        if not classes and divergence != "squared_distance":
            raise InputError(
                f"{key}.divergence: {divergence} compares classes, and this task predicts none; "
                "write squared_distance"
            )
        if not classes and isinstance(variant, AttackedVariant) and variant.of_classes:
            if isinstance(variant, PartialVariant):
                raise InputError(
                    f"{key}.choose: margin is for tasks that predict classes; use loss"
                )
            raise InputError(
                f"{key}.objective: {variant.objective} is for tasks that predict classes; use "
                "mixed, or trades with divergence: squared_distance"
            )
        adaptive = isinstance(variant, AttackedVariant) and variant.eps_schedule.kind == "adaptive"
        if adaptive and not classes:
            raise InputError(
                f"{key}.eps_schedule: adaptive follows the accuracy of the training batches, and "
                "this task predicts no classes; use warm_up"
            )
        if processes == 1:
            return
        for what, there in (
            ("objective: freeat", variant.objective == "freeat"),
            ("clipping", getattr(variant, "clipping", None) is not None),
            ("eps_schedule: adaptive", adaptive),
        ):
            if there:
                raise InputError(f"{key}: {what} trains in one process; start it without torchrun")


def _objective(
    recipe: Recipe,
    name: str,
    model: nn.Module,
    sites: Sequence[Site],
    generator: torch.Generator,
    *,
    early: bool,
) -> AdversarialObjective | AWP:
    """The library's objective for a variant."""
    variant, steps = recipe.variants[name], recipe.steps_of(name)
    assert isinstance(variant, AttackedVariant)
    options: dict[str, Any] = {}
    if isinstance(variant, (WeightedVariant, StaggeredVariant)):
        options["lam"] = variant.lam
        options["lam_schedule"] = variant.lam_schedule.make(steps)
    masking = getattr(variant, "masking", None)
    objective = AdversarialObjective(
        make_attack(variant.attack, recipe.threat, generator, scale=variant.scale),
        sites,
        form=_form(variant, model, steps),
        masking=None if masking is None else masking.make(),
        eps_schedule=variant.eps_schedule.make(steps),
        steps_schedule=variant.steps_schedule.make(steps),
        early_backward=early,
        **options,
    )
    awp = getattr(variant, "awp", None)
    return objective if awp is None else AWP(objective, model, **awp.model_dump())


def _form(variant: AttackedVariant, model: nn.Module, steps: int) -> str | Form:
    if isinstance(variant, StaggeredVariant):
        return StaggeredReplays(variant.visits, share=variant.share)
    if isinstance(variant, PartialVariant):
        return Partial(
            variant.share,
            choose=variant.choose,
            delay=round(variant.delay * steps),
            schedule=variant.share_schedule.make(steps),
            every=variant.every,
        )
    if isinstance(variant, SmartVariant):
        given = variant.bregman
        bregman = None if given is None else Bregman(model, **given.model_dump())
        return Smart(divergence=variant.divergence, bregman=bregman)
    if isinstance(variant, DivergingVariant):
        return (Trades if variant.objective == "trades" else Vat)(divergence=variant.divergence)
    return variant.objective


def _without_pauses(recipe: Recipe) -> Recipe:
    """The recipe, but that its variants attack in every step, and with full strength."""
    always = constant()
    variants: dict[str, VariantRecipe] = {}
    for name, variant in recipe.variants.items():
        changes: dict[str, Any] = {
            key: always
            for key in ("eps_schedule", "lam_schedule", "share_schedule")
            if getattr(getattr(variant, key, None), "kind", "adaptive") != "adaptive"
        }
        if isinstance(variant, PartialVariant):
            changes |= {"delay": 0.0, "every": 1}
        variants[name] = variant.model_copy(update=changes)
    return recipe.model_copy(update={"variants": variants})


def rehearse(recipe: Recipe, task: Task, model: nn.Module, *, processes: int = 1) -> None:
    """Computes the loss of every variant on two samples, so that what cannot work fails at once.

    Args:
        recipe: the job.
        task: has read its data.
        model: in training mode; its statistics may change, its weights do not.
        processes: how many there are.

    Raises:
        InputError: it names the variant, and what is wrong.
    """
    recipe = _without_pauses(recipe)
    rows = torch.arange(min(2, len(task.parts["train"])))
    sites = task.sites(model, recipe.threat.group)
    for name, variant in recipe.variants.items():
        if variant == PlainVariant():
            continue
        with torch.random.fork_rng(devices=[]):
            batch = task.batch(model, "train", rows, seed=recipe.seed)
            try:
                generator = torch.Generator()
                loss = Loss(recipe, name, task, model, sites, generator, processes=processes)
                with loss.open():
                    found, _ = loss(model, batch, recipe.steps_of(name) - 1, rows)
                    if loss.clipper is not None:
                        loss.clipper.backward(found)
            except (ValueError, RuntimeError) as error:
                of_form = str(error).startswith(("Partial:", "StaggeredReplays:"))
                if isinstance(error, InputError) and not of_form:
                    raise
                raise InputError(f"variants.{name}: {error}") from error
    model.zero_grad()
