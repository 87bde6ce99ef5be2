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
from embattle.perturb.calls import Call, Layout, is_plain
from embattle.perturb.hook import Addition
from embattle.perturb.masks import Geometry
from embattle.perturb.site import Site
from embattle.perturb.strength import group_sizes

Place = tuple[int, int]  # which site, which of its calls


class Block:
    """A delta that is added, as it is, to one output. The base of the other kinds.

    Attributes:
        base: the unperturbed embeddings in the block's space (samples first), detached.
        delta: the leaf that is differentiated, zeros at first; float32 where `base` is narrower.
        geometry: the ops' `group`, `offsets` and `mask`.
        places: the outputs that the block is added to.
        layouts: how the samples are laid out at each place.
        coupled: whether the samples of the batch share the delta.
        nonfinite: int32 `[groups]`, how often a group's gradient was not finite.
        whole: whether the groups are all rows of a table, those that the batch does not read too.
        moved: bool `[groups]`, whether a group ever had a gradient other than zero.
    """

    joined = False  # whether the delta spans several outputs

    def __init__(
        self,
        base: Tensor,
        places: Sequence[Place],
        *,
        group: str = "sample",
        offsets: Tensor | None = None,
        mask: Tensor | None = None,
        layouts: Sequence[Layout] | None = None,
        coupled: bool = False,
        whole: bool = False,
    ) -> None:
        self.base = base
        self.places = list(places)
        self.layouts = list(layouts) if layouts else [Layout()] * len(self.places)
        self.coupled, self.whole = coupled, whole
        self.geometry: dict[str, Any] = {"group": group, "offsets": offsets, "mask": mask}
        self.delta = torch.zeros_like(
            base, dtype=torch.promote_types(base.dtype, torch.float32)
        ).requires_grad_()
        self.nonfinite = torch.zeros(self.groups, dtype=torch.int32, device=base.device)
        self.moved = torch.zeros(self.groups, dtype=torch.bool, device=base.device)

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
        other.moved = self.moved.new_zeros(other.groups)
        return other

    def note(self, grad: Tensor) -> None:
        """Note which groups have a gradient other than zero."""
        # Where reading it back waits for nothing, it is cheaper than another look at the gradient.
        if self.moved.is_cpu and self.moved.numpy().all():
            return
        self.moved.logical_or_(ops.group_norm(grad, norm="linf", **self.geometry))

    def still(self, done: Tensor | None = None) -> Tensor:
        """Count the groups that could move and never had a gradient, a 0-d int64 tensor.

        Args:
            done: bool `[B]`, samples that do not count; ignored where samples share the delta.
        """
        movable = group_sizes(self.base, self.geometry) > 0
        if done is not None and not self.coupled:
            movable = movable & ~self.per_group(done)
        still = movable & ~self.moved
        # Rows of a whole table that the batch does not read have no gradient by right.
        return still.sum() if not self.whole else still.sum() * (still == movable).all()

    def set(self, delta: Tensor) -> None:
        """Take over the values of `delta`."""
        self.delta = delta.detach().requires_grad_()

    def additions(self) -> list[Tensor]:
        """Give what is added at each of `places`, as the module lays it out."""
        return [self.layouts[0].to_module(self.delta)]

    def fixed(self, detached: bool) -> bool:
        """Whether what the sites add follows the delta's memory, without being made anew."""
        return self.layouts[0].plain and not self.whole

    def fused(self) -> list[Addition] | None:
        """Give what makes the perturbed outputs in passes that leave weights alone, if it can."""
        return None

    def gather(self, grads: Sequence[Tensor]) -> Tensor:
        """Turn gradients at `places` into the gradient of the block's delta."""
        return self.layouts[0].to_samples(grads[0])

    def spread(self, grad: Tensor) -> list[Tensor]:
        """Turn a gradient of delta into those at `places` (not for rows, where it is a sum)."""
        return [self.layouts[0].to_module(grad)]

    def per_row(self, values: Tensor) -> Tensor:
        """Spread one value per sample over the rows of delta: broadcastable to its shape."""
        if self.coupled:
            return values[:1].reshape(-1, *[1] * (self.base.dim() - 1))
        if self.geometry["offsets"] is not None:
            return self.per_group_row(values)
        return values.reshape(-1, *[1] * (self.base.dim() - 1))

    def per_group(self, values: Tensor) -> Tensor:
        """Spread one value per sample over the groups, `[groups]`."""
        if self.coupled:
            return values[:1].expand(self.groups)
        each = self.groups // max(self.samples, 1)
        return values if each == 1 else values.reshape(-1, 1).expand(-1, each).reshape(-1)

    def per_group_row(self, values: Tensor) -> Tensor:
        """Spread one value per group over the rows of delta: broadcastable to its shape."""
        offsets = self.geometry["offsets"]
        if offsets is not None:
            rows = self.base.shape[:-1].numel()
            spread = torch.repeat_interleave(values, offsets.diff(), output_size=rows)
            return spread.reshape(*self.base.shape[:-1], 1)
        if self.geometry["group"] == "token":
            return values.reshape(*self.base.shape[:-1], 1)
        return values.reshape(-1, *[1] * (self.base.dim() - 1))

    def norms(self, norm: Any) -> Tensor:
        """Norms of the groups of the perturbation, `[groups]`, as the model's dtype rounds it."""
        delta, base = self.delta.detach(), self.base
        if base.dtype != delta.dtype:  # otherwise the rounding is below what a norm shows
            delta = (base + delta.to(base.dtype)).to(delta.dtype) - base.to(delta.dtype)
        return ops.group_norm(delta, norm=norm, **self.geometry)

    def asked(self, norm: Any) -> Tensor:
        """Norms of the groups of the delta itself, `[groups]`."""
        return ops.group_norm(self.delta.detach(), norm=norm, **self.geometry)


