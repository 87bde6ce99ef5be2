"""How many perturbed embeddings are still nearest to the row of the table that they came from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from embattle.perturb.attacked_batch import AttackedBatch
from embattle.perturb.perturbation import Perturbation


def nearest_agreement(attacked: AttackedBatch) -> Callable[[], Tensor] | None:
    """Return a function that computes the agreement, `[B]` in [0, 1]; None without tables."""
    plain = all(layout.plain for p in attacked.perturbations for layout in p.layouts)
    if not plain or attacked.joint or attacked.packed:
        return None
    calls = attacked.perturbed.calls
    modules = [calls[site][call].module for p in attacked.perturbations for site, call in p.places]
    outputs = all(site.scope == "output" for site in attacked.sites)
    if not outputs or not all(isinstance(module, nn.Embedding) for module in modules):
        return None
    # A site may look several tables up: each call has its own.
    tables = [cast(Tensor, module.weight) for module in modules]
    return partial(_share_kept, attacked.perturbations, tables)


def _share_kept(perturbations: Sequence[Perturbation], tables: Sequence[Tensor]) -> Tensor:
    """Compute each sample's share of vectors whose nearest table row is the original, `[B]`.

    Args:
        perturbations: of one call each.
        tables: what these calls look up.
    """
    kept: Tensor | None = None
    count: Tensor | None = None
    for perturbation, parameter in zip(perturbations, tables, strict=True):
        table = parameter.detach()
        base = perturbation.base.reshape(perturbation.samples, -1, perturbation.base.shape[-1])
        moved = base + perturbation.delta.detach().reshape(base.shape).to(base.dtype)
        sizes = table.float().square().sum(1)
        mask = perturbation.geometry["mask"]
        same = []
        for before, after in zip(base, moved, strict=True):  # [T, V] at a time
            nearest = (sizes - 2 * after.float() @ table.float().T).argmin(1)
            same.append((table[nearest] == before).all(1))
        agree = torch.stack(same)
        part = torch.ones_like(agree) if mask is None else mask.reshape(agree.shape)
        hits, total = (agree & part).sum(1), part.sum(1)
        kept = hits if kept is None else kept + hits
        count = total if count is None else count + total
    assert kept is not None
    assert count is not None
    return kept / count.clamp(min=1)
