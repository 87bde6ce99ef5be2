"""One batch evaluated at many perturbations, several of them in a pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor

from embattle.perturb.attacked_batch import AttackedBatch, Masks
from embattle.perturb.evaluation import Evaluation, LossFn
from embattle.perturb.perturbation import Perturbation
from embattle.perturb.site import Site

# From samples (int64 [n], which may repeat) to the loss function of a batch of them.
Subset: TypeAlias = Callable[[Tensor], LossFn]

# Samples in a pass, at most, where several points share one.
AT_ONCE = 64


class Points:
    """A batch whose losses are asked for at any deltas.

    Args:
        loss_fn: runs the model on the batch of B samples; returns losses `[B]` or an `Evaluation`.
        sites: where the deltas are added.
        mask: which vectors may move, as for `Attack.run`.
        subset: gives the loss function of some of the samples, which may repeat and must all keep
            their widths. Several points then share a pass; without it each has its own, as it has
            where samples share deltas or the model draws random numbers.
    """

    def __init__(
        self,
        loss_fn: LossFn,
        sites: Site | Sequence[Site],
        *,
        mask: Masks = None,
        subset: Subset | None = None,
    ) -> None:
        self._batch = AttackedBatch(loss_fn, sites, mask=mask, same_random=True, subset=subset)
        self._copies: dict[tuple[int, ...], AttackedBatch] = {}
        self._apart = True
        self.clean = torch.empty(0)

    @contextmanager
    def opened(self) -> Iterator[Points]:
        """Record the batch; inside the block points can be evaluated. The model stays as it was.

        Raises:
            ValueError: the loss function gives no losses, or the samples are packed rows.
        """
        with self._batch.attacking():
            self.clean = losses_of(self._batch.record().evaluation).detach()
            if self._batch.packed:
                raise ValueError("explanations need batches that are padded, not packed rows")
            apart = self._batch.subset is None or self.coupled
            self._apart = apart or self._batch.drew_random_numbers
            yield self
        self._copies.clear()

    @property
    def coupled(self) -> bool:
        """Whether the samples share deltas: rows of tables."""
        return self._batch.perturbed.coupled

    @property
    def perturbations(self) -> list[Perturbation]:
        """One for each perturbed output: its shape, its groups and what of it may move."""
        return self._batch.perturbations

    def check(self, deltas: Sequence[Tensor]) -> list[Tensor]:
        """Give the deltas in the perturbations' dtype.

        Raises:
            ValueError: they are not of this batch and these sites.
        """
        wanted = [tuple(p.delta.shape) for p in self.perturbations]
        given = [tuple(delta.shape) for delta in deltas]
        if wanted != given:
            raise ValueError(
                f"deltas: their shapes are {given}, and this batch needs {wanted}: give the deltas "
                "of an attack on the same batch at the same sites"
            )
        pairs = zip(deltas, self.perturbations, strict=True)
        return [delta.detach().to(p.delta) for delta, p in pairs]

    def losses(self, deltas: Sequence[Tensor]) -> Tensor:
        """Give the losses `[K, B]` at K points: each of `deltas` is `[K, *its shape]`."""
        found = [
            losses_of(batch.evaluate(grad=False)).reshape(count, -1)
            for batch, count, _ in self._chunks(deltas)
        ]
        return torch.cat(found)

    @property
    def divisible(self) -> bool:
        """Whether some of the samples can be evaluated alone."""
        return not self._apart

    def gradients(
        self, deltas: Sequence[Tensor], rows: Tensor | None = None
    ) -> Iterator[tuple[int, list[Tensor]]]:
        """Give the gradients of each sample's loss at K points, some points at a time.

        Args:
            deltas: `[K, *its shape]` each.
            rows: int64 `[n]`, the samples that they belong to, where the batch is divisible; None:
                all.

        Yields:
            The place of the first point, and `[k, *its shape]` for each delta. Where samples share
            deltas it is the gradient of the sum of their losses.
        """
        for batch, count, place in self._chunks(deltas, rows):
            values = losses_of(batch.evaluate(grad=True))
            grads = batch.gradients(values, mark=False)
            pairs = zip(grads, deltas, strict=True)
            yield place, [grad.reshape(count, *delta.shape[1:]) for grad, delta in pairs]

    def at(self, deltas: Sequence[Tensor]) -> Tensor:
        """Give the losses `[B]` at one point, with a graph to the deltas where there is one."""
        for perturbation, delta in zip(self.perturbations, deltas, strict=True):
            perturbation.delta = delta
        return losses_of(self._batch.evaluate(grad=torch.is_grad_enabled()))

    def _chunks(
        self, deltas: Sequence[Tensor], rows: Tensor | None = None
    ) -> Iterator[tuple[AttackedBatch, int, int]]:
        """The batches to evaluate, with the points of each set."""
        if rows is None:
            rows = torch.arange(self._batch.size, device=deltas[0].device)
        each = 1 if self._apart else max(1, AT_ONCE // max(1, len(rows)))
        for place in range(0, len(deltas[0]), each):
            some = [delta[place : place + each] for delta in deltas]
            count = len(some[0])
            batch = self._batch if self._apart else self._repeated(rows, count)
            for perturbation, delta in zip(batch.perturbations, some, strict=True):
                perturbation.set(delta[0] if self._apart else delta.flatten(0, 1))
            yield batch, count, place

    def _repeated(self, rows: Tensor, count: int) -> AttackedBatch:
        """Some samples, so many times over."""
        many = rows.repeat(count)
        key = (count, *rows.tolist())
        if key not in self._copies:
            some = [p.select(many) for p in self.perturbations]
            self._copies[key] = self._batch.select(many, some)
        return self._copies[key]


def losses_of(at: Evaluation) -> Tensor:
    """Give the losses `[B]` of an evaluation.

    Raises:
        ValueError: there are none.
    """
    if at.losses is None:
        raise ValueError(
            "explanations need losses: return losses [B], or Evaluation(losses, outputs)"
        )
    return at.losses
