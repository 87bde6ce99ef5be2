"""Live progress on a terminal, an occasional line elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

from embattle.errors import need


class Bar(Protocol):
    """Called after each step with the number of steps done and the figures to show."""

    def __call__(self, done: int, figures: Mapping[str, float]) -> None: ...


def say(text: str) -> None:
    """Prints a line at once."""
    print(text, flush=True)


@contextmanager
def bar(title: str, total: int, *, start: int = 0, shown: bool = True) -> Iterator[Bar]:
    """Shows how far `total` steps have got, some figures, and the time left.

    On a terminal this is a rich progress bar. Elsewhere about ten plain lines are printed.

    Args:
        title: what is going on.
        total: number of steps.
        start: steps that were already done.
        shown: False prints nothing (all processes but the first).

    Yields:
        The function to call after each step.
    """
    if not shown:
        yield lambda done, figures: None
    elif sys.stdout.isatty():
        rich = need("rich.progress")
        columns = [
            rich.TextColumn("{task.description}"),
            rich.BarColumn(bar_width=24),
            rich.TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            rich.TextColumn("{task.fields[figures]}"),
            rich.TextColumn("left"),
            rich.TimeRemainingColumn(),
        ]
        with rich.Progress(*columns) as live:
            task = live.add_task(title, total=total, completed=start, figures="")

            def draw(done: int, figures: Mapping[str, float]) -> None:
                live.update(task, completed=done, figures=_words(figures))

            yield draw
    else:
        began = time.monotonic()
        every = max(1, total // 10)

        def line(done: int, figures: Mapping[str, float]) -> None:
            if done % every == 0 or done == total:
                pace = (time.monotonic() - began) / max(1, done - start)
                left = round(pace * (total - done))
                say(
                    f"{title}  {done}/{total}  {_words(figures)}  left {left // 60}:{left % 60:02d}"
                )

        yield line


def _words(figures: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.3f}" for name, value in figures.items())
