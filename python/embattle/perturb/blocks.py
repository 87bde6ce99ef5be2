"""The unknowns of an attack: one leaf tensor per block, and where each is added.

A block owns a `delta` in its own space (a module's output, the distinct rows of a table, or several
outputs joined), the groups that have a ball there, and the linear map from `delta` to the tensors
that the sites add.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embattle import ops
from embattle.perturb.site import Addition, Call, Site, is_plain

Place = tuple[int, int]  # which site, which of its calls


class Block:
    """A delta that is added, as it is, to one output. The base of the other kinds.

    Attributes:
        base: the unperturbed embeddings in the block's space, detached.
        delta: the leaf that is differentiated, zeros at first; float32 where `base` is narrower.
        geometry: the ops' `group`, `offsets` and `mask`.
        places: the outputs that the block is added to.
        coupled: whether the samples of the batch share the delta.
        nonfinite: int32 `[groups]`, how often a group's gradient was not finite.
    """

    coupled = False

    def __init__(
        self,
        base: Tensor,
        places: Sequence[Place],
        *,
        group: str = "sample",
        offsets: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> None:
        if mask is not None and mask.shape != base.shape[:-1]:
            raise ValueError(
                f"mask has shape {tuple(mask.shape)}; the embeddings {tuple(base.shape)} need "
                f"{tuple(base.shape[:-1])}"
            )
        self.base = base
        self.places = list(places)
        self.geometry: dict[str, Any] = {"group": group, "offsets": offsets, "mask": mask}
        self.delta = torch.zeros_like(
            base, dtype=torch.promote_types(base.dtype, torch.float32)
        ).requires_grad_()
        self.nonfinite = torch.zeros(self.groups, dtype=torch.int32, device=base.device)

    @property
    def samples(self) -> int:
        """How many samples the block knows of."""
        offsets = self.geometry["offsets"]
        if offsets is not None:
            return int(offsets.numel()) - 1
        return self.base.shape[0] if self.base.dim() > 1 else 1

    @property
    def groups(self) -> int:
        """How many balls there are."""
        if self.geometry["offsets"] is not None or self.geometry["group"] == "sample":
            return self.samples
        return int(self.base.shape[:-1].numel())

    def narrow(self, rows: Tensor) -> Block:
        """Make a block of some of the samples, with a delta of its own."""
        other = copy(self)
        mask = self.geometry["mask"]
        other.base = self.base[rows]
        other.geometry = self.geometry | {"mask": None if mask is None else mask[rows]}
        other.set(self.delta.detach()[rows])
        other.nonfinite = self.nonfinite.new_zeros(other.groups)
        return other

    def set(self, delta: Tensor) -> None:
        """Take over the values of `delta`."""
        self.delta = delta.detach().requires_grad_()

    def additions(self) -> list[Tensor]:
        """Give what is added at each of `places`."""
        return [self.delta]

    def fused(self) -> list[Addition] | None:
        """Give what makes the perturbed outputs in passes that leave weights alone, if it can."""
        return None

    def gather(self, grads: Sequence[Tensor]) -> Tensor:
        """Turn gradients at `places` into the gradient of the block's delta."""
        return grads[0]

    def spread(self, grad: Tensor) -> list[Tensor]:
        """Turn a gradient of delta into those at `places` (not for rows, where it is a sum)."""
        return [grad]

    def per_row(self, values: Tensor) -> Tensor:
        """Spread one value per sample over the rows of delta: broadcastable to its shape."""
        offsets = self.geometry["offsets"]
        if offsets is not None:
            rows = self.base.shape[:-1].numel()
            spread = torch.repeat_interleave(values, offsets.diff(), output_size=rows)
            return spread.reshape(*self.base.shape[:-1], 1)
        return values.reshape(-1, *[1] * (self.base.dim() - 1))

    def per_group(self, values: Tensor) -> Tensor:
        """Spread one value per sample over the groups, `[groups]`."""
        each = self.groups // max(self.samples, 1)
        return values if each == 1 else values.reshape(-1, 1).expand(-1, each).reshape(-1)

    def norms(self, norm: Any) -> Tensor:
        """Norms of the delta's groups, `[groups]`."""
        return ops.group_norm(self.delta.detach(), norm=norm, **self.geometry)


