"""Inputs of every op: one table that tests, opcheck and benchmarks share.

``for_op(name)`` lists the samples of an op. A sample is a name and a function from the dtype of the
op's first argument to a fresh ``Call`` (arguments, keywords); calls do not share memory. Random
values come from a generator that is seeded with the sample's name, so that a sample is the same
wherever it is used. In-place ops have the samples of their functional form.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

INF = math.inf
NAN = math.nan
NORMS = ("l2", "linf", "l1")


class Precision(NamedTuple):
    """A dtype and what may be asked of it."""

    dtype: torch.dtype
    unit: float  # the distance of 1 to the next number: one ulp
    least: float  # the smallest positive number

    def tolerance(self, terms: int) -> float:
        """The relative error allowed to a result that sums `terms` numbers.

        Half-precision ops accumulate in float32, so that what they lose is one rounding of the
        result, and at most two units more where it had to be moved into its ball.
        """
        if self.unit > 1e-6:
            return 3 * self.unit
        return 4 * self.unit * max(1.0, math.log2(max(terms, 2)))


PRECISIONS = {
    torch.float32: Precision(torch.float32, 2.0**-23, 2.0**-149),
    torch.float64: Precision(torch.float64, 2.0**-52, 2.0**-1074),
    torch.float16: Precision(torch.float16, 2.0**-10, 2.0**-24),
    torch.bfloat16: Precision(torch.bfloat16, 2.0**-7, 2.0**-133),
}
DTYPES = tuple(PRECISIONS)


class Call(NamedTuple):
    """The arguments of one call of an op in embattle.ops (or embattle.ops.reference)."""

    args: list[Any]
    kwargs: dict[str, Any]

    def map(self, change: Callable[[Tensor], Tensor]) -> Call:
        """The same call with every tensor replaced."""
        return Call(
            [_map(a, change) for a in self.args],
            {k: _map(v, change) for k, v in self.kwargs.items()},
        )

    def clone(self) -> Call:
        """The same call on memory of its own, strides kept."""
        return self.map(lambda t: t.detach().clone() if _dense(t) else t.detach())

    def double(self) -> Call:
        """The same call with every floating tensor in float64."""
        return self.map(lambda t: t.double() if t.is_floating_point() else t.clone())


def _dense(t: Tensor) -> bool:
    return t.is_contiguous() or 0 not in t.stride()


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_map(v, change) for v in value)
    return value


class Sample(NamedTuple):
    """A named input of an op."""

    op: str
    name: str
    build: Callable[[torch.dtype, torch.Generator], Call]

    def call(self, dtype: torch.dtype = torch.float32) -> Call:
        """A fresh call whose first argument has the given dtype."""
        seed = zlib.crc32(f"{self.op}/{self.name}".encode())
        return self.build(dtype, torch.Generator().manual_seed(seed))


def _randn(shape: Any, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)


def _rand(shape: Any, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, dtype=torch.float64, generator=generator).to(dtype)


# --- values ---------------------------------------------------------------------------------------


def _range(shape: Any, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Magnitudes over nearly the whole range of the dtype (of float32 for bfloat16 and float64)."""
    low, high = (-7.0, 4.0) if dtype == torch.float16 else (-36.0, 30.0)
    exponents = low + (high - low) * _rand(shape, torch.float64, generator)
    return (10.0**exponents * _randn(shape, torch.float64, generator).sign()).to(dtype)


VALUES: dict[str, Callable[[Any, torch.dtype, torch.Generator], Tensor]] = {
    "normal": _randn,
    "zeros": lambda shape, dtype, g: torch.zeros(shape, dtype=dtype),
    "least": lambda shape, dtype, g: torch.full(shape, PRECISIONS[dtype].least, dtype=dtype),
    "denormal": lambda shape, dtype, g: _randn(shape, dtype, g) * (PRECISIONS[dtype].least * 9),
    "1e-38": lambda shape, dtype, g: (
        _randn(shape, torch.float64, g) * (1e-7 if dtype == torch.float16 else 1e-38)
    ).to(dtype),
    "1e30": lambda shape, dtype, g: (
        _randn(shape, torch.float64, g) * (1e4 if dtype == torch.float16 else 1e30)
    ).to(dtype),
    "range": _range,
    "ties": lambda shape, dtype, g: torch.randint(-2, 3, shape, generator=g).to(dtype),
    "equal": lambda shape, dtype, g: torch.full(shape, 0.5, dtype=dtype),
    "one-hot": lambda shape, dtype, g: torch.eye(shape[-1], dtype=dtype)[: shape[0]] * 3,
}


# --- layouts --------------------------------------------------------------------------------------


