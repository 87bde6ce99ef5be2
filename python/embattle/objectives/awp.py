"""Adversarial weight perturbation, around any objective."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from embattle import checks
from embattle.criteria import Criterion
from embattle.objectives.base import SHARED_PASSES, AdversarialObjective
from embattle.objectives.batch import Samples
from embattle.objectives.precomputed import Reached, attach_gradients, next_number, reached
from embattle.perturb.attacked_batch import Masks, Subset
from embattle.perturb.evaluation import LossFn
from embattle.perturb.guard import fresh_autocast_cache
from embattle.perturb.model_state import kept_state


class AWP:
    """Adversarial weight perturbation (Wu et al., NeurIPS 2020, eq. 7-11), one step.

    The objective's deltas are found at the weights w. Then `v = gamma * ||w|| * g / ||g||` for each
    parameter tensor, g being the gradient of the objective's loss; the loss to backpropagate is the
    one at w + v, with the same deltas; the weights are put back. Costs one more training pass, and
    a copy of the perturbed weights. As in the authors' code, biases and norms (tensors of one dim)
    are left alone; theirs computes g on a proxy copy of the model in train mode.

    Args:
        objective: any `AdversarialObjective`, except of a form that moves its deltas while it
            trains ("free", "freeat", "staggered").
        model: whose weights are perturbed (or an iterable of parameters).
        gamma: relative size: the paper takes 0.01 with adversarial training, 0.005 with TRADES.
        delay: calls before it sets in.
    """

    def __init__(
        self,
        objective: AdversarialObjective,
        model: nn.Module | Iterable[nn.Parameter],
        *,
        gamma: float = 0.01,
        delay: int = 0,
    ) -> None:
        gamma = checks.real("AWP", "gamma", gamma, 0)
        delay = checks.integer("AWP", "delay", delay, 0)
        if objective.name in SHARED_PASSES:
            raise ValueError(f"AWP: form {objective.name!r} moves its deltas while it trains")
        self.objective, self.gamma, self.delay = objective, gamma, delay
        found = model.parameters() if isinstance(model, nn.Module) else model
        self._models = [model] if isinstance(model, nn.Module) else []
        self._candidates = list(dict.fromkeys(p for p in found if p.dim() > 1))
        if not self._candidates:
            raise ValueError("AWP: no parameter of two dims or more: nothing would be perturbed")

    def __repr__(self) -> str:
        return f"AWP({self.gamma:g} x the weights' norms, {self.objective!r})"

    def __call__(
        self,
        loss_fn: LossFn,
        *,
        criterion: Criterion | None = None,
        mask: Masks = None,
        offsets: Masks = None,
        joint: bool = False,
        samples: Samples = None,
        subset: Subset | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of one batch, as the objective does."""
        objective = self.objective
        batch = objective.batch(
            loss_fn, criterion=criterion, mask=mask, offsets=offsets, joint=joint,
            samples=samples, subset=subset,
        )  # fmt: skip
        batch.early = False
        if objective.step < self.delay or self.gamma == 0 or not torch.is_grad_enabled():
            return objective.finish(batch, objective.form(batch))
        weights = [p for p in self._candidates if p.requires_grad]
        if not weights:
            raise ValueError("AWP: no parameter of two dims or more is trained")
        before = next_number()
        # The passes at w are no training passes: statistics move with those at w + v alone.
        with kept_state(self._models):
            loss = objective.form(batch)
        grads = torch.autograd.grad(loss, weights, allow_unused=True)
        batch.frozen = True
        kept = [weight.detach().clone() for weight in weights]
        graph: Reached | None = None
        try:
            with torch.no_grad():
                for weight, grad in zip(weights, grads, strict=True):
                    if grad is not None:
                        _move(weight, grad, self.gamma)
            with fresh_autocast_cache():
                loss = objective.form(batch)
            graph = reached(loss)
            params = graph.leaves
            found = torch.autograd.grad(loss, params, allow_unused=True)
        except RuntimeError as error:
            if graph is None or graph.oldest >= before:
                raise
            raise RuntimeError(
                "AWP: what loss_fn takes from outside with its graph was computed with the "
                "weights as they are, not as they are perturbed: compute it in loss_fn"
            ) from error
        finally:
            with torch.no_grad():
                for weight, value in zip(weights, kept, strict=True):
                    weight.copy_(value)
        return objective.finish(batch, attach_gradients(loss.detach(), params, found))

    @property
    def step(self) -> int:
        """The number of calls so far."""
        return self.objective.step

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs."""
        return self.objective.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state."""
        self.objective.load_state_dict(state)


def _move(weight: Tensor, grad: Tensor, gamma: float) -> None:
    grad = grad.to_dense() if grad.layout != torch.strided else grad
    # The largest magnitude is divided out first, so that no tiny gradient loses its direction.
    largest = grad.abs().amax()
    grad = grad / torch.where(largest > 0, largest, torch.ones_like(largest))
    norm = grad.norm()
    weight.add_(grad * (gamma * weight.norm() / torch.where(norm > 0, norm, torch.ones_like(norm))))
