"""Settings of every benchmark, and the table that they print."""

from __future__ import annotations

import pytest

TABLES = pytest.StashKey[dict[str, list[str]]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TABLES] = {}


@pytest.fixture
def report(request: pytest.FixtureRequest) -> dict[str, list[str]]:
    """Lines to print at the end of the run, by the title of their table."""
    return request.config.stash[TABLES]


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    for title, lines in config.stash[TABLES].items():
        terminalreporter.section(title)
        for line in lines:
            terminalreporter.write_line(line)
