"""Ops on groups: steps, projections, random starts, noise and norms."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.compiler import is_compiling

from embattle.ops._arguments import (
    NORMS,
    Bound,
    Group,
    Norm,
    Strength,
    argument_error,
    bound,
    budget,
    draw_key,
    is_token,
    norm_order,
    strength,
    written,
)

# Called with positional arguments in the order of the schemas in csrc/library.cpp: binding so many
# keywords takes longer than a small op itself.
_ops = torch.ops.embattle
# The plain ops without the frame of `OpOverload.__call__`, which compiled code needs.
_pgd_step_plain = _ops.pgd_step_plain.default._op
_pgd_step_plain_ = _ops.pgd_step_plain_.default._op
_project_plain = _ops.project_plain.default._op


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
            largest gradient norm (the dual norm).
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
    try:
        if (
            offsets is mask is x0 is lower is upper is max_groups is None
            and top == 1
            and not (isinstance(step_size, Tensor) or isinstance(eps, Tensor))
        ):
            call = _ops.pgd_step_plain.default if is_compiling() else _pgd_step_plain
            plain: Tensor = call(
                delta,
                grad,
                step_size,
                eps,
                NORMS.get(norm) or norm_order("pgd_step", norm),
                group != "sample" and is_token("pgd_step", group),
                nonfinite,
            )
            return plain
        step, step_per_group = strength(step_size)
        radius, eps_per_group = strength(eps)
        low, lower_per_element = bound(lower)
        high, upper_per_element = bound(upper)
        out: Tensor = _ops.pgd_step.default(
            delta,
            grad,
            step,
            radius,
            NORMS.get(norm) or norm_order("pgd_step", norm),
            is_token("pgd_step", group),
            offsets,
            mask,
            step_per_group,
            eps_per_group,
            top,
            budget("pgd_step", max_groups),
            x0,
            low,
            high,
            lower_per_element,
            upper_per_element,
            nonfinite,
        )
    except RuntimeError as error:
        raise argument_error(error) from None
    return out


def pgd_step_(
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
    """As :func:`pgd_step`, written into `delta`, which is returned."""
    try:
        if (
            offsets is mask is x0 is lower is upper is max_groups is None
            and top == 1
            and not (isinstance(step_size, Tensor) or isinstance(eps, Tensor))
        ):
            call = _ops.pgd_step_plain_.default if is_compiling() else _pgd_step_plain_
            call(
                delta,
                grad,
                step_size,
                eps,
                NORMS.get(norm) or norm_order("pgd_step_", norm),
                group != "sample" and is_token("pgd_step_", group),
                nonfinite,
            )
        else:
            step, step_per_group = strength(step_size)
            radius, eps_per_group = strength(eps)
            low, lower_per_element = bound(lower)
            high, upper_per_element = bound(upper)
            _ops.pgd_step_.default(
                delta,
                grad,
                step,
                radius,
                NORMS.get(norm) or norm_order("pgd_step_", norm),
                is_token("pgd_step_", group),
                offsets,
                mask,
                step_per_group,
                eps_per_group,
                top,
                budget("pgd_step_", max_groups),
                x0,
                low,
                high,
                lower_per_element,
                upper_per_element,
                nonfinite,
            )
    except RuntimeError as error:
        raise argument_error(error) from None
    written(delta)
    return delta


def plain_step_(
    delta: Tensor,
    grad: Tensor,
    step_size: float,
    eps: float,
    norm: Norm,
    group: Group,
    nonfinite: Tensor | None,
) -> None:
    """:func:`pgd_step_` where there is a ball of one radius and nothing else, for loops.

    Takes half of its time on a small tensor: arguments have their places, and autograd is not told
    that `delta` is written. Not for compiled code.
    """
    try:
        _pgd_step_plain_(delta, grad, step_size, eps, NORMS[norm], group == "token", nonfinite)
    except RuntimeError as error:
        raise argument_error(error) from None


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
    differentiable = getattr(delta, "requires_grad", False)
    try:
        if (
            offsets is mask is x0 is lower is upper is None
            and not differentiable
            and not isinstance(eps, Tensor)
        ):
            call = _ops.project_plain.default if is_compiling() else _project_plain
            plain: Tensor = call(
                delta,
                eps,
                NORMS.get(norm) or norm_order("project", norm),
                group != "sample" and is_token("project", group),
            )
            return plain
        radius, eps_per_group = strength(eps)
        low, lower_per_element = bound(lower)
        high, upper_per_element = bound(upper)
        out: Tensor = (_ops.project if differentiable else _ops.project_constant).default(
            delta,
            radius,
            NORMS.get(norm) or norm_order("project", norm),
            is_token("project", group),
            offsets,
            mask,
            eps_per_group,
            x0,
            low,
            high,
            lower_per_element,
            upper_per_element,
        )
    except RuntimeError as error:
        raise argument_error(error) from None
    return out


def project_(
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
    """As :func:`project`, written into `delta`, which is returned. Not differentiable."""
    radius, eps_per_group = strength(eps)
    low, lower_per_element = bound(lower)
    high, upper_per_element = bound(upper)
    try:
        _ops.project_.default(
            delta,
            radius,
            NORMS.get(norm) or norm_order("project_", norm),
            is_token("project_", group),
            offsets,
            mask,
            eps_per_group,
            x0,
            low,
            high,
            lower_per_element,
            upper_per_element,
        )
    except RuntimeError as error:
        raise argument_error(error) from None
    written(delta)
    return delta


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
    """
    radius, eps_per_group = strength(eps)
    low, lower_per_element = bound(lower)
    high, upper_per_element = bound(upper)
    try:
        out: Tensor = _ops.random_start.default(
            like,
            draw_key("random_start", generator),
            radius,
            NORMS.get(norm) or norm_order("random_start", norm),
            is_token("random_start", group),
            offsets,
            mask,
            eps_per_group,
            x0,
            low,
            high,
            lower_per_element,
            upper_per_element,
        )
    except RuntimeError as error:
        raise argument_error(error) from None
    return out


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
    deviation, std_per_group = strength(std)
    radius, eps_per_group = strength(math.inf if eps is None else eps)
    low, lower_per_element = bound(lower)
    high, upper_per_element = bound(upper)
    try:
        out: Tensor = _ops.gaussian_noise.default(
            x,
            draw_key("gaussian_noise", generator),
            deviation,
            radius,
            NORMS.get(norm) or norm_order("gaussian_noise", norm),
            is_token("gaussian_noise", group),
            offsets,
            mask,
            std_per_group,
            eps_per_group,
            x0,
            low,
            high,
            lower_per_element,
            upper_per_element,
        )
    except RuntimeError as error:
        raise argument_error(error) from None
    return out


