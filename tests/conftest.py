"""Settings of every test."""

from __future__ import annotations

from collections.abc import Iterator

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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--device") == "cpu":
        return
    for item in items:
        for mark in item.iter_markers("cpu_only"):
            item.add_marker(pytest.mark.skip(reason=f"cpu_only: {mark.args[0]}"))


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
