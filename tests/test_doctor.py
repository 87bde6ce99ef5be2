"""The doctor, and the command line where something is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import embattle
import pytest
from embattle.jobs import doctor


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        (["80-real"], (8, 0), True),
        (["80-real"], (8, 9), True),
        (["86-real"], (8, 0), False),
        (["80-real"], (9, 0), False),
        (["80-real", "120-virtual"], (12, 1), True),
        (["120-virtual"], (9, 0), False),
        (["90"], (10, 0), True),
        ([], (8, 0), False),
    ],
)
def test_which_gpus_a_build_runs_on(
    archs: list[str], capability: tuple[int, int], runs: bool
) -> None:
    assert doctor.runs_on(archs, *capability) is runs


def test_facts_first_then_problems() -> None:
    report = doctor.examine()
    names = [name for name, _ in report.facts]
    assert {"python", "torch", "torch target", "SIMD level", "CUDA kernels", "threads"} <= {*names}
    report.problems[:] = []
    assert report.lines()[-1] == "Nothing is wrong."
    report.problems.append("x is broken: mend it")
    assert report.lines()[-1] == "Problem: x is broken: mend it"


def without(folder: Path, *modules: str) -> dict[str, str]:
    """An environment in which the package is there, but some modules are not."""
    package = folder / "embattle"
    package.mkdir()
    for file in Path(embattle.__file__).parent.iterdir():
        if not (file.name.startswith("_C.") and "_C" in modules):
            (package / file.name).symlink_to(file)
    blocked = [name for name in modules if name != "_C"]
    (folder / "sitecustomize.py").write_text(
        "import sys\n" + "".join(f"sys.modules[{name!r}] = None\n" for name in blocked)
    )
    import os

    return {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}


def ask(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "embattle", *words],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_without_the_native_library_the_doctor_says_what_to_do(tmp_path: Path) -> None:
    environment = without(tmp_path, "_C")
    answer = ask(environment, "doctor")
    assert answer.returncode == 1
    assert "pip install --no-build-isolation ." in answer.stdout.splitlines()[-1]
    assert ask(environment, "--help").returncode == 0
    assert "native library cannot be loaded" in ask(environment, "audit", "x").stderr


def test_without_the_extras_help_and_doctor_work(tmp_path: Path) -> None:
    environment = without(tmp_path, "typer", "transformers", "pydantic", "yaml")
    answer = ask(environment, "--help")
    assert answer.returncode == 0
    assert "pip install 'embattle[jobs]'" in answer.stdout
    assert ask(environment, "doctor").stdout.startswith("python")
    assert ask(environment, "train", "x.yaml").returncode == 2


def test_a_job_without_its_dependency_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("typer")
    answer = ask(without(tmp_path, "yaml"), "train", "x.yaml")
    assert answer.returncode == 2
    assert answer.stderr.startswith("error: ")
    assert "pip install 'embattle[jobs]'" in answer.stderr
    assert len(answer.stderr.splitlines()) == 1
