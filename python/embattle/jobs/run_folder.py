"""A run's folder: who works in it, what it says about itself, and what an interruption leaves."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import IO, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from embattle.audit.scores import OUTCOMES
from embattle.data.account import Account, listed
from embattle.errors import InputError
from embattle.files import UNFINISHED, write_text
from embattle.jobs import recipe as recipes
from embattle.jobs.recipe import TRACKED, Recipe
from embattle.tasks.base import Task

LOCK = ".lock"
# The texts that jobs write into a run's folder, all of them by `put`.
Name = Literal[
    "run.json",
    "recipe.yaml",
    "metrics.json",
    "report.html",
    "explanations.html",
    "explanations.json",
    "trials.json",
    "best.yaml",
]
# What Optuna writes into a study's folder, and the trial that is under way.
STUDY, TRIAL = "study.log", "trial"
_PICTURE = ".svg"
# What a run's folder may hold beside pictures and the models' folders; and what these may.
_WRITTEN = {*get_args(Name), OUTCOMES, STUDY, f"{STUDY}.lock"}
_OF_MODELS = {"recipe.yaml", "model.safetensors", "checkpoint.safetensors"}


class Trained(BaseModel):
    """What is known about a finished model.

    Attributes:
        seconds: the training took.
        validation: what is right of the validation part, and its loss; empty without one.
        history: the figures of each step.
        looks: the figures of each look at the validation part (`train.validation`).
        chosen: the step whose weights were taken; None: the last.
        weights: SHA-256 of the weights that were written; an audit is of these. None: not known.
    """

    model_config = ConfigDict(extra="forbid")

    seconds: float
    validation: dict[str, float]
    history: list[dict[str, float]]
    looks: list[dict[str, float]] = []
    chosen: int | None = None
    weights: str | None = None

    @property
    def chosen_look(self) -> dict[str, float]:
        """The look at the weights that were taken."""
        return [look for look in self.looks if self.chosen in (None, look["step"])][-1]


class Run(BaseModel):
    """What a run folder says about itself, in `run.json`.

    Attributes:
        facts: what the task found that the model depends on, such as classes.
        counts: examples in each part.
        fingerprint: SHA-256 over all examples; the audit checks that the data is still the same.
        reading: what was read and what was dropped, line by line.
        variants: what is known about each finished model.
    """

    model_config = ConfigDict(extra="forbid")

    format: Literal[2] = 2
    facts: dict[str, Any]
    counts: dict[str, Any]
    fingerprint: str
    reading: list[str] = []
    variants: dict[str, Trained] = {}

    @classmethod
    def of(cls, task: Task, account: Account) -> Run:
        """A run that begins with the data that the task has read."""
        found = {"facts": task.facts(), "counts": task.counts()}
        return cls(
            **json.loads(json.dumps(found)),
            fingerprint=task.fingerprint(),
            reading=account.lines(),
        )

    def write(self, folder: Path) -> None:
        """Writes `run.json`, all of it or nothing."""
        put(folder, "run.json", json.dumps(self.model_dump(), indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Run:
        """Reads `run.json`.

        Raises:
            InputError: if the folder is no run, or the file was changed.
        """
        file = folder / "run.json"
        try:
            return cls.model_validate(json.loads(file.read_text(encoding="utf-8")))
        except ValidationError as errors:
            first = errors.errors()[0]
            spot = ".".join(str(step) for step in first["loc"]) or "the whole"
            raise InputError(
                f"{file} is not as `embattle train` wrote it ({spot}: {first['msg']}); restore it, "
                "or train again with --overwrite"
            ) from errors
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(
                f"{folder} is not a run folder (no readable run.json); "
                "give a folder that `embattle train` wrote"
            ) from error

    def require(self, now: Run, folder: Path) -> None:
        """Raises InputError unless this run began with the same data as another one does now."""
        if now.fingerprint != self.fingerprint:
            raise InputError(
                f"the data is not what {folder} was trained on; restore it, or train again "
                "(--overwrite)"
            )
        if (now.facts, now.counts) != (self.facts, self.counts):
            raise InputError(
                f"the data has other classes, values or counts than {folder / 'run.json'} says, so "
                "that one of them was changed; restore it, or train again (--overwrite)"
            )


@contextmanager
def locked(folder: Path, doing: str) -> Iterator[None]:
    """Keeps other processes out of a folder.

    The lock is the kernel's (`flock`): it goes when the process goes, however that ends. The file
    `.lock` says who holds it. A folder that is made here and still empty at the end is removed.

    Args:
        folder: the run's folder; made where it is missing.
        doing: what is being done, for whoever is kept out.

    Raises:
        InputError: if another process holds the folder (it is named), or it cannot be written to.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stream = _take(folder)
    except OSError as error:
        raise InputError(
            f"cannot write to {folder}: {error.strerror or error}; choose another folder"
        ) from error
    try:
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": since, "doing": doing}
        # Who it is helps others, but nothing depends on it: a full disk does not stop here.
        with suppress(OSError):
            stream.truncate(0)
            stream.write(json.dumps(holder))
            stream.flush()
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        with suppress(OSError):
            stream.close()
        for path in missing:
            with suppress(OSError):
                path.rmdir()


