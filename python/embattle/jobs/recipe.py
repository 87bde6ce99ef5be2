"""Recipes: one YAML file that says everything about a job.

A recipe is read with the safe loader and checked field by field; a key nobody knows is an error.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal

from embattle.data.recipe import Part
from embattle.errors import InputError, closest, need
from embattle.sections import Section
from embattle.tasks.base import Task
from embattle.tasks.find import find

if not typing.TYPE_CHECKING:
    need("yaml")

import yaml
from pydantic import (
    BaseModel,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    create_model,
    model_validator,
)

DEFAULT_TASK = "text_classification"


class ThreatRecipe(Section):
    """What the attacker may do; training and audit share it.

    Attributes:
        norm: the norm of a perturbation of the embeddings.
        group: `sample` gives a whole sample (a text) one budget, `token` each of its vectors its
            own.
        eps: the budget; in units of `unit`.
        unit: what eps counts in. `token_norm`: the mean norm (the attack's norm) of the model's own
            embeddings in the batch, so that a model gains nothing from larger embeddings;
            `mean_norm`: the same of whole groups; `absolute`: 1.
    """

    norm: Literal["l2", "linf", "l1"] = "l2"
    group: Literal["sample", "token"] = "sample"
    eps: NonNegativeFloat = 0.3
    unit: Literal["token_norm", "mean_norm", "absolute"] = "token_norm"


class AttackRecipe(Section):
    """One attack on the threat model's ball.

    Attributes:
        kind: `noise` (no gradient), `fgsm` and `fgm` (one step of sign, or of the norm's steepest
            ascent, to the edge of the ball), `pgd` (many projected steps).
        steps: gradient steps of `pgd`.
        step_size: length of a `pgd` step as a share of eps; null takes 2.5 / steps, at most 1.
        random_start: whether `pgd` starts at a random point of the ball.
        restarts: how often the attack is tried from a random start; the worst try counts.
    """

    kind: Literal["noise", "fgsm", "fgm", "pgd"] = "pgd"
    steps: PositiveInt = 1
    step_size: PositiveFloat | None = None
    random_start: bool = False
    restarts: PositiveInt = 1

    @model_validator(mode="after")
    def _restarts_differ(self) -> AttackRecipe:
        if self.restarts > 1 and self.kind != "noise" and not self.random_start:
            raise ValueError("restarts need random_start: true, or every try would be the same")
        return self

    @property
    def label(self) -> str:
        """A short name, such as `PGD-20 x2`."""
        name = {"noise": "Noise", "fgsm": "FGSM", "fgm": "FGM", "pgd": f"PGD-{self.steps}"}
        return name[self.kind] + (f" x{self.restarts}" if self.restarts > 1 else "")

    @property
    def detailed_label(self) -> str:
        """The short name, the length of a step, and whether the start is random."""
        step = f", step {self.step_share:g}" if self.kind == "pgd" else ""
        return f"{self.label}{step}" + (", random start" if self.random_start else "")

    @property
    def step_share(self) -> float:
        """The step as a share of eps."""
        return self.step_size if self.step_size is not None else min(1.0, 2.5 / self.steps)


class TrainRecipe(Section):
    """The budget, the same for the standard and for the hardened model.

    Attributes:
        steps: optimiser steps.
        batch_size: examples per step, over all processes.
        batches: `random`, or `by_length`: of samples of similar length, so that little is padding
            (for tasks whose samples have lengths, such as texts).
        learning_rate: AdamW's, reached after the warm-up and decayed linearly to 0.
        warmup: share of the steps in which the rate grows.
        weight_decay: AdamW's.
        max_grad_norm: bound on the norm of the whole gradient; null does not clip.
        precision: mixed precision, as Accelerate knows it.
        checkpoint_every: steps between checkpoints; 0 writes one on interruption only.
    """

    steps: PositiveInt = 300
    batch_size: PositiveInt = 16
    batches: Literal["random", "by_length"] = "random"
    learning_rate: PositiveFloat = 1e-4
    warmup: float = Field(default=0.1, ge=0, le=1)
    weight_decay: NonNegativeFloat = 0.01
    max_grad_norm: PositiveFloat | None = 1.0
    precision: Literal["no", "bf16", "fp16"] = "no"
    checkpoint_every: NonNegativeInt = 0


class HardenRecipe(Section):
    """Adversarial training: the loss is clean + lam * adversarial.

    Attributes:
        attack: the attack trained against.
        lam: weight of the adversarial loss.
        warmup: share of the steps in which eps grows from 0.
    """

    attack: AttackRecipe = AttackRecipe(kind="pgd", steps=1)
    lam: NonNegativeFloat = 1.0
    warmup: float = Field(default=0.3, ge=0, le=1)


class AuditRecipe(Section):
    """How the trained models are examined.

    Attributes:
        part: the part of the data that is attacked.
        batch_size: examples attacked at once.
        attacks: the attacks at the threat model's eps; the strongest comes last.
        sweep: multiples of the threat model's eps for the accuracy curve.
        sweep_attack: the attack of the curve.
    """

    part: Part = "test"
    batch_size: PositiveInt = 50
    attacks: list[AttackRecipe] = Field(
        default=[
            AttackRecipe(kind="noise", restarts=5),
            AttackRecipe(kind="fgm"),
            AttackRecipe(kind="pgd", steps=20, random_start=True, restarts=2),
        ],
        min_length=1,
    )
    sweep: list[PositiveFloat] = Field(default=[0.25, 0.5, 1.0, 1.5, 2.0, 4.0], min_length=1)
    sweep_attack: AttackRecipe = AttackRecipe(kind="pgd", steps=10)

    def labelled(self) -> dict[str, AttackRecipe]:
        """The attacks by labels of which no two are alike.

        Attacks with the same short name also say what they differ in, or else their number.
        """
        names = [attack.label for attack in self.attacks]
        full = [
            attack.detailed_label if names.count(attack.label) > 1 else attack.label
            for attack in self.attacks
        ]
        found: dict[str, AttackRecipe] = {}
        for attack, name in zip(self.attacks, full, strict=True):
            number, label = 1, name
            while label in found or (number > 1 and label in full):
                number += 1
                label = f"{name} #{number}"
            found[label] = attack
        return found


class Recipe(Section):
    """A whole job.

    Attributes:
        name: names the run's folder and heads the report.
        seed: decides the division of the data, the new weights, the order of the batches, and
            every random number of the attacks.
        task: what the model predicts from which data: `text_classification`, or the place of a
            class of one's own, `my_file.py:MyTask` (see `embattle.tasks.find`). The sections `data`
            and `model` are the task's.
        full: what `--full` changes: a partial recipe, already applied if `--full` was given.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: NonNegativeInt = 0
    task: str = DEFAULT_TASK
    data: Section
    model: Section
    threat: ThreatRecipe = ThreatRecipe()
    train: TrainRecipe = TrainRecipe()
    harden: HardenRecipe = HardenRecipe()
    audit: AuditRecipe = AuditRecipe()
    full: dict[str, Any] = Field(default={})

    task_class: ClassVar[type[Task]]

    def make_task(self) -> Task:
        """The task, which has not read its data yet."""
        return self.task_class(self.data, self.model, self.seed)

    @model_validator(mode="after")
    def _fits_the_ball(self) -> Recipe:
        attacks = [self.harden.attack, *self.audit.attacks, self.audit.sweep_attack]
        if self.threat.norm != "linf" and any(attack.kind == "fgsm" for attack in attacks):
            raise ValueError(
                f"kind fgsm steps in the linf norm, threat.norm is {self.threat.norm}: use fgm"
            )
        return self

    def to_yaml(self) -> str:
        """The recipe with every value spelled out, ready to be read again."""
        text: str = yaml.safe_dump(
            self.model_dump(mode="json"), sort_keys=False, allow_unicode=True
        )
        return text


@cache
def recipe_of(task: type[Task]) -> type[Recipe]:
    """The class of recipes for a task, with its sections `data` and `model`."""
    sections: dict[str, Any] = {}
    for name, kind in (("data", task.Data), ("model", task.Model)):
        try:
            sections[name] = (kind, kind())
        except ValidationError:  # some of its keys have no default
            sections[name] = (kind, ...)
    made = create_model("Recipe", __base__=Recipe, **sections)
    made.task_class = task
    return made


def load(
    path: Path, *, full: bool = False, changes: Sequence[str] = (), trust: bool = False
) -> Recipe:
    """Reads a recipe.

    Args:
        path: the YAML file.
        full: whether the recipe's `full` section is applied.
        changes: assignments `section.key=value`, the value in YAML; applied last.
        trust: whether a task that is code of one's own may be run (see `embattle.tasks.find`).

    Returns:
        The checked recipe.

    Raises:
        InputError: naming the file (or `--set`), the key, and what would be right.
    """
    raw = _read(path)
    _check(raw, str(path), trust)
    extended = raw.get("full") or {}
    merged = _merge(raw, extended)
    _check(merged, f"{path} (full)", trust)
    if full and not extended:
        raise InputError(
            f"{path}: --full needs a section 'full' that says what it changes; add one"
        )
    chosen = {**(merged if full else raw), "full": {} if full else extended}
    for change in changes:
        chosen = _merge(chosen, _assignment(change))
        _check(chosen, f"--set {change}", trust)
    return _check(chosen, str(path), trust)


def named_task(path: Path) -> Any:
    """The task that a recipe names; nothing of it is run, or checked."""
    return _read(path).get("task", DEFAULT_TASK)


def differences(old: Recipe, new: Recipe) -> list[str]:
    """The keys in which two recipes differ, each with both values."""
    found: list[str] = []

    def walk(a: Any, b: Any, key: str) -> None:
        if isinstance(a, dict) and isinstance(b, dict):
            for name in sorted({*a, *b}):
                walk(a.get(name), b.get(name), f"{key}.{name}" if key else name)
        elif a != b:
            found.append(f"{key}: {a} -> {b}")

    walk(
        old.model_dump(mode="json", exclude={"full"}),
        new.model_dump(mode="json", exclude={"full"}),
        "",
    )
    return found


class _Loader(yaml.SafeLoader):
    """The safe loader, to which a key that stands twice in a mapping is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            # Of a merged mapping (<<) a key may be given anew.
            if key.tag == "tag:yaml.org,2002:merge" or not isinstance(key, yaml.ScalarNode):
                continue
            name = self.construct_object(key)
            if name in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {name!r} is there twice", key.start_mark
                )
            seen.add(name)
        made: dict[Any, Any] = super().construct_mapping(node, deep)
        return made


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise InputError(f"cannot read the recipe {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"the recipe {path} is not UTF-8 text; give a YAML file") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        what = getattr(error, "problem", None) or "not YAML"
        raise InputError(f"{path}{where}: {what}; correct the YAML") from error
    except RecursionError as error:
        raise InputError(f"{path} is nested too deeply; correct the YAML") from error
    if not isinstance(raw, dict):
        raise InputError(f"{path} holds no recipe: it must be a YAML mapping with name, data, ...")
    return raw


def _merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `changes` laid over it, mapping by mapping; lists are replaced."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = _merge(old, value) if both else value  # type: ignore[arg-type]
    return merged


def _assignment(change: str) -> dict[str, Any]:
    key, equals, value = change.partition("=")
    if not equals or not key:
        raise InputError(f"--set {change}: write --set section.key=value")
    try:
        tree: Any = yaml.load(value, Loader=_Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise InputError(f"--set {change}: the value is not YAML; quote it") from error
    for name in reversed(key.split(".")):
        tree = {name: tree}
    nested: dict[str, Any] = tree
    return nested


def _check(raw: Mapping[str, Any], origin: str, trust: bool) -> Recipe:
    """The recipe, or an InputError about the first thing that is wrong with it."""
    name = raw.get("task", DEFAULT_TASK)
    try:
        # What is no text is for the recipe to refuse.
        task = find(name if isinstance(name, str) else DEFAULT_TASK, trust=trust)
    except InputError as error:
        raise InputError(f"{origin}: task: {error}") from error
    kind = recipe_of(task)
    try:
        return kind.model_validate(raw)
    except ValidationError as errors:
        first = min(errors.errors(), key=lambda e: e["type"] != "extra_forbidden")
        spot = first["loc"]
        key = ".".join(str(step) for step in spot)
        if first["type"] == "extra_forbidden":
            known = closest(str(spot[-1]), _keys(kind, spot[:-1]))
            raise InputError(f"{origin}: unknown key {key}; {known}") from errors
        what = first["msg"].removeprefix("Value error, ")
        if first["type"] == "missing":
            raise InputError(f"{origin}: {key} is missing; add it") from errors
        given = "" if isinstance(first["input"], dict) else f" (given: {first['input']!r})"
        raise InputError(f"{origin}: {key or 'recipe'}: {what}{given}") from errors


def _keys(recipe: type[Recipe], spot: Sequence[int | str]) -> list[str]:
    """The keys known at a place in the recipe."""
    kind: Any = recipe
    for step in spot:
        if isinstance(step, str):
            kind = kind.model_fields[step].annotation
        for inner in typing.get_args(kind):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                kind = inner
    assert not isinstance(kind, types.UnionType)
    return list(kind.model_fields)
