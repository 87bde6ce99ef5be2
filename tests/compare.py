"""How results are run and compared: shared by the tests of the ops, the emulator and devices."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from typing import Any

import samples
import torch
from embattle import ops, reference
from embattle.ops.reference.groups import Groups, max_of, norm_name, norms_of
from samples import PRECISIONS, Call
from torch import Tensor

SEED = 1234


def run(op: str, call: Call, source: Any = ops) -> list[Tensor]:
    """Runs an op and returns its results as a flat list of tensors.

    Args:
        op: the name of a function of `source`.
        call: its arguments; random ops get a generator seeded with SEED.
        source: embattle.ops, or embattle.ops.reference.
    """
    function = getattr(source, op)
    kwargs = dict(call.kwargs)
    if op.startswith(("random_start", "gaussian_noise")):
        kwargs["generator"] = torch.Generator().manual_seed(SEED)
    result = function(*call.args, **kwargs)
    if op == "rowwise_adagrad_":
        return [result, call.args[1]]
    if isinstance(result, Tensor):
        return [result]
    return [t for part in result for t in (part if isinstance(part, list) else [part])]


def expected(op: str, call: Call) -> list[Tensor]:
    """What the reference says, in float64 where the op's random numbers do not depend on dtype."""
    if op in ("random_start", "gaussian_noise"):
        return run(op, call.clone(), reference)
    return run(op, copy.deepcopy(call.double()), reference)


def groups_of(call: Call) -> Groups:
    """The groups of the first argument of a group op's call."""
    options = call.kwargs
    return Groups.of(
        call.args[0],
        options.get("group", "sample"),
        options.get("offsets"),
        options.get("mask"),
    )


def distances(call: Call, result: Tensor) -> Tensor:
    """[groups] float64: the norm of what a group op's result adds to its origin, as stored."""
    groups = groups_of(call)
    stored = groups.pack(result)
    if "x0" in call.kwargs:
        stored = stored - groups.pack(call.kwargs["x0"])
    return norms_of(stored, norm_name(call.kwargs.get("norm", "l2")))[:, 0]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal values, NaN equal to NaN, and equal dtype and shape."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return bool(((a == b) | ((a != a) & (b != b))).all())


def assert_close(actual: Tensor, wanted: Tensor, scale: Tensor, terms: int, what: str) -> None:
    """Every element is within the tolerance of its dtype, relative to |wanted| + scale.

    Args:
        actual: what an op returned.
        wanted: float64 (or the dtype of actual), the reference's value.
        scale: float64, broadcastable: what errors of sums are relative to.
        terms: how many numbers the op sums.
        what: said on failure.
    """
    assert actual.shape == wanted.shape, f"{what}: shape {actual.shape}, not {wanted.shape}"
    if not actual.numel():
        return
    precision = PRECISIONS[actual.dtype]
    # The unit of subnormals is that of the smallest normal number.
    size = (wanted.double().abs() + scale).clamp_min(torch.finfo(actual.dtype).tiny)
    bound = precision.tolerance(terms) * size + 4 * precision.least
    special = ~wanted.to(actual.dtype).isfinite()
    same = wanted.to(actual.dtype).double().nan_to_num(nan=4.0) == actual.double().nan_to_num(nan=4)
    good = torch.where(special, same, (actual.double() - wanted.double()).abs() <= bound)
    if good.all():
        return
    where = tuple(int(i) for i in (~good).nonzero()[0])
    error = (actual.double() - wanted.double()).abs() / (wanted.double().abs() + scale)
    worst = float(torch.where(special, 0.0, error).nan_to_num(nan=math.inf).max())
    ulps, allowed = worst / precision.unit, precision.tolerance(terms) / precision.unit
    raise AssertionError(
        f"{what}: {int((~good).sum())} of {good.numel()} elements are off, first at {where}: "
        f"{actual[where].item()!r} for {wanted[where].item()!r}; worst relative error "
        f"{ulps:.3g} ulp, allowed {allowed:.3g}"
    )


def _drawn(op: str, call: Call) -> Tensor | None:
    """What the ball of a call that draws normal numbers is given; None where it draws none."""
    options = {k: v for k, v in call.kwargs.items() if k in ("std", "group", "offsets", "mask")}
    if op == "random_start" and norm_name(call.kwargs.get("norm", "l2")) == "l2":
        return expected("gaussian_noise", Call([call.args[0] * 0], options | {"std": 1.0}))[0]
    if op != "gaussian_noise":
        return None
    origin = call.kwargs.get("x0", 0)
    return expected(op, Call(call.args[:1], options))[0] - origin


