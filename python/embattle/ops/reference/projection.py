"""The projection on the intersection of a ball and a box."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from embattle.ops._arguments import Bound, Group, Norm, Strength
from embattle.ops.reference.groups import Groups, max_of, norm_name, norms_of


@dataclass(frozen=True)
class Ball:
    """Where a result has to lie: a ball round the origin, perhaps a box; as packed matrices."""

    groups: Groups
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
    ) -> Ball:
        groups = Groups.of(x, group, offsets, mask)
        base = torch.zeros_like(x) if x0 is None else x0

        def bound(value: Bound, default: float) -> Tensor | None:
            if lower is None and upper is None:
                return None
            if not isinstance(value, Tensor):
                value = torch.full_like(x.detach(), default if value is None else value)
            value = torch.where(value.isnan(), default, value.to(x.dtype))
            return groups.pack(value.expand(x.shape))

        return Ball(
            groups,
            norm_name(norm),
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
        outside = norms_of(z, self.norm) > self.eps
        eps = torch.where(outside, self.eps, 0.0)  # an infinite one would make gradients NaN
        if self.norm == "l2":
            length = torch.where(outside, norms_of(z, "l2"), 1.0)
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
        largest = max_of(size)
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
        largest = max_of(size).detach()
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
        fits = ~(norms_of(boxed, self.norm) > self.eps)
        inner = torch.zeros_like(eps) if self.norm == "l2" else most - base
        outer = torch.ones_like(eps) if self.norm == "l2" else -base
        for _ in range(200):
            middle = torch.where(inner == 0, outer * 2.0**-20, (inner + outer) / 2)
            between = (middle > inner.minimum(outer)) & (middle < inner.maximum(outer))
            if not between.any():  # neighbours
                break
            inside = norms_of(self.boxed(moved(middle)), self.norm) <= self.eps
            inner, outer = torch.where(inside, middle, inner), torch.where(inside, outer, middle)
        by = inner.detach()
        result = self.boxed(moved(by))
        free = (result == moved(by)) & (result != 0)
        bound = torch.where(free, 0.0, result)
        if self.norm == "l2":
            # In units of the radius: squares would underflow.
            radius = torch.where((self.eps > 0) & self.eps.isfinite(), self.eps, 1.0)
            left = torch.where(fits | (self.eps == 0), 0.0, 1.0)
            left = (left - (bound / radius).square().sum(1, keepdim=True)).clamp_min(0)
            total = norms_of(torch.where(free, z, 0.0), "l2")
            closed = radius * left.sqrt() / torch.where(total > 0, total, 1.0)
            # Where rounding leaves nothing for the others, they still move until this one is there.
            reached = torch.where(free | (result == nearest), 0.0, result / z)
            closed = closed.maximum(max_of(reached).detach())
        else:
            total = torch.where(free, below, 0.0).sum(1, keepdim=True)
            total = total + bound.abs().sum(1, keepdim=True) / unit - eps
            closed = total / free.sum(1, keepdim=True).clamp_min(1)
        by = torch.where(free.any(1, keepdim=True), closed, by)
        result = torch.where(fits, boxed, self.boxed(moved(by)))
        return torch.where(norms_of(nearest, self.norm) > self.eps, nearest, result)

    def finish(self, z: Tensor, like: Tensor) -> Tensor:
        """The origin plus the projection of packed deltas z, in the shape and dtype of `like`.

        Elements of `like` that are already there come back bit by bit (origin + (x - origin) may
        not).
        """
        z = self.project(z)
        if self.norm != "linf":
            for _ in range(2):  # what the projection itself rounded up, where the ball is met
                excess = norms_of(z.detach(), self.norm) / self.eps
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
                    outside = norms_of(distance, self.norm) > self.eps
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
    ball = Ball.of(delta, eps, norm, group, offsets, mask, x0, lower, upper)
    return ball.finish(ball.groups.pack(delta) - ball.origin, delta)


def project_(delta: Tensor, **options: object) -> Tensor:
    """:func:`project` written into delta."""
    return delta.copy_(project(delta, **options))  # type: ignore[arg-type]
