"""Calls of every op on hostile values: what tests compare with the reference on both devices.

``calls(op, seed)`` draws one call: sizes, dtypes, layouts, options and values, among them zeros,
subnormals, huge numbers, infinities and NaNs where an op gives them a meaning, boxes that do not
hold their origin, bounds that are NaN or upside down, empty groups.
"""

from __future__ import annotations

import math
import random
from typing import Any

import samples
import torch
from compare import assert_matches_reference, run
from embattle import reference
from samples import DTYPES, INF, LAYOUTS, NAN, PRECISIONS, Call
from torch import Tensor

OPS = tuple(op for op in samples.OPS if not op.endswith("_") or op == "rowwise_adagrad_")

#: The largest magnitudes, about.
HUGE = {torch.float32: 3e38, torch.float64: 1e300, torch.float16: 6e4, torch.bfloat16: 3e38}


class Draw:
    """What a call is drawn from."""

    def __init__(self, seed: int) -> None:
        self.choose = random.Random(seed)
        self.numbers = torch.Generator().manual_seed(seed)

    def dtype(self) -> torch.dtype:
        return self.choose.choice(DTYPES)

    def shape(self, dims: int) -> tuple[int, ...]:
        sizes = (0, 1, 2, 3, 5, 8, 17, 64, 130)
        return tuple(self.choose.choice(sizes[: 6 if i + 1 < dims else None]) for i in range(dims))

    def layout(self, t: Tensor) -> Tensor:
        if t.dim() < 2 or not t.numel() or self.choose.random() < 0.7:
            return t
        return LAYOUTS[self.choose.choice(list(LAYOUTS))](t)

    def values(self, shape: Any, dtype: torch.dtype, *, finite: bool = True) -> Tensor:
        """Normal numbers; or one hostile kind; or a mixture of kinds."""
        normal = torch.randn(shape, dtype=torch.float64, generator=self.numbers)
        sign = normal.sign()
        least = PRECISIONS[dtype].least
        kinds = [
            normal,
            torch.zeros_like(normal),
            -torch.zeros_like(normal),
            sign * least,
            normal * least * 9,
            normal * (6e-5 if dtype == torch.float16 else 1.2e-38),
            sign * HUGE[dtype],
            normal * (HUGE[dtype] / 9),
            sign * 0.5,
        ]
        if not finite:
            kinds += [sign * INF, torch.full_like(normal, NAN)]
        kind = self.choose.random()
        if kind < 0.4:
            out = normal * self.choose.choice((1.0, 1e-3, 1e3))
        elif kind < 0.7:
            out = self.choose.choice(kinds)
        else:
            out = normal
            for other in self.choose.sample(kinds, 3):
                share = self.choose.choice((0.02, 0.3))
                out = torch.where(torch.rand(shape, generator=self.numbers) < share, other, out)
        return self.layout(out.to(dtype))

    def moderate(self, shape: Any, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=self.numbers).to(dtype)

    def strength(self, groups: int, finite: bool = False) -> float | Tensor:
        known = [0.0, 1e-30, 1e-3, 0.5, 1.0, 30.0, 1e6] + ([] if finite else [INF])
        if self.choose.random() < 0.7:
            return self.choose.choice(known)
        return torch.tensor([self.choose.choice(known) for _ in range(groups)])

    def bound(self, shape: Any, dtype: torch.dtype, side: float) -> float | Tensor:
        kind = self.choose.random()
        if kind < 0.4:
            return self.choose.choice((side, 0.0, -side * 0.25, side * INF, side * 1e-3))
        if kind < 0.5:
            return torch.tensor(self.choose.choice((side, 0.0, NAN)), dtype=dtype)
        out = side * torch.rand(shape, dtype=torch.float64, generator=self.numbers)
        for value in (NAN, side * INF, -2 * side, 0.0):
            share = self.choose.choice((0.0, 0.1))
            out = torch.where(torch.rand(shape, generator=self.numbers) < share, value, out)
        return out.to(self.choose.choice((dtype, torch.float32)))

    def weights(self, count: int) -> Tensor | None:
        if self.choose.random() < 0.5:
            return None
        out = torch.rand(count, generator=self.numbers)
        return torch.where(torch.rand(count, generator=self.numbers) < 0.2, 0.0, out)


