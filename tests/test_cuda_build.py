"""Whether the CUDA kernels are compiled and for what: cmake/cuda_choice.cmake with nvcc made up."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")

#: What `nvcc --list-gpu-code` says, by the toolkit's release.
OLD = [50, 52, 53, 60, 61, 62, 70, 72, 75, 80, 86, 87, 89, 90]
CODES = {
    "12.4": OLD,
    "12.6": OLD,
    "12.8": [*OLD, 100, 101, 120],
    "12.9": [*OLD, 100, 103, 101, 120, 121],
    "13.0": [75, 80, 86, 87, 88, 89, 90, 100, 110, 103, 120, 121],
    "14.0": [90, 100, 110, 120, 140],
}
CHOSEN = {
    "12.4": "80-real;90",
    "12.6": "80-real;90",
    "12.8": "80-real;90-real;100-virtual",
    "12.9": "80-real;90-real;100-virtual",
    "13.0": "80-real;90-real;100-virtual",
    "14.0": "90-real;100-virtual",
}


def nvcc(folder: Path, release: str, codes: list[int] | None) -> Path:
    """A compiler that answers; codes None: it cannot list them."""
    listed = "exit 1" if codes is None else f"printf 'sm_%s\\n' {' '.join(map(str, codes))}"
    path = folder / "nvcc"
    path.write_text(
        "#!/bin/sh\n"
        f'[ "$1" = --version ] && echo "Cuda compilation tools, release {release}, V{release}.1"\n'
        f'if [ "$1" = --list-gpu-code ]; then {listed}; fi\nexit 0\n'
    )
    path.chmod(0o755)
    return path


def choose(wanted: str, compiler: Path | str, signs: str) -> tuple[str, str, str]:
    """ON or OFF, the architectures, and what a user is told."""
    done = subprocess.run(
        [
            "cmake",
            f"-DEMBATTLE_CUDA={wanted}",
            f"-DNVCC={compiler}",
            f"-DDRIVER_SIGNS={signs}",
            "-P",
            str(ROOT / "cmake" / "cuda_choice.cmake"),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    use, architectures, why = done.stdout.strip().split("|")
    return use, architectures, why


@pytest.mark.parametrize("release", CODES)
def test_architectures_are_those_that_nvcc_lists(release: str, tmp_path: Path) -> None:
    compiler = nvcc(tmp_path, release, CODES[release])
    use, architectures, why = choose("ON", compiler, "")
    assert (use, architectures) == ("ON", CHOSEN[release])
    assert f"CUDA {release}" in why
    names = architectures.split(";")
    for name in names:
        assert int(name.split("-")[0]) in CODES[release]
    assert [name.endswith("-real") for name in names] == [True] * (len(names) - 1) + [False]


def test_auto_wants_a_compiler_and_a_gpu_and_says_what_it_chose(tmp_path: Path) -> None:
    compiler, sign = nvcc(tmp_path, "13.0", CODES["13.0"]), tmp_path / "driver"
    use, _, why = choose("AUTO", compiler, str(sign))
    assert use == "OFF"
    assert "neither a GPU nor its driver" in why
    assert "EMBATTLE_CUDA=ON" in why
    sign.touch()
    assert choose("AUTO", compiler, f"/nowhere;{sign}")[:2] == ("ON", CHOSEN["13.0"])
    use, _, why = choose("AUTO", "nvcc_program-NOTFOUND", str(sign))
    assert use == "OFF"
    assert "no nvcc" in why
    assert choose("OFF", compiler, str(sign))[0] == "OFF"


def test_a_compiler_that_will_not_do_is_named(tmp_path: Path) -> None:
    for release, codes, words in (
        ("11.8", OLD, "CUDA 11.8; 12.4 or newer"),
        ("12.4", None, "does not say what it compiles for"),
        ("12.4", [50, 75], "does not say what it compiles for"),
    ):
        use, architectures, why = choose("ON", nvcc(tmp_path, release, codes), "")
        assert (use, architectures) == ("OFF", "")
        assert words in why


def test_ci_asks_for_the_kernels_and_their_check_builds_them() -> None:
    ci = (ROOT / ".ci" / "run").read_text()
    assert "export EMBATTLE_CUDA=ON" in ci
    makefile = (ROOT / "Makefile").read_text()
    recipe = makefile.split("\ncuda-check:", 1)[1].split("\n\n", 1)[0]
    assert "EMBATTLE_CUDA=ON" in recipe
