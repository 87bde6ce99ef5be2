"""The parts of a perturbation by name: sample by sample, and averaged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from embattle.explain.path import Carried

# Parts that are told apart in a list; the others are one entry.
SHOWN = 40


def names_of(carried: Carried, given: Sequence[Sequence[Sequence[str]]], word: str) -> list[Any]:
    """Name every part: for each output B lists of P names.

    Args:
        carried: has the parts.
        given: names as `Task.parts_of` gives them: for each output a list for each sample, or one
            that all share; outputs that are left out, and lists that do not fit, get numbers.
        word: what a part without a name is called, such as `token`.
    """
    found = []
    for k, table in enumerate(carried.parts):
        rows, count = table.shape
        of = f" of output {k + 1}" if len(carried.parts) > 1 else ""
        numbers = [f"{word} {i + 1}{of}" for i in range(count)]
        lists = list(given[k]) if k < len(given) else []
        if len(lists) == 1:
            lists *= rows
        fits = len(lists) == rows and all(len(one) == count for one in lists)
        found.append([list(one) for one in lists] if fits else [numbers] * rows)
    return found


def of_samples(
    carried: Carried, names: Sequence[Sequence[Sequence[str]]]
) -> list[list[dict[str, Any]]]:
    """List the parts of each sample that could move, in their order.

    Returns:
        For each sample entries of `name`, `share` (of the rise of the loss) and `size` (share of
        the squared norm). Of more than `SHOWN` parts those with the largest shares are named, the
        others are the last entry.
    """
    shares = carried.shares()
    found = []
    for b in range(len(carried.clean)):
        entries = [
            {"name": name, "share": share, "size": size}
            for k in range(len(shares))
            for name, share, size, moved in zip(
                names[k][b],
                shares[k][b].tolist(),
                carried.sizes[k][b].tolist(),
                carried.movable[k][b].tolist(),
                strict=True,
            )
            if moved
        ]
        found.append(_shortened(entries))
    return found


def averages(
    carried: Carried, names: Sequence[Sequence[Sequence[str]]], *, positions: bool = False
) -> list[dict[str, Any]]:
    """Add up what parts of the same name carried, over all samples.

    Args:
        carried: has the parts.
        names: of them.
        positions: take the place in the sample (from 1) for the name.

    Returns:
        Entries of `name`, `share` of the whole rise of the loss, and `count`, how many parts have
        the name; largest share first. Of more than `SHOWN` names the others are the last entry.
        Samples whose loss did not rise, or not to a finite number, are left out.
    """
    total = torch.cat(carried.parts, dim=1).sum(1)
    usable = (total > 0) & total.isfinite()
    whole = float(total[usable].sum())
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    for b in torch.nonzero(usable).flatten().tolist():
        for k, table in enumerate(carried.parts):
            moved: Tensor = carried.movable[k][b]
            row = zip(names[k][b], table[b].tolist(), moved.tolist(), strict=True)
            for place, (name, part, could) in enumerate(row, start=1):
                if could:
                    key = str(place) if positions else name
                    sums[key] = sums.get(key, 0.0) + part
                    counts[key] = counts.get(key, 0) + 1
    entries = [
        {"name": name, "share": value / whole, "count": counts[name]}
        for name, value in sums.items()
    ]
    if positions:
        return sorted(entries, key=lambda entry: int(entry["name"]))
    return _shortened(sorted(entries, key=lambda entry: -entry["share"]))


def missed(carried: Carried) -> float:
    """What the parts miss of the rise of the losses, as a share of it.

    Both are summed without their signs: what is missed of one sample does not make up for what
    another's parts have too much. Losses that are not finite are left out.
    """
    gap, rise = (
        float(values[values.isfinite()].abs().sum()) for values in (carried.gap, carried.increase)
    )
    return gap / rise if rise else 0.0


def _shortened(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries with the largest shares in their order, and one for the others together.

    Where there are many, those that did nothing are among the others: rows of a table that a sample
    does not read.
    """
    if len(entries) <= SHOWN:
        return entries
    order = sorted(range(len(entries)), key=lambda i: -abs(entries[i]["share"]))
    kept = [i for i in sorted(order[: SHOWN - 1]) if entries[i]["share"]]
    rest = [i for i in range(len(entries)) if i not in set(kept)]
    others: dict[str, Any] = {"name": f"({len(rest):,} others)"}
    for key in entries[0]:
        if key != "name":
            others[key] = sum(entries[i][key] for i in rest)
    return [*(entries[i] for i in kept), others]
