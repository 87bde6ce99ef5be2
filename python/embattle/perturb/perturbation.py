"""What an attack optimises: leaf tensors, and the outputs of modules that each is added to.

A perturbation owns a tensor `delta` in its own space (a module's output, the distinct rows of a
table, or several outputs joined), the groups that have a ball there, and the linear map from
`delta` to the tensors that the sites add.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from copy import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embattle import ops
from embattle.perturb.calls import PLAIN, Layout
from embattle.perturb.hook import PassAddition
from embattle.perturb.strength import Measured, Relative, Strength, group_sizes, resolve

_WIDE = (torch.float32, torch.float64)
_FEW = 1024  # numbers that are looked at sooner as a list

Place = tuple[int, int]  # which site, which of its calls


class Perturbation:
    """A tensor `delta` that is added, as it is, to one output. The base of the other kinds.

    Attributes:
        base: the unperturbed embeddings in the perturbation's space (samples first), detached.
        delta: the leaf that is differentiated, zeros at first; float32 where `base` is narrower.
        dtype: that of `delta`.
        geometry: the ops' `group`, `offsets` and `mask`.
        places: the outputs that `delta` is added to.
        layouts: how the samples are laid out at each place.
        coupled: whether the samples of the batch share the delta.
        nonfinite: int32 `[groups]`, how often a group's gradient was not finite.
        whole: whether the groups are all rows of a table, those that the batch does not read too.
        rows: the numbers of the rows of a table that the groups are, ascending; None: of no table.
    """

    joined = False  # whether the delta spans several outputs
    rows: Tensor | None = None

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
        self.layouts = list(layouts) if layouts else [PLAIN] * len(self.places)
        self.coupled, self.whole = coupled, whole
        self.geometry: dict[str, Any] = {"group": group, "offsets": offsets, "mask": mask}
        self.dtype = base.dtype if base.dtype in _WIDE else torch.float32
        self._delta: Tensor | None = None
        self.nonfinite = torch.zeros(self.groups, dtype=torch.int32, device=base.device)
        self._had_gradient: Tensor | None = None  # made when it is asked for: mostly all have one
        self._all_had = False

    @property
    def delta(self) -> Tensor:
        if self._delta is None:  # made when it is asked for: some forms need a part of it alone
            self._delta = torch.zeros_like(self.base, dtype=self.dtype, requires_grad=True)
        return self._delta

    @delta.setter
    def delta(self, delta: Tensor) -> None:
        self._delta = delta

    @property
    def touched(self) -> bool:
        """Whether `delta` was asked for; otherwise it is zero."""
        return self._delta is not None

    @property
    def had_gradient(self) -> Tensor:
        """Whether a group ever had a gradient other than zero; bool `[groups]`."""
        if self._had_gradient is None:
            self._had_gradient = torch.full_like(self.nonfinite, self._all_had, dtype=torch.bool)
        return self._had_gradient

    @had_gradient.setter
    def had_gradient(self, flags: Tensor | None) -> None:
        self._had_gradient, self._all_had = flags, False

    @property
    def samples(self) -> int:
        """The number of samples, as `offsets` or the first dim of `base` have it."""
        offsets = self.geometry["offsets"]
        if offsets is not None:
            return int(offsets.numel()) - 1
        return self.base.shape[0] if self.base.dim() > 1 else 1

    @property
    def groups(self) -> int:
        """The number of groups: each has a ball of its own."""
        if self.geometry["offsets"] is not None or self.geometry["group"] == "sample":
            return self.samples
        return int(self.base.shape[:-1].numel())

    def select(self, rows: Tensor | slice) -> Perturbation:
        """Return the perturbation of some of the samples, with a `delta` of its own.

        Args:
            rows: int64 `[n]`, their places in the batch; of a slice, `delta` is a view.
        """
        other = copy(self)
        mask = self.geometry["mask"]
        other.base = self.base[rows]
        other.geometry = self.geometry | {"mask": None if mask is None else mask[rows]}
        if self._delta is not None:
            other.set(self._delta.detach()[rows])
        other.nonfinite = self.nonfinite.new_zeros(other.groups)
        other.had_gradient = None
        return other

    def mark_gradients(self, grad: Tensor) -> None:
        """Record in `had_gradient` where a gradient, of the shape of `delta`, is not zero."""
        if self._all_had:
            return
        # Where reading back waits for nothing: mostly one element of each group shows that it has
        # a gradient, which is cheaper than to read it all.
        if self._one_of_each_group_moves(grad):
            self.had_gradient, self._all_had = None, True
            return
        had = self.had_gradient
        had.logical_or_(ops.group_norm(grad, norm="l1", **self.geometry))
        self._all_had = had.is_cpu and _all(had)

    def _one_of_each_group_moves(self, grad: Tensor) -> bool:
        """Return whether, on the CPU, the first element of each group is other than zero.

        False where groups are no equal shares of the elements, one after the other.
        """
        if (
            type(grad) is not Tensor
            or grad.dtype not in _WIDE
            or not (grad.is_cpu and grad.is_contiguous() and grad.numel())
            or self.geometry["offsets"] is not None
            or self.geometry["mask"] is not None
        ):
            return False
        groups = self.nonfinite.shape[0]
        first = grad.as_strided((groups,), (grad.numel() // groups,))
        if groups <= _FEW:
            return 0.0 not in first.tolist()
        # By numpy, in a tenth of torch's time.
        return bool(np.count_nonzero(first.numpy(force=True)) == groups)

    def count_without_gradient(self, done: Tensor | None = None) -> Tensor:
        """Count the groups that may move and never had a gradient other than zero: 0-d, int64.

        Args:
            done: bool `[B]`, samples that do not count; ignored where samples share the delta.
        """
        if self._all_had:
            return self.nonfinite.new_zeros((), dtype=torch.int64)
        movable = group_sizes(self.base, self.geometry) > 0
        if done is not None and not self.coupled:
            movable = movable & ~self.per_group(done)
        without = movable & ~self.had_gradient
        # Rows of a whole table that the batch does not read have no gradient in any case.
        return without.sum() if not self.whole else without.sum() * (without == movable).all()

    def set(self, delta: Tensor) -> None:
        """Set the values of `delta`."""
        self.delta = delta.detach().requires_grad_()

    def additions(self) -> list[Tensor]:
        """Return the tensor to add at each of `places`, in the layout of the module's output."""
        return [self.layouts[0].to_module(self.delta)]

    def reusable(self, detached: bool) -> bool:
        """Return whether the `additions` share the memory of `delta`, and so follow its values."""
        return self.layouts[0].plain and not self.whole

    def computed(self, detached: bool) -> list[PassAddition] | None:
        """Return what computes the additions, or the perturbed outputs, in a call; None: nothing.

        Args:
            detached: the modules' weights need no gradient.
        """
        return None

    def gather(self, grads: Sequence[Tensor]) -> Tensor:
        """Turn gradients at `places` into the gradient of `delta`."""
        return self.layouts[0].to_samples(grads[0])

    def spread(self, grad: Tensor) -> list[Tensor]:
        """Turn a gradient of `delta` into those at `places` (not for rows, where it is a sum)."""
        return [self.layouts[0].to_module(grad)]

    def per_delta(self, values: Tensor) -> Tensor:
        """Return one value per sample, `[B]`; where they share the delta, their only one, `[1]`."""
        if not self.coupled:
            return values
        return values[:1] if len(values) else values.new_zeros(1)

    def per_row(self, values: Tensor) -> Tensor:
        """Expand one value per sample, `[B]`, to a shape that broadcasts to `delta`."""
        if self.coupled:
            return self.per_delta(values).reshape(-1, *[1] * (self.base.dim() - 1))
        if self.geometry["offsets"] is not None:
            return self.per_group_row(values)
        return values.reshape(-1, *[1] * (self.base.dim() - 1))

    def per_group(self, values: Tensor) -> Tensor:
        """Expand one value per sample, `[B]`, to one per group, `[groups]`."""
        if self.coupled:
            return self.per_delta(values).expand(self.groups)
        each = self.groups // max(self.samples, 1)
        return values if each == 1 else values.reshape(-1, 1).expand(-1, each).reshape(-1)

    def per_group_row(self, values: Tensor) -> Tensor:
        """Expand one value per group, `[groups]`, to a shape that broadcasts to `delta`."""
        offsets = self.geometry["offsets"]
        if offsets is not None:
            rows = self.base.shape[:-1].numel()
            spread = torch.repeat_interleave(values, offsets.diff(), output_size=rows)
            return spread.reshape(*self.base.shape[:-1], 1)
        if self.geometry["group"] == "token":
            return values.reshape(*self.base.shape[:-1], 1)
        return values.reshape(-1, *[1] * (self.base.dim() - 1))

    def strength(self, value: Strength, norm: Any, scale: float = 1.0) -> float | Tensor:
        """Turn a strength into what the ops take: a number, or one for each group, `[groups]`."""
        if isinstance(value, Measured):  # of a joint ball around several places: their mean
            value = statistics.mean(map(value.at, self.places))
        return resolve(value, self.base, norm=norm, geometry=self.geometry, scale=scale)

    def norms(self, norm: Any) -> Tensor:
        """Compute each group's norm, `[groups]`, of the delta as the model's dtype rounds it."""
        delta, base = self.delta.detach(), self.base
        if base.dtype != delta.dtype:  # otherwise the rounding is below what a norm shows
            delta = (base + delta.to(base.dtype)).to(delta.dtype) - base.to(delta.dtype)
        return ops.group_norm(delta, norm=norm, **self.geometry)

    def unrounded_norms(self, norm: Any) -> Tensor:
        """Compute each group's norm, `[groups]`, of `delta` as it is."""
        return ops.group_norm(self.delta.detach(), norm=norm, **self.geometry)