def _away_from_bounds(call: Call, wanted: Tensor) -> Tensor:
    """What is added to the origin by elements of a result that are not at a bound; others: 0."""
    added = wanted.double() - call.kwargs.get("x0", torch.zeros_like(wanted)).double()
    for bound in (call.kwargs.get("lower"), call.kwargs.get("upper")):
        if bound is not None:
            added = torch.where(wanted == bound, 0.0, added)
    return added


def _group_scale(op: str, call: Call, wanted: Tensor, unit: float) -> tuple[Tensor, int]:
    """Per element: the largest magnitude in its group, of the result or the point it came from."""
    groups, norm = groups_of(call), norm_name(call.kwargs.get("norm", "l2"))
    precision, width = PRECISIONS[call.args[0].dtype], groups.valid.shape[1]
    allowed = precision.tolerance(width)
    size = max_of(groups.pack(wanted).abs().nan_to_num(posinf=0.0))
    start = groups.pack(call.args[0])
    if "x0" in call.kwargs:
        start = start - groups.pack(call.kwargs["x0"])
    start = max_of(start.abs().nan_to_num(posinf=0.0))
    eps = call.kwargs.get("eps")
    radius = groups.column(math.inf if eps is None else eps)
    if eps is not None:
        size = torch.maximum(size, torch.minimum(start, radius))
    drawn = _drawn(op, call)
    if drawn is not None:
        # What was given and what was drawn, at best in float32, may cancel: two units of them. An
        # l2 ball scales what is left of them with the whole group.
        length = norms_of(groups.pack(drawn), "l2")
        summed, kept = 6 * groups.column(call.kwargs.get("std", 1.0)), radius
        if op == "gaussian_noise":
            summed, kept = summed + start, torch.minimum(radius, length)
        share = 2 * min(precision.unit, 2.0**-23) / allowed
        scaled = summed * (kept / length).nan_to_num(0.0) if norm == "l2" else summed
        size = size + share * scaled
    if norm == "l2" and eps is not None and {"lower", "upper"} & call.kwargs.keys():
        # A bound may leave little of the ball to the others: the search's last units of its square.
        free = norms_of(groups.pack(_away_from_bounds(call, wanted)), "l2")
        most = torch.minimum(radius.square() / free, 2.0**26 * radius).nan_to_num(0.0)
        size = size + 2.0**-50 / allowed * most
    if "x0" in call.kwargs:  # what is added to the origin may cancel it
        added = wanted.double() - call.kwargs["x0"].double()
        size = torch.maximum(size, max_of(groups.pack(added).abs().nan_to_num(posinf=0.0)))
    if norm != "l1" and unit > 2.0**-53 and op in ("pgd_step", "momentum_step"):
        # A step may lead from far outside to the inside of a ball, which takes nothing off then.
        far = groups.pack(wanted).abs() if norm == "linf" else norms_of(groups.pack(wanted), norm)
        size = size + torch.where(far < 0.999 * radius, 2 * unit / allowed * start, 0.0)
    if norm == "l1" and (unit > 2.0**-53 or {"x0", "lower", "upper"} & call.kwargs.keys()):
        # What is left of large numbers when a threshold or an origin is taken off them.
        size = size + 8 * unit / allowed * start
    return groups.unpack(size.expand(-1, width), torch.zeros_like(wanted.double())), width


