"""One batch under attack: its sites, its blocks, and the forward passes of the loss function."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor, nn

from embattle.perturb.blocks import Block, build, output_block
from embattle.perturb.guard import (
    MODES,
    Mode,
    RandomState,
    eval_mode,
    frozen_statistics,
    frozen_weights,
)
from embattle.perturb.site import Addition, Call, Site, is_plain
from embattle.perturb.replay import DropoutMasks

LossFn: TypeAlias = Callable[[], "Tensor | tuple[Tensor, Tensor]"]
Masks: TypeAlias = "Tensor | Sequence[Tensor | None] | None"
# Where a pass takes the unperturbed embeddings from: from the modules, or from the opening pass
# (where inputs are the same), with or without the way to the modules' weights.
Lookups: TypeAlias = Literal["fresh", "attached", "detached"]


class Evaluation(NamedTuple):
    """What the loss function returned: losses `[B]`, and the model's outputs if it gave them."""

    losses: Tensor
    outputs: Tensor | None

    def detach(self) -> Evaluation:
        """Cut both off the graph."""
        outputs = None if self.outputs is None else self.outputs.detach()
        return Evaluation(self.losses.detach(), outputs)


class Opening(NamedTuple):
    """The first pass of an attack: what it gave, and whether it was perturbed already."""

    evaluation: Evaluation
    perturbed: bool


def call(loss_fn: LossFn) -> Evaluation:
    """Run the loss function and check what it returns.

    Raises:
        TypeError: not a tensor, nor a pair of losses and outputs.
        ValueError: not one loss per sample.
    """
    got = loss_fn()
    losses, outputs = got if isinstance(got, tuple) and len(got) == 2 else (got, None)
    if not isinstance(losses, Tensor) or not (outputs is None or isinstance(outputs, Tensor)):
        raise TypeError(
            "loss_fn must return losses [B], or a pair (losses [B], outputs); got "
            f"{type(got).__name__}"
        )
    if losses.dim() != 1:
        raise ValueError(
            f"loss_fn must return one loss per sample, a tensor [B]; got shape "
            f"{tuple(losses.shape)}. Use reduction='none' and average over all other dims"
        )
    return Evaluation(losses, outputs)


def as_sites(sites: Site | Sequence[Site]) -> list[Site]:
    """Make a list of one site or several.

    Raises:
        TypeError: anything else, or none at all.
    """
    found = list(sites) if isinstance(sites, (list, tuple)) else [sites]
    wrong = [one for one in found if not isinstance(one, Site)]
    if wrong or not found:
        what = type(wrong[0]).__name__ if wrong else "none"
        raise TypeError(f"sites must be an embattle.Site or a sequence of them, got {what}")
    return found  # type: ignore[return-value]


