"""What one backward pass found for a whole model: its norms, and its weighted gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from embattle.clipping.combine import (
    Use,
    dense_norms,
    joint_norms,
    simplify,
    unit_norms,
    weighted_gradients,
)
from embattle.clipping.tables import join_tables
from embattle.clipping.units import Units
from embattle.clipping.uses import DenseUse, LinearUse, RowUse

Named = Sequence[tuple[str, Parameter]]


class Found:
    """The uses of all parameters.

    Attributes:
        named: the trained parameters, in the model's order.
        uses: parameter -> what `simplify` left of its uses; without the tables in joint.
        joint: small tables, worked on as one.
        units: the samples' units.
    """

    def __init__(
        self, named: Named, uses: dict[Parameter, list[Use]], units: Units, *, joined: bool
    ) -> None:
        """Takes over what a listener heard.

        Args:
            named: the trained parameters.
            uses: what was heard; emptied, so that memory goes when it can.
            units: the samples' units.
            joined: whether all parameters have the same factors.
        """
        self.named = named
        self.units = units
        self.uses: dict[Parameter, list[Use]] = {}
        for _, p in named:
            own = uses.pop(p, None)
            if own is not None:
                self.uses[p] = simplify(own, units)
        self.joint = join_tables(self.uses) if joined else []

    def norms(self, device: torch.device) -> Tensor:
        """[units] norms of the whole gradient, float64."""
        units, uses = self.units, self.uses
        # The norm of a bias that is used nowhere else comes with its weight's, from the same read.
        alone = {id(found[0]) for found in uses.values() if len(found) == 1}
        joined = {
            id(found[0].bias)
            for found in uses.values()
            if len(found) == 1 and isinstance(found[0], LinearUse) and id(found[0].bias) in alone
        }
        small = [table.grad for table in self.joint if table.apart(units)]
        parts = [table.norms(units) for table in self.joint if not table.apart(units)]
        for p, found in uses.items():
            first = found[0]
            if id(first) in joined:
                continue
            if len(found) == 1 and isinstance(first, LinearUse):
                parts.append(first.norms(units, bias=id(first.bias) in joined))
            elif len(found) == 1 and isinstance(first, DenseUse):
                small.append(first.grad)
            elif len(found) == 1 and isinstance(first, RowUse) and first.apart(units):
                small.append(first.masked())
            else:
                parts.append(unit_norms(found, units, p.shape))
        if small and units.of_sample is not None:
            parts.append(dense_norms(small, units))
        elif small:
            parts += small
        if not parts:
            return torch.zeros(units.count, dtype=torch.float64, device=device)
        return joint_norms(parts)

    def layer_norms(self, device: torch.device) -> Tensor:
        """[units, parameters] norms, float64."""
        columns = []
        for _, p in self.named:
            found = self.uses.get(p)
            if found is None:
                columns.append(torch.zeros(self.units.count, dtype=torch.float64, device=device))
            elif isinstance(found[0], DenseUse):
                columns.append(dense_norms([found[0].grad], self.units).double())
            else:
                columns.append(unit_norms(found, self.units, p.shape).double())
        return torch.stack(columns, 1)

    def clean(self, norms: Tensor) -> None:
        """Sets what samples left to zero where a norm is not finite: times zero it would be NaN.

        Args:
            norms: [units], or [units, parameters].
        """
        bad = ~norms.isfinite()
        of_sample = self.units.of_sample
        if of_sample is not None:
            bad = bad[of_sample]
        for column, (_, p) in enumerate(self.named):
            if p in self.uses:
                marked = bad if bad.dim() == 1 else bad[:, column]
                self.uses[p] = [use.cleaned(marked) for use in self.uses[p]]
        self.joint = [table.cleaned(bad) for table in self.joint]

    def weighted(
        self, factors: Tensor, weights: Tensor | None, scale: float
    ) -> dict[Parameter, Tensor]:
        """The gradients, sum_b w_b factor_b g_b times scale; nothing is left of the uses.

        Args:
            factors: [units], or [units, parameters].
            weights: [B] of the samples, or None.
            scale: of the result.
        """

        def final(factor: Tensor, dtype: torch.dtype) -> Tensor:
            own = self.units.sample_factors(factor) * scale
            return (own if weights is None else own * weights).to(dtype)

        if factors.dim() == 2:
            columns = {p: column for column, (_, p) in enumerate(self.named)}

            def of(p: Parameter) -> Tensor:
                return final(factors[:, columns[p]], _summed_in(p))

        else:
            shared: dict[torch.dtype, Tensor] = {}

            def of(p: Parameter) -> Tensor:
                dtype = _summed_in(p)
                if dtype not in shared:
                    shared[dtype] = final(factors, dtype)
                return shared[dtype]

        # Tables come last: what the other layers hold is gone then.
        found = weighted_gradients(self.uses, of)
        while self.joint:
            table = self.joint.pop()
            found.update(table.weighted(of(table.members[0])))
        return found


def _summed_in(parameter: Parameter) -> torch.dtype:
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32
