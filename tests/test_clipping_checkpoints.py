"""Checkpointed functions that use parameters of the module which calls them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from clipping_cases import assert_close, clipped_sum, gradients
from embattle.clipping import PerSampleClipper
from test_clipping_verify import _float64, per_sample, reference
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

B = 4
assert _float64  # a fixture, for every test here


class Block(nn.Module):
    """A function of its own parameters and a buffer, checkpointed in one way or not at all."""

    mask: Tensor

    def __init__(self, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.how = function, "plain"
        self.weight, self.scale = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))
        self.norm = nn.LayerNorm(4)
        self.register_buffer("mask", torch.tensor([1.0, 0.0, 1.0, 2.0]))

    def forward(self, h: Tensor) -> Tensor:
        if self.how == "plain":
            return self.function(self, h)
        return checkpoint(self.function, self, h, use_reentrant=self.how == "reentrant")


FUNCTIONS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "elementwise": lambda m, h: (h * m.scale).tanh(),
    "product": lambda m, h: (h @ m.weight + m.scale).tanh(),
    "derived": lambda m, h: F.linear(h, m.weight * m.mask, m.scale.exp()).tanh(),
    "without a rule": lambda m, h: torch.einsum("bi,ij->bj", h, m.weight).sin(),
    "around a module": lambda m, h: m.norm(h * m.scale).tanh() @ m.weight,
}


@pytest.mark.parametrize("how", ["plain", "reentrant", "not reentrant"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_a_modules_own_parameters(name: str, how: str) -> None:
    blocks = [Block(FUNCTIONS[name]), Block(FUNCTIONS["elementwise"])]
    model = nn.Sequential(nn.Linear(5, 4), *blocks, blocks[0], nn.Linear(4, 3))
    x = torch.randn(B, 5)
    wanted, norms = clipped_sum(reference(model, lambda: per_sample(model(x))), 5.0)
    for block in blocks:
        block.how = how
    clipper = PerSampleClipper(model, 5.0, reduction="sum", verify="always")
    for _ in range(2):
        model.zero_grad()
        with clipper:
            result = clipper.backward(per_sample(model(x)))
        assert_close([result.norms], [norms], 1e-9)
        assert_close(gradients(model), wanted, 1e-9)
