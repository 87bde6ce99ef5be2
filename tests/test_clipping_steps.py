"""What a step is given and leaves: options and weights, row selection, batches of several calls."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from clipping_cases import assert_close, gradients
from embattle.clipping import PerSampleClipper, RowSelection, parallel
from torch import nn

B = 4


@pytest.mark.parametrize("users", [None, [0, 0, 1, 2]])
def test_samples_of_weight_zero_have_no_say_in_which_rows_are_selected(users: Any) -> None:
    table = nn.Embedding(20, 3, sparse=True)
    clipper = PerSampleClipper(
        table,
        1.0,
        noise_multiplier=1.0,
        row_selection=RowSelection(threshold=0.3, noise_multiplier=0.01),
        generator=torch.Generator().manual_seed(0),
    )
    with clipper:
        clipper.backward(
            table(torch.tensor([7, 9, 3, 5])).sum(1),
            weights=torch.tensor([1.0, 0.0, 0.0, -1.0]),
            users=None if users is None else torch.tensor(users),
        )
    assert table.weight.grad is not None
    assert table.weight.grad.coalesce().indices()[0].tolist() == [5, 7]


@pytest.mark.parametrize("grouped", [True, False])
def test_a_step_that_is_given_up_leaves_nothing_to_the_next(
    grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "total", lambda count, *_: count)
    monkeypatch.setattr(parallel, "reduce_gradients", lambda grads, *_: grads)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda _: 0)
    model, x = nn.Linear(3, 2), torch.randn(B, 3)
    found = []
    for given_up in (True, False):
        clipper = PerSampleClipper(
            model,
            1.0,
            noise_multiplier=0.5,
            generator=torch.Generator().manual_seed(0),
            process_group="all" if grouped else None,
        )
        if given_up:
            with clipper:
                clipper.backward(model(x[:1]).square().sum(1), last=False)
            clipper.discard()
        model.zero_grad()
        with clipper:
            clipper.backward(model(x).square().sum(1))
        found.append(gradients(model))
    assert_close(*found, 0.0)


def test_numbers_of_python_numpy_and_torch() -> None:
    model, x = nn.Linear(3, 2), torch.randn(B, 3)
    ones: list[Any] = [0.5, np.float32(0.5), np.array(0.5), torch.tensor(0.5)]
    many: list[Any] = [[0.5, 1.0], np.array([0.5, 1.0]), torch.tensor([0.5, 1.0])]
    users: list[Any] = [torch.tensor([1, 1, 2, 3]), [1, 1, 2, 3], np.array([1, 1, 2, 3])]
    given = [1.0, 0.5, 0.0, 1.0]
    weights: list[Any] = [torch.tensor(given), given, lambda _: given]
    for mode, bounds in (("flat", ones), ("per_layer", ones), ("per_layer", many)):
        found = []
        for i, bound in enumerate(bounds):
            model.zero_grad()
            options: dict[str, Any] = {"users": users[i % 3], "weights": weights[i % 3]}
            with PerSampleClipper(model, bound, mode, gamma=ones[i]) as clipper:
                clipper.backward(model(x).square().sum(1), scale=ones[i], **options)
            found.append(gradients(model))
        for other in found[1:]:
            assert_close(found[0], other, 0.0)


@pytest.mark.parametrize("name", ["max_norm", "gamma", "noise_multiplier", "expected_batch_size"])
@pytest.mark.parametrize("value", ["1", {"weight": 1.0}, True])
def test_options_that_are_no_numbers(name: str, value: Any) -> None:
    options: dict[str, Any] = {"max_norm": 1.0, name: value}
    with pytest.raises(TypeError, match=f"{name} must be a number, got"):
        PerSampleClipper(nn.Linear(3, 2), **options)


def test_arguments_of_backward_that_are_no_numbers() -> None:
    model, x = nn.Linear(3, 2), torch.randn(B, 3)
    clipper = PerSampleClipper(model, 1.0)
    wrong: list[tuple[str, Any, type[Exception], str]] = [
        ("weights", ["a"] * B, TypeError, "weights must be numbers, one for each of the 4 losses"),
        ("weights", 0.5, ValueError, "weights must have the losses' shape"),
        ("weights", [1.0, math.nan, 1.0, 1.0], ValueError, "weights must be finite, got nan"),
        ("users", ["a"] * B, TypeError, "users must be numbers, one for each"),
        ("users", [0.5] * B, ValueError, "users must be 4 integers"),
        ("scale", "1", TypeError, "scale must be a number"),
        ("scale", math.nan, ValueError, "scale must be finite"),
        ("max_norm", [1.0], ValueError, "max_norm must be one number for mode 'flat'"),
    ]
    with clipper:
        losses = model(x).square().sum(1)
        for name, value, kind, words in wrong:
            options: dict[str, Any] = {name: value}
            with pytest.raises(kind, match=words):
                clipper.backward(losses, **options)
        with pytest.raises(TypeError, match="losses must be a tensor"):
            clipper.backward(list(losses))  # type: ignore[arg-type]
    assert model.weight.grad is None


def test_a_weight_that_is_not_finite_goes_with_its_sample() -> None:
    model, x = nn.Linear(3, 2), torch.randn(B, 3)
    x[1] = math.inf
    found = []
    for weights in (lambda losses: losses / losses, None):
        model.zero_grad()
        with PerSampleClipper(model, 1.0, weights=weights) as clipper:
            clipper.backward(model(x).square().sum(1))
        found.append(gradients(model))
    assert_close(*found, 0.0)
    assert all(bool(g.isfinite().all()) for g in found[0])


def test_weights_on_a_device_are_not_waited_for() -> None:
    model, x, weights = nn.Linear(3, 2), torch.randn(B, 3), torch.tensor([1, math.nan, 1, 1])
    with PerSampleClipper(model, 1.0, weights=weights) as clipper:
        losses = model(x).square().sum(1)
        if weights.is_cpu:
            with pytest.raises(ValueError, match="weights must be finite, got nan"):
                clipper.backward(losses)
        else:
            assert bool(clipper.backward(losses).norms.isfinite().all())


def test_noise_for_a_bound_that_is_infinite_is_refused() -> None:
    model, x = nn.Linear(3, 2), torch.randn(B, 3)
    words = "with noise, max_norm must be finite"
    with pytest.raises(ValueError, match=words):
        PerSampleClipper(model, math.inf, noise_multiplier=1.0)
    with PerSampleClipper(model, 1.0, noise_multiplier=1.0) as clipper:
        losses = model(x).square().sum(1)
        with pytest.raises(ValueError, match=words):
            clipper.backward(losses, max_norm=math.inf)


def test_losses_in_half_precision() -> None:
    model, x = nn.Linear(3, 2), torch.randn(B, 3)
    with PerSampleClipper(model, 1.0, verify="always") as clipper:
        half = clipper.backward(model(x).square().sum(1).bfloat16())
        whole = clipper.backward(model(x).square().sum(1))
    assert_close([half.norms], [whole.norms], 2e-2)


def test_names_and_dims() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(3, 2), "ab": nn.Linear(3, 2)})
    PerSampleClipper(model, 1.0, broadcast="ab", batch_dim={"ab": np.int64(1)})
    with pytest.raises(ValueError, match="no module named 'ba'"):
        PerSampleClipper(model, 1.0, broadcast="ba")
    with pytest.raises(ValueError, match="batch_dim must be at least 0, got -1"):
        PerSampleClipper(model, 1.0, batch_dim=-1)
