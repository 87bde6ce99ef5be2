"""Tuning: the options of a variant with the best robust validation, at a bounded loss elsewhere.

The standard model is trained once; every trial trains the variant alone, on the same data with the
same budget. Optuna proposes, stops trials that are behind, and keeps what was found in the folder.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from embattle.data.account import Account
from embattle.errors import InputError, closest, need
from embattle.files import remove_unfinished
from embattle.jobs import recipe as recipes
from embattle.jobs.fit import Diverged, Fit, first_model
from embattle.jobs.loss import rehearse
from embattle.jobs.recipe import STANDARD, Recipe
from embattle.jobs.run_folder import STUDY, TRIAL, Run, begin, check_place, find_run, locked, put
from embattle.jobs.train import make_accelerator, read
from embattle.jobs.tune_recipe import TuneRecipe
from embattle.progress import say
from embattle.tasks.base import Task


def tune(
    recipe: Recipe, out: Path, *, trials: int, resume: bool = False, overwrite: bool = False
) -> None:
    """Looks for the best options of a variant, and writes the recipe with them.

    Args:
        recipe: the job, with a section `tune`.
        out: the study's folder; it must not hold anything, unless one of the last two says so.
        trials: how many trials the study has in the end, those of earlier calls included.
        resume: continue the study that is there; start one if there is none.
        overwrite: replace what is there.

    Raises:
        InputError: about whatever the user can mend; also if no trial keeps the bound.
        Interrupted: on Ctrl-C or SIGTERM; `resume` goes on in the middle of the trial.
    """
    options = _checked(recipe)
    need("optuna", "tune")
    task = recipe.make_task()
    accelerator = make_accelerator(recipe, task, out)
    check_place(out, resume=resume, overwrite=overwrite)
    with locked(out, f"tune {recipe.name}"):
        run = find_run(recipe, out, resume=resume, overwrite=overwrite)
        remove_unfinished(out)
        account = Account()
        try:
            read(task, account, "train", "validation")
        finally:
            for line in account.lines():
                say(line)
        _check_measure(options, task)
        _rehearse_ends(recipe, options, task, first_model(task))
        now = Run.of(task, account)
        if run is None:
            run = now
            begin(run, recipe, out)
        else:
            run.require(now, out)
        if STANDARD not in run.variants:
            run.variants[STANDARD] = Fit(recipe, STANDARD, task, out, accelerator).go()
            run.write(out)
            accelerator.free_memory()
        plain = run.variants[STANDARD].chosen_look
        study = _Study(recipe, options, task, out, accelerator, plain)
        study.go(trials)
        study.finish()


def _checked(recipe: Recipe) -> TuneRecipe:
    """The section `tune`, with all that it needs."""
    if recipe.tune is None:
        raise InputError("tune: the recipe has no such section; add it, with tune.space")
    if recipe.train.validation is None or recipe.train.validation.choose == "last":
        raise InputError(
            "train.validation: tuning compares models by their robust validation; add "
            "train: {validation: {every: ..., choose: robust}}"
        )
    if recipe.tune.variant not in recipe.variants or recipe.tune.variant == STANDARD:
        others = [name for name in recipe.variants if name != STANDARD]
        raise InputError(
            f"tune.variant: {recipe.tune.variant!r}; {closest(recipe.tune.variant, others)}"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("tuning runs in one process; start it without torchrun")
    return recipe.tune


def _check_measure(options: TuneRecipe, task: Task) -> None:
    """Checks that the bound is on a measure that is a share."""
    shares = [key for key, _ in task.kind.measures if key not in ("loss", "mae")]
    bound = options.at_most_lost
    if bound is not None and bound.measure not in shares:
        raise InputError(
            f"tune.at_most_lost.measure: {bound.measure!r}; {closest(bound.measure, shares)}"
        )


def _with(recipe: Recipe, options: TuneRecipe, values: Mapping[str, Any]) -> Recipe:
    """The recipe with values for the keys of the space."""
    changes = {f"variants.{options.variant}.{key}": value for key, value in values.items()}
    return recipes.changed(recipe, changes)


def _rehearse_ends(recipe: Recipe, options: TuneRecipe, task: Task, probe: nn.Module) -> None:
    """Tries each choice and each end of a range: a space that makes no sense fails at once."""
    first = {key: dimension.ends[0] for key, dimension in options.space.items()}
    for key, dimension in options.space.items():
        for value in dimension.ends:
            rehearse(_with(recipe, options, {**first, key: value}), task, probe)


class _Pruned(Exception):
    """A trial is behind."""


class _Study:
    """The trials.

    Args:
        recipe: the job.
        options: its section `tune`.
        task: has read its data.
        out: the study's folder.
        accelerator: Accelerate's object.
        plain: the standard model's figures.
    """

    def __init__(
        self,
        recipe: Recipe,
        options: TuneRecipe,
        task: Task,
        out: Path,
        accelerator: Any,
        plain: Mapping[str, float],
    ) -> None:
        self.recipe, self.options, self.task, self.out = recipe, options, task, out
        self.accelerator, self.plain = accelerator, plain
        self.robust = f"robust_{task.kind.measures[0][0]}"
        bound = options.at_most_lost
        self.measure = task.kind.measures[0][0] if bound is None else bound.measure
        self.optuna: Any = need("optuna", "tune")
        journal = need("optuna.storages.journal", "tune")
        self.optuna.logging.set_verbosity(self.optuna.logging.WARNING)
        pruners = self.optuna.pruners
        # A killed process may have left the journal's own lock; the folder's is held here.
        (out / f"{STUDY}.lock").unlink(missing_ok=True)
        storage = self.optuna.storages.JournalStorage(journal.JournalFileBackend(str(out / STUDY)))
        self.study: Any = self.optuna.create_study(
            storage=storage,
            study_name=recipe.name,
            direction="maximize",
            load_if_exists=True,
            pruner={
                "median": pruners.MedianPruner,
                "halving": pruners.SuccessiveHalvingPruner,
                "none": pruners.NopPruner,
            }[options.pruner](),
        )
        # Another seed after each stop: the same one would propose the same again.
        seed = recipe.seed + len(self.study.trials)
        self.study.sampler = self.optuna.samplers.TPESampler(seed=seed)

    def go(self, count: int) -> None:
        """Makes trials until there are so many."""
        state = self.optuna.trial.TrialState
        folder = self.out / TRIAL
        # Nobody else works in the folder: a trial that runs was stopped. It goes on as a new one
        # with the same values, from its checkpoint.
        stopped = self.study.get_trials(deepcopy=False, states=(state.RUNNING,))
        for trial in stopped:
            self.study.tell(trial.number, state=state.FAIL)
            self.study.enqueue_trial(trial.params)
        if not stopped:
            shutil.rmtree(folder, ignore_errors=True)
        done = (state.COMPLETE, state.PRUNED)
        while (made := len(self.study.get_trials(deepcopy=False, states=done))) < count:
            trial = self.study.ask()
            values = {key: space.suggest(trial, key) for key, space in self.options.space.items()}
            title = f"trial {made + 1} of {count}"
            say(f"{title}: {_words(values)}")
            try:
                look = self._try(trial, values, folder)
            except (_Pruned, Diverged) as stop:
                say(f"{title}: {stop}")
                self.study.tell(trial, state=state.PRUNED)
            else:
                figures = f"{self.robust} {look[self.robust]:.3f}, {self.measure}"
                say(f"{title}: {figures} {look[self.measure]:.3f}")
                self.study.tell(trial, look[self.robust])
            self.accelerator.free_memory()
            shutil.rmtree(folder, ignore_errors=True)

    def _try(self, trial: Any, values: Mapping[str, Any], folder: Path) -> Mapping[str, float]:
        """Trains the variant with some values; the look at the weights that were chosen."""

        def constrain(look: Mapping[str, float]) -> None:
            if self.options.at_most_lost is not None:
                trial.set_constraint("points lost", self._lost(look) - self._bound)

        def report(look: Mapping[str, float]) -> None:
            trial.report(look[self.robust], int(look["step"]))

        def watch(look: Mapping[str, float]) -> None:
            report(look)
            if trial.should_prune():
                constrain(look)
                raise _Pruned(f"stopped after {look['step']:.0f} steps, as it is behind")

        recipe = _with(self.recipe, self.options, values)
        fit = Fit(recipe, self.options.variant, self.task, folder, self.accelerator, watch=watch)
        assert fit.validation is not None
        for look in fit.validation.looks:  # of a trial that goes on
            report(look)
        chosen = fit.fit().chosen_look
        constrain(chosen)
        trial.set_user_attr("look", chosen)
        return chosen

    @property
    def _bound(self) -> float:
        bound = self.options.at_most_lost
        return float("inf") if bound is None else bound.points

    def _lost(self, look: Mapping[str, float]) -> float:
        """What a model lost beside the standard one, in points."""
        return 100 * (self.plain[self.measure] - look.get(self.measure, 0.0))

    def finish(self) -> None:
        """Prints all trials, and writes the best recipe.

        Raises:
            InputError: no trial keeps the bound.
        """
        rows, best = [], None
        for trial in self.study.trials:
            look = trial.user_attrs.get("look")
            state = trial.state.name.lower()
            values = {key: self.options.space[key].decode(v) for key, v in trial.params.items()}
            if state == "fail" or not values:
                continue
            row = {"values": values, "state": state}
            if look is not None:
                row |= {"look": look, "points_lost": self._lost(look)}
                kept = self._lost(look) <= self._bound
                row["kept"] = kept
                if kept and (best is None or look[self.robust] > best["look"][self.robust]):
                    best = row
            rows.append(row)
        put(self.out, "trials.json", json.dumps(rows, indent=2) + "\n")
        self._print(rows, best)
        if not any("look" in row for row in rows):
            raise InputError(
                f"no trial was finished: all {len(rows)} diverged or were stopped; lower "
                "train.learning_rate or the strengths in tune.space"
            )
        if best is None:
            raise InputError(
                f"no trial keeps tune.at_most_lost ({self._bound:g} points of {self.measure}): "
                "allow more, add weaker values to tune.space, or make more --trials"
            )
        chosen = _with(self.recipe, self.options, best["values"])
        put(self.out, "best.yaml", chosen.to_yaml())
        say(f"best: {_words(best['values'])}: {self.out / 'best.yaml'}")

    def _print(self, rows: list[dict[str, Any]], best: dict[str, Any] | None) -> None:
        plain = [f"{self.plain[self.robust]:.3f}", f"{self.plain[self.measure]:.3f}"]
        said = [
            ["", "under attack", self.measure, "points lost", "values"],
            ["standard", *plain, "", ""],
        ]
        for number, row in enumerate(rows, 1):
            look = row.get("look")
            figures = ["", "", ""]
            if look is not None:
                figures = [f"{look[self.robust]:.3f}", f"{look[self.measure]:.3f}"]
                figures.append(f"{row['points_lost']:.1f}{'' if row['kept'] else ' too many'}")
            mark = "best" if row is best else "stopped" if look is None else ""
            said.append([f"{number} {mark}".strip(), *figures, _words(row["values"])])
        widths = [max(len(line[i]) for line in said) for i in range(4)]
        for line in said:
            cells = [f"{cell:>{width}}" for cell, width in zip(line[1:4], widths[1:], strict=True)]
            say("  ".join([f"{line[0]:<{widths[0]}}", *cells, line[4]]).rstrip())


def _words(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {json.dumps(value)}"
        for key, value in values.items()
    ).replace('"', "")
