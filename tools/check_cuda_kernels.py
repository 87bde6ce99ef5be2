"""Fails where a CUDA kernel spills registers, or one that has to be fast lacks 128-bit accesses.

It fails too for a kernel that no rule names or no report tells of, and for a library that is larger
than it may be. The kernels of CUB, which are part of the CUDA toolkit, are left out.

    python tools/check_cuda_kernels.py [--build build/dev] [--out TABLE.md]

Reads what the build left: the report of ptxas beside every object (cmake/keep_ptxas_report.sh), and
the machine code in the objects, by cuobjdump (nvcc's, or that of the packages nvidia-cuda-cuobjdump
and nvidia-cuda-nvdisasm). Prints a table of all kernels. Exits with 1 for a fault, with 2 where it
cannot tell.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

#: Bytes of the library with CUDA kernels, all architectures and SIMD levels; what wheels hold.
MOST_BYTES = 13_000_000
DTYPE = "(float|double|Half|BFloat16)"


@dataclass(frozen=True)
class Rule:
    """What is asked of the kernels whose readable names match."""

    names: re.Pattern[str]
    loads: bool  # 16 bytes at a time, into registers or on to shared memory
    stores: bool


#: Every kernel has a rule; the first that fits counts. Those without accesses to ask for work on
#: keys and on partial results, or compute.
RULES = (
    Rule(re.compile(rf"^(momentum|step|draw)_kernel<{DTYPE}, "), loads=True, stores=True),
    Rule(re.compile(r"^norm_kernel<"), loads=True, stores=False),
    Rule(re.compile(r"^(clip|trace|embedding_norm)_kernel"), True, False),
    Rule(re.compile(r"^(perturb|segment_sum|adagrad)_kernel"), loads=True, stores=True),
    Rule(re.compile(r"^(tile|linear_finish)_kernel"), loads=False, stores=False),
    Rule(re.compile(r"^(choose|small_sort|pairs)_kernel"), loads=False, stores=False),
)
#: Kernels in the namespace cub, by their mangled names: they are the toolkit's, and have no rules.
CUB = re.compile(r"^_ZN3cub\d")
HEADING = """\
# What the compiler made of the CUDA kernels

Written by `make cuda-check TABLE=file`. The last template argument of the kernels over groups is
true where they take an origin, a box or a gradient of another dtype.
"""
LOAD = re.compile(r"\b(LDG|LDGSTS)\.E[.\w]*\.128\b")
STORE = re.compile(r"\bSTG\.E[.\w]*\.128\b")


@dataclass
class Code:
    """What the compiler made of a kernel for one architecture."""

    registers: int = 0
    spilled: int = 0  # bytes
    shared: int = 0  # bytes, static
    loads: int | None = None  # of 128 bits; None: not looked at
    stores: int | None = None


@dataclass
class Kernel:
    """A kernel by its readable name."""

    name: str
    code: dict[str, Code] = field(default_factory=dict)  # by architecture

    @property
    def rule(self) -> Rule | None:
        return next((rule for rule in RULES if rule.names.search(self.name)), None)

    @property
    def faults(self) -> list[str]:
        if self.rule is None:
            return ["no rule in tools/check_cuda_kernels.py says what is asked of it"]
        faults = []
        for arch, code in sorted(self.code.items()):
            if code.spilled:
                faults.append(f"{arch}: spills {code.spilled} bytes")
            if self.rule.loads and code.loads == 0:
                faults.append(f"{arch}: no 128-bit loads")
            if self.rule.stores and code.stores == 0:
                faults.append(f"{arch}: no 128-bit stores")
        return faults


Codes = dict[tuple[str, str], Code]  # by mangled name and architecture


def read_report(text: str) -> Codes:
    """What ptxas -v says of the kernels, not of the functions that they call."""
    codes: Codes = {}
    current, properties = "", ""
    code = Code()
    for line in text.splitlines():
        if found := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
            current = properties = found[1]
            code = codes[current, found[2]] = Code()
        elif found := re.search(r"Function properties for '?(\w+)", line):
            properties = found[1]
        elif found := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            if properties == current:
                code.spilled = max(int(found[1]), int(found[2]))
        elif found := re.search(r"Used (\d+) registers", line):
            code.registers = int(found[1])
            if static := re.search(r"(\d+) bytes smem", line):
                code.shared = int(static[1])
    return codes


def ours(codes: Codes) -> Codes:
    """Without the kernels of CUB."""
    return {key: code for key, code in codes.items() if not CUB.search(key[0])}


def read_sass(text: str, codes: Codes) -> list[str]:
    """Counts the 128-bit accesses in a listing of cuobjdump -sass.

    Returns:
        The functions that no report tells of, with their architectures.
    """
    arch, untold = "", []
    code: Code | None = None
    for line in text.splitlines():
        if found := re.search(r"^\s*code for (sm_\w+)", line):
            arch = found[1]
        elif found := re.search(r"^\s*Function : (\w+)", line):
            code = codes.get((found[1], arch))
            if code is None:
                untold.append(f"{found[1]} ({arch})")
            else:
                code.loads = code.stores = 0
        elif code is not None and LOAD.search(line):
            code.loads = (code.loads or 0) + 1
        elif code is not None and STORE.search(line):
            code.stores = (code.stores or 0) + 1
    return untold


def readable(demangled: str) -> str:
    """A kernel's name without return type, namespaces and arguments."""
    text = re.sub(r"\(\w+::Norm\)|\(embattle::Norm\)", "", demangled)
    text = re.sub(r"\(anonymous namespace\)::|_GLOBAL__N__\w+::|\w+::", "", text)
    text = re.sub(r"^void ", "", text)
    norms = {"1": "l1", "2": "l2", "3": "linf"}
    text = re.sub(r"(?<=, )([123])(?=[,>])", lambda m: norms[m[1]], text)
    found = re.match(r"(\w+(<[^()]*>)?)", text)
    return found[1] if found else demangled


