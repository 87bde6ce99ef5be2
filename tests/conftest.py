"""Settings of every test."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

settings.register_profile("embattle", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("embattle")


def _has_kernel(op: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"embattle::{op}", "CPU")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of one op run once that op has a kernel."""
    waiting = [
        item
        for item in items
        if isinstance(op := getattr(item, "callspec", None) and item.callspec.params.get("op"), str)
        and not _has_kernel(op)
    ]
    if waiting:
        config.hook.pytest_deselected(items=waiting)
        items[:] = [item for item in items if item not in set(waiting)]
