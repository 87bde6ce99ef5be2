"""Calls of every op on hostile values: what tests compare with the reference on both devices.

``call(op, seed)`` draws one call: sizes, dtypes, layouts, options and values, among them zeros,
subnormals, huge numbers, infinities and NaNs where an op gives them a meaning, boxes that do not
hold their origin, bounds that are NaN or upside down, empty groups. ``draw(op, Draw(...,
wide=True))`` draws sizes beside those of vectors, thousands of short groups, long ones, and
tensors that lie anyhow in memory that is not theirs alone.
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

#: Lengths beside those of vectors of 4 to 64 elements, and of a few of them.
BESIDE = tuple(n for v in (4, 8, 16, 32, 64, 128, 256) for n in (v - 1, v, v + 1, 3 * v + 1))
#: Very many short groups, and groups beyond a cache's smallest blocks.
MANY = ((2999, 1), (1501, 3), (700, 2, 5), (13, 61, 7), (401, 16), (300, 33))
LONG = ((1, 8191), (2, 4099), (1, 3, 5003), (3, 1025))

#: The largest magnitudes, about.
HUGE = {torch.float32: 3e38, torch.float64: 1e300, torch.float16: 6e4, torch.bfloat16: 3e38}


class Draw:
    """What a call is drawn from.

    Args:
        choose: draws what a call is like; hypothesis' own makes failing calls simple.
        seed: of the numbers in its tensors.
        wide: sizes and layouts as they come, beside small ones.
    """

    def __init__(self, choose: random.Random, seed: int, wide: bool = False) -> None:
        self.choose, self.wide, self.room = choose, wide, 1 << 16  # elements of a tensor
        self.plain = wide and self.chance(30)  # nothing but a ball: other ops and kernels
        self.numbers = torch.Generator().manual_seed(seed)

    def chance(self, percent: int) -> bool:
        return self.choose.randrange(100) < percent

    def dtype(self) -> torch.dtype:
        return self.choose.choice(DTYPES)

    def size(self, *usual: int) -> int:
        beside = [n for n in BESIDE if n <= self.room] if self.wide and self.chance(15) else []
        size = self.choose.choice(beside or usual)
        self.room //= max(size, 1)
        return size

    def shape(self, dims: int) -> tuple[int, ...]:
        outer = [self.choose.choice((0, 1, 2, 3, 5, 8)) for _ in range(dims - 1)]
        return (*outer, self.size(0, 1, 2, 3, 5, 8, 17, 64, 130)) if dims else ()

    def layout(self, t: Tensor) -> Tensor:
        if self.wide and self.chance(35):
            return self.windows(t) if self.chance(15) else self.placed(t)
        if t.dim() < 2 or not t.numel() or not self.chance(30):
            return t
        return LAYOUTS[self.choose.choice(list(LAYOUTS))](t)

    def placed(self, t: Tensor) -> Tensor:
        """The same values in a larger buffer: dimensions in any order, with gaps, at any offset.

        What is between and around them must not be read: NaN, or an index that no table has.
        """
        order, strides, span = list(range(t.dim())), [1] * t.dim(), 1
        self.choose.shuffle(order)
        for dim in order:
            strides[dim] = span * self.choose.choice((1, 1, 1, 2, 3))
            span = strides[dim] * max(t.shape[dim], 1)
        offset = self.choose.randrange(17)
        other = NAN if t.is_floating_point() else 1 if t.dtype == torch.bool else -(2**30)
        buffer = torch.full((offset + span + 17,), other, dtype=t.dtype)
        return buffer.as_strided(t.shape, strides, offset).copy_(t)

    def windows(self, t: Tensor) -> Tensor:
        """Some of the values, in elements that overlap in memory."""
        if not t.numel():
            return t
        return t.flatten().as_strided(t.shape, [1] * t.dim())

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
        kind = self.choose.randrange(10)
        if kind < 4:
            out = normal * self.choose.choice((1.0, 1e-3, 1e3))
        elif kind < 7:
            out = self.choose.choice(kinds)
        else:
            out = normal
            for other in self.choose.sample(kinds, 3):
                share = self.choose.choice((0.02, 0.3))
                out = torch.where(torch.rand(shape, generator=self.numbers) < share, other, out)
        return self.layout(out.to(dtype))

    def moderate(self, shape: Any, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=self.numbers).to(dtype)

    def indices(self, shape: Any, rows: int, least: int = 0) -> Tensor:
        drawn = torch.randint(least, rows, shape, generator=self.numbers)
        return self.layout(drawn) if self.wide else drawn

    def strength(self, groups: int, known: tuple[float, ...]) -> float | Tensor:
        """One of the known numbers, or one for each group."""
        if self.plain or self.chance(70):
            return self.choose.choice(known)
        dtype = torch.float64 if self.wide and self.chance(30) else torch.float32
        of = torch.randint(len(known), (groups,), generator=self.numbers)
        each = torch.tensor(known, dtype=dtype)[of]
        return self.placed(each) if self.wide and self.chance(30) else each

    def bound(self, shape: Any, dtype: torch.dtype, side: float) -> float | Tensor:
        kind = self.choose.randrange(10)
        if kind < 4:
            return self.choose.choice((side, 0.0, -side * 0.25, side * INF, side * 1e-3))
        if kind < 5:
            return torch.tensor(self.choose.choice((side, 0.0, NAN)), dtype=dtype)
        out = side * torch.rand(shape, dtype=torch.float64, generator=self.numbers)
        for value in (NAN, side * INF, -2 * side, 0.0):
            share = self.choose.choice((0.0, 0.1))
            out = torch.where(torch.rand(shape, generator=self.numbers) < share, value, out)
        return self.layout(out.to(self.choose.choice((dtype, torch.float32))))

    def weights(self, count: int) -> Tensor | None:
        if self.chance(50):
            return None
        out = torch.rand(count, generator=self.numbers)
        return torch.where(torch.rand(count, generator=self.numbers) < 0.2, 0.0, out)


def _group_options(d: Draw, shape: tuple[int, ...]) -> tuple[dict[str, Any], int]:
    """The cut and the mask, and how many groups there are."""
    options: dict[str, Any] = {"norm": d.choose.choice(samples.NORMS)}
    rows = math.prod(shape[:-1])
    groups = shape[0] if len(shape) > 1 else 1
    cut = d.choose.randrange(10)
    if cut < 3:
        options["group"], groups = "token", rows
    elif cut < 5 and not d.plain:
        groups = d.choose.choice((1, 2, 3, 4, 5, rows + 3) if d.wide else (1, 2, 3, 4, 5))
        inner = torch.randint(rows + 1, (groups - 1,), generator=d.numbers).sort().values
        options["offsets"] = torch.cat([torch.tensor([0]), inner, torch.tensor([rows])])
    if not d.plain and d.chance(30):
        share = d.choose.choice((0.3, 1.0))
        mask = torch.rand(shape[:-1], generator=d.numbers) >= share
        options["mask"] = d.layout(mask) if d.wide else mask
    return options, groups


def _ball(d: Draw, options: dict[str, Any], x: Tensor, groups: int, finite: bool) -> Tensor:
    """Adds eps, origin and box; returns the tensor with the origin in it."""
    known = (0.0, 1e-30, 1e-3, 0.5, 1.0, 30.0, 1e6) + (() if finite else (INF, 1e38))
    options["eps"] = d.strength(groups, known)
    if d.plain or d.chance(50):
        return x
    if d.chance(60):
        options["x0"] = d.layout(d.moderate(x.shape, x.dtype))
        x = (options["x0"].double() + x.double()).to(x.dtype)
        x = torch.where(x.isfinite(), x, options["x0"])
    for name, side in (("lower", -1.0), ("upper", 1.0)):
        if d.chance(70):
            options[name] = d.bound(x.shape, x.dtype, side)
    numbers = [options.get(name) for name in ("lower", "upper")]
    if all(isinstance(n, float) for n in numbers) and numbers[0] > numbers[1]:
        options["lower"], options["upper"] = options["upper"], options["lower"]
    return x


def _group_call(op: str, d: Draw) -> Call:
    shape, dtype = d.shape(d.choose.randint(1, 3)), d.dtype()
    if d.wide and d.chance(8):
        shape = d.choose.choice(MANY if d.chance(70) else LONG)
    x = d.values(shape, dtype, finite=op != "group_norm")
    options, groups = _group_options(d, shape)
    if op == "group_norm":
        return Call([x], options)
    x = _ball(d, options, x, groups, op == "random_start")
    if op in ("project", "random_start"):
        return Call([x], options)
    if op == "gaussian_noise":
        if d.wide and d.chance(20):
            del options["eps"]
        return Call([x], {**options, "std": d.strength(groups, (0.0, 1e-30, 0.5, 1e3))})
    grad = d.values(shape, d.choose.choice((dtype, dtype, d.dtype())), finite=False)
    options["step_size"] = d.strength(groups, (0.0, 1e-3, 0.7, -0.3))
    if options["norm"] == "l1":
        options["top"] = d.choose.choice((1, 1, 3, 0.25, 1000))
    if d.chance(50):
        options["nonfinite"] = torch.zeros(groups, dtype=torch.int32)
    if op == "pgd_step":
        if options.get("group") == "token" and d.chance(50):
            options["max_groups"] = d.choose.choice((0, 1, 3))
        return Call([x, grad], options)
    options.update(decay=d.choose.choice((0.0, 0.75, 1.0)), style=d.choose.choice(("mi", "apgd")))
    velocity = d.moderate(shape, d.choose.choice((dtype, d.dtype())))
    if options["style"] == "apgd":
        velocity = (x.double() + velocity.double() / 8).to(velocity.dtype)
        velocity = torch.where(velocity.isfinite(), velocity, 0)
    return Call([x, velocity, grad], options)


def _list_call(op: str, d: Draw) -> Call:
    batch = d.size(0, 1, 2, 5, 9)
    dtypes = [d.dtype() for _ in range(2)]
    grads = [
        d.values((batch, *d.shape(d.choose.randint(0, 2))), d.choose.choice(dtypes), finite=False)
        for _ in range(d.choose.choice((1, 2, 5, 40) if d.wide else (1, 2, 5)))
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
    batch, tokens = d.choose.choice((0, 1, 3)), d.size(0, 1, 2, 7, 40)
    rows = () if d.chance(20) else (tokens,)
    inputs, outputs = (d.size(0, 1, 3, 16, 33) for _ in range(2))
    return Call(
        [d.values((batch, *rows, n), d.dtype(), finite=False) for n in (inputs, outputs)],
        {"bias": d.chance(50), "method": d.choose.choice(("auto", "gram", "direct"))},
    )


def _either_integer(d: Draw, indices: Tensor) -> Tensor:
    return indices.int() if d.wide and d.chance(30) else indices


def _embedding_norm_call(d: Draw) -> Call:
    batch, dim, vocab = d.size(0, 1, 4), d.size(0, 1, 5, 64), 6
    options: dict[str, Any] = {"padding_idx": d.choose.choice((None, 0, 5))}
    if d.chance(50):
        shape = (batch, *d.shape(d.choose.randint(0, 2)))
        indices = _either_integer(d, d.indices(shape, vocab))
        return Call([indices, d.values((*shape, dim), d.dtype(), finite=False)], options)
    count = d.size(0, 3, 50) if batch else 0
    starts = torch.randint(count + 1, (max(batch - 1, 0),), generator=d.numbers).sort().values
    options["offsets"] = torch.cat([torch.zeros(min(batch, 1), dtype=torch.int64), starts])
    options["mode"] = d.choose.choice(("sum", "mean"))
    if options["mode"] == "sum" and d.chance(50):
        options["per_sample_weights"] = d.moderate((count,), d.dtype())
    indices = _either_integer(d, d.indices((count,), vocab))
    return Call([indices, d.values((batch, dim), d.dtype(), finite=False)], options)


def _table_call(op: str, d: Draw) -> Call:
    rows, dim = d.choose.choice((1, 5, 300)), d.size(0, 1, 5, 64)
    shape = d.shape(d.choose.randint(1, 2))
    indices = d.indices(shape, rows)
    if op == "embedding_perturb":
        found = d.choose.choice((0, 1, 7))
        inverse = d.indices(shape, found, least=-1)
        weight = d.values((rows, dim), d.dtype(), finite=False)
        return Call([weight, indices, d.values((found, dim), d.dtype(), finite=False), inverse], {})
    grad = d.values((*shape, dim), d.dtype(), finite=False)
    if op == "embedding_grad_sum":
        padding = d.choose.choice((None, 0, rows - 1))
        indices = _either_integer(d, indices)
        return Call([indices, grad, rows], {"weights": d.weights(shape[0]), "padding_idx": padding})
    state = torch.rand(rows, generator=d.numbers).to(d.dtype())
    state = torch.where(torch.rand(rows, generator=d.numbers) < 0.5, 0, state)
    options = {"lr": d.choose.choice((0.0, 0.1)), "eps": d.choose.choice((0.0, 1e-8, 1.0))}
    options["max_norm"] = d.choose.choice((None, 0.0, 1.0))
    return Call([d.moderate((rows, dim), d.dtype()), state, indices, grad], options)


def call(op: str, seed: int) -> Call:
    """One call of an op; the same for the same seed."""
    number = seed * 1009 + OPS.index(op)
    return draw(op, Draw(random.Random(number), number))


def draw(op: str, d: Draw) -> Call:
    """One call of an op."""
    if op in samples.GROUP_OPS:
        return _group_call(op, d)
    if op in ("per_sample_norm", "clip_and_sum"):
        return _list_call(op, d)
    if op == "linear_grad_norm":
        return _linear_call(d)
    if op == "embedding_grad_norm":
        return _embedding_norm_call(d)
    return _table_call(op, d)


def assert_matches(
    op: str, call: Call, results: list[Tensor], what: object, unit: float = 2.0**-53
) -> None:
    """Compares results with the reference's; `what` (a seed) is told on failure.

    Which numbers that are not finite come out of a norm says nothing: a sum of infinities is one or
    a NaN as it is formed.
    """
    try:
        if op in ("linear_grad_norm", "embedding_grad_norm"):
            wanted = run(op, call.double(), reference)
            known = wanted[0].to(results[0].dtype).isfinite()
            assert not results[0][~known].isfinite().any()
            results = [torch.where(known, results[0], wanted[0].to(results[0].dtype))]
        assert_matches_reference(op, call, results, unit)
    except AssertionError as error:
        raise AssertionError(f"hostile.call({op!r}, {what}): {error}") from None