def demangled(mangled: list[str]) -> dict[str, str]:
    """Readable names by mangled ones."""
    done = subprocess.run(
        ["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True
    )
    return dict(zip(mangled, map(readable, done.stdout.splitlines()), strict=True))


def gather(codes: Codes, names: dict[str, str]) -> list[Kernel]:
    """Kernels with all their architectures, sorted by name."""
    kernels: dict[str, Kernel] = {}
    for (mangled, arch), code in codes.items():
        name = names[mangled]
        kernels.setdefault(name, Kernel(name)).code[arch] = code
    return sorted(kernels.values(), key=lambda k: k.name)


def table(kernels: list[Kernel]) -> str:
    """Markdown: registers, spilled bytes, 128-bit loads and stores for each architecture."""
    archs = sorted({arch for k in kernels for arch in k.code}, key=lambda a: (len(a), a))
    lines = [
        "Registers / spilled bytes / 128-bit loads / 128-bit stores.",
        "",
        "| kernel | " + " | ".join(archs) + " | |",
        "|---|" + "---|" * (len(archs) + 1),
    ]

    def cell(code: Code | None) -> str:
        if code is None:
            return "-"
        wide = ("?" if n is None else str(n) for n in (code.loads, code.stores))
        return " / ".join([str(code.registers), str(code.spilled), *wide])

    for k in kernels:
        verdict = "; ".join(k.faults) or ("hot" if k.rule and k.rule.loads else "")
        cells = " | ".join(cell(k.code.get(arch)) for arch in archs)
        lines.append(f"| {k.name} | {cells} | {verdict} |")
    return "\n".join(lines)


def cuobjdump() -> str | None:
    """The path of the tool, or None."""
    packaged = Path(sysconfig.get_paths()["purelib"]).glob("nvidia/**/bin/cuobjdump")
    return shutil.which("cuobjdump") or next((str(p) for p in packaged), None)


def disassemble(tool: str, path: Path) -> str:
    # cuobjdump calls nvdisasm, which lies beside it.
    search = f"{Path(tool).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    done = subprocess.run(
        [tool, "-sass", str(path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": search},
    )
    if done.returncode:
        raise RuntimeError(f"{tool} -sass {path}: {done.stderr.strip()}")
    return done.stdout


def too_large(build: Path) -> list[str]:
    """What is said of the build's library where it is above its size."""
    return [
        f"{path.name}: {path.stat().st_size / 1e6:.1f} MB, at most {MOST_BYTES / 1e6:g} MB: fewer "
        "template instances or architectures"
        for path in sorted(build.glob("_C*.so"))
        if path.stat().st_size > MOST_BYTES
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--build", type=Path, default=Path("build/dev"), help="the build's folder")
    parser.add_argument("--out", type=Path, help="write the table there, too")
    options = parser.parse_args(arguments)

    def unable(why: str) -> int:
        print(f"check_cuda_kernels: {why}", file=sys.stderr)
        return 2

    reports = sorted(options.build.glob("CMakeFiles/embattle_cuda.dir/**/*.cu.o.ptxas"))
    if not reports:
        return unable(
            f"{options.build} holds no CUDA kernels: build where nvcc is on the PATH, with "
            "EMBATTLE_CUDA=ON"
        )
    tool = cuobjdump()
    if tool is None:
        return unable(
            "there is no cuobjdump, so accesses cannot be checked: "
            "pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
        )
    codes: Codes = {}
    untold: list[str] = []
    for path in reports:
        found = read_report(path.read_text())
        untold += read_sass(disassemble(tool, path.with_suffix("")), found)
        codes |= ours(found)
    names = demangled(sorted({name for name, _ in codes}))
    kernels = gather(codes, names)
    text = table(kernels)
    print(text)
    if options.out:
        options.out.write_text(f"{HEADING}\n{text}\n")
    unseen = [f"{names[m]} ({arch})" for (m, arch), code in codes.items() if code.loads is None]
    if unseen:
        return unable(f"cuobjdump did not list {', '.join(unseen[:5])}")
    if untold:
        return unable(f"no report of ptxas tells of {', '.join(untold[:5])}: build anew")
    unused = [r.names.pattern for r in RULES if not any(r.names.search(k.name) for k in kernels)]
    if unused:
        return unable(f"no kernel is named like {' or '.join(unused)}")
    faults = [f"{k.name}: {fault}" for k in kernels for fault in k.faults]
    faults += too_large(options.build)
    for fault in faults:
        print(f"check_cuda_kernels: {fault}", file=sys.stderr)
    hot = sum(bool(k.rule and k.rule.loads) for k in kernels)
    print(f"{len(kernels)} kernels, {hot} of them hot")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
