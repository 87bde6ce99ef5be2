"""Every SIMD level that the processor has gives results within tolerance of the reference.

The level is chosen when the library is loaded: each runs in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from embattle import _C

TESTS = Path(__file__).parent
LEVELS = _C.build_info()["simd_available"].split(",")

CHECK = """
import sys
import samples, torch
from compare import assert_matches_reference, run
from embattle import _C

torch.set_num_threads(1)
assert _C.build_info()["simd"] == sys.argv[1], _C.build_info()["simd"]
ran = 0
for op in samples.OPS:
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"embattle::{op}", "CPU"):
        continue
    chosen = samples.for_op(op)
    for sample in chosen[:: 1 + len(chosen) // 40]:
        for dtype in samples.DTYPES:
            assert_matches_reference(op, sample.call(dtype), run(op, sample.call(dtype)))
            ran += 1
print(ran)
"""


def _python(script: str, *arguments: str, level: str) -> str:
    paths = [str(TESTS), *sys.path]
    environment = {
        **os.environ,
        "EMBATTLE_SIMD": level,
        "PYTHONPATH": os.pathsep.join(p for p in paths if p),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


@pytest.mark.parametrize("level", LEVELS)
def test_level_is_what_the_reference_says(level: str) -> None:
    assert int(_python(CHECK, level, level=level)) > 500


@pytest.mark.parametrize("wanted", ["v9", ""])
def test_unknown_level_leaves_the_best(wanted: str) -> None:
    script = "from embattle import _C; print(_C.build_info()['simd'])"
    script = "import torch; " + script
    assert _python(script, level=wanted) == LEVELS[-1]
