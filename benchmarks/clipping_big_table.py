"""A table of ten million rows under per-sample clipping: peak memory and time of a step.

    python benchmarks/clipping_big_table.py [--out benchmarks/results]

Each table is measured in a process of its own, so that the peak is its own: the largest resident
size that the operating system saw (VmHWM), with Python and torch. The steps are forward, clipped
backward and SGD on an embedding with sparse gradients under a small network. A table of ten
thousand rows is measured beside it: the cost of a step should not tell the two apart.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROWS = (10_000, 10_000_000)


def measure(rows: int, width: int, samples: int, steps: int, threads: int) -> dict[str, Any]:
    """Runs the steps in this process."""
    import embattle as eb
    import torch
    import torch.nn.functional as F
    from torch import nn

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    table = nn.Embedding(rows, width, sparse=True)
    model = nn.Sequential(
        table, nn.Flatten(), nn.Linear(2 * width, 64), nn.ReLU(), nn.Linear(64, 1)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    clipper = eb.PerSampleClipper(model, 0.1)
    before = peak()
    times = []
    for _ in range(steps + 2):
        ids = torch.randint(rows, (samples, 2))
        labels = torch.randint(2, (samples,)).float()
        start = time.perf_counter()
        optimizer.zero_grad()
        with clipper:
            losses = F.binary_cross_entropy_with_logits(
                model(ids).squeeze(1), labels, reduction="none"
            )
            clipper.backward(losses)
        optimizer.step()
        times.append(time.perf_counter() - start)
    return {
        "rows": rows,
        "table_gb": rows * width * 4 / 1e9,
        "step_ms": 1000 * statistics.median(times[2:]),
        "before_gb": before,
        "peak_gb": peak(),
    }


def peak() -> float:
    """The largest resident size of this process so far, in GB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e9
    raise RuntimeError("no VmHWM in /proc/self/status: this needs Linux")


def main() -> None:
    """Measures both tables, prints, and writes JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--samples", type=int, default=16_384)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--out", type=Path, help="folder for the dated JSON")
    parser.add_argument("--here", action="store_true", help="one table, in this process")
    options = parser.parse_args()
    if options.here:
        found = measure(
            options.rows[0], options.width, options.samples, options.steps, options.threads
        )
        print(json.dumps(found))
        return
    results = []
    for rows in options.rows:
        command = [sys.executable, __file__, "--here", "--rows", str(rows)]
        for name in ("width", "samples", "steps", "threads"):
            command += [f"--{name}", str(getattr(options, name))]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        results.append(json.loads(done.stdout))
        print(
            "{rows:>10} rows ({table_gb:.2f} GB): step {step_ms:.1f} ms, peak {peak_gb:.2f} GB, "
            "{before_gb:.2f} GB of it before the first step".format(**results[-1])
        )
    if options.out:
        from origin import origin

        about = origin(options.threads)
        record = {
            **about,
            "samples": options.samples,
            "width": options.width,
            "results": results,
        }
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / f"clipping_big_table_{about['date']}.json"
        path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
