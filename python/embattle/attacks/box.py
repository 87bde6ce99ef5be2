"""A box for the perturbed embeddings, and what it leaves a delta."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

from embattle import checks
from embattle.perturb.perturbation import Perturbation
from embattle.perturb.strength import words

Bound: TypeAlias = float | Tensor | None

_NO_BOX: dict[str, Any] = {}


def checked_bounds(who: str, lower: Bound, upper: Bound) -> tuple[Bound, Bound]:
    """Check an attack's bounds of the embeddings.

    Raises:
        TypeError, ValueError: they are no numbers, hold a NaN, or lower is above upper.
    """
    lower, upper = _checked(who, "lower", lower), _checked(who, "upper", upper)
    if lower is not None and upper is not None:
        low, high = torch.as_tensor(lower), torch.as_tensor(upper)
        if bool((low.to(high.device) > high).any()):
            raise ValueError(f"{who}: lower={words(lower)} is above upper={words(upper)}")
    return lower, upper


def _checked(who: str, side: str, value: Bound) -> Bound:
    if value is None:
        return None
    if not isinstance(value, Tensor):
        return checks.real(who, side, value, finite=False)
    if value.dtype == torch.bool or value.is_complex() or bool(value.isnan().any()):
        raise ValueError(
            f"{who}: {side} must be numbers, none of them NaN; got {tuple(value.shape)} of "
            f"{value.dtype}"
        )
    return value


def bounds_of_delta(
    who: str, lower: Bound, upper: Bound, perturbation: Perturbation
) -> dict[str, Tensor]:
    """Return `lower` and `upper`, where there are such bounds, less the clean embeddings.

    Raises:
        ValueError: a bound that does not broadcast to the embeddings.
    """
    found = {}
    base = perturbation.base.to(perturbation.delta.dtype)
    for side, value in (("lower", lower), ("upper", upper)):
        if value is None:
            continue
        bound = torch.as_tensor(value, dtype=base.dtype, device=base.device)
        if perturbation.joined and bound.dim():
            raise ValueError(f"joint: one {side} for all outputs: give a number")
        try:
            bound = bound.expand_as(base) - base
        except RuntimeError as error:
            raise ValueError(
                f"{who}: {side} of shape {tuple(bound.shape)} does not "
                f"broadcast to the embeddings {tuple(base.shape)}, samples first"
            ) from error
        # The clean embeddings are always allowed.
        found[side] = bound.clamp(max=0) if side == "lower" else bound.clamp(min=0)
    return found


def box(state: dict[str, Any]) -> dict[str, Any]:
    """Return an attack's bounds of the delta, as the ops take them."""
    if "lower" not in state and "upper" not in state:
        return _NO_BOX
    return {"lower": state.get("lower"), "upper": state.get("upper")}