def transposed(t: Tensor) -> Tensor:
    """The same values with dimensions 0 and -1 swapped in memory."""
    return t.transpose(0, -1).contiguous().transpose(0, -1)


def strided(t: Tensor) -> Tensor:
    """The same values as every second element of the last dimension of a larger tensor."""
    wide = t.new_zeros(*t.shape[:-1], 2 * t.shape[-1])
    wide[..., ::2] = t
    return wide[..., ::2]


def expanded(t: Tensor) -> Tensor:
    """The first sample, for all samples (stride 0)."""
    return t[:1].expand(t.shape)


def shifted(t: Tensor) -> Tensor:
    """The same values one element into a larger buffer, so that no vector is aligned."""
    buffer = t.new_zeros(t.numel() + 1)
    buffer[1:] = t.flatten()
    return buffer[1:].view(t.shape)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": transposed,
    "strided": strided,
    "expanded": expanded,
    "shifted": shifted,
}


# --- groups ---------------------------------------------------------------------------------------


class Geometry(NamedTuple):
    """How a tensor is cut into groups; what the group ops have in common."""

    name: str
    shape: tuple[int, ...]
    group: str = "sample"
    offsets: tuple[int, ...] | None = None
    masked: float | None = None  # the share of rows that are masked out
    layout: str | None = None

    @property
    def groups(self) -> int:
        if self.offsets is not None:
            return len(self.offsets) - 1
        if self.group == "token":
            return math.prod(self.shape[:-1])
        return self.shape[0] if len(self.shape) > 1 else 1

    def tensor(self, dtype: torch.dtype, g: torch.Generator, values: str = "normal") -> Tensor:
        t = VALUES[values](self.shape, dtype, g)
        return LAYOUTS[self.layout](t) if self.layout else t

    def options(self, g: torch.Generator) -> dict[str, Any]:
        """The keywords of the cut: group or offsets, and mask."""
        options: dict[str, Any] = {}
        if self.offsets is not None:
            options["offsets"] = torch.tensor(self.offsets)
        elif self.group != "sample":
            options["group"] = self.group
        if self.masked is not None:
            options["mask"] = torch.rand(self.shape[:-1], generator=g) >= self.masked
        return options

    def per_group(self, low: float, high: float, g: torch.Generator) -> Tensor:
        return low + (high - low) * torch.rand(self.groups, generator=g)


BASE = (
    Geometry("sample", (4, 5, 6)),
    Geometry("token-masked", (4, 5, 6), group="token", masked=0.3),
    Geometry("ragged", (11, 6), offsets=(0, 3, 3, 7, 11)),
)
GEOMETRIES = (
    *BASE,
    Geometry("sample-masked", (4, 5, 6), masked=0.4),
    Geometry("sample-all-masked", (2, 3, 4), masked=1.0),
    Geometry("ragged-masked", (11, 6), offsets=(0, 0, 3, 4, 11, 11), masked=0.4),
    Geometry("ragged-3d", (2, 4, 5), offsets=(0, 1, 6, 8)),
    Geometry("rank-4", (2, 3, 4, 5)),
    Geometry("rank-4-token", (2, 3, 4, 5), group="token", masked=0.2),
    Geometry("vectors", (4, 8)),
    Geometry("column", (7, 1)),
    Geometry("5x123", (5, 123)),
    Geometry("3x7x13", (3, 7, 13)),
    Geometry("3x7x13-token", (3, 7, 13), group="token"),
    Geometry("short-rows", (301, 3)),
    Geometry("rows-of-64", (130, 64)),
    Geometry("long-rows", (2, 10007)),
    Geometry("long-sample", (3, 101, 67), masked=0.1),
    Geometry("1d", (9,)),
    Geometry("1d-masked", (9,), masked=1.0),
    Geometry("1d-token", (9,), group="token"),
    Geometry("0d", ()),
    Geometry("0d-token", (), group="token"),
    Geometry("no-samples", (0, 5, 3)),
    Geometry("no-rows", (3, 0, 2)),
    Geometry("no-width", (3, 2, 0)),
    Geometry("no-width-token", (3, 2, 0), group="token"),
    Geometry("nothing", (0,)),
    Geometry("no-groups", (0, 4), offsets=(0,)),
    Geometry("only-empty-groups", (0, 4), offsets=(0, 0, 0)),
    Geometry("transposed", (4, 5, 6), layout="transposed"),
    Geometry("strided", (4, 5, 6), group="token", layout="strided"),
    Geometry("expanded", (4, 5, 6), layout="expanded"),
    Geometry("shifted", (4, 37), layout="shifted"),
)

# What an op needs besides its tensors, as a function of the geometry.
Maker = Callable[[Geometry, torch.dtype, torch.Generator], dict[str, Any]]


