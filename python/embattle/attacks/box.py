"""A box for the perturbed embeddings, and what it leaves a delta."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from embattle import checks
from embattle.perturb.perturbation import Perturbation
from embattle.perturb.strength import words


class ChosenBound(NamedTuple):
    """A bound of a whole batch's embeddings, for an attack on some of its samples.

    Attributes:
        whole: broadcasts to the embeddings of the batch.
        size: samples of the batch.
        rows: int64 `[n]`, which of them are attacked.
    """

    whole: Tensor
    size: int
    rows: Tensor

    def of(self, base: Tensor) -> Tensor:
        """Return the bound of these samples' embeddings, whose padding may be cut on the right."""
        whole = self.whole
        if whole.dim() == base.dim() and len(whole) == self.size:
            whole = whole[self.rows.to(whole.device)]
        for dim in range(-min(whole.dim(), base.dim() - 1), 0):
            if whole.shape[dim] > base.shape[dim]:
                whole = whole.narrow(dim, 0, base.shape[dim])
        return whole


Bound: TypeAlias = float | Tensor | None
# What an attack's copy for some samples of a batch has.
AnyBound: TypeAlias = Bound | ChosenBound

_NO_BOX: dict[str, Any] = {}


def checked_bounds(who: str, lower: AnyBound, upper: AnyBound) -> tuple[AnyBound, AnyBound]:
    """Check an attack's bounds of the embeddings.

    Raises:
        TypeError, ValueError: they are no numbers, hold a NaN, or lower is above upper.
    """
    lower, upper = _checked(who, "lower", lower), _checked(who, "upper", upper)
    if isinstance(lower, ChosenBound) or isinstance(upper, ChosenBound):
        return lower, upper
    if lower is not None and upper is not None:
        low, high = torch.as_tensor(lower), torch.as_tensor(upper)
        if bool((low.to(high.device) > high).any()):
            raise ValueError(f"{who}: lower={words(lower)} is above upper={words(upper)}")
    return lower, upper


def _checked(who: str, side: str, value: AnyBound) -> AnyBound:
    if value is None or isinstance(value, ChosenBound):  # of a bound that was checked
        return value
    if not isinstance(value, Tensor):
        return checks.real(who, side, value, finite=False)
    if value.dtype == torch.bool or value.is_complex() or bool(value.isnan().any()):
        raise ValueError(
            f"{who}: {side} must be numbers, none of them NaN; got {tuple(value.shape)} of "
            f"{value.dtype}"
        )
    return value


def bounds_of_delta(
    who: str, lower: AnyBound, upper: AnyBound, perturbation: Perturbation
) -> dict[str, Tensor]:
    """Return `lower` and `upper`, where there are such bounds, less the clean embeddings.

    Raises:
        ValueError: a bound that does not broadcast to the embeddings.
    """
    found = {}
    base = perturbation.base.to(perturbation.dtype)
    for side, value in (("lower", lower), ("upper", upper)):
        if value is None:
            continue
        if isinstance(value, ChosenBound):
            value = value.of(base)
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