def _group_options(d: Draw, shape: tuple[int, ...]) -> tuple[dict[str, Any], int]:
    """The cut and the mask, and how many groups there are."""
    options: dict[str, Any] = {"norm": d.choose.choice(samples.NORMS)}
    rows = math.prod(shape[:-1])
    groups = shape[0] if len(shape) > 1 else 1
    cut = d.choose.random()
    if cut < 0.3:
        options["group"], groups = "token", rows
    elif cut < 0.5:
        groups = d.choose.randint(1, 5)
        inner = sorted(d.choose.randint(0, rows) for _ in range(groups - 1))
        options["offsets"] = torch.tensor([0, *inner, rows])
    if d.choose.random() < 0.3:
        share = d.choose.choice((0.3, 1.0))
        options["mask"] = torch.rand(shape[:-1], generator=d.numbers) >= share
    return options, groups


def _ball(d: Draw, options: dict[str, Any], x: Tensor, groups: int, finite: bool) -> Tensor:
    """Adds eps, origin and box; returns the tensor with the origin in it."""
    options["eps"] = d.strength(groups, finite)
    if d.choose.random() < 0.5:
        return x
    if d.choose.random() < 0.6:
        options["x0"] = d.layout(d.moderate(x.shape, x.dtype))
        x = (options["x0"].double() + x.double()).to(x.dtype)
        x = torch.where(x.isfinite(), x, options["x0"])
    for name, side in (("lower", -1.0), ("upper", 1.0)):
        if d.choose.random() < 0.7:
            options[name] = d.bound(x.shape, x.dtype, side)
    numbers = [options.get(name) for name in ("lower", "upper")]
    if all(isinstance(n, float) for n in numbers) and numbers[0] > numbers[1]:
        options["lower"], options["upper"] = options["upper"], options["lower"]
    return x


def _group_call(op: str, d: Draw) -> Call:
    shape, dtype = d.shape(d.choose.randint(1, 3)), d.dtype()
    x = d.values(shape, dtype, finite=op != "group_norm")
    options, groups = _group_options(d, shape)
    if op == "group_norm":
        return Call([x], options)
    x = _ball(d, options, x, groups, op == "random_start")
    if op in ("project", "random_start"):
        return Call([x], options)
    if op == "gaussian_noise":
        return Call([x], {**options, "std": d.choose.choice((0.0, 1e-30, 0.5, 1e3))})
    grad = d.values(shape, d.choose.choice((dtype, dtype, d.dtype())), finite=False)
    options["step_size"] = d.choose.choice((0.0, 1e-3, 0.7, -0.3))
    if options["norm"] == "l1":
        options["top"] = d.choose.choice((1, 1, 3, 0.25, 1000))
    if d.choose.random() < 0.5:
        options["nonfinite"] = torch.zeros(groups, dtype=torch.int32)
    if op == "pgd_step":
        if options.get("group") == "token" and d.choose.random() < 0.5:
            options["max_groups"] = d.choose.choice((0, 1, 3))
        return Call([x, grad], options)
    options.update(decay=d.choose.choice((0.0, 0.75, 1.0)), style=d.choose.choice(("mi", "apgd")))
    velocity = d.moderate(shape, d.choose.choice((dtype, d.dtype())))
    if options["style"] == "apgd":
        velocity = (x.double() + velocity.double() / 8).to(velocity.dtype)
        velocity = torch.where(velocity.isfinite(), velocity, 0)
    return Call([x, velocity, grad], options)


def _list_call(op: str, d: Draw) -> Call:
    batch = d.choose.choice((0, 1, 2, 5, 9))
    dtypes = [d.dtype() for _ in range(2)]
    grads = [
        d.values((batch, *d.shape(d.choose.randint(0, 2))), d.choose.choice(dtypes), finite=False)
        for _ in range(d.choose.choice((1, 2, 5)))
    ]
    if op == "per_sample_norm":
        return Call([grads], {})
    mode = d.choose.choice(("flat", "per_layer", "automatic"))
    bounds = (0.0, 1e-30, 1.0, 1e30) if mode == "automatic" else (0.0, 1e-30, 1.0, 1e30, INF)
    options: dict[str, Any] = {"max_norm": d.choose.choice(bounds), "mode": mode}
    options["gamma"] = d.choose.choice((0.0, 0.01, 1.0))
    options["weights"] = d.weights(batch)
    return Call([grads], options)


