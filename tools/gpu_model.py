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
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import check_cuda_kernels
import sass_loops
from gpu_launch import A100, COPY, H100, LAUNCH, Code, Gpu, Launch

ROOT = Path(__file__).resolve().parent.parent
# ---- What nvcc made ----


def read_build(build: Path, archs: Iterable[str]) -> dict[tuple[str, str], Code]:
    """By readable name and architecture."""
    reports = sorted(build.glob("CMakeFiles/embattle_cuda.dir/**/*.cu.o.ptxas"))
    tool = check_cuda_kernels.cuobjdump()
    if not reports or tool is None:
        raise SystemExit(f"gpu_model: {build} holds no CUDA kernels, or there is no cuobjdump")
    found: dict[tuple[str, str], Code] = {}
    for path in reports:
        codes = check_cuda_kernels.ours(check_cuda_kernels.read_report(path.read_text()))
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
the columns are and how the prediction is made. Where an op's name says so, the batch is sorted by
CUB: that sort is not modelled, and its launches, bytes and time are in no column.
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
