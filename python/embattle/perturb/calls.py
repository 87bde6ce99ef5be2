"""The calls of a site's modules in an attack's first pass, and how each output is laid out."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from embattle.perturb.outputs import Key


class Layout(NamedTuple):
    """Where the samples are in a tensor of embeddings.

    Attributes:
        samples: the dim that holds the samples; None if all samples share the tensor.
        per_sample: how many consecutive entries of that dim belong to one sample.
    """

    samples: int | None = 0
    per_sample: int = 1

    @property
    def plain(self) -> bool:
        """Whether the samples are in dim 0 already, one entry each."""
        return self.per_sample == 1 and not self.samples

    def to_samples(self, value: Tensor) -> Tensor:
        """View a tensor (embeddings, their gradient, or a mask) with the samples in dim 0."""
        if self.plain:
            return value
        value = value.movedim(self.samples or 0, 0)
        if self.per_sample == 1:
            return value
        if value.shape[0] % self.per_sample:
            raise ValueError(
                f"Site: per_sample={self.per_sample} does not divide the {value.shape[0]} entries "
                f"of dim {self.samples}"
            )
        return value.reshape(-1, self.per_sample, *value.shape[1:])

    def to_module(self, value: Tensor) -> Tensor:
        """Undo `to_samples`."""
        if self.plain:
            return value
        if self.per_sample != 1:
            value = value.flatten(0, 1)
        return value.movedim(0, self.samples or 0)


PLAIN = Layout()


@dataclass
class Call:
    """One call of a site's module during an attack's first pass.

    Attributes:
        module: the module that was called.
        value: the embeddings in its output; a leaf where the gradient at zero is computed.
            The model goes on with a copy, which it may change in place.
        source: the embeddings, attached to the module's weights; None once the attack is over.
        compiled: the call was traced by `torch.compile`: there is no gradient at `value`.
        args: the module's positional arguments.
        kwargs: the module's keyword arguments.
        key: which element of a dict or tuple the embeddings are.
        offsets: bounds of the samples, if the output is ragged.
        table: the parameter `weight` that the module had in the call, if any: another one than it
            has else, inside `torch.func.functional_call`.
        layout: where the samples are.
        through_half: gradients of what follows pass through float16, in which small ones vanish.
        unused_parameters: the model runs in DDP with `find_unused_parameters`.
        checked: whether the integers among the inputs are known, so that others are noticed.
    """

    module: nn.Module
    value: Tensor
    source: Tensor | None
    compiled: bool = False
    args: tuple[Any, ...] = field(default=(), repr=False)
    kwargs: dict[str, Any] = field(default_factory=dict, repr=False)
    key: Key = None
    offsets: Tensor | None = field(default=None, repr=False)
    layout: Layout = PLAIN
    table: Tensor | None = field(default=None, repr=False)
    checked: bool = field(default=True, init=False, repr=False)
    unused_parameters: bool = field(default=False, init=False, repr=False)
    through_half: bool = field(default=False, init=False, repr=False)
    identity: tuple[object, ...] | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # `args` keeps the inputs alive: until then no other tensor can have their address.
        self.identity = None if self.compiled else _identity(self.args, self.kwargs)

    @property
    def indices(self) -> Tensor | None:
        """The indices of a look-up."""
        if not isinstance(self.module, (nn.Embedding, nn.EmbeddingBag)):
            return None
        found = self.args[0] if self.args else self.kwargs.get("input")
        return found if isinstance(found, Tensor) else None

    def repeats(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Return whether a later call has the very same tensors as inputs, unchanged since."""
        return self.identity is not None and self.identity == _identity(args, kwargs)

    def same_batch(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Return whether a later call can be this one: of the same module, with equal indices.

        Floating-point inputs may differ from pass to pass, integers may not.
        """
        if module is not self.module or not self.checked:
            return module is self.module
        before, now = _integers(self.args, self.kwargs), _integers(args, kwargs)
        return len(before) == len(now) and all(
            one.shape == two.shape and one.device == two.device and torch.equal(one, two)
            for one, two in zip(before, now, strict=True)
        )

    def select(self, rows: Tensor) -> Call:
        """Make the call of some of the samples (without its values)."""
        other = copy(self)
        indices = self.indices if isinstance(self.module, nn.Embedding) else None
        if indices is not None and indices.shape == self.value.shape[:-1]:
            kept = self.layout.to_module(self.layout.to_samples(indices)[rows])
            other.args, other.kwargs = (kept,), {}
        else:
            other.args, other.kwargs = (), {}
            other.checked = False
        other.identity = None
        return other

    def release(self) -> None:
        """Free the graph, and the inputs of the module other than integers."""
        self.source = self.table = None
        if self.value.requires_grad:
            self.value = self.value.detach()
        if not self.compiled:
            given = _tensors(self.args, self.kwargs)
            kept = [one for one in given if _is_integer(one)]
            if len(given) != len(kept):
                self.identity = None
                self.args, self.kwargs = tuple(kept), {}


def is_lookup(module: nn.Module) -> bool:
    """Return whether a module is an embedding or a bag of embeddings."""
    return isinstance(module, (nn.Embedding, nn.EmbeddingBag))


def is_plain(module: nn.Module) -> bool:
    """Return whether a module is an `nn.Embedding` that reads its weight as it is."""
    return type(module) is nn.Embedding and module.max_norm is None


_ONLY_TENSORS = frozenset({Tensor})


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    given = (*args, *kwargs.values())
    if not _ONLY_TENSORS.issuperset(map(type, given)):
        # Those in lists, dicts and registered containers (a batch of TorchRec's) count too.
        given = tuple(tree_leaves(given))
    return [value for value in given if isinstance(value, Tensor)]


def _integers(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    return [one for one in _tensors(args, kwargs) if _is_integer(one)]


def _is_integer(one: Tensor) -> bool:
    return not (one.is_floating_point() or one.is_nested)


def _identity(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[object, ...] | None:
    """Return what identifies inputs while they live: address, layout and version of each tensor."""
    found: list[object] = []
    for value in (*args, *kwargs, *kwargs.values()):
        if not isinstance(value, Tensor):
            found.append(value if isinstance(value, (str, int, float)) else id(value))
        elif type(value) is Tensor and not value.is_inference():
            found += (value.data_ptr(), value.shape, value.stride(), value.dtype, value._version)
        else:
            return None
    return tuple(found)
