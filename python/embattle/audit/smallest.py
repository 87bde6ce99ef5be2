"""The smallest perturbation of each sample: robust accuracy at every eps from one attack."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from embattle.attacks import FMN, MinimumNormResult
from embattle.audit.evaluation import (
    Sites,
    Tick,
    device_of,
    examined,
    mean_norms,
    needed,
    run_attack,
)
from embattle.audit.outcomes import Attacked
from embattle.data.batch import Batch
from embattle.tasks.evaluator import Evaluator


def smallest(
    model: nn.Module,
    batches: Sequence[Batch],
    sites: Sites,
    attack: FMN,
    *,
    known: Attacked,
    evaluator: Evaluator | None = None,
    tick: Tick = lambda: None,
) -> tuple[Tensor, Attacked]:
    """Find the smallest radius at which each sample falls.

    Args:
        model, batches, sites, evaluator, tick: see `embattle.audit.evaluate`.
        attack: the search.
        known: the samples without attack.

    Returns:
        The radii [N], float64, in the attack's unit: 0 where a sample is wrong anyway, inf where it
        was never turned; and the outcome at those radii (`within` cuts it to a ball).

    Raises:
        NoSmallestError: samples share deltas or depend on each other, or there is no goal.
    """
    evaluator = evaluator or Evaluator()
    began = time.monotonic()
    radii = torch.zeros(len(known.right), dtype=torch.float64)
    outputs, right = known.outputs.clone(), known.right.clone()
    norms, steps = torch.zeros_like(known.norms), torch.zeros_like(known.steps)
    total = 0
    with examined(model):
        for batch in batches:
            rows = torch.nonzero(known.right[total : total + len(batch)]).flatten()
            places = rows + total
            total += len(batch)
            if len(rows):
                part = batch.take(rows).to(device_of(model))
                result = run_attack(model, part, sites, attack, evaluator=evaluator)
                assert isinstance(result, MinimumNormResult)
                radii[places] = result.eps.double().cpu()
                outputs[places] = needed(result.outputs).cpu().to(outputs.dtype)
                norms[places] = mean_norms(result.norms, part).cpu().to(norms.dtype)
                right[places], steps[places] = ~radii[places].isfinite(), result.steps.cpu()
            tick()
    return radii, Attacked(outputs, right, norms, steps, time.monotonic() - began)


def within(found: Attacked, radii: Tensor, radius: float, known: Attacked) -> Attacked:
    """The outcome in a ball: samples that fall outside of it are as they are known.

    Args:
        found, radii: what `smallest` gave.
        radius: of the ball, in the same unit.
        known: the samples without attack.
    """
    inside = radii <= radius
    rows = inside.reshape(-1, *[1] * (known.outputs.dim() - 1))
    return Attacked(
        torch.where(rows, found.outputs, known.outputs),
        known.right & ~inside,
        torch.where(inside, found.norms, known.norms),
        found.steps,
        found.seconds,
    )


def standing(radii: Tensor, eps: Sequence[float]) -> list[float]:
    """Share of the samples that stand at each radius.

    Args:
        radii: the smallest radius at which each falls, [N].
        eps: the radii that are asked for.
    """
    return [float((radii > value).double().mean()) for value in eps]
