"""Gradients of losses with respect to deltas, and what their graph must not show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import Variable

if TYPE_CHECKING:
    from embattle.perturb.perturbation import Perturbation
    from embattle.perturb.perturbed_sites import PerturbedSites

# What `torch.autograd.grad` calls when it has checked its arguments, which takes a small model as
# long as half of its forward pass; None where this torch has no such function.
run_backward: Callable[..., Any] | None
run_backward = getattr(torch.autograd.graph, "_engine_run_backward", None)
# What that calls when it has kept the context for the threads of devices, and looked at the log.
_run_here: Callable[..., Any] | None
_run_here = getattr(getattr(Variable, "_execution_engine", None), "run_backward", None)

_PLAIN = frozenset({Tensor, torch.nn.Parameter})

# Factors on losses whose gradients pass through float16: most gradients, then the smallest ones,
# then those that overflow.
_SCALES = (2.0**10, 2.0**15, 1.0)


class NoGradient(RuntimeError):
    """The graph of the losses does not lead to a perturbation."""


def differentiate(
    values: Tensor, leaves: Sequence[Tensor], through_half: bool
) -> list[Tensor | None]:
    """Return d sum(values) / d leaf, None for a leaf that the values do not depend on.

    Args:
        values: `[B]`, with their graph.
        leaves: where.
        through_half: gradients pass through float16. They are then computed under a factor, in
            which confident samples' gradients do not vanish, and come in float32.

    Raises:
        RuntimeError: a reentrant gradient checkpoint lies between.
    """
    if not through_half:
        return _differentiate(values, leaves, keep=False)
    found: list[Tensor | None] = []
    for scale in _SCALES:
        keep = scale != _SCALES[-1]
        grads = _differentiate(values.float() * scale, leaves, keep=keep)
        scaled = [None if g is None else g.float() / scale for g in grads]
        found = scaled if not found else [_better(a, b) for a, b in zip(found, scaled, strict=True)]
        if all(g is None or _complete(g) for g in found):
            break
    return found


def _complete(grad: Tensor) -> bool:
    """Return whether no sample's gradient overflowed or vanished."""
    return bool(grad.isfinite().all() & (grad != 0).flatten(1).any(1).all())


def _better(one: Tensor | None, two: Tensor | None) -> Tensor | None:
    """Return `one`, with what vanished or overflowed there taken from `two`."""
    if one is None or two is None:
        return one
    lost = ~one.isfinite() | ((one == 0) & two.isfinite())
    return torch.where(lost, two, one)


def _differentiate(values: Tensor, leaves: Sequence[Tensor], *, keep: bool) -> list[Tensor | None]:
    ones = torch.ones_like(values)  # a sum's gradient is an expanded one: dearer in what follows
    try:
        if run_backward is not None and _PLAIN.issuperset(map(type, (values, *leaves))):
            run = run_backward
            if _run_here is not None and values.is_cpu and all(leaf.is_cpu for leaf in leaves):
                run = _run_here
            # Neither a graph of the gradient nor an error for what is unused; nothing in `.grad`.
            return list(
                run((values,), (ones,), keep, False, tuple(leaves), True, accumulate_grad=False)
            )
        return list(torch.autograd.grad(values, leaves, ones, keep, allow_unused=True))
    except RuntimeError as error:
        if "heckpoint" not in str(error):
            raise
        raise RuntimeError(
            "a part of the model runs in a reentrant gradient checkpoint, through which torch "
            "cannot differentiate with respect to a perturbation: use "
            "checkpoint(..., use_reentrant=False) (transformers: "
            "gradient_checkpointing_kwargs={'use_reentrant': False})"
        ) from error


def refuse_unused(grads: Sequence[Tensor | None], found: PerturbedSites) -> None:
    """Refuse sites that the losses do not depend on.

    Args:
        grads: of the deltas, or of all their places; None where there is no path.
        found: the perturbations.

    Raises:
        NoGradient: all of a site's calls are without a gradient.
    """
    if type(None) not in map(type, grads):
        return
    used: set[int] = set()
    position = 0
    by_place = len(grads) != len(found.perturbations)
    for number, perturbation in enumerate(found.perturbations):
        for index, _ in perturbation.places:
            grad = grads[position if by_place else number]
            position += 1
            if grad is not None:
                used.add(index)
    for index, site in enumerate(found.sites):
        if index not in used:
            raise NoGradient(
                f"{site!r}: the losses do not depend on what it perturbs. Is its output detached, "
                "unused, or used for a penalty only? A table that the model reads directly is "
                "perturbed by Site.weight(module)"
            )