def _linear_call(d: Draw) -> Call:
    batch, tokens = d.choose.choice((0, 1, 3)), d.choose.choice((0, 1, 2, 7, 40))
    rows = () if d.choose.random() < 0.2 else (tokens,)
    inputs, outputs = (d.choose.choice((0, 1, 3, 16, 33)) for _ in range(2))
    return Call(
        [d.values((batch, *rows, n), d.dtype(), finite=False) for n in (inputs, outputs)],
        {"bias": d.choose.random() < 0.5, "method": d.choose.choice(("auto", "gram", "direct"))},
    )


def _embedding_norm_call(d: Draw) -> Call:
    batch, dim, vocab = d.choose.choice((0, 1, 4)), d.choose.choice((0, 1, 5, 64)), 6
    options: dict[str, Any] = {"padding_idx": d.choose.choice((None, 0, 5))}
    if d.choose.random() < 0.5:
        shape = (batch, *d.shape(d.choose.randint(0, 2)))
        indices = torch.randint(0, vocab, shape, generator=d.numbers)
        return Call([indices, d.values((*shape, dim), d.dtype(), finite=False)], options)
    count = d.choose.choice((0, 3, 50)) if batch else 0
    starts = sorted(d.choose.randint(0, count) for _ in range(batch - 1)) if batch else []
    options["offsets"] = torch.tensor([*([0] if batch else []), *starts], dtype=torch.int64)
    options["mode"] = d.choose.choice(("sum", "mean"))
    if options["mode"] == "sum" and d.choose.random() < 0.5:
        options["per_sample_weights"] = d.moderate((count,), d.dtype())
    indices = torch.randint(0, vocab, (count,), generator=d.numbers)
    return Call([indices, d.values((batch, dim), d.dtype(), finite=False)], options)


def _table_call(op: str, d: Draw) -> Call:
    rows, dim = d.choose.choice((1, 5, 300)), d.choose.choice((0, 1, 5, 64))
    shape = d.shape(d.choose.randint(1, 2))
    indices = torch.randint(0, rows, shape, generator=d.numbers)
    if op == "embedding_perturb":
        found = d.choose.choice((0, 1, 7))
        inverse = (
            torch.randint(-1, found, shape, generator=d.numbers) if found else -1 + 0 * indices
        )
        weight = d.values((rows, dim), d.dtype(), finite=False)
        return Call([weight, indices, d.values((found, dim), d.dtype(), finite=False), inverse], {})
    grad = d.values((*shape, dim), d.dtype(), finite=False)
    if op == "embedding_grad_sum":
        padding = d.choose.choice((None, 0, rows - 1))
        return Call([indices, grad, rows], {"weights": d.weights(shape[0]), "padding_idx": padding})
    state = torch.rand(rows, generator=d.numbers).to(d.dtype())
    state = torch.where(torch.rand(rows, generator=d.numbers) < 0.5, 0, state)
    options = {"lr": d.choose.choice((0.0, 0.1)), "eps": d.choose.choice((0.0, 1e-8, 1.0))}
    options["max_norm"] = d.choose.choice((None, 0.0, 1.0))
    return Call([d.moderate((rows, dim), d.dtype()), state, indices, grad], options)


def call(op: str, seed: int) -> Call:
    """One call of an op; the same for the same seed."""
    d = Draw(seed * 1009 + OPS.index(op))
    if op in samples.GROUP_OPS:
        return _group_call(op, d)
    if op in ("per_sample_norm", "clip_and_sum"):
        return _list_call(op, d)
    if op == "linear_grad_norm":
        return _linear_call(d)
    if op == "embedding_grad_norm":
        return _embedding_norm_call(d)
    return _table_call(op, d)


def assert_matches(op: str, call: Call, results: list[Tensor], seed: int) -> None:
    """Compares results with the reference's; `seed` is told on failure.

    Which numbers that are not finite come out of a norm says nothing: a sum of infinities is one or
    a NaN as it is formed.
    """
    try:
        if op == "linear_grad_norm":
            wanted = run(op, call.double(), reference)
            known = wanted[0].to(results[0].dtype).isfinite()
            assert not results[0][~known].isfinite().any()
            results = [torch.where(known, results[0], wanted[0].to(results[0].dtype))]
        assert_matches_reference(op, call, results)
    except AssertionError as error:
        raise AssertionError(f"hostile.call({op!r}, {seed}): {error}") from None
