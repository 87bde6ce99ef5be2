"""What `make gpu-check` measures: every op beside the op sequences that others use for its job.

Nothing here needs a GPU: `cases("cpu", tiny=True)` is what the tests run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import peers
import torch
from embattle import ops
from peers import wide
from samples import Call
from torch import Tensor

EPS, STEP = 1.0, 0.3
RATE_FROM = 64 << 20  # bytes from which a share of the copy's rate is asked for


@dataclass
class Case:
    """An op at one size."""

    op: str
    size: str
    dtype: str
    bytes: int  # that have to be read and written at least
    given: Call  # what the op is given, and the reference
    calls: dict[str, Callable[[], Any]]  # by candidate; "embattle" is put among them
    compiled: Callable[[], Any] | None = None  # what torch.compile is given: calls["eager"]
    rate: float | None = None  # of the copy's, at least
    over: dict[str, float] = field(default_factory=dict)  # how many times faster than whom
    microseconds: float | None = None  # of GPU time, at most
    same: tuple[str, ...] = ()  # candidates that compute what embattle does

    def __post_init__(self) -> None:
        args, options = self.given
        self.calls = {"embattle": lambda: getattr(ops, self.name)(*args, **options), **self.calls}

    @property
    def name(self) -> str:
        """The op's function in embattle.ops."""
        return self.op.split()[0]


# ---- Steps, as their authors write them: on [groups, ...], a group for each sample ----


EAGER_STEPS = {"l2": peers.l2_step, "linf": peers.linf_step, "l1": peers.l1_step}


def eager_step(delta: Tensor, grad: Tensor, norm: str) -> Tensor:
    """The shortest form in plain torch."""
    return EAGER_STEPS[norm](delta, grad, STEP, EPS)


def torchattacks_step(adv: Tensor, origin: Tensor, grad: Tensor, norm: str) -> Tensor:
    """A step of PGD or PGDL2 there: the adversarial example is kept, not the perturbation."""
    if norm == "linf":
        adv = adv.detach() + STEP * grad.sign()
        return (origin + torch.clamp(adv - origin, min=-EPS, max=EPS)).detach()
    norms = torch.norm(grad.view(len(grad), -1), p=2, dim=1) + 1e-10
    adv = adv.detach() + STEP * (grad / wide(norms, grad))
    delta = adv - origin
    norms = torch.norm(delta.view(len(delta), -1), p=2, dim=1)
    factor = torch.min(EPS / norms, torch.ones_like(norms))
    return (origin + delta * wide(factor, delta)).detach()


def foolbox_step(adv: Tensor, origin: Tensor, grad: Tensor, norm: str) -> Tensor:
    """A step of its projected gradient descent."""
    if norm == "linf":
        return origin + torch.clamp(adv + STEP * grad.sign() - origin, -EPS, EPS)
    if norm == "l2":
        norms = grad.flatten(1).norm(dim=1).clamp(min=1e-12)
        delta = adv + STEP * (grad * wide(1 / norms, grad)) - origin
        norms = delta.flatten(1).norm(dim=1).clamp(min=1e-12)
        return origin + delta * wide(torch.minimum(torch.ones_like(norms), EPS / norms), delta)
    norms = grad.flatten(1).abs().sum(1).clamp(min=1e-12)  # the l1-normalised gradient
    delta = adv + STEP * (grad * wide(1 / norms, grad)) - origin
    return origin + peers.l1_project(delta, EPS)


def eager_project(x: Tensor, norm: str) -> Tensor:
    if norm == "linf":
        return x.clamp(-EPS, EPS)
    if norm == "l2":
        return x * wide((EPS / x.flatten(1).norm(dim=1)).clamp(max=1), x)
    return peers.l1_project(x, EPS)


def eager_momentum(delta: Tensor, velocity: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """MI-FGSM in the l2 ball."""
    velocity = 0.9 * velocity + grad / wide(grad.flatten(1).abs().sum(1), grad)
    return eager_step(delta, velocity, "l2"), velocity


# ---- Per-sample gradients and tables ----


def eager_clip(grads: list[Tensor], bound: float) -> list[Tensor]:
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in grads]).norm(dim=0)
    factor = (bound / norms).clamp(max=1.0)
    return [(g * wide(factor, g).to(g.dtype)).sum(0) for g in grads]