def refuse_other_uses(values: Tensor, found: PerturbedSites) -> None:
    """Refuse tables whose perturbation would miss some of their uses.

    Raises:
        RuntimeError: the graph leads to a table of scope "row" or "weight" by another way than the
            perturbed look-ups.
    """
    tables = {id(site.table): site for site in found.sites if site.table is not None}
    if not tables:
        return
    seen = set(found.nodes)  # a perturbed look-up may lead to its table
    todo: list[Any] = [values.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        site = tables.get(id(getattr(node, "variable", None)))
        if site is not None:
            raise RuntimeError(
                f"{site!r}: the model also reads the table in another way, where it would stay "
                "unperturbed (another module that shares it, a tied softmax, a direct product). "
                "Give the model, Site(..., model=model), or perturb the table wherever it is "
                "used: Site.weight(module, model=model)"
            )
        todo.extend(after for after, _ in node.next_functions)
    for site, calls in zip(found.sites, found.calls, strict=True):
        if site.table is not None:
            site.known_shapes.update(call.value.shape for call in calls)


def refuse_other_layouts(
    values: Tensor, leaves: Sequence[Tensor], found: PerturbedSites, batch: int
) -> None:
    """Refuse outputs whose samples are in another dim of the same size (time first).

    Only where sizes coincide is there a doubt. Two samples' values are then differentiated by
    themselves, once for each shape: what they depend on shows the dim.

    Raises:
        ValueError: the samples are in another dim than the site says.
    """
    by_place = len(leaves) != len(found.perturbations)
    position = 0
    for number, perturbation in enumerate(found.perturbations):
        places = perturbation.places
        mine = leaves[position : position + len(places)] if by_place else [leaves[number]]
        position += len(places)
        if not _is_doubtful(perturbation, found, batch):
            continue
        probes = []
        for sample in (0, 1):
            grads = torch.autograd.grad(values[sample], mine, allow_unused=True, retain_graph=True)
            if mine[0] is not perturbation.delta:
                probes.append(grads)
            else:
                (grad,) = grads
                probes.append((None,) if grad is None else tuple(perturbation.spread(grad)))
        for (index, call), *pair in zip(places, *probes, strict=False):
            site, shape = found.sites[index], found.calls[index][call].value.shape
            for dim in range(1, len(shape)):
                if shape[dim] == batch and _belongs(pair, dim) and not _belongs(pair, 0):
                    raise ValueError(
                        f"{site!r}: the samples of an output {tuple(shape)} are in dim {dim}, not "
                        f"in dim 0 (each loss depends on one entry of dim {dim} alone): "
                        f"Site(..., samples={dim})"
                    )
            if any(grad is not None and bool((grad != 0).any()) for grad in pair):
                site.known_shapes.add(shape)


def needs_a_graph(found: PerturbedSites, batch: int) -> bool:
    """Return whether only a graph shows that the sites are right: uses of tables, dims of samples.

    False once a graph has shown it for outputs of these shapes.
    """
    for site, calls in zip(found.sites, found.calls, strict=True):
        if site.table is not None and not site.known_shapes.issuperset(
            call.value.shape for call in calls
        ):
            return True
    return any(_is_doubtful(perturbation, found, batch) for perturbation in found.perturbations)


def _is_doubtful(perturbation: Perturbation, found: PerturbedSites, batch: int) -> bool:
    """Return whether another dim of an output is as large as that of the samples, and unknown."""
    if perturbation.coupled or perturbation.geometry["offsets"] is not None or batch < 2:
        return False
    doubtful = [
        (found.sites[index], found.calls[index][call].value.shape)
        for (index, call), layout in zip(perturbation.places, perturbation.layouts, strict=True)
        if layout.plain and batch in found.calls[index][call].value.shape[1:]
    ]
    return not all(shape in site.known_shapes for site, shape in doubtful)


def _belongs(grads: Sequence[Tensor | None], dim: int) -> bool:
    """Return whether the gradients of samples 0 and 1 are zero outside their entries of a dim."""
    for sample, grad in enumerate(grads):
        if grad is not None:
            others = [i for i in range(grad.shape[dim]) if i != sample]
            if bool((grad.index_select(dim, torch.tensor(others, device=grad.device)) != 0).any()):
                return False
    return True
