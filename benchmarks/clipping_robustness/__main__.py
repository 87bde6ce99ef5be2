"""What clipping buys: fake profiles against two recommenders, flipped labels against a classifier.

    python benchmarks/clipping_robustness --out benchmarks/results

Takes about eight minutes on one core, and fetches MovieLens 100K and
the reviews once. Writes clipping_robustness_<date>.json, .md and .png. `--quick` runs the whole
course on small drawn data in a few seconds, without a network; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from pathlib import Path

import report
import sources
import torch
from embattle.files import replacing, write_text
from embattle.progress import bar, say
from factors import Push, RankingTask, RatingTask
from study import Task, fits, run
from texts import ReviewTask


def tasks(quick: bool) -> list[Task]:
    """The three tasks, on real or on drawn data."""
    if quick:
        ratings, few = sources.drawn_ratings(), Push(6)
        return [
            RatingTask(ratings, {"average": few, "flood": Push(2, 20)}, 3),
            RankingTask(ratings, {"average": few}, 3),
            ReviewTask(sources.drawn_reviews(), 3),
        ]
    ratings = sources.movielens()
    return [
        RatingTask(ratings, {"average": Push(50), "flood": Push(5, 200)}, 20),
        RankingTask(ratings, {"average": Push(50)}, 16),
        ReviewTask(sources.reviews(), 12),
    ]


def _command(options: argparse.Namespace) -> str:
    """What gives these figures again."""
    words = ["python benchmarks/clipping_robustness", *(["--quick"] if options.quick else [])]
    words.append(f"--seeds {options.seeds} --tolerance {options.tolerance:g} --shares")
    return " ".join([*words, *(f"{share:g}" for share in options.shares)])


def main(arguments: list[str] | None = None) -> None:
    """Runs all, and writes JSON, Markdown and the figure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=Path("runs/clipping_robustness"))
    parser.add_argument("--quick", action="store_true", help="small drawn data, no network")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--shares",
        type=float,
        nargs="+",
        default=[0.125, 0.5, 2.0],
        help="strengths: max_norm over the median norm",
    )
    parser.add_argument("--tolerance", type=float, default=0.05, help="of the chosen strength")
    parser.add_argument("--tasks", nargs="+", help="names of the tasks to run; default: all")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    began = time.monotonic()
    found = []
    for task in tasks(options.quick):
        if options.tasks and task.name not in options.tasks:
            continue
        total = fits(task, options.shares, options.seeds)
        with bar(task.name, total) as show:
            done = 0

            def tick() -> None:
                nonlocal done
                done += 1
                show(done, {})

            found.append(run(task, options.shares, options.seeds, options.tolerance, tick))
        say("\n".join(report.table(found[-1])))
    record = {
        "about": {
            "date": datetime.date.today().isoformat(),
            "command": _command(options),
            "seconds": time.monotonic() - began,
            "seeds": options.seeds,
            "shares": options.shares,
            "tolerance": options.tolerance,
            "threads": options.threads,
            "torch": torch.__version__,
            "data": "drawn" if options.quick else "MovieLens 100K, Women's Clothing reviews",
        },
        "tasks": found,
    }
    stem = options.out / f"clipping_robustness_{record['about']['date']}"
    write_text(stem.with_suffix(".json"), json.dumps(record, indent=1) + "\n")
    write_text(stem.with_suffix(".md"), report.markdown(record))
    with replacing(stem.with_suffix(".png")) as part:
        part.write_bytes(report.figure(record))
    say(f"{stem}.json, .md, .png")


if __name__ == "__main__":
    main()
