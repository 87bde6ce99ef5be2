"""What is installed, how it was built, and what is wrong with it."""

from __future__ import annotations

import importlib
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from embattle.errors import version_of

OPTIONAL = (
    "transformers",
    "accelerate",
    "safetensors",
    "pydantic",
    "pyyaml",
    "pyarrow",
    "rich",
    "typer",
)
OLDEST_TORCH = (2, 10)


@dataclass
class Report:
    """Facts in order, and problems, each with its remedy."""

    facts: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The report as text: facts, then what is wrong."""
        width = max(len(name) for name, _ in self.facts)
        shown = [f"{name:<{width}}  {value}" for name, value in self.facts]
        if not self.problems:
            return [*shown, "", "Nothing is wrong."]
        return [*shown, "", *(f"Problem: {problem}" for problem in self.problems)]


def examine() -> Report:
    """Looks at Python, torch, the native library, the devices, the threads and the extras."""
    report = Report()
    report.facts.append(("python", f"{platform.python_version()} ({platform.machine()})"))
    report.facts.append(("embattle", version_of("embattle") or "not installed as a package"))
    report.facts.append(("runs from", str(Path(__file__).parents[1])))
    torch = _torch(report)
    build = _native(report)
    if torch is not None:
        _devices(report, torch, build)
        _threads(report, torch)
    _hub(report)
    missing = []
    for name in OPTIONAL:
        found = version_of(name)
        report.facts.append((name, found or "not installed"))
        missing += [] if found else [name]
    if missing:
        report.problems.append(
            f"{', '.join(missing)} missing: the ops work, `embattle train` and `embattle audit` "
            "need them: pip install 'embattle[jobs]'"
        )
    return report


def _torch(report: Report) -> Any:
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        report.facts.append(("torch", "cannot be imported"))
        report.problems.append(f"torch cannot be imported ({error}): pip install 'torch>=2.10'")
        return None
    report.facts.append(("torch", torch.__version__))
    numbers = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if numbers < OLDEST_TORCH:
        report.problems.append(f"torch {torch.__version__} is too old: pip install 'torch>=2.10'")
    return torch


def _native(report: Report) -> Mapping[str, Any] | None:
    try:
        build: Mapping[str, Any] = importlib.import_module("embattle._C").build_info()
    except ImportError as error:
        first = str(error).splitlines()[0]
        report.facts.append(("native library", "cannot be loaded"))
        report.problems.append(
            f"the native library cannot be loaded ({first}): build it with "
            "`pip install --no-build-isolation .` in the environment that has torch"
        )
        return None
    available = build["simd_available"]
    levels = available if isinstance(available, str) else ", ".join(map(str, available))
    report.facts += [
        ("native library", f"{build['version']}, {build['compiler']}"),
        ("torch target", str(build["torch_target"])),
        ("SIMD level", f"{build['simd']} (compiled in: {levels})"),
    ]
    return build


def _devices(report: Report, torch: Any, build: Mapping[str, Any] | None) -> None:
    archs = _names(build["cuda_archs"]) if build else []
    if build:
        compiled = f"compiled in, for {', '.join(archs)}" if build["cuda"] else "not compiled in"
        report.facts.append(("CUDA kernels", compiled))
    if not torch.cuda.is_available():
        report.facts.append(("GPU", "none that torch can use"))
        return
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        name = torch.cuda.get_device_name(index)
        report.facts.append((f"GPU {index}", f"{name} (compute capability {major}.{minor})"))
        if build and not build["cuda"]:
            report.problems.append(
                f"GPU {index} is there, but the CUDA kernels were not compiled in: install nvcc "
                "and rebuild with EMBATTLE_CUDA=ON"
            )
        elif build and not runs_on(archs, major, minor):
            report.problems.append(
                f"no kernel was compiled for GPU {index} (compute capability {major}.{minor}, not "
                f"among {', '.join(archs)}): rebuild with CMAKE_CUDA_ARCHITECTURES={major}{minor}"
            )


def runs_on(archs: list[str], major: int, minor: int) -> bool:
    """Whether code for one of `archs` (such as `80-real`, `120-virtual`) runs on that GPU.

    Binary code runs on its own generation from its minor version up; `virtual` and plain entries
    also carry PTX, which every later GPU compiles for itself.
    """
    for arch in archs:
        number, _, kind = arch.removeprefix("sm_").removeprefix("compute_").partition("-")
        digits = "".join(c for c in number if c.isdigit())
        if not digits:
            continue
        has = (int(digits[:-1]), int(digits[-1]))
        binary = kind != "virtual" and not arch.startswith("compute_")
        if binary and has[0] == major and has[1] <= minor:
            return True
        if kind != "real" and not arch.startswith("sm_") and has <= (major, minor):
            return True
    return False


def _threads(report: Report, torch: Any) -> None:
    usable = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    threads = torch.get_num_threads()
    asked = os.environ.get("OMP_NUM_THREADS")
    note = f", OMP_NUM_THREADS={asked}" if asked else ""
    note += f", OMP_WAIT_POLICY={os.environ.get('OMP_WAIT_POLICY', 'not set')}"
    report.facts.append(("threads", f"torch uses {threads} of {usable} usable CPUs{note}"))
    if threads > usable:
        report.problems.append(
            f"torch uses {threads} threads on {usable} usable CPUs, which is slow: "
            f"set OMP_NUM_THREADS={usable}"
        )


def _hub(report: Report) -> None:
    """What a model's name on the Hugging Face Hub needs, without asking the network."""
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")
    report.facts.append(
        (
            "hub names",
            "HF_HUB_OFFLINE is set: only models downloaded before are found"
            if offline
            else "are downloaded once; without a network only those downloaded before are found",
        )
    )


def _names(archs: Any) -> list[str]:
    if isinstance(archs, str):
        return [name for name in archs.replace(",", ";").split(";") if name]
    return [str(name) for name in archs]
