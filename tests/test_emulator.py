"""The emulator finds the faults that it exists to find, and none where there is none."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent / "emulator"))
import emulator_build as build

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="needs a C++ compiler")

ORDERS = ["forward", "reverse", "1", "2"]


@cache
def selftest(variant: str) -> Path:
    return build.build("selftest", [build.HERE / "selftest.cu"], variant, module=False)


def run(case: str, order: str, variant: str = "watch") -> tuple[int, str]:
    done = subprocess.run(
        [selftest(variant), case, order], capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("case", "value"),
    [
        ("good", 32896),
        ("half_warps", 136),
        ("syncwarp", 2),
        ("cluster_sum", 4),
        ("grid_barrier", 3),
        ("grid_sum", 10),
        ("grid_barrier_orders_shared", 64),
    ],
)
def test_a_right_kernel_gives_its_result_in_every_order(case: str, value: int, order: str) -> None:
    for variant in ("watch", "asan"):
        code, text = run(case, order, variant)
        assert code == 0, text
        assert float(text.split()[0]) == value


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("case", "complaints"),
    [
        ("missing_barrier", ["race on shared memory", "not written"]),
        ("missing_barrier_after_reading", ["race on shared memory"]),
        ("missing_syncwarp", ["race on shared memory", "not written"]),
        ("divergent_barrier", ["divergent barrier"]),
        ("divergent_shuffle", ["deadlock", "which has left"]),
        ("shuffle_outside_mask", ["which is not in its mask"]),
        ("unwritten_shared", ["not written"]),
        ("unwritten_static", ["not written"]),
        ("shared_out_of_bounds", ["out of bounds"]),
        ("async_without_wait", ["not written"]),
        ("cluster_leaves_early", ["no barrier between"]),
        ("cluster_missing_barrier", ["race on shared memory", "not written"]),
        ("block_leaves_before_grid_barrier", ["divergent barrier"]),
        ("thread_leaves_before_grid_barrier", ["divergent barrier"]),
        ("mixed_barriers", ["deadlock"]),
        ("grid_barrier_not_cooperative", ["not cooperative"]),
        ("too_many_threads", ["launch refused"]),
        ("too_much_shared", ["launch refused"]),
        ("does_not_fit", ["launch refused"]),
    ],
)
def test_a_fault_is_reported_in_every_order(case: str, complaints: list[str], order: str) -> None:
    code, text = run(case, order)
    assert code == 1
    assert any(complaint in text for complaint in complaints), text


@pytest.mark.parametrize("order", ORDERS)
def test_a_missing_grid_barrier_shows_in_the_result_of_every_order(order: str) -> None:
    # Global memory is not watched; blocks that live side by side still run one before the other.
    code, text = run("missing_grid_barrier", order)
    assert code == 0, text
    assert float(text.split()[0]) != 10


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", ["global_out_of_bounds", "shared_out_of_bounds"])
def test_address_sanitizer_sees_an_access_out_of_bounds(case: str, order: str) -> None:
    code, text = run(case, order, "asan")
    assert code != 0
    assert "AddressSanitizer" in text
    assert case in text
