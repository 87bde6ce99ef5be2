"""Ops on groups: steps, projections, random starts, noise and norms.

Their signatures and their words are those of the definitions in :mod:`embattle.ops.reference`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from embattle.ops import reference
from embattle.ops._arguments import (
    NORMS,
    Group,
    Norm,
    Strength,
    argument_error,
    is_token,
    norm_order,
    refuse_tangents,
    written_now,
)
from embattle.ops._front import P, front, named

_ops = torch.ops.embattle
# Called where nothing is compiled: without the frame of `OpOverload.__call__`.
_plain_step_ = _ops.pgd_step_plain_.default._op


def _is_plain(options: dict[str, Any], defaults: dict[str, Any]) -> bool:
    """Whether all options have the values that they have where they are not given."""
    for key, value in options.items():  # noqa: SIM110 - a generator takes longer
        if value is not defaults.get(key, options):
            return False
    return True


def _defaults(definition: Callable[..., Any]) -> dict[str, Any]:
    return {name: p.default for name, p in inspect.signature(definition).parameters.items()}


def _step(definition: Callable[P, Tensor], in_place: bool) -> Callable[P, Tensor]:
    """`pgd_step`, by an op of few arguments where there is nothing but a ball of one radius: a
    small call's time is that of its arguments."""
    name = "pgd_step_" if in_place else "pgd_step"
    plain = (_ops.pgd_step_plain_ if in_place else _ops.pgd_step_plain).default
    small = plain._op
    general: Callable[..., Tensor] = front(definition, name)
    defaults = _defaults(definition)

    def step(
        delta: Tensor,
        grad: Tensor,
        *,
        step_size: Strength,
        eps: Strength,
        norm: Norm = "l2",
        group: Group = "sample",
        nonfinite: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        if (
            isinstance(step_size, Tensor)
            or isinstance(eps, Tensor)
            or (options and not _is_plain(options, defaults))
        ):
            return general(
                delta,
                grad,
                step_size=step_size,
                eps=eps,
                norm=norm,
                group=group,
                nonfinite=nonfinite,
                **options,
            )
        compiling = is_compiling()
        try:
            out: Tensor = (plain if compiling else small)(
                delta,
                grad,
                step_size,
                eps,
                NORMS.get(norm) or norm_order(name, norm),
                group != "sample" and is_token(name, group),
                nonfinite,
            )
        except RuntimeError as error:
            raise argument_error(error) from None
        if not in_place:
            return out
        if not compiling:
            written_now(delta)
        return delta

    return named(step, definition, ["delta"] if in_place else [])


def _project(definition: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """`project`, by an op that is a constant to autograd where nothing is to be differentiated."""
    plain = _ops.project_plain.default
    small = plain._op
    differentiable: Callable[..., Tensor] = front(definition, "project")
    constant: Callable[..., Tensor] = front(definition, "project_constant")
    defaults = _defaults(definition)

    def project(
        delta: Tensor,
        *,
        eps: Strength,
        norm: Norm = "l2",
        group: Group = "sample",
        **options: Any,
    ) -> Tensor:
        refuse_tangents("project", delta)
        if getattr(delta, "requires_grad", False):
            return differentiable(delta, eps=eps, norm=norm, group=group, **options)
        if isinstance(eps, Tensor) or (options and not _is_plain(options, defaults)):
            return constant(delta, eps=eps, norm=norm, group=group, **options)
        try:
            call = plain if is_compiling() else small
            out: Tensor = call(
                delta,
                eps,
                NORMS.get(norm) or norm_order("project", norm),
                group != "sample" and is_token("project", group),
            )
        except RuntimeError as error:
            raise argument_error(error) from None
        return out

    return named(project, definition)


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
        _plain_step_(delta, grad, step_size, eps, NORMS[norm], group == "token", nonfinite)
    except RuntimeError as error:
        raise argument_error(error) from None


pgd_step = _step(reference.pgd_step, in_place=False)
pgd_step_ = _step(reference.pgd_step, in_place=True)
project = _project(reference.project)
project_ = front(reference.project, "project_")
random_start = front(reference.random_start, "random_start")
gaussian_noise = front(reference.gaussian_noise, "gaussian_noise", eps=math.inf)
gaussian_noise_ = front(reference.gaussian_noise, "gaussian_noise_", eps=math.inf)
momentum_step = front(reference.momentum_step, "momentum_step")
momentum_step_ = front(reference.momentum_step, "momentum_step_")
group_norm = front(reference.group_norm, "group_norm")
