"""The perturbations of a batch at their sites: attacks optimise them, results apply them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass, field
from operator import is_
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import Node

from embattle.perturb.calls import Call, is_lookup, is_plain
from embattle.perturb.guard import fresh_autocast_cache
from embattle.perturb.hook import PassAddition
from embattle.perturb.perturbation import Perturbation, Place
from embattle.perturb.site import Site

# Where a pass takes the unperturbed embeddings from: from the modules, or from the first pass
# (where inputs are the same), attached to the modules' weights or detached.
Lookups: TypeAlias = Literal["fresh", "attached", "detached"]


@dataclass
class PerturbedSites:
    """The perturbations of a batch, their sites, and the calls that were recorded there.

    Attributes:
        sites: where.
        calls: of each site, the calls of the attack's first pass.
        perturbations: what is added to the calls' outputs.
        nodes: the autograd nodes by which the last pass's graph leads to perturbed tables.
        outputs: the perturbed outputs of the last pass, where they are what is differentiated.
    """

    sites: list[Site]
    calls: list[list[Call]] = field(default_factory=list)
    perturbations: list[Perturbation] = field(default_factory=list)
    nodes: set[Node] = field(default_factory=set)
    outputs: dict[Place, Tensor] | None = field(default=None, repr=False)
    # What the sites add now, if later passes can add the same tensors.
    _current: tuple[Any, ...] | None = field(default=None, repr=False)

    @property
    def coupled(self) -> bool:
        """Whether samples share a delta."""
        return any(p.coupled for p in self.perturbations)

    @property
    def compiled(self) -> bool:
        """Whether the calls were traced by `torch.compile`."""
        return any(call.compiled for recorded in self.calls for call in recorded)

    def perturb(
        self,
        *,
        lookups: Lookups = "fresh",
        detach: bool = False,
        compile: bool = False,
        leaves: bool = False,
    ) -> None:
        """Let the sites add the current deltas in the coming forward passes.

        Args:
            lookups: where the embeddings come from, if the module is a look-up.
            detach: cut the embeddings off the modules' weights.
            compile: the passes are compiled.
            leaves: collect the perturbed `outputs`, and differentiate there.
        """
        deltas = [p.delta for p in self.perturbations]
        current = (lookups, detach, compile, leaves, *deltas)
        if self._current is not None and all(map(is_, self._current, current)):
            if self.outputs is not None:
                self.outputs.clear()
            return
        self.outputs = {} if leaves else None
        fixed = all(p.reusable(lookups == "detached") for p in self.perturbations)
        self._current = current if fixed else None
        self.nodes.clear()
        for number, found in enumerate(self._per_site(lookups, compile, detached=leaves)):
            site, calls, additions, known = found
            nodes = None if site.table is None else self.nodes
            site.perturb(
                calls,
                additions,
                known=known,
                detach=detach,
                nodes=nodes,
                deltas=deltas,
                number=number,
                outputs=self.outputs,
            )

    def clear(self) -> None:
        """Leave the model unperturbed."""
        self._current = self.outputs = None
        for site in self.sites:
            site.clear()

    @contextmanager
    def applied(self, *, lookups: Lookups = "fresh", compile: bool = False) -> Iterator[None]:
        """Perturb the model inside the block; the deltas are constants there.

        Args:
            lookups: "attached" perturbs the outputs of the first pass where the module is a
                look-up, so that its weights' gradient is computed once for both passes.
            compile: the passes are compiled.
        """
        for perturbation in self.perturbations:
            perturbation.delta = perturbation.delta.detach()
        with ExitStack() as stack:
            if any(site.scope == "weight" for site in self.sites):
                stack.enter_context(fresh_autocast_cache())
            for site, calls, additions, known in self._per_site(lookups, compile):
                stack.enter_context(site.perturbed(calls, additions, known))
            yield

    def _per_site(
        self, lookups: Lookups, compile: bool, *, detached: bool = False
    ) -> Iterator[tuple[Site, list[Call], list[PassAddition], str | None]]:
        additions: list[dict[int, PassAddition]] = [{} for _ in self.sites]
        for perturbation in self.perturbations:
            found = perturbation.computed(lookups == "detached")
            for (index, number), addition in zip(
                perturbation.places,
                perturbation.additions() if found is None else found,
                strict=True,
            ):
                if detached and isinstance(addition, Tensor):
                    addition = addition.detach()
                additions[index][number] = addition
        for site, each, calls in zip(self.sites, additions, self.calls, strict=True):
            fits = is_plain if lookups == "detached" else is_lookup
            known = lookups != "fresh" and all(fits(module) for module in site.modules)
            known = known and not compile and not any(call.compiled for call in calls)
            yield site, calls, [each[i] for i in range(len(each))], lookups if known else None

    def additions(self) -> dict[Place, Tensor]:
        """Return what is added at each place, detached, in the layout of the module's output."""
        return {
            place: addition.detach()
            for perturbation in self.perturbations
            for place, addition in zip(perturbation.places, perturbation.additions(), strict=True)
        }

    def set(self, deltas: Sequence[Tensor]) -> None:
        """Set the values of the deltas, one tensor for each perturbation."""
        for perturbation, delta in zip(self.perturbations, deltas, strict=True):
            perturbation.set(delta)

    def values(self) -> list[Tensor] | None:
        """Return the tensors at which the gradient at zero can be computed, place by place.

        Returns:
            None if the model is compiled: its traced pass does not show them.
        """
        if self.compiled:
            return None
        return [self.calls[s][c].value for p in self.perturbations for s, c in p.places]

    def moved(self) -> list[Tensor] | None:
        """Return the perturbed outputs of the last pass, place by place; None: not collected.

        Where a module was not called, the delta, which nothing depends on then, stands for it.
        """
        found = self.outputs
        if found is None:
            return None
        return [found.get(place, p.delta) for p in self.perturbations for place in p.places]

    def sources(self) -> list[Tensor]:
        """Return the modules' own outputs at the places, attached to their weights."""
        found = [self.calls[s][c].source for p in self.perturbations for s, c in p.places]
        return [source for source in found if source is not None]

    def gather(self, grads: Sequence[Tensor | None]) -> list[Tensor]:
        """Turn gradients at all places, in order, into the gradients of the deltas."""
        if len(grads) == 1 and grads[0] is not None:
            return [self.perturbations[0].gather([grads[0]])]
        found, position = [], 0
        for perturbation in self.perturbations:
            part = list(grads[position : position + len(perturbation.places)])
            position += len(perturbation.places)
            for number, grad in enumerate(part):
                if grad is None:
                    part[number] = torch.zeros_like(perturbation.additions()[number])
            found.append(perturbation.gather(part))  # type: ignore[arg-type]
        return found

    def select(self, rows: Tensor, perturbations: list[Perturbation]) -> PerturbedSites:
        """Return the sites with the `perturbations` of some of the samples, int64 `rows`."""
        calls = [[call.select(rows) for call in recorded] for recorded in self.calls]
        return PerturbedSites(self.sites, calls, perturbations)

    def release(self) -> None:
        """Free the graphs, when the attack is over."""
        self.nodes.clear()
        for recorded in self.calls:
            for call in recorded:
                call.release()
        for perturbation in self.perturbations:
            perturbation.delta = perturbation.delta.detach()

    def __deepcopy__(self, memo: dict[int, Any]) -> PerturbedSites:
        # Sites and calls belong to the model, which is not copied.
        perturbations = [copy(p) for p in self.perturbations]
        for perturbation in perturbations:
            perturbation.delta = perturbation.delta.detach().clone()
        return PerturbedSites(self.sites, self.calls, perturbations)
