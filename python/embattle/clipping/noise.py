"""Gaussian noise for differentially private training."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from embattle.clipping.grad_sample import GradSample
from embattle.clipping.table_grad_sample import BagGradSample, EmbeddingGradSample
from embattle.clipping.users import Users


@dataclass(frozen=True)
class RowSelection:
    """Which rows of sparse tables get noise: DP-AdaFEST (arXiv 2311.08357, algorithm 1).

    Every sample votes for the rows it touches, its votes over all sparse tables clipped to
    contribution_norm; the noisy count decides which rows are updated, with noise, and the rest of
    the gradient is dropped. The draw of untouched rows above the threshold is exact, but made
    without visiting them, so the cost follows the batch.

    Attributes:
        threshold: rows whose noisy count exceeds it are updated.
        contribution_norm: largest l2 norm of a sample's votes.
        noise_multiplier: standard deviation of the count's noise over contribution_norm.
    """

    threshold: float
    contribution_norm: float = 1.0
    noise_multiplier: float = 1.0

    def __post_init__(self) -> None:
        for name in ("threshold", "contribution_norm", "noise_multiplier"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"RowSelection: {name} must be positive and finite, got {value}")


def normal(like: Tensor, std: float, generator: torch.Generator | None) -> Tensor:
    """N(0, std^2) in the shape, dtype and device of like; drawn where the generator lives."""
    device = like.device if generator is None else generator.device
    draw = torch.randn(like.shape, dtype=like.dtype, device=device, generator=generator)
    return draw.mul_(std).to(like.device)


def densify(grad: Tensor, name: str) -> Tensor:
    """A sparse gradient that noise must fill: dense, with a warning on the cost."""
    if grad.layout == torch.strided:
        return grad
    warnings.warn(
        f"PerSampleClipper: noise makes the sparse gradient of '{name}' dense "
        f"({math.prod(grad.shape)} numbers); give row_selection to update selected rows alone",
        stacklevel=3,
    )
    return grad.to_dense()


def _touched(found: Sequence[GradSample], users: Users, counted: Tensor) -> tuple[Tensor, Tensor]:
    """The (user, row) pairs of a table, each once, of samples that count: two [pairs] tensors."""
    owners, rows = [], []
    for each in found:
        if isinstance(each, BagGradSample):
            ids, samples = each.indices, each.owners()
        elif isinstance(each, EmbeddingGradSample):
            ids = each.indices.flatten()
            samples = torch.arange(len(each.indices), device=ids.device)
            samples = samples.repeat_interleave(each.indices.shape[1])
        else:
            continue
        keep = counted[samples]
        if each.padding_idx is not None:
            keep = keep & (ids != each.padding_idx)
        ids, samples = ids[keep], samples[keep]
        owners.append(samples if users.of_sample is None else users.of_sample[samples])
        rows.append(ids.long())
    pairs = torch.stack([torch.cat(owners), torch.cat(rows)])
    pairs = torch.unique(pairs, dim=1)
    return pairs[0], pairs[1]


def select_rows(
    selection: RowSelection,
    tables: Sequence[Sequence[GradSample]],
    sizes: Sequence[int],
    users: Users,
    counted: Tensor,
    generator: torch.Generator | None,
) -> list[Tensor]:
    """Rows to update, per table.

    Args:
        selection: the rule.
        tables: the grad samples of each sparse table.
        sizes: number of rows of each table.
        users: the samples' users.
        counted: [B], bool: the samples that take part.
        generator: source of the noise.

    Returns:
        For each table its selected rows, sorted.
    """
    pairs = [_touched(found, users, counted) for found in tables]
    votes = torch.zeros(users.count, dtype=torch.float64, device=counted.device)
    for owner, _ in pairs:
        votes.index_add_(0, owner, torch.ones_like(owner, dtype=torch.float64))
    scale = (selection.contribution_norm / votes.sqrt().clamp(min=1e-300)).clamp(max=1)
    std = selection.noise_multiplier * selection.contribution_norm
    # The chance that the noise alone lifts a row above the threshold.
    chance = 0.5 * math.erfc(selection.threshold / (std * math.sqrt(2)))
    found = []
    for (owner, row), size in zip(pairs, sizes, strict=True):
        rows, place = torch.unique(row, return_inverse=True)
        counts = scale.new_zeros(len(rows)).index_add_(0, place, scale[owner])
        counts = counts + normal(counts, std, generator)
        kept = rows[counts > selection.threshold]
        found.append(torch.cat([kept, _others(rows, size, chance, generator)]).sort().values)
    return found


def _others(rows: Tensor, size: int, chance: float, generator: torch.Generator | None) -> Tensor:
    """Each of the size - len(rows) other rows with the given chance, without visiting all."""
    free = size - len(rows)
    device = torch.device("cpu") if generator is None else generator.device
    total = torch.tensor(float(free), dtype=torch.float64, device=device)
    odds = torch.tensor(chance, dtype=torch.float64, device=device)
    count = int(torch.binomial(total, odds, generator=generator))
    ranks = torch.zeros(0, dtype=torch.long, device=device)
    if 2 * count > free:
        ranks = torch.randperm(free, device=device, generator=generator)[:count]
    while len(ranks) < count:
        more = torch.randint(free, (count - len(ranks),), device=device, generator=generator)
        ranks = torch.unique(torch.cat([ranks, more]))
    # The rank-th row that is not among the (sorted) touched ones.
    touched = rows.to(device)
    before = touched - torch.arange(len(touched), device=device)
    return (ranks + torch.searchsorted(before, ranks, right=True)).to(rows.device)


def restrict(grad: Tensor, rows: Tensor, std: float, generator: torch.Generator | None) -> Tensor:
    """A sparse gradient on the given (sorted) rows alone, with noise there."""
    grad = grad.coalesce()
    present, values = grad.indices()[0], grad.values()
    kept = values.new_zeros(len(rows), *values.shape[1:])
    if len(rows):
        place = torch.searchsorted(rows, present).clamp(max=len(rows) - 1)
        inside = rows[place] == present
        kept[place[inside]] = values[inside]
    kept += normal(kept, std, generator)
    return torch.sparse_coo_tensor(
        rows[None], kept, grad.shape, is_coalesced=True, check_invariants=False
    )