def _centre(geometry: Geometry, dtype: torch.dtype, g: torch.Generator) -> Tensor:
    """A point of the unit cube, in multiples of 1/8: adding to it and taking it off is exact."""
    return torch.randint(1, 8, geometry.shape, generator=g).to(dtype) / 8


def _box(geometry: Geometry, dtype: torch.dtype, g: torch.Generator) -> dict[str, Any]:
    """Bounds round 0, some of them tight, some absent."""
    lower = -_rand(geometry.shape, dtype, g)
    upper = _rand(geometry.shape, dtype, g)
    lower = torch.where(torch.rand(geometry.shape, generator=g) < 0.2, -INF, lower)
    upper = torch.where(torch.rand(geometry.shape, generator=g) < 0.2, 0.0, upper)
    return {"lower": lower, "upper": upper}


def _mixed_eps(geometry: Geometry, g: torch.Generator) -> Tensor:
    """Per-group radii among which are 0, inf, a tiny one and ordinary ones."""
    eps = geometry.per_group(0.1, 2.0, g)
    for index, value in enumerate((0.0, INF, 1e-3)):
        eps[index + 1 :: 4] = value
    return eps


PLACES: dict[str, Maker] = {
    "eps-per-group": lambda geo, dtype, g: {"eps": _mixed_eps(geo, g)},
    "eps-per-group-double": lambda geo, dtype, g: {"eps": geo.per_group(0.1, 2, g).double()},
    "eps-0": lambda geo, dtype, g: {"eps": 0.0},
    "eps-inf": lambda geo, dtype, g: {"eps": INF},
    "eps-tiny": lambda geo, dtype, g: {"eps": 1e-6},
    "eps-large": lambda geo, dtype, g: {"eps": 1e4},
    "box": lambda geo, dtype, g: {"lower": -0.125, "upper": 0.25},
    "upper-only": lambda geo, dtype, g: {"upper": 0.0},
    "box-tensor": _box,
    "box-eps-inf": lambda geo, dtype, g: {**_box(geo, dtype, g), "eps": INF},
    "x0": lambda geo, dtype, g: {"x0": _centre(geo, dtype, g)},
    "x0-box": lambda geo, dtype, g: {"x0": _centre(geo, dtype, g), "lower": 0.0, "upper": 1.0},
    "x0-box-eps-per-group": lambda geo, dtype, g: {
        "x0": _centre(geo, dtype, g),
        "lower": torch.zeros(geo.shape, dtype=dtype),
        "upper": torch.ones(geo.shape, dtype=dtype),
        "eps": _mixed_eps(geo, g),
    },
}


def _radius(geometry: Geometry, norm: str) -> float:
    """A radius that roughly half of all standard normal groups exceed."""
    width = math.prod(geometry.shape) // max(geometry.groups, 1)
    return {"linf": 0.75, "l2": math.sqrt(max(width, 1)), "l1": 0.8 * max(width, 1)}[norm]


def _case(
    op: str, name: str, geometry: Geometry, make: Callable[[torch.dtype, torch.Generator], Call]
) -> Sample:
    return Sample(op, f"{name}/{geometry.name}", make)


def _project(op: str = "project") -> Iterator[Sample]:
    def sample(name: str, geo: Geometry, norm: str, extra: Maker, values: str = "normal") -> Sample:
        def build(dtype: torch.dtype, g: torch.Generator) -> Call:
            options = {"eps": _radius(geo, norm), "norm": norm, **geo.options(g)}
            x = geo.tensor(dtype, g, values)
            return Call([x], {**options, **extra(geo, dtype, g)})

        return _case(op, f"{norm}/{name}", geo, build)

    for norm in NORMS:
        for geo in GEOMETRIES:
            yield sample("plain", geo, norm, lambda geo, dtype, g: {})
            yield sample("half", geo, norm, lambda geo, dtype, g: {"eps": 0.5})
        for name, place in PLACES.items():
            for geo in BASE:
                yield sample(name, geo, norm, place)
        for values in VALUES:
            for eps in (1.0, 1e-3, 1e-30):
                yield sample(
                    f"{values}-{eps:g}",
                    Geometry("6x37", (6, 37)),
                    norm,
                    lambda geo, dtype, g, eps=eps: {"eps": eps},
                    values,
                )


def _gradient_options(norm: str) -> dict[str, Maker]:
    """Options of the steps beyond those of the ball."""
    options: dict[str, Maker] = {
        "steps-per-group": lambda geo, dtype, g: {"step_size": geo.per_group(0.0, 1.0, g)},
        "descent": lambda geo, dtype, g: {"step_size": -0.3},
        "step-0": lambda geo, dtype, g: {"step_size": 0.0},
    }
    if norm == "l1":
        for top in (3, 0.25, 1000):
            options[f"top-{top}"] = lambda geo, dtype, g, top=top: {"top": top}
    return options


