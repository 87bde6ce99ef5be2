"""Clipped gradients under DistributedDataParallel: two ranks give what one process does."""

from __future__ import annotations

from pathlib import Path

import pytest
import ranks
import torch
import torch.distributed as dist
from embattle.clipping import PerSampleClipper
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(9, 3, sparse=True)
        self.out = nn.Linear(3, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.table(ids).tanh()).square().sum((1, 2))


def batch() -> Tensor:
    return torch.randint(9, (6, 4), generator=torch.Generator().manual_seed(1))


def dense(model: nn.Module) -> list[Tensor]:
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [g.to_dense() if g.is_sparse else g for g in grads]


def of_rank(rank: int, where: Path) -> None:
    model = DistributedDataParallel(Model())
    # Ranks hold different numbers of samples.
    own = batch()[:2] if rank == 0 else batch()[2:]
    clipper = PerSampleClipper(model, 0.3)
    with clipper:
        clipper.backward(model(own))
    torch.save(dense(model), f"{where}/mean{rank}.pt")
    model.zero_grad()
    with PerSampleClipper(model, 0.3, reduction="sum") as summing:
        summing.backward(model(own[:1]), last=False)
        summing.backward(model(own[1:]))
    torch.save(dense(model), f"{where}/sum{rank}.pt")


class Talking(Model):
    """Averages over all ranks how often each row is used."""

    usage: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("usage", torch.zeros(9))

    def forward(self, ids: Tensor) -> Tensor:
        used = ids.flatten().bincount(minlength=9).float()
        dist.all_reduce(used)
        self.usage.mul_(0.9).add_(used)
        return super().forward(ids)


def talking(rank: int, where: Path) -> None:
    model, plain = DistributedDataParallel(Talking()), Talking()
    clipper = PerSampleClipper(model, 0.3, verify="always" if rank else "first")
    for step in range(4):
        # A new size on one rank alone.
        ids = batch()[: 3 + step] if rank else batch()
        with clipper:
            clipper.backward(model(ids))
        plain(ids)
    assert torch.equal(model.module.usage, plain.usage)
    with pytest.raises(ValueError, match="static_graph"):
        PerSampleClipper(DistributedDataParallel(Model(), static_graph=True), 0.3)


def test_a_forward_that_talks_to_other_ranks(tmp_path: Path) -> None:
    """It is compared in the first step alone, in which all ranks do so."""
    ranks.run(talking, tmp_path)


def test_two_ranks(tmp_path: Path) -> None:
    ranks.run(of_rank, tmp_path)
    model = Model()
    with PerSampleClipper(model, 0.3) as clipper:
        clipper.backward(model(batch()))
    wanted = dense(model)
    for rank in range(2):
        mean = torch.load(tmp_path / f"mean{rank}.pt", weights_only=True)
        summed = torch.load(tmp_path / f"sum{rank}.pt", weights_only=True)
        for found, total, exact in zip(mean, summed, wanted, strict=True):
            torch.testing.assert_close(found, exact)
            torch.testing.assert_close(total, exact * 6)
