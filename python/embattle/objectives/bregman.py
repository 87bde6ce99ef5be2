"""The Bregman proximal point term of SMART: stay close to an older self."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from embattle.perturb.guard import preserved_random_state
from embattle.perturb.stage import Evaluation, LossFn, call


class Bregman:
    """An exponential moving average of a model's parameters (Jiang et al., ACL 2020, eq. 4-5).

    Before each batch `old <- momentum * old + (1 - momentum) * now`. Takes as much memory as the
    model's parameters.

    Args:
        model: the model; its parameters are exchanged for the old ones while these are asked.
        weight: the paper's mu.
        momentum: the paper's beta: 0 compares with the iterate before (vanilla Bregman).
    """

    def __init__(self, model: nn.Module, *, weight: float = 1.0, momentum: float = 0.99) -> None:
        if not weight >= 0:
            raise ValueError(f"Bregman: weight must be at least 0, got {weight}")
        if not 0 <= momentum < 1:
            raise ValueError(f"Bregman: momentum must lie in [0, 1), got {momentum}")
        self.weight, self.momentum = weight, momentum
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._old: list[Tensor] = []
        self._older: list[Tensor] = []

    @torch.no_grad()
    def older(self, loss_fn: LossFn) -> Evaluation:
        """Move the average on, and evaluate the batch with the old parameters.

        The average takes in the parameters *before* the coming update, so that the term acts from
        the second step on.
        """
        now = [p.detach() for p in self._parameters]
        if not self._old:
            self._old = [p.clone() for p in now]
        with self._exchanged(), preserved_random_state():
            evaluation = call(loss_fn)
        torch._foreach_lerp_(self._old, now, 1 - self.momentum)
        return evaluation

    @contextmanager
    def _exchanged(self) -> Iterator[None]:
        kept = [p.data for p in self._parameters]
        try:
            for parameter, old in zip(self._parameters, self._old, strict=True):
                parameter.data = old
            yield
        finally:
            for parameter, data in zip(self._parameters, kept, strict=True):
                parameter.data = data