def _grad_dtypes(dtype: torch.dtype) -> list[torch.dtype]:
    return [d for d in DTYPES if d != dtype]


def _step(op: str, momentum: bool = False) -> Iterator[Sample]:
    def sample(
        name: str,
        geo: Geometry,
        norm: str,
        extra: Maker,
        *,
        values: str = "normal",
        grad_dtype: torch.dtype | None = None,
        style: str = "mi",
        poison: bool = False,
    ) -> Sample:
        def build(dtype: torch.dtype, g: torch.Generator) -> Call:
            options = {
                "step_size": 0.3 * _radius(geo, norm),
                "eps": 0.8 * _radius(geo, norm),
                "norm": norm,
                **geo.options(g),
                **extra(geo, dtype, g),
            }
            delta = geo.tensor(dtype, g)
            if norm == "l1":
                delta = torch.where(delta.abs() > 0.7, delta, 0)
            if "x0" in options:
                delta = (options["x0"].double() + delta.double() / 8).to(dtype)
            grad = geo.tensor(grad_dtype or dtype, g, values)
            if poison:
                grad = grad.clone()
                grad.view(-1)[1::50] = NAN
                grad.view(-1)[30::97] = INF
                options["nonfinite"] = torch.zeros(geo.groups, dtype=torch.int32)
            if not momentum:
                return Call([delta, grad], options)
            options.update(decay=0.75, style=style)
            velocity = geo.tensor(dtype, g)
            if style == "apgd":
                velocity = (delta.double() + velocity.double() / 8).to(dtype)
            return Call([delta, velocity, grad], options)

        return _case(op, f"{norm}/{style}-{name}" if momentum else f"{norm}/{name}", geo, build)

    none: Maker = lambda geo, dtype, g: {}  # noqa: E731
    for norm in NORMS:
        for style in ("mi", "apgd") if momentum else ("mi",):
            for geo in GEOMETRIES:
                yield sample("plain", geo, norm, none, style=style)
            for name, place in {**PLACES, **_gradient_options(norm)}.items():
                for geo in BASE:
                    yield sample(name, geo, norm, place, style=style)
            for values in VALUES:
                geo = Geometry("6x37", (6, 37))
                yield sample(values, geo, norm, none, values=values, style=style)
            for geo in BASE:
                yield sample("nonfinite", geo, norm, none, poison=True, style=style)
                for grad_dtype in DTYPES:
                    name = f"grad-{str(grad_dtype).removeprefix('torch.')}"
                    yield sample(name, geo, norm, none, grad_dtype=grad_dtype, style=style)
        if momentum:
            continue
        for geo in (BASE[1], Geometry("token", (4, 5, 6), group="token"), GEOMETRIES[8]):
            for k in (1, 2, 5, 99):
                budget: Maker = lambda geo, dtype, g, k=k: {"max_groups": k}  # noqa: E731
                yield sample(f"budget-{k}", geo, norm, budget)
            yield sample(
                "budget-ties",
                geo,
                norm,
                lambda geo, dtype, g: {"max_groups": 2},
                values="equal",
            )
            yield sample(
                "budget-x0-box",
                geo,
                norm,
                lambda geo, dtype, g: {**PLACES["x0-box"](geo, dtype, g), "max_groups": 2},
            )


def _random_start() -> Iterator[Sample]:
    def sample(name: str, geo: Geometry, norm: str, extra: Maker) -> Sample:
        def build(dtype: torch.dtype, g: torch.Generator) -> Call:
            options = {"eps": 1.5, "norm": norm, **geo.options(g), **extra(geo, dtype, g)}
            return Call([geo.tensor(dtype, g)], options)

        return _case("random_start", f"{norm}/{name}", geo, build)

    for norm in NORMS:
        for geo in GEOMETRIES:
            yield sample("plain", geo, norm, lambda geo, dtype, g: {})
        for name, place in PLACES.items():
            for geo in BASE:
                if name == "eps-per-group":
                    finite: Maker = lambda geo, dtype, g: {  # noqa: E731
                        "eps": _mixed_eps(geo, g).nan_to_num(posinf=3.0)
                    }
                    yield sample(name, geo, norm, finite)
                elif not name.endswith(("inf", "eps-per-group")):
                    yield sample(name, geo, norm, place)


