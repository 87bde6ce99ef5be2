"""The search that exchanges tokens, or values of columns: first-order gains, exact evaluations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from embattle.criteria import Criterion, MaximizeLoss
from embattle.criteria.base import ascended, reached
from embattle.perturb.attacked_batch import AttackedBatch
from embattle.perturb.evaluation import Evaluation, LossFn
from embattle.perturb.guard import Mode
from embattle.perturb.site import Site

# From tokens [B, T] (or values [B, fields]) to the loss function of the batch with them.
TokenLoss: TypeAlias = Callable[[Tensor], LossFn]
# From the gradients at the embeddings (one [B, T, dim] for each site), the tokens and where they
# may be exchanged, bool [B, T], to exchanges in the order in which they are tried: positions
# (-1: none) and tokens, both [B, tries].
Candidates: TypeAlias = Callable[[list[Tensor], Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class SwapResult:
    """What a search for exchanges ended in; what is reported was evaluated on it.

    Attributes:
        tokens: int64 `[B, T]`, with the exchanged tokens; values `[B, fields]` of columns.
        swapped: bool `[B, T]`, where something was exchanged.
        clean, now: the evaluations before and after, under the same random numbers.
        clean_predictions, predictions: None if the loss function returns no outputs.
        success: bool `[B]`: the goal holds now and did not before; None without a goal.
        robust_accuracy: share of right answers after, 0-d; None if the criterion knows none.
        passes: forward passes of the batch.
    """

    tokens: Tensor
    swapped: Tensor
    clean: Evaluation
    now: Evaluation
    clean_predictions: Tensor | None
    predictions: Tensor | None
    success: Tensor | None
    robust_accuracy: Tensor | None
    passes: int

    @property
    def clean_losses(self) -> Tensor | None:
        """Losses before, `[B]`."""
        return self.clean.losses

    @property
    def losses(self) -> Tensor | None:
        """Losses after, `[B]`."""
        return self.now.losses


def search(
    who: str,
    loss_of: TokenLoss,
    sites: Site | Sequence[Site],
    tokens: Tensor,
    movable: Tensor,
    candidates: Candidates,
    *,
    swaps: int,
    mode: Mode,
    criterion: Criterion | None,
    go_on: bool = False,
) -> SwapResult:
    """Exchange greedily, in rounds.

    In each round the candidates are evaluated, and of each sample the one with the largest value is
    kept if it beats the value so far. A sample that has reached the criterion's goal is left alone,
    unless `go_on` is set, and so is a position where something was exchanged.

    Args:
        who: asks, for errors.
        loss_of: takes tokens and gives the loss function of the batch with them.
        sites: on modules that are called once each, with the tokens.
        tokens: int64 `[B, T]`.
        movable: bool `[B, T]`, where something may be exchanged.
        candidates: finds them.
        swaps: most rounds.
        mode: see `TokenSwap`.
        criterion: as for `Attack.run`.
        go_on: exchange in samples that have reached the goal, too.
    """
    goal = MaximizeLoss() if criterion is None else criterion
    current, movable, passes = tokens.clone(), movable.clone(), 0
    clean = now = None
    batch = AttackedBatch(
        lambda: _loss_fn(who, loss_of, current)(), sites, mode=mode, same_random=True
    )
    with batch.attacking():
        for _ in range(swaps):
            evaluation, gradients = _gradients(who, batch, goal, clean, tokens.shape)
            passes += 1
            clean = evaluation if clean is None else clean
            now = evaluation if now is None else now
            open_ = _unreached(goal, now, clean, go_on)
            where, what = candidates(gradients, current, movable & open_[:, None])
            if not bool((where >= 0).any()):
                break  # nothing can be exchanged, or there are no samples or no positions
            choice = torch.full_like(where[:, 0], -1)
            value = ascended(goal, now, clean).detach()
            for one in range(where.shape[1]):
                if not bool((where[:, one] >= 0).any()):
                    break  # they are in order: no sample has more
                trial = _place(current, where[:, one], what[:, one])
                with torch.no_grad():
                    got = batch.run(loss_of(trial)).detach()
                passes += 1
                gain = ascended(goal, got, clean)
                fooled, before = reached(goal, got, clean), reached(goal, now, clean)
                wins = gain > value
                if fooled is not None and before is not None:
                    wins = torch.where(fooled == before, wins, fooled)
                wins = wins & (where[:, one] >= 0)
                now, value = got.where(wins, now), torch.where(wins, gain, value)
                choice = torch.where(wins, one, choice)
            chosen = choice >= 0
            rows = torch.arange(len(tokens), device=tokens.device)
            position = where[rows, choice.clamp(min=0)]
            token = what[rows, choice.clamp(min=0)]
            current = _place(current, torch.where(chosen, position, -1), token)
            movable[rows, position] &= ~chosen
            if not bool(chosen.any()):
                break
        with torch.no_grad():
            now = batch.run(loss_of(current)).detach()
    assert clean is not None
    before, after = reached(goal, clean, clean), reached(goal, now, clean)
    found = [None if e.outputs is None else goal.predict(e.outputs) for e in (clean, now)]
    return SwapResult(
        tokens=current,
        swapped=current != tokens,
        clean=clean,
        now=now,
        clean_predictions=found[0],
        predictions=found[1],
        success=None if before is None or after is None else after & ~before,
        robust_accuracy=goal.accuracy(now),
        passes=passes + 1,
    )


def _place(tokens: Tensor, where: Tensor, what: Tensor) -> Tensor:
    rows = torch.arange(len(tokens), device=tokens.device)
    trial = tokens.clone()
    position = where.clamp(min=0)
    trial[rows, position] = torch.where(where >= 0, what, trial[rows, position])
    return trial


def _loss_fn(who: str, loss_of: TokenLoss, tokens: Tensor) -> LossFn:
    loss_fn = loss_of(tokens)
    if not callable(loss_fn):
        raise TypeError(
            f"{who}: loss_of must take tokens and return a loss function, which takes nothing; "
            f"got {type(loss_fn).__name__}: write lambda tokens: lambda: loss_of(tokens)"
        )
    return loss_fn


def _gradients(
    who: str,
    batch: AttackedBatch,
    goal: Criterion,
    clean: Evaluation | None,
    shape: torch.Size,
) -> tuple[Evaluation, list[Tensor]]:
    evaluation = batch.record(attach=True).evaluation
    if clean is None:
        goal.check(evaluation)
    values = batch.perturbed.values()
    if values is None:
        raise ValueError(f"{who}: the model is compiled; run the attack on the model itself")
    if len(values) != len(batch.sites) or any(value.shape[:-1] != shape for value in values):
        raise ValueError(
            f"{who}: the embedding must be called once, with tokens {tuple(shape)}; its outputs "
            f"were {[tuple(value.shape) for value in values]}"
        )
    at = evaluation.detach()
    gradients = batch.gradients_at_zero(ascended(goal, evaluation, at if clean is None else clean))
    assert gradients is not None
    return at, [
        torch.zeros_like(value) if gradient is None else gradient
        for value, gradient in zip(values, gradients, strict=True)
    ]


def _unreached(goal: Criterion, now: Evaluation, clean: Evaluation, go_on: bool) -> Tensor:
    """Return bool `[B]`: the samples that are still to be attacked."""
    fooled, counted = reached(goal, now, clean), goal.counted(now)
    remaining = torch.ones(now.batch, dtype=torch.bool, device=now.device)
    remaining = remaining if fooled is None or go_on else ~fooled
    return remaining if counted is None else remaining & counted
