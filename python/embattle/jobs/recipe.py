"""Recipes: one YAML file that says everything about a job.

A recipe is read with the safe loader and checked field by field; a key nobody knows is an error.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from embattle.errors import InputError, closest, first_line, need
from embattle.progress import say
from embattle.sections import Section
from embattle.tasks.base import Task
from embattle.tasks.find import find

if not typing.TYPE_CHECKING:
    need("yaml")

import yaml
from pydantic import (
    Field,
    NonNegativeInt,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)

from embattle.jobs.attack_recipe import ThreatRecipe
from embattle.jobs.audit_recipe import AuditRecipe
from embattle.jobs.choices import laid_over, locate
from embattle.jobs.threat import check_attack
from embattle.jobs.train_recipe import TrainRecipe
from embattle.jobs.tune_recipe import TuneRecipe
from embattle.jobs.variant_recipe import (
    HARDENED,
    AttackedVariant,
    PlainVariant,
    VariantChoice,
    VariantRecipe,
)

DEFAULT_TASK = "text_classification"
#: The variant that the others are compared with.
STANDARD = "standard"
#: The folder of a run in which trackers write; no variant can be called so.
TRACKED = "trackers"


class Recipe(Section):
    """A whole job.

    Attributes:
        name: names the run's folder and heads the report.
        seed: decides the division of the data, the new weights, the order of the batches, and
            every random number of the attacks.
        task: what the model predicts from which data: `text_classification`, or the place of a
            class of one's own, `my_file.py:MyTask` (see `embattle.tasks.find`). The sections `data`
            and `model` are the task's.
        variants: what is trained, by the models' names. `standard`, a plain one, is always among
            them: the others are compared with it.
        tune: what `embattle tune` looks for.
        full: what `--full` changes: a partial recipe, already applied if `--full` was given.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: NonNegativeInt = Field(default=0, lt=2**32)
    task: str = DEFAULT_TASK
    data: Section
    model: Section
    threat: ThreatRecipe = ThreatRecipe()
    train: TrainRecipe = TrainRecipe()
    variants: dict[str, VariantChoice] = Field(
        default={"hardened": HARDENED}, validate_default=True
    )
    audit: AuditRecipe = AuditRecipe()
    tune: TuneRecipe | None = None
    full: dict[str, Any] = Field(default={})

    task_class: ClassVar[type[Task]]

    def make_task(self) -> Task:
        """The task, which has not read its data yet."""
        return self.task_class(self.data, self.model, self.seed)

    def steps_of(self, variant: str) -> int:
        """How many steps a variant is trained for."""
        return max(1, round(self.train.steps * self.variants[variant].duration))

    @field_validator("variants")
    @classmethod
    def _plain_one(cls, variants: dict[str, VariantChoice]) -> dict[str, VariantChoice]:
        for name in variants:
            if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name) or name == TRACKED:
                raise ValueError(
                    f"a variant cannot be called {name!r}: use letters, digits, - and _ (not "
                    f"{TRACKED!r}), as it names a folder"
                )
        return {STANDARD: PlainVariant(objective="plain"), **variants}

    @model_validator(mode="after")
    def _goes_together(self) -> Recipe:
        audit = self.audit
        attacks = {f"audit.attacks.{i}": attack for i, attack in enumerate(audit.attacks)}
        attacks["audit.sweep_attack"] = audit.sweep_attack
        if self.train.validation is not None:
            attacks["train.validation.attack"] = self.train.validation.attack
        for name, variant in self.variants.items():
            _check_training(f"variants.{name}", variant, self.train)
            if isinstance(variant, AttackedVariant):
                attacks[f"variants.{name}.attack"] = variant.attack
        for key, attack in attacks.items():
            check_attack(key, attack, self.threat)
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
        changes: assignments `section.key=value`, the value in YAML; applied last, and together: in
            whatever order they come, none undoes another key's.
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
    together: dict[str, Any] = {}
    for change in changes:
        together = laid_over(Any, together, _assignment(change))
    if changes:
        left: list[str] = []
        chosen = _merge(chosen, together, left)
        for sentence in left:
            say(f"--set: {sentence}")
        _check(chosen, " ".join(f"--set {change}" for change in changes), trust)
        _check(_merge(chosen, chosen["full"] or {}), "--set, with the section full", trust)
    return _check(chosen, str(path), trust)


