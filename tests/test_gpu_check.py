"""What `make gpu-check` does beside the GPU: its peers, its report, its stages."""

from __future__ import annotations

import json
import sys
import time
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import gpu_cases
import gpu_check
import gpu_report
from samples import Call

WHEN = datetime(2031, 2, 3, 4, 5, 6)


def flat(result: Any) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)


def report(tmp_path: Path) -> gpu_report.Report:
    return gpu_report.Report(tmp_path / "out", WHEN, {"device": "a device"})


def case(**options: Any) -> gpu_cases.Case:
    given = Call([torch.ones(2, 3), torch.ones(2, 3)], {"step_size": 0.3, "eps": 1.0})
    return gpu_cases.Case("pgd_step l2", "[2, 3]", "float32", 3_000_000, given, {}, **options)


def test_the_peers_compute_what_the_ops_do() -> None:
    torch.manual_seed(0)
    seen = set()
    for one in gpu_cases.cases("cpu", tiny=True):
        seen.add(one.op.split()[0])
        half = one.dtype in ("bfloat16", "float16")
        want = flat(one.calls["embattle"]())
        if one.name == "clip_and_sum":
            want = want[0]
        for name in one.calls:
            got = flat(one.calls[name]())
            if name in one.same:
                for a, b in zip(got, want, strict=True):
                    torch.testing.assert_close(
                        a.double(),
                        b.double(),
                        rtol=0.03 if half else 1e-4,
                        atol=1e-2 if half else 1e-5,
                    )
        assert set(one.same) <= set(one.calls)
        assert one.compiled is None or "eager" in one.calls
    ops = {"pgd_step", "project", "random_start", "gaussian_noise", "momentum_step", "group_norm"}
    ops |= {"clip_and_sum", "per_sample_norm", "linear_grad_norm", "embedding_grad_norm"}
    assert seen == ops | {"embedding_grad_sum", "embedding_perturb", "rowwise_adagrad_"}


def test_every_op_on_tables_has_a_target_in_half_types_too() -> None:
    asked: dict[str, set[str]] = {}
    for one in gpu_cases.cases("cpu", tiny=True):
        if one.over:
            asked.setdefault(one.name, set()).add(one.dtype)
    ops = ("embedding_grad_norm", "embedding_grad_sum", "embedding_perturb", "rowwise_adagrad_")
    for op in (*ops, "linear_grad_norm"):
        assert asked[op] == {"float32", "bfloat16", "float16"}, op


def test_a_result_that_is_not_the_references_is_a_failure(tmp_path: Path) -> None:
    class Wrong(Clock):
        def captured(self, call: Any) -> Any:
            results = call()
            results[0].view(-1)[-1:].fill_(777.0)
            return results

    for device, ok in ((Clock(), True), (Wrong(), False)):
        for one in gpu_cases.cases("cpu", tiny=True):
            kept = report(tmp_path)
            gpu_check.measure(kept, time.monotonic() + 100, device, [one], lambda call: call)
            drawn = one.name in ("random_start", "gaussian_noise")  # not in a graph
            stage = kept.stages["benchmark"]
            assert stage["ok"] is (ok or drawn), (one.name, stage["text"])
            assert ("elements are off" in stage["text"]) is not stage["ok"]


def test_a_row_says_which_targets_are_missed() -> None:
    wanted = case(rate=0.9, over={"compile": 1.3}, microseconds=8.0)
    took = {"copy": 9.5, "embattle": 10.0, "compile": 12.0, "eager": 50.0}
    row = gpu_report.row_of(wanted, took, gpu_microseconds=7.0, launches=2)
    met = {name: target["met"] for name, target in row["targets"].items()}
    assert met == {
        "of the copy rate": True,
        "x compile": False,
        "us of GPU time": True,
        "launches": False,
    }
    text = gpu_report.table([row])
    assert "1.2 x compile (target 1.3, MISSED)" in text
    assert "0.95 of the copy rate (target 0.9)" in text
    assert "Targets met: 2, missed: 2." in text
    unknown = gpu_report.row_of(wanted, took)
    assert unknown["targets"]["launches"]["met"] is None
    assert "not measured" in gpu_report.table([unknown])
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert len(widths) == 1


def test_candidates_take_turns_and_the_median_counts() -> None:
    order: list[str] = []
    clock = iter([1.0, 10.0, 3.0, 30.0, 2.0, 20.0])
    calls = {name: (lambda n=name: order.append(n)) for name in ("a", "b")}

    def once(call: Any) -> float:
        call()
        return next(clock)

    assert gpu_report.medians(calls, once, 3) == {"a": 2.0, "b": 20.0}
    assert order == ["a", "a", "b", "b", "a", "b", "a", "b", "a", "b"]


def test_what_is_done_is_kept(tmp_path: Path) -> None:
    kept = report(tmp_path)
    assert kept.stem.name == "gpu-2031-02-03-040506"
    kept.stage("tests", {"ok": True, "seconds": 1.0, "text": "3 passed"})
    kept.row(gpu_report.row_of(case(), {"copy": 1.0, "embattle": 2.0}))
    # As if the process were killed here.
    found = json.loads(kept.stem.with_suffix(".json").read_text())
    assert found["stages"]["tests"]["ok"] is True
    assert found["benchmark"][0]["of_copy_rate"] == 0.5
    text = kept.stem.with_suffix(".md").read_text()
    assert "- tests: passed (3 passed)" in text
    assert "| pgd_step l2 |" in text
    assert sorted(p.suffix for p in kept.stem.parent.iterdir()) == [".json", ".md"]
    assert kept.good
    kept.stage("memcheck", {"ok": None, "seconds": 0.0, "text": "skipped"})
    assert kept.good
    kept.stage("racecheck", {"ok": False, "seconds": 0.0, "text": "a race"})
    assert not kept.good
    assert "- racecheck: FAILED (a race)" in kept.stem.with_suffix(".md").read_text()


