"""What measured figures belong to."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import embattle as eb
import torch


def origin(threads: int) -> dict[str, Any]:
    """The machine, the versions, the commit, and whether the sources differ from it."""

    def git(*words: str) -> str:
        run = subprocess.run(
            ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
        return run.stdout.strip()

    info = Path("/proc/cpuinfo")
    names = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in names if line.startswith("model name")]
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": git("rev-parse", "--short", "HEAD"),
        "changed": bool(git("status", "--porcelain", "../python", "../csrc", "*.py")),
        "machine": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "embattle": eb.__version__,
    }


def in_words(about: dict[str, Any]) -> str:
    """The same in a line of text."""
    state = " with changes" if about["changed"] else ""
    return (
        f"{about['date']}, commit {about['commit']}{state}, torch {about['torch']}, "
        f"{about['threads']} threads on {about['machine']} ({about['cores']} cores)"
    )
