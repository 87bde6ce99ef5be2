"""Outputs whose deltas move with the gradient that arrives there, and what is kept of samples."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from embattle import ops
from embattle.attacks.base import Attack
from embattle.attacks.box import box
from embattle.objectives.kept_deltas import KeptDeltas
from embattle.perturb.perturbation import Perturbation


class Place(NamedTuple):
    """What is kept of the samples that come again at one output: deltas, and what steps carry."""

    deltas: KeptDeltas
    carried: dict[str, KeptDeltas]


class Moving(NamedTuple):
    """An output of the batch, which the gradient that arrives there will move.

    Attributes:
        perturbation: its deltas.
        state: the attack's.
    """

    perturbation: Perturbation
    state: dict[str, Any]


def carries(attack: Attack) -> tuple[str, ...]:
    assert attack.carries is not None  # `_refuse` saw to it
    return attack.carries


def add(
    outputs: list[Tensor], edges: list[GradientEdge], perturbation: Perturbation, value: Tensor
) -> Tensor:
    """Make the perturbed output; the edge at which its gradient arrives is noted."""
    addition = perturbation.additions()[0]
    if not value.requires_grad:  # the modules are not trained
        addition = addition.requires_grad_()
    output = value + addition.to(value.dtype)
    outputs.append(output)
    edges.append(get_gradient_edge(output))  # the model may change the output in place
    return output


def put(
    attack: Attack,
    moving: Moving,
    kept: Place,
    rows: list[int],
    numbers: list[int],
    samples: list[int],
) -> None:
    """Give samples that come again what was kept of them."""
    perturbation, state = moving
    places = (
        torch.tensor(rows, device=perturbation.base.device),
        torch.tensor(numbers, device=perturbation.base.device),
        samples,
    )
    delta = kept.deltas.put(perturbation, *places)
    for key, values in kept.carried.items():
        if key in carries(attack):
            state[key] = values.put(perturbation, *places, state[key])
    # The radius may be another one than at the visit before.
    geometry = perturbation.geometry
    perturbation.set(
        ops.project(delta, eps=state["eps"], norm=attack.norm, **geometry, **box(state))
    )
