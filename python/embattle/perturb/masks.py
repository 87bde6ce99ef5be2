"""Masks and offsets: each belongs to a call of a module, never to all calls of a site."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from embattle.perturb.calls import Call
from embattle.perturb.site import PerCallTensor, Site


class PerCall:
    """What one argument of a run says of one site's calls.

    Args:
        name: the argument's name, for errors.
        site: the site.
        given: a tensor (where there is one call), a function of the call, a sequence with an entry
            for each call, or None.
        dtype: what the tensors must be.
    """

    def __init__(self, name: str, site: Site, given: PerCallTensor, dtype: torch.dtype) -> None:
        self.name, self.site, self.given, self.dtype = name, site, given, dtype
        if not callable(given):
            for one in given if _listed(given) else [given]:  # type: ignore[union-attr]
                self._check(one)

    def __call__(self, call: Call, number: int) -> Tensor | None:
        """Return what belongs to the site's call of this number."""
        given = self.given
        if given is None or isinstance(given, Tensor):
            return given
        if callable(given):
            return self._check(given(call))
        return given[number] if number < len(given) else None

    def finish(self, count: int) -> None:
        """Check, now that the number of calls is known, that each has its own.

        Raises:
            ValueError: one tensor for several calls, or a sequence of another length.
        """
        given = self.given
        if isinstance(given, Tensor) and count > 1:
            raise ValueError(
                f"{self.name}: one tensor was given, but the modules of {self.site!r} are called "
                f"{count} times in a pass, maybe with other inputs. Give a sequence with one entry "
                f"(or None) for each call, or a function of the call: {self.name}=lambda call: ..."
            )
        if _listed(given) and len(given) != count:  # type: ignore[arg-type]
            raise ValueError(
                f"{self.name}: {len(given)} entries were given for the {count} calls of "  # type: ignore[arg-type]
                f"{self.site!r}"
            )

    def _check(self, value: Any) -> Tensor | None:
        if value is None:
            return None
        if not isinstance(value, Tensor):
            raise TypeError(f"{self.name} must be a tensor, got {type(value).__name__}")
        if value.dtype != self.dtype:
            hint = "; use mask.bool()" if self.dtype == torch.bool else ""
            raise TypeError(
                f"{self.name} must be of dtype {str(self.dtype)[6:]}, got {value.dtype}{hint}"
            )
        return value


class Geometry:
    """Which vectors of each call may move, and where the samples are in packed rows.

    Args:
        sites: the sites.
        masks: the run's `mask`: for one site what `PerCall` takes; for several sites a function for
            all, or a sequence with an entry for each.
        offsets: likewise.
    """

    def __init__(self, sites: Sequence[Site], masks: Any, offsets: Any) -> None:
        self.sites = list(sites)
        self.masks = _per_site("mask", sites, masks, torch.bool)
        self.offsets = _per_site("offsets", sites, offsets, torch.int64)

    @property
    def packed(self) -> bool:
        """Whether any offsets are given (ragged outputs bring their own besides)."""
        return any(one.given is not None for one in self.offsets)

    def mask(self, index: int, number: int, call: Call) -> Tensor | None:
        """Return the mask of a call, with the samples in dim 0: what was given, less padding."""
        given = self.masks[index](call, number) if self.masks else None
        rows = self.sites[index].scope == "row"
        if given is not None:
            by_index = rows and call.indices is not None
            shape = call.indices.shape if by_index else call.value.shape[:-1]  # type: ignore[union-attr]
            given = given.to(call.value.device)
            if given.shape != shape:
                where = "; with scope='row' it needs the indices' shape"
                raise ValueError(
                    f"mask has shape {tuple(given.shape)}; the embeddings "
                    f"{tuple(call.value.shape)} need {tuple(shape)}" + (where if rows else "")
                )
        if rows:
            return given  # padding is known by its index there
        padding = padding_mask(call)
        if padding is not None:
            given = padding if given is None else given & padding
        if given is None or given.dim() == 0:
            return None
        return call.layout.to_samples(given)

    def bounds(self, index: int, number: int, call: Call) -> Tensor | None:
        """Return the offsets of a call; a ragged output brings its own."""
        if call.offsets is not None or not self.offsets:
            return call.offsets
        return self.offsets[index](call, number)

    def finish(self, calls: Sequence[Sequence[Call]]) -> None:
        """Check the numbers of calls of a whole pass."""
        for given in (self.masks, self.offsets):
            for one, recorded in zip(given, calls, strict=False):  # nothing given: nothing to check
                one.finish(len(recorded))


def padding_mask(call: Call) -> Tensor | None:
    """Return bool, False where an `nn.Embedding` (or its table) has its padding row."""
    module = call.module
    if not isinstance(module, nn.Embedding) or module.padding_idx is None:
        return None
    padding = module.padding_idx
    if not call.args and not call.kwargs:  # a parameter
        rows = torch.arange(call.value.shape[0], device=call.value.device)
        return torch.ne(rows, padding)
    indices = call.indices
    if indices is None or indices.shape != call.value.shape[:-1]:
        return None
    return torch.ne(indices.to(call.value.device), padding)


def _listed(given: Any) -> bool:
    return isinstance(given, (list, tuple))


def _per_site(name: str, sites: Sequence[Site], given: Any, dtype: torch.dtype) -> list[PerCall]:
    """Return what is given of each site's calls; an empty list where nothing is given at all."""
    own: Callable[[Site], Any] = lambda site: site.mask if name == "mask" else site.offsets  # noqa: E731
    if given is None and all(own(site) is None for site in sites):
        return []
    if len(sites) == 1:
        each = [given]
    elif given is None or callable(given):
        each = [given] * len(sites)
    elif _listed(given):
        each = list(given)
        if len(each) != len(sites):
            raise ValueError(f"{name}: {len(each)} entries were given for {len(sites)} sites")
    else:
        raise ValueError(
            f"{name}: one tensor was given for {len(sites)} sites; give a sequence with an entry "
            f"(or None) for each, or a function of the call: {name}=lambda call: ..."
        )
    return [
        PerCall(name, site, own(site) if one is None else one, dtype)
        for site, one in zip(sites, each, strict=True)
    ]
