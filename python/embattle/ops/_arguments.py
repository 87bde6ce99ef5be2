"""What the op wrappers share: translating the field's words into what the schemas take."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Final, Literal, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

Norm: TypeAlias = str | float
Group: TypeAlias = Literal["sample", "token"]
Strength: TypeAlias = float | Tensor
Bound: TypeAlias = float | Tensor | None

NORMS: Final[dict[Norm, float]] = {
    "l1": 1.0,
    "l2": 2.0,
    "linf": math.inf,
    "L1": 1.0,
    "L2": 2.0,
    "Linf": math.inf,
    "LINF": math.inf,
    "inf": math.inf,
    1: 1.0,
    2: 2.0,
    math.inf: math.inf,
}

_unpack_dual: Callable[[Tensor], forward_ad.UnpackedDualTensor] = forward_ad.unpack_dual
# What `torch.autograd.graph.increment_version` calls.
_increment_version: Callable[[tuple[Tensor, ...]], None] = torch._C._increment_version


def norm_order(op: str, norm: Norm) -> float:
    """The order of a norm, as a float: 1, 2 or inf.

    Raises:
        ValueError: for any other norm.
    """
    order = NORMS.get(norm)
    if order is None:
        order = NORMS.get(norm.lower()) if isinstance(norm, str) else None
    if order is None:
        raise ValueError(f"embattle.{op}: norm must be 'l1', 'l2' or 'linf', got {norm!r}")
    return order


def is_token(op: str, group: Group) -> bool:
    """Whether groups are vectors of the last dim.

    Raises:
        ValueError: when `group` is neither "sample" nor "token".
    """
    if group == "sample":
        return False
    if group == "token":
        return True
    raise ValueError(f"embattle.{op}: group must be 'sample' or 'token', got {group!r}")


def draw_key(op: str, generator: torch.Generator | None) -> Tensor:
    """Two 63-bit numbers for Philox, drawn on the generator's device (the CPU by default).

    The CPU's default generator serves every device, so that one seed gives the same numbers
    everywhere. Pass a CUDA generator inside a CUDA graph.

    Raises:
        TypeError: when `generator` is none.
    """
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"embattle.{op}: generator must be a torch.Generator or None, got {generator!r}"
        )
    device = torch.device("cpu") if generator is None else generator.device
    return torch.randint(0, 2**63 - 1, (2,), dtype=torch.int64, device=device, generator=generator)


def argument_error(error: RuntimeError) -> Exception:
    """Turns a native argument check's RuntimeError into what Python users expect."""
    text = str(error)
    if text.startswith("embattle."):
        return ValueError(text.split("\n", 1)[0])
    if "There were no tensor arguments" in text:
        op = text.split("schema embattle::", 1)[1].split(".", 1)[0]
        names = [a.name for a in getattr(torch.ops.embattle, op).default._schema.arguments]
        return TypeError(f"embattle.{_function(op)}: {names[0]} must be a tensor, got None")
    if "Expected a value of type" in text:
        line = text.split("\n", 1)[0]
        return TypeError(
            re.sub(r"^embattle::(\w+)\(\)", lambda found: f"embattle.{_function(found[1])}:", line)
        )
    return error


def _function(op: str) -> str:
    """The function here that calls an op of torch.ops.embattle."""
    return op.removesuffix("_constant").removesuffix("_plain").replace("_plain_", "_")


def written(*tensors: Tensor) -> None:
    """Tells autograd that an op wrote these tensors, so that it refuses stale saved values."""
    if is_compiling():
        return  # the compiled graph writes them by copy_, which tells
    for tensor in tensors:
        written_now(tensor)


def written_now(tensor: Tensor) -> None:
    """The same of one tensor, where nothing is compiled."""
    if not tensor.is_inference():
        _increment_version((tensor,))


def refuse_tangents(op: str, *tensors: Tensor) -> None:
    """Refuses, for a differentiable op, tensors with a tangent: it would be lost without a word.

    Raises:
        NotImplementedError: a tensor has one.
    """
    if forward_ad._current_level < 0:  # no forward-mode differentiation is going on
        return
    if any(_unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise NotImplementedError(
            f"embattle.{op}: is differentiable in reverse mode alone (backward, "
            "torch.autograd.grad), and was given a tensor with a tangent (torch.func.jvp, jacfwd, "
            f"forward_ad); in plain torch it is embattle.ops.reference.{op}"
        )
