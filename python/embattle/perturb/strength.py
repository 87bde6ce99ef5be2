"""How strong an attack may be: absolute, relative to the embeddings, or per dimension."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from embattle import checks, ops

To: TypeAlias = Literal["mean_norm", "group_norm", "token_norm"]
_TO = ("mean_norm", "group_norm", "token_norm")
_WORDS = {
    "mean_norm": "the mean norm of the batch's groups",
    "group_norm": "each group's own norm",
    "token_norm": "the batch's mean token norm",
}


@runtime_checkable
class Convention(Protocol):
    """A strength that is known only when the embeddings are."""

    def resolve(self, base: Tensor, *, norm: Any, geometry: dict[str, Any]) -> float | Tensor:
        """Return the absolute strength of each group of `base`."""
        ...


Strength: TypeAlias = float | Tensor | Convention


def check_strength(who: str, name: str, value: Any) -> Strength:
    """Check a strength: a number that is not negative, a floating-point tensor, or a convention.

    Raises:
        TypeError: something else.
        ValueError: a negative number or NaN (of a tensor, where it is on the CPU), or a tensor that
            is neither one value nor `[groups]`.
    """
    if isinstance(value, Tensor):
        if not value.is_floating_point() or value.dim() > 1:
            raise ValueError(
                f"{who}: {name} must be one value, or one per group [groups], in floating point; "
                f"got {tuple(value.shape)} of {value.dtype}"
            )
        if value.is_cpu and bool(((value < 0) | value.isnan()).any()):  # others would wait for it
            raise ValueError(f"{who}: {name} must be at least 0, got {value.min().item():g} in it")
        return value
    # Numbers come before conventions: to look whether a protocol holds takes ten times as long.
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return checks.real(who, name, value, 0, finite=False)
    if isinstance(value, Convention):
        return value
    raise TypeError(
        f"{who}: {name} must be a number, a tensor [groups], Relative or PerDim; got {value!r}"
    )


@dataclass(frozen=True)
class Relative:
    """`value` times the size of the embeddings that are perturbed.

    Args:
        value: the factor, at least 0.
        to: `"mean_norm"`: the mean over the batch of the groups' norms, one radius for all;
            `"group_norm"`: each group's own norm; `"token_norm"`: the mean norm of the batch's
            unmasked token vectors, whatever the groups. The norm is the attack's.

    Raises:
        ValueError: `value` is negative, or `to` is unknown.
    """

    value: float
    to: To = "mean_norm"

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", checks.real("Relative", "value", self.value, 0))
        checks.one_of("Relative", "to", self.to, _TO)

    def resolve(self, base: Tensor, *, norm: Any, geometry: dict[str, Any]) -> Tensor:
        """Return one radius per group, `[groups]`, in float32 or the type of `base`."""
        if self.to == "group_norm":
            return self.value * ops.group_norm(base, norm=norm, **geometry)
        mean = self.shared(base, norm=norm, geometry=geometry)
        return mean.expand(group_count(base, geometry)).contiguous()

    def shared(self, base: Tensor, *, norm: Any, geometry: dict[str, Any]) -> Tensor:
        """Return the one radius of all groups, 0-d, of a mean."""
        mask = geometry.get("mask")
        if self.to == "token_norm":
            norms = ops.group_norm(base, norm=norm, group="token", mask=mask)
            if mask is None:
                return self.value * norms.mean()
            counts = mask.reshape(-1).to(norms.dtype)
        else:
            norms = ops.group_norm(base, norm=norm, **geometry)
            counts = (group_sizes(base, geometry) > 0).to(norms.dtype)
        mean: Tensor = (norms * counts).sum() / counts.sum().clamp(min=1)
        return self.value * mean

    def __str__(self) -> str:
        return f"{self.value:g} x {_WORDS[self.to]}"


@dataclass(frozen=True)
class PerDim:
    """`value / sqrt(n)`, n being the number of unmasked elements of the group.

    With one group per sample this is the `alpha / sqrt(L * d)` of NEFTune (Jain et al., 2023) and
    of FreeLB's initialisation (Zhu et al., 2020).
    """

    value: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", checks.real("PerDim", "value", self.value, 0))

    def resolve(self, base: Tensor, *, norm: Any, geometry: dict[str, Any]) -> Tensor:
        """Return one strength per group, `[groups]`."""
        dtype = torch.promote_types(base.dtype, torch.float32)
        return self.value / group_sizes(base, geometry).to(dtype).clamp(min=1).sqrt()

    def __str__(self) -> str:
        return f"{self.value:g} / sqrt(elements in the group)"


@dataclass(frozen=True)
class Measured:
    """Absolute strengths that were measured before: one for each place, whatever the batch.

    So balls that are relative to a model's embeddings stay what they are where samples are
    attacked in other batches than those they were measured in.

    Args:
        values: by place, (number of the site, number of its call).
        factor: times it.
    """

    values: dict[tuple[int, int], float]
    factor: float = 1.0

    def at(self, place: tuple[int, int]) -> float:
        """Return the strength at a place.

        Raises:
            ValueError: none was measured there.
        """
        if place not in self.values:
            raise ValueError(
                f"Measured: call {place[1]} of site {place[0]} was not measured; measure a batch "
                "that runs the model in the same way"
            )
        return self.factor * self.values[place]

    def times(self, factor: float) -> Measured:
        """Return the strengths times a factor."""
        return Measured(self.values, self.factor * factor)

    def resolve(self, base: Tensor, *, norm: Any, geometry: dict[str, Any]) -> float:
        """Return the one strength there is.

        Raises:
            ValueError: there are several, and it is not known which place is asked for.
        """
        if len(self.values) != 1:
            raise ValueError("Measured: several places have strengths of their own")
        return self.at(next(iter(self.values)))

    def __str__(self) -> str:
        return " or ".join(f"{self.factor * value:g}" for value in self.values.values())


@dataclass(frozen=True)
class OfChosen:
    """The strengths of a batch's groups, for an attack on some of its samples.

    Args:
        values: `[groups]`, of the whole batch; or one for each row of a table.
        size: samples of the batch.
        rows: int64 `[n]`, which of them are attacked.
    """

    values: Tensor
    size: int
    rows: Tensor

    def resolve(self, base: Tensor, *, norm: Any, geometry: dict[str, Any]) -> Tensor:
        """Return those of the chosen samples' groups, whose padding may be cut on the right.

        Raises:
            ValueError: there are not as many for each sample.
        """
        values, count = self.values.to(base.device), group_count(base, geometry)
        if base.dim() == 2 and len(values) == count:  # of a table, whichever rows are read
            return values
        each, of_sample = divmod(count, max(len(self.rows), 1))
        lead = base.shape[1:-2].numel() if each > 1 else 1
        if of_sample or len(values) % (max(self.size, 1) * lead) or len(values) < self.size * each:
            raise ValueError(
                f"{len(values)} strengths, one for each group, do not belong to the {count} groups "
                f"of {len(self.rows)} samples out of {self.size}"
            )
        chosen = values.reshape(self.size, lead, -1)[self.rows.to(values.device)]
        return chosen[..., : each // lead].reshape(-1)

    def __str__(self) -> str:
        return words(self.values)


def scaled(value: Strength, factor: float) -> Strength:
    """Return a strength times a factor.

    Raises:
        TypeError: it is a convention of one's own.
    """
    if isinstance(value, Measured):
        return value.times(factor)
    if isinstance(value, Relative):
        return Relative(value.value * factor, to=value.to)
    if isinstance(value, PerDim):
        return PerDim(value.value * factor)
    if isinstance(value, (int, float, Tensor)):
        return value * factor
    raise TypeError(f"{value!r} cannot be scaled: give a number, a tensor, Relative or PerDim")


def group_count(base: Tensor, geometry: dict[str, Any]) -> int:
    """Count the groups."""
    offsets = geometry.get("offsets")
    if offsets is not None:
        return int(offsets.numel()) - 1
    if geometry.get("group") == "token" or base.dim() < 2:
        return base.shape[:-1].numel()
    return base.shape[0]


def group_sizes(base: Tensor, geometry: dict[str, Any]) -> Tensor:
    """Count the unmasked elements of each group, `[groups]` int64."""
    group, offsets, mask = (geometry.get(key) for key in ("group", "offsets", "mask"))
    width = base.shape[-1] if base.dim() > 1 else base.numel()
    rows = base.numel() // width if width else 0
    if mask is None:
        part = torch.ones(rows, dtype=torch.int64, device=base.device)
    else:
        part = mask.reshape(-1).to(torch.int64)
    if offsets is not None:
        total = torch.cat([part.new_zeros(1), part.cumsum(0)])
        return (total[offsets[1:]] - total[offsets[:-1]]) * width
    if group == "token" or base.dim() < 2:
        return part * width
    if base.dim() == 2:
        return part * width
    return part.reshape(base.shape[:-1]).flatten(1).sum(1) * width


def resolve(
    value: Strength, base: Tensor, *, norm: Any, geometry: dict[str, Any], scale: float = 1.0
) -> float | Tensor:
    """Turn a strength into what the ops take: a float or a tensor `[groups]`.

    A single-element tensor is spread over the groups, so that it needs no read-back.
    """
    if isinstance(value, (int, float)):
        return float(value) * scale if math.isfinite(value) else float(value)
    if isinstance(value, Relative) and value.to != "group_norm" and base.is_cpu and base.numel():
        # Where reading back waits for nothing, one number for all groups is cheaper in the ops.
        found = float(value.shared(base, norm=norm, geometry=geometry))
        if math.isfinite(found):  # else the loss is to tell what is wrong with the embeddings
            return found * scale
    if not isinstance(value, Tensor):
        value = value.resolve(base, norm=norm, geometry=geometry)
    else:
        value = value.to(base.device)
        if value.numel() == 1:
            value = value.reshape(1).expand(group_count(base, geometry)).contiguous()
    if isinstance(value, Tensor):
        return value if scale == 1.0 else value * scale
    return float(value) * scale if math.isfinite(value) else float(value)


def words(value: Strength | None) -> str:
    """Return a strength in words, for `repr`."""
    if isinstance(value, Tensor):
        return f"one of {tuple(value.shape)} values per group"
    return f"{value:g}" if isinstance(value, (int, float)) else str(value)
