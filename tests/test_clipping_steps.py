"""What a step is given and leaves: options and weights, row selection, batches of several calls."""

from __future__ import annotations

from typing import Any

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
