"""One batch under attack: its sites, its deltas, and the forward passes of the loss function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from functools import partial
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from embattle.perturb.build_perturbations import build_perturbations, perturbation_of_call
from embattle.perturb.calls import Call, is_lookup
from embattle.perturb.chosen import geometry_of_chosen
from embattle.perturb.evaluation import Evaluation, LossFn
from embattle.perturb.gradients import (
    NoGradient,
    differentiate,
    needs_a_graph,
    refuse_other_layouts,
    refuse_other_uses,
    refuse_unused,
)
from embattle.perturb.guard import Mode
from embattle.perturb.masks import Geometry
from embattle.perturb.passes import NOTHING, Passes
from embattle.perturb.perturbation import Perturbation
from embattle.perturb.perturbed_sites import Lookups, PerturbedSites
from embattle.perturb.site import PerCallTensor, Site, as_sites

Masks: TypeAlias = "PerCallTensor | Sequence[PerCallTensor]"
# From the rows that are left (int64 [n]) to the loss function of these samples.
Subset: TypeAlias = Callable[[Tensor], LossFn]


class RecordedPass(NamedTuple):
    """The first pass of an attack.

    Attributes:
        evaluation: what the loss function returned.
        perturbed: whether the deltas of the start were added in it already.
    """

    evaluation: Evaluation
    perturbed: bool


class AttackedBatch(Passes):
    """One batch with its loss function, its sites and the perturbations there.

    Args:
        loss_fn: runs the model on the batch; returns losses `[B]`, or an `Evaluation`.
        sites: one site or several.
        mask: bool, True where a vector takes part: a tensor (for one call), a function of the call,
            or a sequence with an entry for each call; for several sites a sequence of these.
        offsets: int64 `[B + 1]`, the samples' bounds in packed rows; given like `mask`.
        joint: one ball around all outputs of a sample together, instead of one for each output.
        mode: what the model does in the attack's own passes (see `embattle.PGD`).
        same_random: all passes of the attack have the same random numbers, as in mode "same":
            needed where their values are compared.
        compile: `torch.compile` the loss function; the first pass of an attack, which shows where
            the embeddings are, in two parts, before and after them.
        subset: the loss function of some of the samples.
    """

    def __init__(
        self,
        loss_fn: LossFn,
        sites: Site | Sequence[Site],
        *,
        mask: Masks = None,
        offsets: Masks = None,
        joint: bool = False,
        mode: Mode = "as_is",
        same_random: bool = False,
        compile: bool = False,
        subset: Subset | None = None,
    ) -> None:
        super().__init__(loss_fn, PerturbedSites(as_sites(sites)), mode, same_random, compile)
        self.geometry = Geometry(self.sites, mask, offsets)
        self.joint, self.subset, self.size = joint, subset, 0
        self._checked = False  # whether the graph was checked
        self.through_half = False  # whether gradients pass through float16
        self._leaves: bool | None = None  # whether later passes give the model leaves

    @property
    def packed(self) -> bool:
        """Whether samples are packed rows: offsets were given, or the batch is jagged."""
        ragged = any(p.geometry["offsets"] is not None for p in self.perturbations)
        return ragged or self.geometry.packed

    @property
    def perturbations(self) -> list[Perturbation]:
        """The perturbations, after `record`."""
        return self.perturbed.perturbations

    def select(self, rows: Tensor, perturbations: list[Perturbation]) -> AttackedBatch:
        """Return the batch of some of the samples, int64 `rows`, which `perturbations` belong to.

        Raises:
            ValueError: there is no `subset`.
        """
        if self.subset is None:
            raise ValueError(
                "samples can only leave the batch where the loss function of some of them is "
                "known: run(..., subset=lambda rows: loss_fn_of_those_rows)"
            )
        other = copy(self)
        other.perturbed = self.perturbed.select(rows, perturbations)
        other.loss_fn, other.size = self.subset(rows), len(rows)
        return other

    def part(self, rows: Tensor) -> AttackedBatch:
        """Return the batch of some of the samples, of which no pass was made yet.

        Args:
            rows: int64, ascending.

        Raises:
            ValueError: there is no `subset`.
        """
        if self.subset is None:
            raise ValueError(
                "only some of the samples are attacked, and their loss function is not known: "
                "give subset=lambda rows: loss_fn_of_those_rows"
            )
        other = copy(self)
        other.perturbed = PerturbedSites(self.sites)
        other.geometry = geometry_of_chosen(self.geometry, rows)
        other.loss_fn, other.subset, other._leaves = self.subset(rows), None, None
        return other

    # --- passes ----------------------------------------------------------------------------------

    def record(
        self, *, attach: bool = False, start: Callable[[Perturbation], None] | None = None
    ) -> RecordedPass:
        """Run the first pass, record the calls of the sites, and make the perturbations.

        Args:
            attach: keep the graph, with a leaf at each place, cut off the modules' weights
                (`PerturbedSites.sources` are attached to them).
            start: called with each perturbation, to set `delta`. Where each is one call, this
                happens inside the pass, which is then a perturbed one (and keeps its graph).
        """
        inside = start is not None and not self.joint
        inside = inside and all(site.scope != "row" for site in self.sites)
        started: list[list[Perturbation]] = [[] for _ in self.sites]
        calls: list[list[Call]] = []
        self.perturbed.calls = calls
        self.perturbed.nodes.clear()
        try:
            for index, site in enumerate(self.sites):
                begin = None
                if inside and start is not None:
                    begin = partial(self._begin, index, start, started[index])
                nodes = None if site.table is None else self.perturbed.nodes
                recorded = site.record(
                    attach=attach, begin=begin, graph_break=self.compile, nodes=nodes, found=calls
                )
                calls.append(recorded)
            graph = attach or inside
            with NOTHING if graph is torch.is_grad_enabled() else torch.set_grad_enabled(graph):
                evaluation = self.run()
        finally:
            self.clear()
        self.geometry.finish(calls)
        perturbed = inside and all(
            len(perturbations) == len(recorded)
            for perturbations, recorded in zip(started, calls, strict=True)
        )
        if perturbed and all(calls):
            self.perturbed.perturbations = [p for perturbations in started for p in perturbations]
        else:
            self.perturbed.perturbations = build_perturbations(
                self.sites, calls, self.geometry, joint=self.joint
            )
            perturbed = False
        self.size, self._checked = evaluation.batch, False
        self.through_half = any(call.through_half for recorded in calls for call in recorded)
        self._check_samples()
        if start is not None and not perturbed:
            for perturbation in self.perturbations:
                start(perturbation)
        return RecordedPass(evaluation, perturbed)

    def _begin(
        self,
        index: int,
        start: Callable[[Perturbation], None],
        perturbations: list[Perturbation],
        call: Call,
    ) -> Tensor:
        perturbation = perturbation_of_call(
            self.sites[index], call, (index, len(perturbations)), self.geometry
        )
        start(perturbation)
        perturbations.append(perturbation)
        return perturbation.additions()[0]

    def _check_samples(self) -> None:
        for perturbation in self.perturbations:
            if not perturbation.coupled and perturbation.samples != self.size:
                raise ValueError(
                    f"{self.size} losses for embeddings {tuple(perturbation.base.shape)}, which "
                    f"hold {perturbation.samples} samples in dim 0: say where the samples are, "
                    "Site(..., samples=1) where time comes first, samples=None for an output that "
                    "all samples share, per_sample=K for K entries of a sample, or a function of "
                    "the call; or give offsets for packed rows"
                )

    def evaluate(
        self,
        *,
        grad: bool,
        lookups: Lookups = "fresh",
        detach: bool = False,
        first: bool = False,
    ) -> Evaluation:
        """Run the loss function at the current deltas (see `PerturbedSites.perturb` and `run`).

        Args:
            grad: keep the graph, where gradients are enabled; otherwise there is none.
            lookups, detach, first: see there.
        """
        if grad:
            self.perturbed.perturb(lookups=lookups, detach=detach, compile=self.compile)
            return self.run(first=first)
        with torch.no_grad():
            self.perturbed.perturb(lookups=lookups, detach=detach, compile=self.compile)
            return self.run(first=first)

    def evaluate_for_gradients(self) -> Evaluation:
        """Run the loss function at the current deltas, with a graph for `gradients` alone."""
        leaves = self._leaves
        if leaves is None:
            leaves = all(site.scope == "output" for site in self.sites)
            leaves = self._leaves = leaves and not (self.compile or self.perturbed.compiled)
        self.perturbed.perturb(lookups="detached", detach=True, compile=self.compile, leaves=leaves)
        try:
            return self.run()
        except RuntimeError as error:
            if not leaves or "leaf Variable" not in str(error):
                raise
        self._leaves = False  # the model writes into its embeddings, which a leaf does not allow
        return self.evaluate_for_gradients()

    # --- gradients -------------------------------------------------------------------------------

    def gradients(self, values: Tensor, *, mark: bool = True) -> list[Tensor]:
        """Differentiate with respect to the deltas, and nothing else.

        The sum of the values is taken: each sample's delta gets its own sample's gradient.

        Args:
            values: `[B]`, with their graph.
            mark: record which groups have a gradient other than zero.
        """
        places = self.perturbed.moved()
        leaves = [p.delta for p in self.perturbed.perturbations] if places is None else places
        if not self._checked or not values.requires_grad:
            self.check_graph(values, leaves)
        found = differentiate(values, leaves, self.through_half)
        if places is None:
            grads = self._completed(found)
        else:
            gathered = zip(
                self.perturbed.gather(self._used(found)), self.perturbations, strict=True
            )
            grads = [grad.to(p.delta.dtype) for grad, p in gathered]  # as they are at the deltas
        return self.mark_gradients(grads) if mark else grads

    def gradients_at_zero(self, values: Tensor) -> list[Tensor] | None:
        """Differentiate with respect to the deltas in the graph of the first pass.

        Returns:
            None if the model is compiled: its traced pass does not show the places.
        """
        places = self.perturbed.values()
        if places is None:
            return None
        self.check_graph(values, places)
        return self.mark_gradients(
            self.perturbed.gather(self._used(differentiate(values, places, self.through_half)))
        )

    def rescale_at_deltas(self, grads: Sequence[Tensor | None], scale: float) -> list[Tensor]:
        """Multiply gradients at the deltas by `scale`; zeros where a delta has none."""
        return self._rescaled(self._completed(grads), scale)

    def _completed(self, grads: Sequence[Tensor | None]) -> list[Tensor]:
        return [
            torch.zeros_like(p.delta) if grad is None else grad
            for p, grad in zip(self.perturbations, self._used(grads), strict=True)
        ]

    def rescale_at_outputs(self, grads: Sequence[Tensor | None], scale: float) -> list[Tensor]:
        """Turn gradients at the places into those of the deltas, and multiply them by `scale`."""
        return self._rescaled(self.perturbed.gather(self._used(grads)), scale)

    def _rescaled(self, grads: list[Tensor], scale: float) -> list[Tensor]:
        return self.mark_gradients(grads if scale == 1 else list(torch._foreach_mul(grads, scale)))

    def check_graph(self, values: Tensor, leaves: Sequence[Tensor]) -> None:
        """Check that the graph leads to the deltas, all uses of a table, and the dim of samples.

        Args:
            values: `[B]`, with their graph.
            leaves: the deltas, or the outputs at all places.

        Raises:
            NoGradient: the values have no graph.
            RuntimeError: a table is read in another way, too.
            ValueError: the samples are in another dim.
        """
        if not values.requires_grad:
            raise NoGradient(
                "the losses do not depend on the perturbed embeddings: does loss_fn detach, or run "
                "under torch.no_grad()?"
            )
        if not self._checked:
            refuse_other_uses(values, self.perturbed)
            refuse_other_layouts(values, leaves, self.perturbed, self.size)
            self._checked = True

    def check_without_steps(self, ascent: Callable[[Evaluation], Tensor]) -> None:
        """Check the graph as `check_graph` does, for an attack whose steps have none.

        It takes a pass, once for outputs of these shapes. Without gradients a model shows nothing.

        Args:
            ascent: from an evaluation to what is ascended, `[B]`.
        """
        if not needs_a_graph(self.perturbed, self.size):
            return
        values = ascent(self.evaluate_for_gradients())
        places = self.perturbed.moved()
        if values.requires_grad:
            leaves = [p.delta for p in self.perturbations] if places is None else places
            self.check_graph(values, leaves)

    def mark_gradients(self, grads: list[Tensor]) -> list[Tensor]:
        """Record which groups have a gradient other than zero; return the gradients."""
        for perturbation, grad in zip(self.perturbations, grads, strict=True):
            perturbation.mark_gradients(grad)
        return grads

    def _used(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return gradients for a step, dense: a table that is looked up may have sparse ones."""
        refuse_unused(grads, self.perturbed)
        return [grad.to_dense() if grad is not None and grad.is_sparse else grad for grad in grads]

    @property
    def plain(self) -> bool:
        """Whether every site perturbs the output of a look-up, which no pass changes."""
        return all(
            site.scope == "output" and all(is_lookup(module) for module in site.modules)
            for site in self.sites
        )
