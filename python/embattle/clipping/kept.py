"""What modules hold beside tensors, as it was before a pass."""

from __future__ import annotations

import gc
import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# Attributes of every module, which `kept_state` looks after as far as a pass may change them.
_OF_MODULES = frozenset(vars(nn.Module())) - {"training"}
_COLLECTIONS = frozenset({list, set, dict, deque, Counter, OrderedDict, defaultdict})
# Those that others may lie in: a tuple stays as it is, not so what it holds.
_HOLDERS = _COLLECTIONS | {tuple}


def _own(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in _OF_MODULES}


@contextmanager
def _no_collector() -> Iterator[None]:
    """Millions of copies are no garbage, and Python would look through all of them many times."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


def _inside(values: Iterable[Any]) -> Iterable[Any]:
    return chain.from_iterable(x.values() if isinstance(x, dict) else x for x in values)


class _Collections:
    """Collections, and those in them and so on, level by level: there may be millions.

    Attributes:
        tensors: those in them that are not trained.
    """

    def __init__(self, values: Iterable[Any]) -> None:
        self.tensors: list[Tensor] = []
        self._values: list[Any] = []
        self._copies: list[Any] = []
        known: set[int] = set()
        level = {id(one): one for one in values if type(one) in _HOLDERS}
        while level:
            values = list(level.values())
            changeable = [one for one in values if type(one) is not tuple]
            self._values += changeable
            self._copies += [one.copy() for one in changeable]
            level = {}
            kinds = set(map(type, _inside(values)))
            if any(issubclass(kind, Tensor) for kind in kinds):
                found = (x for x in _inside(values) if isinstance(x, Tensor))
                self.tensors += [x for x in found if not x.requires_grad]
            if not kinds.isdisjoint(_HOLDERS):
                known.update(map(id, values))
                found = (x for x in _inside(values) if type(x) in _HOLDERS)
                level = {id(one): one for one in found if id(one) not in known}

    def restore(self) -> None:
        """Refills what has changed: what has not, others may be reading now."""
        for value, before in zip(self._values, self._copies, strict=True):
            if not _same(value, before):
                _refill(value, before)


def _same(value: Any, before: Any) -> bool:
    if isinstance(value, set):
        return bool(value == before)  # a copy has an order of its own
    if len(value) != len(before) or not all(map(is_, value, before)):
        return False
    return not isinstance(value, dict) or all(map(is_, value.values(), before.values()))


def _refill(value: Any, before: Any) -> None:
    value.clear()
    if isinstance(value, (dict, set)):
        value.update(before)
    else:
        value.extend(before)


def _rewound(value: Any) -> Callable[[], object] | None:
    """What puts a generator back to where it is now; None of anything else."""
    if isinstance(value, torch.Generator):
        return partial(value.set_state, value.get_state())
    if type(value) is random.Random:
        return partial(value.setstate, value.getstate())
    if isinstance(value, np.random.Generator):
        bits = value.bit_generator
        return partial(setattr, bits, "state", bits.state)
    if isinstance(value, np.random.RandomState):
        return partial(value.set_state, value.get_state())
    return None


@contextmanager
def kept_values(model: nn.Module) -> Iterator[list[Tensor]]:
    """Puts back what modules hold and collect, and the generators that they own.

    Yields:
        The frozen weights, and the tensors in collections: whose values are left to `kept_state`.
    """
    held = [(module, type(module), _own(module)) for module in model.modules()]
    values = [value for _, _, own in held for value in own.values()]
    with _no_collector():
        collections = _Collections(values)
    generators = [rewind for rewind in map(_rewound, values) if rewind is not None]
    tensors: list[Tensor] = [
        p for p in model.parameters() if type(p) is nn.Parameter and not p.requires_grad
    ]
    try:
        yield tensors + collections.tensors
    finally:
        for module, kind, before in held:
            if type(module) is not kind:  # a lazy one, which has its sizes now
                continue
            now = vars(module)
            for name in now.keys() - before.keys() - _OF_MODULES:
                del now[name]
            now.update(before)
        collections.restore()
        for rewind in generators:
            rewind()