def _gaussian_noise() -> Iterator[Sample]:
    def sample(name: str, geo: Geometry, norm: str, extra: Maker) -> Sample:
        def build(dtype: torch.dtype, g: torch.Generator) -> Call:
            options = {"std": 0.5, "norm": norm, **geo.options(g), **extra(geo, dtype, g)}
            x = geo.tensor(dtype, g)
            if "x0" in options:
                x = (options["x0"].double() + x.double() / 8).to(dtype)
            return Call([x], options)

        return _case("gaussian_noise", f"{norm}/{name}", geo, build)

    for norm in NORMS:
        for geo in GEOMETRIES:
            yield sample("plain", geo, norm, lambda geo, dtype, g: {"eps": 0.7})
            if norm == "l2":
                yield sample("no-ball", geo, norm, lambda geo, dtype, g: {})
        for geo in BASE:
            for name, place in PLACES.items():
                yield sample(name, geo, norm, place)
            yield sample(
                "std-per-group",
                geo,
                norm,
                lambda geo, dtype, g: {"std": geo.per_group(0.0, 2.0, g)},
            )


def _group_norm() -> Iterator[Sample]:
    def sample(geo: Geometry, norm: str, values: str = "normal") -> Sample:
        def build(dtype: torch.dtype, g: torch.Generator) -> Call:
            return Call([geo.tensor(dtype, g, values)], {"norm": norm, **geo.options(g)})

        return _case("group_norm", f"{norm}/{values}", geo, build)

    for norm in NORMS:
        for geo in GEOMETRIES:
            yield sample(geo, norm)
        for values in VALUES:
            yield sample(Geometry("6x37", (6, 37)), norm, values)


# --- per-sample gradients -------------------------------------------------------------------------

_LISTS: dict[str, tuple[tuple[int, ...], ...]] = {
    "one": ((4, 6),),
    "mixed": ((5, 3, 4), (5,), (5, 7), (5, 1, 1, 2)),
    "odd": ((3, 7, 13), (3, 123)),
    "long": ((2, 10007), (2, 3)),
    "many": tuple((6, 1 + i % 5) for i in range(150)),
    "no-samples": ((0, 4), (0,)),
    "no-width": ((3, 0), (3, 2)),
    "nothing": ((3, 0),),
}


def _grad_list(
    shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype, g: torch.Generator, kind: str
) -> list[Tensor]:
    grads = [_randn(shape, dtype, g) for shape in shapes]
    if kind == "dtypes":
        order = (dtype, *_grad_dtypes(dtype))
        grads = [t.to(order[i % 4]) for i, t in enumerate(grads)]
    elif kind == "layouts":
        layouts = list(LAYOUTS.values())
        grads = [layouts[i % 4](t) if t.dim() > 1 else t for i, t in enumerate(grads)]
    elif kind == "poisoned":
        grads[0].view(len(grads[0]), -1)[1, 0] = NAN
        grads[-1].view(len(grads[-1]), -1)[2, -1] = INF
    elif kind == "one-zero":
        for t in grads:
            t[1] = 0
    elif kind in VALUES:
        grads = [VALUES[kind](t.shape, dtype, g) for t in grads]
    return grads


_LIST_KINDS = ("dtypes", "layouts", "poisoned", "one-zero", "zeros", "denormal", "1e-38", "range")


def _lists() -> Iterator[tuple[str, tuple[tuple[int, ...], ...], str]]:
    for name, shapes in _LISTS.items():
        yield name, shapes, "normal"
    for kind in (*_LIST_KINDS, "1e30"):
        yield f"mixed-{kind}", _LISTS["mixed"], kind


def _per_sample_norm() -> Iterator[Sample]:
    for name, shapes, kind in _lists():
        yield Sample(
            "per_sample_norm",
            name,
            lambda dtype, g, shapes=shapes, kind=kind: Call(
                [_grad_list(shapes, dtype, g, kind)], {}
            ),
        )


def _clip_and_sum() -> Iterator[Sample]:
    def sample(
        name: str, shapes: tuple[tuple[int, ...], ...], kind: str, options: dict[str, Any]
    ) -> Sample:
        def build(dtype: torch.dtype, g: torch.Generator) -> Call:
            grads = _grad_list(shapes, dtype, g, kind)
            kwargs = dict(options)
            if "weights" in kwargs:
                weights = _rand((len(grads[0]),), torch.float32, g)
                weights[1:2] = 0
                kwargs["weights"] = weights
            return Call([grads], kwargs)

        return Sample("clip_and_sum", name, build)

    for mode in ("flat", "per_layer", "automatic"):
        for name, shapes, kind in _lists():
            yield sample(f"{mode}/{name}", shapes, kind, {"max_norm": 2.0, "mode": mode})
        for kind in ("normal", "poisoned", "dtypes"):
            yield sample(
                f"{mode}/weights-{kind}",
                _LISTS["mixed"],
                kind,
                {"max_norm": 2.0, "mode": mode, "weights": True},
            )
        bounds = (0.0, 1e-3, 1e6) if mode == "automatic" else (0.0, 1e-3, 1e6, INF)
        for bound in bounds:
            for kind in ("one-zero", "poisoned"):
                yield sample(
                    f"{mode}/bound-{bound:g}-{kind}",
                    _LISTS["mixed"],
                    kind,
                    {"max_norm": bound, "mode": mode},
                )
    yield sample(
        "per_layer/bounds",
        _LISTS["mixed"],
        "normal",
        {"max_norm": [0.5, 0.1, INF, 0.0], "mode": "per_layer"},
    )
    yield sample(
        "automatic/gamma",
        _LISTS["mixed"],
        "normal",
        {"max_norm": 1.0, "mode": "automatic", "gamma": 2.0},
    )


