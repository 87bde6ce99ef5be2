"""What models are called with, what they return and what surrounds them, when they run twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from clipping_cases import Apply, gradients
from embattle.clipping import PerSampleClipper
from test_clipping_verify import _float64, exact, per_sample
from torch import Tensor, nn

B = 4
assert _float64  # a fixture, for every test here


def _draws_more(graph: Callable[..., Any], _: Any) -> Callable[..., Any]:
    """A backend whose code draws other numbers than the model does, as Inductor's."""

    def run(*args: Any) -> Any:
        torch.rand(1, device="cpu")
        return graph(*args)

    return run


def test_compiled_code_that_draws_its_own_numbers() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        noise = F.dropout(torch.ones(len(x), 3, dtype=x.dtype, device="cpu")).to(x.device)
        return m.a(x) * noise

    x = torch.randn(B, 5)
    model = Apply(forward, a=nn.Linear(5, 3))
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend=_draws_more)
    with PerSampleClipper(compiled, 1.0, verify="always") as clipper:
        clipper.backward(per_sample(compiled(x)))
    assert bool(gradients(model)[0].any())


def test_a_part_of_the_model_is_compiled() -> None:
    part = nn.Sequential(nn.Linear(5, 4), nn.Tanh())
    torch._dynamo.reset()
    model = nn.Sequential(torch.compile(part, backend="aot_eager"), nn.Linear(4, 3))
    x = torch.randn(B, 5)
    for training in (True, False):
        model.train(training)
        exact(model, lambda: per_sample(model(x)), verify="always")


def test_a_frozen_part_that_is_differentiated_by_torch_func() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.a(torch.func.grad(lambda y: m.score(y).sin().sum())(x))

    model = Apply(forward, a=nn.Linear(5, 3), score=nn.Linear(5, 2).requires_grad_(False))
    x = torch.randn(B, 5)
    exact(model, lambda: per_sample(model(x)), verify="always")


@pytest.mark.parametrize("kind", ["sparse", "nested"])
def test_outputs_that_are_not_dense(kind: str) -> None:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        parts = [x[0], x[1, :3]]
        return m.a(x), x.to_sparse() if kind == "sparse" else torch.nested.nested_tensor(parts)

    model, x = Apply(forward, a=nn.Linear(5, 3)), torch.randn(B, 5)
    exact(model, lambda: per_sample(model(x)[0]), verify="always")
