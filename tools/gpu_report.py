"""Stages, rows and files of `make gpu-check`: what needs no GPU, and is tested without one."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from gpu_cases import Case

OTHERS = ("eager", "compile", "torchattacks", "foolbox", "opacus")


def run(command: list[str], seconds: float, folder: Path, environment: Mapping[str, str]) -> Any:
    """Runs a command and all that it starts for so many seconds at most.

    Returns:
        ok (None where it was not run for want of time), seconds, and the end of what was printed.
    """
    if seconds < 1:
        return {"ok": None, "seconds": 0.0, "text": "skipped: no time was left"}
    begin = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    cut = False
    try:
        text, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        cut = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        text, _ = process.communicate()
    if cut:
        text += f"\ncut off after {seconds:.0f} s"
    return {
        "ok": process.returncode == 0 and not cut,
        "seconds": round(time.monotonic() - begin, 1),
        "text": text[-3000:],
    }


class Report:
    """A JSON and a Markdown file, written anew after every step: what is done is kept."""

    def __init__(self, folder: Path, when: datetime, facts: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.stem = folder / f"gpu-{when:%Y-%m-%d-%H%M%S}"
        self.facts = {**facts, "date": f"{when:%Y-%m-%d %H:%M} UTC"}
        self.stages: dict[str, dict[str, Any]] = {}
        self.rows: list[dict[str, Any]] = []
        self.save()

    def stage(self, name: str, result: dict[str, Any]) -> None:
        self.stages[name] = result
        self.save()

    def row(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self.save()

    @property
    def good(self) -> bool:
        """Nothing has failed; what was skipped says so in the files."""
        return all(result["ok"] is not False for result in self.stages.values())

    def markdown(self) -> str:
        lines = [f"# {self.facts.get('device', 'GPU check')}, {self.facts['date']}", ""]
        lines += [f"- {name}: {value}" for name, value in self.facts.items() if name != "date"]
        for name, result in self.stages.items():
            verdict = {True: "passed", False: "FAILED", None: "not run"}[result["ok"]]
            tail = result["text"].strip().splitlines()
            lines.append(f"- {name}: {verdict}{f' ({tail[-1]})' if tail else ''}")
        return "\n".join([*lines, "", table(self.rows)]) + "\n"

    def save(self) -> None:
        whole = {**self.facts, "stages": self.stages, "benchmark": self.rows}
        for suffix, text in (
            (".json", json.dumps(whole, indent=1) + "\n"),
            (".md", self.markdown()),
        ):
            scratch = self.stem.with_suffix(suffix + ".part")
            scratch.write_text(text)
            scratch.replace(self.stem.with_suffix(suffix))


def medians(
    calls: Mapping[str, Callable[[], Any]], once: Callable[[Callable[[], Any]], float], rounds: int
) -> dict[str, float]:
    """The median of what `once` measures of each call; they take turns."""
    for call in calls.values():
        for _ in range(2):
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(once(call))
    return {name: statistics.median(values) for name, values in times.items()}


def row_of(case: Case, took: Mapping[str, float], **more: Any) -> dict[str, Any]:
    """A measured case: microseconds by candidate, what they mean, and which targets are missed.

    Args:
        case: what was measured.
        took: microseconds of "copy" (of case.bytes, half of them read) and of the candidates.
        more: gpu_microseconds (in a graph of many calls) and launches, where known.
    """
    row: dict[str, Any] = {
        "op": case.op,
        "size": case.size,
        "dtype": case.dtype,
        "bytes": case.bytes,
        "microseconds": {name: round(value, 2) for name, value in took.items()},
        "of_copy_rate": round(took["copy"] / took["embattle"], 3),
        "targets": {},
        **more,
    }

    def ask(name: str, value: float | None, wanted: float, most: bool = False) -> None:
        met = None if value is None else bool(value <= wanted if most else value >= wanted)
        row["targets"][name] = {
            "wanted": wanted,
            "measured": None if value is None else round(value, 3),
            "met": met,
        }

    if case.rate is not None:
        ask("of the copy rate", took["copy"] / took["embattle"], case.rate)
    for other, factor in case.over.items():
        if other in took:
            ask(f"x {other}", took[other] / took["embattle"], factor)
    if case.microseconds is not None:
        ask("us of GPU time", more.get("gpu_microseconds"), case.microseconds, most=True)
        ask("launches", more.get("launches"), 1, most=True)
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: microseconds, the share of the copy's rate, and what was aimed at."""
    head = ["op", "size", "dtype", "MB", "copy us", "embattle us", "of copy rate", "GPU us"]
    head += ["launches", *(f"{name} us" for name in OTHERS), "targets"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        took = row["microseconds"]

        def number(value: float | None, form: str = ".1f") -> str:
            return "-" if value is None else format(value, form)

        targets = "; ".join(
            f"{number(t['measured'], '.3g')} {name} (target {t['wanted']:g}"
            f"{'' if t['met'] else ', not measured' if t['met'] is None else ', MISSED'})"
            for name, t in row["targets"].items()
        )
        cells = [row["op"], row["size"], row["dtype"], f"{row['bytes'] / 1e6:.1f}"]
        cells += [number(took["copy"]), number(took["embattle"]), f"{row['of_copy_rate']:.0%}"]
        cells += [number(row.get("gpu_microseconds")), number(row.get("launches"), "d")]
        cells += [number(took.get(name)) for name in OTHERS]
        lines.append("| " + " | ".join([*cells, targets or "-"]) + " |")
    missed = sum(t["met"] is False for row in rows for t in row["targets"].values())
    met = sum(t["met"] is True for row in rows for t in row["targets"].values())
    return "\n".join([*lines, "", f"Targets met: {met}, missed: {missed}."])
