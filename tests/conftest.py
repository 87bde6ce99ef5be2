"""Settings of every test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings

settings.register_profile("embattle", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("embattle")


@pytest.fixture
def emulator_reset() -> Iterator[None]:
    """Gives the emulated device its own size and order back after the test."""
    yield
    from emulated_case import emulated

    emulated.kernels().set_device()
    emulated.kernels().set_order("forward")