def opacus_linear(input: Tensor, grad: Tensor) -> Tensor:
    """The norms of a linear layer's gradients by Gram matrices."""
    left = torch.einsum("nik,njk->nij", grad, grad)
    right = torch.einsum("nik,njk->nij", input, input)
    return torch.einsum("n...,n...->n", left, right).clamp(min=0).sqrt()


# ---- The list ----


def _size(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _group_cases(device: str, shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Case]:
    def random() -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    delta, grad, origin = random(), random(), torch.zeros(shape, device=device, dtype=dtype)
    adv = origin + delta
    one, size, kind = _size(delta), str(list(shape)), str(dtype).removeprefix("torch.")
    large = one >= RATE_FROM
    for norm in ("l2", "linf", "l1"):
        calls: dict[str, Callable[[], Any]] = {
            "eager": lambda n=norm: eager_step(delta, grad, n),
            "foolbox": lambda n=norm: foolbox_step(adv, origin, grad, n),
        }
        if norm != "l1":
            calls["torchattacks"] = lambda n=norm: torchattacks_step(adv, origin, grad, n)
        yield Case(
            f"pgd_step {norm}",
            size,
            kind,
            3 * one,
            Call([delta, grad], {"step_size": STEP, "eps": EPS, "norm": norm}),
            calls,
            compiled=(lambda n=norm: eager_step(delta, grad, n)) if norm != "l1" else None,
            rate=(0.6 if norm == "l1" else 0.9) if large else None,
            over={"l2": {"compile": 1.3}, "l1": {"eager": 20.0}}.get(norm, {}),
            microseconds=8.0 if norm != "l1" and one <= 4 << 20 else None,
            same=("eager", "torchattacks", "foolbox") if norm != "l1" else ("eager",),
        )
        yield Case(
            f"project {norm}",
            size,
            kind,
            2 * one,
            Call([delta], {"eps": EPS, "norm": norm}),
            {"eager": lambda n=norm: eager_project(delta, n)},
            compiled=(lambda n=norm: eager_project(delta, n)) if norm != "l1" else None,
            rate=(0.6 if norm == "l1" else 0.9) if large else None,
            over={"eager": 20.0} if norm == "l1" else {},
            same=("eager",),
        )
    generator = torch.Generator(device)
    yield Case(
        "gaussian_noise",
        size,
        kind,
        2 * one,
        Call([delta], {"std": 0.1, "generator": generator}),
        {"eager": lambda: delta + 0.1 * torch.randn_like(delta)},
        rate=0.9 if large else None,
    )
    yield Case(
        "random_start l2",
        size,
        kind,
        one,
        Call([delta], {"eps": EPS, "generator": generator}),
        {"eager": lambda: peers.l2_start(delta)},
    )
    velocity = random()
    yield Case(
        "momentum_step l2",
        size,
        kind,
        5 * one,
        Call([delta, velocity, grad], {"decay": 0.9, "step_size": STEP, "eps": EPS}),
        {"eager": lambda: eager_momentum(delta, velocity, grad)},
        compiled=lambda: eager_momentum(delta, velocity, grad),
        same=("eager",),
    )
    yield Case(
        "group_norm l2",
        size,
        kind,
        one,
        Call([delta], {}),
        {"eager": lambda: delta.flatten(1).norm(dim=1, dtype=torch.float32)},
        same=("eager",),
    )


def _list_cases(
    device: str, batch: int, widths: list[int], dtype: torch.dtype, kind: str
) -> Iterator[Case]:
    grads = [torch.randn(batch, w, device=device).to(dtype) for w in widths]
    size = f"{batch} x {len(widths)} tensors, {sum(widths)}"
    one, bound = _size(*grads), 0.5 * sum(widths) ** 0.5
    yield Case(
        "clip_and_sum",
        size,
        kind,
        2 * one + one // batch,
        Call([grads], {"max_norm": bound}),
        {
            "eager": lambda: eager_clip(grads, bound),
            "opacus": lambda: peers.opacus_clip(grads, bound),
        },
        compiled=lambda: eager_clip(grads, bound),
        rate=0.8 if one >= RATE_FROM else None,
        same=("eager", "opacus"),
    )
    yield Case(
        "per_sample_norm",
        size,
        kind,
        one,
        Call([grads], {}),
        {"eager": lambda: peers.list_norms(grads)},
        same=("eager",) if dtype == torch.float32 else (),
    )


def _table_cases(device: str, tiny: bool, dtype: torch.dtype) -> Iterator[Case]:
    batch, tokens, dim, vocab = (3, 5, 8, 11) if tiny else (256, 256, 768, 100_000)
    ids = torch.randint(0, vocab, (batch, tokens), device=device)
    grad, input = torch.randn(2, batch, tokens, dim, device=device).to(dtype)
    size, kind = str([batch, tokens, dim]), str(dtype).removeprefix("torch.")
    large, exact = not tiny, dtype == torch.float32
    yield Case(
        "linear_grad_norm",
        f"{size} x {dim}",
        kind,
        _size(grad, input),
        Call([input, grad], {}),
        {
            "eager": lambda: (grad.mT @ input).flatten(1).norm(dim=1),
            "opacus": lambda: opacus_linear(input, grad),
        },
        over={"opacus": 1.0},
        same=("eager", "opacus") if exact else (),
    )
    yield Case(
        "embedding_grad_norm",
        size,
        kind,
        _size(grad, ids),
        Call([ids, grad], {}),
        {"eager": lambda: peers.embedding_norms(ids, grad)},
        rate=0.5 if large else None,
        over={"eager": 3.0},
        same=("eager",) if exact else (),
    )
    factors = torch.rand(batch, device=device)
    yield Case(
        "embedding_grad_sum",
        f"{size} in {vocab} rows",
        kind,
        _size(grad, ids) + grad.element_size() * vocab * dim,
        Call([ids, grad, vocab], {"weights": factors}),
        {"eager": lambda: peers.row_sums(ids, grad, vocab, factors)},
        rate=0.5 if large else None,
        over={"eager": 1.0},
        same=("eager",) if exact else (),
    )
    distinct, inverse = torch.unique(ids, return_inverse=True)
    weight = torch.randn(vocab, dim, device=device).to(dtype)
    delta = torch.randn(len(distinct), dim, device=device).to(dtype)
    yield Case(
        "embedding_perturb",
        size,
        kind,
        2 * _size(delta) + _size(grad) + 2 * _size(ids),
        Call([weight, ids, delta, inverse], {}),
        {"eager": lambda: peers.perturbed_rows(weight, ids, delta, inverse)},
        compiled=lambda: peers.perturbed_rows(weight, ids, delta, inverse),
        rate=0.7 if large else None,
        over={"eager": 2.0},
        same=("eager",),
    )
    # Steps in place: each candidate has a table of its own, and small steps.
    tables = [(weight.clone(), torch.zeros(vocab, device=device)) for _ in range(2)]
    flat, flat_grad = ids.flatten(), grad.flatten(0, 1)
    yield Case(
        "rowwise_adagrad_",
        f"{size} in {vocab} rows",
        kind,
        _size(grad, ids) + 2 * _size(delta) + 8 * len(distinct),
        Call([*tables[0], flat, flat_grad], {"lr": 1e-6}),
        {"eager": lambda: peers.adagrad(*tables[1], flat, flat_grad)},
        rate=0.5 if large else None,
        over={"eager": 1.5},
        same=("eager",) if exact else (),
    )


def cases(device: str, tiny: bool = False) -> Iterator[Case]:
    """All cases, those with a target first; tensors are made when a case is reached."""
    if tiny:
        for dtype in (torch.float32, torch.bfloat16):
            yield from _group_cases(device, (3, 4, 5), dtype)
        yield from _list_cases(device, 4, [7, 33], torch.float32, "float32")
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            yield from _table_cases(device, True, dtype)
        return
    f32, bf16 = torch.float32, torch.bfloat16
    yield from _group_cases(device, (64, 512, 768), f32)
    yield from _group_cases(device, (256, 32, 128), f32)
    yield from _list_cases(device, 256, [262_144], f32, "float32")
    yield from _group_cases(device, (128, 512, 768), bf16)
    yield from _list_cases(device, 256, [64 * 64] * 40 + [512] * 60, f32, "float32")
    yield from _list_cases(device, 256, [524_288], bf16, "bfloat16")
    yield from _table_cases(device, False, f32)
    yield from _table_cases(device, False, bf16)
    yield from _table_cases(device, False, torch.float16)
    yield from _group_cases(device, (4096, 64), f32)
    yield from _group_cases(device, (64, 128, 768), f32)