def gaussian_noise_(
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
    """As :func:`gaussian_noise`, written into `x`, which is returned."""
    deviation, std_per_group = strength(std)
    radius, eps_per_group = strength(math.inf if eps is None else eps)
    low, lower_per_element = bound(lower)
    high, upper_per_element = bound(upper)
    try:
        _ops.gaussian_noise_.default(
            x,
            draw_key("gaussian_noise_", generator),
            deviation,
            radius,
            NORMS.get(norm) or norm_order("gaussian_noise_", norm),
            is_token("gaussian_noise_", group),
            offsets,
            mask,
            std_per_group,
            eps_per_group,
            x0,
            low,
            high,
            lower_per_element,
            upper_per_element,
        )
    except RuntimeError as error:
        raise argument_error(error) from None
    written(x)
    return x


_STYLES = {"mi": False, "apgd": True}


def _is_apgd(op: str, style: str) -> bool:
    if style not in _STYLES:
        raise ValueError(f"embattle.{op}: style must be 'mi' or 'apgd', got {style!r}")
    return _STYLES[style]


def momentum_step(
    delta: Tensor,
    velocity: Tensor,
    grad: Tensor,
    *,
    decay: float,
    step_size: Strength,
    eps: Strength,
    style: str = "mi",
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
    ``style="apgd"``: `velocity` holds the previous perturbation;
    ``z = P(delta + step_size * u(g))``,
    ``delta' = P(delta + decay * (z - delta) + (1 - decay) * (delta - velocity))``, ``v' = delta``.

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
    step, step_per_group = strength(step_size)
    radius, eps_per_group = strength(eps)
    low, lower_per_element = bound(lower)
    high, upper_per_element = bound(upper)
    try:
        out: tuple[Tensor, Tensor] = _ops.momentum_step.default(
            delta,
            velocity,
            grad,
            decay,
            step,
            radius,
            NORMS.get(norm) or norm_order("momentum_step", norm),
            _is_apgd("momentum_step", style),
            is_token("momentum_step", group),
            offsets,
            mask,
            step_per_group,
            eps_per_group,
            top,
            x0,
            low,
            high,
            lower_per_element,
            upper_per_element,
            nonfinite,
        )
    except RuntimeError as error:
        raise argument_error(error) from None
    return out


def momentum_step_(
    delta: Tensor,
    velocity: Tensor,
    grad: Tensor,
    *,
    decay: float,
    step_size: Strength,
    eps: Strength,
    style: str = "mi",
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
    """As :func:`momentum_step`, written into `delta` and `velocity`, which are returned."""
    step, step_per_group = strength(step_size)
    radius, eps_per_group = strength(eps)
    low, lower_per_element = bound(lower)
    high, upper_per_element = bound(upper)
    try:
        _ops.momentum_step_.default(
            delta,
            velocity,
            grad,
            decay,
            step,
            radius,
            NORMS.get(norm) or norm_order("momentum_step_", norm),
            _is_apgd("momentum_step_", style),
            is_token("momentum_step_", group),
            offsets,
            mask,
            step_per_group,
            eps_per_group,
            top,
            x0,
            low,
            high,
            lower_per_element,
            upper_per_element,
            nonfinite,
        )
    except RuntimeError as error:
        raise argument_error(error) from None
    written(delta, velocity)
    return delta, velocity


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
    try:
        out: Tensor = _ops.group_norm.default(
            x,
            NORMS.get(norm) or norm_order("group_norm", norm),
            is_token("group_norm", group),
            offsets,
            mask,
        )
    except RuntimeError as error:
        raise argument_error(error) from None
    return out