def _linear_grad_norm() -> Iterator[Sample]:
    def sample(
        name: str,
        shape: tuple[int, ...],
        out: int,
        options: dict[str, Any],
        change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    ) -> Sample:
        def build(dtype: torch.dtype, g: torch.Generator) -> Call:
            a, b = _randn(shape, dtype, g), _randn((*shape[:-1], out), dtype, g)
            if change is not None:
                a, b = change(a, b)
            return Call([a, b], dict(options))

        return Sample("linear_grad_norm", name, build)

    shapes = {
        "2d": ((5, 7), 3),
        "3d": ((4, 6, 5), 3),
        "long": ((3, 67, 4), 5),
        "wide": ((3, 4, 65), 33),
        "4d": ((2, 3, 4, 5), 6),
        "one-token": ((4, 1, 6), 7),
        "odd": ((3, 7, 13), 123),
        "no-samples": ((0, 4, 5), 3),
        "no-tokens": ((3, 0, 5), 4),
        "no-inputs": ((3, 4, 0), 2),
        "no-outputs": ((3, 4, 2), 0),
    }
    for name, (shape, out) in shapes.items():
        for method in ("auto", "gram", "direct"):
            for bias in (False, True):
                yield sample(
                    f"{method}/{name}{'-bias' if bias else ''}",
                    shape,
                    out,
                    {"method": method, "bias": bias},
                )
    yield sample("zeros", (3, 4, 5), 2, {}, lambda a, b: (a * 0, b))
    yield sample("small", (3, 4, 5), 2, {}, lambda a, b: (a, b * 2.0**-14))
    yield sample("transposed", (3, 4, 5), 2, {}, lambda a, b: (transposed(a), transposed(b)))
    yield sample("expanded", (3, 4, 5), 2, {}, lambda a, b: (expanded(a), b))
    yield sample(
        "mixed-dtypes",
        (3, 4, 5),
        2,
        {},
        lambda a, b: (a, b.to(torch.bfloat16 if a.dtype == torch.float32 else torch.float32)),
    )


# --- embedding tables -----------------------------------------------------------------------------


def _indices(shape: tuple[int, ...], rows: int, g: torch.Generator) -> Tensor:
    return torch.randint(0, rows, shape, generator=g)


def _embedding_grad_norm() -> Iterator[Sample]:
    def plain(
        name: str,
        shape: tuple[int, ...],
        dim: int,
        rows: int,
        options: dict[str, Any],
        layout: Callable[[Tensor], Tensor] | None = None,
    ) -> Sample:
        def build(dtype: torch.dtype, g: torch.Generator) -> Call:
            indices = _indices(shape, rows, g)
            grad = _randn((*shape, dim), dtype, g)
            if layout is not None:
                indices, grad = layout(indices), layout(grad)
            return Call([indices, grad], dict(options))

        return Sample("embedding_grad_norm", name, build)

    def bag(name: str, offsets: list[int], count: int, options: dict[str, Any]) -> Sample:
        def build(dtype: torch.dtype, g: torch.Generator) -> Call:
            indices = _indices((count,), 4, g)
            kwargs = dict(options, offsets=torch.tensor(offsets, dtype=torch.int64))
            bags = len(offsets) - (1 if kwargs.pop("ends") else 0)
            if "per_sample_weights" in kwargs:
                kwargs["per_sample_weights"] = _randn((count,), dtype, g)
            return Call([indices, _randn((bags, 6), dtype, g)], kwargs)

        return Sample("embedding_grad_norm", f"bag/{name}", build)

    yield plain("distinct", (4, 5), 6, 10**12, {})
    yield plain("repeated", (4, 9), 6, 3, {})
    yield plain("all-the-same", (4, 9), 6, 1, {})
    yield plain("padding", (4, 9), 6, 3, {"padding_idx": 0})
    yield plain("all-padding", (4, 9), 6, 1, {"padding_idx": 0})
    yield plain("one-token", (5, 1), 7, 3, {})
    yield plain("no-token-dim", (5,), 7, 3, {})
    yield plain("3d", (3, 2, 5), 4, 4, {"padding_idx": 1})
    yield plain("odd", (3, 123), 13, 20, {})
    yield plain("long", (2, 1000), 3, 100, {})
    yield plain("wide", (2, 17), 300, 5, {})
    yield plain("no-samples", (0, 4), 6, 3, {})
    yield plain("no-tokens", (3, 0), 6, 3, {})
    yield plain("no-width", (3, 4), 0, 3, {})
    yield plain("transposed", (4, 9), 6, 3, {}, transposed)
    yield plain("expanded", (4, 9), 6, 3, {}, expanded)
    for mode in ("sum", "mean"):
        for padding in (None, 1):
            options = {"mode": mode, "padding_idx": padding}
            suffix = f"{mode}{'' if padding is None else '-padding'}"
            yield bag(f"ends-{suffix}", [0, 3, 3, 9, 17], 17, {**options, "ends": True})
            yield bag(f"starts-{suffix}", [0, 3, 3, 9], 17, {**options, "ends": False})
            yield bag(f"none-{suffix}", [0], 0, {**options, "ends": True})
            yield bag(f"empty-{suffix}", [0, 0, 0], 0, {**options, "ends": True})
    yield bag("weights", [0, 3, 3, 9, 17], 17, {"ends": True, "per_sample_weights": True})
    yield bag(
        "weights-padding",
        [0, 3, 3, 9],
        17,
        {"ends": False, "per_sample_weights": True, "padding_idx": 2},
    )


