"""What the CUDA kernels ask of a GPU, counted without one; `make gpu-model` calls it.

    python tools/gpu_model.py [--build build/gpu-model] [--out TABLE.md] [--only NAME ...]

Runs every op's kernels at real sizes in the emulator, on devices shaped like an A100 and an H100,
and counts global memory traffic, sectors, bank conflicts, barriers and launches
(tests/emulator/trace.h); reads registers and hot loops from what nvcc made of them; and predicts
from these what limits each kernel, and its share of a copy's rate. Nothing of it was measured on a
GPU.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import check_cuda_kernels
import sass_loops

ROOT = Path(__file__).resolve().parent.parent
SECTOR = 32


@dataclass(frozen=True)
class Gpu:
    """A device's limits, from NVIDIA's documents; latencies as published measurements have them."""

    name: str
    arch: str
    multiprocessors: int
    shared_per_block: int  # bytes
    shared_per_multiprocessor: int
    clock: float  # GHz
    bandwidth: float  # GB/s
    latency: float  # cycles to global memory, when nothing else is under way
    in_flight: int  # bytes that a multiprocessor has to wait for at once: see IN_FLIGHT
    fp64: float  # warp instructions a cycle of a multiprocessor
    major: int

    @property
    def bytes_per_cycle(self) -> float:
        """A multiprocessor's share of the memory's bandwidth."""
        return self.bandwidth / self.clock / self.multiprocessors


#: in_flight is what CUB asks for in its tuning of cub::DeviceTransform (CCCL): latency times
#: bandwidth as it is under load. It is above the product with the latency of an idle memory.
A100 = Gpu("A100", "sm_80", 108, 163 << 10, 164 << 10, 1.41, 2039, 466, 16 << 10, 1, 8)
H100 = Gpu("H100", "sm_90", 132, 227 << 10, 228 << 10, 1.755, 3352, 479, 32 << 10, 2, 9)

# Assumed, in cycles: what a thread waits for, beside memory.
WARP_OPERATION, BLOCK_BARRIER, CLUSTER_BARRIER, GRID_BARRIER = 30, 40, 400, 2000
LAUNCH = 2.5e-6  # seconds from one small kernel of a stream to the next
COPY = 0.92  # of the memory's bandwidth


@dataclass
class Code:
    """What nvcc made of a kernel."""

    registers: int
    shared: int = 0  # static, bytes
    listing: str = ""  # of its instructions, as cuobjdump has it

    @cached_property
    def loops(self) -> list[sass_loops.Loop]:
        return sass_loops.hot_loops(sass_loops.instructions(self.listing))


@dataclass
class Launch:
    """What one launch costs."""

    kernel: str
    counts: Mapping[str, Any]  # as the emulator tells them
    code: Code | None
    gpu: Gpu

    @property
    def scale(self) -> float:
        """How many times what was counted the whole launch is."""
        return self.counts["cohorts"] / self.counts["ran"] if self.counts["ran"] else 1.0

    def sectors(self, *names: str) -> float:
        return self.scale * sum(self.counts[name]["units"] for name in names)

    @property
    def bytes_moved(self) -> float:
        """All sectors of global memory that are asked for, in bytes."""
        return self.sectors("read", "write") * SECTOR + self.counts["memset_bytes"]

    @property
    def bytes_first(self) -> float:
        """The same without sectors that the launch has asked for before."""
        first = self.counts["first_read"] + self.counts["first_write"]
        return self.scale * first * SECTOR + self.counts["memset_bytes"]

    @property
    def resident(self) -> int:
        """Blocks on a multiprocessor at once."""
        if self.code is None:
            return 1
        threads, shared = self.counts["threads"], self.counts["shared"] + self.code.shared
        return occupancy(self.gpu, threads, self.code.registers, shared)

    @property
    def at_once(self) -> float:
        """The same, on average over the device: there may be fewer blocks than room for them."""
        return min(self.resident, self.counts["grid"] / self.gpu.multiprocessors)

    @property
    def waiting(self) -> float:
        """Bytes that a multiprocessor's threads wait for at once."""
        copied = self.counts["waited"]
        unrolled = max((loop.accesses["load"] for loop in self.loops("load")), default=0)
        each = copied or 16 * unrolled or 16
        return self.at_once * self.counts["threads"] * each

    @property
    def needed(self) -> float:
        """Bytes that should be in flight on a multiprocessor: no more than are read at all."""
        read = self.scale * self.counts["first_read"] * SECTOR / self.gpu.multiprocessors
        return min(self.gpu.in_flight, read)

    def loops(self, access: str) -> list[sass_loops.Loop]:
        """The hot loops with an access, of the dtype at hand."""
        loops = [loop for loop in self.code.loops if loop.access == access] if self.code else []
        if "<" in self.kernel:
            return loops
        # Kernels for lists ask for the dtype as they run: it shows in the conversions to double.
        own = [loop for loop in loops if loop.widened == 4 * loop.accesses[access]]
        return own or loops

    @property
    def instructions(self) -> Counter[str]:
        """The warp instructions of the hot loops of the whole launch, roughly.

        How often a loop goes round follows from how often its accesses were counted: those that
        store first, then those that copy, load, and read shared memory.
        """
        scale = self.scale
        left = {
            "store": scale * self.counts["write"]["wide"],
            "copy": scale * self.counts["copied"] / 512,
            "load": scale * self.counts["read"]["wide"],
            "shared": scale * self.counts["shared_read"]["wide"],
        }
        left["load"] -= left["copy"]
        total: Counter[str] = Counter()
        for access in sass_loops.ACCESSES:
            loops = self.loops(access)
            if not loops or left[access] <= 0:
                continue
            times = left[access] / sum(loop.accesses[access] for loop in loops)
            for loop in loops:
                for name, count in loop.names.items():
                    total[name] += count * times  # type: ignore[assignment]
                for kind, count in loop.accesses.items():
                    left[kind] -= count * times
        return total

    @property
    def busy(self) -> dict[str, float]:
        """Cycles that a multiprocessor's pipes work on the whole launch."""
        pipes = sass_loops.cycles(self.instructions, self.gpu.fp64)
        counts = self.counts
        pipes["load and store"] = self.scale * (
            counts["shared_read"]["units"]
            + counts["shared_write"]["units"]
            + (counts["read"]["bytes"] + counts["write"]["bytes"]) / 128
        )
        # Partial sums, read from shared memory one by one.
        narrow = self.scale * (counts["shared_read"]["requests"] - counts["shared_read"]["wide"])
        pipes["issue"] += narrow / 2
        pipes["fp64"] += narrow / self.gpu.fp64
        used = min(self.counts["grid"], self.gpu.multiprocessors)
        return {pipe: cycles / used for pipe, cycles in pipes.items()}

    @property
    def waits(self) -> float:
        """Cycles that one block waits at barriers and in warp operations."""
        blocks = self.counts["blocks_ran"] or 1
        warps = max(1, self.counts["threads"] / 32)
        operations = self.counts["warp_operation_lanes"] / 32 / warps / blocks
        return (
            operations * WARP_OPERATION
            + self.counts["block_barriers"] / blocks * BLOCK_BARRIER
            + self.counts["cluster_barriers"] * self.counts["cluster"] / blocks * CLUSTER_BARRIER
            + self.counts["grid_barriers"] * GRID_BARRIER
            + self.counts["atomics"] / blocks * GRID_BARRIER * bool(self.counts["cooperative"])
        )

    def predicted(self) -> tuple[float, str]:
        """Seconds, and what limits them.

        The blocks of a multiprocessor take turns: while some wait for memory, others compute. The
        time is that of memory or of the busiest pipe, or that which one block needs for waiting,
        for its memory and its arithmetic one after another, whichever is longest.
        """
        gpu, counts = self.gpu, self.counts
        if counts["memset_bytes"]:
            return counts["memset_bytes"] / (gpu.bandwidth * 1e9 * COPY), "memory"
        used = min(counts["grid"], gpu.multiprocessors)
        rounds = math.ceil(counts["grid"] / (used * self.resident))
        again = self.bytes_moved - self.bytes_first  # from the second-level cache: twice as fast
        rate = min(gpu.bytes_per_cycle * COPY * gpu.multiprocessors / used, 64.0)
        memory = (self.bytes_first + again / 2) / used / rate
        pipe, busy = max(self.busy.items(), key=lambda item: item[1])
        blocks = rounds * min(self.resident, math.ceil(counts["grid"] / used))
        alone = rounds * (gpu.latency + self.waits) + (memory + busy) / blocks * rounds
        slow = memory / min(1.0, self.waiting / self.needed) if self.needed else 0.0
        limits = {
            "memory": gpu.latency + memory,
            "bytes in flight": gpu.latency + slow if slow > memory else 0.0,
            pipe: gpu.latency + busy,
            "waiting, one after another": alone,
        }
        limit = max(limits, key=lambda name: limits[name])
        return limits[limit] / (gpu.clock * 1e9), limit


