"""What the Makefile's targets install and build: the demo little, the tests all of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(
    not (ROOT / "Makefile").is_file() or shutil.which("make") is None,
    reason="needs make, and a checkout",
)


def _needed(*purposes: str) -> set[str]:
    """The names of the packages for some purposes."""
    command = [sys.executable, str(ROOT / "tools" / "requirements.py"), *purposes]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return {line.split(">")[0].split("=")[0] for line in lines}


def _recipes(*targets: str) -> str:
    """What make would run for targets of which nothing is there, without running it."""
    of_make = ("MAKE", "MFLAGS", "SIMD_LEVELS")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(of_make)}
    command = ["make", "-n", "--always-make", "PY=python", *targets]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_each_purpose_has_its_packages() -> None:
    assert {"cmake", "ninja", "pybind11"} <= _needed("build")
    assert {"transformers", "typer"} <= _needed("jobs")
    demo = _needed("build", "jobs")
    assert not demo & {"pytest", "mypy", "ruff", "lightning", "peft", "hypothesis", "clang-format"}
    assert {"pytest", "hypothesis"} <= _needed("test")
    assert _needed("mutation") == {"cosmic-ray", "coverage"}


def test_the_demo_compiles_one_level_and_the_tests_all() -> None:
    assert "EMBATTLE_SIMD_LEVELS=native" in _recipes("build/dev/.native")
    for target in ("build/dev/.stamp", "test", "device-test", "cuda-check"):
        said = _recipes(target)
        assert 'EMBATTLE_SIMD_LEVELS="v2;v3;v4"' in said
        assert "native" not in said.replace("build/dev/.native", "").replace("native code", "")
    demo = _recipes("demo")
    assert "EMBATTLE_SIMD_LEVELS=native" in demo
    assert "v2;v3;v4" not in demo
    # What was built for all levels is not built again for one.
    assert "touch build/dev/.native" in _recipes("build/dev/.stamp")
