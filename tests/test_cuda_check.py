"""The check of the CUDA kernels' code, on reports as ptxas and cuobjdump write them."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location(
    "check_cuda_kernels", ROOT / "tools" / "check_cuda_kernels.py"
)
assert SPEC is not None
assert SPEC.loader is not None
check = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = check
SPEC.loader.exec_module(check)

REPORT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4kern' for '{arch}'
ptxas info    : Function properties for _Z4kern
    {spill} bytes stack frame, {spill} bytes spill stores, {spill} bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 16 bytes cumulative stack size
ptxas info    : Function properties for _Z6helper
    8 bytes stack frame, 8 bytes spill stores, 8 bytes spill loads
"""
SASS = """\
\tcode for {arch}
\t\tFunction : _Z4kern
        /*0000*/                   {load} R4, desc[UR4][R2.64] ;
        /*0010*/                   {store} desc[UR4][R2.64], R4 ;
"""
DEMANGLED = "void embattle::cuda::(anonymous namespace)::perturb_kernel<float>(Args, bool)"


def kernel(spill: int = 0, load: str = "LDG.E.128", store: str = "STG.E.128") -> check.Kernel:
    codes = {}
    for arch, bytes_ in (("sm_80", 0), ("sm_90", spill)):
        found = check.read_report(REPORT.format(arch=arch, spill=bytes_))
        check.read_sass(SASS.format(arch=arch, load=load, store=store), found)
        codes |= found
    kernels = check.gather(codes, {"_Z4kern": check.readable(DEMANGLED)})
    assert len(kernels) == 1
    return kernels[0]


def test_a_good_kernel_has_no_fault_and_a_row_in_the_table() -> None:
    good = kernel()
    assert good.faults == []
    assert "| perturb_kernel<float> | 40 / 0 / 1 / 1 | 40 / 0 / 1 / 1 | hot |" in check.table(
        [good]
    )


def test_a_spill_on_one_architecture_is_a_fault() -> None:
    assert kernel(spill=12).faults == ["sm_90: spills 12 bytes"]


def test_every_kernel_of_the_sources_has_a_rule_and_none_may_spill() -> None:
    sources = (ROOT / "csrc" / "cuda").rglob("*.cu*")
    text = "\n".join(path.read_text() for path in sources)
    names = re.findall(r"__global__ void (?:__launch_bounds__\(.*?\)\s+)?(\w+_kernel)\(", text)
    assert len(names) >= 15
    assert len(names) == text.count("__global__")
    for name in names:
        code = {"sm_90": check.Code(spilled=8, loads=1, stores=1)}
        assert check.Kernel(f"{name}<float, true>", code).faults == ["sm_90: spills 8 bytes"], name


def test_a_kernel_without_a_rule_is_a_fault() -> None:
    assert "no rule" in check.Kernel("new_kernel", {"sm_90": check.Code()}).faults[0]


@pytest.mark.parametrize("load", ["LDG.E.64", "LDG.E.128.CONSTANT", "LDGSTS.E.BYPASS.128"])
def test_narrow_loads_are_a_fault(load: str) -> None:
    assert bool(kernel(load=load).faults) == ("128" not in load)


def test_narrow_stores_are_a_fault() -> None:
    assert kernel(store="STG.E").faults == ["sm_80: no 128-bit stores", "sm_90: no 128-bit stores"]


@pytest.mark.parametrize(
    ("demangled", "name"),
    [
        (
            "void embattle::cuda::_GLOBAL__N__0a_7_step_cu_1b::step_kernel<embattle::cuda::Half, "
            "(embattle::Norm)2, false>(embattle::cuda::GroupParams)",
            "step_kernel<Half, l2, false>",
        ),
        ("embattle::cuda::(anonymous namespace)::trace_kernel(LinearParams)", "trace_kernel"),
    ],
)
def test_names_are_readable(demangled: str, name: str) -> None:
    assert check.readable(demangled) == name