class RowBlock(Block):
    """One delta per row of an embedding table (APR, He et al., SIGIR 2018).

    Of the distinct rows of the batch, so that memory follows the batch, never the table; finding
    them waits for the device (`torch.unique`). Or, if `whole`, of all rows. Rows at `padding_idx`
    and masked occurrences are left alone.
    """

    def __init__(
        self,
        module: nn.Module,
        calls: Sequence[Call],
        index: int,
        masks: Sequence[Tensor | None],
        *,
        whole: bool = False,
    ) -> None:
        self.module = module
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
        full = torch.where(padding, rows.numel() + 1, full)
        self.inverses = [
            part.reshape(i.shape) for part, i in zip(torch.split(full, sizes), indices, strict=True)
        ]
        self._arguments = found
        self._plain = all(is_plain(one) for one in self._modules)
        if self._plain:
            self._moving = [
                torch.where(inverse < rows.numel(), inverse, -1) for inverse in self.inverses
            ]
        places = [(index, i) for i in range(len(calls))]
        base = weight if whole else weight[rows]
        super().__init__(base, places, group="token", coupled=True, whole=whole)

    def additions(self) -> list[Tensor]:
        return [
            _placed(module, self.delta, inverse, arguments)
            for module, inverse, arguments in zip(
                self._modules, self.inverses, self._arguments, strict=True
            )
        ]

    def fixed(self, detached: bool) -> bool:
        return detached and self._fuses

    @property
    def _fuses(self) -> bool:
        # In half types it would round once what `additions` round twice: other losses than those
        # under the deltas that are returned.
        return self._plain and self.base.dtype == self.delta.dtype

    def fused(self) -> list[Addition] | None:
        if not self._fuses:
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


def _joined(indices: Sequence[Tensor], values: Sequence[Tensor | None], missing: bool) -> Tensor:
    """Join what is known of each call's indices, bool, in one flat tensor."""
    return torch.cat(
        [
            (torch.full_like(i, missing, dtype=torch.bool) if v is None else v).reshape(-1)
            for i, v in zip(indices, values, strict=True)
        ]
    )


def _placed(module: nn.Module, delta: Tensor, inverse: Tensor, arguments: dict[str, Any]) -> Tensor:
    """Look the rows of a table of deltas up, as the module does its own."""
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


def _perturbed_rows(
    weight: Tensor, indices: Tensor, delta: Tensor, inverse: Tensor, output: Tensor
) -> Tensor:
    """Give the perturbed rows of a table in one pass, in place of `output`."""
    return ops.embedding_perturb(weight, indices, delta, inverse)


