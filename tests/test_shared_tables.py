"""Tables of a recommender that samples share: what forms and attacks do with their rows."""

from __future__ import annotations

from collections.abc import Callable

import embattle as eb
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Pairs(nn.Module):
    """Inner products of two tables."""

    def __init__(self, *, sparse: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.user = nn.Embedding(7, 4, sparse=sparse, dtype=torch.float64)
        self.item = nn.Embedding(9, 4, sparse=sparse, dtype=torch.float64)

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        return (self.user(users) * self.item(items)).sum(-1)


def losses(model: Pairs, seed: int = 1) -> Callable[[], Tensor]:
    """The BPR losses of a batch that has some of the rows."""
    generator = torch.Generator().manual_seed(seed)
    users, one, two = (torch.randint(0, 6, (8,), generator=generator) for _ in range(3))
    return lambda: F.softplus(model(users, two) - model(users, one))


def grads(model: Pairs) -> list[Tensor]:
    return [p.grad.to_dense() for p in (model.user.weight, model.item.weight)]


@pytest.mark.parametrize("form", ["mixed", "adversarial", "free", "freeat"])
@pytest.mark.parametrize("random", [False, True])
def test_weights_that_are_looked_up_with_sparse_gradients(form: str, random: bool) -> None:
    found = []
    for sparse in (False, True):
        model = Pairs(sparse=sparse)
        attack = eb.PGD(
            eps=0.5, step_size=0.3, steps=2, random_start=random,
            generator=torch.Generator().manual_seed(2),
        )  # fmt: skip
        sites = [eb.Site.weight(model.user), eb.Site.weight(model.item)]
        result = attack.run(losses(model), sites)
        objective = eb.AdversarialObjective(attack, sites, form=form)
        loss, _ = objective(losses(model))
        loss.backward()
        assert model.user.weight.grad.is_sparse == sparse
        found.append([*result.deltas, loss.detach(), *grads(model)])
    for plain, other in zip(*found, strict=True):
        torch.testing.assert_close(other, plain)
