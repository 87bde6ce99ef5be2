"""Summing gradients over ranks, which are threads here."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from embattle.clipping import parallel
from torch import Tensor

RANKS = 2


class Threads:
    """The part of torch.distributed that is used, among threads; counts the calls of each kind."""

    ReduceOp = SimpleNamespace(MAX="max", SUM="sum")

    def __init__(self) -> None:
        self.rank = threading.local()
        self.barrier = threading.Barrier(RANKS, timeout=20)
        self.given: list[Tensor] = [torch.zeros(0)] * RANKS
        self.reductions: list[int] = []

    def _all(self, x: Tensor) -> list[Tensor]:
        self.given[self.rank.number] = x.clone()
        self.barrier.wait()
        found = [each.clone() for each in self.given]
        self.barrier.wait()
        assert len({each.shape for each in found}) == 1
        return found

    def get_world_size(self, group: Any) -> int:
        return RANKS

    def all_reduce(self, x: Tensor, op: str = "sum", group: Any = None) -> None:
        found = torch.stack(self._all(x))
        x.copy_(found.amax(0) if op == "max" else found.sum(0))
        if self.rank.number == 0 and op == "sum":
            self.reductions.append(x.numel())

    def all_gather(self, out: list[Tensor], x: Tensor, group: Any = None) -> None:
        for each, found in zip(out, self._all(x), strict=True):
            each.copy_(found)

    def run(self, function: Callable[[int], Any]) -> list[Any]:
        """What function gives on each rank."""
        results: list[Any] = [None] * RANKS

        def work(number: int) -> None:
            self.rank.number = number
            try:
                results[number] = function(number)
            except BaseException as error:
                results[number] = error
                self.barrier.abort()

        threads = [threading.Thread(target=work, args=(number,)) for number in range(RANKS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return results


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Threads:
    found = Threads()
    monkeypatch.setattr(parallel, "dist", found)
    return found


def rows(indices: list[int], *values: float) -> Tensor:
    place, value = torch.tensor([indices]), torch.tensor(values)[:, None]
    return torch.sparse_coo_tensor(place, value, (5, 1), check_invariants=True)


def test_gradients_of_all_kinds(ranks: Threads) -> None:
    likes = [torch.zeros(2, 3), torch.zeros(4), torch.zeros(2), *[torch.zeros(5, 1)] * 4]
    given: list[list[Tensor | None]] = [
        [torch.ones(2, 3), None, None, rows([1, 1], 1, 2), None, rows([4], 3), None],
        [torch.full((2, 3), 2.0), torch.arange(4.0), None, rows([3, 1, 0], 5, 6, 7), rows([2], 8),
         torch.ones(5, 1), None],
    ]  # fmt: skip
    for found in ranks.run(lambda rank: parallel.reduce_gradients(given[rank], likes, None)):
        assert torch.equal(found[0], torch.full((2, 3), 3.0))
        assert torch.equal(found[1], torch.arange(4.0))
        assert found[2] is None
        assert found[6] is None
        for place, wanted in ((3, [7, 9, 0, 5, 0]), (4, [0, 0, 8, 0, 0])):
            assert found[place].is_sparse
            assert found[place].to_dense().flatten().tolist() == wanted
        assert not found[5].is_sparse
        assert found[5].flatten().tolist() == [1, 1, 1, 1, 4]


def test_gradients_travel_in_buckets(ranks: Threads, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "_BUCKET", 7)
    double = torch.float64
    likes = [torch.zeros(3), torch.zeros(2, 2), torch.zeros(1), torch.zeros(1, dtype=double)]
    found = ranks.run(
        lambda rank: parallel.reduce_gradients([p + rank + 1 for p in likes], likes, None)
    )
    for each in found:
        assert [g.shape for g in each] == [p.shape for p in likes]
        assert [g.dtype for g in each] == [p.dtype for p in likes]
        assert all(bool((g == 3).all()) for g in each)
    assert ranks.reductions == [7, 1, 1]


def test_a_total(ranks: Threads) -> None:
    cpu = torch.device("cpu")
    assert ranks.run(lambda rank: parallel.total(rank + 2, cpu, None)) == [5, 5]
