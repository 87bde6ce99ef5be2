"""Whether the rules leave the model's function as it is: it runs without them too.

What a rule does may be right by itself and wrong for the model. A row for every sample, in place of
one that is the same for all, is another input where all samples lie in that one row.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from embattle.clipping.context import Context, alike, tolerance
from embattle.clipping.kept import kept_values
from embattle.clipping.verify import Verifier
from embattle.perturb import surroundings
from embattle.perturb.hooked import kept_places, records
from embattle.perturb.model_state import kept_state
from embattle.perturb.random_state import RandomState, preserved_random_state

_KNOWN = 4096
# How many sizes of inputs of one form are compared: texts and bags have others in every step.
_SIZES = 16
# Outputs below are taken for what is left of larger numbers.
_FLOOR = 0.1
# Outputs from here on are taken for masks, and say nothing of how exact the others are.
_MASK = 1e8


class _Due(NamedTuple):
    """A plain pass.

    Attributes:
        form: what calls of other sizes share.
        inputs: copies of what the model was given.
        outputs: what it returned.
        drew: whether it drew from the global generators.
    """

    form: object
    inputs: tuple[Any, Any]
    outputs: list[Tensor]
    drew: bool


class Comparison:
    """Compares a model's outputs with those that it gives without rules.

    The model runs plainly first: what hooks and attributes keep of a pass is then of the other one,
    whose graph is clipped.
    """

    def __init__(
        self, model: nn.Module, context: Context, verifier: Verifier, *, compiled: bool
    ) -> None:
        """Has compared nothing yet.

        Args:
            model: runs plainly.
            context, verifier: the clipper's.
            compiled: whether other code runs where the model is called.
        """
        self._model, self._context, self._verifier = model, context, verifier
        self._compiled = compiled
        self._known: set[object] = set()
        self._sizes: dict[object, int] = {}
        # Forms in which layers were given a row for every sample, right or wrong by the sizes.
        self._guessing: set[object] = set()
        # What the last call is known by.
        self._key: object = None
        self._due: _Due | None = None
        # Why a call is not compared; and layers whose guess an output has confirmed.
        self._blind: str | None = None
        self._right: set[object] = set()
        self._version = 0
        self._talks = False

    def before(self, args: Any, kwargs: Any, leaves: list[Any], version: int) -> None:
        """Runs the model plainly if what it is called with is new, or by the verifier's choice.

        Args:
            args, kwargs: what the model is about to be called with.
            leaves: what these hold.
            version: counts the model's changes.
        """
        self._due, self._blind, self._version = None, None, version
        # Weights that are frozen, as an attack does it, have no rules.
        if not any(p.requires_grad for p in self._context.names):
            return
        context = self._context
        context.guessed.clear()
        how = (version, torch.is_grad_enabled(), _in_halves())
        forms = tuple(map(_form, leaves))
        form = (*how, *dict.fromkeys(forms))  # texts come in lists of any length
        key = (*how, forms, context.batch_size, *map(_size, leaves))
        self._key, new = key, key not in self._known
        if self._talks:
            # Whether a call is new differs from rank to rank, and all must take part.
            self._blind = "its forward exchanges tensors with other ranks" if new else None
            return
        often = self._sizes.get(form, 0) >= _SIZES and form not in self._guessing
        if (often or not new) and not self._verifier.chosen():
            self._blind = f"{_SIZES} sizes of its inputs have been compared" if new else None
            return
        if records(self._model):
            return
        try:
            inputs = _copied((args, kwargs))
        except Exception:  # whatever a user's class raises: a cache that holds a graph
            self._blind = "its inputs cannot be copied for a second pass"
            return
        self._sizes[form] = self._sizes.get(form, 0) + new
        self._due = _Due(form, inputs, *self._outputs(inputs))
        context.redrawn = False

    def _outputs(self, inputs: tuple[Any, Any]) -> tuple[list[Tensor], bool]:
        """What the model returns without rules for copies of inputs; whether it drew for it."""
        given, named = _copied(inputs)
        context = self._context
        context.plain = True
        try:
            with (
                preserved_random_state() as before,
                kept_values(self._model) as tensors,
                kept_state([self._model], tensors),
                kept_places(self._model),
                _own_hooks(),
                _exchanges() as exchanges,
            ):
                found = [t.detach() for t in _floats(self._model(*given, **named))]
                self._talks |= exchanges is not None and exchanges.seen
                return found, not before.same(RandomState.capture())
        finally:
            context.plain = False

    def after(self, output: Any) -> None:
        """Compares what the model returned.

        Raises:
            RuntimeError: it is something else than without rules; or nothing tells.
        """
        due, self._due = self._due, None
        context = self._context
        if due is None:
            if not self._guesses() <= self._right:
                if self._blind is not None:
                    raise self._cannot_tell(self._blind)
                # The forward depends on more than what it is called with: compared the next time.
                self._known.discard(self._key)
            return
        ours = _floats(output)
        if context.guessed:
            self._guessing.add(due.form)
        if context.guessed and not ours:
            raise self._cannot_tell("it returns no floats")
        for one, plain in zip(ours, due.outputs, strict=False):
            same = one.shape == plain.shape
            if same and (context.redrawn or self._alike(one.detach(), plain)):
                continue
            excuse = self._excuse(due, same)
            if excuse is None:
                raise self._differs(one, plain)
            if context.guessed:
                raise self._cannot_tell(excuse)
            break
        if len(self._known) > _KNOWN:
            self._known.clear()
        self._known.add(self._key)
        self._right |= self._guesses()

    def _guesses(self) -> set[object]:
        return {(self._version, name) for name in self._context.guessed}

    def _alike(self, ours: Tensor, plain: Tensor) -> bool:
        limit = max([tolerance(plain.dtype), *[tolerance(p.dtype) for p in self._context.names]])
        # GPUs may compute float32 in TF32.
        if _in_halves() or (plain.is_cuda and plain.dtype != torch.float64):
            limit = tolerance(torch.bfloat16)
        ours, plain = _apart(ours, plain)
        masks = plain.abs() >= _MASK
        return all(
            alike(ours[part], plain[part], limit, _FLOOR) for part in (masks, masks.logical_not())
        )

    def _excuse(self, due: _Due, same: bool) -> str | None:
        """Why outputs that differ, of the same shape or not, say nothing against the rules."""
        if self._compiled and due.drew and same:
            return "compiled code draws other random numbers"
        if self._talks:
            return "its forward exchanges tensors with other ranks"
        passes = [self._outputs(due.inputs)[0] for _ in range(2)]
        agree = all(
            one.shape == two.shape and self._alike(one, two)
            for one, two in zip(*passes, strict=False)
        )
        # Otherwise the model draws numbers that nobody resets.
        return None if agree else "two passes without a clipper differ, too"

    def forget(self) -> None:
        """Lets go of outputs that nothing was compared with."""
        self._due = None

    def _cannot_tell(self, why: str) -> RuntimeError:
        return RuntimeError(
            f"PerSampleClipper: inputs of {sorted(self._context.spread)} have size 1 where samples "
            "are taken to be, and were given a row for every sample. The model's outputs would "
            f"show whether that is right, but {why}. Give these layers a row for each sample, or "
            "name them in broadcast if their input is the same for all samples"
        )

    def _differs(self, ours: Tensor, plain: Tensor) -> RuntimeError:
        what = f"{tuple(ours.shape)} instead of {tuple(plain.shape)}"
        if ours.shape == plain.shape:
            one, other = (x.double() for x in _apart(ours.detach(), plain))
            away = (one - other).abs().nan_to_num(nan=0.0)
            place = int(away.argmax())
            what = f"{float(one[place]):.3g} instead of {float(other[place]):.3g}"
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
            f"{what}. Without a clipper two passes over the same batch agree, so this is a defect "
            "of the rules: please report it"
        )


def _own_hooks() -> AbstractContextManager[object]:
    """Keeps what the pass saves from hooks around it: a checkpoint counts its own."""
    if surroundings.saved_tensors_hooks(False) is None:
        return nullcontext()  # torch.func.grad takes no hooks, not even these
    return saved_tensors_hooks(torch.detach, lambda x: x)


def _in_halves() -> bool:
    return torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu")


class _Exchanges(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees whether ranks exchange tensors."""

    seen = False

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let `torch.compile` work as if this were not there."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen |= func.namespace in ("c10d", "_c10d_functional")
        return func(*args, **(kwargs or {}))


