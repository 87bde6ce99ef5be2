"""Putting gradients where optimisers look for them: noise, ranks, accumulation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from embattle.clipping import noise as dp
from embattle.clipping import parallel
from embattle.clipping.norms import Gradients, Named


@dataclass(frozen=True)
class Noise:
    """Gaussian noise on gradients.

    Attributes:
        std: standard deviation.
        rows: which rows of sparse tables get it; None for all.
        generator: its source.
    """

    std: float
    rows: dp.RowSelection | None
    generator: torch.Generator | None

    def on(self, like: Tensor) -> Tensor:
        """Noise in the shape of like."""
        return dp.normal(like, self.std, self.generator)


class Store:
    """Adds gradients to .grad, with noise and over the ranks of a group where these are wanted."""

    def __init__(self, group: Any) -> None:
        """Holds no gradient yet; group: whose ranks' gradients are summed, or None."""
        self._group = group
        self._pending: dict[Parameter, Tensor] = {}

    def discard(self) -> None:
        """Forgets gradients that wait for the last pass."""
        self._pending = {}

    def add(
        self,
        gradients: Gradients,
        factors: Tensor,
        weights: Tensor | None,
        scale: float,
        *,
        noise: Noise | None,
        last: bool,
    ) -> None:
        """Adds one backward pass' gradients.

        Args:
            gradients: what the pass found; used up.
            factors: [U], or [U, parameters].
            weights: [B] of the samples, or None.
            scale: of the gradients.
            noise: what is added in the last pass.
            last: whether this is the last pass before the optimiser's step.

        Raises:
            ValueError: rows are to be selected where that cannot be done.
        """
        selected = {}
        if noise is not None and noise.rows is not None:
            selected = self._selected_rows(gradients, factors, weights, noise, noise.rows, last)
        named = gradients.named
        grads = gradients.weighted(factors, weights, scale)
        if self._group is not None:
            grads = self._reduced(named, grads, noise, last)
        elif noise is not None and last:
            for name, p in named:
                grad = grads.get(p)
                grad = torch.zeros_like(p) if grad is None else grad
                if p in selected:
                    grads[p] = dp.restrict(grad, selected[p], noise.std, noise.generator)
                else:
                    dense = dp.densify(grad, name)
                    grads[p] = dense + noise.on(dense)
        for p, grad in grads.items():
            if p.grad is None:
                p.grad = grad
            elif p.grad.layout == torch.strided:
                p.grad.add_(grad)
            else:
                p.grad = (p.grad + grad) if grad.layout != torch.strided else grad + p.grad

    def _selected_rows(
        self,
        gradients: Gradients,
        factors: Tensor,
        weights: Tensor | None,
        noise: Noise,
        selection: dp.RowSelection,
        last: bool,
    ) -> dict[Parameter, Tensor]:
        if self._group is not None or not last or factors.dim() == 2:
            raise ValueError(
                "PerSampleClipper: row_selection needs the whole batch in one backward on one "
                "rank, and a mode other than 'per_layer': its row counts are not kept across "
                "batches or ranks"
            )
        of = gradients.of
        tables = [
            p
            for _, p in gradients.named
            if p in of and all(getattr(each, "sparse", False) for each in of[p])
        ]
        share = gradients.users.sample_factors(factors)
        share = share if weights is None else share * weights
        rows = dp.select_rows(
            selection,
            [of[p] for p in tables],
            [len(p) for p in tables],
            gradients.users,
            share.abs() > 0,  # a sample that adds nothing has no vote
            noise.generator,
        )
        return dict(zip(tables, rows, strict=True))

    def _reduced(
        self, named: Named, found: dict[Parameter, Tensor], noise: Noise | None, last: bool
    ) -> dict[Parameter, Tensor]:
        """Keeps the gradients until the last batch, then sums them over ranks."""
        for p, grad in found.items():
            kept = self._pending.get(p)
            self._pending[p] = grad if kept is None else grad + kept
        if not last:
            return {}
        held, self._pending = self._pending, {}
        if noise is not None and torch.distributed.get_rank(self._group) == 0:
            # Once for all ranks, before they are summed.
            for name, p in named:
                own = held.get(p)
                dense = torch.zeros_like(p) if own is None else dp.densify(own, name)
                held[p] = dense + noise.on(dense)
        parameters = [p for _, p in named]
        sums = parallel.reduce_gradients(
            [held.get(p) for p in parameters], [p.detach() for p in parameters], self._group
        )
        return {p: g for p, g in zip(parameters, sums, strict=True) if g is not None}
