"""Deltas of the rows of an embedding table."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embattle import ops
from embattle.perturb.calls import Call, is_plain
from embattle.perturb.hook import OfCall, PassAddition
from embattle.perturb.hooked import only_sites_look
from embattle.perturb.perturbation import Perturbation


class RowPerturbation(Perturbation):
    """One delta per row of an embedding table (APR, He et al., SIGIR 2018).

    Of the distinct rows of the batch, so that memory follows the batch, never the table; finding
    them waits for the device (`torch.unique`). Or, if `whole`, of all rows. Rows at `padding_idx`
    and masked occurrences are left alone.
    """

    def __init__(
        self,
        calls: Sequence[Call],
        index: int,
        masks: Sequence[Tensor | None],
        *,
        whole: bool = False,
    ) -> None:
        self._modules = [call.module for call in calls]
        found = [_arguments(call) for call in calls]
        indices = [arguments["input"] for arguments in found]
        flat = torch.cat([i.reshape(-1).long() for i in indices])
        # Where an occurrence is masked, and where it is padding (tied modules may differ in that).
        kept = _joined(indices, masks, True)
        paddings = [call.module.padding_idx for call in calls]
        padding = _joined(
            indices,
            [None if p is None else i == p for i, p in zip(indices, paddings, strict=True)],
            False,
        )
        kept = kept & ~padding
        self._tables = [_table(call) for call in calls]
        weight = self._tables[0]
        full = torch.full_like(flat, -1)
        if whole:
            rows = torch.arange(len(weight), device=flat.device)
            full = torch.where(kept, flat, full)
        else:
            rows, inverse = torch.unique(flat[kept], return_inverse=True)
            full[kept] = inverse
        self.rows = rows
        sizes = [i.numel() for i in indices]
        # Where in the table of deltas: unperturbed occurrences read a row of zeros, and padding
        # another one, since a bag's mean does not count padding.
        full = torch.where(full < 0, rows.numel(), full)
        full = torch.where(padding, rows.numel() + 1, full)
        self.inverses = [
            part.reshape(i.shape) for part, i in zip(torch.split(full, sizes), indices, strict=True)
        ]
        self._arguments = found
        self._weighted = any(one.get("per_sample_weights") is not None for one in found)
        self._plain = all(is_plain(one) for one in self._modules)
        if self._plain:
            self._moving = [
                torch.where(inverse < rows.numel(), inverse, -1) for inverse in self.inverses
            ]
        places = [(index, i) for i in range(len(calls))]
        base, mask = weight if whole else weight[rows], None
        if whole and paddings[0] is not None and len(set(paddings)) == 1:
            mask = torch.ne(rows, cast(int, paddings[0]))
        super().__init__(base, places, group="token", mask=mask, coupled=True, whole=whole)

    def additions(self) -> list[Tensor]:
        return [
            _look_up_deltas(module, self.delta, inverse, arguments)
            for module, inverse, arguments in zip(
                self._modules, self.inverses, self._arguments, strict=True
            )
        ]

    def reusable(self, detached: bool) -> bool:
        return detached and self._fuses

    @property
    def _fuses(self) -> bool:
        # In half types it would round once what `additions` round twice: other losses than those
        # under the deltas that are returned.
        return (
            self._plain
            and self.base.dtype == self.delta.dtype
            and all(only_sites_look(one) for one in self._modules)
        )

    def computed(self, detached: bool) -> list[PassAddition] | None:
        if self._weighted:  # the weights' gradient has a part from the deltas
            return [
                OfCall(partial(_weighted_deltas, module, self.delta, inverse, arguments))
                for module, inverse, arguments in zip(
                    self._modules, self.inverses, self._arguments, strict=True
                )
            ]
        if not (detached and self._fuses):
            return None
        return [
            partial(_perturbed_rows, table, arguments["input"], self.delta, moving)
            for table, arguments, moving in zip(
                self._tables, self._arguments, self._moving, strict=True
            )
        ]

    def gather(self, grads: Sequence[Tensor]) -> Tensor:
        if self._plain:
            sums = [
                torch.ops.embattle.embedding_perturb_backward(
                    grad.to(self.delta.dtype), moving, self.groups
                )
                for grad, moving in zip(grads, self._moving, strict=True)
            ]
            return torch.stack(sums).sum(0) if len(sums) > 1 else sums[0]
        with torch.enable_grad():
            outputs = self.additions()
        (grad,) = torch.autograd.grad(outputs, self.delta, list(grads))
        return grad


def _table(call: Call) -> Tensor:
    """Return the table that a call has looked up."""
    table = cast(Tensor, call.module.weight) if call.table is None else call.table
    return table.detach()


def _joined(indices: Sequence[Tensor], values: Sequence[Tensor | None], missing: bool) -> Tensor:
    """Concatenate one bool tensor per call, flat; `missing` stands where a call has none."""
    return torch.cat(
        [
            (torch.full_like(i, missing, dtype=torch.bool) if v is None else v).reshape(-1)
            for i, v in zip(indices, values, strict=True)
        ]
    )


def _look_up_deltas(
    module: nn.Module, delta: Tensor, inverse: Tensor, arguments: dict[str, Any]
) -> Tensor:
    """Look up rows of the table `delta`, as the module looks up its own."""
    table = torch.cat([delta, delta.new_zeros(2, delta.shape[1])])
    if isinstance(module, nn.EmbeddingBag):
        weights = arguments.get("per_sample_weights")
        return F.embedding_bag(
            inverse,
            table,
            arguments.get("offsets"),
            mode=module.mode,
            per_sample_weights=None if weights is None else weights.to(delta.dtype),
            include_last_offset=module.include_last_offset,
            padding_idx=None if module.padding_idx is None else delta.shape[0] + 1,
        )
    return F.embedding(inverse, table)


def _weighted_deltas(
    module: nn.Module,
    delta: Tensor,
    inverse: Tensor,
    arguments: dict[str, Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Tensor:
    """Look up rows of the table `delta`, with the weights of a call (`args`, `kwargs`)."""
    weights = named_inputs(args, kwargs).get("per_sample_weights")
    return _look_up_deltas(module, delta, inverse, arguments | {"per_sample_weights": weights})


def _perturbed_rows(
    weight: Tensor, indices: Tensor, delta: Tensor, inverse: Tensor, output: Tensor
) -> Tensor:
    """Return the perturbed rows of a table, computed in one op instead of from `output`."""
    return ops.embedding_perturb(weight, indices, delta, inverse)


def _arguments(call: Call) -> dict[str, Any]:
    found = named_inputs(call.args, call.kwargs)
    if not isinstance(found.get("input"), Tensor):
        raise ValueError(
            f"Site: {type(call.module).__name__} was called without a tensor of indices"
        )
    return {
        name: value.detach() if isinstance(value, Tensor) else value
        for name, value in found.items()
    }


def named_inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the inputs of a look-up by their names."""
    names = ("input", "offsets", "per_sample_weights")
    return dict(zip(names, args, strict=False)) | kwargs
