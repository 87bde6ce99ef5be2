"""Tests and measures the CUDA kernels on the GPU at hand; `make gpu-check OUT=dir` calls it.

    python tools/gpu_check.py --out DIR [--minutes 9]

Runs the GPU tests, compute-sanitizer on a short list, and the benchmark; writes DIR/gpu-DATE.json
and .md after each part, so that what is done is kept if time runs out. Exits with 2 where there is
no GPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SHAPES = [(256, 32, 128), (64, 128, 768), (64, 512, 768), (4096, 64)]


def run(command: list[str], seconds: float) -> dict[str, Any]:
    """Runs a command from the root; what it printed last and how it ended."""
    env = {**os.environ, "PYTHONPATH": str(ROOT / "python")}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=max(seconds, 1)
        )
    except subprocess.TimeoutExpired:
        return {"ok": False, "text": f"cut off after {seconds:.0f} s"}
    return {"ok": done.returncode == 0, "text": (done.stdout + done.stderr)[-3000:]}


def microseconds(function: Callable[[], Any], rounds: int = 20) -> float:
    """The median GPU time of a call that finds other things in the second-level cache."""
    import torch

    flush = torch.empty(64 << 20, dtype=torch.int32, device="cuda")
    for _ in range(3):
        function()
    times = []
    for _ in range(rounds):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000)
    return statistics.median(times)


def eager_step(delta: Any, grad: Any, norm: str) -> Any:
    """A step as attack libraries write it, on [groups, n] views; l1 projects by sorting."""
    import torch

    groups = len(delta)
    d, g = delta.reshape(groups, -1), grad.reshape(groups, -1)
    if norm == "linf":
        return (d + 0.3 * g.sign()).clamp(-1.0, 1.0)
    if norm == "l2":
        d = d + 0.3 * g / (g.norm(dim=1, keepdim=True) + 1e-10)
        return d * (1.0 / d.norm(dim=1, keepdim=True).clamp_min(1.0))
    d = d + 0.3 * torch.zeros_like(g).scatter_(1, g.abs().argmax(1, keepdim=True), 1.0) * g.sign()
    size = d.abs()
    ordered = size.sort(1, descending=True).values
    count = torch.arange(1, d.shape[1] + 1, device=d.device)
    threshold = (ordered.cumsum(1) - 1.0) / count
    kept = (ordered > threshold).sum(1, keepdim=True)
    return d.sign() * (size - threshold.gather(1, kept - 1)).clamp_min(0)


def benchmark(deadline: float) -> list[dict[str, Any]]:
    """Microseconds of a step: copying the same bytes, embattle, eager and compiled torch."""
    import torch
    from embattle import ops

    rows: list[dict[str, Any]] = []
    compiled = torch.compile(eager_step, dynamic=False)
    for dtype in (torch.float32, torch.bfloat16):
        for shape in SHAPES:
            delta, grad = torch.randn(2, *shape, device="cuda").to(dtype)
            source = torch.empty(delta.numel() * 3 // 2, dtype=dtype, device="cuda")
            target = torch.empty_like(source)
            floor = microseconds(lambda s=source, t=target: t.copy_(s))  # 3 N bytes in all
            for norm in ("l2", "linf", "l1"):
                if time.monotonic() > deadline:
                    return rows
                row: dict[str, Any] = {
                    "op": f"pgd_step {norm}",
                    "shape": list(shape),
                    "dtype": str(dtype)[6:],
                    "copy": floor,
                    "embattle": microseconds(
                        lambda d=delta, g=grad, n=norm: ops.pgd_step(
                            d, g, step_size=0.3, eps=1.0, norm=n
                        )
                    ),
                    "eager": microseconds(
                        lambda d=delta, g=grad, n=norm: eager_step(d, g, n), rounds=5
                    ),
                }
                if norm != "l1":
                    row["compile"] = microseconds(lambda d=delta, g=grad, n=norm: compiled(d, g, n))
                rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The benchmark as Markdown: microseconds, and the share of the copy's rate."""
    lines = [
        "| op | shape | dtype | copy us | embattle us | of copy rate | eager us | compile us |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        compiled = f"{r['compile']:.1f}" if "compile" in r else "-"
        lines.append(
            f"| {r['op']} | {r['shape']} | {r['dtype']} | {r['copy']:.1f} | {r['embattle']:.1f} | "
            f"{r['copy'] / r['embattle']:.0%} | {r['eager']:.1f} | {compiled} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=9, help="after which parts are cut short")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT / "python"))
    import torch

    if not torch.cuda.is_available():
        print(f"gpu-check: torch {torch.__version__} sees no GPU here: nothing was run")
        return 2
    from embattle import _C

    if not _C.build_info()["cuda"]:
        print("gpu-check: the native library has no CUDA kernels; build with EMBATTLE_CUDA=ON")
        return 2
    begin = time.monotonic()
    end = begin + 60 * options.minutes
    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.out / f"gpu-{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d-%H%M%S}"
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "build": _C.build_info(),
        "commit": commit,
    }

    def save() -> None:
        stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        parts = [f"# {result['device']}, torch {result['torch']}, {commit[:12]}", ""]
        for part in ("tests", "memcheck", "racecheck"):
            if part in result:
                parts.append(f"- {part}: {'passed' if result[part]['ok'] else 'FAILED'}")
        if "benchmark" in result:
            parts += ["", table(result["benchmark"])]
        stem.with_suffix(".md").write_text("\n".join(parts) + "\n")

    pytest = [sys.executable, "-m", "pytest", "-q", "tests/test_cuda_device.py"]
    result["tests"] = run(pytest, min(240, end - time.monotonic()))
    save()
    sanitizer = shutil.which("compute-sanitizer")
    for check in ("memcheck", "racecheck"):
        if sanitizer is None:
            result[check] = {"ok": False, "text": "compute-sanitizer is not on the PATH"}
            continue
        command = [sanitizer, "--tool", check, "--error-exitcode", "1", *pytest]
        result[check] = run([*command, "-k", "captured"], min(60, end - time.monotonic()))
        save()
    result["benchmark"] = benchmark(end)
    result["seconds"] = time.monotonic() - begin
    save()
    for part in ("tests", "memcheck", "racecheck"):
        print(f"{part}: {'passed' if result[part]['ok'] else 'FAILED: ' + result[part]['text']}")
    print(table(result["benchmark"]))
    return 0 if all(result[part]["ok"] for part in ("tests", "memcheck", "racecheck")) else 1


if __name__ == "__main__":
    sys.exit(main())
