"""Which parts of a perturbation carried the rise of the loss.

The share of a part in the perturbation's norm says little: where each token has a ball of its own,
all have the same. So the loss is followed from the clean point to the perturbed one, and each part
gets what the loss rose along its coordinates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embattle import checks
from embattle.explain import captum_methods
from embattle.explain.points import Points, Subset
from embattle.perturb.attacked_batch import Masks
from embattle.perturb.evaluation import LossFn
from embattle.perturb.perturbation import Perturbation
from embattle.perturb.site import Site

# Points on the line: more of them until the parts miss less than this share of every rise.
_POINTS, _MISSED = (6, 24, 96), 0.01

Method: TypeAlias = Literal["path", "integrated_gradients", "ablation", "shapley"]
METHODS = ("path", "integrated_gradients", "ablation", "shapley")


@dataclass(frozen=True)
class Carried:
    """What the parts of a perturbation did to the loss.

    A part is a vector: a token's, a field's, an item's, a row of a table. Where samples share
    deltas (rows of tables), all losses are one sum, and B is 1.

    Attributes:
        clean: losses without perturbation, `[B]`.
        attacked: losses under it, `[B]`.
        parts: for each perturbed output, what each part added to the loss, `[B, P]`.
        sizes: likewise the part's share of the sample's squared l2 norm.
        movable: likewise bool, whether the part could move; padding could not.
        method: how `parts` were found.
    """

    clean: Tensor
    attacked: Tensor
    parts: list[Tensor]
    sizes: list[Tensor]
    movable: list[Tensor]
    method: str

    @property
    def increase(self) -> Tensor:
        """How much the loss rose, `[B]`."""
        return self.attacked - self.clean

    @property
    def gap(self) -> Tensor:
        """What of the rise the parts do not add up to, `[B]`.

        For "path" the error of the quadrature, for "ablation" what parts did only together.
        """
        return self.increase - _sum(self.parts)

    def shares(self) -> list[Tensor]:
        """Give each part's share, `[B, P]` for each output: they add up to 1 over all outputs.

        Shares may be negative: the part held the loss down. All are 0 where the loss did not rise.
        """
        total = _sum(self.parts)
        usable = (total > 0) & total.isfinite()
        return [
            torch.where(usable[:, None], part / torch.where(usable, total, 1)[:, None], 0.0)
            for part in self.parts
        ]


def carried(
    loss_fn: LossFn,
    sites: Site | Sequence[Site],
    deltas: Sequence[Tensor],
    *,
    mask: Masks = None,
    subset: Subset | None = None,
    steps: int | None = None,
    method: Method = "path",
    seed: int = 0,
) -> Carried:
    """Divide the rise of the loss under a perturbation among its parts.

    `path` is integrated gradients (Sundararajan, Taly and Yan, ICML 2017, eq. 1) along the straight
    line from the clean point to the perturbed one: a part gets the integral of its gradient times
    its delta, and the parts add up to the rise (their proposition 1). The integral is taken by
    Gauss's rule, exact for losses that are polynomials of a degree below 2 `steps` on the line.

    The other methods are Captum's (`pip install 'embattle[explain]'`): `integrated_gradients` is
    the same again; `ablation` takes one part's delta away at a time, `shapley` adds them in random
    orders (Castro, Gomez and Tejada, 2009).

    Args:
        loss_fn: runs the attacked batch; returns losses `[B]` or an `Evaluation` with losses.
        sites: where it was attacked.
        deltas: of the attack's result, one for each perturbed output; or the one that a joint
            attack has for all of them.
        mask: as the attack had it.
        subset: the loss function of some samples, all as wide as in the batch: several points then
            share a pass, which is faster.
        steps: points on the line; for `shapley` the orders that are drawn (32 by default). For
            `path` None takes 6, and 24 or 96 while the parts of a sample miss more than 1 % of its
            rise (a layer norm of a vector near zero bends the line).
        method: see above.
        seed: of the orders.

    Raises:
        ValueError: there are no losses, or the deltas are of another batch; an unknown method.
        InputError: Captum is not installed and the method needs it.
    """
    if steps is not None:
        steps = checks.integer("carried", "steps", steps, 1)
    checks.one_of("carried", "method", method, METHODS)
    points = Points(loss_fn, sites, mask=mask, subset=subset)
    with points.opened():
        given = points.check(_of_outputs(deltas, points.perturbations))
        clean = points.clean
        attacked = points.losses([delta[None] for delta in given])[0]
        if method == "path":
            parts = _along_the_line(points, given, steps or _POINTS[0])
            for count in _POINTS[1:] if steps is None else ():
                _refine(points, given, parts, attacked - points.clean, count)
        else:
            parts = captum_methods.attribute(points, given, method, steps=steps or 32, seed=seed)
        coupled = points.coupled
        perturbations = points.perturbations
    if coupled:
        clean, attacked = clean.sum()[None], attacked.sum()[None]
    tables = [_table(part, coupled) for part in parts]
    squares = [_table(delta.square().sum(-1), coupled) for delta in given]
    whole = _sum(squares).clamp(min=torch.finfo(squares[0].dtype).tiny)
    return Carried(
        clean=clean,
        attacked=attacked,
        parts=tables,
        sizes=[square / whole[:, None] for square in squares],
        movable=[_table(_movable(p), coupled) for p in perturbations],
        method=method,
    )


def _along_the_line(
    points: Points, deltas: list[Tensor], steps: int, rows: Tensor | None = None
) -> list[Tensor]:
    """Integrated gradients of each vector, of the deltas' shapes without their last dim.

    `rows` are the samples that the deltas belong to; None: all.
    """
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    at = [_scaled(delta, (nodes + 1) / 2) for delta in deltas]
    parts = [torch.zeros_like(delta[..., 0]) for delta in deltas]
    for place, grads in points.gradients(at, rows):
        for part, grad, delta in zip(parts, grads, deltas, strict=True):
            weight = torch.from_numpy(weights[place : place + len(grad)] / 2).to(part)
            part += torch.tensordot(weight, (grad * delta).sum(-1), dims=1)
    return parts


def _refine(
    points: Points, deltas: list[Tensor], parts: list[Tensor], rise: Tensor, steps: int
) -> None:
    """Take more points for the samples whose parts do not add up to the rise, in place."""
    coupled = points.coupled
    whole = rise.sum()[None] if coupled else rise
    missed = (whole - _sum([_table(part, coupled) for part in parts])).abs()
    rows = torch.nonzero((missed > _MISSED * whole.abs()) & whole.isfinite()).flatten()
    if not len(rows):
        return
    if points.divisible:
        better = _along_the_line(points, [delta[rows] for delta in deltas], steps, rows)
        for part, new in zip(parts, better, strict=True):
            part[rows] = new
    else:
        parts[:] = _along_the_line(points, deltas, steps)


def _scaled(delta: Tensor, factors: NDArray[np.float64]) -> Tensor:
    """`[K, *shape]`: a delta times each of K factors."""
    scale = torch.from_numpy(factors).to(delta)
    return scale.reshape(-1, *[1] * delta.dim()) * delta


def _of_outputs(
    deltas: Sequence[Tensor], perturbations: Sequence[Perturbation]
) -> Sequence[Tensor]:
    """Give a joint attack's delta, `[B, elements of all outputs, 1]`, as one for each output."""
    shapes = [perturbation.delta.shape for perturbation in perturbations]
    sizes = [shape[1:].numel() for shape in shapes]
    if [delta.shape for delta in deltas] != [(shapes[0][0], sum(sizes), 1)]:
        return deltas
    parts = torch.split(deltas[0], sizes, dim=1)
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def _table(values: Tensor, coupled: bool) -> Tensor:
    """`[B, P]`: one row for each sample; one in all where samples share what is perturbed."""
    return values.reshape(1, -1) if coupled else values.reshape(len(values), -1)


def _movable(perturbation: Perturbation) -> Tensor:
    """Which vectors could move, of the delta's shape without its last dim."""
    mask = perturbation.geometry["mask"]
    like = perturbation.delta[..., 0]
    every = torch.ones_like(like, dtype=torch.bool)
    return every if mask is None else every & mask.reshape(like.shape)


def _sum(tables: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(tables), dim=1).sum(1)
