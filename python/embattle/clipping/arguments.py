"""What a clipper is given: numbers, weights and users of Python, numpy or torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from embattle import checks
from embattle.clipping.factors import Bound, Mode

_WHO = "PerSampleClipper"
Weights = Tensor | Sequence[float] | Callable[[Tensor], Tensor] | None


def _plain(value: Any) -> Any:
    """Numbers of numpy and torch as Python's."""
    return value.tolist() if callable(getattr(value, "tolist", None)) else value


def number(name: str, value: Any, least: float = -math.inf) -> float:
    """A finite number that is at least `least`."""
    return checks.real(_WHO, name, _plain(value), least)


def bound(max_norm: Any, mode: Mode, noise_multiplier: float) -> Bound:
    """max_norm as one number, or one for each parameter.

    Raises:
        TypeError: it is something else.
        ValueError: a number is negative or NaN, or infinite with noise; or there are several where
            one bound holds.
    """
    given = _plain(max_norm)
    several = isinstance(given, (list, tuple))
    values = [_plain(value) for value in given] if several else [given]
    found = [checks.real(_WHO, "max_norm", value, 0, finite=False) for value in values]
    if noise_multiplier and math.inf in found:
        raise ValueError(f"{_WHO}: with noise, max_norm must be finite, got inf")
    if not several:
        return found[0]
    if mode != "per_layer":
        raise ValueError(f"{_WHO}: max_norm must be one number for mode {mode!r}, got {len(found)}")
    return tuple(found)


def check_losses(losses: Any) -> None:
    """Check the losses of a batch.

    Raises:
        TypeError: not a tensor.
        ValueError: not [B], or without a gradient.
    """
    if not isinstance(losses, Tensor):
        raise TypeError(f"{_WHO}: losses must be a tensor [B], got {type(losses).__name__}")
    if losses.dim() != 1:
        raise ValueError(
            f"{_WHO}: losses must have shape [B], got {tuple(losses.shape)}; use "
            "reduction='none' and average over whatever is not the batch"
        )
    if not losses.requires_grad and len(losses):
        raise ValueError(
            f"{_WHO}: losses depend on no trained parameter; compute them inside the with block, "
            "with gradients enabled"
        )


def _tensor(name: str, given: Any, losses: Tensor) -> Tensor:
    """What was given, on the CPU if it was no tensor."""
    try:
        return torch.as_tensor(given, device=None if isinstance(given, Tensor) else "cpu").detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{_WHO}: {name} must be numbers, one for each of the {len(losses)} losses, got "
            f"{type(given).__name__}: {error}"
        ) from error


def checked_weights(weights: Weights, losses: Tensor, *, noise: bool) -> Tensor | None:
    """[B] factors of the samples, float64.

    Args:
        weights: what was given.
        losses: [B].
        noise: whether noise is added.
    """
    if weights is None:
        return None
    given = weights(losses.detach()) if callable(weights) else weights
    found = _tensor("weights", given, losses)
    if found.shape != losses.shape:
        raise ValueError(
            f"{_WHO}: weights must have the losses' shape {tuple(losses.shape)}, got "
            f"{tuple(found.shape)}"
        )
    found = found.double()
    if not (noise or found.is_cpu):
        return found.to(losses.device)  # looking at it would wait for the device
    wrong = (found.abs() <= 1 if noise else found.isfinite()).logical_not()  # a NaN too
    if not noise and bool(wrong.any()):
        # Weights that follow from a loss that is not finite go with that sample's gradient.
        wrong &= losses.detach().isfinite().to(found.device)
    if bool(wrong.any()):
        value = float(found[wrong][0])
        if not noise:
            raise ValueError(f"{_WHO}: weights must be finite, got {value}; 0 leaves a sample out")
        raise ValueError(
            f"{_WHO}: with noise, weights must lie in [-1, 1], got {value}: larger ones would "
            "exceed the bound that the noise is made for"
        )
    return found.to(losses.device)


def checked_users(users: Any, losses: Tensor) -> Tensor | None:
    """[B] the users' ids."""
    if users is None:
        return None
    found = _tensor("users", users, losses)
    if found.shape != losses.shape or found.is_floating_point() or found.is_complex():
        raise ValueError(
            f"{_WHO}: users must be {len(losses)} integers, got {found.dtype} of shape "
            f"{tuple(found.shape)}"
        )
    return found.to(losses.device)