class RowBlock(Block):
    """One delta per row of an embedding table (APR, He et al., SIGIR 2018).

    Of the distinct rows of the batch, so that memory follows the batch, never the table; finding
    them waits for the device (`torch.unique`). Or, if `whole`, of all rows. Rows at `padding_idx`
    and masked occurrences are left alone.
    """

    coupled = True

    def __init__(
        self,
        module: nn.Module,
        calls: Sequence[Call],
        index: int,
        masks: list[Any],
        *,
        whole: bool = False,
    ) -> None:
        self.module = module
        found = [_arguments(module, call) for call in calls]
        indices = [arguments["input"] for arguments in found]
        flat = torch.cat([i.reshape(-1) for i in indices])
        kept = torch.ones_like(flat, dtype=torch.bool)
        if any(mask is not None for mask in masks):
            for one, mask in zip(indices, masks, strict=True):
                if mask is not None and mask.shape != one.shape:
                    raise ValueError(
                        f"mask has shape {tuple(mask.shape)}; with scope='row' it needs the "
                        f"indices' shape {tuple(one.shape)}"
                    )
            kept = torch.cat(
                [
                    torch.ones_like(i, dtype=torch.bool).reshape(-1) if m is None else m.reshape(-1)
                    for i, m in zip(indices, masks, strict=True)
                ]
            )
        padding = getattr(module, "padding_idx", None)
        if padding is not None:
            kept = kept & (flat != padding)
        weight: Tensor = module.weight.detach()  # type: ignore[operator]
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
        if padding is not None:
            full = torch.where(flat == padding, rows.numel() + 1, full)
        self.inverses = [
            part.reshape(i.shape) for part, i in zip(torch.split(full, sizes), indices, strict=True)
        ]
        self._arguments = found
        self._plain = is_plain(module)
        if self._plain:
            self._moving = [
                torch.where(inverse < rows.numel(), inverse, -1) for inverse in self.inverses
            ]
        places = [(index, i) for i in range(len(calls))]
        super().__init__(weight if whole else weight[rows], places, group="token")

    def additions(self) -> list[Tensor]:
        return [
            self._place(self.delta, inverse, arguments)
            for inverse, arguments in zip(self.inverses, self._arguments, strict=True)
        ]

    def fused(self) -> list[Addition] | None:
        if not self._plain:
            return None
        weight = cast(Tensor, self.module.weight).detach()
        return [
            partial(_perturbed_rows, weight, arguments["input"], self.delta, moving)
            for arguments, moving in zip(self._arguments, self._moving, strict=True)
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

    def per_row(self, values: Tensor) -> Tensor:
        return values[:1].reshape(-1, *[1] * (self.base.dim() - 1))

    def per_group(self, values: Tensor) -> Tensor:
        return values[:1].expand(self.groups)

    def _place(self, delta: Tensor, inverse: Tensor, arguments: dict[str, Any]) -> Tensor:
        table = torch.cat([delta, delta.new_zeros(2, delta.shape[1])])
        if isinstance(self.module, nn.EmbeddingBag):
            weights = arguments.get("per_sample_weights")
            return F.embedding_bag(
                inverse,
                table,
                arguments.get("offsets"),
                mode=self.module.mode,
                per_sample_weights=None if weights is None else weights.detach().to(delta.dtype),
                include_last_offset=self.module.include_last_offset,
                padding_idx=None if self.module.padding_idx is None else delta.shape[0] + 1,
            )
        return F.embedding(inverse, table)


def _perturbed_rows(
    weight: Tensor, indices: Tensor, delta: Tensor, inverse: Tensor, output: Tensor
) -> Tensor:
    """Give the perturbed rows of a table in one pass, in place of `output`."""
    return ops.embedding_perturb(weight, indices, delta, inverse)


class JointBlock(Block):
    """One ball around several outputs together: sample b's delta spans all of them."""

    def __init__(
        self, values: Sequence[Tensor], places: Sequence[Place], masks: Sequence[Tensor | None]
    ) -> None:
        first = values[0]
        for value in values:
            if value.dim() < 2 or value.shape[0] != first.shape[0]:
                raise ValueError(
                    "joint: the outputs must agree in dim 0, the samples; got shapes "
                    f"{[tuple(v.shape) for v in values]}"
                )
        batch = first.shape[0]
        self.shapes = [value.shape for value in values]
        parts = [value.reshape(batch, -1, 1) for value in values]
        self.sizes = [part.shape[1] for part in parts]
        mask = None
        if any(m is not None for m in masks):
            mask = torch.cat(
                [
                    torch.ones_like(part[..., 0], dtype=torch.bool)
                    if m is None
                    else m.unsqueeze(-1).expand(value.shape).reshape(batch, -1)
                    for value, part, m in zip(values, parts, masks, strict=True)
                ],
                dim=1,
            )
        super().__init__(torch.cat(parts, dim=1), places, mask=mask)

    def additions(self) -> list[Tensor]:
        return self.spread(self.delta)

    def spread(self, grad: Tensor) -> list[Tensor]:
        parts = torch.split(grad, self.sizes, dim=1)
        return [part.reshape(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def narrow(self, rows: Tensor) -> Block:
        other = super().narrow(rows)
        assert isinstance(other, JointBlock)
        other.shapes = [torch.Size([rows.numel(), *shape[1:]]) for shape in self.shapes]
        return other

    def gather(self, grads: Sequence[Tensor]) -> Tensor:
        batch = self.delta.shape[0]
        return torch.cat([g.reshape(batch, -1, 1).to(self.delta.dtype) for g in grads], dim=1)


def _arguments(module: nn.Module, call: Call) -> dict[str, Any]:
    names = ("input", "offsets", "per_sample_weights")
    found = dict(zip(names, call.args, strict=False)) | call.kwargs
    if not isinstance(found.get("input"), Tensor):
        raise ValueError(f"Site: {type(module).__name__} was called without a tensor of indices")
    return found


def output_block(
    site: Site, call: Call, place: Place, *, offsets: Tensor | None, mask: Tensor | None
) -> Block:
    """Make the block of one call's output; a jagged output brings its own offsets."""
    return Block(
        call.value.detach(),
        [place],
        group=site.group,
        offsets=offsets if call.offsets is None else call.offsets,
        mask=mask,
    )


def build(
    sites: Sequence[Site],
    calls: Sequence[Sequence[Call]],
    *,
    masks: Sequence[Tensor | None],
    offsets: Tensor | None = None,
    joint: bool = False,
) -> list[Block]:
    """Make the blocks of an attack from what its opening forward pass recorded.

    Raises:
        RuntimeError: a site's module was not called.
        ValueError: masks that do not fit, or sites that cannot be joined.
    """
    for site, recorded in zip(sites, calls, strict=True):
        if not recorded:
            raise RuntimeError(
                f"{site!r}: the loss function did not call this module. Was the site created after "
                "torch.compile, or removed?"
            )
    if joint:
        if (
            any(site.scope == "row" or site.group == "token" for site in sites)
            or offsets is not None
        ):
            raise ValueError("joint: needs sites of scope 'output' and group 'sample', no offsets")
        places = [(s, c) for s, recorded in enumerate(calls) for c in range(len(recorded))]
        values = [calls[s][c].value.detach() for s, c in places]
        return [JointBlock(values, places, [masks[s] for s, _ in places])]
    blocks: list[Block] = []
    for index, (site, recorded) in enumerate(zip(sites, calls, strict=True)):
        if site.scope == "row":
            of_each = [masks[index]] * len(recorded)
            whole = site.rows == "table"
            blocks.append(RowBlock(site.module, recorded, index, of_each, whole=whole))
            continue
        blocks.extend(
            output_block(site, call, (index, number), offsets=offsets, mask=masks[index])
            for number, call in enumerate(recorded)
        )
    return blocks
