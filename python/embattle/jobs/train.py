"""The training job: a model for each variant of the recipe, all under the same budget.

They share the data, the order of the batches, the first weights and the number of optimiser steps;
they differ in the loss alone. Accelerate brings devices, processes and mixed precision.
"""

from __future__ import annotations

import os
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from embattle.data.account import Account
from embattle.errors import InputError, need
from embattle.files import remove_unfinished
from embattle.jobs.fit import Fit, first_model
from embattle.jobs.loss import rehearse
from embattle.jobs.recipe import STANDARD, TRACKED, Recipe
from embattle.jobs.run_folder import Run, begin, check_place, clear, find_run, locked
from embattle.progress import say
from embattle.tasks.base import Task


def train(recipe: Recipe, out: Path, *, resume: bool = False, overwrite: bool = False) -> None:
    """Trains the models of all variants and leaves them in a folder.

    Nothing is written before the data and the model are there.

    Args:
        recipe: the job.
        out: the run's folder; it must not hold anything, unless one of the next two says so.
        resume: continue the run that is there; start one if there is none.
        overwrite: replace the run that is there.

    Raises:
        InputError: about whatever the user can mend.
        Interrupted: on Ctrl-C or SIGTERM, after a checkpoint was written.
    """
    began = time.monotonic()
    task = recipe.make_task()
    accelerator = make_accelerator(recipe, task, out)
    check_place(out, resume=resume, overwrite=overwrite)
    with locked(out, f"train {recipe.name}") if accelerator.is_main_process else nullcontext():
        done = _train(recipe, task, out, accelerator, resume=resume, overwrite=overwrite)
    if accelerator.is_main_process:
        spent = f"trained in {time.monotonic() - began:.0f} s: {out}"
        say(spent if done else f"{out} is complete; nothing to do (--overwrite trains it again)")
    accelerator.end_training()


def _train(
    recipe: Recipe, task: Task, out: Path, accelerator: Any, *, resume: bool, overwrite: bool
) -> bool:
    """The same, in a folder that no other process works in; False if there was nothing to do."""
    first = accelerator.is_main_process
    old = find_run(recipe, out, resume=resume, overwrite=overwrite)
    if old is not None and set(old.variants) >= set(recipe.variants):
        return False
    if first:
        remove_unfinished(out)
        say(f"{recipe.name}: reading data and model")
    account = Account()
    try:
        with accelerator.main_process_first():
            looked_at = () if recipe.train.validation is None else ("validation",)
            read(task, account, "train", *looked_at, recipe.audit.part)
            probe = first_model(task)
        if first:
            task.note_encoding(account, probe)
        rehearse(recipe, task, probe, processes=accelerator.num_processes)
    finally:
        if first:
            for line in account.lines():
                say(line)
    run = Run.of(task, account)
    if old is not None:
        old.require(run, out)
        run = old
    if first and old is None:
        begin(run, recipe, out)
    accelerator.wait_for_everyone()
    if recipe.train.trackers:
        (out / TRACKED).mkdir(exist_ok=True)
        accelerator.init_trackers(recipe.name, init_kwargs={"wandb": {"dir": str(out / TRACKED)}})
    try:
        for variant in recipe.variants:
            if variant not in run.variants:
                run.variants[variant] = Fit(recipe, variant, task, out, accelerator).go()
                if first:
                    run.write(out)
                    say(_spent(variant, run))
                accelerator.wait_for_everyone()
    except InputError:
        # What can be continued stays; a run without a single checkpoint is not worth a folder.
        if first and old is None and not run.variants and not list(out.glob("*/checkpoint.*")):
            clear(out)
        raise
    return True


def _spent(variant: str, run: Run) -> str:
    """What a variant's training took, beside the plain one's, where both were measured."""
    seconds, plain = run.variants[variant].seconds, run.variants.get(STANDARD)
    said = f"{variant}: trained in {seconds:.1f} s"
    if variant == STANDARD or plain is None or not plain.seconds:
        return said
    return f"{said}, {seconds / plain.seconds:.2f} times {STANDARD}"


def read(task: Task, account: Account, *parts: str) -> None:
    """Has a task read its data.

    Args:
        task: the task.
        account: is told what was read.
        parts: which must be there, with samples in them.

    Raises:
        InputError: the data cannot be used, or the task left something out.
    """
    task.read(account)
    for name in ("parts", "kind"):
        if not hasattr(task, name):
            raise InputError(f"{type(task).__name__}.read sets no {name}: see embattle.tasks.Task")
    for name in parts:
        if not len(task.parts.get(name, ())):
            there = ", ".join(f"{part} ({len(rows)})" for part, rows in task.parts.items())
            raise InputError(
                f"there are no samples in the {name} part, and this needs some; there are: "
                f"{there or 'none'}"
            )


def make_accelerator(recipe: Recipe, task: Task, out: Path) -> Any:
    """Accelerate's view of the devices and processes.

    Args:
        recipe: the job.
        task: its task.
        out: the run's folder, for trackers.

    Raises:
        InputError: if processes were started that do not know of each other, or the batch cannot
            be divided among them; or the task knows neither these nor mixed precision.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if not task.calls_model and (world > 1 or recipe.train.precision != "no"):
        raise InputError(
            f"task {recipe.task} trains in one process and in full precision: its losses are a "
            "method of the model, which wrappers do not see; use train.precision: no, without "
            "torchrun"
        )
    accelerate = need("accelerate")
    for tracker in recipe.train.trackers:
        need(tracker, "trackers")
    accelerator = accelerate.Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision=recipe.train.precision,
        gradient_accumulation_steps=recipe.train.accumulate,
        log_with=list(recipe.train.trackers) or None,
        project_config=accelerate.utils.ProjectConfiguration(str(out), str(out / TRACKED)),
    )
    if world != accelerator.num_processes:
        raise InputError(
            f"{world} processes were started but each is alone (Accelerate sees "
            f"{accelerator.num_processes}); start them with torchrun"
        )
    if recipe.train.batch_size % (world * recipe.train.accumulate):
        among = f"{world} processes" if world > 1 else f"{recipe.train.accumulate} passes"
        raise InputError(
            f"train.batch_size: {recipe.train.batch_size} cannot be divided among {among}"
            + (f" of {recipe.train.accumulate} passes" if world > 1 else "")
        )
    return accelerator