def total(counts: Sequence[Tensor]) -> Tensor:
    """Add up counts, 0-d each."""
    return counts[0] if len(counts) == 1 else torch.stack(list(counts)).sum()


def _all(flags: Tensor) -> bool:
    """Return whether all of a bool tensor is True: on the CPU in a tenth of `Tensor.all`."""
    return b"\0" not in flags.numpy().tobytes()


class JointPerturbation(Perturbation):
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

    def strength(self, value: Strength, norm: Any, scale: float = 1.0) -> float | Tensor:
        if isinstance(value, Relative) and value.to == "token_norm":
            value = value.value * self._token_norm(norm)
        return super().strength(value, norm, scale)

    def _token_norm(self, norm: Any) -> Tensor:
        """Return the mean norm of the vectors that may move, of all outputs: 0-d."""
        mask = self.geometry["mask"]
        there = torch.ones_like(self.base[..., 0], dtype=torch.bool) if mask is None else mask
        total, count = self.base.new_zeros(()), self.base.new_zeros(())
        for part, moves, shape in zip(
            torch.split(self.base, self.sizes, 1),
            torch.split(there, self.sizes, 1),
            self.shapes,
            strict=True,
        ):
            kept = moves.reshape(shape)[..., 0].reshape(-1)
            total = (
                total + (ops.group_norm(part.reshape(shape), norm=norm, group="token") * kept).sum()
            )
            count = count + kept.sum()
        return total / count.clamp(min=1)

    def reusable(self, detached: bool) -> bool:
        return False

    def spread(self, grad: Tensor) -> list[Tensor]:
        parts = torch.split(grad, self.sizes, dim=1)
        return [
            layout.to_module(part.reshape(shape))
            for part, shape, layout in zip(parts, self.shapes, self.layouts, strict=True)
        ]

    def select(self, rows: Tensor | slice) -> Perturbation:
        other = super().select(rows)
        assert isinstance(other, JointPerturbation)
        other.shapes = [torch.Size([len(other.base), *shape[1:]]) for shape in self.shapes]
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
