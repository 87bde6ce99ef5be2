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
    if config.getoption("--device") == "pretend":
        import pretend

        pretend.set_up()


# The files whose tests run on any device. The others say "cpu" somewhere, or ask the pretend device
# for what it cannot do.
ON_ANY_DEVICE = ("test_attacks.py", "test_monitor.py")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    elsewhere = config.getoption("--device") != "cpu" and collection_path.suffix == ".py"
    return True if elsewhere and collection_path.name not in ON_ANY_DEVICE else None


@pytest.fixture(autouse=True)
def on_the_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Has the test make its tensors on the device of --device."""
    device = request.config.getoption("--device")
    if device == "cpu":
        yield
        return
    from devices import On

    with On("pretend:0" if device == "pretend" else device):
        yield


@pytest.fixture
def emulator_reset() -> Iterator[None]:
    """Gives the emulated device its own size and order back after the test."""
    yield
    from emulated_case import emulated

    emulated.kernels().set_device()
    emulated.kernels().set_order("forward")