def occupancy(gpu: Gpu, threads: int, registers: int, shared: int) -> int:
    """Blocks of so many threads, registers a thread and bytes of shared memory on an SM."""
    warps = -(-threads // 32)
    each = -(-registers // 8) * 8 * 32  # of a warp; each of four parts has a quarter of them
    by_registers = 16384 // each * 4 // warps
    by_shared = gpu.shared_per_multiprocessor // (-(-(shared + 1024) // 128) * 128)
    return max(1, min(by_registers, by_shared, 64 // warps, 32))


# ---- What nvcc made ----


def read_build(build: Path, archs: Iterable[str]) -> dict[tuple[str, str], Code]:
    """By readable name and architecture."""
    reports = sorted(build.glob("CMakeFiles/embattle_cuda.dir/**/*.cu.o.ptxas"))
    tool = check_cuda_kernels.cuobjdump()
    if not reports or tool is None:
        raise SystemExit(f"gpu_model: {build} holds no CUDA kernels, or there is no cuobjdump")
    found: dict[tuple[str, str], Code] = {}
    for path in reports:
        codes = check_cuda_kernels.read_report(path.read_text())
        listing = sass_loops.functions(check_cuda_kernels.disassemble(tool, path.with_suffix("")))
        names = check_cuda_kernels.demangled([name for name, _ in codes])
        for (mangled, arch), code in codes.items():
            if arch in archs and (mangled, arch) in listing:
                text = listing[mangled, arch]
                found[names[mangled], arch] = Code(code.registers, code.shared, text)
    return found


def kernel_names(library: Path) -> dict[int, str]:
    """The emulator's kernels by their places in the library."""
    listed = subprocess.run(
        ["nm", "-C", str(library)], capture_output=True, text=True, check=True
    ).stdout
    rows = (line.split(None, 2) for line in listed.splitlines() if "_kernel" in line)
    return {
        int(row[0], 16): check_cuda_kernels.readable(row[2])
        for row in rows
        if len(row) == 3 and row[1] in "tTwW"
    }


def lines_of(library: Path, places: Iterable[int]) -> dict[int, str]:
    """The source lines of instructions, file:line."""
    places = list(places)
    if not places:
        return {}
    told = subprocess.run(
        ["addr2line", "-e", str(library), *(hex(place - 1) for place in places)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    return {p: Path(line.split()[0]).name for p, line in zip(places, told, strict=True)}


# ---- Cases ----


@dataclass
class Result:
    """A case on a device."""

    case: Any
    gpu: Gpu
    launches: list[Launch]
    conflicts: list[str]  # source lines in hot loops, with how many times the wavefronts

    @property
    def kernel_launches(self) -> list[Launch]:
        return [launch for launch in self.launches if not launch.counts["memset_bytes"]]

    @property
    def main(self) -> Launch:
        """The launch that moves most."""
        return max(self.kernel_launches, key=lambda launch: launch.bytes_moved)

    @property
    def traffic(self) -> float:
        return sum(launch.bytes_moved for launch in self.launches) / self.case.compulsory

    @property
    def again(self) -> float:
        """Of it, what a launch had asked for before: from the second-level cache."""
        return (
            sum(launch.bytes_moved - launch.bytes_first for launch in self.launches)
            / self.case.compulsory
        )

    @property
    def sectors(self) -> float:
        """Per request, in units of what the same bytes need side by side."""
        asked = sum(launch.sectors("read", "write") for launch in self.kernel_launches)
        ideal = sum(
            launch.scale * (launch.counts["read"]["ideal"] + launch.counts["write"]["ideal"])
            for launch in self.kernel_launches
        )
        return asked / ideal

    @property
    def seconds(self) -> float:
        own = sum(launch.predicted()[0] for launch in self.launches)
        return own + (len(self.launches) - 1) * LAUNCH

    @property
    def share(self) -> float:
        """Of the rate of a copy that moves the compulsory bytes, launches counted in both."""
        gpu = self.gpu
        copy = self.case.compulsory / (gpu.bandwidth * 1e9 * COPY) + gpu.latency / gpu.clock * 1e-9
        return (copy + LAUNCH) / (self.seconds + LAUNCH)

    def missed(self) -> list[str]:
        """The bars that are not met."""
        case, main, found = self.case, self.main, []
        if case.traffic_bar and self.traffic - (self.again if case.list else 0) > 1.05:
            found.append("traffic")
        if self.sectors > 1.1:
            found.append("sectors")
        if self.conflicts:
            found.append("conflicts")
        if case.compulsory * case.reduce >= 1 << 20 and main.waiting < 0.99 * main.needed:
            found.append("in flight")
        if case.small and len(self.launches) > 1:
            found.append("launches")
        return found


def conflicts_of(launches: Sequence[Launch], library: Path) -> list[str]:
    """Lines with a tenth of a launch's shared memory requests or more, and conflicts among them."""
    found = {}
    for launch in launches:
        places = launch.counts["shared_places"]
        total = sum(requests for requests, _, _ in places.values())
        for place, (requests, waves, ideal) in places.items():
            if requests >= total / 10 and waves > 1.1 * ideal:
                found[int(place)] = waves / ideal
    lines = lines_of(library, found)
    return sorted({f"{lines[place]} x{times:.1f}" for place, times in found.items()})


def run_case(case: Any, gpu: Gpu, codes: Mapping[tuple[str, str], Code]) -> Result:
    """Counts a case on a device of a `reduce`-th of the GPU's size."""
    import gpu_model_cases

    traced, library = gpu_model_cases.traced(case, gpu, codes)
    names = kernel_names(library)
    launches = []
    for counts in traced:
        name = names.get(counts["kernel"], "cudaMemsetAsync")
        launches.append(Launch(name, counts, codes.get((name, gpu.arch)), case.device(gpu)))
    return Result(case, case.device(gpu), launches, conflicts_of(launches, library))


# ---- The table ----

HEADING = """\
# What the CUDA kernels ask of a GPU: a model

*Predicted, not measured: not yet run on a GPU.* Written by `make gpu-model`; docs/cuda.md says what
the columns are and how the prediction is made.
"""
COLUMNS = (
    "op and size",
    "kernel",
    "launches",
    "bytes / compulsory (again)",
    "sectors / ideal",
    "bank conflicts",
    "barriers: block, cluster, grid",
    "registers, blocks on an SM x threads",
    "KB in flight (needed)",
    "instructions per 16 bytes",
    "limiter",
    "*predicted* share of copy",
    "bars missed",
)


def row(result: Result) -> str:
    main = result.main
    counts = main.counts
    blocks = counts["blocks_ran"] or 1
    pieces = result.case.compulsory / 16 / 32  # of 16 bytes, a warp's together
    issued = sum(sum(launch.instructions.values()) for launch in result.kernel_launches)
    barriers = (
        counts["block_barriers"] / blocks,
        counts["cluster_barriers"] * counts["cluster"] / blocks,
        counts["grid_barriers"],
    )
    cells = (
        result.case.name,
        f"`{main.kernel}`",
        str(len(result.launches)),
        f"{result.traffic:.2f} ({result.again:.2f})",
        f"{result.sectors:.2f}",
        ", ".join(result.conflicts) or "none",
        ", ".join(f"{n:.0f}" for n in barriers),
        f"{main.code.registers if main.code else '?'}, {main.at_once:.1f} x {counts['threads']}",
        f"{main.waiting / 1024:.0f} ({main.needed / 1024:.0f})",
        f"{issued / pieces:.0f}",
        main.predicted()[1],
        f"{100 * result.share:.0f} %",
        ", ".join(result.missed()) or "none",
    )
    return f"| {' | '.join(cells)} |"


def table(results: Sequence[Result]) -> str:
    """Markdown: a part for each GPU."""
    lines = [HEADING]
    for name in dict.fromkeys(result.gpu.name for result in results):
        lines += [f"## {name}", "", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
        lines += [row(result) for result in results if result.gpu.name == name]
        lines.append("")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "gpu-model")
    parser.add_argument("--out", type=Path, help="write the table there, too")
    parser.add_argument("--only", nargs="*", default=[], help="cases whose names hold one of these")
    options = parser.parse_args(arguments)
    import gpu_model_cases

    codes = read_build(options.build, {A100.arch, H100.arch})
    results = []
    for gpu in (H100, A100):
        for case in gpu_model_cases.cases():
            if options.only and not any(part in case.name for part in options.only):
                continue
            results.append(run_case(case, gpu, codes))
            print(f"{gpu.name} {row(results[-1])}", file=sys.stderr, flush=True)
    text = table(results)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
