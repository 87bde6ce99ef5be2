"""The GPU cost model: counters that are exact, the scaling of what is counted in part, SASS."""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from emulated_case import IN_EMULATOR, emulated, emulator_build

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import gpu_launch
import gpu_model
import gpu_model_cases
import sass_loops

pytestmark = IN_EMULATOR[0]  # a compiler
on_device = IN_EMULATOR[1]  # leaves the emulated device as it was
Counts = dict[str, Any]


@cache
def toys() -> ctypes.CDLL:
    source = emulator_build.HERE / "tracetest.cu"
    lib = ctypes.CDLL(str(emulator_build.build("tracetest", [source], "watch", module=True)))
    lib.run.restype = ctypes.c_bool
    lib.emu_trace.argtypes = [ctypes.c_int, ctypes.c_uint64]
    lib.emu_trace_take.restype = ctypes.c_char_p
    return lib


def toy(
    name: str,
    threads: int = 64,
    grid: int = 1,
    n: int = 0,
    parameter: int = 0,
    cohorts: int = 0,
    skip: int = 0,
) -> Counts:
    """What a kernel of tracetest.cu costs; its input starts `skip` floats behind a sector."""
    x, y = torch.zeros(1 << 16)[skip:], torch.zeros(1 << 16)
    lib = toys()
    lib.emu_trace(1, cohorts)
    pointers = ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr())
    assert lib.run(name.encode(), grid, threads, *pointers, n, parameter)
    (counts,) = json.loads(lib.emu_trace_take())
    lib.emu_trace(0, 0)
    return dict(counts)


def cost(requests: int, bytes: int, units: int, ideal: int, wide: int = 0) -> dict[str, int]:
    return {"requests": requests, "bytes": bytes, "units": units, "ideal": ideal, "wide": wide}


def test_a_copy_is_counted_to_the_byte() -> None:
    counts = toy("copy", 128, 4, n=8192, parameter=1)
    whole = cost(64, 32768, 1024, 1024, 64)
    assert counts["read"] == counts["write"] == whole
    assert counts["first_read"] == counts["first_write"] == 1024
    assert counts["shared_read"]["requests"] == counts["block_barriers"] == 0


def test_what_is_read_again_is_told_apart() -> None:
    counts = toy("copy", 128, 4, n=8192, parameter=3)
    assert counts["read"]["units"] == 3 * 1024
    assert counts["first_read"] == counts["first_write"] == 1024


def test_strides_and_places_off_a_sector_cost_sectors() -> None:
    assert toy("strided", n=64, parameter=9)["read"] == cost(2, 256, 64, 8)
    assert toy("strided", n=64, parameter=2)["read"] == cost(2, 256, 16, 8)
    assert toy("strided", n=64, parameter=1, skip=1)["read"] == cost(2, 256, 10, 8)
    # One address for all lanes.
    assert toy("strided", n=64, parameter=0)["read"] == cost(2, 8, 2, 2)


@pytest.mark.parametrize(
    ("name", "stride", "waves", "ideal"),
    [
        ("words", 1, 2, 2),
        ("words", 2, 4, 2),
        ("words", 32, 64, 2),
        ("words", 33, 2, 2),
        ("words", 0, 2, 2),  # a broadcast
        ("pairs", 1, 4, 4),
        ("pairs", 2, 8, 4),
        ("pairs", 16, 64, 4),
        ("quads", 1, 8, 8),
        ("quads", 2, 16, 8),
    ],
)
def test_bank_conflicts(name: str, stride: int, waves: int, ideal: int) -> None:
    counts = toy(name, parameter=stride)
    written = counts["shared_write"]
    assert (written["requests"], written["units"], written["ideal"]) == (2, waves, ideal)
    assert counts["block_barriers"] == 1


def test_lanes_that_go_round_less_often_leave_a_request_smaller() -> None:
    counts = toy("uneven", threads=32)
    assert counts["read"]["requests"] == 31
    assert counts["read"]["bytes"] == 4 * sum(range(1, 32))


def test_teams_of_a_warp_that_agree_by_themselves_load_together() -> None:
    counts = toy("teams")
    assert counts["read"] == cost(4, 512, 16, 16)
    assert counts["warp_operation_lanes"] == 3 * 64


