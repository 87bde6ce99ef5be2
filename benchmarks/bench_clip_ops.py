"""The ops on per-sample gradients and embedding tables against the memory that they have to move.

    make bench BENCH="benchmarks/bench_clip_ops.py"

As in bench_group_ops, the candidates of a case take turns and ratios are of medians. The floor is a
sum (of ops that only read) or a copy (of ops that also write) of as many bytes as the op has to
move at least. Beside the op: plain torch, the same compiled, and the sequence of ops that
per-sample clipping libraries use.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import embattle.ops as ops
import peers
import pytest
import torch
from bench_group_ops import COMPILE, Run, medians
from torch import Tensor


class Case(NamedTuple):
    """An op at one size; `make` gives the tensors, the ops take them."""

    name: str
    size: str
    dtype: torch.dtype
    floor: Literal["read", "copy"]
    bar: float | None
    make: Callable[[torch.dtype], tuple[Any, int]]  # arguments, compulsory bytes
    op: Callable[..., Any]
    plain: Callable[..., Any] | None = None
    peers: Callable[..., Any] | None = None
    compiled: bool = True


def _randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


def _bytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# ---- Clipped sums and norms of materialised per-sample gradients ----


def _gradient(*shape: int) -> Callable[[torch.dtype], tuple[Any, int]]:
    def make(dtype: torch.dtype) -> tuple[Any, int]:
        grad = _randn(*shape, dtype=dtype)
        return (grad,), _bytes(grad, grad[0])

    return make


def _clip_plain(grad: Tensor) -> tuple[Tensor, Tensor]:
    norms = grad.norm(2, dim=1)
    factors = (30.0 / (norms + 1e-6)).clamp(max=1)
    return (grad * factors.unsqueeze(1)).sum(0), norms


def _many(count: int, batch: int, width: int) -> Callable[[torch.dtype], tuple[Any, int]]:
    def make(dtype: torch.dtype) -> tuple[Any, int]:
        grads = [_randn(batch, width, dtype=dtype) for _ in range(count)]
        return (grads,), _bytes(*grads)

    return make


# ---- Norms without the gradient ----


def _tokens(batch: int, tokens: int, dim: int) -> Callable[[torch.dtype], tuple[Any, int]]:
    def make(dtype: torch.dtype) -> tuple[Any, int]:
        ids = torch.randint(0, 10_000, (batch, tokens))
        grad = _randn(batch, tokens, dim, dtype=dtype)
        return (ids, grad), _bytes(ids, grad)

    return make


def _embedding_plain(ids: Tensor, grad: Tensor) -> Tensor:
    same = ids.unsqueeze(2) == ids.unsqueeze(1)
    return ((grad @ grad.mT) * same).sum((1, 2)).clamp(min=0).sqrt()


def _linear(*shape: int, inputs: int, outputs: int) -> Callable[[torch.dtype], tuple[Any, int]]:
    def make(dtype: torch.dtype) -> tuple[Any, int]:
        pair = _randn(*shape, inputs, dtype=dtype), _randn(*shape, outputs, dtype=dtype)
        return pair, _bytes(*pair)

    return make


def _linear_plain(input: Tensor, grad: Tensor) -> Tensor:
    if input.dim() == 2:
        return input.norm(2, dim=1) * grad.norm(2, dim=1)
    return (grad.mT @ input).flatten(1).norm(2, dim=1)


def _linear_peers(input: Tensor, grad: Tensor) -> Tensor:
    if input.dim() == 2:
        squares = torch.einsum("n...i,n...i->n", input, input)
        return (torch.einsum("n...i,n...i->n", grad, grad) * squares).sqrt()
    left, right = grad @ grad.mT, input @ input.mT
    return (left * right).sum((1, 2)).clamp(min=0).sqrt()


# ---- Tables ----


def _rows(batch: int, tokens: int, dim: int) -> Callable[[torch.dtype], tuple[Any, int]]:
    def make(dtype: torch.dtype) -> tuple[Any, int]:
        ids = torch.randint(0, 100_000, (batch, tokens))
        distinct, inverse = torch.unique(ids, return_inverse=True)
        weight = _randn(100_000, dim, dtype=dtype)
        delta = _randn(len(distinct), dim, dtype=dtype)
        out = ids.numel() * dim * weight.element_size()
        return (weight, ids, delta, inverse), 2 * _bytes(delta) + out + 2 * _bytes(ids)

    return make


def _step(count: int, dim: int) -> Callable[[torch.dtype], tuple[Any, int]]:
    def make(dtype: torch.dtype) -> tuple[Any, int]:
        ids = torch.randint(0, 100_000, (count,))
        touched = len(torch.unique(ids))
        weight, grad = _randn(100_000, dim, dtype=dtype), _randn(count, dim, dtype=dtype)
        size = _bytes(ids, grad) + 2 * touched * (dim * weight.element_size() + 4)
        return (weight, torch.zeros(100_000), ids, grad), size

    return make


def _weighted(
    batch: int, tokens: int, dim: int, rows: int
) -> Callable[[torch.dtype], tuple[Any, int]]:
    def make(dtype: torch.dtype) -> tuple[Any, int]:
        ids = torch.randint(0, rows, (batch, tokens))
        grad, weights = _randn(batch, tokens, dim, dtype=dtype), torch.rand(batch)
        return (ids, grad, rows, weights), _bytes(ids, grad) + rows * dim * grad.element_size()

    return make


F32, HALF = torch.float32, (torch.bfloat16, torch.float16)


def _cases() -> list[Case]:
    def clip(shape: tuple[int, int], dtype: torch.dtype, bar: float | None) -> Case:
        return Case(
            "clip_and_sum",
            str(list(shape)),
            dtype,
            "copy",
            bar,
            _gradient(*shape),
            lambda grad: ops.clip_and_sum([grad], max_norm=30.0),
            _clip_plain,
            lambda grad: peers.opacus_clip([grad], 30.0),
        )

    def embedding(shape: tuple[int, int, int], bar: float | None, dtype: torch.dtype = F32) -> Case:
        return Case(
            "embedding_grad_norm",
            str(list(shape)),
            dtype,
            "read",
            bar,
            _tokens(*shape),
            ops.embedding_grad_norm,
            _embedding_plain,
            peers.embedding_norms,
        )

    many = Case(
        "per_sample_norm",
        "2000 x [32, 64]",
        F32,
        "read",
        None,
        _many(2000, 32, 64),
        ops.per_sample_norm,
        torch._foreach_norm,  # norms of whole tensors: another result, at the price of many calls
        peers.list_norms,
        compiled=False,
    )
    one = Case(
        "linear_grad_norm",
        "[512, 512] x 512",
        F32,
        "read",
        None,
        _linear(512, inputs=512, outputs=512),
        ops.linear_grad_norm,
        _linear_plain,
        _linear_peers,
    )
    several = one._replace(
        size="[64, 128, 256] x 256", make=_linear(64, 128, inputs=256, outputs=256)
    )
    perturb = Case(
        "embedding_perturb",
        "100k x 64, [512, 32]",
        F32,
        "copy",
        None,
        _rows(512, 32, 64),
        ops.embedding_perturb,
        peers.perturbed_rows,
    )
    summed = Case(
        "embedding_grad_sum",
        "[512, 32, 64], 10k rows",
        F32,
        "copy",
        None,
        _weighted(512, 32, 64, 10_000),
        lambda ids, grad, rows, weights: ops.embedding_grad_sum(ids, grad, rows, weights=weights),
        peers.row_sums,
    )
    narrow = summed._replace(size="[512, 8, 16], 8k rows", make=_weighted(512, 8, 16, 8000))
    adagrad = Case(
        "rowwise_adagrad_",
        "100k x 64, 16384",
        F32,
        "copy",
        None,
        _step(16384, 64),
        lambda weight, state, ids, grad: ops.rowwise_adagrad_(weight, state, ids, grad, lr=1e-6),
        peers.adagrad,
        compiled=False,
    )
    big, rows = (64, 262144), (512, 4096)
    cases = [clip(big, F32, 1.4), clip(rows, F32, None)]
    cases += [clip(big, dtype, 1.3) for dtype in HALF]
    cases += [many, *(many._replace(dtype=dtype, bar=1.3) for dtype in HALF)]
    cases += [embedding((512, 32, 64), 3.0), embedding((64, 512, 768), None)]
    cases += [embedding((64, 512, 768), 1.3, dtype) for dtype in HALF]
    cases += [summed, narrow]
    cases += [one, several, several._replace(dtype=torch.bfloat16)]
    cases += [perturb, perturb._replace(dtype=torch.bfloat16), adagrad]
    return cases


def _title(case: Case) -> str:
    return f"{case.name} {case.size} {str(case.dtype).removeprefix('torch.')}"


HEADER = (
    f"{'op':<52} {'ms':>8} {'ratio':>7} {'bar':>6} {'plain':>8} {'compile':>8} {'peers':>8}   "
    "(ratios to a read or copy of the compulsory bytes)"
)


@pytest.mark.parametrize("case", _cases(), ids=_title)
def test_clip_op(case: Case, benchmark: Any, report: dict[str, list[str]]) -> None:
    torch.manual_seed(0)
    arguments, size = case.make(case.dtype)
    source = torch.zeros(size // 8 if case.floor == "copy" else size // 4)
    target = torch.empty_like(source)
    candidates: dict[str, Run] = {
        "floor": (lambda: target.copy_(source)) if case.floor == "copy" else source.sum,
        "op": lambda: case.op(*arguments),
    }
    if case.plain:
        plain = case.plain
        candidates["plain"] = lambda: plain(*arguments)
        if COMPILE and case.compiled:
            compiled = torch.compile(plain)
            candidates["compile"] = lambda: compiled(*arguments)
    if case.peers:
        others = case.peers
        candidates["peers"] = lambda: others(*arguments)
    took = medians(candidates)
    benchmark.pedantic(candidates["op"], rounds=3, iterations=1)
    ratio = {name: seconds / took["floor"] for name, seconds in took.items()}
    benchmark.extra_info.update(
        bytes=size,
        floor=case.floor,
        threads=torch.get_num_threads(),
        bar=case.bar,
        **{f"ratio_{name}": value for name, value in ratio.items()},
    )
    columns = (
        f"{ratio[name]:8.2f}" if name in ratio else f"{'-':>8}"
        for name in ("plain", "compile", "peers")
    )
    bar = "-" if case.bar is None else f"{case.bar:.2f}"
    report.setdefault("ops on per-sample gradients and tables", [HEADER]).append(
        f"{_title(case):<52} {took['op'] * 1e3:8.3f} {ratio['op']:7.2f} {bar:>6} "
        + " ".join(columns)
    )
