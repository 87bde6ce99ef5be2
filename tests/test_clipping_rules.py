"""What runs sample by sample for want of a rule; and which small rules of the clipper hold."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from clipping_cases import Apply, gradients
from embattle.clipping import PerSampleClipper
from test_clipping_verify import _float64, exact, per_sample, refused
from torch import nn

B = 4
assert _float64  # a fixture, for every test here


def own(function: Any, *shape: int, **parts: Any) -> Any:
    """A model with a parameter p of the given shape."""
    return Apply(function, p=nn.Parameter(torch.randn(*shape)), **parts)


# --- operators without a rule ---------------------------------------------------------------------


def test_rows_of_samples_wherever_they_are() -> None:
    x = torch.randn(B, 3, 2)
    folded = own(lambda m, x: F.prelu(x.flatten(0, 1), m.p).reshape(x.shape), 2)
    exact(folded, lambda: per_sample(folded(x)))
    turned = own(lambda m, x: torch.einsum("bti,ij->tbj", x, m.p), 2, 3)
    exact(turned, lambda: per_sample(turned(x).transpose(0, 1)))
    second = own(lambda m, x: torch.einsum("tbi,ij->tbj", x, m.p), 2, 3)
    exact(second, lambda: per_sample(second(x.transpose(0, 1)).transpose(0, 1)), batch_dim=1)
    shared = own(lambda m, x: x + F.prelu(torch.full((1, 2, 3), -2.0), m.p), 2)
    exact(shared, lambda: per_sample(shared(torch.ones(B, 2, 3))))


def test_constants_as_large_as_the_batch() -> None:
    model = own(lambda m, x: torch.einsum("bti,jk,ik->btj", x, m.fixed, m.p), 2, B)
    model.register_buffer("fixed", torch.randn(B, B))
    x = torch.randn(B, 3, 2)
    exact(model, lambda: per_sample(model(x)))


def test_derived_parameters_and_several_of_them() -> None:
    x = torch.randn(B, 3)
    model = own(lambda m, x: F.bilinear(x, x, m.p.exp(), m.q), 2, 3, 3)
    model.q = nn.Parameter(torch.randn(2))
    exact(model, lambda: per_sample(model(x)))
    scaled = own(lambda m, x: F.linear(x, m.p.clone().mul_(m.share)), 2, 3)
    scaled.register_buffer("share", torch.full((2, 1), 0.5))
    exact(scaled, lambda: per_sample(scaled(x)))


def test_what_single_samples_cannot_run_is_refused() -> None:
    x = torch.randn(B, 3)
    coupled = own(lambda m, x: torch.einsum("bi,ci,i->bc", x, x, m.p), 3)
    refused(coupled, lambda: per_sample(coupled(x)), "no clipping rule for einsum, and cannot run")
    mixed = own(lambda m, x, y: torch.einsum("bi,cd,i->bi", x, y, m.p), 3)
    square = torch.randn(B, B)
    refused(mixed, lambda: per_sample(mixed(x, square)), "einsum gives other values for single")
    changed = own(lambda m, x: x.clone().index_add_(0, torch.zeros(1).long(), m.p[None]), 3)
    refused(changed, lambda: per_sample(changed(x)), "changes a tensor in place by index_add_")


def test_a_log_line_names_the_operator_once(caplog: pytest.LogCaptureFixture) -> None:
    model = own(lambda m, x: torch.einsum("bi,ij->bj", x, m.p), 3, 5)
    with caplog.at_level(logging.INFO, "embattle.clipping"), PerSampleClipper(model, 1) as clipper:
        for _ in range(2):
            clipper.backward(per_sample(model(torch.randn(B, 3))))
    (record,) = caplog.records
    assert "'Apply' (Apply) has no clipping rule for einsum" in record.getMessage()
    assert "(15 numbers a sample)" in record.getMessage()


# --- small rules ----------------------------------------------------------------------------------


def test_dropout_between_recurrent_layers_alone() -> None:
    rnn = nn.GRU(3, 4, num_layers=2, dropout=1.0, batch_first=True)
    x = torch.randn(B, 2, 3)
    assert bool(rnn(x)[0].any())
    exact(rnn, lambda: per_sample(rnn(x)[0]))


def test_a_single_loss_of_a_sparse_table() -> None:
    table = nn.Embedding(9, 3, sparse=True)
    with PerSampleClipper(table, 1.0) as clipper:
        clipper.backward(table(torch.tensor([[2, 2, 5]])).flatten(1).sum(1))
    assert table.weight.grad is not None
    assert table.weight.grad.is_sparse
    assert float(table.weight.grad.to_dense().norm()) == pytest.approx(1.0)


def test_noise_of_bounds_per_layer() -> None:
    model = nn.Sequential(nn.Linear(100, 90), nn.Linear(90, 90, bias=False))
    for bound, most in ((0.5, 0.5 * math.sqrt(3)), ((0.3, 0.4, 1.2), 1.3)):
        generator = torch.Generator().manual_seed(0)
        clipper = PerSampleClipper(
            model, bound, "per_layer", noise_multiplier=2.0, generator=generator
        )
        model.zero_grad()
        with clipper:
            clipper.backward(model(torch.zeros(8, 100)).sum(1) * 0)
        for noise in gradients(model):
            if noise.dim() == 2:
                assert float(noise.std()) == pytest.approx(2.0 * most / 8, rel=0.05)


@pytest.mark.parametrize("name", ["gamma", "noise_multiplier"])
@pytest.mark.parametrize("value", [-1.0, math.inf, math.nan])
def test_options_out_of_range(name: str, value: float) -> None:
    options: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match=f"{name} must be finite and >= 0, got {value}"):
        PerSampleClipper(nn.Linear(2, 2), 1.0, **options)


def test_options_that_are_unknown() -> None:
    for name in ("mode", "reduction", "verify"):
        options: dict[str, Any] = {name: "odd"}
        with pytest.raises(ValueError, match=f"{name} must be one of .*; got 'odd'"):
            PerSampleClipper(nn.Linear(2, 2), 1.0, **options)