def of_text(text: str, origin: str) -> Recipe:
    """The recipe that a text of YAML is, of a task that embattle has.

    Args:
        text: the YAML.
        origin: where it comes from, for messages.

    Raises:
        InputError: see `load`.
    """
    return _check(_parsed(text, origin), origin, trust=False)


def changed(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """The recipe with other values at some dotted keys; a mapping replaces what is there.

    Raises:
        InputError: naming the changes, the key, and what would be right.
    """
    raw: dict[str, Any] = recipe.model_dump(mode="json", exclude_unset=True)
    for key, value in changes.items():
        *sections, last = key.split(".")
        inside = raw
        for name in sections:
            inside = inside.setdefault(name, {})
        inside[last] = value
    said = ", ".join(f"{key}={value}" for key, value in changes.items())
    return _check(raw, said, trust=True)  # its task was run already


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
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read the recipe {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"the recipe {path} is not UTF-8 text; give a YAML file") from error
    return _parsed(text, str(path))


def _parsed(text: str, origin: str) -> dict[str, Any]:
    try:
        raw = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:  # a date that is none, a number too long
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        what = getattr(error, "problem", None) or f"not YAML ({first_line(error)})"
        raise InputError(f"{origin}{where}: {what}; correct the YAML") from error
    except RecursionError as error:
        raise InputError(f"{origin} is nested too deeply; correct the YAML") from error
    if not isinstance(raw, dict):
        raise InputError(f"{origin} holds no recipe: write a YAML mapping with name, data, ...")
    return raw


def _merge(
    base: Mapping[str, Any], changes: Mapping[str, Any], left: list[str] | None = None
) -> dict[str, Any]:
    # The sections of a task are merged key by key, whatever they hold.
    return laid_over(Recipe, base, changes, left)


def _assignment(change: str) -> dict[str, Any]:
    key, equals, value = change.partition("=")
    if not equals or not key:
        raise InputError(f"--set {change}: write --set section.key=value")
    try:
        tree: Any = yaml.load(value, Loader=_Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
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
        key = locate(kind, spot)[0]
        if first["type"] == "extra_forbidden":
            _, keys, which = locate(kind, spot[:-1])
            where = f" in {which}" if which else ""
            known = closest(str(spot[-1]), keys)
            raise InputError(f"{origin}: unknown key {key}{where}; {known}") from errors
        if first["type"] == "union_tag_invalid":
            tags = first["ctx"]["expected_tags"].strip("'").split("', '")
            of, tag = first["ctx"]["discriminator"].removesuffix("()"), first["ctx"]["tag"]
            raise InputError(f"{origin}: {key}.{of}: {tag!r}; {closest(tag, tags)}") from errors
        if first["type"] == "union_tag_not_found":
            of = first["ctx"]["discriminator"].removesuffix("()")
            if not isinstance(first["input"], dict):
                raise InputError(
                    f"{origin}: {key}: write a mapping, {{{of}: ...}} (given: {first['input']!r})"
                ) from errors
            raise InputError(f"{origin}: {key}.{of} is missing; add it") from errors
        what = first["msg"].removeprefix("Value error, ")
        if first["type"] == "missing":
            raise InputError(f"{origin}: {key} is missing; add it") from errors
        given = "" if isinstance(first["input"], dict) else f" (given: {first['input']!r})"
        where = f"{key}: " if key else ""
        raise InputError(f"{origin}: {where}{what}{given}") from errors


def _check_training(key: str, variant: VariantRecipe, train: TrainRecipe) -> None:
    """Check that a variant can be trained with these options of the section `train`.

    Args:
        key: the variant's place in the recipe.
        variant: the variant.
        train: that section.

    Raises:
        ValueError: it cannot.
    """
    if getattr(variant, "clipping", None) is not None and train.precision != "no":
        raise ValueError(
            f"{key}.clipping needs norms in full precision: write train.precision: no, or leave "
            "clipping out"
        )
    awp = getattr(variant, "awp", None) is not None
    if train.precision == "fp16" and (awp or variant.objective in ("free", "freeat")):
        what = "awp" if awp else f"objective {variant.objective}"
        raise ValueError(
            f"{key}: {what} computes gradients before train.precision: fp16 scales them; use bf16"
        )
    if variant.objective == "freeat" and train.accumulate > 1:
        raise ValueError(
            f"{key}: objective freeat keeps its perturbation from batch to batch, and cannot have "
            "train.accumulate; use 1"
        )
