"""The package's floors, and that the documents know the house as it is."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "python" / "embattle"
DOCUMENTS = ["CONTRIBUTING.md", "README.md", *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))]


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """What import-linter says of the package in a folder, under this repository's contract."""
    pytest.importorskip("importlinter")
    code = "import sys, importlinter.cli as c; sys.exit(c.lint_imports(no_cache=True))"
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_each_floor_imports_only_from_those_below_it() -> None:
    answer = lint(ROOT / "python")
    assert answer.returncode == 0, answer.stdout + answer.stderr


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("ops/clip.py", "from embattle.perturb.site import Site"),
        ("attacks/base.py", "import embattle.jobs.train"),
        ("objectives/base.py", "from embattle import clipping"),
        ("annex.py", "import torch"),
    ],
)
def test_an_import_from_above_is_noticed(file: str, line: str, tmp_path: Path) -> None:
    copy = tmp_path / "embattle"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    path = copy / file
    path.write_text((path.read_text() if path.exists() else "") + f"\n{line}\n")
    answer = lint(tmp_path)
    assert answer.returncode == 1, answer.stdout + answer.stderr
    assert Path(file).stem in answer.stdout


def places(text: str) -> list[str]:
    """What a text names in backticks that is a path."""
    quoted = re.findall(r"`([^`\s]+)`", text)
    return [q for q in quoted if "/" in q or Path(q).suffix in (".py", ".md", ".h", ".cpp", ".txt")]


def test_contributing_names_what_there_is() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    table = text[text.index("## Where things are") :]
    named = places(table[: table.index("\n## ", 1)])
    for place in named:
        assert [*ROOT.glob(place), *PACKAGE.glob(place)], f"{place} is not there"
    for path in PACKAGE.iterdir():
        if path.name == "__pycache__" or path.name.startswith("_C"):
            continue
        if path.is_dir() or path.suffix == ".py":
            name = path.name + "/" * path.is_dir()
            known = any(p == name or p.startswith(f"python/embattle/{name}") for p in named)
            assert known, f"CONTRIBUTING does not say what {name} is"
    for folder in tracked_folders():
        assert any(p.split("/")[0] == folder for p in named), f"CONTRIBUTING leaves out {folder}"


def tracked_folders() -> set[str]:
    """The folders at the top of the repository, hidden ones left out."""
    files = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return {f.split("/")[0] for f in files if "/" in f and not f.startswith(".")}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_paths_in_a_document_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    top = {p.name for p in ROOT.iterdir() if p.is_dir()} - {"runs"}
    for place in places(text):
        if place.split("/")[0] in top:
            assert list(ROOT.glob(place.split("::")[0])), f"{document}: {place} is not there"
    for link in re.findall(r"\]\(([^)#\s]+)\)", text):
        if "://" not in link:
            assert ((ROOT / document).parent / link).exists(), f"{document}: {link} is not there"
