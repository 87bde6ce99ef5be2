"""What the tests that run CUDA kernels in the emulator share."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent / "emulator"))
import emulated
import emulator_build

__all__ = ["IN_EMULATOR", "ORDERS", "emulated"]

#: In which the fibres run: an order and its seed.
ORDERS = (("forward", 0), ("reverse", 0), ("random", 1), ("random", 2))

#: Marks of a module: skipped without a compiler; the device is as it was after each test.
IN_EMULATOR = [
    pytest.mark.skipif(emulator_build.compiler() is None, reason="needs a C++ compiler"),
    pytest.mark.usefixtures("emulator_reset"),
]
