"""The loss on a plane through the clean embeddings: the worst direction, and one across it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from embattle import checks, ops
from embattle.explain.points import Points, Subset
from embattle.perturb.attacked_batch import Masks
from embattle.perturb.evaluation import LossFn
from embattle.perturb.perturbation import Perturbation
from embattle.perturb.site import Site
from embattle.perturb.strength import Strength

# Corners of the drawn edge of the ball.
_CORNERS = 48


@dataclass(frozen=True)
class Landscape:
    """Mean losses on a grid.

    Attributes:
        x, y: the grid's lines, in multiples of the perturbation that was found (x) and of a
            perturbation of the same norm across it (y).
        z: mean losses, `z[i][j]` at `y[i]` and `x[j]`.
        edge: corners `[x, y]` of the edge of the ball, where it cuts the plane, going round.
        samples: how many the mean is over.
        second: what the second direction is, `random` or `gradient`.
    """

    x: list[float]
    y: list[float]
    z: list[list[float]]
    edge: list[list[float]]
    samples: int
    second: str


def landscape(
    loss_fn: LossFn,
    sites: Site | Sequence[Site],
    deltas: Sequence[Tensor],
    *,
    norm: Any = "l2",
    eps: Strength | None = None,
    mask: Masks = None,
    subset: Subset | None = None,
    lines: int = 21,
    reach: float = 2.0,
    second: Literal["random", "gradient"] = "random",
    seed: int = 0,
) -> Landscape:
    """Evaluate the loss around the clean point (after Li et al., NeurIPS 2018, section 4).

    Li et al. draw the plane of two random directions in weight space, each scaled like the weights;
    here it is in the space of perturbations, and one direction is the attack's: each sample has its
    own plane, and the losses are averaged. The second direction is at right angles to the first in
    each ball, and as long as it in the attack's norm.

    Args:
        loss_fn: runs the attacked batch; returns losses `[B]` or an `Evaluation` with losses.
        sites: where it was attacked.
        deltas: of the attack's result.
        norm: the attack's.
        eps: the attack's, for the edge of the ball; None: the perturbation lies on the edge.
        mask, subset: as for `carried`.
        lines: of the grid, in each direction; an odd number, so that the clean point is on it.
        reach: how far it goes, in multiples of the perturbation.
        second: a random direction, or that of the gradient at the clean point.
        seed: of the random direction.

    Raises:
        ValueError: an even number of lines, no losses, deltas of another batch, or no sample whose
            losses are finite numbers on the whole plane.
    """
    lines = checks.integer("landscape", "lines", lines, 3)
    if lines % 2 == 0:
        raise ValueError(f"landscape: lines must be odd, to have the clean point; got {lines}")
    reach = checks.real("landscape", "reach", reach, 0)
    checks.one_of("landscape", "second", second, ("random", "gradient"))
    middle = lines // 2
    along = [reach * (i - middle) / middle for i in range(lines)]
    points = Points(loss_fn, sites, mask=mask, subset=subset)
    with points.opened():
        first = points.check(deltas)
        across = _across(points, first, norm, second, seed)
        x = torch.tensor(along).repeat(lines)
        y = torch.tensor(along).repeat_interleave(lines)
        losses = []
        for part in torch.split(torch.arange(lines * lines), lines):
            at = [_plane(a, b, x[part], y[part]) for a, b in zip(first, across, strict=True)]
            losses.append(points.losses(at))
        edge = _edge(points.perturbations, first, across, norm, eps)
    found = torch.cat(losses)
    finite = found.isfinite().all(0)
    if not bool(finite.any()):
        raise ValueError("landscape: no sample has finite losses on the whole plane")
    z = found[:, finite].double().mean(1).reshape(lines, lines)
    return Landscape(along, list(along), z.tolist(), edge, int(finite.sum()), second)


def _plane(first: Tensor, second: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The points `[K, *shape]` at coordinates `[K]`."""
    shape = (-1, *[1] * first.dim())
    return x.to(first).reshape(shape) * first + y.to(first).reshape(shape) * second


def _across(
    points: Points, first: Sequence[Tensor], norm: Any, second: str, seed: int
) -> list[Tensor]:
    """A direction at right angles to the first in each group, and as long as it there."""
    if second == "gradient":
        zero = [torch.zeros_like(delta)[None] for delta in first]
        ((_, grads),) = points.gradients(zero)
        drawn = [grad[0] for grad in grads]
    else:
        generator = torch.Generator().manual_seed(seed)
        drawn = [
            torch.randn(delta.shape, generator=generator, dtype=torch.float32).to(delta)
            for delta in first
        ]
    found = []
    for perturbation, delta, direction in zip(points.perturbations, first, drawn, strict=True):
        mask = perturbation.geometry["mask"]
        if mask is not None:
            direction = direction * mask.reshape(*delta.shape[:-1], 1)
        squared = _inner(perturbation, delta, delta)
        share = _inner(perturbation, direction, delta) / squared.where(squared > 0, 1)
        right = direction - perturbation.per_group_row(share) * delta
        # What is left of a direction that was the first one is rounding.
        left, whole = (_lengths(perturbation, one, "l2") for one in (right, direction))
        length = _lengths(perturbation, right, norm)
        factor = _lengths(perturbation, delta, norm) / length.where(length > 0, 1)
        factor = factor.where(left > 1e-5 * whole, 0)
        found.append(right * perturbation.per_group_row(factor))
    return found


def _edge(
    perturbations: Sequence[Perturbation],
    first: Sequence[Tensor],
    across: Sequence[Tensor],
    norm: Any,
    eps: Strength | None,
) -> list[list[float]]:
    """Where the norm is eps on average over the groups: norms grow along each ray as the way."""
    corners = []
    for k in range(_CORNERS):
        angle = 2 * math.pi * k / _CORNERS
        ratios = []
        for perturbation, one, two in zip(perturbations, first, across, strict=True):
            lengths = _lengths(perturbation, math.cos(angle) * one + math.sin(angle) * two, norm)
            radius = _lengths(perturbation, one, norm)
            moved = radius > 0
            if eps is not None:
                given = perturbation.strength(eps, norm)
                radius = torch.as_tensor(given).to(lengths).expand_as(lengths)
            ratios.append((lengths / radius.where(radius > 0, 1))[moved])
        every = torch.cat(ratios)
        ratio = float(every.mean()) if every.numel() else 0.0
        if ratio > 0 and math.isfinite(ratio):
            corners.append([math.cos(angle) / ratio, math.sin(angle) / ratio])
    return corners


def _lengths(perturbation: Perturbation, value: Tensor, norm: Any) -> Tensor:
    """Norms `[groups]`."""
    return ops.group_norm(value.contiguous(), norm=norm, **perturbation.geometry)


def _inner(perturbation: Perturbation, one: Tensor, two: Tensor) -> Tensor:
    """Inner products `[groups]`."""
    product = one * two
    if perturbation.geometry["group"] == "token":
        return product.sum(-1).flatten()
    return product.flatten(1).sum(1)
