"""The definition of every op, in plain torch and float64: slow, clear, what the tests compare with.

Every function has the signature of its namesake in :mod:`embattle.ops`; those on groups have
their signatures and words from here. Arguments are taken as valid. Results have the dtype of the
first argument; the arithmetic in between is float64, so that the reference called on
``x.double()`` is exact to about 1e-15 for whatever ``x`` holds.

**Groups.** A tensor is seen as ``[rows, dim]``, where ``dim`` is its last dimension, and a group is
a run of rows (``group="sample"``: all rows of one index of dimension 0; ``group="token"``: one row;
``offsets``: rows ``offsets[g]`` up to ``offsets[g + 1]``). A 1-D or 0-D tensor is one group.
``_Groups`` copies the groups into a padded ``[groups, width]`` float64 matrix; everything below
works on such matrices.

**Origin and box.** With ``x0`` the first argument and the result are inputs, ``x0 + delta``;
without it they are ``delta``. The box bounds the result itself. The origin need not lie in it: the
result is the projection on the intersection of ball and box, and where they do not meet the box
wins: the result is the point of the box that is nearest to the origin (linf: element by element).
All values of bounds have a meaning: an element whose bound is a NaN has none, and where lower is
above upper, upper holds. Rows that are masked out get the origin, box or not.

**Storing.** ``norm(result - x0) <= eps`` holds in float64 on the *stored* values, where ball and
box meet: where rounding to the result's dtype would leave the ball, that group is rounded towards
its origin. Box bounds are rounded to the result's dtype.

**Random numbers** come from Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1,
2, 3", SC 2011). ``key``, two non-negative int64 drawn by :func:`draw_key`, gives the Philox key
``(low32(key[0]), high32(key[0]))``. The counter of block ``n`` in stream ``s`` is ``(low32(n),
high32(n), low32(key[1]), high32(key[1]) ^ (s << 31))``. A block yields words ``w[0..3]``.

- Stream 0 serves elements, ``i`` being the index in the flattened (contiguous) tensor, masked ones
  counted. For float32, float16 and bfloat16 results element ``i`` has word ``w[i % 4]`` of block
  ``i // 4``, and the 24-bit integer ``m = w >> 8``; for float64 it has ``high = w[2 * (i % 2)]``,
  ``low = w[2 * (i % 2) + 1]`` of block ``i // 2``, and the 53-bit integer ``m = (high << 21) | (low
  >> 11)``. With ``p`` = 24 or 53 bits:
- uniform in [0, 1): ``u = m * 2**-p``; uniform in (0, 1]: ``v = (m + 1) * 2**-p``. Both are exact.
- sign: minus where bit 0 of ``w`` (float64: of ``low``) is set; that bit is no part of ``m``.
- gaussian: elements ``2j`` and ``2j + 1`` form a pair (Box-Muller); with ``r = sqrt(-2 *
  log(v[2j]))`` and ``a = 2 * pi * u[2j + 1]`` they are ``r * cos(a)`` and ``r * sin(a)``.
- exponential: ``-log(v)``.
- Stream 1 serves groups: the radius of group ``g`` is ``eps * U ** (1 / n)``, with ``n`` the number
  of unmasked elements, and ``U = (m + 1) * 2**-53`` from ``high = w[0]``, ``low = w[1]`` of block
  ``g``, whatever the dtype.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from embattle.ops._arguments import Bound, Group, Norm, Strength

_NORMS: dict[object, str] = {
    "l1": "l1",
    "l2": "l2",
    "linf": "linf",
    1: "l1",
    2: "l2",
    math.inf: "linf",
}
_DUAL = {"l1": "linf", "l2": "l2", "linf": "l1"}


def _norm_name(norm: str | float) -> str:
    return _NORMS[norm.lower() if isinstance(norm, str) else norm]


# --- groups --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Groups:
    """Which rows of a ``[rows, dim]`` tensor form which group, and which of them are unmasked."""

    shape: torch.Size
    dim: int
    rows: Tensor  # [groups, longest]: row numbers; 0 where there is none
    used: Tensor  # [groups, longest] bool: there is a row, and it is unmasked

    @staticmethod
    def of(x: Tensor, group: str, offsets: Tensor | None, mask: Tensor | None) -> _Groups:
        count = math.prod(x.shape[:-1])
        if offsets is not None:
            lengths = offsets.diff()
            longest = int(lengths.max()) if len(lengths) else 0
            steps = torch.arange(longest, device=x.device)
            used = steps < lengths[:, None]
            rows = torch.where(used, offsets[:-1, None] + steps, 0)
        else:
            groups = count if group == "token" or x.dim() < 2 else x.shape[0]
            longest = 1 if group == "token" else math.prod(x.shape[1:-1])
            rows = torch.arange(count, device=x.device).reshape(groups, longest)
            used = torch.ones_like(rows, dtype=torch.bool)
        if mask is not None:
            used = used & mask.reshape(count)[rows]
        return _Groups(x.shape, x.shape[-1] if x.dim() else 1, rows, used)

    @property
    def valid(self) -> Tensor:
        """[groups, width] bool: the elements that take part."""
        return self.used[:, :, None].expand(*self.used.shape, self.dim).flatten(1)

    def pack(self, x: Tensor) -> Tensor:
        """Elements of a tensor as [groups, width] float64, 0 where there is none or masked."""
        packed = x.reshape(math.prod(self.shape[:-1]), self.dim)[self.rows].flatten(1)
        return torch.where(self.valid, packed.double(), 0.0)

    def unpack(self, packed: Tensor, base: Tensor) -> Tensor:
        """The inverse of :meth:`pack`; elements that take no part are those of `base`."""
        rows = packed.reshape(*self.used.shape, self.dim)[self.used]
        flat = base.to(packed.dtype).reshape(math.prod(self.shape[:-1]), self.dim)
        return flat.index_put((self.rows[self.used],), rows).reshape(self.shape)

    def column(self, value: Strength) -> Tensor:
        """A float or one value per group as [groups, 1] in float64."""
        column = torch.as_tensor(value, dtype=torch.float64, device=self.rows.device)
        return column.expand(len(self.rows))[:, None]


def _max(x: Tensor) -> Tensor:
    return x.amax(1, keepdim=True) if x.shape[1] else x.new_zeros(len(x), 1)


def _norm(z: Tensor, norm: str) -> Tensor:
    """[groups, 1] norms of the rows of z, without overflow or underflow in between."""
    if norm == "l1":
        return z.abs().sum(1, keepdim=True)
    if norm == "linf":
        return _max(z.abs())
    largest = _max(z.abs()).detach()
    scale = torch.where((largest > 0) & largest.isfinite(), largest, 1.0)
    length: Tensor = torch.linalg.vector_norm(z / scale, dim=1, keepdim=True)
    return length * scale


# --- projection ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Ball:
    """Where a result has to lie: a ball round the origin, perhaps a box; as packed matrices."""

    groups: _Groups
    norm: str
    eps: Tensor  # [groups, 1]
    origin: Tensor  # [groups, width]
    lower: Tensor | None  # bounds of the result, [groups, width]
    upper: Tensor | None
    base: Tensor  # what masked-out elements get, in the result's shape

    @staticmethod
    def of(
        x: Tensor,
        eps: Strength,
        norm: str | float,
        group: str,
        offsets: Tensor | None,
        mask: Tensor | None,
        x0: Tensor | None,
        lower: Bound,
        upper: Bound,
    ) -> _Ball:
        groups = _Groups.of(x, group, offsets, mask)
        base = torch.zeros_like(x) if x0 is None else x0

        def bound(value: Bound, default: float) -> Tensor | None:
            if lower is None and upper is None:
                return None
            if not isinstance(value, Tensor):
                value = torch.full_like(x.detach(), default if value is None else value)
            value = torch.where(value.isnan(), default, value.to(x.dtype))
            return groups.pack(value.expand(x.shape))

        return _Ball(
            groups,
            _norm_name(norm),
            groups.column(eps),
            groups.pack(base),
            bound(lower, -math.inf),
            bound(upper, math.inf),
            base,
        )

    def boxed(self, z: Tensor) -> Tensor:
        """Packed deltas, put where the origin plus delta lies in the box."""
        if self.lower is None or self.upper is None:
            return z
        return z.maximum(self.lower - self.origin).minimum(self.upper - self.origin)

    def project(self, z: Tensor) -> Tensor:
        """The Euclidean projection of packed deltas on the ball and the box."""
        if self.norm == "linf":
            return self.boxed(z.clamp(-self.eps, self.eps))
        if self.lower is not None:
            return self._project_on_ball_and_box(z)
        outside = _norm(z, self.norm) > self.eps
        eps = torch.where(outside, self.eps, 0.0)  # an infinite one would make gradients NaN
        if self.norm == "l2":
            length = torch.where(outside, _norm(z, "l2"), 1.0)
            return torch.where(outside, z * (eps / length), z)
        return torch.where(outside, self._shrink_l1(z, eps), z)

    @staticmethod
    def _shrink_l1(z: Tensor, eps: Tensor) -> Tensor:
        """Soft threshold: sum max(|z| - t, 0) = eps, by sorting (Duchi et al., ICML 2008).

        For a small ball the magnitudes are taken relative to the largest one: ``|z| - t`` would
        cancel.
        """
        if not z.shape[1]:
            return z
        size = z.abs()
        largest = _max(size)
        below = size - torch.where(eps < largest / 2, largest, 0.0).detach()
        ordered = below.sort(1, descending=True).values
        count = torch.arange(1, z.shape[1] + 1, dtype=z.dtype, device=z.device)
        thresholds = (ordered.cumsum(1) - eps) / count
        kept = (ordered > thresholds).sum(1, keepdim=True).clamp_min(1)
        return z.sign() * (below - thresholds.gather(1, kept - 1)).clamp_min(0)

    def _project_on_ball_and_box(self, z: Tensor) -> Tensor:
        """``s * z`` (l2) or ``sign(z) * max(|z| - t, 0)`` (l1), put in the box.

        Whatever the origin, these solve the optimality conditions with one multiplier for a group,
        and the norm is monotone in it. Bisection finds which elements are at their bound; a closed
        form then gives the multiplier exactly. Thresholds are relative to the largest magnitude
        for a small ball: ``|z| - t`` would cancel.
        """
        size = z.abs()
        largest = _max(size).detach()
        unit = torch.where(largest > 1e280, 2.0**64, 1.0)  # for sums that do not overflow
        most = torch.where(largest.isfinite(), largest / unit, 1.0)
        eps = self.eps / unit
        base = torch.where(eps < most / 2, most, 0.0)
        below = size / unit - base

        def moved(by: Tensor) -> Tensor:  # one per group
            if self.norm == "l2":
                return z * by
            left = below - by
            # Not clamp_min: an element that is just cut off to 0 has no gradient.
            return z.sign() * unit * torch.where(left > 0, left, 0.0)

        boxed = self.boxed(z)
        nearest = self.boxed(torch.zeros_like(z))
        fits = ~(_norm(boxed, self.norm) > self.eps)
        inner = torch.zeros_like(eps) if self.norm == "l2" else most - base
        outer = torch.ones_like(eps) if self.norm == "l2" else -base
        for _ in range(200):
            middle = torch.where(inner == 0, outer * 2.0**-20, (inner + outer) / 2)
            inside = _norm(self.boxed(moved(middle)), self.norm) <= self.eps
            inner, outer = torch.where(inside, middle, inner), torch.where(inside, outer, middle)
        by = inner.detach()
        result = self.boxed(moved(by))
        free = (result == moved(by)) & (result != 0)
        bound = torch.where(free, 0.0, result)
        if self.norm == "l2":
            radius = torch.where(fits, 0.0, self.eps)
            left = (radius.square() - bound.square().sum(1, keepdim=True)).clamp_min(0)
            total = _norm(torch.where(free, z, 0.0), "l2")
            closed = left.sqrt() / torch.where(total > 0, total, 1.0)
        else:
            total = torch.where(free, below, 0.0).sum(1, keepdim=True)
            total = total + bound.abs().sum(1, keepdim=True) / unit - eps
            closed = total / free.sum(1, keepdim=True).clamp_min(1)
        by = torch.where(free.any(1, keepdim=True), closed, by)
        result = torch.where(fits, boxed, self.boxed(moved(by)))
        return torch.where(_norm(nearest, self.norm) > self.eps, nearest, result)

    def finish(self, z: Tensor, like: Tensor) -> Tensor:
        """The origin plus the projection of packed deltas z, in the shape and dtype of `like`.

        Elements of `like` that are already there come back bit by bit (origin + (x - origin) may
        not).
        """
        z = self.project(z)
        if self.norm != "linf":
            for _ in range(2):  # what the projection itself rounded up, where the ball is met
                excess = _norm(z.detach(), self.norm) / self.eps
                beyond = (excess > 1) & (excess < 1 + 1e-9)
                z = z * torch.where(beyond, (1 - 2.0**-52) / excess, 1.0)
        ideal = (self.origin + z).to(like.dtype)
        with torch.no_grad():
            given = self.groups.pack(like)
            stored = torch.where(z == given - self.origin, given.to(like.dtype), ideal)
            goal = self.origin
            if self.lower is not None and self.upper is not None:
                # Also where the origin and what leads to a bound add up to the bound's neighbour.
                low, high = self.lower.to(like.dtype), self.upper.to(like.dtype)
                stored = torch.where(z == self.lower - self.origin, low, stored.maximum(low))
                stored = torch.where(z == self.upper - self.origin, high, stored.minimum(high))
                goal = goal.maximum(self.lower).minimum(self.upper)
            goal = goal.to(like.dtype)
            for attempt in range(16):
                distance = stored.double() - self.origin
                outside = distance.abs() > self.eps
                if self.norm != "linf":
                    outside = _norm(distance, self.norm) > self.eps
                    outside = outside & ((distance.abs() > z.abs()) | (attempt > 0))
                if not outside.any():
                    break
                stored = torch.where(outside, torch.nextafter(stored, goal), stored)
            moved = torch.where(stored == ideal, 0.0, stored.double() - ideal.double())
        stored = torch.where(ideal.isfinite(), (ideal.double() + moved).to(like.dtype), stored)
        return self.groups.unpack(stored, self.base.to(like.dtype))


def project(
    delta: Tensor,
    *,
    eps: Strength,
    norm: Norm = "l2",
    group: Group = "sample",
    offsets: Tensor | None = None,
    mask: Tensor | None = None,
    x0: Tensor | None = None,
    lower: Bound = None,
    upper: Bound = None,
) -> Tensor:
    """The Euclidean projection on the norm ball (and box): exact, for every group on its own.

    The result's norm, in float64 on the stored values, never exceeds eps (but see below for a
    box), and a second projection changes no bit. Differentiable with respect to `delta`.

    Args:
        delta: the perturbation, any shape; the perturbed input where `x0` is given.
        eps, norm, group, offsets, mask, x0, lower, upper: as for :func:`pgd_step`. With a box the
            result is the exact projection on the intersection of ball and box. Where they do not
            meet, as `x0` is further from the box than eps, the box wins: the result is the point
            of the box that is nearest to `x0` (linf: element by element), and its norm exceeds eps.

    Returns:
        Tensor of the shape and dtype of `delta`.

    Raises:
        ValueError: for a wrong shape, dtype or value; the message names the argument.

    Source: l1 threshold: Duchi et al., "Efficient Projections onto the l1-Ball" (ICML 2008).
    """
    ball = _Ball.of(delta, eps, norm, group, offsets, mask, x0, lower, upper)
    return ball.finish(ball.groups.pack(delta) - ball.origin, delta)


# --- steps ---------------------------------------------------------------------------------------


def _direction(grad: Tensor, valid: Tensor, norm: str, top: float) -> Tensor:
    """The direction of steepest ascent u(grad), of norm 1, or 0 where the gradient is 0.

    l1: the signs of the k largest coordinates, each 1/k (lowest index first among equals), where k
    is `top`, or ``max(1, floor(top * n + 0.5))`` for a fraction of the group's n unmasked elements,
    and never more than the number of coordinates that are not 0.
    """
    if norm == "linf":
        return grad.sign()
    largest = _max(grad.abs())
    grad = grad / torch.where(largest > 0, largest, 1.0)
    if norm == "l2":
        length = _norm(grad, "l2")
        return grad / torch.where(length > 0, length, 1.0)
    wanted = valid.sum(1, keepdim=True).double()
    wanted = (
        (wanted * top + 0.5).floor().clamp_min(1) if 0 < top < 1 else torch.full_like(wanted, top)
    )
    wanted = torch.minimum(wanted, (grad != 0).sum(1, keepdim=True).double())
    order = grad.abs().argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(grad.shape[1], device=grad.device).expand_as(order)
    )
    return torch.where(rank < wanted, grad.sign() / wanted.clamp_min(1), 0.0)


def _chosen(grad: Tensor, groups: _Groups, norm: str, finite: Tensor, max_groups: int) -> Tensor:
    """[groups, 1] bool: the max_groups tokens of each sample with the largest dual gradient norm.

    Equal norms: the lowest index first. Tokens that are masked out or have a non-finite gradient
    come last.
    """
    samples = groups.shape[0] if len(groups.shape) > 1 else 1
    size = torch.where(finite, _norm(grad, _DUAL[norm]), -1.0)
    size = torch.where(groups.used.any(1, keepdim=True), size, -2.0)
    size = size.reshape(samples, len(size) // samples if samples else 0)
    order = size.argsort(dim=1, descending=True, stable=True)[:, :max_groups]
    return torch.zeros_like(size, dtype=torch.bool).scatter(1, order, True).reshape(-1, 1)


def _finite(grad: Tensor, nonfinite: Tensor | None) -> Tensor:
    """[groups, 1] bool: the gradient holds no NaN or Inf; `nonfinite` counts the other groups."""
    finite = grad.isfinite().all(1, keepdim=True)
    if nonfinite is not None:
        nonfinite += (~finite[:, 0]).to(nonfinite.dtype)
    return finite


def pgd_step(
    delta: Tensor,
    grad: Tensor,
    *,
    step_size: Strength,
    eps: Strength,
    norm: Norm = "l2",
    group: Group = "sample",
    offsets: Tensor | None = None,
    mask: Tensor | None = None,
    top: float = 1,
    max_groups: int | None = None,
    x0: Tensor | None = None,
    lower: Bound = None,
    upper: Bound = None,
    nonfinite: Tensor | None = None,
) -> Tensor:
    """One projected steepest-ascent step: ``P_eps(delta + step_size * u(grad))``, in one pass.

    ``u`` is the direction of steepest ascent in the norm: ``sign(g)`` for linf, ``g / ||g||_2``
    for l2, and for l1 the signs of the `top` coordinates with the largest ``|g|``, each
    ``1 / top``. A zero gradient moves nothing; a gradient with a NaN or an Inf leaves its group's
    delta as it was (projected) and never reaches another group. Not differentiable.

    Args:
        delta: the perturbation, any shape.
        grad: gradient of the loss to be raised, shape of `delta`, any float dtype.
        step_size: length of the step in the norm; a float or one value per group. Negative
            descends.
        eps: radius of the ball; a float or one value per group. ``math.inf`` for none.
        norm: "l2", "linf", "l1", or 2, ``math.inf``, 1.
        group: what has a ball of its own: "sample" (all but dim 0) or "token" (the last dim).
        offsets: ``[groups + 1]`` int64: ragged groups of packed rows; overrides `group`.
        mask: bool, ``delta.shape[:-1]``: rows that are False get no perturbation and do not count.
        top: for l1: how many coordinates move; below 1 it is a fraction of the group.
        max_groups: with ``group="token"``: only so many tokens of a sample move, those with the
            largest gradient norm (the dual norm); the others get a zero delta.
        x0: the ball's centre, shape of `delta`. `delta` and the result are then perturbed inputs.
        lower: lower bound of the result; a float, or a tensor of one element or of the shape of
            `delta`. A float costs no kernel of its own. No value of a tensor is checked, as that
            would wait for a GPU: an element whose bound is a NaN has none, and where lower is
            above upper, upper holds. `x0` need not lie in the box: the result always does, also
            where ball and box do not meet (see :func:`project`).
        upper: upper bound of the result, likewise.
        nonfinite: int32 ``[groups]``: incremented for every group with a non-finite gradient.

    Returns:
        The new perturbation (or perturbed input, with `x0`), shape and dtype of `delta`.

    Raises:
        ValueError: for a wrong shape, dtype or value; the message names the argument.

    Source: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks"
    (arXiv 1706.06083), eq. in section 2.1; l1 with several coordinates: Tramer and Boneh
    (arXiv 1904.13000), section 3.2.
    """
    ball = _Ball.of(delta, eps, norm, group, offsets, mask, x0, lower, upper)
    groups = ball.groups
    g = groups.pack(grad)
    finite = _finite(g, nonfinite)
    g = torch.where(finite, g, 0.0)
    z = groups.pack(delta) - ball.origin
    z = z + groups.column(step_size) * _direction(g, groups.valid, ball.norm, top)
    if max_groups is not None:
        z = torch.where(_chosen(g, groups, ball.norm, finite, max_groups), z, 0.0)
    return ball.finish(z, delta)


def momentum_step(
    delta: Tensor,
    velocity: Tensor,
    grad: Tensor,
    *,
    decay: float,
    step_size: Strength,
    eps: Strength,
    style: Literal["mi", "apgd"] = "mi",
    norm: Norm = "l2",
    group: Group = "sample",
    offsets: Tensor | None = None,
    mask: Tensor | None = None,
    top: float = 1,
    x0: Tensor | None = None,
    lower: Bound = None,
    upper: Bound = None,
    nonfinite: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A projected step with momentum; returns the new perturbation and the new velocity.

    ``style="mi"``: ``v' = decay * v + g / ||g||_1``, ``delta' = P(delta + step_size * u(v'))``.
    Where g is zero v' is ``decay * v``; where g is not finite v stays and delta is only projected.
    Masked rows of v' are zero.

    ``style="apgd"``: `velocity` holds the previous perturbation (with `x0`: the previous input);
    ``z = P(delta + step_size * u(g))``,
    ``delta' = P(delta + decay * (z - delta) + (1 - decay) * (delta - velocity))``, ``v' = delta``.
    Where g is not finite delta is only projected. Masked rows of v' are zero (with x0: x0).

    Args:
        delta: the perturbation, any shape.
        velocity: shape of `delta`, see above; zeros (mi) or `delta` itself (apgd) at the start.
        grad: gradient of the loss to be raised, shape of `delta`.
        decay: mu of MI-FGSM (1 in the paper), or alpha of APGD (0.75 in the paper).
        step_size, eps, norm, group, offsets, mask, top, x0, lower, upper, nonfinite: as for
            :func:`pgd_step`.

    Raises:
        ValueError: for a wrong shape, dtype or value; the message names the argument.

    Source: Dong et al. (arXiv 1710.06081), eq. 6 and 7; Croce and Hein (arXiv 2003.01690), eq. 1.
    """
    ball = _Ball.of(delta, eps, norm, group, offsets, mask, x0, lower, upper)
    groups = ball.groups
    g = groups.pack(grad)
    finite = _finite(g, nonfinite)
    g = torch.where(finite, g, 0.0)
    d = groups.pack(delta) - ball.origin
    step = groups.column(step_size)
    if style == "mi":
        old = groups.pack(velocity)
        largest = _max(g.abs())
        g = g / torch.where(largest > 0, largest, 1.0)
        length = _norm(g, "l1")
        new = torch.where(finite, decay * old + g / torch.where(length > 0, length, 1.0), old)
        z = d + step * torch.where(finite, _direction(new, groups.valid, ball.norm, top), 0.0)
        memory = groups.unpack(new.to(velocity.dtype), torch.zeros_like(velocity))
    else:
        old = groups.pack(velocity) - ball.origin
        z = ball.project(d + step * _direction(g, groups.valid, ball.norm, top))
        z = torch.where(finite, d + decay * (z - d) + (1 - decay) * (d - old), d)
        memory = groups.unpack(groups.pack(delta).to(velocity.dtype), ball.base.to(velocity.dtype))
    return ball.finish(z, delta), memory


