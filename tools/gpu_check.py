"""Tests and measures the CUDA kernels on the GPU at hand; `make gpu-check OUT=dir` calls it.

    python tools/gpu_check.py --out DIR [--minutes 7.5]

Runs the GPU tests, the whole suite on CUDA, compute-sanitizer on a short list, and the benchmark;
writes DIR/gpu-DATE.json and .md after each step, so that what is done is kept if time runs out, and
prints the table last. Tests for which a stage has no time left are skipped, and counted as such.
Exits with 1 where a test fails, with 2 where there is no GPU. A missed target is no failure.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
TESTS = [*PYTEST, "tests/test_cuda_device.py"]
# The whole suite, but for what tests/conftest.py leaves out.
DEVICE_TESTS = [*PYTEST, "tests", "--device", "cuda"]
SANITIZER = "compute-sanitizer"
# Of the time that is left for tests a stage may take its share among those that are to come.
SHARES = {"tests": 3, "tests on cuda": 4, "memcheck": 2, "racecheck": 2}
PROCESSES = 8


def run_tests(report: Any, end: float, run: Callable[..., Any], sanitizer: str | None) -> None:
    """The stages before the benchmark, which is left at least 40 % of the time."""
    stop = time.monotonic() + (end - time.monotonic()) * 0.6
    waiting = dict(SHARES)

    def stage(name: str, command: list[str]) -> None:
        seconds = (stop - time.monotonic()) * waiting[name] / sum(waiting.values())
        del waiting[name]
        # The last test begins early enough for its end and the summary.
        timed = [*command, "--seconds", f"{0.8 * seconds:.0f}"]
        environment = {"PYTHONPATH": str(ROOT / "python"), "OMP_NUM_THREADS": "1"}
        report.stage(name, run(timed, seconds, ROOT, environment))

    several = ["-n", str(PROCESSES)] if find_spec("xdist") else []
    stage("tests", [*TESTS, *several])
    stage("tests on cuda", [*DEVICE_TESTS, *several])
    for check in ("memcheck", "racecheck"):
        if sanitizer is None:
            text = f"skipped: {SANITIZER} is not on the PATH (it comes with the CUDA toolkit)"
            report.stage(check, {"ok": None, "seconds": 0.0, "text": text})
            continue
        checked = [sanitizer, "--tool", check, "--error-exitcode", "1", *TESTS, "-k", "captured"]
        stage(check, checked)


def measure(
    report: Any,
    end: float,
    device: Any,
    cases: Iterable[Any],
    compiled: Callable[[Callable[[], Any]], Callable[[], Any]],
) -> None:
    """A row for each case, until the time is up; a case that raises is said, and the rest go on.

    What a case computes at its size is compared with the reference as well.

    Args:
        report: gets the rows, and at the end a stage.
        end: of the time, in seconds of time.monotonic().
        device: how calls are timed there, like Gpu.
        cases: as gpu_cases.cases gives them.
        compiled: torch.compile, with nothing kept of the case before.
    """
    import torch
    from gpu_report import medians, row_of

    begin, failed, late = time.monotonic(), [], False
    for case in cases:
        late = time.monotonic() > end
        if late:
            break
        try:
            source = torch.empty(case.bytes // 2, dtype=torch.uint8, device=device.name)
            target = torch.empty_like(source)
            calls = {"copy": lambda s=source, t=target: t.copy_(s), **case.calls}
            if case.compiled is not None:
                calls["compile"] = compiled(case.compiled)
            took = medians(calls, device.once, device.rounds)
            more: dict[str, Any] = {}
            if case.microseconds is not None:
                more["gpu_microseconds"] = round(device.in_a_graph(case.calls["embattle"]), 2)
                more["launches"] = device.launches(case.calls["embattle"])
            compare_with_reference(case, device)
            report.row(row_of(case, took, **more))
        except Exception as error:
            failed.append(f"{case.op} {case.size} {case.dtype}: {error!r}")
    text = f"{len(report.rows)} cases{', cut short: time was up' if late else ''}"
    report.stage(
        "benchmark",
        {
            "ok": False if failed else None if late else True,
            "seconds": round(time.monotonic() - begin, 1),
            "text": "; ".join([*failed, text]),
        },
    )


def compare_with_reference(case: Any, device: Any) -> None:
    """Raises AssertionError where the op, out of a graph, is not what the reference says."""
    from compare import assert_matches_reference, run

    given = case.given.clone()
    # Noise in a graph is fresh at every replay: it is drawn outside one.
    drawn = case.name in ("random_start", "gaussian_noise")
    results = run(case.name, given) if drawn else device.captured(lambda: run(case.name, given))
    assert_matches_reference(case.name, case.given, results)


class Gpu:
    """How calls are timed on the current CUDA device."""

    name, rounds = "cuda", 11

    def __init__(self) -> None:
        import torch

        self.flush = torch.empty(64 << 20, dtype=torch.int32, device="cuda")

    def once(self, call: Callable[[], Any]) -> float:
        """Microseconds of a call that finds other things in the second-level cache."""
        import torch

        self.flush.zero_()
        begin, done = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        done.record()
        done.synchronize()
        return float(begin.elapsed_time(done) * 1000)

    def captured(self, call: Callable[[], Any]) -> Any:
        """What a call gives that was recorded, and then replayed once."""
        import torch

        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = call()
        graph.replay()
        torch.cuda.synchronize()
        return results

    def in_a_graph(self, call: Callable[[], Any], calls: int = 50) -> float:
        """Microseconds of a call among many in a graph, without what launching costs the CPU."""
        import torch
        from gpu_report import medians

        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                call()
        return medians({"": graph.replay}, self.once, self.rounds)[""] / calls

    def launches(self, call: Callable[[], Any]) -> int:
        """What a call has the GPU do: kernels, copies and fills."""
        import torch
        from torch.profiler import ProfilerActivity, profile

        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            call()
            torch.cuda.synchronize()
        return sum(e.device_type == torch.autograd.DeviceType.CUDA for e in seen.events())


def compiled_anew(call: Callable[[], Any]) -> Callable[[], Any]:
    import torch

    torch.compiler.reset()
    return torch.compile(call, dynamic=False)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--minutes", type=float, default=7.5, help="after which parts are cut short"
    )
    options = parser.parse_args(arguments)
    sys.path[:0] = [str(ROOT / folder) for folder in ("python", "tools", "benchmarks", "tests")]
    import torch

    if not torch.cuda.is_available():
        print(f"gpu-check: torch {torch.__version__} sees no GPU here: nothing was run")
        return 2
    from embattle import _C
    from gpu_cases import cases
    from gpu_report import Report, run, table
    from origin import origin

    if not _C.build_info()["cuda"]:
        print("gpu-check: the native library has no CUDA kernels; build with EMBATTLE_CUDA=ON")
        return 2
    end = time.monotonic() + 60 * options.minutes
    facts = {
        "device": torch.cuda.get_device_name(),
        "devices": torch.cuda.device_count(),
        **origin(torch.get_num_threads()),
        "build": _C.build_info(),
    }
    report = Report(options.out, datetime.now(timezone.utc), facts)
    run_tests(report, end, run, shutil.which(SANITIZER))
    measure(report, end, Gpu(), cases("cuda"), compiled_anew)
    for name, result in report.stages.items():
        if result["ok"] is not True:
            print(f"{name}: {'FAILED' if result['ok'] is False else 'not run'}\n{result['text']}\n")
    print(f"{report.stem}.json and .md\n\n{table(report.rows)}")
    return 0 if report.good else 1


if __name__ == "__main__":
    sys.exit(main())
