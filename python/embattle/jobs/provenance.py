"""Fingerprints of what an audit examined: the data and the weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
    """
    return {
        "data": run.fingerprint,
        "part": task.part_fingerprint(part),
        "weights": {name: _weights(folder / name) for name in models},
    }


def together(found: Mapping[str, Any]) -> str:
    """One hash of what `fingerprints` gave."""
    lines = [found["data"], found["part"], *(f"{k} {v}" for k, v in found["weights"].items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _weights(folder: Path) -> str:
    """A hash of a model's safetensors files, with their names."""
    digest = hashlib.sha256()
    for file in model_files(folder):
        if file.suffix == ".safetensors":
            digest.update(f"{file.relative_to(folder)} {sha256(file)}\n".encode())
    return digest.hexdigest()
