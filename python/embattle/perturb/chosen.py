"""Some samples of a batch: their masks and bounds, and their perturbations in the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from embattle.perturb.calls import Call, Layout
from embattle.perturb.evaluation import Evaluation
from embattle.perturb.fresh import is_fresh
from embattle.perturb.hook import Addition
from embattle.perturb.masks import Geometry, PerCall
from embattle.perturb.row_perturbation import named_inputs

if TYPE_CHECKING:
    from embattle.perturb.attacked_batch import AttackedBatch

# From what holds for the whole batch, a call of the chosen samples and its number, to theirs.
_Pick = Callable[[Tensor, Call, int], Tensor]


class _OfChosen(PerCall):
    """What is given for a whole batch, picked for calls of the chosen samples alone.

    A function of the call is asked about the call of the chosen samples, as it is.
    """

    def __init__(self, whole: PerCall, pick: _Pick) -> None:
        self.whole, self.pick = whole, pick
        self.name, self.site, self.given = whole.name, whole.site, whole.given

    def __call__(self, call: Call, number: int) -> Tensor | None:
        value = self.whole(call, number)
        return value if value is None or callable(self.given) else self.pick(value, call, number)


def geometry_of_chosen(whole: Geometry, rows: Tensor) -> Geometry:
    """Return masks and offsets for passes of some of the samples, int64 `rows`, ascending.

    Masks may be longer than the outputs of these passes, where padding on the right was cut off.
    """
    found = Geometry(whole.sites, None, None)

    def mask_of(index: int) -> _Pick:
        def pick(value: Tensor, call: Call, number: int) -> Tensor:
            value = value.to(call.value.device)
            bounds = whole.offsets[index] if whole.offsets else None
            given = None if bounds is None else bounds.given
            if call.offsets is not None or callable(given):
                raise ValueError(
                    "mask: one tensor for packed rows whose offsets are found in the pass: the "
                    "place of the chosen samples is not known; give a function of the call"
                )
            if bounds is not None and given is not None:
                offsets = bounds(call, number)
                if offsets is not None:
                    places = packed(offsets, rows).to(value.device)
                    return value.reshape(-1)[places].view(call.value.shape[:-1])
            shape = call.value.shape[:-1]
            if whole.sites[index].scope == "row" and call.indices is not None:
                shape = call.indices.shape
            like = call.layout.to_samples(torch.empty(shape, device="meta"))
            return call.layout.to_module(_cut(call.layout.to_samples(value)[rows], like.shape))

        return pick

    def offsets_of(value: Tensor, call: Call, number: int) -> Tensor:
        lengths = value.diff()[rows.to(value.device)]
        return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])

    found.masks = [_OfChosen(one, mask_of(index)) for index, one in enumerate(whole.masks)]
    found.offsets = [_OfChosen(one, offsets_of) for one in whole.offsets]
    return found


def run_with_chosen(batch: AttackedBatch, part: AttackedBatch, rows: Tensor) -> Evaluation:
    """Run a training pass of a batch in which some samples have the deltas of their own attack.

    Args:
        batch: all samples.
        part: the batch of the chosen samples, attacked.
        rows: int64, ascending, which they are.

    Raises:
        RuntimeError: the embeddings are not seen in the pass: the model is compiled.
        ValueError: the deltas belong to all samples, or to other inputs.
    """
    calls = part.perturbed.calls
    if any(site.scope == "weight" for site in batch.sites) or any(
        call.layout.samples is None for recorded in calls for call in recorded
    ):
        raise ValueError(
            "a part of the batch cannot be perturbed where all samples share what is perturbed "
            "(Site.weight, samples=None): use mixed, which attacks whole batches"
        )
    additions = part.perturbed.additions()

    def begin(index: int, number: int, call: Call) -> Addition:
        place = (index, number)
        weights = named_inputs(call.args, call.kwargs).get("per_sample_weights")
        if batch.sites[index].scope == "row" and weights is not None and weights.requires_grad:
            raise ValueError(
                "a part of the batch cannot be perturbed at rows that are weighed by learnt "
                "per_sample_weights, whose gradient would lack the deltas' part: use form='mixed'"
            )
        if place not in additions:
            return torch.zeros_like(call.value)
        addition, part = additions[place], calls[index][number]
        offsets = batch.geometry.bounds(*place, call)
        if offsets is None and _fits(addition, call, rows):
            _refuse_other_inputs(part, call, rows, None)
            return partial(_add_in_place, rows, addition)
        return into_whole(addition, part, call, rows, offsets)

    evaluation, found = run_moved(batch, begin)
    seen, expected = ([len(recorded) for recorded in one] for one in (found, calls))
    if seen != expected:
        raise RuntimeError(
            f"the sites' modules were called {seen} times in the training pass, and {expected} "
            "times for the chosen samples: give the model uncompiled, and let subset(rows) run it "
            "in the same way"
        )
    return evaluation


def _fits(addition: Tensor, call: Call, rows: Tensor) -> bool:
    """Return whether an addition can be made in place, at the rows of its samples alone."""
    value = call.source
    return (
        value is not None
        and call.layout.plain
        and addition.dtype == value.dtype
        and addition.shape == (len(rows), *value.shape[1:])
        and is_fresh(call.module, value)
    )


def _add_in_place(rows: Tensor, addition: Tensor, value: Tensor) -> Tensor:
    value.detach().index_add_(0, rows.to(value.device), addition)
    return value


def run_moved(
    batch: AttackedBatch, begin: Callable[[int, int, Call], Addition]
) -> tuple[Evaluation, list[list[Call]]]:
    """Run a training pass in which each output is moved at once.

    Args:
        batch: the batch.
        begin: from the number of a site, that of its call, and the call to what is added there.

    Returns:
        The evaluation, and each site's calls that `begin` was asked about: none where a compiled
        model does not show them.
    """
    calls: list[list[Call]] = [[] for _ in batch.sites]

    def ask(index: int, call: Call) -> Addition:
        calls[index].append(call)
        return begin(index, len(calls[index]) - 1, call)

    try:
        for index, site in enumerate(batch.sites):
            site.record(attach=False, begin=partial(ask, index))
        evaluation = batch.run()
    finally:
        batch.clear()
    return evaluation, calls


def packed(offsets: Tensor, rows: Tensor) -> Tensor:
    """Return the places of some samples' rows among the packed rows of a batch, int64."""
    rows = rows.to(offsets.device)
    starts, lengths = offsets[:-1][rows], offsets.diff()[rows]
    shift = starts - (lengths.cumsum(0) - lengths)
    return torch.arange(int(lengths.sum()), device=offsets.device) + shift.repeat_interleave(
        lengths
    )