def test_an_asynchronous_copy_is_a_load_and_a_write_to_shared_memory() -> None:
    counts = toy("staged")
    assert counts["read"] == counts["write"] == cost(2, 1024, 32, 32, 2)
    assert counts["shared_write"] == counts["shared_read"] == cost(2, 1024, 8, 8, 2)
    assert counts["copied"] == 1024
    assert counts["waited"] == 16  # by each thread


def scaled(counts: Counts) -> dict[str, float]:
    """Every number of a launch, for its whole grid."""
    factor = counts["cohorts"] / counts["ran"]
    numbers = {k: v for k, v in counts.items() if isinstance(v, int)}
    for name in ("read", "write", "shared_read", "shared_write"):
        numbers |= {f"{name} {k}": v for k, v in counts[name].items()}
    for name in ("kernel", "grid", "threads", "cluster", "shared", "cooperative", "waited"):
        numbers.pop(name)
    for name in ("cohorts", "ran", "blocks_ran"):
        numbers.pop(name)
    return {k: v * factor for k, v in numbers.items()}


def step(groups: int, elements: int) -> Callable[[], Any]:
    made = torch.Generator().manual_seed(5)
    delta, grad = (torch.randn(groups, elements, generator=made) for _ in range(2))
    return lambda: emulated.pgd_step(delta, grad, norm="l2", step_size=3.0, eps=1.0)


@on_device
@pytest.mark.parametrize("elements", [64, 2048])
@pytest.mark.parametrize("groups", [64, 128])
def test_a_part_of_a_grid_tells_what_the_whole_costs(groups: int, elements: int) -> None:
    call = step(groups, elements)
    (whole,) = gpu_model_cases.count(call)
    (part,) = gpu_model_cases.count(call, cohorts=4)
    assert part["ran"] == 4 or whole["grid"] <= 4
    assert scaled(part) == scaled(whole)


@on_device
def test_a_smaller_device_with_a_smaller_problem_tells_what_the_whole_costs() -> None:
    found = []
    for groups in (2, 4):
        # Too long for a block of this device: blocks at large.
        emulated.kernels().set_device(2 * groups, 8, 48 << 10, 96 << 10)
        cleared, counts = gpu_model_cases.count(step(groups, 16384))
        assert cleared["memset_bytes"] == 128 * groups  # where the blocks of a group meet
        assert counts["cooperative"]
        found.append(scaled(counts))
    small, large = found
    assert large == {name: 2 * value for name, value in small.items()}


