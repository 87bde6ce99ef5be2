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
    fits = all(
        isinstance(site.module, nn.Embedding) and site.scope == "output" for site in attacked.sites
    )
    plain = all(layout.plain for p in attacked.perturbations for layout in p.layouts)
    if not fits or not plain or attacked.joint or attacked.packed:
        return None
    tables = [cast(Tensor, site.module.weight) for site in attacked.sites]
    return partial(_share_kept, attacked.perturbations, tables)


def _share_kept(perturbations: Sequence[Perturbation], tables: Sequence[Tensor]) -> Tensor:
    """Compute each sample's share of vectors whose nearest table row is the original, `[B]`."""
    kept: Tensor | None = None
    count: Tensor | None = None
    for perturbation in perturbations:
        table = tables[perturbation.places[0][0]].detach()
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
