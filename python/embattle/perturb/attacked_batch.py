"""One batch under attack: its sites, its deltas, and the forward passes of the loss function."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from copy import copy
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from embattle.perturb.build_perturbations import build_perturbations, perturbation_of_call
from embattle.perturb.calls import Call, is_lookup
from embattle.perturb.chosen import geometry_of_chosen
from embattle.perturb.evaluation import Evaluation, LossFn, call
from embattle.perturb.gradients import (
    NoGradient,
    differentiate,
    refuse_other_layouts,
    refuse_other_uses,
    refuse_unused,
)
from embattle.perturb.guard import (
    MODES,
    Mode,
    autograd_enabled,
    eval_mode,
    fresh_autocast_cache,
    frozen_weights,
)
from embattle.perturb.masks import Geometry
from embattle.perturb.model_state import KeptState, kept_state
from embattle.perturb.perturbation import Perturbation
from embattle.perturb.perturbed_sites import Lookups, PerturbedSites
from embattle.perturb.random_state import RandomState
from embattle.perturb.replay import DropoutMasks
from embattle.perturb.site import PerCallTensor, Site, as_sites

Masks: TypeAlias = "PerCallTensor | Sequence[PerCallTensor]"
# From the rows that are left (int64 [n]) to the loss function of these samples.
Subset: TypeAlias = Callable[[Tensor], LossFn]


_NOTHING: AbstractContextManager[None] = nullcontext()


class RecordedPass(NamedTuple):
    """The first pass of an attack.

    Attributes:
        evaluation: what the loss function returned.
        perturbed: whether the deltas of the start were added in it already.
    """

    evaluation: Evaluation
    perturbed: bool


class AttackedBatch:
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
        if not callable(loss_fn):
            raise TypeError(f"loss_fn must be a function, got {type(loss_fn).__name__}")
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}; got {mode!r}")
        self.loss_fn, self.subset, self.compile = loss_fn, subset, compile
        self.perturbed = PerturbedSites(as_sites(sites))
        self.geometry = Geometry(self.sites, mask, offsets)
        self.joint, self.mode, self.same_random = joint, mode, same_random or mode == "same"
        self.models: list[nn.Module] = []
        for site in self.sites:
            if site.model is not None and not any(site.model is model for model in self.models):
                self.models.append(site.model)
        for asked, name in ((mode == "eval", "mode='eval'"), (compile, "compile=True")):
            if asked and not self.models:
                raise ValueError(f"{name} needs to know the model: Site(module, model=model)")
        if compile and any(site.scope == "weight" for site in self.sites):
            raise ValueError("compile=True: compiled code does not see an exchanged parameter")
        self.size = 0
        self._checked = False  # whether the graph was checked
        self._through_half = False  # whether gradients pass through float16
        self._state: KeptState | None = None
        self._first: RandomState | None = None  # where evaluations start from
        self._replay: RandomState | None = None
        self._masks: DropoutMasks | None = None

    @property
    def sites(self) -> list[Site]:
        """Where the model is perturbed."""
        return self.perturbed.sites

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
        other.loss_fn, other.subset = self.subset(rows), None
        return other

    # --- around the passes -----------------------------------------------------------------------

    @contextmanager
    def attacking(
        self, seed: Callable[[], torch.Generator | None] = lambda: None
    ) -> Iterator[torch.Generator | None]:
        """Restore the model and the random state after the attack's own passes inside.

        Args:
            seed: makes the attack's generator. What it draws from the global state stays drawn, so
                that the next batch starts elsewhere, unless the attack raises.

        Raises:
            RuntimeError: another attack is using a site.
        """
        busy = [site for site in self.sites if site.busy]
        if busy:
            raise RuntimeError(f"{busy[0]!r} is already in use by an attack")
        before = RandomState.capture()
        generator = seed()
        first = self._first = before if generator is None else RandomState.capture()
        if self.same_random and self._replay is None:
            self._replay_from(first)
        after = before  # if it raises
        off = torch.is_inference_mode_enabled() or not torch.is_grad_enabled()
        try:
            with (
                autograd_enabled() if off else _NOTHING,
                fresh_autocast_cache(),
                kept_state(self.models) as state,
                frozen_weights(state.modules.values()),
                _requiring_grad(self.sites) if self._tables else _NOTHING,
                eval_mode(self.models, state.modules.values()) if self.mode == "eval" else _NOTHING,
            ):
                self._state = state
                yield generator
            after = first
        finally:
            self._state = None
            self.clear()
            after.restore()

    @property
    def _tables(self) -> bool:
        return any(site.table is not None for site in self.sites)

    def clear(self) -> None:
        """Leave the model unperturbed."""
        self.perturbed.clear()

    def save_random_state(self) -> None:
        """Start every later pass of mode "same" from the random state of now."""
        if self.same_random:
            self._replay_from(RandomState.capture())

    def _replay_from(self, state: RandomState) -> None:
        self._replay = state
        self._masks = None if self.compile else DropoutMasks()

    def clear_random_state(self) -> None:
        """Draw new random numbers in later passes."""
        self._replay = self._masks = None

    @contextmanager
    def with_seed(self, seed: int) -> Iterator[None]:
        """Seed the passes inside, whatever the mode.

        Only inside `attacking`, which restores the random state at its end.
        """
        kept, self._replay, self._masks = (self._replay, self._masks), None, None
        torch.manual_seed(seed)
        try:
            yield
        finally:
            self._replay, self._masks = kept

    def free_masks(self) -> None:
        """Free the kept dropout masks; later passes draw them again."""
        self._masks = None

    # --- passes ----------------------------------------------------------------------------------

    def run(self, loss_fn: LossFn | None = None, *, first: bool = False) -> Evaluation:
        """Run a forward pass; in mode "same" with the random numbers of the first one.

        Args:
            loss_fn: called instead of the batch's own, which is compiled if `compile` is set.
            first: start from the random state of the attack's first pass in any mode.
        """
        if loss_fn is None:
            # Compiled code belongs to the function's: a new closure for each batch finds it again.
            loss_fn = torch.compile(self.loss_fn) if self.compile else self.loss_fn
        if self._state is not None:
            self._state.restore()
        if self._replay is None:
            if first and self._first is not None:
                self._first.restore()
            evaluation = call(loss_fn)
        else:
            self._replay.restore()
            with ExitStack() as stack:
                if self._masks is not None and not self._masks.idle:
                    stack.enter_context(self._masks)
                evaluation = call(loss_fn)
        for site in self.perturbed.sites:
            if not site.end_pass():
                raise RuntimeError(
                    f"{site!r}: the loss function called its modules in another number than in "
                    "the pass before: it must run the same batch in the same way at every call"
                )
        return evaluation

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
            with _NOTHING if graph is torch.is_grad_enabled() else torch.set_grad_enabled(graph):
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
        self._through_half = any(call.through_half for recorded in calls for call in recorded)
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

    @property
    def drew_random_numbers(self) -> bool:
        """Whether the pass just made, from the attack's first random state, drew any."""
        return self._first is None or not self._first.same(RandomState.capture())

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

    # --- gradients -------------------------------------------------------------------------------

    def gradients(self, values: Tensor, *, mark: bool = True) -> list[Tensor]:
        """Differentiate with respect to the deltas, and nothing else.

        The sum of the values is taken: each sample's delta gets its own sample's gradient.

        Args:
            values: `[B]`, with their graph.
            mark: record which groups have a gradient other than zero.
        """
        leaves = [p.delta for p in self.perturbed.perturbations]
        if not self._checked or not values.requires_grad:
            self.check_graph(values, leaves)
        grads = self._completed(differentiate(values, leaves, self._through_half))
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
            self.perturbed.gather(self._used(differentiate(values, places, self._through_half)))
        )

    def rescale_at_deltas(self, grads: Sequence[Tensor | None], scale: float) -> list[Tensor]:
        """Multiply gradients at the deltas by `scale`; zeros where a delta has none."""
        return self._rescaled(self._completed(grads), scale)

    def _completed(self, grads: Sequence[Tensor | None]) -> list[Tensor]:
        found = [grad for grad in grads if grad is not None]
        if len(found) == len(grads):
            return found
        refuse_unused(grads, self.perturbed)
        return [
            torch.zeros_like(p.delta) if grad is None else grad
            for p, grad in zip(self.perturbations, grads, strict=True)
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

    def mark_gradients(self, grads: list[Tensor]) -> list[Tensor]:
        """Record which groups have a gradient other than zero; return the gradients."""
        for perturbation, grad in zip(self.perturbations, grads, strict=True):
            perturbation.mark_gradients(grad)
        return grads

    def _used(self, grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        refuse_unused(grads, self.perturbed)
        return grads

    @property
    def plain(self) -> bool:
        """Whether every site perturbs the output of a look-up, which no pass changes."""
        return all(
            site.scope == "output" and all(is_lookup(module) for module in site.modules)
            for site in self.sites
        )


@contextmanager
def _requiring_grad(sites: Sequence[Site]) -> Iterator[None]:
    """Let perturbed tables require gradients: the graph then shows every use of them."""
    tables: list[Any] = [site.table for site in sites if site.table is not None]
    turned = [table for table in tables if not table.requires_grad]
    try:
        for table in turned:
            table.requires_grad_(True)
        yield
    finally:
        for table in turned:
            table.requires_grad_(False)
