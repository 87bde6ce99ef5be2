"""Certified category swaps: the worst margins beside all rows that there are."""

from __future__ import annotations

import itertools

import pytest
import torch
from embattle.certify import swap_bounds, worst_swaps
from embattle.models import FM, DeepFM
from torch import Tensor


def made(seed: int, sizes: list[int], dim: int) -> FM:
    generator = torch.Generator().manual_seed(seed)
    model = FM(sizes, dim=dim).double()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator))
    return model


def logits_of_all(model: FM, sizes: list[int]) -> tuple[Tensor, Tensor]:
    every = torch.tensor(list(itertools.product(*map(range, sizes))))
    with torch.no_grad():
        return every, model(every)


@pytest.mark.parametrize("fields", [None, [0, 2, 3]])
@pytest.mark.parametrize("k", [1, 2, 3, 9])
@pytest.mark.parametrize("dim", [0, 1, 4])
def test_the_worst_of_all_rows_is_found(dim: int, k: int, fields: list[int] | None) -> None:
    sizes = [2, 4, 3, 5]
    for seed in range(4):
        model = made(seed, sizes, dim)
        every, logits = logits_of_all(model, sizes)
        rows = every[[3, 50, 77, 119]]
        labels = torch.tensor([0, 1, 1, 0])
        found = worst_swaps(model, rows, labels, k, fields=fields)
        bounds = swap_bounds(model, rows, labels, k, fields=fields)
        hurried = worst_swaps(model, rows, labels, k, fields=fields, nodes=1)
        assert bool(found.exact.all())
        for i in range(4):
            changed = every != rows[i]
            near = changed.sum(1) <= k
            if fields is not None:
                near &= ~changed[:, 1]
            sign = 2 * int(labels[i]) - 1
            wanted = float((sign * logits[near]).min())
            assert float(found.margins[i]) == pytest.approx(wanted, abs=1e-9)
            assert float(found.margins[i]) <= wanted
            shown = float(sign * model(found.values[i][None]).detach())
            assert shown == pytest.approx(wanted, abs=1e-9)
            assert int((found.values[i] != rows[i]).sum()) <= k
            assert float(bounds[i]) <= wanted
            assert float(hurried.margins[i]) <= wanted
            if k == 1 or dim == 0:
                assert float(bounds[i]) == pytest.approx(wanted, abs=1e-9)


def test_a_search_that_stops_early_says_so() -> None:
    sizes = [6] * 8
    model = made(0, sizes, 8)
    rows = torch.zeros(1, 8, dtype=torch.int64)
    whole = worst_swaps(model, rows, torch.tensor([1]), 4, nodes=10**6)
    early = worst_swaps(model, rows, torch.tensor([1]), 4, nodes=2)
    assert bool(whole.exact)
    assert not bool(early.exact)
    assert float(early.margins) < float(whole.margins)
    assert float(early.margins) >= float(swap_bounds(model, rows, torch.tensor([1]), 4)) - 1e-9


def test_an_fm_is_a_deepfm_without_its_perceptron() -> None:
    model = made(1, [3, 4, 2], 5)
    deep = DeepFM([3, 4, 2], dim=5, hidden=[2]).double()
    deep.load_state_dict(model.state_dict(), strict=False)
    for weight in deep.deep.parameters():
        torch.nn.init.zeros_(weight)
    rows = torch.tensor([[0, 3, 1], [2, 0, 0]])
    assert torch.allclose(model(rows), deep(rows))
    linear = made(2, [3, 4, 2], 0)
    wanted = linear.bias + linear.first.weight[torch.tensor([[0, 6, 8], [2, 3, 7]])].sum((1, 2))
    assert torch.allclose(linear(rows), wanted)


def test_what_is_wrong_is_said() -> None:
    model, row, label = made(0, [2, 3], 2), torch.tensor([[0, 2]]), torch.tensor([1])
    with pytest.raises(ValueError, match="only of an FM is the worst known, got a DeepFM"):
        worst_swaps(DeepFM([2, 3]), row, label, 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        worst_swaps(model, row, label, 0)
    with pytest.raises(ValueError, match="a value is not among its field's"):
        worst_swaps(model, row + 1, label, 1)
    with pytest.raises(ValueError, match="labels must be 0 or 1"):
        swap_bounds(model, row, torch.tensor([2]), 1)
    with pytest.raises(ValueError, match=r"different numbers in \[0, 2\), got \[0, 2\]"):
        swap_bounds(model, row, label, 1, fields=[0, 2])
    with pytest.raises(ValueError, match="one or more different numbers"):
        swap_bounds(model, row, label, 1, fields=[])