def _take(folder: Path) -> IO[str]:
    """The lock file, opened and locked."""
    path = folder / LOCK
    while True:
        # Never through a link: what it points to would be emptied.
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        stream = os.fdopen(handle, "r+", encoding="utf-8")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(stream)
            stream.close()
            raise InputError(
                f"{folder} is in use by {holder}; wait until it ends, or choose another folder"
            ) from None
        except OSError:
            stream.close()
            raise
        # Whoever held it may have removed the file after it was opened here.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return stream
        stream.close()


def _holder(stream: IO[str]) -> str:
    try:
        said = json.loads(stream.read())
        return f"process {said['pid']} on {said['host']} since {said['since']} ({said['doing']})"
    except (ValueError, KeyError, TypeError, OSError):
        return "another process"


def check_place(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Raises InputError if a run can neither be nor begin here, before anything is touched."""
    if resume and overwrite:
        raise InputError("--resume and --overwrite exclude each other; give one")
    if folder.is_symlink() and (overwrite or not folder.exists()):
        raise InputError(
            f"--out: {folder} is a symbolic link to {os.readlink(folder)}; name the folder itself"
        )
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out: {folder} is a file; choose another folder")


def find_run(recipe: Recipe, folder: Path, *, resume: bool, overwrite: bool) -> Run | None:
    """The run to continue, or None if one is to be started; raises InputError if neither may be."""
    if not contents(folder):
        return None
    if not (folder / "run.json").is_file():
        raise InputError(f"--out: {folder} holds other files; choose a new or empty folder")
    if overwrite:
        others = _others(folder, recipe)
        if others:
            raise InputError(
                f"--overwrite: {folder} also holds what no run writes ({listed(others)}), and "
                "would remove it; move it away, or choose another folder"
            )
        return None
    run = Run.read(folder)
    if not resume:
        raise InputError(
            f"--out: {folder} holds a run; use --resume, --overwrite, or another folder"
        )
    if not run.variants and not (folder / "recipe.yaml").exists():
        return None  # stopped before anything was trained
    file = folder / "recipe.yaml"
    # Only the code that this recipe names as well is run.
    old = recipes.load(file, trust=recipes.named_task(file) == recipe.task)
    changed = recipes.differences(old, recipe)
    if changed:
        raise InputError(
            f"the recipe is not the one {folder} was begun with ({'; '.join(changed)}); "
            "use --overwrite or another --out"
        )
    return run


def begin(run: Run, recipe: Recipe, folder: Path) -> None:
    """Makes the folder hold this run alone.

    Wherever this is interrupted, the folder is known as a run, and none of an old one is taken for
    the new one's: without its recipe a run is not continued.
    """
    (folder / "recipe.yaml").unlink(missing_ok=True)
    run.write(folder)
    clear(folder, keep={"run.json"})
    put(folder, "recipe.yaml", recipe.to_yaml())


def put(folder: Path, name: Name, text: str) -> None:
    """Writes a file into a run's folder, whole or not at all; `--overwrite` may remove it."""
    write_text(folder / name, text)


def put_picture(folder: Path, stem: str, svg: str) -> None:
    """Writes a picture into a run's folder; else as `put`."""
    write_text(folder / f"{stem}{_PICTURE}", svg)


def contents(folder: Path) -> list[Path]:
    """What is in the folder besides the lock and unfinished files; nothing if there is none."""
    if not folder.is_dir():
        return []
    return [
        path
        for path in folder.iterdir()
        if path.name != LOCK and not path.name.startswith(UNFINISHED)
    ]


def _others(folder: Path, recipe: Recipe) -> list[str]:
    """The names in a run's folder of what is not a run's."""
    found = []
    for path in contents(folder):
        known = path.name in _WRITTEN or path.suffix == _PICTURE
        if path.is_dir() and not path.is_symlink():
            held = {one.name for one in path.iterdir() if not one.name.startswith(UNFINISHED)}
            known = (
                path.name in {TRACKED, TRIAL, *recipe.variants}
                or not held
                or bool(held & _OF_MODELS)
            )
        if not known:
            found.append(repr(path.name))
    return sorted(found)


def clear(folder: Path, *, keep: set[str] | None = None) -> None:
    """Removes what is in the folder, but for the lock and the names to keep."""
    for path in contents(folder):
        if path.name in (keep or ()):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
