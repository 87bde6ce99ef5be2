"""What a step is given and leaves: options and weights, row selection, batches of several calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from embattle.clipping import PerSampleClipper, RowSelection
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
