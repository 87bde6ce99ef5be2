"""A finished model of a run, read back without its data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from embattle.errors import InputError
from embattle.files import UNFINISHED
from embattle.jobs import recipe as recipes
from embattle.jobs.recipe import Recipe
from embattle.tasks.base import Task


@dataclass(frozen=True)
class TrainedModel:
    """A model that `embattle train` finished.

    Attributes:
        folder: where it was.
        recipe: by which it was trained.
        task: has not read any data, and knows of it what the model depends on.
        model: in evaluation mode, on the CPU.
    """

    folder: Path
    recipe: Recipe
    task: Task
    model: nn.Module


def chosen_device() -> torch.device:
    """Where the jobs run finished models: on a GPU if torch sees one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_trained(folder: Path, *, trust: bool = False) -> TrainedModel:
    """Reads a model back.

    Args:
        folder: one model's: `standard` or `hardened` in a run's folder, or what `embattle export`
            made of it.
        trust: whether a task that is code of one's own may be run.

    Raises:
        InputError: the folder holds no such model.
    """
    if not (folder / "recipe.yaml").is_file():
        raise InputError(
            f"{folder} holds no trained model; give one that `embattle train` wrote, such as "
            "runs/NAME/hardened"
        )
    if (folder / "run.json").is_file():
        models = sorted(path.parent.name for path in folder.glob("*/recipe.yaml"))
        raise InputError(
            f"{folder} is a run with several models; name one: "
            f"{', '.join(str(folder / name) for name in models) or '(none is finished)'}"
        )
    recipe = recipes.load(folder / "recipe.yaml", trust=trust)
    task = recipe.make_task()
    return TrainedModel(folder, recipe, task, task.load(folder).eval())


def model_files(folder: Path) -> list[Path]:
    """The files of a model, by their names: all but hidden ones and what a stop left."""
    found = []
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        hidden = any(part.startswith((".", UNFINISHED)) for part in parts)
        if path.is_file() and not hidden and path.name != "checkpoint.safetensors":
            found.append(path)
    return found
