"""Fingerprints of what an audit examined: the data and the weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from embattle.errors import InputError
from embattle.files import sha256
from embattle.jobs.run_folder import Run
from embattle.jobs.trained import model_files
from embattle.tasks.base import Task


def fingerprints(folder: Path, run: Run, task: Task, part: str, models: list[str]) -> Any:
    """SHA-256 of the data, of the part that is attacked, and of each model's weights.

    Args:
        folder: the run's.
        run: what it says of itself.
        task: which has read the data.
        part: the part that is attacked.
        models: the names of the models.

    Raises:
        InputError: see `trained_weights`.
    """
    return {
        "data": run.fingerprint,
        "part": task.part_fingerprint(part),
        "weights": trained_weights(folder, run, models),
    }


def trained_weights(folder: Path, run: Run, models: Sequence[str]) -> dict[str, str]:
    """Check that weights are those that the training wrote; give their hashes, by model.

    Args:
        folder, run, models: see `fingerprints`.

    Raises:
        InputError: they are others, or another model's.
    """
    found = {name: weights_of(folder / name) for name in models}
    for name, digest in found.items():
        written = run.variants[name].weights
        if written in (None, digest):  # runs of older versions have none
            continue
        owners = [other for other, one in run.variants.items() if one.weights == digest]
        which = f" (they are those of {owners[0]!r})" if owners else ""
        raise InputError(
            f"the weights in {folder / name} are not those that `embattle train` wrote{which}; "
            "restore them, train again with --overwrite, or audit weights of your own with "
            "embattle.audit.audit_model"
        )
    return found


def together(found: Mapping[str, Any]) -> str:
    """One hash of what `fingerprints` gave."""
    lines = [found["data"], found["part"], *(f"{k} {v}" for k, v in found["weights"].items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def weights_of(folder: Path) -> str:
    """A hash of a model's safetensors files, with their names."""
    digest = hashlib.sha256()
    for file in model_files(folder):
        if file.suffix == ".safetensors":
            digest.update(f"{file.relative_to(folder)} {sha256(file)}\n".encode())
    return digest.hexdigest()