def assert_matches_reference(
    op: str, call: Call, results: list[Tensor], unit: float = 2.0**-53
) -> None:
    """Compares the results of an op with the reference's.

    Args:
        op: its name; for an in-place form that of the functional one.
        call: the arguments it had (not those that an in-place form has written).
        results: as :func:`run` returns them.
        unit: of the arithmetic: CUDA's is float32 but for float64.
    """
    wanted = expected(op, call)
    assert len(results) == len(wanted)
    scales: list[tuple[Tensor, int]]
    if op in ("pgd_step", "project", "random_start", "gaussian_noise", "momentum_step"):
        scales = [
            _group_scale("velocity" if i else op, call, w, unit) for i, w in enumerate(wanted)
        ]
        style = call.kwargs.get("style", "mi") if op == "momentum_step" else None
        norm = norm_name(call.kwargs.get("norm", "l2"))
        if style == "mi" and norm != "l2":
            # Whether a velocity that vanishes moves its coordinate (l1: or is one of the `top` of
            # its group) is anyone's, but for one that both say is zero.
            single = unit > 2.0**-53 and results[0].dtype != torch.float64
            tiny = torch.finfo(torch.float32 if single else torch.float64).tiny
            vanishing = wanted[1].double().abs() < tiny
            vanishing &= (wanted[1] != 0) | (results[1] != 0)
            if norm == "l1":
                groups = groups_of(call)
                whole = groups.pack(vanishing.double()).any(1, keepdim=True).double()
                width = groups.valid.shape[1]
                vanishing = groups.unpack(whole.expand(-1, width), torch.zeros_like(wanted[1])) > 0
            known = torch.where(vanishing, wanted[0].double(), results[0].double())
            results = [known.to(results[0].dtype), *results[1:]]
        if style == "apgd":  # the result is a sum of three
            scales[0] = (scales[0][0] + call.args[1].double().abs().nan_to_num(), scales[0][1])
        if style is not None:  # the old velocity and the new gradient's share may cancel
            scales[1] = (scales[1][0] + call.args[1].double().abs().nan_to_num() + 1, scales[1][1])
    elif op == "clip_and_sum":
        # relative to the sum of magnitudes
        sizes = call.double().map(torch.abs)
        sums = expected(op, sizes)[:-1]
        terms = sum(math.prod(g.shape[1:]) for g in call.args[0])
        batch = len(call.args[0][0])
        scales = [(s, max(batch, terms)) for s in sums] + [(torch.zeros(()).double(), terms)]
    elif op == "embedding_perturb":
        weight, indices, delta, inverse = call.args
        sizes = Call([weight.abs(), indices, delta.abs(), inverse], {})
        scales = [(expected(op, sizes)[0], 1)]
    elif op == "embedding_grad_sum":
        count = call.args[0].numel()
        scales = [(expected(op, call.double().map(torch.abs))[0], count)]
    elif op == "rowwise_adagrad_":
        before, terms = call.args[0].double(), call.args[3].numel()
        # Where what a row gets cancels, sums in doubles lose this share of it; all, and anything is
        # right.
        rows = call.args[2].reshape(-1)
        grads = call.args[3].double().reshape(len(rows), before.shape[1])
        sums = [torch.zeros_like(before).index_add(0, rows, g) for g in (grads, grads.abs())]
        total, sizes = (s.norm(dim=1) for s in sums)
        lost = (2.0**-50 * sizes / total).nan_to_num(0.0, posinf=0.0)
        anything = lost > 1e-3
        results = [r.clone() for r in results]
        for result, want in zip(results, wanted, strict=True):
            result[anything] = want[anything].to(result.dtype)
        moved = (wanted[0] - before).abs()
        allowed = [PRECISIONS[r.dtype].tolerance(terms) for r in results]
        scales = [(before.abs() + moved + (lost / allowed[0])[:, None] * moved, terms)]
        scales.append((2 * lost / allowed[1] * wanted[1].double(), terms))
    elif op == "linear_grad_norm":
        # Products may cancel, which doubles then sum.
        terms = sum(t.numel() for t in _tensors(call.args))
        lost = 2.0**-50 / PRECISIONS[results[0].dtype].tolerance(terms)
        sizes = expected(op, call.double().map(torch.abs))[0]
        scales = [(lost * sizes.nan_to_num(posinf=0.0), terms)]
    else:  # norms
        terms = sum(t.numel() for t in _tensors(call.args))
        scales = [(torch.zeros(()).double(), terms)]
    for index, (result, want, (scale, terms)) in enumerate(
        zip(results, wanted, scales, strict=True)
    ):
        assert_close(result, want, scale, terms, f"{op}, result {index}, {result.dtype}")


def _tensors(args: list[Any]) -> list[Tensor]:
    return [t for a in args for t in (a if isinstance(a, list) else [a])]


def raw_calls(function: Callable[[], Any]) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """The calls of torch.ops.embattle that a Python function makes, in order."""
    from torch.utils._python_dispatch import TorchDispatchMode

    calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            kwargs = kwargs or {}
            if func.namespace == "embattle":
                copied = torch.utils._pytree.tree_map_only(
                    Tensor, lambda t: t.detach().clone(), (args, kwargs)
                )
                calls.append((func, *copied))
            return func(*args, **kwargs)

    with Record():
        function()
    return calls


def accepts(op: str, keyword: str) -> bool:
    """Whether an op of embattle.ops has a keyword."""
    return keyword in inspect.signature(getattr(ops, op)).parameters


__all__ = [
    "SEED",
    "accepts",
    "assert_close",
    "assert_matches_reference",
    "distances",
    "expected",
    "groups_of",
    "raw_calls",
    "run",
    "same_bits",
    "samples",
]
