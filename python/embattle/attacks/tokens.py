"""A discrete attack: exchange a few tokens, guided by gradients, evaluated by the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from embattle import checks
from embattle.criteria import Criterion, MaximizeLoss
from embattle.criteria.base import ascended, reached
from embattle.perturb.attacked_batch import AttackedBatch
from embattle.perturb.evaluation import Evaluation, LossFn
from embattle.perturb.guard import MODES, Mode
from embattle.perturb.site import Site

# From tokens [B, T] to the loss function of the batch with these tokens.
TokenLoss: TypeAlias = Callable[[Tensor], LossFn]


@dataclass(frozen=True)
class SwapResult:
    """The texts that a token attack ended in; what is reported was evaluated on them.

    Attributes:
        tokens: int64 `[B, T]`, with the exchanged tokens.
        swapped: bool `[B, T]`, where a token was exchanged.
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


@dataclass(kw_only=True)
class TokenSwap:
    """HotFlip on word pieces (Ebrahimi et al., ACL 2018, eq. 10), re-evaluated exactly.

    In each of `swaps` rounds the exchanges with the largest first-order gain
    `(E[v] - E[token]) . dL/dE` are found, the `tries` best of each sample are evaluated, and the
    one with the largest value is kept if it beats the value so far. A sample that has reached the
    criterion's goal is left alone. So the result ends in text that a person can read, and its loss
    is the model's own. The paper searches with a beam over characters; here the search is greedy
    over tokens.

    Args:
        swaps: most tokens exchanged in a sample.
        tries: exchanges evaluated exactly in each round.
        allowed: bool `[V]`: tokens that may come in (give False to special tokens).
        similarity: least cosine similarity of the old and the new embedding, in [-1, 1].
        mode: "as_is" or "eval" (the site must know its model). All passes have the same random
            numbers: dropout is never counted as a gain.
    """

    swaps: int = 1
    tries: int = 8
    allowed: Tensor | None = None
    similarity: float | None = None
    mode: Mode = "as_is"

    def __post_init__(self) -> None:
        self.swaps = checks.integer("TokenSwap", "swaps", self.swaps, 1)
        self.tries = checks.integer("TokenSwap", "tries", self.tries, 1)
        if self.similarity is not None:
            self.similarity = checks.real("TokenSwap", "similarity", self.similarity, -1, 1)
        if self.allowed is not None and (
            not isinstance(self.allowed, Tensor) or self.allowed.dtype != torch.bool
        ):
            kind = getattr(self.allowed, "dtype", type(self.allowed).__name__)
            raise TypeError(f"TokenSwap: allowed must be a tensor of dtype bool, got {kind}")
        checks.one_of("TokenSwap", "mode", self.mode, MODES)

    def run(
        self,
        loss_of: TokenLoss,
        site: Site,
        tokens: Tensor,
        *,
        mask: Tensor,
        criterion: Criterion | None = None,
    ) -> SwapResult:
        """Attack a batch of texts.

        Args:
            loss_of: takes tokens `[B, T]` and gives the loss function of the batch with them.
            site: on the model's `nn.Embedding`, which must be called once, with the tokens.
            tokens: int64 `[B, T]`.
            mask: bool `[B, T]`, True where a token may be exchanged: not at special tokens. The
                table's `padding_idx` is never exchanged, nor put in.
            criterion: as for `Attack.run`.

        Returns:
            The texts found; the model is as it was.

        Raises:
            TypeError: the site is not on an `nn.Embedding`, or `mask` is not bool.
            ValueError: shapes that do not belong together.
        """
        table_of = site.module
        if not isinstance(table_of, nn.Embedding):
            raise TypeError(
                f"TokenSwap: needs a site on an nn.Embedding, got {type(table_of).__name__}"
            )
        table = table_of.weight.detach()
        if self.allowed is not None and self.allowed.shape != table.shape[:1]:
            raise ValueError(
                f"TokenSwap: allowed has shape {tuple(self.allowed.shape)} for a table of "
                f"{table.shape[0]} rows"
            )
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"TokenSwap: mask must be a bool tensor, got {mask!r:.80}")
        if mask.shape != tokens.shape:
            raise ValueError(
                f"TokenSwap: mask has shape {tuple(mask.shape)}, tokens {tuple(tokens.shape)}"
            )
        padding = table_of.padding_idx
        movable = mask.clone() if padding is None else mask & (tokens != padding)
        goal = MaximizeLoss() if criterion is None else criterion
        current, passes = tokens.clone(), 0
        clean = now = None
        batch = AttackedBatch(
            lambda: _loss_fn(loss_of, current)(), site, mode=self.mode, same_random=True
        )
        with batch.attacking():
            for _ in range(self.swaps):
                evaluation, gradient = _gradient(batch, goal, clean, tokens.shape)
                passes += 1
                clean = evaluation if clean is None else clean
                now = evaluation if now is None else now
                open_ = _unreached(goal, now, clean)
                where, what = self._candidates(
                    table, gradient, current, movable & open_[:, None], padding
                )
                choice = torch.full_like(where[:, 0], -1)
                value = ascended(goal, now, clean).detach()
                for one in range(where.shape[1]):
                    trial = self._place(current, where[:, one], what[:, one])
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
                current = self._place(current, torch.where(chosen, position, -1), token)
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

    def _candidates(
        self,
        table: Tensor,
        gradient: Tensor,
        tokens: Tensor,
        movable: Tensor,
        padding: int | None,
    ) -> tuple[Tensor, Tensor]:
        """Find the exchanges of largest gain: positions (-1: none) and tokens, `[B, tries]`."""
        where, what = [], []
        unit = torch.nn.functional.normalize(table.float(), dim=1)
        for b in range(len(tokens)):  # [T, V] at a time
            old = tokens[b]
            gain = gradient[b].float() @ table.float().T
            gain -= (gradient[b].float() * table[old].float()).sum(1, keepdim=True)
            out = ~movable[b][:, None] | (gain <= 0)
            if self.allowed is not None:
                out |= ~self.allowed.to(out.device)[None]
            if self.similarity is not None:
                out |= unit[old] @ unit.T < self.similarity
            if padding is not None:
                out[:, padding] = True
            gain.masked_fill_(out, -torch.inf)
            value, index = gain.flatten().topk(min(self.tries, gain.numel()))
            position = index // table.shape[0]
            where.append(torch.where(value > -torch.inf, position, -1))
            what.append(index % table.shape[0])
        return torch.stack(where), torch.stack(what)

    @staticmethod
    def _place(tokens: Tensor, where: Tensor, what: Tensor) -> Tensor:
        rows = torch.arange(len(tokens), device=tokens.device)
        trial = tokens.clone()
        position = where.clamp(min=0)
        trial[rows, position] = torch.where(where >= 0, what, trial[rows, position])
        return trial


