"""The Bregman proximal point term of SMART: stay close to a moving average of the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from embattle import checks
from embattle.perturb.evaluation import Evaluation, LossFn, call
from embattle.perturb.guard import fresh_autocast_cache
from embattle.perturb.model_state import kept_state
from embattle.perturb.random_state import preserved_random_state


class Bregman:
    """An exponential moving average of a model's parameters (Jiang et al., ACL 2020, eq. 4-5).

    Before each batch `old <- momentum * old + (1 - momentum) * now`. Takes as much memory as the
    model's parameters.

    Args:
        model: the model; its parameters are exchanged for the averages while these are evaluated.
        weight: the paper's mu.
        momentum: the paper's beta: 0 compares with the iterate before (vanilla Bregman).
    """

    def __init__(self, model: nn.Module, *, weight: float = 1.0, momentum: float = 0.99) -> None:
        self.weight = checks.real("Bregman", "weight", weight, 0)
        self.momentum = checks.real("Bregman", "momentum", momentum, 0, 1)
        if self.momentum == 1:
            raise ValueError("Bregman: momentum must lie in [0, 1), got 1")
        self._model = model
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._average: list[Tensor] = []

    def evaluate_average(self, loss_fn: LossFn) -> Evaluation:
        """Update the average, and evaluate the batch with the one before; without a graph.

        The average takes in the parameters *before* the coming update, so that the term acts from
        the second step on. It stays where it is under `torch.no_grad`, where nothing is trained.
        """
        now = [p.detach() for p in self._parameters]
        average = self._average or [p.clone() for p in now]
        with (
            torch.no_grad(),
            self._exchanged(average),
            preserved_random_state(),
            kept_state([self._model]),
        ):
            evaluation = call(loss_fn)
        if torch.is_grad_enabled():
            torch._foreach_lerp_(average, now, 1 - self.momentum)
            self._average = average
        return evaluation

    @contextmanager
    def _exchanged(self, average: list[Tensor]) -> Iterator[None]:
        kept = [p.data for p in self._parameters]
        with fresh_autocast_cache():
            try:
                for parameter, old in zip(self._parameters, average, strict=True):
                    parameter.data = old
                yield
            finally:
                for parameter, data in zip(self._parameters, kept, strict=True):
                    parameter.data = data

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state that a resumed run needs: the averages, by number."""
        return {str(number): old.clone() for number, old in enumerate(self._average)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore a state.

        Raises:
            ValueError: it is of another model.
        """
        olds = [state[str(number)] for number in range(len(state))]
        shapes = [tuple(p.shape) for p in self._parameters]
        if olds and [tuple(old.shape) for old in olds] != shapes:
            raise ValueError("Bregman: the state belongs to a model with other parameters")
        pairs = zip(olds, self._parameters, strict=False)
        self._average = [old.to(p.device, p.dtype).clone() for old, p in pairs]
