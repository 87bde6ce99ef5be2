"""The command, the versions and the device that figures come from."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from embattle.errors import version_of

# Of those that are installed, the versions that may change a figure.
_PACKAGES = ("embattle", "torch", "transformers", "accelerate", "numpy", "scipy")


def command() -> list[str]:
    """The command line as it was given, the program by its name alone."""
    program, *words = sys.argv
    return [Path(program).name, *words]


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, and the device in words."""
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else None
    versions = {name: version_of(name) for name in _PACKAGES}
    return {
        "python": platform.python_version(),
        **{name: version for name, version in versions.items() if version is not None},
        "device": gpu or f"CPU, {torch.get_num_threads()} threads of {os.cpu_count()} cores",
        "machine": platform.machine(),
    }
