"""PerSampleClipper against its definition: a loop over samples (or users) with plain autograd."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from clipping_cases import (
    CASES,
    SAMPLES,
    Case,
    assert_close,
    clipped_sum,
    float_copy,
    gradients,
    make,
    single_gradients,
)
from embattle import Evaluation
from embattle.clipping import ClipResult, PerSampleClipper
from embattle.clipping.tables import side_by_side
from torch import Tensor
from torch.utils.checkpoint import checkpoint

WEIGHTS = torch.tensor([1.0, 0.0, 0.5, 1.0, 2.0, 1.0], dtype=torch.float64)
USERS = torch.tensor([4, 7, 4, 4, 9, 7])


def clip(case: Case, max_norm: Any, mode: str = "flat", **options: Any) -> ClipResult:
    backward = {k: options.pop(k) for k in ("weights", "users", "scale") if k in options}
    clipper = PerSampleClipper(
        case.model, max_norm, mode, reduction="sum", **case.options, **options
    )
    case.model.zero_grad()
    with clipper:
        return clipper.backward(case.losses(case.batch, SAMPLES), **backward)


def bound(norms: Tensor) -> float:
    """A bound that clips about half."""
    return float(norms.median()) * 0.9 + 1e-6


@pytest.mark.parametrize("name", CASES)
def test_equals_loop_over_samples(name: str) -> None:
    case = make(name)
    singles = single_gradients(case)
    _, norms = clipped_sum(singles, 1.0)
    for options in (
        {"max_norm": bound(norms)},
        {"max_norm": bound(norms), "weights": WEIGHTS},
        {"max_norm": bound(norms) / 2, "mode": "automatic", "weights": WEIGHTS},
        {"max_norm": bound(norms) / 2, "mode": "per_layer"},
        {"max_norm": bound(norms), "users": USERS},
        {"max_norm": bound(norms) / 2, "mode": "per_layer", "users": USERS, "weights": WEIGHTS},
    ):
        wanted, wanted_norms = clipped_sum(singles, **options)
        result = clip(case, **options)
        assert_close(gradients(case.model), wanted, 1e-10)
        assert_close([result.norms], [wanted_norms], 1e-10)


@pytest.mark.parametrize("name", CASES)
def test_float32(name: str) -> None:
    case = make(name)
    singles = single_gradients(case)
    _, norms = clipped_sum(singles, 1.0)
    single = float_copy(case)
    for options in (
        {"max_norm": bound(norms)},
        {"max_norm": bound(norms), "users": USERS},
    ):
        wanted, wanted_norms = clipped_sum(singles, **options)
        result = clip(single, **options)
        assert_close(gradients(single.model), wanted, 1e-5)
        assert_close([result.norms], [wanted_norms], 1e-5)


def test_factors_and_names() -> None:
    case = make("frozen_parts")
    singles = single_gradients(case)
    _, norms = clipped_sum(singles, 1.0)
    result = clip(case, bound(norms))
    assert result.names == ("0.bias", "4.weight")
    assert torch.allclose(result.factors, (bound(norms) / norms).clamp(max=1))


@pytest.mark.parametrize("mode", ["flat", "per_layer"])
def test_bounds_zero_and_infinity(mode: str) -> None:
    case = make("recommender")
    plain = [sum(g) for g in zip(*single_gradients(case), strict=True)]
    clip(case, float("inf"), mode)
    assert_close(gradients(case.model), plain, 1e-10)
    clip(case, 0.0, mode)
    assert all(not g.any() for g in gradients(case.model))


def test_per_layer_bounds() -> None:
    case = make("linear_3d")
    singles = single_gradients(case)
    wanted, _ = clipped_sum(singles, [0.1, 1.0, 5.0], "per_layer")
    clip(case, [0.1, 1.0, 5.0], "per_layer")
    assert_close(gradients(case.model), wanted, 1e-10)
    with pytest.raises(ValueError, match="2 numbers for 3"):
        clip(case, [0.1, 1.0], "per_layer")


def test_mean_scale_and_accumulation() -> None:
    case = make("recommender")
    singles = single_gradients(case)
    wanted, _ = clipped_sum(singles, 1.0)
    clipper = PerSampleClipper(case.model, 1.0)
    case.model.zero_grad()
    with clipper:
        for rows in ([0, 1, 2], [3, 4, 5]):
            clipper.backward(case.losses(case.part(rows), 3), scale=0.5)
    assert_close(gradients(case.model), [w / SAMPLES for w in wanted], 1e-10)
    case.model.zero_grad()
    clipper = PerSampleClipper(case.model, 1.0, expected_batch_size=20)
    with clipper:
        clipper.backward(case.losses(case.batch, SAMPLES))
    assert_close(gradients(case.model), [w / 20 for w in wanted], 1e-10)


@pytest.mark.parametrize("name", CASES)
def test_accumulation_and_checkpointing(name: str) -> None:
    """A batch in two parts, the second one recomputed in its backward pass."""
    case = make(name)
    singles = single_gradients(case)
    _, norms = clipped_sum(singles, 1.0)
    wanted, _ = clipped_sum(singles, bound(norms))
    clipper = PerSampleClipper(case.model, bound(norms), reduction="sum", **case.options)
    case.model.zero_grad()
    with clipper:
        first = clipper.backward(case.losses(case.part([0, 1]), 2))
        again = partial(checkpoint, case.model, use_reentrant=False)
        second = clipper.backward(case.losses(case.part([2, 3, 4, 5]), 4, again))
    assert_close(gradients(case.model), wanted, 1e-10)
    assert_close([torch.cat([first.norms, second.norms])], [norms], 1e-10)


@pytest.mark.parametrize(
    "name",
    ["recommender", "conv2d", "tied_head", "positions_parameter"],
)
def test_compiled(name: str) -> None:
    case = make(name)
    singles = single_gradients(case)
    _, norms = clipped_sum(singles, 1.0)
    wanted, _ = clipped_sum(singles, bound(norms))
    torch._dynamo.reset()
    compiled: Any = torch.compile(case.model, backend="aot_eager")
    compiled(*case.batch)
    case.model.zero_grad()
    with PerSampleClipper(compiled, bound(norms), reduction="sum", **case.options) as clipper:
        result = clipper.backward(case.losses(case.batch, SAMPLES, compiled))
    assert_close(gradients(case.model), wanted, 1e-10)
    assert_close([result.norms], [norms], 1e-10)


def test_weights_from_losses() -> None:
    case = make("recommender")
    losses = case.losses(case.batch, SAMPLES).detach()
    limit = losses.median()
    wanted, _ = clipped_sum(single_gradients(case), 1.0, weights=(losses <= limit).double())
    clipper = PerSampleClipper(
        case.model, 1.0, weights=lambda x: (x <= limit).double(), reduction="sum"
    )
    case.model.zero_grad()
    with clipper:
        clipper.backward(case.losses(case.batch, SAMPLES))
    assert_close(gradients(case.model), wanted, 1e-10)


def test_one_user_with_many_rows_gains_nothing() -> None:
    case = make("linear")
    case.batch[0][1:] = case.batch[0][0]
    clip(case, 0.5, users=torch.zeros(SAMPLES, dtype=torch.long))
    total = torch.stack([g.norm() for g in gradients(case.model)]).norm()
    assert float(total) == pytest.approx(0.5)


def test_model_is_left_as_it_was() -> None:
    case = make("transformer_layer")
    before = {n: dict(vars(m)) for n, m in case.model.named_modules()}
    clip(case, 1.0)
    assert {n: dict(vars(m)) for n, m in case.model.named_modules()} == before
    assert not any(p._backward_hooks for p in case.model.parameters())
    case.model.zero_grad()
    case.losses(case.batch, SAMPLES).sum().backward()
    plain = [sum(g) for g in zip(*single_gradients(case), strict=True)]
    assert_close(gradients(case.model), plain, 1e-10)


def test_parts_of_one_tensor_are_joined_without_a_copy() -> None:
    cpu = torch.device("cpu")  # memory addresses
    whole = torch.randn(5, 4, 3, device=cpu)
    rows = whole.flatten(1)

    def parts(x: Tensor, *columns: int) -> list[Tensor]:
        return [x[:, first : first + 3].unsqueeze(1) for first in columns]

    for grads, same in (
        ([whole[:, :1], whole[:, 1:4]], True),
        ([whole[:, 1:2], whole[:, 2:4]], True),
        (parts(rows, 0, 3, 6), True),
        ([rows.unsqueeze(1)[..., :3], rows.unsqueeze(1)[..., 3:6]], True),
        (parts(rows, 3, 0), False),
        (parts(rows, 0, 6), False),
        ([*parts(rows, 0), torch.randn(5, 2, 3, device=cpu)], False),
        ([torch.ones((), device=cpu).expand(5, 1, 3)] * 2, False),
        ([whole[:, :1].mT.contiguous().mT, whole[:, 1:3]], False),
    ):
        joined = side_by_side(grads)
        assert torch.equal(joined, torch.cat(grads, 1))
        assert (joined.data_ptr() == grads[0].data_ptr()) == same


def test_an_evaluation_holds_the_losses() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2).double()
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.randint(0, 2, (4,))
    clipper = PerSampleClipper(model, max_norm=0.1)
    grads = []
    for held in (True, False):
        model.zero_grad()
        with clipper:
            logits = model(x)
            losses = torch.nn.functional.cross_entropy(logits, y, reduction="none")
            clipper.backward(Evaluation(losses, logits) if held else losses)
        grads.append(model.weight.grad.clone())
    assert torch.equal(*grads)
    with clipper, pytest.raises(ValueError, match=r"holds no losses \[B\]"):
        clipper.backward(Evaluation(outputs=model(x)))
