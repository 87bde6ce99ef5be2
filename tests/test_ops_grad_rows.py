"""Sums of a table's gradient by row, of the rows that occur alone, and on any number of threads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from compare import raw_calls
from embattle import ops
from embattle.ops.embedding import embedding_grad_rows
from samples import DTYPES
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode


class Batch(NamedTuple):
    """Indices into a table, and what the rest is made of."""

    shape: tuple[int, ...]
    rows: int
    dim: int
    drawn: int | None = None  # how many of the rows occur
    hot: float = 0.0  # the share of indices that are one row
    weights: torch.dtype | None = None
    padding: int | None = None

    def make(self, dtype: torch.dtype) -> tuple[list[Any], dict[str, Any]]:
        """The arguments and keywords of both ops."""
        g = torch.Generator().manual_seed(sum(self.shape) + self.dim)
        drawn = self.rows if self.drawn is None else self.drawn
        indices = torch.randint(0, drawn, self.shape, generator=g)
        indices[torch.rand(self.shape, generator=g) < self.hot] = drawn // 2
        grad = torch.randn(*self.shape, self.dim, generator=g, dtype=torch.float64).to(dtype)
        options: dict[str, Any] = {"padding_idx": self.padding}
        if self.weights is not None:
            options["weights"] = torch.randn(self.shape[0], generator=g).to(self.weights)
        return [indices, grad, self.rows], options


F32 = torch.float32
BATCHES = {
    "nothing": Batch((0, 3), 5, 4, weights=F32),
    "no-tokens": Batch((3, 0), 5, 4, weights=F32),
    "no-width": Batch((3, 4), 5, 0, weights=F32),
    "one": Batch((1, 1), 5, 13, weights=F32),
    "few": Batch((4, 12), 9, 16, weights=torch.float64),
    "few-apart": Batch((47,), 10_000, 13),
    "few-and-padding": Batch((6, 8), 5, 64, padding=3, weights=F32),
    "just-more": Batch((7, 7), 6, 100, padding=0, weights=torch.bfloat16),
    "just-more-padded": Batch((49,), 2, 7, padding=1),
    "one-row": Batch((30, 9), 1, 16, weights=F32),
    "all-padding": Batch((30, 9), 1, 16, padding=0, weights=F32),
    "hot": Batch((60, 20), 500, 48, hot=0.6, weights=F32),
    "hot-padding": Batch((60, 20), 500, 48, hot=0.6, padding=250, weights=torch.float16),
    "distinct": Batch((40, 10), 1 << 20, 300, weights=F32),
    "digits": Batch((40, 40), 1025, 3, weights=F32),
    "untouched": Batch((9, 8, 7), 4000, 32, drawn=90, weights=F32, padding=3999),
    "one-column": Batch((3000,), 800, 1, hot=0.3),
    "large": Batch((900, 20), 6000, 64, hot=0.4, weights=F32, padding=1),
    "large-plain": Batch((18_000,), 6000, 33, hot=0.4),
}


def bits(t: Tensor) -> Tensor:
    """What the tensor has in memory, where zeros have signs."""
    return t.contiguous().view(torch.uint8) if t.numel() else t


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", BATCHES)
def test_rows_that_occur_have_the_sums_of_the_whole_table(
    name: str, dtype: torch.dtype, count: int
) -> None:
    torch.set_num_threads(count)
    args, options = BATCHES[name].make(dtype)
    table = ops.embedding_grad_sum(*args, **options)
    found, sums = embedding_grad_rows(*args, **options)
    occur = args[0].unique()
    if options["padding_idx"] is not None:
        occur = occur[occur != options["padding_idx"]]
    assert found.dtype == torch.int64
    assert torch.equal(found, occur)
    assert sums.dtype == dtype
    assert sums.shape == (len(found), args[1].shape[-1])
    assert torch.equal(bits(sums), bits(table[found]))
    table[found] = 0
    assert not bits(table).any(), "the others are zero"


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", BATCHES)
def test_sums_are_the_same_bits_for_any_number_of_threads(name: str, dtype: torch.dtype) -> None:
    args, options = BATCHES[name].make(dtype)
    results = []
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        table = ops.embedding_grad_sum(*args, **options)
        results.append((table, *embedding_grad_rows(*args, **options)))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert a.shape == b.shape
            assert torch.equal(bits(a), bits(b))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("rows", [1 << 11, (1 << 20) + 7, 1 << 31, (1 << 33) - 1, 1 << 40])
@pytest.mark.parametrize("shape", [(5, 3), (8, 6), (7, 7), (40, 30)])
def test_tables_far_beyond_memory(shape: tuple[int, int], rows: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(shape[0])
    few = torch.randint(0, rows, (shape[0],), generator=g)
    few[:4] = torch.tensor([0, rows - 1, rows // 2, 1])
    indices = few[torch.randint(0, len(few), shape, generator=g)]
    grad = torch.randn(*shape, 37, generator=g, dtype=torch.float64).to(dtype)
    weights = torch.randn(shape[0], generator=g)
    for padding in (None, rows - 1):
        wanted: dict[int, Tensor] = {}
        for b, sample in enumerate(indices.tolist()):
            for t, row in enumerate(sample):
                if row != padding:
                    before = wanted.get(row, torch.zeros(37, dtype=torch.float64))
                    wanted[row] = before + weights[b].double() * grad[b, t].double()
        found, sums = embedding_grad_rows(indices, grad, rows, weights=weights, padding_idx=padding)
        assert found.tolist() == sorted(wanted)
        # Summed in this order, and rounded once.
        assert torch.equal(sums, torch.stack([wanted[row] for row in sorted(wanted)]).to(dtype))


def test_indices_and_rows_that_share_no_64_bits_are_refused() -> None:
    indices = torch.tensor([(1 << 62) - 1, 0, 5])
    with pytest.raises(ValueError, match="3 indices into 4611686018427387904 rows"):
        embedding_grad_rows(indices, torch.ones(3, 2), 1 << 62)
    found, sums = embedding_grad_rows(indices[:1], torch.ones(1, 2), 1 << 62)
    assert found.tolist() == [(1 << 62) - 1]
    assert torch.equal(sums, torch.ones(1, 2))


def test_wrong_arguments_are_named() -> None:
    indices, grad = torch.tensor([[0, 2], [2, 1]]), torch.ones(2, 2, 3)
    for said, options in (
        ("indices .* 2 at position 1", {"rows": 2}),
        ("padding_idx .* got 3", {"rows": 3, "padding_idx": 3}),
        ("padding_idx .* got -1", {"rows": 3, "padding_idx": -1}),
        ("weights .* got \\[3\\]", {"rows": 3, "weights": torch.ones(3)}),
    ):
        with pytest.raises(ValueError, match=f"^embattle.embedding_grad_rows: .*{said}"):
            embedding_grad_rows(indices, grad, **options)


def test_layouts_and_short_indices() -> None:
    args, options = BATCHES["few-and-padding"].make(F32)
    wanted = embedding_grad_rows(*args, **options)
    indices, grad, rows = args
    spread = torch.stack([options["weights"]] * 2, 1)[:, 0]
    far = grad.transpose(0, 2).contiguous().transpose(0, 2)
    for found in (
        embedding_grad_rows(indices.int(), grad, rows, **options),
        embedding_grad_rows(indices.T.contiguous().T, far, rows, **{**options, "weights": spread}),
    ):
        for a, b in zip(found, wanted, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["nothing", "few", "few-and-padding", "hot", "one-column"])
def test_opcheck_and_fake_tensors(name: str) -> None:
    args, options = BATCHES[name].make(F32)
    for overload, given, keywords in raw_calls(lambda: embedding_grad_rows(*args, **options)):
        torch.library.opcheck(overload, given, keywords)
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        fake = [mode.from_tensor(t) if isinstance(t, Tensor) else t for t in args]
        keywords = {
            k: mode.from_tensor(t) if isinstance(t, Tensor) else t for k, t in options.items()
        }
        found, sums = embedding_grad_rows(*fake, **keywords)
        table = ops.embedding_grad_sum(*fake, **keywords)
    assert (found.dtype, sums.dtype) == (torch.int64, F32)
    assert found.dim() == 1
    assert isinstance(found.shape[0], torch.SymInt)
    assert sums.shape[0] == found.shape[0]
    assert sums.shape[1] == args[1].shape[-1]
    assert table.shape == (args[2], args[1].shape[-1])


def test_a_padding_row_is_zero_beside_weights_that_are_not_finite() -> None:
    indices, grad = torch.tensor([[0, 1], [1, 0]]), torch.ones(2, 2, 3)
    weights = torch.tensor([torch.inf, 1.0])

    def sums(indices: Tensor, grad: Tensor) -> Tensor:
        return ops.embedding_grad_sum(indices, grad, 2, weights=weights, padding_idx=0)

    for table in (
        sums(indices, grad),
        torch.func.vmap(sums)(indices[None], grad[None])[0],
        torch.func.vmap(sums)(indices[None], grad[None].fill_(torch.nan))[0],
    ):
        assert not table[0].any()
        assert not table[1].isfinite().any()