def test_a_kernel_that_no_report_tells_of_is_named() -> None:
    listing = SASS.format(arch="sm_90", load="LDG.E.128", store="STG.E.128")
    codes = check.read_report(REPORT.format(arch="sm_90", spill=0))
    assert check.read_sass(listing, codes) == []
    assert check.read_sass(listing.replace("_Z4kern", "_Z5other"), codes) == ["_Z5other (sm_90)"]
    assert check.read_sass(listing, {}) == ["_Z4kern (sm_90)"]


def test_kernels_of_cub_have_no_rules() -> None:
    others = "_ZN3cub28CUB_300001_SM_800_900_1000_NS6detail10radix_sort31SingleTileKernelIxEEvv"
    mine = "_ZN8embattle4cuda11perturb_kernelIN3cub9CUB_3000016uint_tEEEvv"  # of a type of CUB
    code = check.Code()
    codes = {(name, "sm_90"): code for name in (others, mine, "_ZN4cubeEv", "_Z3cubv")}
    assert [name for name, _ in check.ours(codes)] == [mine, "_ZN4cubeEv", "_Z3cubv"]


def build_of(folder: Path, monkeypatch: pytest.MonkeyPatch, listing: str, size: int) -> Path:
    """A build with a report of one kernel and a library of so many bytes."""
    objects = folder / "CMakeFiles" / "embattle_cuda.dir"
    objects.mkdir(parents=True)
    (objects / "x.cu.o.ptxas").write_text(REPORT.format(arch="sm_90", spill=0))
    with open(folder / "_C.cpython.so", "wb") as library:
        library.truncate(size)
    monkeypatch.setattr(check, "cuobjdump", lambda: "cuobjdump")
    monkeypatch.setattr(check, "disassemble", lambda tool, path: listing)
    monkeypatch.setattr(check, "RULES", (check.Rule(re.compile("kern"), True, True),))
    return folder


@pytest.mark.skipif(shutil.which("c++filt") is None, reason="needs c++filt")
@pytest.mark.parametrize(
    ("name", "size", "status", "words"),
    [
        ("_Z4kern", check.MOST_BYTES, 0, ""),
        ("_Z4kern", check.MOST_BYTES + 1, 1, "_C.cpython.so: 13.0 MB, at most 13 MB"),
        ("_Z5other", 1, 2, "_Z5other (sm_90)"),
    ],
)
def test_a_large_library_and_an_untold_kernel_fail(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    size: int,
    status: int,
    words: str,
) -> None:
    listing = SASS.format(arch="sm_90", load="LDG.E.128", store="STG.E.128")
    if name not in listing:
        listing += listing.replace("_Z4kern", name)
    assert check.main(["--build", str(build_of(tmp_path, monkeypatch, listing, size))]) == status
    assert words in capsys.readouterr().err


def test_a_build_without_kernels_is_said_to_be_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check.main(["--build", str(tmp_path)]) == 2
    assert "EMBATTLE_CUDA=ON" in capsys.readouterr().err


def test_a_missing_cuobjdump_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "CMakeFiles" / "embattle_cuda.dir"
    folder.mkdir(parents=True)
    (folder / "x.cu.o.ptxas").write_text(REPORT.format(arch="sm_90", spill=0))
    monkeypatch.setattr(check, "cuobjdump", lambda: None)
    assert check.main(["--build", str(tmp_path)]) == 2
    assert "pip install nvidia-cuda-cuobjdump" in capsys.readouterr().err


def test_the_build_keeps_the_report_and_passes_on_the_rest(tmp_path: Path) -> None:
    compiler = tmp_path / "compiler"
    lines = REPORT.format(arch="sm_90", spill=0) + "x.cu(1): error: wrong"
    compiler.write_text(f"#!/bin/sh\ncat >&2 <<'END'\n{lines}\nEND\nexit 3\n")
    compiler.chmod(0o755)
    done = subprocess.run(
        ["sh", ROOT / "cmake" / "keep_ptxas_report.sh", compiler, "-c", "x.cu", "-o", "x.o"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=dict(os.environ),
    )
    assert done.returncode == 3
    assert done.stderr.strip() == "x.cu(1): error: wrong"
    assert (tmp_path / "x.o.ptxas").read_text() == REPORT.format(arch="sm_90", spill=0)
