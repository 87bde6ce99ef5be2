"""What the plain pass need not copy or put back, and collections of odd shapes."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Any

import pytest
import torch
from clipping_cases import Apply
from embattle.clipping import PerSampleClipper
from embattle.perturb import model_state
from test_clipping_verify import per_sample
from torch import Tensor, nn

B = 4


@pytest.mark.parametrize("kind", [OrderedDict, deque])
def test_what_a_forward_only_reads_is_left_alone(kind: Any) -> None:
    """The caller may be in the middle of a loop over it, another thread may be reading it."""
    model, x = nn.Sequential(nn.Linear(5, 3)), torch.randn(B, 5)
    model.tasks = kind([(0, 1), (2, 3)])
    with PerSampleClipper(model, 1.0, verify="always") as clipper:
        assert len([clipper.backward(per_sample(model(x))) for _ in model.tasks]) == 2


def test_collections_lie_in_each_other_however_deep() -> None:
    """As a tree of prefixes, and a ring."""
    tree: dict[str, Any] = {}
    top = tree
    for _ in range(2000):
        tree["next"] = {}
        tree = tree["next"]
    tree["top"] = top

    def forward(m: Any, x: Tensor) -> Tensor:
        tree["calls"] = tree.get("calls", 0) + 1
        return m.a(x)

    model, x = Apply(forward, a=nn.Linear(5, 3)), torch.randn(B, 5)
    model.tree = top
    with PerSampleClipper(model, 1.0, verify="always") as clipper:
        clipper.backward(per_sample(model(x)))
    assert tree["calls"] == 1


def test_what_lies_in_tuples_is_put_back() -> None:
    """As keys and values of a cache, by layer."""

    def forward(m: Any, x: Tensor) -> Tensor:
        for total, calls in (m.own, *m.layers):
            total.add_(1)
            calls.append(len(calls))
        return m.a(x)

    model, x = Apply(forward, a=nn.Linear(5, 3)), torch.randn(B, 5)
    model.own, model.layers = (torch.zeros(()), []), [(torch.zeros(()), [])]
    with PerSampleClipper(model, 1.0, verify="always") as clipper:
        clipper.backward(per_sample(model(x)))
    assert [(float(total), calls) for total, calls in (model.own, *model.layers)] == [(1, [0])] * 2


def test_a_large_frozen_table_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_state, "_LARGE_BYTES", 0)
    kept: list[Any] = []
    monkeypatch.setattr(model_state._Tensor, "keep", kept.append)
    table = nn.Embedding(9, 5).requires_grad_(False)
    model = nn.Sequential(table, nn.Linear(5, 3))
    with PerSampleClipper(model, 1.0, verify="always") as clipper:
        clipper.backward(per_sample(model(torch.arange(B))))
    assert not kept