def test_a_command_is_cut_off_with_all_that_it_started(tmp_path: Path) -> None:
    child, parent = tmp_path / "child.py", tmp_path / "parent.py"
    child.write_text("import time; time.sleep(3); open('written', 'w')")
    parent.write_text(
        "import subprocess, sys, time\n"
        "print('begun', flush=True)\n"
        "subprocess.Popen([sys.executable, 'child.py'])\n"
        "time.sleep(60)\n"
    )
    begin = time.monotonic()
    result = gpu_report.run([sys.executable, "parent.py"], 2, tmp_path, {})
    assert result["ok"] is False
    assert "begun" in result["text"]
    assert "cut off after 2 s" in result["text"]
    time.sleep(max(0.0, 6 - (time.monotonic() - begin)))
    assert not (tmp_path / "written").exists()


def test_a_command_passes_or_fails_by_its_status(tmp_path: Path) -> None:
    code = "import os, sys; print(os.environ['WORD']); sys.exit(int(sys.argv[1]))"
    for status in (0, 3):
        command = [sys.executable, "-c", code, str(status)]
        result = gpu_report.run(command, 60, tmp_path, {"WORD": "said"})
        assert result["ok"] is (status == 0)
        assert result["text"].strip() == "said"
    assert gpu_report.run(["never"], 0.5, tmp_path, {})["ok"] is None


@pytest.mark.parametrize("sanitizer", [None, "/opt/compute-sanitizer"])
def test_the_stages_and_a_missing_sanitizer(tmp_path: Path, sanitizer: str | None) -> None:
    ran: list[list[str]] = []
    given: list[float] = []

    def run(command: list[str], seconds: float, folder: Path, environment: Any) -> Any:
        ran.append(command)
        given.append(seconds)
        return {"ok": True, "seconds": 1.0, "text": ""}

    kept = report(tmp_path)
    gpu_check.run_tests(kept, time.monotonic() + 100, run, sanitizer)
    assert list(kept.stages) == ["tests", "tests on cuda", "memcheck", "racecheck"]
    # A stage that takes no time, as here, leaves its own to those that follow.
    assert given[0] == pytest.approx(60 * 3 / 11, rel=0.01)
    assert given[1] == pytest.approx(60 * 4 / 8, rel=0.01)
    assert max(given) <= 60
    assert "tests/test_cuda_device.py" in ran[0]
    assert ran[1][ran[1].index("tests") :][:3] == ["tests", "--device", "cuda"]
    for command, seconds in zip(ran, given, strict=True):
        assert command[-2] == "--seconds"
        assert float(command[-1]) < seconds
        several = find_spec("xdist") is not None and command[0] != sanitizer
        assert ("-n" in command) is several
    if sanitizer is None:
        assert len(ran) == 2
        assert kept.stages["memcheck"]["ok"] is None
        assert "compute-sanitizer is not on the PATH" in kept.stages["memcheck"]["text"]
    else:
        assert [command[:3] for command in ran[2:]] == [
            [sanitizer, "--tool", "memcheck"],
            [sanitizer, "--tool", "racecheck"],
        ]
        assert all(command[-4:-2] == ["-k", "captured"] for command in ran[2:])


class Clock:
    """A device on which every call takes a microsecond more than the one before."""

    name, rounds = "cpu", 3

    def __init__(self) -> None:
        self.calls = 0

    def once(self, call: Any) -> float:
        call()
        self.calls += 1
        return float(self.calls)

    def captured(self, call: Any) -> Any:
        return call()

    def in_a_graph(self, call: Any) -> float:
        return self.once(call)

    def launches(self, call: Any) -> int:
        call()
        return 1


def test_every_case_becomes_a_row_and_a_broken_one_is_said(tmp_path: Path) -> None:
    def broken() -> None:
        raise ValueError("no such op")

    kept, end = report(tmp_path), time.monotonic() + 100
    listed = list(gpu_cases.cases("cpu", tiny=True))
    bad = case()
    bad.calls["embattle"] = broken
    gpu_check.measure(kept, end, Clock(), [bad, *listed], lambda call: call)
    assert [(row["op"], row["dtype"]) for row in kept.rows] == [(c.op, c.dtype) for c in listed]
    for row, one in zip(kept.rows, listed, strict=True):
        extra = {"copy", *(() if one.compiled is None else ("compile",))}
        assert set(row["microseconds"]) == {*one.calls, *extra}
        assert set(row["microseconds"]) <= {"copy", "embattle", *gpu_report.OTHERS}
    small = next(row for row in kept.rows if row["op"] == "pgd_step l2")
    assert small["targets"]["launches"]["met"] is True
    assert kept.stages["benchmark"]["ok"] is False
    assert "ValueError('no such op')" in kept.stages["benchmark"]["text"]


def test_a_benchmark_without_time_is_cut_short(tmp_path: Path) -> None:
    kept = report(tmp_path)
    gpu_check.measure(kept, time.monotonic() - 1, Clock(), [case()], lambda call: call)
    assert kept.rows == []
    assert kept.stages["benchmark"]["ok"] is None
    assert "time was up" in kept.stages["benchmark"]["text"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu_check.main(["--out", str(tmp_path / "out")]) == 2
    assert "sees no GPU" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
