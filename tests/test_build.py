"""What the build must keep: SIMD levels share no code, and the library tells how it was built."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from embattle import _C

ROOT = Path(__file__).parents[1]
OBJECTS = sorted(ROOT.glob("build/*/CMakeFiles/embattle_cpu_*.dir/csrc/cpu/*.o"))
# Points to a function of the C++ runtime: the same data whatever the level.
DATA_ONLY = {"DW.ref.__gxx_personality_v0"}


def _symbols(path: Path) -> list[tuple[str, str]]:
    """The external symbols that an object file defines, as (kind, name)."""
    command = ["nm", "--extern-only", "--defined-only", "--format=posix", str(path)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return [(kind, name) for name, kind in (line.split()[:2] for line in lines)]


@pytest.mark.skipif(not OBJECTS, reason="an installed package has no object files")
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm, of binutils")
@pytest.mark.parametrize("path", OBJECTS, ids=lambda p: f"{p.parents[2].name}-{p.stem}")
def test_a_level_defines_nothing_that_another_could_replace(path: Path) -> None:
    # The linker keeps one of several weak definitions. If it kept that of a higher level, a lower
    # one would run instructions that the processor lacks.
    match = re.fullmatch(r"embattle_cpu_(v\d)\.dir", path.parents[2].name)
    assert match
    symbols = [s for s in _symbols(path) if s[1] not in DATA_ONLY]
    assert symbols, "the object defines nothing"
    weak = [name for kind, name in symbols if kind in "VWuvw"]
    assert not weak, "weak definitions, inline functions of a header perhaps"
    others = [name for _, name in symbols if f"_{match[1]}" not in name]
    assert not others, "not named after the level"


def test_build_info_tells_what_was_built() -> None:
    info = _C.build_info()
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", info["version"])
    assert info["torch_target"] == "2.10"
    levels = info["simd_available"].split(",")
    assert info["simd"] in levels
    assert levels == sorted(set(levels))
    assert bool(info["cuda_archs"]) == info["cuda"]