def into_whole(
    addition: Tensor, part: Call, whole: Call, rows: Tensor, offsets: Tensor | None
) -> Tensor:
    """Return what is added to a whole batch's output: zeros where samples were not chosen.

    Args:
        addition: what is added to the output of the chosen samples alone.
        part, whole: the calls, of the chosen samples and of the batch.
        rows: int64, ascending, which samples these are.
        offsets: bounds of the samples in the whole output, if rows are packed.

    Raises:
        ValueError: the chosen samples' own pass looked something else up, or was longer.
    """
    value, layout = whole.value, whole.layout
    _refuse_other_inputs(part, whole, rows, offsets)
    if offsets is not None:
        found = addition.new_zeros(value.shape)
        places = packed(offsets, rows).to(value.device)
        if addition.shape[:-1].numel() != len(places):
            raise ValueError(_differs(part, whole))
        found.view(-1, value.shape[-1])[places] = addition.reshape(-1, value.shape[-1])
        return found
    theirs = part.layout.to_samples(addition)
    shape = (value if layout.plain else layout.to_samples(value)).shape
    found = theirs.new_zeros(shape)
    fits = len(theirs) == len(rows) and theirs.dim() == found.dim()
    if not fits or any(one > two for one, two in zip(theirs.shape, shape, strict=True)):
        raise ValueError(_differs(part, whole))
    _cut(found, theirs.shape).index_copy_(0, rows.to(theirs.device), theirs)
    return layout.to_module(found)


def _refuse_other_inputs(part: Call, whole: Call, rows: Tensor, offsets: Tensor | None) -> None:
    """Compare what two calls look up, where that waits for nothing."""
    mine, theirs = whole.indices, part.indices
    if mine is None or theirs is None or not (mine.is_cpu and theirs.is_cpu):
        return
    if isinstance(whole.module, nn.EmbeddingBag):
        return  # as many indices as bags need not be one for each
    if mine.shape != whole.value.shape[:-1] or theirs.shape != part.value.shape[:-1]:
        return
    if offsets is not None:
        mine, theirs = mine.reshape(-1)[packed(offsets, rows)], theirs.reshape(-1)
    else:
        layout: Layout = whole.layout
        theirs = part.layout.to_samples(theirs)
        mine = _cut(layout.to_samples(mine)[rows], theirs.shape)
    if not torch.equal(mine, theirs):
        raise ValueError(_differs(part, whole))


def _differs(part: Call, whole: Call) -> str:
    return (
        f"subset: {type(whole.module).__name__} gave {tuple(part.value.shape)} for the chosen "
        f"samples and {tuple(whole.value.shape)} for the batch, or looked other indices up: "
        "subset(rows) must give the loss function of just these samples, in this order; padding "
        "may be cut off on the right alone"
    )


def _cut(value: Tensor, shape: torch.Size) -> Tensor:
    """Cut the end of dims off that are longer than `shape` has them; the first is left alone."""
    for dim, size in enumerate(shape[1 : value.dim()], 1):
        if size < value.shape[dim]:
            value = value.narrow(dim, 0, size)
    return value
