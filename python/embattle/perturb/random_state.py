"""The state of the global random generators: torch's, Python's `random` and numpy's.

A generator of the user's own draws on in an attack, as it does in any other pass.
"""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

_HEAD = object.__basicsize__  # a count of references and a type


def _memory_of(one: object) -> Any:
    """Return the memory of an object of a C class, without its reference count and type."""
    size = type(one).__basicsize__ - _HEAD
    return (ctypes.c_char * size).from_address(id(one) + _HEAD)


class _Generators(NamedTuple):
    """Python's and numpy's global generators (which are kept alive), and where their states lie."""

    python: Any
    numpy: Any
    bits: Any  # what numpy's draws from
    of_python: Any
    of_numpy: Any
    of_bits: Any  # None: not one of numpy's own

    @classmethod
    def now(cls) -> _Generators:
        """Return those of now: another one may have been put in their place."""
        global _generators
        python: Any = random._inst
        numpy: Any = np.random.mtrand._rand
        bits = numpy._bit_generator
        known = _generators
        if known is None or not (python is known[0] and numpy is known[1] and bits is known[2]):
            own = type(bits).__module__.startswith("numpy.")
            memories = _memory_of(python), _memory_of(numpy), _memory_of(bits) if own else None
            known = _generators = cls(python, numpy, bits, *memories)
        return known


_generators: _Generators | None = None


class _HostState(NamedTuple):
    """The states of Python's and numpy's global generators, and the memory they were read from.

    To read numpy's state takes longer than a small model's pass. Almost no model draws from it: its
    memory, which two short copies show, is that of the state before.
    """

    memory: tuple[Any, ...]
    python: tuple[Any, ...]
    numpy: Any

    @staticmethod
    def read_memory() -> tuple[Any, ...]:
        """Copy the generators' memory: any draw changes it."""
        now = _Generators.now()
        bits = str(now.bits.state) if now.of_bits is None else now.of_bits.raw
        return now.of_python.raw, now.python.gauss_next, (now.of_numpy.raw, bits)

    @classmethod
    def capture(cls) -> _HostState:
        """Return the states of now: those read last if the memory is the same since."""
        global _last_read
        memory = cls.read_memory()
        if _last_read is None or _last_read.memory != memory:
            numpy = np.random.get_state(legacy=False)  # noqa: NPY002
            _last_read = cls(memory, random.getstate(), numpy)
        return _last_read

    def restore(self) -> None:
        """Put the states back, where they have changed."""
        memory = self.read_memory()
        if memory == self.memory:
            return
        *python, numpy = memory
        *python_before, numpy_before = self.memory
        if python != python_before:
            random.setstate(self.python)
        if numpy != numpy_before:
            np.random.set_state(self.numpy)  # noqa: NPY002


_last_read: _HostState | None = None

_cpu = torch.default_generator
_cuda_is_used: Callable[[], bool] = torch.cuda.is_initialized


class RandomState(NamedTuple):
    """The state of the global generators: torch's on the CPU and CUDA, Python's and numpy's.

    A model may be on another device than the current one, or on several; negatives are often drawn
    with numpy.
    """

    cpu: Tensor
    cuda: list[Tensor] | None
    host: _HostState

    @classmethod
    def capture(cls) -> RandomState:
        """Copy the states now (host memory only: no synchronisation)."""
        cuda = torch.cuda.get_rng_state_all() if _cuda_is_used() else None
        return cls(_cpu.get_state(), cuda, _HostState.capture())

    def restore(self) -> None:
        """Put the states back."""
        _cpu.set_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state_all(self.cuda)
        self.host.restore()

    def same(self, other: RandomState) -> bool:
        """Return whether nothing was drawn in between."""
        pairs = zip([self.cpu, *(self.cuda or [])], [other.cpu, *(other.cuda or [])], strict=False)
        return self.host.memory == other.host.memory and all(torch.equal(a, b) for a, b in pairs)


@contextmanager
def preserved_random_state() -> Iterator[RandomState]:
    """Undo whatever the block draws from the global generators, also when it raises."""
    state = RandomState.capture()
    try:
        yield state
    finally:
        state.restore()
