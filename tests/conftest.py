"""Settings of every test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

try:
    from hypothesis import settings
except ImportError:
    pass  # the tests that need it are skipped
else:
    settings.register_profile("embattle", deadline=None, derandomize=True, print_blob=True)
    settings.load_profile("embattle")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        default="cpu",
        help="where the tests' tensors live: cpu, cuda, or pretend (see tests/devices.py)",
    )


def pytest_configure(config: pytest.Config) -> None:
    device = config.getoption("--device")
    if device == "cpu":
        return
    if device == "pretend":
        import pretend

        pretend.set_up()
    import devices

    mode = devices.use(device)
    config.add_cleanup(lambda: mode.__exit__(None, None, None))


@pytest.fixture
def emulator_reset() -> Iterator[None]:
    """Gives the emulated device its own size and order back after the test."""
    yield
    from emulated_case import emulated

    emulated.kernels().set_device()
    emulated.kernels().set_order("forward")
