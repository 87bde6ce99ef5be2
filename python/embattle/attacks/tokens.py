"""A discrete attack: exchange a few tokens, guided by gradients, evaluated by the model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from embattle import checks
from embattle.attacks.swap_search import SwapResult, TokenLoss, search
from embattle.criteria import Criterion
from embattle.perturb.guard import MODES, Mode
from embattle.perturb.site import Site


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
        if criterion is not None and criterion.needs_clean:
            raise ValueError(
                f"TokenSwap: {criterion!r} measures from the clean outputs, and has no gradient at "
                "the texts as they are, by which swaps are chosen: take CategorySwap, which tries "
                "them, or another criterion"
            )
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

        def candidates(
            gradients: list[Tensor], current: Tensor, open_: Tensor
        ) -> tuple[Tensor, Tensor]:
            return self._candidates(table, gradients[0], current, open_, padding)

        return search(
            "TokenSwap",
            loss_of,
            site,
            tokens,
            movable,
            candidates,
            swaps=self.swaps,
            mode=self.mode,
            criterion=criterion,
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
        tries = min(self.tries, tokens.shape[1] * table.shape[0])
        where = torch.full((len(tokens), tries), -1, device=tokens.device)
        what = torch.zeros_like(where)
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
            value, index = gain.flatten().topk(tries)
            where[b] = torch.where(value > -torch.inf, index // table.shape[0], -1)
            what[b] = index % table.shape[0]
        return where, what
