"""The smallest perturbation of each sample: robust accuracy at every eps from one attack."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from embattle.attacks import FMN, MinimumNormResult
from embattle.audit.evaluation import (
    Sites,
    Tick,
    device_of,
    evaluate,
    examined,
    mean_norms,
    needed,
    run_attack,
)
from embattle.audit.given import Given
from embattle.audit.outcomes import Attacked
from embattle.data.batch import Batch
from embattle.perturb.strength import scaled
from embattle.tasks.evaluator import Evaluator


@dataclass(frozen=True)
class Smallest:
    """The smallest perturbation of each sample.

    Attributes:
        radii: the smallest radius at which each falls, [N], float64, in the attack's unit: 0 where
            a sample is wrong anyway, inf where it was never turned.
        found: the outcome at those radii.
        edge: the outcome of the perturbations that lie in the ball of the radius asked for, made as
            long as the ball allows; samples outside are as without attack.
        known: the samples without attack.
    """

    radii: Tensor
    found: Attacked
    edge: Attacked
    known: Attacked

    def within(self, radius: float) -> Attacked:
        """The outcome in a ball: samples that fall outside of it are as without attack."""
        inside = self.radii <= radius
        rows = inside.reshape(-1, *[1] * (self.known.outputs.dim() - 1))
        return Attacked(
            torch.where(rows, self.found.outputs, self.known.outputs),
            self.known.right & ~inside,
            torch.where(inside, self.found.norms, self.known.norms),
            self.found.steps,
            self.found.seconds,
        )


def smallest(
    model: nn.Module,
    batches: Sequence[Batch],
    sites: Sites,
    attack: FMN,
    *,
    known: Attacked,
    radius: float = 1.0,
    evaluator: Evaluator | None = None,
    tick: Tick = lambda: None,
) -> Smallest:
    """Find the smallest radius at which each sample falls.

    Args:
        model, batches, sites, evaluator, tick: see `embattle.audit.evaluate`.
        attack: the search.
        known: the samples without attack.
        radius: in the attack's unit: perturbations that are shorter are tried at this length too,
            where they tell more of measures that depend on how wrong a sample is.

    Raises:
        NoSmallestError: samples share deltas or depend on each other, or there is no goal.
    """
    evaluator = evaluator or Evaluator()
    began = time.monotonic()
    radii = torch.zeros_like(known.right, dtype=torch.float64)
    found, edge = (_Rows(known) for _ in range(2))
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
                norms = mean_norms(result.norms, part)
                found.put(places, needed(result.outputs), norms, ~result.eps.isfinite())
                found.steps[places] = result.steps.cpu()
                inside = (result.eps <= radius).nonzero().flatten()
                if len(inside) and all(len(delta) == len(part) for delta in result.deltas):
                    longer = (radius / result.eps[inside]).clamp(min=1)
                    deltas = [
                        delta.detach()[inside] * longer.reshape(-1, *[1] * (delta.dim() - 1))
                        for delta in result.deltas
                    ]
                    ball = scaled(attack.unit, radius)
                    given = Given(norm=attack.norm, eps=ball, steps=0, deltas=deltas)
                    few = part.take(inside, cut=False)
                    one = evaluate(model, [few], sites, {"": given}, evaluator=evaluator)[""]
                    edge.put(places[inside.cpu()], one.outputs, one.norms, one.right)
            tick()
    seconds = time.monotonic() - began
    return Smallest(radii, found.outcome(seconds), edge.outcome(0.0), known)


class _Rows:
    """An outcome that is written row by row; at first, that without attack."""

    def __init__(self, known: Attacked) -> None:
        self.outputs, self.right = known.outputs.clone(), known.right.clone()
        self.norms, self.steps = torch.zeros_like(known.norms), torch.zeros_like(known.steps)

    def put(self, places: Tensor, outputs: Tensor, norms: Tensor, right: Tensor) -> None:
        self.outputs[places] = outputs.cpu().to(self.outputs.dtype)
        self.norms[places] = norms.cpu().to(self.norms.dtype)
        self.right[places] = right.cpu()

    def outcome(self, seconds: float) -> Attacked:
        return Attacked(self.outputs, self.right, self.norms, self.steps, seconds)


def standing(radii: Tensor, eps: Sequence[float]) -> list[float]:
    """Share of the samples that stand at each radius.

    Args:
        radii: the smallest radius at which each falls, [N].
        eps: the radii that are asked for.
    """
    return [float((radii > value).double().mean()) for value in eps]
