"""Probes: whether a model's gradients say what is true, and whether it draws random numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from embattle import ops
from embattle.attacks.ensemble import same_evaluation
from embattle.audit.evaluation import Sites, device_of, examined
from embattle.data.batch import Batch
from embattle.perturb.attacked_batch import AttackedBatch
from embattle.perturb.evaluation import Evaluation
from embattle.perturb.gradients import NoGradient
from embattle.perturb.perturbation import Perturbation
from embattle.perturb.strength import Strength
from embattle.tasks.evaluator import Evaluator

_DUAL = {"l2": "l2", "linf": "l1", "l1": "linf"}
# The share of eps that counts as a small step.
_SMALL = 0.05


@dataclass(frozen=True)
class GradientProbe:
    """What the gradient at the clean embeddings says, and what is true of it, for each sample.

    Where samples share deltas, each batch counts as one sample.

    Attributes:
        slope: by how much the loss rises in the ball, by its gradient, [N]; 0 without a gradient.
        loss: the loss without perturbation, [N].
        rise: by how much it rises in a small step along the gradient, [N].
        right: whether a sample is right after one step to the edge of the ball, bool [N], of all
            samples.
    """

    slope: Tensor
    loss: Tensor
    rise: Tensor
    right: Tensor

    @property
    def vanishing(self) -> Tensor:
        """Samples without a gradient that float32 can hold, bool [N]."""
        return ~(self.slope > torch.finfo(torch.float32).tiny) | ~self.slope.isfinite()

    @property
    def rounded(self) -> Tensor:
        """Samples whose loss is 0 up to rounding, bool [N]: its gradient is hardly one."""
        return self.loss.abs() < torch.finfo(self.loss.dtype).eps

    @property
    def expected(self) -> Tensor:
        """By how much the loss should rise in the small step, [N]."""
        return _SMALL * self.slope

    @property
    def told(self) -> Tensor:
        """Samples whose rise can be told from rounding, bool [N]."""
        return ~self.vanishing & (self.expected > 1e-5 + 1e-4 * self.loss.abs())

    @property
    def wrong(self) -> Tensor:
        """Samples whose loss changes otherwise than their gradient says, bool [N]."""
        ratio = self.rise / self.expected
        return self.told & ~((ratio > 0.25) & (ratio < 4))


def probe_gradients(
    model: nn.Module,
    batches: Sequence[Batch],
    sites: Sites,
    *,
    norm: str,
    eps: Strength,
    evaluator: Evaluator,
) -> GradientProbe:
    """Take the gradient of each sample's loss, and go along it: a small step, and one of eps.

    Args:
        model, batches, sites, evaluator: see `embattle.audit.evaluate`.
        norm, eps: the ball.
    """
    slopes, losses, rises, right = [], [], [], []
    with examined(model):
        for batch in batches:
            here = batch.to(device_of(model))

            def run(here: Batch = here) -> Evaluation:
                return evaluator.evaluate(model, here)

            goal = evaluator.criterion(here)
            attacked = AttackedBatch(run, sites, mask=evaluator.mask(here))
            with attacked.attacking():
                evaluation = attacked.record(attach=True).evaluation
                clean = evaluation.detach()
                grads = _gradients(attacked, evaluation)
                places = attacked.perturbations
                radii = [_radius(p, eps, norm) for p in places]
                if grads is None:
                    slope = torch.zeros(clean.batch, device=clean.device)
                    small = full = clean
                else:
                    slope = _slopes(places, grads, radii, norm, clean.batch)
                    small = _after(attacked, grads, radii, norm, _SMALL)
                    full = _after(attacked, grads, radii, norm, 1.0)
            before, after = _losses(clean), _losses(small)
            rise = after - before
            if attacked.perturbed.coupled:
                slope, before, rise = (x.sum().reshape(1) for x in (slope, before, rise))
            reached = goal.reached(full, clean)
            slopes.append(slope.cpu().double())
            losses.append(before.cpu())
            rises.append(rise.cpu().double())
            missed = torch.ones(len(batch), dtype=torch.bool) if reached is None else ~reached
            right.append(missed.cpu())
    return GradientProbe(*(torch.cat(parts) for parts in (slopes, losses, rises, right)))


def is_random(model: nn.Module, batches: Sequence[Batch], evaluator: Evaluator) -> bool:
    """Whether two passes over the same samples in evaluation mode differ beyond rounding."""
    with examined(model), torch.no_grad():
        for batch in batches:
            here = batch.to(device_of(model))
            first, second = (evaluator.evaluate(model, here) for _ in range(2))
            if not same_evaluation(first, second):
                return True
    return False


def _gradients(attacked: AttackedBatch, evaluation: Evaluation) -> list[Tensor] | None:
    """The gradients of each sample's loss; None: there is no graph."""
    try:
        grads = attacked.gradients_at_zero(_losses(evaluation))
        if grads is None:
            now = attacked.evaluate_for_gradients()
            grads = attacked.gradients(_losses(now))
    except NoGradient:
        return None
    return grads


def _losses(evaluation: Evaluation) -> Tensor:
    if evaluation.losses is None:
        raise ValueError("the checks on gradients need losses: batches with labels")
    return evaluation.losses


def _radius(perturbation: Perturbation, eps: Strength, norm: str) -> Tensor:
    """The radius of each group, [groups]."""
    found = perturbation.strength(eps, norm)
    return torch.as_tensor(found, device=perturbation.base.device).expand(perturbation.groups)


def _slopes(
    places: list[Perturbation], grads: list[Tensor], radii: list[Tensor], norm: str, count: int
) -> Tensor:
    """By how much each sample's loss rises in the ball, by its gradient, [B]."""
    total = torch.zeros(count, device=grads[0].device, dtype=torch.float64)
    for place, grad, radius in zip(places, grads, radii, strict=True):
        rises = ops.group_norm(grad, norm=_DUAL[norm], **place.geometry).double() * radius
        if place.coupled or rises.numel() % count:
            total += rises.sum() / count
        else:
            total += rises.reshape(count, -1).sum(1)
    return total


def _after(
    attacked: AttackedBatch, grads: list[Tensor], radii: list[Tensor], norm: str, share: float
) -> Evaluation:
    """What one step along the gradient gives, `share` of the radius long."""
    for place, grad, radius in zip(attacked.perturbations, grads, radii, strict=True):
        zero = torch.zeros_like(place.delta.detach())
        length = (share * radius).to(zero.dtype).contiguous()
        place.set(
            ops.pgd_step(zero, grad, step_size=length, eps=length, norm=norm, **place.geometry)
        )
    return attacked.evaluate(grad=False, lookups="detached").detach()