class Stage:
    """The sites of one batch, with the deltas that are being sought there.

    Args:
        loss_fn: runs the model on the batch; returns losses `[B]`, or `(losses, outputs)`.
        sites: one site or several.
        mask: bool, True where a vector takes part; one for all sites, or one (or None) for each.
        offsets: int64 `[groups + 1]`, for packed rows: the groups' bounds in the flattened rows.
        joint: one ball around all outputs of a sample together, instead of one for each output.
        mode: what the model does in the attack's own passes (see `embattle.PGD`).
        compile: `torch.compile` the loss function; the pass that opens an attack, which shows where
            the embeddings are, in two parts, before and after them.
    """

    def __init__(
        self,
        loss_fn: LossFn,
        sites: Site | Sequence[Site],
        *,
        mask: Masks = None,
        offsets: Tensor | None = None,
        joint: bool = False,
        mode: Mode = "as_is",
        compile: bool = False,
    ) -> None:
        self.loss_fn = loss_fn
        self.compile = compile
        self.sites = as_sites(sites)
        if mask is None or isinstance(mask, Tensor):
            self.masks: list[Tensor | None] = [mask] * len(self.sites)
        else:
            self.masks = list(mask)
            if len(self.masks) != len(self.sites):
                raise ValueError(f"{len(self.masks)} masks were given for {len(self.sites)} sites")
        for one in self.masks:
            if one is not None and one.dtype != torch.bool:
                raise TypeError(f"mask must be of dtype bool, got {one.dtype}; use mask.bool()")
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}; got {mode!r}")
        self.offsets, self.joint, self.mode = offsets, joint, mode
        self.models: list[nn.Module] = []
        for site in self.sites:
            if site.model is not None and not any(site.model is model for model in self.models):
                self.models.append(site.model)
        if mode == "eval" and not self.models:
            raise ValueError("mode='eval' needs to know the model: Site(module, model=model)")
        if compile and not self.models:
            raise ValueError("compile=True needs to know the model: Site(module, model=model)")
        self.blocks: list[Block] = []
        self.calls: list[list[Call]] = []
        self.batch = 0
        self._replay: RandomState | None = None
        self._masks: DropoutMasks | None = None

    def by_rows(self, labels: Tensor | None) -> None:
        """Call the loss function with the rows of the batch that it is to run.

        Raises:
            ValueError: samples cannot leave this batch one by one, or there are no labels.
        """
        if labels is None:
            raise ValueError("stop_when_fooled needs labels")
        if self.offsets is not None or any(site.scope == "row" for site in self.sites):
            raise ValueError("stop_when_fooled: samples of packed rows or of scope 'row' stay")
        self._by_rows: Callable[[Tensor], Any] = self.loss_fn  # type: ignore[assignment]
        self.loss_fn = partial(self._by_rows, torch.arange(labels.shape[0], device=labels.device))

    @property
    def quick_loss_fn(self) -> LossFn:
        """The loss function, compiled if that is asked for."""
        # Compiled code belongs to the function's code: a new closure for each batch finds it again.
        return torch.compile(self.loss_fn) if self.compile else self.loss_fn

    def narrow(self, rows: Tensor, blocks: list[Block]) -> Stage:
        """Make a stage of some of the samples, which `blocks` belong to."""
        other = copy(self)
        other.loss_fn, other.blocks, other.batch = partial(self._by_rows, rows), blocks, len(rows)
        return other

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
        state = RandomState.capture()
        if self.mode == "same" and self._replay is None:
            self._remember(state)
        with ExitStack() as stack:
            stack.push(lambda kind, *_: (before if kind is not None else state).restore())
            stack.callback(self.rest)
            stack.enter_context(torch.enable_grad())
            stack.enter_context(frozen_statistics(self.models))
            stack.enter_context(frozen_weights(self.models))
            if self.mode == "eval":
                stack.enter_context(eval_mode(self.models))
            yield generator

    def rest(self) -> None:
        """Leave the model unperturbed."""
        for site in self.sites:
            site.rest()

    def remember_random_state(self) -> None:
        """Replay from here in the passes of mode "same", the next one included."""
        if self.mode == "same":
            self._remember(RandomState.capture())

    def _remember(self, state: RandomState) -> None:
        self._replay = state
        self._masks = None if self.compile else DropoutMasks()

    def forget_masks(self) -> None:
        """Free the dropout masks: later passes draw them anew."""
        self._masks = None

    def run(self, loss_fn: LossFn) -> Evaluation:
        """Call the loss function; in mode "same" with the random numbers of the first pass."""
        if self._replay is None:
            return call(loss_fn)
        self._replay.restore()
        if self._masks is None or self._masks.idle:
            return call(loss_fn)
        with self._masks:
            return call(loss_fn)

    def open(
        self, *, attach: bool = False, start: Callable[[Block], None] | None = None
    ) -> Opening:
        """Run the first pass, which shows the shapes, and make the blocks.

        Args:
            attach: keep the graph, with a leaf at each place instead of the way to the module's
                weights, which `sources` give.
            start: called with each block, to set its delta. Where every block is one output, this
                happens inside the pass, which is then a perturbed one (and keeps its graph).
        """
        inside = start is not None and not self.joint
        inside = inside and all(site.scope == "output" for site in self.sites)
        started: list[list[Block]] = [[] for _ in self.sites]
        calls: list[list[Call]] = []
        self.calls = calls
        try:
            for index, site in enumerate(self.sites):
                begin = None
                if inside and start is not None:
                    begin = partial(self._begin, index, start, started[index])
                graph = attach or inside
                calls.append(
                    site.watch(attach=attach, begin=begin, graph=graph, aside=self.compile)
                )
            with torch.set_grad_enabled(attach or inside):
                evaluation = self.run(self.quick_loss_fn)
        finally:
            self.rest()
        perturbed = inside and all(
            len(blocks) == len(recorded) for blocks, recorded in zip(started, calls, strict=True)
        )
        if perturbed and any(calls):
            self.blocks = [block for blocks in started for block in blocks]
        else:
            self.blocks = build(
                self.sites, calls, masks=self.masks, offsets=self.offsets, joint=self.joint
            )
            perturbed = False
        batch = self.batch = evaluation.losses.shape[0]
        for block in self.blocks:
            if not block.coupled and block.samples != batch:
                raise ValueError(
                    f"{batch} losses for embeddings {tuple(block.base.shape)}, which hold "
                    f"{block.samples} samples in dim 0: samples must come first (or give offsets)"
                )
        if start is not None and not perturbed:
            for block in self.blocks:
                start(block)
        return Opening(evaluation, perturbed)

    def _begin(
        self, index: int, start: Callable[[Block], None], blocks: list[Block], call: Call
    ) -> Tensor:
        block = output_block(
            self.sites[index],
            call,
            (index, len(blocks)),
            offsets=self.offsets,
            mask=self.masks[index],
        )
        start(block)
        blocks.append(block)
        return block.delta

    def values(self) -> list[Tensor] | None:
        """Give the tensors at which the gradient at zero can be asked for, block by block.

        Returns:
            None if the model is compiled: its traced pass does not show them.
        """
        if any(call.compiled for recorded in self.calls for call in recorded):
            return None
        return [
            self.calls[site][number].value for block in self.blocks for site, number in block.places
        ]

    def sources(self) -> list[Tensor]:
        """Give the modules' own outputs at the places, attached to their weights."""
        return [
            self.calls[site][number].source
            for block in self.blocks
            for site, number in block.places
        ]

    def gather(self, grads: Sequence[Tensor | None]) -> list[Tensor]:
        """Turn gradients at the places, block by block, into the blocks' gradients."""
        found, position = [], 0
        for block in self.blocks:
            part = grads[position : position + len(block.places)]
            position += len(block.places)
            found.append(
                block.gather(
                    [
                        torch.zeros_like(addition) if grad is None else grad
                        for grad, addition in zip(part, _like(block, part), strict=True)
                    ]
                )
            )
        return found

    def agreement(self) -> Callable[[], Tensor] | None:
        """Give what computes the nearest-embedding agreement, where the sites have tables."""
        fits = all(
            isinstance(site.module, nn.Embedding) and site.scope == "output" for site in self.sites
        )
        if not fits or self.joint or self.offsets is not None:
            return None
        tables = [cast(Tensor, site.module.weight) for site in self.sites]
        return partial(_agreement, self.blocks, tables)

    @property
    def plain(self) -> bool:
        """Whether every site perturbs the output of a lookup, which no pass changes."""
        return all(_is_lookup(site.module) and site.scope == "output" for site in self.sites)

    def place(
        self, *, lookups: Lookups = "fresh", detach: bool = False, graph: bool = False
    ) -> None:
        """Hand the current deltas to the sites, for the passes to come.

        Args:
            lookups: where the embeddings come from, if the module is a lookup.
            detach: cut the embeddings off the modules' weights.
            graph: the passes keep their graphs.
        """
        additions: list[dict[int, Addition]] = [{} for _ in self.sites]
        for block in self.blocks:
            found = block.fused() if lookups == "detached" else None
            for (index, number), addition in zip(
                block.places, block.additions() if found is None else found, strict=True
            ):
                additions[index][number] = addition
        for site, each, calls in zip(self.sites, additions, self.calls, strict=True):
            fits = is_plain if lookups == "detached" else _is_lookup
            known = lookups != "fresh" and fits(site.module)
            known = known and not self.compile and not any(call.compiled for call in calls)
            site.add(
                [each[number] for number in range(len(each))],
                calls if known else None,
                attached=lookups == "attached",
                detach=detach,
                graph=graph,
            )

    @contextmanager
    def applied(self, *, lookups: Lookups = "fresh") -> Iterator[None]:
        """Perturb the model inside the block; the deltas are constants there.

        Args:
            lookups: "attached" perturbs the outputs of the opening pass where the module is a
                lookup, so that its weights' gradient is computed once for both passes.
        """
        for block in self.blocks:
            block.delta = block.delta.detach()
        self.place(lookups=lookups)
        try:
            yield
        finally:
            self.rest()

    def evaluate(
        self, *, grad: bool, lookups: Lookups = "fresh", detach: bool = False
    ) -> Evaluation:
        """Run the loss function at the current deltas (`lookups`, `detach`: see `place`)."""
        with torch.set_grad_enabled(grad):
            self.place(lookups=lookups, detach=detach, graph=grad)
            return self.run(self.quick_loss_fn)

    def gradients(self, losses: Tensor) -> list[Tensor]:
        """Differentiate with respect to the deltas, and nothing else.

        The sum of the losses is taken: each sample's delta gets its own sample's gradient.
        """
        leaves = [block.delta for block in self.blocks]
        if not losses.requires_grad:
            raise RuntimeError(
                "the losses do not depend on the perturbed embeddings: does loss_fn detach, or run "
                "under torch.no_grad()?"
            )
        grads = torch.autograd.grad(losses.sum(), leaves, allow_unused=True)
        return [
            torch.zeros_like(leaf) if grad is None else grad
            for leaf, grad in zip(leaves, grads, strict=True)
        ]


def _is_lookup(module: nn.Module) -> bool:
    return isinstance(module, (nn.Embedding, nn.EmbeddingBag))


def _like(block: Block, grads: Sequence[Tensor | None]) -> Sequence[Tensor]:
    """Give tensors of the shapes of the block's places, computed only if one is missing."""
    if any(grad is None for grad in grads):
        return block.additions()
    return [grad for grad in grads if grad is not None]


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
