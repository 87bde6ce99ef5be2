"""Settings of every benchmark, and the table that they print.

With `--out FOLDER` the tables are also written to FOLDER/ops_<date>.md.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from origin import in_words, origin

TABLES = pytest.StashKey[dict[str, list[str]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--out", type=Path, help="folder for the tables, as dated Markdown")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TABLES] = {}
    keep_freed_memory()


def keep_freed_memory() -> None:
    """Has the process keep what it frees, where the C library is glibc.

    Otherwise a large result comes from fresh pages after some rows of the table and from old ones
    after others, and the page faults take longer than most ops.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 2**30)


@pytest.fixture
def report(request: pytest.FixtureRequest) -> dict[str, list[str]]:
    """Lines to print at the end of the run, by the title of their table."""
    return request.config.stash[TABLES]


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    tables = config.stash[TABLES]
    for title, lines in tables.items():
        terminalreporter.section(title)
        for line in lines:
            terminalreporter.write_line(line)
    folder = config.getoption("--out")
    if folder is None or not tables:
        return
    about = origin(torch.get_num_threads())
    text = ["# Ops on the CPU", "", in_words(about) + "."]
    for title, lines in tables.items():
        text += ["", f"## {title}", "", "```", *lines, "```"]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"ops_{about['date']}.md"
    path.write_text("\n".join(text) + "\n")
    terminalreporter.write_line(f"written: {path}")
