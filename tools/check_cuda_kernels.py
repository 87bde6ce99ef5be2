"""Fails where a CUDA kernel that has to be fast spills registers or lacks 128-bit loads.

    python tools/check_cuda_kernels.py [--arch 90] [--out TABLE.md]

Compiles csrc/cuda/*.cu for one architecture, reads what ptxas reports, and disassembles with
cuobjdump (nvcc's, or that of the packages nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm). Prints
a table of all kernels.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DTYPES = "(float|double|Half|BFloat16)"
#: Kernels on the paths that are to run at memory speed: no spills, and 16-byte accesses.
HOT = re.compile(
    rf"step_kernel<{DTYPES}, \(?\w*\)?\w*, false>|norm_kernel<|draw_kernel<.*false>"
    r"|piece_norm_kernel|clipped_sum_kernel|perturb_kernel<"
)
#: Instructions that move 16 bytes from global memory: into registers, or on to shared memory.
WIDE = re.compile(r"\b(LDG\.E[.\w]*\.128|LDGSTS\.E[.\w]*\.128)\b")


@dataclass
class Kernel:
    """What the compiler made of a kernel."""

    name: str
    registers: int = 0
    spilled: int = 0
    wide_loads: int | None = None

    @property
    def hot(self) -> bool:
        return HOT.search(self.name) is not None

    @property
    def faults(self) -> list[str]:
        faults = []
        if self.hot and self.spilled:
            faults.append(f"spills {self.spilled} bytes")
        if self.hot and self.wide_loads == 0:
            faults.append("has no 128-bit loads")
        return faults


def readable(name: str) -> str:
    """A kernel's name without namespaces and arguments."""
    found = re.search(r"(\w+)(<.*>)?\(", name.replace("(anonymous namespace)::", ""))
    text = (found.group(1) + (found.group(2) or "")) if found else name
    return re.sub(r"embattle::(cuda::)?|\(embattle::Norm\)", "", text).replace("(Norm)", "")


def demangled(names: list[str]) -> list[str]:
    done = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    )
    return [readable(line) for line in done.stdout.splitlines()]


def report(log: str) -> dict[str, Kernel]:
    """Kernels by mangled name, from the report of ptxas -v; called functions do not count."""
    kernels: dict[str, Kernel] = {}
    current: Kernel | None = None
    properties = ""
    for line in log.splitlines():
        if found := re.search(r"Compiling entry function '(\w+)'", line):
            current = kernels[found.group(1)] = Kernel(found.group(1))
        elif found := re.search(r"Function properties for (\w+)", line):
            properties = found.group(1)
        elif current and (found := re.search(r"(\d+) bytes spill stores", line)):
            if properties == current.name:
                current.spilled = int(found.group(1))
        elif current and (found := re.search(r"Used (\d+) registers", line)):
            current.registers = int(found.group(1))
    return kernels


def count_wide_loads(cubin: Path, kernels: dict[str, Kernel]) -> bool:
    """Fills in wide_loads. False where there is no cuobjdump."""
    packaged = Path(sysconfig.get_paths()["purelib"]).glob("nvidia/**/bin/cuobjdump")
    tool = shutil.which("cuobjdump") or next((str(p) for p in packaged), None)
    if tool is None:
        return False
    # cuobjdump calls nvdisasm, which lies beside it.
    path = f"{Path(tool).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    sass = subprocess.run(
        [tool, "-sass", str(cubin)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PATH": path},
    )
    current: Kernel | None = None
    for line in sass.stdout.splitlines():
        if found := re.search(r"Function : (\w+)", line):
            current = kernels.get(found.group(1))
            if current:
                current.wide_loads = 0
        elif current and WIDE.search(line):
            current.wide_loads = (current.wide_loads or 0) + 1
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--arch", default="90", help="compute capability without the dot")
    parser.add_argument("--out", type=Path, help="write the table there, too")
    options = parser.parse_args()
    if shutil.which("nvcc") is None:
        print("check_cuda_kernels: nvcc is not on the PATH", file=sys.stderr)
        return 2
    kernels: list[Kernel] = []
    disassembled = True
    with tempfile.TemporaryDirectory() as folder:
        for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
            cubin = Path(folder) / f"{source.stem}.cubin"
            command = ["nvcc", "-std=c++20", "-O3", f"-arch=sm_{options.arch}", "-Xptxas", "-v"]
            done = subprocess.run(
                [*command, "-cubin", str(source), "-o", str(cubin)], capture_output=True, text=True
            )
            if done.returncode:
                print(done.stderr, file=sys.stderr)
                return 2
            found = report(done.stderr)
            disassembled &= count_wide_loads(cubin, found)
            kernels += found.values()
    for kernel, name in zip(kernels, demangled([k.name for k in kernels]), strict=True):
        kernel.name = name
    lines = ["| kernel | registers | spilled bytes | 128-bit loads | |", "|---|---|---|---|---|"]
    for k in kernels:
        loads = "?" if k.wide_loads is None else k.wide_loads
        verdict = "; ".join(k.faults) or ("hot" if k.hot else "")
        lines.append(f"| {k.name} | {k.registers} | {k.spilled} | {loads} | {verdict} |")
    table = "\n".join(lines)
    print(table)
    if options.out:
        options.out.write_text(table + "\n")
    if not disassembled:
        print(
            "check_cuda_kernels: no cuobjdump, so loads were not checked: "
            "pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm",
            file=sys.stderr,
        )
        return 2
    faults = [f"{k.name} {', '.join(k.faults)}" for k in kernels if k.faults]
    for fault in faults:
        print(f"check_cuda_kernels: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
