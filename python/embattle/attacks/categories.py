"""A discrete attack on columns: exchange a few values, guided by gradients, evaluated exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from embattle import checks
from embattle.attacks.swap_search import SwapResult, TokenLoss, search
from embattle.criteria import Criterion
from embattle.perturb.guard import MODES, Mode
from embattle.perturb.site import Site, as_sites

# Numbers of the largest table of gains, [samples, values of all columns].
_AT_ONCE = 2**24


@dataclass(kw_only=True)
class CategorySwap:
    """Exchange values of columns of categories within a budget of columns for each sample.

    Greedy, as HotFlip (Ebrahimi et al., ACL 2018, eq. 10): in each of `swaps` rounds the exchanges
    of one column's value for another of the same column are ordered by their first-order gain
    `(E[new] - E[old]) . dL/dE`, summed over the tables that the column is looked up in; the `tries`
    first of each sample are evaluated by the model, and the best is kept if it beats the value so
    far. With `tries=None` all are: then one round finds the best single exchange there is. A column
    is exchanged once at most, and a sample that has reached the criterion's goal is left alone.

    Args:
        swaps: most columns exchanged in a sample.
        tries: exchanges evaluated exactly in each round; None: all.
        frozen: numbers of columns that stay as they are.
        allowed: bool `[rows]` of the tables: the values that may come in, such as not the one that
            stands for unknown ones; None: all.
        mode: "as_is" or "eval" (the sites must know their model).
        go_on: exchange in samples that have reached the goal, too, for measures of how wrong they
            are.
    """

    swaps: int = 1
    tries: int | None = 16
    frozen: Sequence[int] = ()
    allowed: Tensor | None = None
    mode: Mode = "as_is"
    go_on: bool = False

    def __post_init__(self) -> None:
        self.swaps = checks.integer("CategorySwap", "swaps", self.swaps, 1)
        if self.tries is not None:
            self.tries = checks.integer("CategorySwap", "tries", self.tries, 1)
        self.frozen = tuple(checks.integer("CategorySwap", "frozen", i, 0) for i in self.frozen)
        if self.allowed is not None and (
            not isinstance(self.allowed, Tensor) or self.allowed.dtype != torch.bool
        ):
            kind = getattr(self.allowed, "dtype", type(self.allowed).__name__)
            raise TypeError(f"CategorySwap: allowed must be a tensor of dtype bool, got {kind}")
        checks.one_of("CategorySwap", "mode", self.mode, MODES)
        checks.flag("CategorySwap", "go_on", self.go_on)

    def run(
        self,
        loss_of: TokenLoss,
        sites: Site | Sequence[Site],
        values: Tensor,
        *,
        sizes: Sequence[int],
        criterion: Criterion | None = None,
    ) -> SwapResult:
        """Attack a batch of rows.

        Args:
            loss_of: takes values `[B, fields]` and gives the loss function of the batch with them.
            sites: on each `nn.Embedding` that all columns are looked up in (of DeepFM `embedding`
                and `first`), called once with all values. The rows of a column follow those of the
                one before, as in `embattle.models.fields.Fields`.
            values: int64 `[B, fields]`, numbered from 0 in each column.
            sizes: how many values each column has.
            criterion: as for `Attack.run`.

        Returns:
            The values found, in `tokens`; the model is as it was.

        Raises:
            TypeError: a site is not on an `nn.Embedding`.
            ValueError: shapes or numbers that do not belong together.
        """
        who, sites = "CategorySwap", as_sites(sites)
        sizes = [checks.integer(who, "sizes", size, 1) for size in sizes]
        tables = []
        for site in sites:
            if not isinstance(site.module, nn.Embedding):
                kind = type(site.module).__name__
                raise TypeError(f"{who}: needs sites on nn.Embedding, got {kind}")
            tables.append(site.module.weight.detach())
            if len(tables[-1]) != sum(sizes):
                raise ValueError(
                    f"{who}: sizes add up to {sum(sizes)} for a table of {len(tables[-1])} rows"
                )
        if values.dim() != 2 or values.is_floating_point() or values.shape[1] != len(sizes):
            raise ValueError(
                f"{who}: values must be integers [B, {len(sizes)}], one for each of sizes; got "
                f"{tuple(values.shape)} of {values.dtype}"
            )
        limits = torch.tensor(sizes, device=values.device)
        wrong = (values < 0) | (values >= limits)
        if bool(wrong.any()):
            row, field = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"{who}: column {field} has the values [0, {sizes[field]}), got "
                f"{int(values[row, field])}"
            )
        if any(i >= len(sizes) for i in self.frozen):
            raise ValueError(
                f"{who}: frozen must be columns in [0, {len(sizes)}), got {max(self.frozen)}"
            )
        if self.allowed is not None and self.allowed.shape != (sum(sizes),):
            raise ValueError(
                f"{who}: allowed has shape {tuple(self.allowed.shape)} for {sum(sizes)} values"
            )
        movable = torch.ones_like(values, dtype=torch.bool)
        movable[:, list(self.frozen)] = False
        columns = _Columns(tables, limits, self.allowed, self.tries)
        return search(
            who,
            loss_of,
            sites,
            values,
            movable,
            columns.candidates,
            swaps=self.swaps,
            mode=self.mode,
            criterion=criterion,
            go_on=self.go_on,
        )


class _Columns:
    """The rows of all columns' values, and which exchanges gain most."""

    def __init__(
        self, tables: list[Tensor], sizes: Tensor, allowed: Tensor | None, tries: int | None
    ) -> None:
        self.tables = [table.float() for table in tables]
        self.field = torch.repeat_interleave(torch.arange(len(sizes), device=sizes.device), sizes)
        self.starts = sizes.cumsum(0) - sizes
        self.bounds = list(zip(self.starts.tolist(), sizes.cumsum(0).tolist(), strict=True))
        self.allowed = None if allowed is None else allowed.to(sizes.device)
        rows = len(self.field)
        self.tries = rows if tries is None else min(tries, rows)

    def candidates(
        self, gradients: list[Tensor], values: Tensor, movable: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Columns (-1: none) and values, `[B, tries]`, of largest first-order gain first."""
        size = max(1, _AT_ONCE // len(self.field))
        parts = [
            self._some([g[rows] for g in gradients], values[rows], movable[rows])
            for rows in torch.split(torch.arange(len(values), device=values.device), size)
        ]
        where, what = (torch.cat(found) for found in zip(*parts, strict=True))
        return where, what

    def _some(
        self, gradients: list[Tensor], values: Tensor, movable: Tensor
    ) -> tuple[Tensor, Tensor]:
        here = values + self.starts
        gain = torch.zeros(len(values), len(self.field), device=values.device)
        for table, gradient in zip(self.tables, gradients, strict=True):
            for field, (start, end) in enumerate(self.bounds):
                gain[:, start:end] += gradient[:, field].float() @ table[start:end].T
        gain -= gain.gather(1, here)[:, self.field]
        out = ~movable[:, self.field]
        out |= torch.zeros_like(out).scatter(1, here, True)
        if self.allowed is not None:
            out |= ~self.allowed
        gain.masked_fill_(out, -torch.inf)
        best, index = gain.topk(self.tries, dim=1)
        where = torch.where(best > -torch.inf, self.field[index], -1)
        return where, index - self.starts[self.field[index]]