def _loss_fn(loss_of: TokenLoss, tokens: Tensor) -> LossFn:
    loss_fn = loss_of(tokens)
    if not callable(loss_fn):
        raise TypeError(
            "TokenSwap: loss_of must take tokens and return a loss function, which takes nothing; "
            f"got {type(loss_fn).__name__}: write lambda tokens: lambda: loss_of(tokens)"
        )
    return loss_fn


def _gradient(
    batch: AttackedBatch, goal: Criterion, clean: Evaluation | None, shape: torch.Size
) -> tuple[Evaluation, Tensor]:
    evaluation = batch.record(attach=True).evaluation
    if clean is None:
        goal.check(evaluation)
    values = batch.perturbed.values()
    if values is None:
        raise ValueError("TokenSwap: the model is compiled; run the attack on the model itself")
    if len(values) != 1 or values[0].shape[:-1] != shape:
        raise ValueError(
            f"TokenSwap: the embedding must be called once, with tokens {tuple(shape)}; its "
            f"outputs were {[tuple(value.shape) for value in values]}"
        )
    at = evaluation.detach()
    (gradient,) = batch.gradients_at_zero(  # type: ignore[misc]
        ascended(goal, evaluation, at if clean is None else clean)
    )
    return at, gradient


def _unreached(goal: Criterion, now: Evaluation, clean: Evaluation) -> Tensor:
    """Return bool `[B]`: the samples that are still to be attacked."""
    fooled, counted = reached(goal, now, clean), goal.counted(now)
    remaining = torch.ones(now.batch, dtype=torch.bool, device=now.device)
    remaining = remaining if fooled is None else ~fooled
    return remaining if counted is None else remaining & counted
