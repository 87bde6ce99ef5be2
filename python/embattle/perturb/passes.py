"""The forward passes of an attack, and the state of the model and of random numbers around them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from embattle.perturb.evaluation import Evaluation, LossFn, call
from embattle.perturb.guard import (
    MODES,
    Mode,
    autograd_enabled,
    eval_mode,
    fresh_autocast_cache,
    frozen_weights,
)
from embattle.perturb.model_state import KeptState, kept_state
from embattle.perturb.perturbed_sites import PerturbedSites
from embattle.perturb.random_state import RandomState
from embattle.perturb.replay import DropoutMasks
from embattle.perturb.site import Site

NOTHING: AbstractContextManager[None] = nullcontext()


class Passes:
    """The passes of a loss function over one batch, each from the same state of the model.

    Args:
        loss_fn: runs the model on the batch; returns losses `[B]`, or an `Evaluation`.
        perturbed: the sites.
        mode: what the model does in the attack's own passes (see `embattle.PGD`).
        same_random: all passes of the attack have the same random numbers, as in mode "same":
            needed where their values are compared.
        compile: `torch.compile` the loss function.
    """

    def __init__(
        self,
        loss_fn: LossFn,
        perturbed: PerturbedSites,
        mode: Mode = "as_is",
        same_random: bool = False,
        compile: bool = False,
    ) -> None:
        if not callable(loss_fn):
            raise TypeError(f"loss_fn must be a function, got {type(loss_fn).__name__}")
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}; got {mode!r}")
        self.loss_fn, self.perturbed, self.compile = loss_fn, perturbed, compile
        self.mode, self.same_random = mode, same_random or mode == "same"
        self.models: list[nn.Module] = []
        for site in self.sites:
            if site.model is not None and not any(site.model is model for model in self.models):
                self.models.append(site.model)
        if not self.models and (mode == "eval" or compile):
            name = "mode='eval'" if mode == "eval" else "compile=True"
            raise ValueError(f"{name} needs to know the model: Site(module, model=model)")
        if compile and any(site.scope == "weight" for site in self.sites):
            raise ValueError("compile=True: compiled code does not see an exchanged parameter")
        self._state: KeptState | None = None
        self._first: RandomState | None = None  # where evaluations start from
        self._replay: RandomState | None = None
        self._masks: DropoutMasks | None = None

    @property
    def sites(self) -> list[Site]:
        """Where the model is perturbed."""
        return self.perturbed.sites

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
                autograd_enabled() if off else NOTHING,
                fresh_autocast_cache(),
                kept_state(self.models) as state,
                frozen_weights(state.parameters),
                _requiring_grad(self.sites) if self._tables else NOTHING,
                eval_mode(self.models, state.modules.values()) if self.mode == "eval" else NOTHING,
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

    @property
    def drew_random_numbers(self) -> bool:
        """Whether the pass just made, from the attack's first random state, drew any."""
        return self._first is None or not self._first.same(RandomState.capture())

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