# --- random numbers ------------------------------------------------------------------------------


def draw_key(generator: torch.Generator | None = None) -> Tensor:
    """int64 [2]: the key of one call's random numbers, drawn from the (default CPU) generator."""
    device = "cpu" if generator is None else generator.device
    return torch.randint(2**63 - 1, (2,), generator=generator, device=device)


def philox(key: Tensor, blocks: Tensor, stream: int = 0) -> Tensor:
    """Philox4x32-10: the 32-bit words of blocks [n] as int64 [n, 4] (layout: above)."""
    low = 0xFFFFFFFF
    seed, offset = key.tolist()
    k0, k1 = seed & low, seed >> 32 & low
    c0, c1 = blocks & low, blocks >> 32 & low
    c2 = torch.full_like(blocks, offset & low)
    c3 = torch.full_like(blocks, (offset >> 32 & low) ^ stream << 31)
    for _ in range(10):
        # int64 products wrap around, which leaves all 64 bits of the unsigned product right
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = p1 >> 32 & low ^ c1 ^ k0, p1 & low, p0 >> 32 & low ^ c3 ^ k1, p0 & low
        c0, c2 = c0 & low, c2 & low
        k0, k1 = k0 + 0x9E3779B9 & low, k1 + 0xBB67AE85 & low
    return torch.stack([c0, c1, c2, c3], 1)


