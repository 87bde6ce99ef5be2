"""Attach precomputed gradients to a loss that is backpropagated later; accumulate gradients."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node


class _PrecomputedGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, held: list[Tensor | None], *params: Tensor) -> Tensor:
        ctx.held = held
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph=True: the gradients of this loss were computed in the call of the "
                "objective, and have no graph to be differentiated again; use "
                "AdversarialObjective(..., early_backward=False), a form other than 'free' and "
                "'freeat', and no AWP"
            )
        held: list[Tensor | None] | None = ctx.held
        if held is None:
            raise RuntimeError("this loss was backpropagated before; call the objective again")
        ctx.held = None
        # The gradients are given away: they are scaled in place, and handed over without a copy.
        if grad.device.type != "cpu" or grad.item() != 1.0:
            held = [
                one if one is None else one.mul_(factor) if mine else (one * factor).to(one.dtype)
                for one, mine in zip(held, _own_memory(held), strict=True)
                for factor in [grad if one is None else grad.to(one.dtype)]
            ]
        return (None, None, *held)


def _own_memory(grads: Sequence[Tensor | None]) -> list[bool]:
    """Return which gradients own their memory, and so may be written in place.

    Autograd gives both terms of a sum the same tensor, and a sum's terms an expanded number.
    """
    plain = [g if type(g) is Tensor and g.layout == torch.strided else None for g in grads]
    storages = [None if g is None else g.untyped_storage() for g in plain]
    users = Counter(s.data_ptr() for s in storages if s is not None)
    return [
        g is not None
        and s is not None
        and s.nbytes() == g.numel() * g.element_size()
        and users[s.data_ptr()] == 1
        for g, s in zip(plain, storages, strict=True)
    ]


def accumulate(total: list[Tensor | None], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Add gradients to a running total (an empty list at first), in place where that is safe."""
    if not total:
        return list(grads)
    found: list[Tensor | None] = []
    pairs: list[tuple[Tensor, Tensor]] = []
    for one, grad, mine in zip(total, grads, _own_memory(total), strict=True):
        if one is None or grad is None:
            found.append(grad if one is None else one)
        elif mine and grad.layout == torch.strided:
            pairs.append((one, grad))
            found.append(one)
        else:
            found.append(one + grad)
    if pairs:
        torch._foreach_add_([one for one, _ in pairs], [grad for _, grad in pairs])
    return found


def attach_gradients(
    value: Tensor, params: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> Tensor:
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
    result: Tensor = _PrecomputedGradients.apply(value, list(grads), *params)  # type: ignore[no-untyped-call]
    return result


class Reached(NamedTuple):
    """What a backward pass reaches.

    Attributes:
        leaves: the leaf tensors that it would give a gradient to.
        oldest: the least number of a node, which are numbered as they are made in a thread.
    """

    leaves: list[Tensor]
    oldest: int


def next_number() -> int:
    """Return the number that the next node of a graph will have, in this thread."""
    return int(torch.autograd._get_sequence_nr())  # type: ignore[attr-defined]


def reached(loss: Tensor) -> Reached:
    """Find what `loss.backward()` would reach."""
    found: list[Tensor] = []
    seen: set[Node] = set()
    oldest = sys.maxsize
    todo = [loss.grad_fn] if loss.grad_fn is not None else []
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor) and variable.is_leaf:
            found.append(variable)
        else:
            oldest = min(oldest, node._sequence_nr())
        todo.extend(after for after, _ in node.next_functions if after is not None)
    return Reached(found, oldest)