@on_device
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(64, 64), (8, 4096), (2, 40000)])
def test_a_step_moves_what_it_has_to_and_no_more(
    norm: str, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    call = lambda: emulated.pgd_step(x, x, norm=norm, step_size=0.3, eps=1.0)  # noqa: E731
    counts = gpu_model_cases.count(call)[-1]
    one = x.numel() * x.element_size()
    assert counts["write"]["bytes"] == one
    assert counts["read"]["bytes"] == 2 * one
    for name in ("read", "write"):
        assert counts[name]["units"] == counts[name]["ideal"]
    places = counts["shared_places"].values()
    hot = sum(requests for requests, _, _ in places) / 10
    assert all(waves == ideal for requests, waves, ideal in places if requests >= hot)


# ---- Machine code ----

LISTING = """\
\tcode for sm_90
\t\tFunction : _Z4kern
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/              @!P0 BRA 0x00a0 ;
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/                   LDG.E.128 R8, desc[UR4][R2.64+0x200] ;
        /*0040*/               @P1 BRA 0x0060 ;
        /*0050*/                   CALL.REL.NOINC 0x00b0 ;
        /*0060*/                   DFMA R4, R4, R4, R6 ;
        /*0070*/                   F2F.F64.F32 R10, R8 ;
        /*0080*/                   IADD3 R2, R2, 0x400, RZ ;
        /*0090*/               @P2 BRA 0x0020 ;
        /*00a0*/                   EXIT ;
        /*00b0*/                   RET.REL.NODEC R2 0x0 ;
"""


def test_the_shortest_way_round_a_hot_loop_is_found() -> None:
    ((key, text),) = sass_loops.functions(LISTING).items()
    assert key == ("_Z4kern", "sm_90")
    (loop,) = sass_loops.hot_loops(sass_loops.instructions(text))
    assert loop.access == "load"
    assert loop.accesses == {"load": 2}
    assert loop.length == 7  # not the call
    pipes = sass_loops.cycles(loop.names, 2)
    assert pipes == {
        "issue": 7 / 4,
        "integer": 0.5,
        "fp64": 0.5,
        "conversion": 2.0,
        "load and store": 8.0,
    }


def test_a_pass_that_only_reads_is_not_the_one_that_stores() -> None:
    text = LISTING.replace("CALL.REL.NOINC 0x00b0", "STG.E.128 desc[UR4][R2.64], R4")
    ((_, body),) = sass_loops.functions(text).items()
    loops = sass_loops.hot_loops(sass_loops.instructions(body))
    by_access = {loop.access: loop for loop in loops}
    assert by_access["load"].accesses == {"load": 2}
    assert by_access["store"].accesses == {"load": 2, "store": 1}
    assert by_access["store"].length == by_access["load"].length + 1


@pytest.mark.parametrize(
    ("threads", "registers", "shared", "blocks"),
    [
        (256, 64, 0, 4),
        (256, 65, 0, 3),
        (512, 128, 0, 1),
        (128, 32, 0, 16),
        (128, 32, 100 << 10, 2),
        (32, 16, 0, 32),
    ],
)
def test_occupancy(threads: int, registers: int, shared: int, blocks: int) -> None:
    assert gpu_launch.occupancy(gpu_launch.H100, threads, registers, shared) == blocks


# ---- The prediction ----


def launch(**changes: Any) -> gpu_launch.Launch:
    """A copy of 2^30 bytes by 128 threads and two 16-byte loads a thread."""
    moved = cost(1 << 20, 1 << 29, 1 << 24, 1 << 24, 1 << 20)
    nothing = cost(0, 0, 0, 0)
    counts: Counts = {
        "grid": 132 * 64,
        "threads": 128,
        "cluster": 1,
        "shared": 0,
        "cooperative": 0,
        "cohorts": 132 * 64,
        "ran": 132 * 64,
        "blocks_ran": 132 * 64,
        "memset_bytes": 0,
        "copied": 0,
        "waited": 0,
        "first_read": 1 << 24,
        "first_write": 1 << 24,
        "atomics": 0,
        "block_barriers": 0,
        "warp_operation_lanes": 0,
        "cluster_barriers": 0,
        "grid_barriers": 0,
        "read": moved,
        "write": moved,
        "shared_read": nothing,
        "shared_write": nothing,
        "shared_places": {},
    }
    ((_, text),) = sass_loops.functions(LISTING).items()
    code = gpu_launch.Code(32, 0, text)
    return gpu_launch.Launch("copy_kernel", {**counts, **changes}, code, gpu_launch.H100)


def case(**changes: Any) -> gpu_model_cases.Case:
    return gpu_model_cases.Case("a copy", lambda: None, 1 << 30, traffic_bar=True, **changes)


def test_a_copy_runs_at_the_rate_of_a_copy() -> None:
    result = gpu_model.Result(case(), gpu_launch.H100, [launch()], [])
    assert result.traffic == 1
    assert result.launches[0].resident == 16
    assert result.launches[0].waiting == 16 * 128 * 32
    assert result.launches[0].predicted()[1] == "memory"
    assert result.share == pytest.approx(1, rel=1e-6)
    assert result.missed() == []


def test_too_few_bytes_in_flight_limit_it() -> None:
    few = launch(shared=200 << 10)  # one block of 4 KB on a multiprocessor
    result = gpu_model.Result(case(), gpu_launch.H100, [few], [])
    assert few.predicted()[1] == "bytes in flight"
    assert result.share == pytest.approx(4 / 32, rel=0.01)
    assert result.missed() == ["in flight"]


def test_what_is_read_twice_counts_but_for_lists() -> None:
    twice = launch(read=cost(2 << 20, 2 << 29, 2 << 24, 2 << 24, 2 << 20))
    result = gpu_model.Result(case(), gpu_launch.H100, [twice], [])
    assert (result.traffic, result.again) == (1.5, 0.5)
    assert result.missed() == ["traffic"]
    assert gpu_model.Result(case(list=True), gpu_launch.H100, [twice], []).missed() == []


def test_a_row_of_the_table_has_all_columns() -> None:
    result = gpu_model.Result(case(), gpu_launch.H100, [launch()], ["group.cuh:7 x2.0"])
    row = gpu_model.row(result)
    assert row.count("|") == len(gpu_model.COLUMNS) + 1
    assert "conflicts" in row.split("|")[-2]
    assert "Predicted, not measured" in gpu_model.table([result])