def _embedding_grad_sum() -> Iterator[Sample]:
    def sample(
        name: str,
        shape: tuple[int, ...],
        dim: int,
        rows: int,
        *,
        weights: torch.dtype | None = None,
        padding: int | None = None,
        drawn: int | None = None,
        layout: Callable[[Tensor], Tensor] | None = None,
    ) -> Sample:
        """drawn: how many of the rows occur, where not all do."""

        def build(dtype: torch.dtype, g: torch.Generator) -> Call:
            indices = _indices(shape, rows if drawn is None else drawn, g)
            grad = _randn((*shape, dim), dtype, g)
            if layout is not None:
                indices, grad = layout(indices), layout(grad)
            options: dict[str, Any] = {"padding_idx": padding}
            if weights is not None:
                options["weights"] = _randn(shape[:1], weights, g)
                options["weights"][1:2] = 0
            return Call([indices, grad, rows], options)

        return Sample("embedding_grad_sum", name, build)

    f32 = torch.float32
    yield sample("distinct", (4, 5), 6, 500)
    yield sample("repeated", (4, 9), 6, 3)
    yield sample("all-the-same", (8, 11), 6, 1)
    yield sample("untouched", (4, 9), 6, 40, weights=f32, drawn=7)
    yield sample("padding", (4, 9), 6, 3, padding=0)
    yield sample("padding-weights", (4, 9), 6, 3, padding=2, weights=f32)
    yield sample("padding-of-none", (4, 9), 6, 9, padding=8, weights=f32, drawn=7)
    yield sample("all-padding", (8, 11), 6, 1, padding=0, weights=f32)
    yield sample("1d", (9,), 7, 3)
    yield sample("1d-weights", (9,), 7, 3, weights=f32)
    yield sample("one-token", (5, 1), 7, 3, weights=f32)
    yield sample("3d", (3, 2, 5), 4, 4, padding=1, weights=f32)
    yield sample("0d", (), 4, 3)
    yield sample("0d-padding", (), 4, 1, padding=0)
    for dim in (1, 8, 13, 16, 32, 48, 64, 100, 300):
        yield sample(f"{dim}-columns", (3, 7), dim, 5)
        yield sample(f"{dim}-columns-weights", (3, 7), dim, 5, weights=f32)
    yield sample("long", (30, 30), 3, 100, weights=f32)
    yield sample("many-rows", (6, 20), 5, 70_000, weights=f32, padding=3)
    yield sample("no-samples", (0, 4), 6, 3, weights=f32)
    yield sample("no-tokens", (3, 0), 6, 3, weights=f32)
    yield sample("no-tokens-3d", (3, 0, 2), 6, 3)
    yield sample("no-width", (3, 4), 0, 3, weights=f32)
    yield sample("no-rows", (0,), 6, 0, drawn=1)
    yield sample("no-rows-weights", (3, 0), 6, 0, weights=f32, drawn=1)
    for name in ("transposed", "expanded"):
        yield sample(name, (4, 9), 6, 3, layout=LAYOUTS[name])
        yield sample(f"{name}-weights", (4, 9), 16, 3, weights=f32, layout=LAYOUTS[name])
    for dtype in DTYPES:
        yield sample(f"weights-{str(dtype).removeprefix('torch.')}", (4, 9), 6, 3, weights=dtype)


