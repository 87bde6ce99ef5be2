"""Where figures come from: the command, the data, the weights, versions and the device."""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from embattle.files import sha256
from embattle.jobs.doctor import version_of
from embattle.jobs.run_folder import Run
from embattle.jobs.trained import model_files
from embattle.tasks.base import Task


def command() -> list[str]:
    """The command line as it was given, the program by its name alone."""
    program, *words = sys.argv
    return [Path(program).name, *words]


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


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, and the device in words."""
    packages = ("embattle", "torch", "transformers", "accelerate", "numpy", "scipy")
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else None
    return {
        "python": platform.python_version(),
        **{name: version_of(name) for name in packages if version_of(name)},
        "device": gpu or f"CPU, {torch.get_num_threads()} threads of {os.cpu_count()} cores",
        "machine": platform.machine(),
    }


def _weights(folder: Path) -> str:
    """A hash of a model's safetensors files, with their names."""
    digest = hashlib.sha256()
    for file in model_files(folder):
        if file.suffix == ".safetensors":
            digest.update(f"{file.relative_to(folder)} {sha256(file)}\n".encode())
    return digest.hexdigest()