@dataclass(frozen=True)
class _Random:
    """The random integers of n elements and float64 [n] functions of them (see above)."""

    m: Tensor
    sign: Tensor
    bits: int

    @staticmethod
    def of(key: Tensor, n: int, dtype: torch.dtype, device: torch.device) -> _Random:
        if dtype == torch.float64:
            blocks = torch.arange((n + 1) // 2, device=device)
            high, low = philox(key, blocks).reshape(-1, 2)[:n].unbind(1)
            return _Random(high << 21 | low >> 11, 1 - 2 * (low & 1), 53)
        words = philox(key, torch.arange((n + 3) // 4, device=device)).flatten()[:n]
        return _Random(words >> 8, 1 - 2 * (words & 1), 24)

    def uniform(self) -> Tensor:
        return self.m.double() * 2.0**-self.bits

    def exponential(self) -> Tensor:
        return -((self.m + 1).double() * 2.0**-self.bits).log()

    def gaussian(self) -> Tensor:
        """For an even n: pairs are drawn whole."""
        radius = (2 * self.exponential()[0::2]).sqrt()
        angle = 2 * math.pi * self.uniform()[1::2]
        return torch.stack([radius * angle.cos(), radius * angle.sin()], 1).flatten()


def _gaussian(key: Tensor, like: Tensor) -> Tensor:
    """Standard normal float64 values in the shape of `like`, from the integers of its dtype."""
    n = like.numel()
    return _Random.of(key, n + n % 2, like.dtype, like.device).gaussian()[:n].reshape(like.shape)


def random_start(
    like: Tensor,
    *,
    eps: Strength,
    norm: Norm = "l2",
    group: Group = "sample",
    offsets: Tensor | None = None,
    mask: Tensor | None = None,
    x0: Tensor | None = None,
    lower: Bound = None,
    upper: Bound = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A point uniform in each group's ball (then projected on the box, if there is one).

    linf: ``eps * (2 * u - 1)``. l2: gaussians of the group divided by their l2 norm, times the
    group's radius. l1: signed exponentials divided by their l1 norm, times the radius. A direction
    of norm 0 gives 0.

    Args:
        like: gives shape, dtype and device.
        eps, norm, group, offsets, mask, x0, lower, upper: as for :func:`pgd_step`; eps is finite.
        generator: what the numbers are drawn from; the CPU's default generator if None. One seed
            gives the same random integers everywhere, and the same bits for any number of threads.
            Between devices, and between SIMD levels of a CPU, what is computed from the integers
            (logarithms, roots, sines) may differ in the last places.

    Returns:
        Tensor of the shape and dtype of `like`.

    Raises:
        ValueError: for a wrong shape, dtype or value; the message names the argument.

    Source: l1: Barthe et al., "A probabilistic approach to the geometry of the l_p^n-ball" (2005).
    """
    key = draw_key(generator)
    ball = _Ball.of(like, eps, norm, group, offsets, mask, x0, lower, upper)
    groups = ball.groups
    draws = _Random.of(key, like.numel(), like.dtype, like.device)
    if ball.norm == "linf":
        z = ball.eps * groups.pack((2 * draws.uniform() - 1).reshape(like.shape))
        return ball.finish(z, ball.base)
    if ball.norm == "l2":
        z = groups.pack(_gaussian(key, like))
    else:
        z = groups.pack((draws.sign * draws.exponential()).reshape(like.shape))
    high, low = philox(key, torch.arange(len(z), device=z.device), stream=1)[:, :2].unbind(1)
    uniform = ((high << 21 | low >> 11) + 1).double() * 2.0**-53
    count = groups.valid.sum(1).clamp_min(1)
    radius = ball.eps * (uniform ** (1 / count.double()))[:, None]
    length = _norm(z, ball.norm)
    z = torch.where(ball.eps > 0, z * (radius / torch.where(length > 0, length, 1.0)), 0.0)
    return ball.finish(z, ball.base)


def gaussian_noise(
    x: Tensor,
    *,
    std: Strength,
    eps: Strength | None = None,
    norm: Norm = "l2",
    group: Group = "sample",
    offsets: Tensor | None = None,
    mask: Tensor | None = None,
    x0: Tensor | None = None,
    lower: Bound = None,
    upper: Bound = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """``P_eps(x + N(0, std^2))`` in one pass; without `eps`, ``x + N(0, std^2)``.

    As everywhere `x` is a perturbation unless `x0` is given: masked-out rows are zero. To add noise
    to an input and leave masked rows as they are, pass it as `x0` too.

    Args:
        x: what the noise is added to: a perturbation, or a perturbed input where `x0` is given.
        std: standard deviation; a float or one value per group.
        eps: radius of the ball; None for no ball.
        norm, group, offsets, mask, x0, lower, upper: as for :func:`pgd_step`.
        generator: as for :func:`random_start`.

    Returns:
        Tensor of the shape and dtype of `x`.

    Raises:
        ValueError: for a wrong shape, dtype or value; the message names the argument.
    """
    key = draw_key(generator)
    radius = math.inf if eps is None else eps
    ball = _Ball.of(x, radius, norm, group, offsets, mask, x0, lower, upper)
    noise = ball.groups.column(std) * ball.groups.pack(_gaussian(key, x))
    return ball.finish(ball.groups.pack(x) - ball.origin + noise, x)


# --- norms and clipping --------------------------------------------------------------------------


def _norm_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    double = any(t.dtype == torch.float64 for t in tensors)
    return torch.float64 if double else torch.float32


def group_norm(
    x: Tensor,
    *,
    norm: Norm = "l2",
    group: Group = "sample",
    offsets: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """The norm of every group, in one read.

    Args:
        x: any shape.
        norm, group, offsets, mask: as for :func:`pgd_step`.

    Returns:
        ``[groups]``, float64 for a float64 input and float32 otherwise (half types overflow).

    Raises:
        ValueError: for a wrong shape, dtype or value; the message names the argument.
    """
    groups = _Groups.of(x, group, offsets, mask)
    return _norm(groups.pack(x), _norm_name(norm))[:, 0].to(_norm_dtype([x]))


def _sample_norms(grads: Sequence[Tensor]) -> Tensor:
    """[B] float64 norms of samples over all tensors [B, ...]."""
    flat = [g.double().reshape(len(g), math.prod(g.shape[1:])) for g in grads]
    return _norm(torch.cat(flat, 1), "l2")[:, 0]


def per_sample_norm(grads: Sequence[Tensor]) -> Tensor:
    """[B] l2 norms of each sample's gradient over all [B, ...]; float64 if any is, else float32."""
    return _sample_norms(grads).to(_norm_dtype(grads))


def clip_and_sum(
    grads: Sequence[Tensor],
    *,
    max_norm: float | Sequence[float],
    mode: Literal["flat", "per_layer", "automatic"] = "flat",
    weights: Tensor | None = None,
    gamma: float = 0.01,
) -> tuple[list[Tensor], Tensor]:
    """sum_b w_b * factor_b * g_b for every tensor [B, ...], and the norms.

    The factor is ``min(1, C / ||g_b||)`` for "flat" (Abadi et al., "Deep learning with differential
    privacy", CCS 2016), the same with each tensor's own norm (and C, if a sequence) for
    "per_layer", and ``C / (||g_b|| + gamma)`` for "automatic" (Bu et al., "Automatic clipping",
    NeurIPS 2023; never infinite). A sample with norm zero adds zero, even with C = 0 or gamma = 0,
    and one whose norm is not finite nothing. Whatever has factor or weight 0 adds exactly nothing.

    Returns:
        The sums, in the dtypes of the grads and without the batch dimension, and the norms: [B], or
        [B, tensors] for "per_layer"; float32, or float64 if any grad is.
    """
    if mode == "per_layer":
        norms = torch.stack([_sample_norms([g]) for g in grads], 1)
        limit = torch.as_tensor(max_norm, dtype=norms.dtype, device=norms.device)
        factors = _clip_factor(norms, limit.expand(len(grads)))
    else:
        norms = _sample_norms(grads)
        limit = torch.as_tensor(max_norm, dtype=norms.dtype, device=norms.device)
        if mode == "flat":
            factor = _clip_factor(norms, limit)
        else:
            total = norms + gamma
            factor = limit / torch.where(total > 0, total, 1.0)
            factor = factor.clamp_max(torch.finfo(norms.dtype).max)
            factor = torch.where(norms.isfinite(), factor, 0.0)
        factors = factor[:, None].expand(len(norms), len(grads))
    if weights is not None:
        factors = factors * weights.double()[:, None]
    sums = []
    for grad, factor in zip(grads, factors.unbind(1), strict=True):
        factor = factor.reshape(-1, *[1] * (grad.dim() - 1))
        sums.append(torch.where(factor == 0, 0.0, factor * grad.double()).sum(0).to(grad.dtype))
    return sums, norms.to(_norm_dtype(grads))


def _clip_factor(norms: Tensor, limit: Tensor) -> Tensor:
    over = norms > limit
    factor = torch.where(over, limit / torch.where(over, norms, 1.0), 1.0)
    return torch.where(norms.isfinite(), factor, 0.0)


def linear_grad_norm(
    input: Tensor,
    grad_output: Tensor,
    *,
    bias: bool = False,
    method: Literal["auto", "gram", "direct"] = "auto",
) -> Tensor:
    """[B] l2 norms of each sample's gradient of a linear layer's weight (and bias).

    Args:
        input: [B, *, I], what went into the layer.
        grad_output: [B, *, O], the gradient of the loss with respect to what came out.
        bias: whether the layer has a bias, whose gradient then counts.
        method: how the native op computes it; the value is the same.
    """
    tokens = math.prod(input.shape[1:-1])
    a = input.double().reshape(len(input), tokens, input.shape[-1])
    g = grad_output.double().reshape(len(input), tokens, grad_output.shape[-1])
    grads = [torch.einsum("bti,bto->bio", a, g)]
    if bias:
        grads.append(g.sum(1))
    return _sample_norms(grads).to(_norm_dtype([input, grad_output]))


# --- embeddings ----------------------------------------------------------------------------------


def embedding_grad_norm(
    indices: Tensor,
    grad_output: Tensor,
    *,
    padding_idx: int | None = None,
    offsets: Tensor | None = None,
    mode: Literal["sum", "mean"] = "sum",
    per_sample_weights: Tensor | None = None,
) -> Tensor:
    """[B] l2 norms of each sample's gradient of an embedding table; repeated indices are summed.

    Without offsets (an embedding): indices [B, *], grad_output [B, *, D]. With offsets (an
    embedding bag): indices [N], offsets [B] (starts) or [B + 1], grad_output [B, D], where bag b
    holds indices ``offsets[b]`` up to ``offsets[b + 1]``, ``mode="mean"`` divides by the number of
    them that are not padding, and per_sample_weights [N] multiplies ("sum" only). Entries equal to
    padding_idx have no gradient.
    """
    samples = len(grad_output)
    dtype = _norm_dtype([grad_output])
    keep = indices != padding_idx if padding_idx is not None else torch.ones_like(indices).bool()
    norms = []
    for b in range(samples):
        if offsets is None:
            ids = indices[b][keep[b]]
            rows = grad_output[b][keep[b]].double()
        else:
            end = int(offsets[b + 1]) if b + 1 < len(offsets) else len(indices)
            bag = slice(int(offsets[b]), end)
            ids = indices[bag][keep[bag]]
            rows = grad_output[b].double().expand(len(ids), grad_output.shape[1])
            if per_sample_weights is not None:
                rows = rows * per_sample_weights[bag][keep[bag]].double()[:, None]
            if mode == "mean":
                rows = rows / max(len(ids), 1)
        unique, inverse = torch.unique(ids, return_inverse=True)
        summed = rows.new_zeros(len(unique), rows.shape[-1]).index_add(0, inverse, rows)
        norms.append(_norm(summed.reshape(1, -1), "l2")[0, 0])
    return torch.stack(norms).to(dtype) if norms else grad_output.new_zeros(0, dtype=dtype)


def embedding_grad_sum(
    indices: Tensor,
    grad_output: Tensor,
    rows: int,
    *,
    weights: Tensor | None = None,
    padding_idx: int | None = None,
) -> Tensor:
    """[rows, D]: for every row r of a table, the sum of w_b g over the entries with index r.

    indices [B, *], grad_output [B, *, D], weights [B] (None for ones). The row padding_idx is zero.
    In the dtype of grad_output.
    """
    grads = grad_output.double()
    if weights is not None:
        grads = grads * weights.double().reshape(-1, *[1] * (grads.dim() - 1))
    flat = grads.reshape(indices.numel(), grads.shape[-1])
    total = flat.new_zeros(rows, grads.shape[-1]).index_add(0, indices.flatten(), flat)
    if padding_idx is not None:
        total[padding_idx] = 0
    return total.to(grad_output.dtype)


def embedding_perturb(weight: Tensor, indices: Tensor, delta: Tensor, inverse: Tensor) -> Tensor:
    """[*, D]: ``weight[indices] + delta[inverse]``, and ``weight[indices]`` where inverse is -1.

    Args:
        weight: [V, D], the table.
        indices: [*] int64, rows of the table.
        delta: [U, D], of any float dtype.
        inverse: [*] int64, rows of delta.

    Returns:
        In the dtype of weight. Differentiable with respect to weight and delta.
    """
    if not len(delta):
        return weight[indices]
    moved = torch.where((inverse >= 0)[..., None], delta[inverse.clamp_min(0)].double(), 0.0)
    return (weight[indices].double() + moved).to(weight.dtype)


def rowwise_adagrad_(
    weight: Tensor,
    state: Tensor,
    indices: Tensor,
    grad: Tensor,
    *,
    lr: float,
    eps: float = 1e-8,
    max_norm: float | None = None,
) -> Tensor:
    """A row-wise Adagrad step on the touched rows of a table, in place; returns weight.

    For every row r in indices: G is the sum of its gradients, scaled by ``min(1, max_norm /
    ||G||)``; ``state[r] += mean(G ** 2)``; ``weight[r] -= lr * G / (sqrt(state[r]) + eps)``
    (row-wise Adagrad of Mudigere et al., "Software-hardware co-design for fast and scalable
    training of deep learning recommendation models", ISCA 2022). A row whose G is not finite stays
    as it is.

    Args:
        weight: [V, D].
        state: [V].
        indices: [*] int64.
        grad: [*, D].
        lr: the learning rate.
        eps: added to the root; where both are zero so is the gradient, and the row stays.
        max_norm: the clipping bound of a summed row gradient; None for none.
    """
    rows, inverse = torch.unique(indices.flatten(), return_inverse=True)
    flat = grad.double().reshape(indices.numel(), weight.shape[1])
    total = flat.new_zeros(len(rows), weight.shape[1]).index_add(0, inverse, flat)
    finite = total.isfinite().all(1)
    rows, total = rows[finite], total[finite]
    if max_norm is not None:
        limit = torch.as_tensor(max_norm, dtype=total.dtype, device=total.device)
        total = total * _clip_factor(_norm(total, "l2"), limit)
    with torch.no_grad():
        mean = total.square().sum(1) / max(weight.shape[1], 1)
        new = state[rows].double() + mean
        root = new.sqrt() + eps
        step = lr * total / torch.where(root == 0, 1.0, root)[:, None]
        state[rows] = new.to(state.dtype)
        weight[rows] = (weight[rows].double() - step).to(weight.dtype)
    return weight


# --- in-place forms ------------------------------------------------------------------------------


def pgd_step_(delta: Tensor, grad: Tensor, **options: object) -> Tensor:
    """:func:`pgd_step` written into delta."""
    return delta.copy_(pgd_step(delta, grad, **options))  # type: ignore[arg-type]


def project_(delta: Tensor, **options: object) -> Tensor:
    """:func:`project` written into delta."""
    return delta.copy_(project(delta, **options))  # type: ignore[arg-type]


def gaussian_noise_(x: Tensor, **options: object) -> Tensor:
    """:func:`gaussian_noise` written into x."""
    return x.copy_(gaussian_noise(x, **options))  # type: ignore[arg-type]


def momentum_step_(
    delta: Tensor, velocity: Tensor, grad: Tensor, **options: object
) -> tuple[Tensor, Tensor]:
    """:func:`momentum_step` written into delta and velocity."""
    new, memory = momentum_step(delta, velocity, grad, **options)  # type: ignore[arg-type]
    return delta.copy_(new), velocity.copy_(memory)