def _embedding_perturb() -> Iterator[Sample]:
    def sample(
        name: str,
        shape: tuple[int, ...],
        *,
        rows: int = 11,
        dim: int = 6,
        moved: int = 5,
        delta_dtype: torch.dtype | None = None,
        layout: Callable[[Tensor], Tensor] | None = None,
    ) -> Sample:
        def build(dtype: torch.dtype, g: torch.Generator) -> Call:
            weight = _randn((rows, dim), dtype, g)
            delta = _randn((moved, dim), delta_dtype or dtype, g)
            inverse = torch.randint(-1, moved, shape, generator=g)
            if layout is not None:
                weight, delta = layout(weight), layout(delta)
            return Call([weight, _indices(shape, rows, g), delta, inverse], {})

        return Sample("embedding_perturb", name, build)

    yield sample("2d", (4, 5))
    yield sample("1d", (9,))
    yield sample("0d", ())
    yield sample("3d", (2, 3, 4), dim=13)
    yield sample("odd", (3, 41), dim=123, rows=7)
    yield sample("many", (700,), rows=50, dim=8, moved=20)
    yield sample("no-delta", (4, 5), moved=0)
    yield sample("no-indices", (4, 0))
    yield sample("no-width", (4, 5), dim=0)
    yield sample("transposed", (4, 5), layout=transposed)
    yield sample("expanded", (4, 5), layout=expanded)
    for dtype in DTYPES:
        yield sample(f"delta-{str(dtype).removeprefix('torch.')}", (4, 5), delta_dtype=dtype)


def _rowwise_adagrad() -> Iterator[Sample]:
    def sample(
        name: str,
        shape: tuple[int, ...],
        *,
        rows: int = 11,
        dim: int = 6,
        grad_dtype: torch.dtype | None = None,
        values: str = "normal",
        poison: bool = False,
        **options: float,
    ) -> Sample:
        def build(dtype: torch.dtype, g: torch.Generator) -> Call:
            state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
            weight = _randn((rows, dim), dtype, g)
            state = _rand((rows,), state_dtype, g)
            grad = VALUES[values]((*shape, dim), grad_dtype or dtype, g)
            if poison:
                grad[..., 0].view(-1)[2] = NAN
            return Call([weight, state, _indices(shape, rows, g), grad], {"lr": 0.1, **options})

        return Sample("rowwise_adagrad_", name, build)

    yield sample("distinct-mostly", (9,), rows=1000)
    yield sample("repeated", (40,), rows=5)
    yield sample("2d", (4, 5))
    yield sample("0d", ())
    yield sample("clipped", (4, 5), max_norm=0.5)
    yield sample("clipped-0", (4, 5), max_norm=0.0)
    yield sample("clipped-inf", (4, 5), max_norm=INF)
    yield sample("odd", (41,), dim=123)
    yield sample("many", (900,), rows=50, dim=8)
    yield sample("zeros", (6,), values="zeros")
    yield sample("poisoned", (30,), rows=8, poison=True, max_norm=1.0)
    yield sample("eps", (6,), eps=0.1)
    yield sample("no-indices", (0,))
    yield sample("no-width", (4,), dim=0)
    for dtype in DTYPES:
        yield sample(f"grad-{str(dtype).removeprefix('torch.')}", (4, 5), grad_dtype=dtype)


# --- the table ------------------------------------------------------------------------------------

_TABLE: dict[str, Callable[[], Iterator[Sample]]] = {
    "pgd_step": lambda: _step("pgd_step"),
    "project": _project,
    "random_start": _random_start,
    "gaussian_noise": _gaussian_noise,
    "momentum_step": lambda: _step("momentum_step", momentum=True),
    "group_norm": _group_norm,
    "per_sample_norm": _per_sample_norm,
    "clip_and_sum": _clip_and_sum,
    "linear_grad_norm": _linear_grad_norm,
    "embedding_grad_norm": _embedding_grad_norm,
    "embedding_grad_sum": _embedding_grad_sum,
    "embedding_perturb": _embedding_perturb,
    "rowwise_adagrad_": _rowwise_adagrad,
}
OPS = tuple(_TABLE)
GROUP_OPS = OPS[:6]
WRITING = {"pgd_step_": 1, "project_": 1, "gaussian_noise_": 1, "momentum_step_": 2}
"""The in-place forms and how many of their first arguments they write."""


@cache
def for_op(op: str) -> tuple[Sample, ...]:
    """The samples of an op of embattle.ops, functional or in place."""
    return tuple(_TABLE[op.removesuffix("_") if op in WRITING else op]())
