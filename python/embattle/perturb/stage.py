"""One batch under attack: its sites, its deltas, and the forward passes of the loss function."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from functools import partial
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor, nn

from embattle.perturb.blocks import Block, build, call_block
from embattle.perturb.calls import Call, is_lookup
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
    KeptState,
    Mode,
    RandomState,
    eval_mode,
    fresh_autocast_cache,
    frozen_weights,
    kept_state,
    usable_tensors,
)
from embattle.perturb.masks import Geometry
from embattle.perturb.perturbation import Lookups, Perturbation
from embattle.perturb.replay import DropoutMasks
from embattle.perturb.site import PerCallTensor, Site, as_sites

Masks: TypeAlias = "PerCallTensor | Sequence[PerCallTensor]"
# From the rows that are left (int64 [n]) to the loss function of these samples.
Subset: TypeAlias = Callable[[Tensor], LossFn]


class Opening(NamedTuple):
    """The first pass of an attack: what it gave, and whether it was perturbed already."""

    evaluation: Evaluation
    perturbed: bool


class Stage:
    """The sites of one batch, with the deltas that are being sought there.

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
        compile: `torch.compile` the loss function; the pass that opens an attack, which shows where
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
        self.found = Perturbation(as_sites(sites))
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
        self.batch = 0
        self._checked = False  # whether the graph was looked at
        self._through_half = False  # whether gradients pass through float16
        self._state: KeptState | None = None
        self._first: RandomState | None = None  # where evaluations start from
        self._replay: RandomState | None = None
        self._masks: DropoutMasks | None = None

    @property
    def sites(self) -> list[Site]:
        """Where the model is perturbed."""
        return self.found.sites

    @property
    def blocks(self) -> list[Block]:
        """The deltas, once the stage is open."""
        return self.found.blocks

    def narrow(self, rows: Tensor, blocks: list[Block]) -> Stage:
        """Make a stage of some of the samples, which `blocks` belong to."""
        if self.subset is None:
            raise ValueError(
                "samples can only leave the batch where the loss function of some of them is "
                "known: run(..., subset=lambda rows: loss_fn_of_those_rows)"
            )
        other = copy(self)
        other.found = self.found.narrow(rows, blocks)
        other.loss_fn, other.batch = self.subset(rows), len(rows)
        return other

    # --- around the passes -----------------------------------------------------------------------

    @contextmanager
    def attacking(
        self, seed: Callable[[], torch.Generator | None] = lambda: None
    ) -> Iterator[torch.Generator | None]:
        """Around the attack's own passes: afterwards the model and the random state are as before.

        Args:
            seed: makes the attack's generator. What it draws from the global state stays drawn, so
                that the next batch starts elsewhere, unless the attack raises.
        """
        busy = [site for site in self.sites if site.busy]
        if busy:
            raise RuntimeError(f"{busy[0]!r} is already in use by an attack")
        before = RandomState.capture()
        generator = seed()
        self._first = before if generator is None else RandomState.capture()
        if self.same_random and self._replay is None:
            self._remember(self._first)
        first = self._first
        with ExitStack() as stack:
            stack.push(lambda kind, *_: (before if kind is not None else first).restore())
            stack.callback(self._over)
            if torch.is_inference_mode_enabled() or not torch.is_grad_enabled():
                stack.enter_context(usable_tensors())
            stack.enter_context(fresh_autocast_cache())
            self._state = stack.enter_context(kept_state(self.models))
            modules = self._state.modules.values()
            stack.enter_context(frozen_weights(modules))
            if any(site.table is not None for site in self.sites):
                stack.enter_context(_followed(self.sites))
            if self.mode == "eval":
                stack.enter_context(eval_mode(self.models, modules))
            yield generator

    def _over(self) -> None:
        self._state = None
        self.rest()

    def rest(self) -> None:
        """Leave the model unperturbed."""
        self.found.rest()

    def remember_random_state(self) -> None:
        """Replay from here in the passes of mode "same", the next one included."""
        if self.same_random:
            self._remember(RandomState.capture())

    def _remember(self, state: RandomState) -> None:
        self._replay = state
        self._masks = None if self.compile else DropoutMasks()

    def forget_random_state(self) -> None:
        """Draw anew in the passes to come."""
        self._replay = self._masks = None

    @contextmanager
    def drawing(self, seed: int) -> Iterator[None]:
        """Draw other random numbers in the passes inside, whatever the mode.

        Only while attacking: the random state is put back at the end of that.
        """
        kept, self._replay, self._masks = (self._replay, self._masks), None, None
        torch.manual_seed(seed)
        try:
            yield
        finally:
            self._replay, self._masks = kept

    def forget_masks(self) -> None:
        """Free the dropout masks: later passes draw them anew."""
        self._masks = None

    # --- passes ----------------------------------------------------------------------------------

    def run(self, loss_fn: LossFn | None = None, *, first: bool = False) -> Evaluation:
        """Make a pass; in mode "same" with the random numbers of the first one.

        Args:
            loss_fn: the loss function as it is to be called; compiled, if so asked, by default.
            first: start from the random state of the attack's first pass in any mode.
        """
        if loss_fn is None:
            # Compiled code belongs to the function's: a new closure for each batch finds it again.
            loss_fn = torch.compile(self.loss_fn) if self.compile else self.loss_fn
        if self._state is not None:
            self._state.rewind()
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
        for site in self.found.sites:
            if not site.end_pass():
                raise RuntimeError(
                    f"{site!r}: the loss function called its modules in another number than in "
                    "the pass before: it must run the same batch in the same way at every call"
                )
        return evaluation

    def open(
        self, *, attach: bool = False, start: Callable[[Block], None] | None = None
    ) -> Opening:
        """Run the first pass, which shows the shapes, and make the blocks.

        Args:
            attach: keep the graph, with a leaf at each place instead of the way to the module's
                weights, which `sources` give.
            start: called with each block, to set its delta. Where every block is one call, this
                happens inside the pass, which is then a perturbed one (and keeps its graph).
        """
        inside = start is not None and not self.joint
        inside = inside and all(site.scope != "row" for site in self.sites)
        started: list[list[Block]] = [[] for _ in self.sites]
        calls: list[list[Call]] = []
        self.found.calls = calls
        self.found.own.clear()
        try:
            for index, site in enumerate(self.sites):
                begin = None
                if inside and start is not None:
                    begin = partial(self._begin, index, start, started[index])
                own = None if site.table is None else self.found.own
                watch = site.watch(
                    attach=attach, begin=begin, aside=self.compile, own=own, found=calls
                )
                calls.append(watch)
            with torch.set_grad_enabled(attach or inside):
                evaluation = self.run()
        finally:
            self.rest()
        self.geometry.finish(calls)
        perturbed = inside and all(
            len(blocks) == len(recorded) for blocks, recorded in zip(started, calls, strict=True)
        )
        if perturbed and all(calls):
            self.found.blocks = [block for blocks in started for block in blocks]
        else:
            self.found.blocks = build(self.sites, calls, self.geometry, joint=self.joint)
            perturbed = False
        self.batch, self._checked = evaluation.batch, False
        self._through_half = any(call.through_half for recorded in calls for call in recorded)
        self._check_samples()
        if start is not None and not perturbed:
            for block in self.blocks:
                start(block)
        return Opening(evaluation, perturbed)

    def _begin(
        self, index: int, start: Callable[[Block], None], blocks: list[Block], call: Call
    ) -> Tensor:
        block = call_block(self.sites[index], call, (index, len(blocks)), self.geometry)
        start(block)
        blocks.append(block)
        return block.additions()[0]

    def _check_samples(self) -> None:
        for block in self.blocks:
            if not block.coupled and block.samples != self.batch:
                raise ValueError(
                    f"{self.batch} losses for embeddings {tuple(block.base.shape)}, which hold "
                    f"{block.samples} samples in dim 0: say where the samples are, "
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
        """Run the loss function at the current deltas (see `Perturbation.place` and `run`).

        Args:
            grad: keep the graph, where gradients are enabled; otherwise there is none.
            lookups, detach, first: as there.
        """
        if grad:
            self.found.place(lookups=lookups, detach=detach, compile=self.compile)
            return self.run(first=first)
        with torch.no_grad():
            self.found.place(lookups=lookups, detach=detach, compile=self.compile)
            return self.run(first=first)

    # --- gradients -------------------------------------------------------------------------------

    def gradients(self, values: Tensor, *, note: bool = True) -> list[Tensor]:
        """Differentiate with respect to the deltas, and nothing else.

        The sum of the values is taken: each sample's delta gets its own sample's gradient.

        Args:
            values: `[B]`, with their graph.
            note: note which groups have a gradient.
        """
        leaves = [block.delta for block in self.found.blocks]
        self.check_graph(values, leaves)
        grads = self._completed(differentiate(values, leaves, self._through_half))
        return self.noted(grads) if note else grads

    def gradients_at_zero(self, values: Tensor) -> list[Tensor] | None:
        """Differentiate with respect to the deltas in the graph of the opening pass.

        Returns:
            None if the model is compiled: its traced pass does not show the places.
        """
        places = self.found.values()
        if places is None:
            return None
        self.check_graph(values, places)
        return self.noted(
            self.found.gather(self._used(differentiate(values, places, self._through_half)))
        )

    def of_blocks(self, grads: Sequence[Tensor | None], scale: float) -> list[Tensor]:
        """Complete gradients at the deltas, of a `scale`-th of the losses."""
        full = self._completed(grads)
        return self.noted(full if scale == 1 else list(torch._foreach_mul(full, scale)))

    def _completed(self, grads: Sequence[Tensor | None]) -> list[Tensor]:
        found = [grad for grad in grads if grad is not None]
        if len(found) == len(grads):
            return found
        refuse_unused(grads, self.found)
        return [
            torch.zeros_like(block.delta) if grad is None else grad
            for block, grad in zip(self.blocks, grads, strict=True)
        ]

    def gathered(self, grads: Sequence[Tensor | None], scale: float) -> list[Tensor]:
        """Turn gradients at the places, of a `scale`-th of the losses, into the blocks'."""
        found = self.found.gather(self._used(grads))
        return self.noted(list(torch._foreach_mul(found, scale)))

    def check_graph(self, values: Tensor, leaves: Sequence[Tensor]) -> None:
        """Refuse what the graph shows to be wrong: other uses of a table, time before samples."""
        if not values.requires_grad:
            raise NoGradient(
                "the losses do not depend on the perturbed embeddings: does loss_fn detach, or run "
                "under torch.no_grad()?"
            )
        if not self._checked:
            refuse_other_uses(values, self.found)
            refuse_other_layouts(values, leaves, self.found, self.batch)
            self._checked = True

    def noted(self, grads: list[Tensor]) -> list[Tensor]:
        """Note which groups have a gradient."""
        for block, grad in zip(self.blocks, grads, strict=True):
            block.note(grad)
        return grads

    def _used(self, grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        refuse_unused(grads, self.found)
        return grads

    # --- what objectives ask ---------------------------------------------------------------------

    def agreement(self) -> Callable[[], Tensor] | None:
        """Give what computes the nearest-embedding agreement, where the sites have tables."""
        fits = all(
            isinstance(site.module, nn.Embedding) and site.scope == "output" for site in self.sites
        )
        plain = all(layout.plain for block in self.blocks for layout in block.layouts)
        if not fits or not plain or self.joint or self.geometry.packed:
            return None
        tables = [cast(Tensor, site.module.weight) for site in self.sites]
        return partial(_agreement, self.blocks, tables)

    @property
    def plain(self) -> bool:
        """Whether every site perturbs the output of a look-up, which no pass changes."""
        return all(
            site.scope == "output" and all(is_lookup(module) for module in site.modules)
            for site in self.sites
        )


@contextmanager
def _followed(sites: Sequence[Site]) -> Iterator[None]:
    """Let tables that are perturbed require gradients: then every use of them shows."""
    tables: list[Any] = [site.table for site in sites if site.table is not None]
    turned = [table for table in tables if not table.requires_grad]
    try:
        for table in turned:
            table.requires_grad_(True)
        yield
    finally:
        for table in turned:
            table.requires_grad_(False)


def _agreement(blocks: Sequence[Block], tables: Sequence[Tensor]) -> Tensor:
    """Share of each sample's perturbed vectors whose nearest table row is the original, `[B]`."""
    kept: Tensor | None = None
    count: Tensor | None = None
    for block in blocks:
        table = tables[block.places[0][0]].detach()
        base = block.base.reshape(block.samples, -1, block.base.shape[-1])
        moved = base + block.delta.detach().reshape(base.shape).to(base.dtype)
        sizes = table.float().square().sum(1)
        mask = block.geometry["mask"]
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
