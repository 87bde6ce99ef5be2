"""The worst that swaps of categorical values do to a factorisation machine or a linear model.

The attacker replaces the values of at most k fields of a row by any others of the same fields.
With `y` = 1 or -1 for the row's class, a swap of field f to x adds to the margin `y logit`

    A_f(x) = y (w_f(x) - w_f(now) + <D_f(x), sum of the other fields' vectors>),

where `D_f(x)` is what it changes the field's vector by, and two swaps together also
`y <D_f(x), D_g(z)>`. (Insert `v + D` into the pairs of Rendle's eq. 1.)

Without vectors (linear) the swaps do not meet, and the k best fields are the exact answer. With
vectors they do, and choosing them is hard in general; no dynamic program over the fields is exact,
as a swap's worth depends on all the others. Instead each pair's worth is shared between its two
swaps. Whatever the other swaps are, a swap adds at least

    A_f(x) + 1/2 sum over the k - 1 worst other fields g of min(0, min_z y <D_f(x), D_g(z)>),

so that the sum of the k least of these, one for each field, is a **bound** (`swap_bounds`), exact
for k = 1 and for linear models. `worst_swaps` finds the **exact** worst margin by branch and bound
with it: it extends sets of swaps, field by field, and drops those that cannot get below the worst
margin found. It stops after `nodes` sets and then returns what is proven, and says so.

Liu et al., "Certifiable Robustness to Discrete Adversarial Perturbations for Factorization
Machines", SIGIR 2020, bound the same for features that are added; sharing pairs is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embattle import checks
from embattle.certify.margins import rounding
from embattle.models.fm import FM

Floats: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class Swaps:
    """The worst margins of B rows under at most k swaps.

    Attributes:
        margins: `[B]` float64; above 0 the row keeps its class. Never more than the true worst
            margin: rounding goes down.
        exact: `[B]` bool: it is the worst margin (up to rounding). Elsewhere it is a lower bound.
        values: `[B, fields]` int64: the worst row that was found. Where `exact`, its margin is it.
    """

    margins: Tensor
    exact: Tensor
    values: Tensor


@dataclass(frozen=True)
class _Row:
    """What swaps of one row add; V counts the values of all fields.

    Attributes:
        own: [V] what a swap to a value adds alone; 0 at the values that the row has.
        delta: [V, d] what it changes the field's vector by.
        sign: y.
        margin: before any swap.
        off: what rounding may have changed of the margin with swaps, at most.
    """

    own: Floats
    delta: Floats
    sign: float
    margin: float
    off: float


class _Model:
    """Weights in float64, fields one after the other."""

    def __init__(self, model: FM, fields: list[int]) -> None:
        sizes = model.first.sizes
        wrong = [f for f in fields if not 0 <= f < len(sizes)]
        if wrong or not fields or len(set(fields)) < len(fields):
            raise ValueError(
                f"swaps: fields must be one or more different numbers in [0, {len(sizes)}), got "
                f"{fields}"
            )
        self.start = np.cumsum([0, *sizes[:-1]])
        self.sizes = np.array(sizes)
        self.weight = _array(model.first.weight)[:, 0]
        width = (len(self.weight), 0)
        self.vectors = (
            np.zeros(width) if model.embedding is None else _array(model.embedding.weight)
        )
        self.bias = float(model.bias.detach())
        if not all(np.isfinite(x).all() for x in (self.weight, self.vectors, self.bias)):
            raise ValueError("swaps: the model's weights are not finite; nothing holds for them")
        self.fields = sorted(fields)
        self.field_of = np.repeat(np.arange(len(sizes)), sizes)
        self.fixed = ~np.isin(self.field_of, fields)

    def row(self, values: NDArray[np.int64], sign: float) -> _Row:
        now = self.start + values
        vectors = self.vectors[now]
        total = vectors.sum(0)
        pairs = (total @ total - (vectors * vectors).sum()) / 2
        margin = sign * (self.bias + self.weight[now].sum() + pairs)
        place = now[self.field_of]
        delta = self.vectors - self.vectors[place]
        others = total - vectors[self.field_of]
        own = sign * (self.weight - self.weight[place] + (delta * others).sum(1))
        own[self.fixed] = 0
        delta = np.where(self.fixed[:, None], 0, delta)
        longest = np.sqrt((self.vectors**2).sum(1)).max(initial=0) * len(values)
        size = abs(self.bias) + len(values) * 2 * np.abs(self.weight).max() + 2 * longest**2
        off = rounding(len(values) * (1 + delta.shape[1])) * size
        return _Row(own, delta, sign, float(margin), float(off))

    def least(self, of: Floats) -> Floats:
        """The least of each field's values: [..., V] to [..., fields]."""
        found: Floats = np.minimum.reduceat(of, self.start, axis=-1)
        return found

    def shared(self, row: _Row, k: int) -> list[Floats]:
        """For r = 1..k swaps: [V] the least that a swap adds as one of r."""
        if k == 1 or not row.delta.shape[1]:
            return [row.own] * k
        half = np.empty((len(row.own), len(self.sizes)))
        for rows in np.array_split(np.arange(len(half)), max(1, len(half) ** 2 // 4_000_000)):
            half[rows] = self.least(row.sign * row.delta[rows] @ row.delta.T)
        half[np.arange(len(half)), self.field_of] = 0
        half = np.sort(np.minimum(half, 0), axis=1)[:, : k - 1] / 2
        more = np.cumsum(half, axis=1)
        more = np.concatenate([np.zeros((len(half), 1)), more], axis=1)
        # A swap to the value that is there already is none, whatever the others are.
        last = more.shape[1] - 1
        return [row.own + more[:, min(r, last)] for r in range(k)]


def swap_bounds(
    model: FM, values: Tensor, labels: Tensor, k: int, *, fields: list[int] | None = None
) -> Tensor:
    """Give a lower bound of each row's margin under at most k swaps, `[B]` float64.

    Exact for a linear model and for k = 1. It takes the square of the number of values a row where
    there are vectors and k is above 1.

    Args:
        model: a factorisation machine, or a linear model (`dim=0`).
        values: `[B, fields]` int64.
        labels: `[B]`, 0 or 1.
        k: how many fields may be swapped.
        fields: which ones; None: any.

    Raises:
        ValueError: arguments that do not fit.
    """
    of, rows, signs = _checked(model, values, labels, k, fields)
    k = min(k, len(of.fields))
    found = []
    for row, sign in zip(rows, signs, strict=True):
        at = of.row(row, sign)
        found.append(at.margin + _least_sum(of.least(of.shared(at, k)[-1]), k) - at.off)
    return torch.tensor(found, dtype=torch.float64)


def worst_swaps(
    model: FM,
    values: Tensor,
    labels: Tensor,
    k: int,
    *,
    fields: list[int] | None = None,
    nodes: int = 20_000,
) -> Swaps:
    """Give the worst margins of rows under at most k swaps of values, and the swaps.

    Args:
        model, values, labels, k, fields: see `swap_bounds`.
        nodes: sets of swaps that are looked at for a row at most, after which what is proven by
            then is returned as a bound.

    Raises:
        ValueError: arguments that do not fit.
    """
    of, rows, signs = _checked(model, values, labels, k, fields)
    nodes = checks.integer("worst_swaps", "nodes", nodes, 1)
    k = min(k, len(of.fields))
    margins, exact, worst = [], [], []
    for row, sign in zip(rows, signs, strict=True):
        at = of.row(row, sign)
        search = _Search(of, at, k, nodes)
        margins.append(search.proven() - at.off)
        exact.append(search.unopened == np.inf)
        changed = row.copy()
        for value in search.swaps:
            field = of.field_of[value]
            changed[field] = value - of.start[field]
        worst.append(changed)
    return Swaps(
        torch.tensor(margins, dtype=torch.float64),
        torch.tensor(exact),
        torch.from_numpy(np.stack(worst)) if worst else values.clone(),
    )


class _Search:
    """Branch and bound over sets of swaps, the most promising of a set's extensions first.

    Attributes:
        best: the worst margin found.
        swaps: the values (numbered over all fields) that gave it.
        unopened: the least bound of the sets that were not looked at; infinite if all were.
    """

    def __init__(self, of: _Model, row: _Row, k: int, nodes: int) -> None:
        self.of, self.row, self.left = of, row, nodes
        self.best, self.unopened = row.margin, np.inf
        self.swaps: list[int] = []
        self.shared = of.shared(row, k)
        if row.delta.shape[1]:
            self._extend([], row.margin, np.zeros(row.delta.shape[1]), k)
        else:
            self._choose(k)

    def proven(self) -> float:
        return min(self.best, self.unopened)

    def _extend(self, chosen: list[int], margin: float, moved: Floats, left: int) -> None:
        """Look at all sets that have up to `left` swaps more, of fields after the last one's."""
        of, row = self.of, self.row
        meeting = row.sign * (row.delta @ moved)
        first = of.field_of[chosen[-1]] + 1 if chosen else 0
        from_ = of.start[first] if first < len(of.start) else len(row.own)
        alone = margin + row.own[from_:] + meeting[from_:]
        if not len(alone):
            return
        least = int(alone.argmin())
        if alone[least] < self.best:
            self.best, self.swaps = float(alone[least]), [*chosen, from_ + least]
        if left == 1:
            return
        ahead = self.shared[left - 1] + meeting
        fields = of.least(ahead)
        # What up to left - 1 fields after each one can still add.
        rest = np.zeros(len(fields))
        for f in range(first, len(fields)):
            rest[f] = _least_sum(fields[f + 1 :], left - 1)
        bounds = margin + ahead[from_:] + rest[of.field_of[from_:]]
        order = np.argsort(bounds, kind="stable")
        for place in order.tolist():
            if bounds[place] >= self.best:
                return
            value = from_ + place
            if self.of.fixed[value] or (row.own[value] == 0 and not row.delta[value].any()):
                continue  # no swap
            if self.left <= 0:
                self.unopened = min(self.unopened, float(bounds[place]))
                return
            self.left -= 1
            self._extend([*chosen, value], float(alone[place]), moved + row.delta[value], left - 1)

    def _choose(self, k: int) -> None:
        """Without vectors the worst swaps are those of the fields that add least."""
        least = self.of.least(self.row.own)
        fields = np.argsort(least, kind="stable")[:k]
        for field in fields[least[fields] < 0].tolist():
            start = self.of.start[field]
            value = start + int(self.row.own[start : start + self.of.sizes[field]].argmin())
            self.swaps.append(value)
            self.best += float(self.row.own[value])


def _least_sum(of: Floats, count: int) -> float:
    """The least sum of at most `count` of some numbers."""
    if count < len(of):
        of = np.partition(of, count - 1)[:count] if count else of[:0]
    return float(np.minimum(of, 0).sum())


def _array(weight: Tensor) -> Floats:
    found: Floats = weight.detach().double().cpu().numpy()
    return found


def _checked(
    model: FM, values: Tensor, labels: Tensor, k: int, fields: list[int] | None
) -> tuple[_Model, NDArray[np.int64], list[float]]:
    if not isinstance(model, FM):
        raise ValueError(
            f"swaps: only of an FM is the worst known, got a {type(model).__name__}; train one "
            "with model: {kind: fm} or {kind: linear}"
        )
    checks.integer("swaps", "k", k, 1)
    sizes = torch.tensor(model.first.sizes)
    if values.dim() != 2 or values.shape[1] != len(sizes) or values.is_floating_point():
        raise ValueError(
            f"swaps: values must be integers [B, {len(sizes)}]; got {values.dtype}, "
            f"{tuple(values.shape)}"
        )
    rows = values.cpu()
    if bool(((rows < 0) | (rows >= sizes)).any()):
        raise ValueError("swaps: a value is not among its field's; number them from 0")
    if labels.shape != values.shape[:1] or not bool(((labels == 0) | (labels == 1)).all()):
        raise ValueError(f"swaps: labels must be 0 or 1, [{len(values)}]; got {labels!r}")
    signs: list[Any] = (labels.cpu().double() * 2 - 1).tolist()
    chosen = list(range(len(sizes))) if fields is None else fields
    return _Model(model, chosen), rows.numpy().astype(np.int64), signs