def _exchanges() -> AbstractContextManager[_Exchanges | None]:
    if not (dist.is_available() and dist.is_initialized()):
        return nullcontext()
    return _Exchanges()  # type: ignore[no-untyped-call]


def _form(leaf: Any) -> object:
    """What kind of thing a model is called with."""
    if isinstance(leaf, Tensor):
        return leaf.dim(), leaf.dtype, leaf.device.type, leaf.requires_grad
    if isinstance(leaf, (int, float)) and not isinstance(leaf, bool):
        return type(leaf), leaf == 0  # schedules give another one in every step
    return leaf if isinstance(leaf, (bool, type(None))) else type(leaf)


def _size(leaf: Any) -> object:
    return leaf.shape if isinstance(leaf, Tensor) else leaf if isinstance(leaf, str) else None


def _copied(inputs: tuple[Any, Any]) -> tuple[Any, Any]:
    """What the pass may write into; what is given twice is one thing again."""
    memo: dict[int, Any] = {}

    def copied(x: Any) -> Any:
        if isinstance(x, Tensor) and id(x) not in memo:
            memo[id(x)] = x.detach().clone().requires_grad_(x.requires_grad)
        return x if isinstance(x, nn.Module) else deepcopy(x, memo)

    found: tuple[Any, Any] = tree_map(copied, inputs)
    return found


def _apart(ours: Tensor, plain: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers that differ: what a model fills in is as large as it likes, and the same."""
    if torch.equal(ours, plain):  # without a mask of the size of all logits
        return ours.flatten()[:0], plain.flatten()[:0]
    apart = ours != plain
    return ours[apart], plain[apart]


def _floats(output: Any) -> list[Tensor]:
    """The dense tensors of floats in an output, also in objects of a class unknown to torch."""
    found: list[Any] = []
    for leaf in tree_leaves(output):
        whole = isinstance(leaf, (Tensor, nn.Module)) or not hasattr(leaf, "__dict__")
        found += [leaf] if whole else tree_leaves(vars(leaf))
    floats = [x for x in found if isinstance(x, Tensor) and x.is_floating_point()]
    return [x for x in floats if x.layout is torch.strided and not x.is_nested]
