"""The choice of a SIMD level asks for every feature that the compiler may use at that level."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CXX = shutil.which(os.environ.get("CXX", "g++"))

pytestmark = [
    pytest.mark.skipif(CXX is None, reason="needs a C++ compiler"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="levels of x86-64"),
]

#: Prints, for a processor that has everything and for each way to lack one thing, the level that is
#: chosen, and how often XGETBV was asked where the system does not allow it.
PROGRAM = r"""
#include "cpu/features.h"
#include <cstdio>
#include <cstring>
using namespace embattle;

int level(const char* lacks, uint64_t saved, uint32_t most_leaf, bool* asked) {
  bool allowed = true;
  for (const Feature& f : kFeatures)
    if (std::strcmp(f.name, "OSXSAVE") == 0 && lacks && std::strcmp(lacks, f.name) == 0)
      allowed = false;
  const auto cpuid = [&](uint32_t leaf, uint32_t (&answers)[4]) {
    if ((leaf & 0x7fffffffu) > most_leaf) return false;
    for (uint32_t& a : answers) a = ~0u;
    for (const Feature& f : kFeatures)
      if (lacks && std::strcmp(lacks, f.name) == 0 && f.leaf == leaf)
        answers[f.answer] &= ~(1u << f.bit);
    return true;
  };
  return highest_level(cpuid, [&] {
    if (!allowed) *asked = true;
    return saved;
  });
}

int main() {
  bool asked = false;
  std::printf("all 4 %d\n", level(nullptr, ~0ull, 7, &asked));
  for (const Feature& f : kFeatures)
    std::printf("%s %d %d\n", f.name, f.level - 1, level(f.name, ~0ull, 7, &asked));
  std::printf("no-ymm-state 2 %d\n", level(nullptr, 0x2, 7, &asked));
  std::printf("no-zmm-state 3 %d\n", level(nullptr, 0x6, 7, &asked));
  std::printf("no-mask-state 3 %d\n", level(nullptr, 0xc6, 7, &asked));
  std::printf("no-leaf-7 2 %d\n", level(nullptr, ~0ull, 1, &asked));
  std::printf("asked 0 %d\n", int(asked));
}
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, int]]:
    """By what is missing: the level that is right, and the one that is chosen."""
    folder = tmp_path_factory.mktemp("features")
    (folder / "main.cpp").write_text(PROGRAM)
    command = [str(CXX), "-std=c++20", f"-I{ROOT / 'csrc'}", "main.cpp", "-o", "main"]
    subprocess.run(command, cwd=folder, check=True)
    done = subprocess.run([str(folder / "main")], capture_output=True, text=True, check=True)
    lines = [line.split() for line in done.stdout.splitlines()]
    return {name: (int(right), int(chosen)) for name, right, chosen in lines}


def test_a_missing_feature_lowers_the_level(answers: dict[str, tuple[int, int]]) -> None:
    assert len(answers) > 20
    wrong = {name: levels for name, levels in answers.items() if levels[0] != levels[1]}
    assert not wrong


@pytest.mark.parametrize("level", [2, 3, 4])
def test_every_feature_that_the_compiler_may_use_is_asked_for(
    level: int, answers: dict[str, tuple[int, int]]
) -> None:
    def macros(march: str) -> set[str]:
        command = [str(CXX), f"-march={march}", "-dM", "-E", "-x", "c++", os.devnull]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return set(re.findall(r"#define __(\w+?)(?:__)? 1$", text, re.M))

    baseline = "x86-64" if level == 2 else f"x86-64-v{level - 1}"
    used = macros(f"x86-64-v{level}") - macros(baseline)
    used = {name for name in used if not name.startswith(("FP_FAST", "EVEX"))}  # consequences
    assert used, "the compiler says nothing of the level"
    asked = {name for name, levels in answers.items() if levels[0] == level - 1}
    assert used <= asked


def test_a_build_for_this_machine_has_the_level_that_the_library_chooses(tmp_path: Path) -> None:
    from embattle import _C

    command = [str(CXX), "-std=c++20", str(ROOT / "cmake" / "native_level.cpp"), "-o", "level"]
    subprocess.run(command, cwd=tmp_path, check=True)
    level = subprocess.run([str(tmp_path / "level")], capture_output=True, text=True, check=True)
    assert level.stdout == _C.build_info()["simd_available"].split(",")[-1]
