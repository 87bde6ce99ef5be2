"""The package's floors, and that the documents know the house as it is."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from itertools import pairwise
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
    for folder in {name.split("/")[0] for name in folders()}:
        assert any(p.split("/")[0] == folder for p in named), f"CONTRIBUTING leaves out {folder}"


def folders() -> list[str]:
    """The repository's folders with files in them, as `a/b/`; hidden and ignored ones left out."""
    ignored = {line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()}
    found = []
    for path, below, files in os.walk(ROOT):
        below[:] = [d for d in below if not d.startswith(".") and d not in ignored]
        below[:] = [d for d in below if not d.endswith(".egg-info")]
        if files and path != str(ROOT):
            found.append(f"{Path(path).relative_to(ROOT)}/")
    return found


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


def test_the_tree_is_the_repositorys() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    tree = re.search(r"^## The tree\n\n```\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert tree is not None
    entries = [line.split(maxsplit=1) for line in tree.group(1).splitlines()]
    inside = [line.startswith("  ") for line in tree.group(1).splitlines()]
    names = [
        f"python/embattle/{name[0]}" if within else name[0]
        for name, within in zip(entries, inside, strict=True)
    ]
    # Folders of one study are named in the folder above.
    there = [f for f in folders() if not f.startswith("benchmarks/clipping_robustness")]
    assert sorted(names) == sorted(there)
    assert names == list(dict.fromkeys(names))
    undescribed = [name for name, entry in zip(names, entries, strict=True) if len(entry) < 2]
    assert undescribed == ["python/embattle/"]


def test_the_floors_are_drawn_as_they_are() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    drawn = re.search(r"```mermaid\n(.*?)```", text, re.DOTALL)
    assert drawn is not None
    steps = {
        (low, high)
        for line in drawn.group(1).splitlines()
        if (
            found := re.match(r"  (\w+)\[.*?\] --> (.*)", line)
            or re.match(r"  (\w+) --> (.*)", line)
        )
        for low in [found.group(1)]
        for high in found.group(2).split(" & ")
    }
    project = (ROOT / "pyproject.toml").read_text()
    layers = re.search(r"^layers = \[(.*?)^\]", project, re.MULTILINE | re.DOTALL)
    assert layers is not None
    floors = [line.strip(' ",').split(" | ") for line in layers.group(1).strip().splitlines()]
    floors = [
        floor for floor in reversed(floors) if floor[0] not in ("__main__", "errors", "files")
    ]
    wanted = {(low, high) for below, above in pairwise(floors) for low in below for high in above}
    assert steps == wanted | {("low", "ops")}
