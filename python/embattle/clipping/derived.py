"""Parameters, and tensors that are functions of parameters and constants alone.

A slice, a view, a parametrisation: what reaches them is pulled back to the parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._pytree import tree_leaves, tree_map

from embattle.clipping.grad_sample import DenseGradSample, GradSample, LinearGradSample, squares
from embattle.clipping.graph import Add


@dataclass(frozen=True, eq=False)
class Derived:
    """A function of parameters and constants, as a recipe.

    Attributes:
        value: what it gave; the recipe's results are told by it.
        function, args, kwargs: the recipe; parameters and other derived tensors among the args.
        part: which of several results it is.
        origin: the recipes of the derived tensors among the args, by their id.
    """

    value: Tensor
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    part: int | None
    origin: dict[int, Derived]

    def roots(self) -> list[Parameter]:
        """The parameters it is a function of."""
        found = {id(t): t for t in tensors(self.args, self.kwargs) if id(t) not in self.origin}
        roots = {key: t for key, t in found.items() if isinstance(t, Parameter) and t.requires_grad}
        for each in self.origin.values():
            roots |= {id(p): p for p in each.roots()}
        return list(roots.values())

    def evaluate(self, values: dict[int, Tensor]) -> Tensor:
        """The function; values: what stands for the parameters, by their id."""

        def instead(t: Any) -> Any:
            if isinstance(t, Tensor):
                if id(t) in self.origin:
                    return self.origin[id(t)].evaluate(values)
                return values.get(id(t), t)
            return t

        out = self.function(*tree_map(instead, self.args), **tree_map(instead, self.kwargs))
        found: Tensor = out if self.part is None else out[self.part]
        return found

    def rows_of(self, p: Parameter) -> tuple[int, int] | None:
        """The half-open range of p's rows that it is a view of, or None."""
        value, width = self.value, p[:1].numel()
        same = value.untyped_storage()._cdata == p.untyped_storage()._cdata
        if not same or value.shape[1:] != p.shape[1:] or value.stride() != p.stride():
            return None
        offset = int(value.storage_offset()) - int(p.storage_offset())
        first, rest = divmod(offset, max(width, 1))
        return None if rest or not p.is_contiguous() else (first, first + len(value))


Source: TypeAlias = Parameter | Derived | None


def tensors(*values: Any) -> list[Tensor]:
    """All tensors among values."""
    return [t for t in tree_leaves(values) if isinstance(t, Tensor)]


def shape_of(source: Source) -> torch.Size:
    """A parameter's shape, or a derived tensor's."""
    assert source is not None
    return source.value.shape if isinstance(source, Derived) else source.shape


def put(add: Add, source: Source, found: GradSample) -> None:
    """Adds the per-sample gradient of a parameter, or those of what a derived tensor is made of."""
    if source is None:
        return
    if not isinstance(source, Derived):
        add(source, found)
        return
    roots = source.roots()
    if isinstance(found, LinearGradSample) and len(roots) == 1:
        rows = source.rows_of(roots[0])
        if rows is not None and found.rows == (0, rows[1] - rows[0]):
            add(roots[0], replace(found, rows=rows, bias=None))
            return
    grads = found.dense(source.value.shape).to(source.value.dtype)

    def pulled(grad: Tensor) -> tuple[Tensor, ...]:
        def function(*values: Tensor) -> Tensor:
            by_id = {id(p): v for p, v in zip(roots, values, strict=True)}
            return source.evaluate(by_id)

        back: Any = torch.func.vjp(function, *(p.detach() for p in roots))[1]
        own: tuple[Tensor, ...] = back(grad)
        return own

    with torch.enable_grad():
        parts = torch.vmap(pulled)(grads)
    for p, part in zip(roots, parts, strict=True):
        # On the way much may cancel: a normalised weight has no gradient along itself.
        add(p, DenseGradSample(part.detach(), squares(grads, 1)))
