"""Attributions that Captum has, of the parts of a perturbation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from embattle.errors import need
from embattle.explain.points import Points


def attribute(
    points: Points, deltas: Sequence[Tensor], method: str, *, steps: int, seed: int
) -> list[Tensor]:
    """Attribute the losses to the vectors of the deltas.

    Args:
        points: the batch, opened.
        deltas: one for each perturbed output.
        method: `integrated_gradients`, `ablation` or `shapley`.
        steps: points of the line, or orders.
        seed: of the orders.

    Returns:
        For each delta, of its shape without the last dim.

    Raises:
        InputError: Captum is not installed.
    """
    captum = need("captum.attr", "explain")
    # Captum has the samples in dim 0; what samples share is one.
    coupled = points.coupled
    inputs = tuple(delta[None] if coupled else delta for delta in deltas)

    def losses(*values: Tensor) -> Tensor:
        # A pass of the batch puts the random state back, and Captum draws its orders from it.
        with torch.random.fork_rng(devices=[]):
            found = points.at([value[0] if coupled else value for value in values])
        return found.sum()[None] if coupled else found

    options: dict[str, Any] = {}
    if method == "integrated_gradients":
        made = captum.IntegratedGradients(losses)
        options = {"n_steps": steps, "internal_batch_size": len(inputs[0])}
    else:
        options = {"feature_mask": _numbered(inputs)}
        if method == "shapley":
            made = captum.ShapleyValueSampling(losses)
            options["n_samples"] = steps
        else:
            made = captum.FeatureAblation(losses)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found = made.attribute(inputs, **options)
    # Of a feature's attribution every coordinate has all of it; of a gradient's, its own.
    summed = method == "integrated_gradients"
    values = [one.sum(-1) if summed else one[..., 0] for one in found]
    return [(value[0] if coupled else value).detach() for value in values]


def _numbered(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """A number for each vector, the same for all its coordinates and all samples."""
    masks, start = [], 0
    for one in inputs:
        shape = one.shape[1:-1]
        count = shape.numel()
        numbers = torch.arange(start, start + count, device=one.device)
        masks.append(numbers.reshape(1, *shape, 1).expand(1, *one.shape[1:]).contiguous())
        start += count
    return tuple(masks)
