"""Compiles CUDA sources for the emulator, each file once per content and set of flags."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BUILD = ROOT / "build" / "emulator"
#: What runs the kernels.
EMULATOR = [HERE / f"{name}.cpp" for name in ("emulator", "stacks", "barriers", "watch")]
_spec = importlib.util.find_spec("torch")
TORCH = Path(_spec.origin).parent if _spec and _spec.origin else Path()

#: How kernels are compiled. "watch" has the compiler report every memory access to the emulator,
#: which looks for races on shared memory (the ThreadSanitizer runtime is not linked), or counts
#: what they would cost a GPU: vectors are loaded whole, as nvcc does. "asan" is AddressSanitizer
#: and UBSan, unoptimised: that compiles in a fifth of the time.
VARIANTS: dict[str, tuple[list[str], list[str]]] = {
    "watch": (["-fsanitize=thread", "-fno-tree-sra", "-fno-ipa-sra"], []),
    "asan": (
        ["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
        ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    ),
}


def compiler() -> str | None:
    """The C++ compiler, or None where there is none."""
    return shutil.which(os.environ.get("CXX", "g++"))


def _included(source: Path, found: dict[Path, bytes]) -> None:
    """Adds what a file includes of the project, and itself."""
    found[source] = source.read_bytes()
    for name in re.findall(rb'#include [<"]([^>"]+)[>"]', found[source]):
        for folder in (source.parent, HERE, ROOT / "csrc"):
            path = (folder / name.decode()).resolve()
            if path.is_file():
                if path not in found:
                    _included(path, found)
                break


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-4000:]}")


def build(name: str, sources: Sequence[Path], variant: str, module: bool) -> Path:
    """Compiles sources and the emulator into an executable or a Python module.

    Args:
        name: of the result.
        sources: .cu files are compiled as kernels of the variant, .cpp files without checks.
        variant: a key of VARIANTS.
        module: a pybind11 module that uses torch's stable ABI; else an executable.

    Returns:
        The path of the result, which is built once per content.
    """
    cxx = compiler()
    assert cxx is not None, "no C++ compiler"
    compile_flags, link_flags = VARIANTS[variant]
    # -O1 keeps the accesses that the watch is to see, and compiles fast.
    common = [
        "-std=c++20",
        "-O1",
        "-g1",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-unknown-pragmas",
        "-fPIC",
        "-fvisibility=hidden",
    ]
    common += ["-ffp-contract=off", f"-I{HERE}", f"-I{ROOT / 'csrc'}"]
    if module:
        import pybind11

        common += [f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_path('include')}"]
        common += [f"-isystem{TORCH / 'include'}", "-DEMBATTLE_EMULATED"]
        common += ["-DTORCH_TARGET_VERSION=0x020a000000000000"]  # as in CMakeLists.txt
    objects = BUILD / "objects"
    objects.mkdir(parents=True, exist_ok=True)

    def compiled(source: Path) -> Path:
        flags = list(common)
        if source.suffix == ".cu":
            flags += [*compile_flags, "-x", "c++"]
        elif variant == "asan" and source in EMULATOR:
            flags += compile_flags  # it poisons shared memory; registered.cpp serves both variants
        read: dict[Path, bytes] = {}
        _included(source, read)
        key = hashlib.sha256(" ".join([cxx, *flags]).encode())
        for path in sorted(read):
            key.update(read[path])
        target = objects / f"{source.stem}-{key.hexdigest()[:20]}.o"
        if not target.exists():
            scratch = target.with_suffix(f".{os.getpid()}.tmp")
            _run([cxx, *flags, "-c", str(source), "-o", str(scratch)])
            scratch.replace(target)
        return target

    with ThreadPoolExecutor(int(os.environ.get("JOBS", os.cpu_count() or 1))) as pool:
        parts = list(pool.map(compiled, [*EMULATOR, HERE / "trace.cpp", *sources]))
    key = hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()[:20]
    folder = BUILD / f"{variant}-{key}"
    target = folder / (name + (sysconfig.get_config_var("EXT_SUFFIX") if module else ""))
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        scratch = target.with_suffix(f".{os.getpid()}.tmp")
        shared = ["-shared", f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"] if module else []
        _run([cxx, *link_flags, *map(str, parts), *shared, "-o", str(scratch)])
        scratch.replace(target)
    return target
