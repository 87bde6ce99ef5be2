"""Steps along gradients, projected."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from embattle.ops._arguments import Bound, Group, Norm, Strength
from embattle.ops.reference.groups import DUAL, Groups, max_of, norms_of
from embattle.ops.reference.projection import Ball


def _direction(grad: Tensor, valid: Tensor, norm: str, top: float) -> Tensor:
    """The direction of steepest ascent u(grad), of norm 1, or 0 where the gradient is 0.

    l1: the signs of the k largest coordinates, each 1/k (lowest index first among equals), where k
    is `top`, or ``max(1, floor(top * n + 0.5))`` for a fraction of the group's n unmasked elements,
    and never more than the number of coordinates that are not 0.
    """
    if norm == "linf":
        return grad.sign()
    if norm == "l2":
        largest = max_of(grad.abs())
        grad = grad / torch.where(largest > 0, largest, 1.0)
        length = norms_of(grad, "l2")
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


def _chosen(grad: Tensor, groups: Groups, norm: str, finite: Tensor, max_groups: int) -> Tensor:
    """[groups, 1] bool: the max_groups tokens of each sample with the largest dual gradient norm.

    Equal norms: the lowest index first. Tokens that are masked out or have a non-finite gradient
    come last.
    """
    samples = groups.shape[0] if len(groups.shape) > 1 else 1
    size = torch.where(finite, norms_of(grad, DUAL[norm]), -1.0)
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
    ball = Ball.of(delta, eps, norm, group, offsets, mask, x0, lower, upper)
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
    ball = Ball.of(delta, eps, norm, group, offsets, mask, x0, lower, upper)
    groups = ball.groups
    g = groups.pack(grad)
    finite = _finite(g, nonfinite)
    g = torch.where(finite, g, 0.0)
    d = groups.pack(delta) - ball.origin
    step = groups.column(step_size)
    if style == "mi":
        old = groups.pack(velocity)
        largest = max_of(g.abs())
        g = g / torch.where(largest > 0, largest, 1.0)
        length = norms_of(g, "l1")
        new = torch.where(finite, decay * old + g / torch.where(length > 0, length, 1.0), old)
        z = d + step * torch.where(finite, _direction(new, groups.valid, ball.norm, top), 0.0)
        memory = groups.unpack(new.to(velocity.dtype), torch.zeros_like(velocity))
    else:
        old = groups.pack(velocity) - ball.origin
        z = ball.project(d + step * _direction(g, groups.valid, ball.norm, top))
        z = torch.where(finite, d + decay * (z - d) + (1 - decay) * (d - old), d)
        memory = groups.unpack(groups.pack(delta).to(velocity.dtype), ball.base.to(velocity.dtype))
    return ball.finish(z, delta), memory


def pgd_step_(delta: Tensor, grad: Tensor, **options: object) -> Tensor:
    """:func:`pgd_step` written into delta."""
    return delta.copy_(pgd_step(delta, grad, **options))  # type: ignore[arg-type]


def momentum_step_(
    delta: Tensor, velocity: Tensor, grad: Tensor, **options: object
) -> tuple[Tensor, Tensor]:
    """:func:`momentum_step` written into delta and velocity."""
    new, memory = momentum_step(delta, velocity, grad, **options)  # type: ignore[arg-type]
    return delta.copy_(new), velocity.copy_(memory)
