"""The site of a parameter: it is perturbed wherever the model reads it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from torch import Tensor, nn
from torch.autograd.graph import Node

from embattle import checks
from embattle.perturb.calls import Call, Layout
from embattle.perturb.hook import PassAddition, Use
from embattle.perturb.site import Site
from embattle.perturb.surroundings import computes_in_half
from embattle.perturb.tables import SwappedParameter


class WeightSite(Site):
    """A parameter that is perturbed wherever it is used (see `Site.weight`)."""

    def __init__(
        self,
        module: nn.Module,
        name: str,
        *,
        group: Literal["row", "table"],
        model: nn.Module | None,
    ) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(f"Site.weight: needs a torch.nn.Module, got {type(module).__name__}")
        checks.one_of("Site.weight", "group", group, ("row", "table"))
        self._parameter = SwappedParameter(module, name, model)
        self.name = name
        self.modules = [module]
        self.group = "token" if group == "row" else "sample"
        self.scope, self.rows, self.model = "weight", "table", model
        self.samples, self.per_sample = None, 1
        self.known_shapes = set()
        self.mask, self.offsets, self.key = None, None, None

    def __reduce__(self) -> tuple[Any, ...]:
        group = "row" if self.group == "token" else "table"
        return _make_weight, (self.module, self.name, group, self.model)

    def __repr__(self) -> str:
        balls = "row" if self.group == "token" else "table"
        return f"Site({self.name} of {type(self.module).__name__}, one ball per {balls})"

    @property
    def use(self) -> Use | None:
        return None

    @property
    def busy(self) -> bool:
        return self._parameter.swapped

    @property
    def table(self) -> nn.Parameter:
        return self._parameter.original

    def remove(self) -> None:
        """Do nothing: no hook stays on the module."""

    def record(self, **options: Any) -> list[Call]:
        attach, begin = options["attach"], options.get("begin")
        original = self._parameter.original
        leaf = original.detach()
        call = Call(self.module, leaf, original, False, layout=Layout(None))
        call.through_half = computes_in_half(original)
        if attach and begin is None:
            leaf.requires_grad_()
            self._parameter.swap(leaf)
        elif begin is not None:
            self._swap(leaf if attach else original, begin(call), options.get("nodes"))
        return [call]

    def perturb(
        self,
        calls: list[Call],
        additions: Sequence[PassAddition],
        *,
        known: str | None = None,
        detach: bool = False,
        nodes: set[Node] | None = None,
        **options: Any,
    ) -> None:
        (addition,) = additions
        original = self._parameter.original
        assert isinstance(addition, Tensor)
        self._swap(original.detach() if detach else original, addition, nodes)

    def _swap(self, value: Tensor, addition: Tensor, nodes: set[Node] | None) -> None:
        value = value + addition.to(value.dtype)
        if nodes is not None and value.grad_fn is not None:
            nodes.add(value.grad_fn)
        self._parameter.swap(value)

    def clear(self) -> None:
        self._parameter.restore()

    def end_pass(self) -> bool:
        return True

    @contextmanager
    def perturbed(
        self, calls: list[Call], additions: Sequence[PassAddition], known: str | None
    ) -> Iterator[None]:
        before = self._parameter.current
        self.perturb(calls, additions)
        try:
            yield
        finally:
            self._parameter.restore()
            if before is not None:
                self._parameter.swap(before)


def _make_weight(module: nn.Module, name: str, group: Any, model: nn.Module | None) -> Site:
    return Site.weight(module, name, group=group, model=model)
