"""Carry gradients that are known already into a loss that is yet to be backpropagated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node


class _Carrier(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, held: list[Tensor | None], *params: Tensor) -> Tensor:
        ctx.held = held
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        held: list[Tensor | None] | None = ctx.held
        if held is None:
            raise RuntimeError("this loss was backpropagated before; call the objective anew")
        ctx.held = None
        # The gradients are ours alone: they are scaled in place, and handed over without a copy.
        if grad.device.type != "cpu" or grad.item() != 1.0:
            for one in held:
                if one is not None and one.layout == torch.strided:
                    one.mul_(grad.to(one.dtype))
            held = [
                one * grad if one is not None and one.layout != torch.strided else one
                for one in held
            ]
        return (None, None, *held)


def carry(value: Tensor, params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> Tensor:
    """Make a scalar of value `value` whose backward gives each of `params` its gradient.

    Args:
        value: 0-d, detached.
        params: leaves, or tensors whose graph leads on to leaves (those without one are left out).
        grads: d value / d param, or None; they are given away.

    Returns:
        A 0-d tensor, to be backpropagated at most once.
    """
    pairs = [(p, g) for p, g in zip(params, grads, strict=True) if p.requires_grad]
    if not pairs:
        return value
    params, grads = [p for p, _ in pairs], [g for _, g in pairs]
    result: Tensor = _Carrier.apply(value, list(grads), *params)  # type: ignore[no-untyped-call]
    return result


def leaves(loss: Tensor) -> list[Tensor]:
    """Find the leaf tensors that `loss.backward()` would give a gradient to."""
    found: list[Tensor] = []
    seen: set[Node] = set()
    todo = [loss.grad_fn] if loss.grad_fn is not None else []
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor) and variable.is_leaf:
            found.append(variable)
        todo.extend(after for after, _ in node.next_functions if after is not None)
    return found
