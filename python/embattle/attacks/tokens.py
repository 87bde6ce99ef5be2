"""A discrete attack: exchange a few tokens, guided by gradients, judged by the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from embattle.attacks.judge import Judge, Predict
from embattle.perturb.site import Site
from embattle.perturb.stage import Evaluation, Stage, call

TokenLoss = Callable[[Tensor], Any]


@dataclass(frozen=True)
class SwapResult:
    """The texts that a token attack ended in.

    Attributes:
        tokens: int64 `[B, T]`, with the exchanged tokens.
        swapped: bool `[B, T]`, where a token was exchanged.
        clean_losses, losses: `[B]`, before and after, both evaluated exactly.
        clean_predictions, predictions: None if the loss function returns no outputs.
        success: bool `[B]`, as in `AttackResult`.
        passes: forward passes of the batch.
    """

    tokens: Tensor
    swapped: Tensor
    clean_losses: Tensor
    losses: Tensor
    clean_predictions: Tensor | None
    predictions: Tensor | None
    success: Tensor | None
    passes: int


@dataclass(kw_only=True)
class TokenSwap:
    """HotFlip on word pieces (Ebrahimi et al., ACL 2018, eq. 10), re-evaluated exactly.

    In each of `swaps` rounds the exchanges with the largest first-order gain
    `(E[v] - E[token]) . dL/dE` are found, the `tries` best of each sample are evaluated, and the
    one with the largest loss is kept if it beats the loss so far. So the result ends in text that a
    person can read, and its loss is the model's own. The paper searches with a beam over
    characters; here the search is greedy over tokens.

    Args:
        swaps: most tokens exchanged in a sample.
        tries: exchanges evaluated exactly in each round.
        allowed: bool `[V]`: tokens that may come in (give False to special tokens).
        similarity: least cosine similarity of the old and the new embedding, in [-1, 1].
    """

    swaps: int = 1
    tries: int = 8
    allowed: Tensor | None = None
    similarity: float | None = None

    def __post_init__(self) -> None:
        if self.swaps < 1:
            raise ValueError(f"TokenSwap: swaps must be at least 1, got {self.swaps}")
        if self.tries < 1:
            raise ValueError(f"TokenSwap: tries must be at least 1, got {self.tries}")
        if self.similarity is not None and not -1 <= self.similarity <= 1:
            raise ValueError(f"TokenSwap: similarity must lie in [-1, 1], got {self.similarity}")
        if self.allowed is not None and self.allowed.dtype != torch.bool:
            raise TypeError(f"TokenSwap: allowed must be of dtype bool, got {self.allowed.dtype}")

    def run(
        self,
        loss_fn: TokenLoss,
        site: Site,
        tokens: Tensor,
        *,
        mask: Tensor | None = None,
        labels: Tensor | None = None,
        predictions: Predict | None = None,
    ) -> SwapResult:
        """Attack a batch of texts.

        Args:
            loss_fn: takes tokens `[B, T]`, runs the model on them, and returns losses `[B]` or
                (losses, outputs).
            site: on the model's `nn.Embedding`, which must be called once, with the tokens.
            tokens: int64 `[B, T]`.
            mask: bool `[B, T]`, True where a token may be exchanged.
            labels: as for `Attack.run`.
            predictions: as for `Attack.run`.

        Returns:
            The texts found; the model is as it was.
        """
        if not isinstance(site.module, nn.Embedding):
            raise TypeError(
                f"TokenSwap: needs a site on an nn.Embedding, got {type(site.module).__name__}"
            )
        table = site.module.weight.detach()
        if self.allowed is not None and self.allowed.shape != table.shape[:1]:
            raise ValueError(
                f"TokenSwap: allowed has shape {tuple(self.allowed.shape)} for a table of "
                f"{table.shape[0]} rows"
            )
        current = tokens.clone()
        movable = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.clone()
        judge = Judge(labels, predictions)
        passes = 0

        def at_current() -> Any:
            return loss_fn(current)

        stage = Stage(at_current, site)
        with stage.attacking():
            clean: Evaluation | None = None
            best: Evaluation | None = None
            for _ in range(self.swaps):
                here, gradient = _gradient(stage, tokens.shape)
                passes += 1
                clean = here if clean is None else clean
                best = here if best is None else best
                where, what = self._candidates(table, gradient, current, movable)
                choice = torch.full_like(where[:, 0], -1)
                for one in range(where.shape[1]):
                    trial = self._place(current, where[:, one], what[:, one])
                    with torch.no_grad():
                        got = call(partial(loss_fn, trial))
                    passes += 1
                    best, choice = _keep(best, got, one, choice)
                chosen = choice >= 0
                rows = torch.arange(len(tokens), device=tokens.device)
                position = where[rows, choice.clamp(min=0)]
                token = what[rows, choice.clamp(min=0)]
                current = self._place(current, torch.where(chosen, position, -1), token)
                movable[rows, position] &= ~chosen
        assert clean is not None
        assert best is not None
        return SwapResult(
            tokens=current,
            swapped=current != tokens,
            clean_losses=clean.losses,
            losses=best.losses,
            clean_predictions=judge.predict(clean),
            predictions=judge.predict(best),
            success=judge.success(clean, best),
            passes=passes,
        )

    def _candidates(
        self, table: Tensor, gradient: Tensor, tokens: Tensor, movable: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Positions (-1: none) and tokens of the exchanges with the largest gain, `[B, tries]`."""
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


def _gradient(stage: Stage, shape: torch.Size) -> tuple[Evaluation, Tensor]:
    evaluation = stage.open(attach=True).evaluation
    values = stage.values()
    if values is None:
        raise ValueError("TokenSwap: the model is compiled; run the attack on the model itself")
    if len(values) != 1 or values[0].shape[:-1] != shape:
        raise ValueError(
            f"TokenSwap: the embedding must be called once, with tokens {tuple(shape)}; its "
            f"outputs were {[tuple(value.shape) for value in values]}"
        )
    (gradient,) = torch.autograd.grad(evaluation.losses.sum(), values)
    return evaluation.detach(), gradient


def _keep(
    best: Evaluation, got: Evaluation, number: int, choice: Tensor
) -> tuple[Evaluation, Tensor]:
    """Take over the samples whose loss grew; `choice` says which trial each has (-1: none)."""
    wins = got.losses > best.losses
    outputs = got.outputs
    if outputs is not None and best.outputs is not None:
        outputs = torch.where(wins.reshape(-1, *[1] * (outputs.dim() - 1)), outputs, best.outputs)
    losses = torch.where(wins, got.losses, best.losses)
    return Evaluation(losses, outputs), torch.where(wins, number, choice)
