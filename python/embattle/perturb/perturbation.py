"""Deltas at their sites: what an attack seeks, and what its result applies again."""

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

from embattle.perturb.blocks import Block
from embattle.perturb.calls import Call, is_lookup, is_plain
from embattle.perturb.guard import fresh_autocast_cache
from embattle.perturb.hook import Addition
from embattle.perturb.site import Site

# Where a pass takes the unperturbed embeddings from: from the modules, or from the opening pass
# (where inputs are the same), with or without the way to the modules' weights.
Lookups: TypeAlias = Literal["fresh", "attached", "detached"]


@dataclass
class Perturbation:
    """The blocks of a batch, the sites that they belong to, and the calls that were recorded there.

    Attributes:
        sites: where.
        calls: of each site, the calls of the pass that opened the attack.
        blocks: the deltas.
        own: the nodes by which the last pass's graph leads to perturbed tables.
    """

    sites: list[Site]
    calls: list[list[Call]] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    own: set[Node] = field(default_factory=set)
    # What the sites hold, if the passes to come can go on with it.
    _placed: tuple[Any, ...] | None = field(default=None, repr=False)

    @property
    def coupled(self) -> bool:
        """Whether samples share a delta."""
        return any(block.coupled for block in self.blocks)

    @property
    def compiled(self) -> bool:
        """Whether the calls were traced by `torch.compile`."""
        return any(call.compiled for recorded in self.calls for call in recorded)

    def place(
        self,
        *,
        lookups: Lookups = "fresh",
        detach: bool = False,
        compile: bool = False,
    ) -> None:
        """Hand the current deltas to the sites, for the passes to come.

        Args:
            lookups: where the embeddings come from, if the module is a look-up.
            detach: cut the embeddings off the modules' weights.
            compile: the passes are compiled.
        """
        placed = (lookups, detach, compile, *[block.delta for block in self.blocks])
        if self._placed is not None and all(map(is_, self._placed, placed)):
            return
        fixed = all(block.fixed(lookups == "detached") for block in self.blocks)
        self._placed = placed if fixed else None
        self.own.clear()
        deltas = [block.delta for block in self.blocks]
        for site, calls, additions, known in self._per_site(lookups, compile):
            own = None if site.table is None else self.own
            site.place(calls, additions, known=known, detach=detach, own=own, deltas=deltas)

    def rest(self) -> None:
        """Leave the model unperturbed."""
        self._placed = None
        for site in self.sites:
            site.rest()

    @contextmanager
    def applied(self, *, lookups: Lookups = "fresh", compile: bool = False) -> Iterator[None]:
        """Perturb the model inside the block; the deltas are constants there.

        Args:
            lookups: "attached" perturbs the outputs of the opening pass where the module is a
                look-up, so that its weights' gradient is computed once for both passes.
            compile: the passes are compiled.
        """
        for block in self.blocks:
            block.delta = block.delta.detach()
        with ExitStack() as stack:
            if any(site.scope == "weight" for site in self.sites):
                stack.enter_context(fresh_autocast_cache())
            for site, calls, additions, known in self._per_site(lookups, compile):
                stack.enter_context(site.placed(calls, additions, known))
            yield

    def _per_site(
        self, lookups: Lookups, compile: bool
    ) -> Iterator[tuple[Site, list[Call], list[Addition], str | None]]:
        additions: list[dict[int, Addition]] = [{} for _ in self.sites]
        for block in self.blocks:
            found = block.fused() if lookups == "detached" else None
            for (index, number), addition in zip(
                block.places, block.additions() if found is None else found, strict=True
            ):
                additions[index][number] = addition
        for site, each, calls in zip(self.sites, additions, self.calls, strict=True):
            fits = is_plain if lookups == "detached" else is_lookup
            known = lookups != "fresh" and all(fits(module) for module in site.modules)
            known = known and not compile and not any(call.compiled for call in calls)
            yield site, calls, [each[i] for i in range(len(each))], lookups if known else None

    def set(self, deltas: Sequence[Tensor]) -> None:
        """Take over the values of the deltas."""
        for block, delta in zip(self.blocks, deltas, strict=True):
            block.set(delta)

    def values(self) -> list[Tensor] | None:
        """Give the tensors at which the gradient at zero can be asked for, block by block.

        Returns:
            None if the model is compiled: its traced pass does not show them.
        """
        if self.compiled:
            return None
        return [self.calls[s][c].value for block in self.blocks for s, c in block.places]

    def sources(self) -> list[Tensor]:
        """Give the modules' own outputs at the places, attached to their weights."""
        found = [self.calls[s][c].source for block in self.blocks for s, c in block.places]
        return [source for source in found if source is not None]

    def gather(self, grads: Sequence[Tensor | None]) -> list[Tensor]:
        """Turn gradients at the places, block by block, into the blocks' gradients."""
        found, position = [], 0
        for block in self.blocks:
            part = grads[position : position + len(block.places)]
            position += len(block.places)
            likes = block.additions() if any(grad is None for grad in part) else part
            found.append(
                block.gather(
                    [
                        torch.zeros_like(like) if grad is None else grad  # type: ignore[arg-type]
                        for grad, like in zip(part, likes, strict=True)
                    ]
                )
            )
        return found

    def narrow(self, rows: Tensor, blocks: list[Block]) -> Perturbation:
        """Take some of the samples, which `blocks` belong to."""
        calls = [[call.select(rows) for call in recorded] for recorded in self.calls]
        return Perturbation(self.sites, calls, blocks)

    def forget(self) -> None:
        """Let go of graphs, when the attack is over."""
        self.own.clear()
        for recorded in self.calls:
            for call in recorded:
                call.forget()
        for block in self.blocks:
            block.delta = block.delta.detach()

    def __deepcopy__(self, memo: dict[int, Any]) -> Perturbation:
        # Sites and calls belong to the model, which is not copied.
        blocks = [copy(block) for block in self.blocks]
        for block in blocks:
            block.delta = block.delta.detach().clone()
        return Perturbation(self.sites, self.calls, blocks)
