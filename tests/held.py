"""A test that test_pretend.py has pytest run; no part of the suite."""

from __future__ import annotations

import devices
import pytest
import torch

OF_THE_MODULE = torch.ones(2)


@pytest.fixture(scope="module")
def of_a_fixture() -> torch.Tensor:
    return torch.ones(2)


def test_everything_is_on_the_device(of_a_fixture: torch.Tensor) -> None:
    for made in (OF_THE_MODULE, of_a_fixture, torch.nn.Linear(2, 2).weight):
        assert made.device.type == devices.kind
