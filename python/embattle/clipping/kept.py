"""What modules hold beside tensors, as it was before a pass."""

from __future__ import annotations

import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# Attributes of every module, which `kept_state` looks after as far as a pass may change them.
_OF_MODULES = frozenset(vars(nn.Module())) - {"training"}
_COLLECTIONS = frozenset({list, set, dict, deque, Counter, OrderedDict, defaultdict})


def _own(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in _OF_MODULES}


def _note(value: Any, found: dict[int, tuple[Any, Any]], tensors: list[Tensor]) -> None:
    """Copies a collection, and those in it; lists the tensors that are not trained."""
    found[id(value)] = value, value.copy()
    for one in value.values() if isinstance(value, dict) else value:
        kind = type(one)
        if kind is Tensor and not one.requires_grad:
            tensors.append(one)
        elif kind in _COLLECTIONS and id(one) not in found:
            _note(one, found, tensors)


def _refill(value: Any, before: Any) -> None:
    value.clear()
    if isinstance(value, dict):
        for key, one in before.items():  # update would count in a Counter
            value[key] = one
    elif isinstance(value, set):
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
    collections: dict[int, tuple[Any, Any]] = {}
    generators: list[Callable[[], object]] = []
    tensors: list[Tensor] = [
        p for p in model.parameters() if type(p) is nn.Parameter and not p.requires_grad
    ]
    for _, _, own in held:
        for value in own.values():
            if type(value) in _COLLECTIONS and id(value) not in collections:
                _note(value, collections, tensors)
            rewound = _rewound(value)
            if rewound is not None:
                generators.append(rewound)
    try:
        yield tensors
    finally:
        for module, kind, before in held:
            if type(module) is not kind:  # a lazy one, which has its sizes now
                continue
            now = vars(module)
            for name in now.keys() - before.keys() - _OF_MODULES:
                del now[name]
            now.update(before)
        for value, before in collections.values():
            _refill(value, before)
        for rewind in generators:
            rewind()
