"""Make the perturbations of an attack from the calls that its first pass recorded."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from embattle.perturb.calls import Call, Layout
from embattle.perturb.masks import Geometry
from embattle.perturb.perturbation import JointPerturbation, Perturbation, Place
from embattle.perturb.row_perturbation import RowPerturbation
from embattle.perturb.site import Site


def perturbation_of_call(site: Site, call: Call, place: Place, geometry: Geometry) -> Perturbation:
    """Make the perturbation of one call's output; a jagged output brings its own offsets.

    Raises:
        ValueError: the output has no dim of samples.
    """
    layout, base = call.layout, call.value.detach()
    shared = layout.samples is None
    mask = geometry.mask(*place, call)
    if site.scope == "weight" and site.group == "sample":
        # One ball around the whole parameter: a single sample.
        base = base.unsqueeze(0)
        mask = None if mask is None else mask.unsqueeze(0)
        return Perturbation(base, [place], mask=mask, layouts=[_Whole()], coupled=True, whole=True)
    if base.dim() < 2 and not shared:
        raise ValueError(
            f"Site: {type(call.module).__name__} returned shape {tuple(base.shape)}; embeddings "
            "need a dim of samples and one of features"
        )
    offsets = geometry.bounds(*place, call)
    if offsets is not None and site.group == "token" and not shared:
        raise ValueError(
            f"{site!r}: packed rows (offsets, or a jagged output) have one ball per sample: use "
            "group='sample'"
        )
    return Perturbation(
        layout.to_samples(base),
        [place],
        group="token" if shared else site.group,
        offsets=offsets,
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


def build_perturbations(
    sites: Sequence[Site],
    calls: Sequence[Sequence[Call]],
    geometry: Geometry,
    *,
    joint: bool = False,
) -> list[Perturbation]:
    """Make the perturbations of an attack from the calls that its first forward pass recorded.

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
        return [JointPerturbation(values, places, masks, layouts)]
    perturbations: list[Perturbation] = []
    for index, (site, recorded) in enumerate(zip(sites, calls, strict=True)):
        if site.scope == "row":
            masks = [geometry.mask(index, number, call) for number, call in enumerate(recorded)]
            whole = site.rows == "table"
            perturbations.append(RowPerturbation(recorded, index, masks, whole=whole))
            continue
        perturbations.extend(
            perturbation_of_call(site, call, (index, number), geometry)
            for number, call in enumerate(recorded)
        )
    return perturbations
