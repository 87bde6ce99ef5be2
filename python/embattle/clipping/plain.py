"""Whether the rules leave the model's function as it is: it runs without them too.

What a rule does may be right by itself and wrong for the model. A row for every sample, in place of
one that is the same for all, is another input where all samples lie in that one row.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves, tree_map_only

from embattle.clipping.context import Context, alike, tolerance
from embattle.clipping.verify import Verifier
from embattle.perturb.hook import kept_places, records
from embattle.perturb.model_state import kept_state
from embattle.perturb.random_state import preserved_random_state

_KNOWN = 4096
# Outputs below are taken for what is left of larger numbers.
_FLOOR = 0.1
# What a module may count, or draw from.
_NUMBERS = (bool, int, float)


class Comparison:
    """Compares a model's outputs with those that it gives without rules.

    The model runs plainly first: what hooks and attributes keep of a pass is then of the other one,
    whose graph is clipped.
    """

    def __init__(self, model: nn.Module, context: Context, verifier: Verifier) -> None:
        self._model, self._context, self._verifier = model, context, verifier
        self._known: set[object] = set()
        self._due: tuple[object, list[Tensor]] | None = None

    def before(self, args: Any, kwargs: Any, leaves: list[Any], version: int) -> None:
        """Runs the model plainly if what it is called with is new, or by the verifier's choice.

        Args:
            args, kwargs: what the model is about to be called with.
            leaves: what these hold.
            version: counts the model's changes.
        """
        self._due = None
        # Weights that are frozen, as an attack does it, have no rules.
        if not any(p.requires_grad for p in self._context.names):
            return
        context = self._context
        how = (version, context.batch_size, torch.is_grad_enabled(), _in_halves())
        key = (*how, *map(_kind, leaves))
        if key in self._known and not self._verifier.chosen():
            return
        if records(self._model):
            return
        given, named = tree_map_only(Tensor, _copied, (args, kwargs))
        context.plain = True
        try:
            with (
                preserved_random_state(),
                kept_state([self._model]),
                _kept_numbers(self._model),
                kept_places(self._model),
                saved_tensors_hooks(torch.detach, lambda x: x),  # a checkpoint's own count
            ):
                out = self._model(*given, **named)
        finally:
            context.plain = False
        self._due = key, [t.detach() for t in _floats(out)]
        context.redrawn = False

    def after(self, output: Any) -> None:
        """Compares what the model returned.

        Raises:
            RuntimeError: it is something else than without rules.
        """
        if self._due is None:
            return
        (key, wanted), self._due = self._due, None
        context = self._context
        coarse = max([tolerance(p.dtype) for p in context.names])
        for ours, plain in zip(_floats(output), wanted, strict=False):
            limit = max(coarse, tolerance(plain.dtype))
            if _in_halves() or (plain.is_cuda and torch.backends.cudnn.allow_tf32):
                limit = tolerance(torch.bfloat16)
            same = ours.shape == plain.shape
            if not same or not (context.redrawn or alike(ours.detach(), plain, limit, _FLOOR)):
                raise self._differs(ours, plain)
        if len(self._known) > _KNOWN:
            self._known.clear()
        self._known.add(key)

    def forget(self) -> None:
        """Lets go of outputs that nothing was compared with."""
        self._due = None

    def _differs(self, ours: Tensor, plain: Tensor) -> RuntimeError:
        what = f"{tuple(ours.shape)} instead of {tuple(plain.shape)}"
        if ours.shape == plain.shape:
            away = float((ours.detach().double() - plain.double()).abs().max())
            what = f"{away:.3g} apart, of {float(plain.double().abs().max()):.3g}"
        spread = sorted(self._context.spread)
        if spread:
            return RuntimeError(
                "PerSampleClipper: the model is another function inside the with block: it returns "
                f"{what}. The inputs of {spread} have size 1 where samples are taken to be, and "
                "were given a row for every sample. Give these layers a row for each sample, or "
                "say by batch_dim={name: dim} in which dim of theirs the samples are"
            )
        return RuntimeError(
            "PerSampleClipper: the model is another function inside the with block: it returns "
            f"{what}. Either two passes over the same batch differ without a clipper too (numbers "
            "from a generator of its own), or this is a defect of the rules: please report it"
        )


def _in_halves() -> bool:
    return torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu")


def _kind(leaf: Any) -> object:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.device.type, leaf.requires_grad
    return leaf if isinstance(leaf, (*_NUMBERS, str, type(None))) else type(leaf)


def _copied(x: Tensor) -> Tensor:
    """What the pass may write into."""
    return x.detach().clone().requires_grad_(x.requires_grad)


def _floats(output: Any) -> list[Tensor]:
    return [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]


@contextmanager
def _kept_numbers(model: nn.Module) -> Iterator[None]:
    """Puts back what modules count, and the generators that they own."""
    numbers: list[tuple[dict[str, Any], str, Any]] = []
    generators: list[tuple[torch.Generator, Tensor]] = []
    for module in model.modules():
        held = vars(module)
        for name, value in held.items():
            if isinstance(value, _NUMBERS):
                numbers.append((held, name, value))
            elif isinstance(value, torch.Generator):
                generators.append((value, value.get_state()))
    try:
        yield
    finally:
        for held, name, value in numbers:
            held[name] = value
        for generator, state in generators:
            generator.set_state(state)
