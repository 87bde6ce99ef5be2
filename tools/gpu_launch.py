"""What limits a kernel's launch on a GPU, predicted from what it costs.

A launch's cost is counted by the emulator and read from machine code; see docs/cuda.md.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import sass_loops

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