class JointBlock(Block):
    """One ball around several outputs together: sample b's delta spans all of them."""

    joined = True

    def __init__(
        self,
        values: Sequence[Tensor],
        places: Sequence[Place],
        masks: Sequence[Tensor | None],
        layouts: Sequence[Layout],
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
        self.sizes = [value.shape[1:].numel() for value in values]
        parts = [
            value.reshape(batch, size, 1) for value, size in zip(values, self.sizes, strict=True)
        ]
        mask = None
        if any(m is not None for m in masks):
            mask = torch.cat(
                [
                    torch.ones_like(part[..., 0], dtype=torch.bool)
                    if m is None
                    else m.unsqueeze(-1).expand(value.shape).reshape(batch, size)
                    for value, part, m, size in zip(values, parts, masks, self.sizes, strict=True)
                ],
                dim=1,
            )
        super().__init__(torch.cat(parts, dim=1), places, mask=mask, layouts=layouts)

    def additions(self) -> list[Tensor]:
        return self.spread(self.delta)

    def fixed(self, detached: bool) -> bool:
        return False

    def spread(self, grad: Tensor) -> list[Tensor]:
        parts = torch.split(grad, self.sizes, dim=1)
        return [
            layout.to_module(part.reshape(shape))
            for part, shape, layout in zip(parts, self.shapes, self.layouts, strict=True)
        ]

    def narrow(self, rows: Tensor) -> Block:
        other = super().narrow(rows)
        assert isinstance(other, JointBlock)
        other.shapes = [torch.Size([rows.numel(), *shape[1:]]) for shape in self.shapes]
        return other

    def gather(self, grads: Sequence[Tensor]) -> Tensor:
        batch = self.delta.shape[0]
        return torch.cat(
            [
                layout.to_samples(grad).reshape(batch, size, 1).to(self.delta.dtype)
                for grad, layout, size in zip(grads, self.layouts, self.sizes, strict=True)
            ],
            dim=1,
        )


def _arguments(call: Call) -> dict[str, Any]:
    names = ("input", "offsets", "per_sample_weights")
    found = dict(zip(names, call.args, strict=False)) | call.kwargs
    if not isinstance(found.get("input"), Tensor):
        raise ValueError(
            f"Site: {type(call.module).__name__} was called without a tensor of indices"
        )
    return {
        name: value.detach() if isinstance(value, Tensor) else value
        for name, value in found.items()
    }


def call_block(site: Site, call: Call, place: Place, geometry: Geometry) -> Block:
    """Make the block of one call's output; a jagged output brings its own offsets."""
    layout, base = call.layout, call.value.detach()
    shared = layout.samples is None
    mask = geometry.mask(*place, call)
    if site.scope == "weight" and site.group == "sample":
        # One ball around the whole parameter: a single sample.
        base = base.unsqueeze(0)
        mask = None if mask is None else mask.unsqueeze(0)
        return Block(base, [place], mask=mask, layouts=[_Whole()], coupled=True, whole=True)
    if base.dim() < 2 and not shared:
        raise ValueError(
            f"Site: {type(call.module).__name__} returned shape {tuple(base.shape)}; embeddings "
            "need a dim of samples and one of features"
        )
    return Block(
        layout.to_samples(base),
        [place],
        group="token" if shared else site.group,
        offsets=geometry.bounds(*place, call),
        mask=mask,
        layouts=[layout],
        coupled=shared,
        whole=site.scope == "weight",
    )


class _Whole(Layout):
    """A parameter as the only sample of a batch."""

    def to_samples(self, value: Tensor) -> Tensor:
        return value.unsqueeze(0)

    def to_module(self, value: Tensor) -> Tensor:
        return value.squeeze(0)


def build(
    sites: Sequence[Site],
    calls: Sequence[Sequence[Call]],
    geometry: Geometry,
    *,
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
                f"{site!r}: the loss function did not call this module. Does the model look its "
                "embeddings up elsewhere (Site.embeddings(model) finds the look-ups of an "
                "encoder-decoder), read the table directly (Site.weight(module)), or was the site "
                "removed, or created after torch.compile?"
            )
    if joint:
        if (
            any(site.scope != "output" or site.group == "token" for site in sites)
            or geometry.packed
            or any(call.layout.samples is None for recorded in calls for call in recorded)
        ):
            raise ValueError(
                "joint: needs sites of scope 'output' and group 'sample', no offsets, and samples "
                "in all outputs"
            )
        places = [(s, c) for s, recorded in enumerate(calls) for c in range(len(recorded))]
        layouts = [calls[s][c].layout for s, c in places]
        values = [
            layout.to_samples(calls[s][c].value.detach())
            for (s, c), layout in zip(places, layouts, strict=True)
        ]
        masks = [geometry.mask(s, c, calls[s][c]) for s, c in places]
        return [JointBlock(values, places, masks, layouts)]
    blocks: list[Block] = []
    for index, (site, recorded) in enumerate(zip(sites, calls, strict=True)):
        if site.scope == "row":
            masks = [geometry.mask(index, number, call) for number, call in enumerate(recorded)]
            whole = site.rows == "table"
            blocks.append(RowBlock(site.module, recorded, index, masks, whole=whole))
            continue
        blocks.extend(
            call_block(site, call, (index, number), geometry)
            for number, call in enumerate(recorded)
        )
    return blocks
