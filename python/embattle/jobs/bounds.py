"""What a model must reach for an audit to succeed: `--fail-under robust_accuracy=0.6`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embattle.audit.evidence import ENSEMBLE
from embattle.audit.scores import CLEAN, WORST
from embattle.errors import InputError, closest
from embattle.jobs.column_recipe import labelled
from embattle.jobs.recipe import STANDARD, Recipe
from embattle.jobs.run_folder import Run
from embattle.tasks.kinds import Kind, from_json


@dataclass(frozen=True)
class Bound:
    """A measure's least value.

    Attributes:
        text: as it was given.
        name: of the measure.
        least: the value.
        model: which it is for; None: all but the standard one, unless there is no other.
    """

    text: str
    name: str
    least: float
    model: str | None = None


def parse(texts: Iterable[str]) -> list[Bound]:
    """Reads bounds as they are given on the command line, `[MODEL:]MEASURE=VALUE`.

    Raises:
        InputError: one is not of that form.
    """
    found = []
    for text in texts:
        left, equals, value = text.rpartition("=")
        model, colon, name = left.partition(":")
        if not colon:
            model, name = "", left
        if not equals or not name or (colon and not model):
            raise InputError(
                f"--fail-under {text}: write MEASURE=VALUE, such as robust_accuracy=0.6, or "
                "MODEL:MEASURE=VALUE"
            )
        try:
            least = float(value)
        except ValueError:
            least = math.nan
        if not math.isfinite(least):
            raise InputError(f"--fail-under {text}: {value!r} is no number; write such as 0.6")
        found.append(Bound(text, name, least, model or None))
    return found


def names_of(
    measures: Sequence[Sequence[str]], smaller_is_better: Iterable[str], attacks: Iterable[str]
) -> dict[str, tuple[str, str]]:
    """What can be bounded, by name: the row of an audit and the measure's key.

    Args:
        measures: keys and titles; the first is the headline, which is called `accuracy` too.
        smaller_is_better: the keys that are errors, which are not bounded from below.
        attacks: the labels, of attacks on columns too.
    """
    errors = set(smaller_is_better)
    keys = {key: key for key, _ in measures if key not in errors}
    keys.setdefault("accuracy", measures[0][0])
    rows = {"robust_": WORST, "clean_": CLEAN, **{f"{label}.": label for label in attacks}}
    return {
        f"{prefix}{name}": (row, key) for prefix, row in rows.items() for name, key in keys.items()
    }


def check_names(
    bounds: Sequence[Bound], runs: Sequence[tuple[Path, Recipe, Run]], *, certify: bool = False
) -> None:
    """Checks that the runs' audits will have what is bounded, as far as it is known before.

    Args:
        bounds: the bounds.
        runs: folder, recipe and what it says of itself, of each run.
        certify: whether certificates will be made.

    Raises:
        InputError: an unknown measure or model, naming those there are; a share above 1.
    """
    for bound in bounds:
        models = [name for _, recipe, _ in runs for name in recipe.variants]
        if bound.model is not None and bound.model not in models:
            raise InputError(
                f"--fail-under {bound.text}: no run has a model {bound.model!r}; "
                f"{closest(bound.model, set(models))}"
            )
        if _certificate(bound) is not None:
            if not certify:
                raise InputError(f"--fail-under {bound.text}: certificates need --certify; add it")
            continue
        for folder, recipe, run in runs:
            kind = _kind(recipe, run)
            if kind is None:
                continue
            rows = [*recipe.audit.table(), *labelled(recipe.audit.columns)]
            known = names_of(kind.measures, kind.smaller_is_better, rows)
            _known(bound, known, f" of {folder}")
            if known[bound.name][1] == kind.measures[0][0] and bound.least > 1:
                raise InputError(
                    f"--fail-under {bound.text}: {bound.name} is a share, at most 1; write 0.6 "
                    "for 60 %"
                )


def unmet(bounds: Sequence[Bound], facts: Mapping[str, Any]) -> list[str]:
    """A line for each bound that a model of an audit does not meet.

    Args:
        bounds: the bounds.
        facts: what `metrics.json` holds.

    Raises:
        InputError: the audit has no such measure.
    """
    models: Mapping[str, Any] = facts["models"]
    first = next(iter(models.values()))
    labels = [*first["attacks"], *first.get("columns", {})]
    known = names_of(facts["measures"], facts["smaller_is_better"], labels)
    others = [name for name in models if name != STANDARD] or list(models)
    lines = []
    for bound in bounds:
        certificate = _certificate(bound)
        whole = facts.get("certificates", ())
        if certificate is not None and certificate[0] in {one["kind"] for one in whole}:
            lines += _under(bound, ENSEMBLE, _certified(whole, *certificate))
            continue
        for name in others if bound.model is None else {bound.model} & set(models):
            model = models[name]
            if certificate is None:
                row, key = _known(bound, known, "")
                rows = {CLEAN: model["clean"], WORST: model["worst"], **model["attacks"]}
                value = {**rows, **model.get("columns", {})}[row].get(key)
            else:
                value = _certified(model.get("certificates", []), *certificate)
            lines += _under(bound, name, value)
    return lines


def _under(bound: Bound, name: str, value: float | None) -> list[str]:
    if value is None:
        return [f"{name}: {bound.name} is not defined, and must be {bound.least:g}"]
    return [f"{name}: {bound.name} {value:.4g} is under {bound.least:g}"] * (value < bound.least)


def _certificate(bound: Bound) -> tuple[str, float] | None:
    """Kind and eps of `certified_KIND@EPS`; None if the bound is on another measure."""
    kind, at, eps = bound.name.removeprefix("certified_").partition("@")
    if not bound.name.startswith("certified_") or not at:
        return None
    try:
        return kind, float(eps)
    except ValueError as error:
        raise InputError(
            f"--fail-under {bound.text}: {eps!r} is no number; write certified_{kind}@EPS=VALUE"
        ) from error


def _certified(certificates: Sequence[Mapping[str, Any]], kind: str, eps: float) -> float | None:
    """What is certified at a radius: what is proven at a larger one holds there too."""
    for one in certificates:
        if one["kind"] == kind:
            pairs = zip(one["eps"], one["certified"], strict=True)
            # A radius of the recipe and the same one on the command line differ by rounding.
            proven = [share for radius, share in pairs if radius >= eps * (1 - 1e-9)]
            return max(proven, default=None)
    return None


def _known(bound: Bound, known: Mapping[str, tuple[str, str]], where: str) -> tuple[str, str]:
    if bound.name not in known:
        raise InputError(
            f"--fail-under {bound.text}: the audit{where} measures no {bound.name!r}; "
            f"{closest(bound.name, known)}"
        )
    return known[bound.name]


def _kind(recipe: Recipe, run: Run) -> Kind | None:
    """What a run's models predict; None where only the data tells."""
    fixed = getattr(recipe.task_class, "kind", None)
    if isinstance(fixed, Kind):
        return fixed
    try:
        return from_json(run.facts["kind"])
    except (KeyError, TypeError, ValueError):
        return None
