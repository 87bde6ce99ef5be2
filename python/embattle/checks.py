"""Checks of arguments, with one wording: who asks, which argument, what it must be, what it is."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def one_of(who: str, name: str, value: T, allowed: Sequence[T]) -> T:
    """Check that `value` is among `allowed`."""
    if isinstance(value, (str, int, float, bool, type(None))) and value in allowed:
        return value
    names = ", ".join(map(repr, allowed))
    raise ValueError(f"{who}: {name} must be one of {names}; got {value!r}")


def integer(who: str, name: str, value: Any, least: int) -> int:
    """Check that `value` is a whole number (of Python or numpy) that is at least `least`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{who}: {name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{who}: {name} must be at least {least}, got {value}")
    return int(value)


def real(
    who: str,
    name: str,
    value: Any,
    least: float = -math.inf,
    most: float = math.inf,
    *,
    finite: bool = True,
) -> float:
    """Check that `value` is a number (of Python or numpy) in `[least, most]`; NaN is none."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{who}: {name} must be a number, got {value!r}")
    number = float(value)
    if finite and not math.isfinite(number):
        raise ValueError(f"{who}: {name} must be finite, got {number}")
    if not least <= number <= most:
        bounds = f"at least {least:g}" if math.isinf(most) else f"in [{least:g}, {most:g}]"
        raise ValueError(f"{who}: {name} must be {bounds}, got {number:g}")
    return number


def share(who: str, name: str, value: Any) -> float:
    """Check that `value` is a number above 0, and at most 1."""
    if not (found := real(who, name, value, 0, 1)):
        raise ValueError(f"{who}: {name} must be above 0, got {value!r}")
    return found


def flag(who: str, name: str, value: Any) -> bool:
    """Check that `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{who}: {name} must be True or False, got {value!r}")
    return value
