"""Exchange a parameter for another tensor wherever the modules of a model read it."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize


class _Parameters(dict[str, Any]):
    """A module's parameters, of which one thread reads some as other tensors.

    Only look-ups by name (`module.weight`) see them: iteration (optimizers, `state_dict`, copies)
    and other threads have the parameters.
    """

    def __init__(self, parameters: Mapping[str, Any]) -> None:
        super().__init__(parameters)
        self.swapped: dict[str, tuple[int, Tensor]] = {}

    def __getitem__(self, name: str) -> Any:
        thread, value = self.swapped.get(name, (None, None))
        return value if thread == threading.get_ident() else super().__getitem__(name)

    def __setitem__(self, name: str, value: Any) -> None:
        if self.swapped.get(name, (None,))[0] == threading.get_ident():
            # `functional_call` would put back, and write into what it was given, what it reads.
            raise RuntimeError(
                f"Site.weight: the parameter {name!r} is exchanged for another tensor while it is "
                "perturbed (torch.func.functional_call, an assignment). Leave it out of what is "
                "given there, or load it into the model before (load_state_dict) and call the model"
            )
        super().__setitem__(name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        from copy import deepcopy

        return {name: deepcopy(value, memo) for name, value in self.items()}

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (list(self.items()),)


def _of_parametrization(module: nn.Module, name: str) -> str:
    """Return where a parameter's own values are, if it is computed from others."""
    if not parametrize.is_parametrized(module, name):
        return ""
    inside: Any = module.parametrizations
    names = [n for n, _ in inside[name].named_parameters(recurse=False)]
    return (
        f". {name!r} is computed from {', '.join(names)}: "
        f"Site.weight(module.parametrizations.{name}, {names[0]!r}, model=model)"
    )


class SwappedParameter:
    """A parameter, with all places where a model's modules hold it.

    Args:
        module: the module that owns it.
        name: its name there.
        model: whose other modules are searched for it; `module` alone by default.

    Raises:
        AttributeError: there is no such parameter.
        TypeError: a recurrent layer, which keeps its weights in a second list.
    """

    def __init__(self, module: nn.Module, name: str, model: nn.Module | None) -> None:
        original = dict(module.named_parameters(recurse=False)).get(name)
        if original is None:
            names = [n for n, _ in module.named_parameters(recurse=False)] or ["none of its own"]
            raise AttributeError(
                f"Site.weight: {type(module).__name__} has no parameter {name!r}; it has "
                f"{', '.join(names)}{_of_parametrization(module, name)}"
            )
        self.module, self.name = module, name
        self.places: list[tuple[nn.Module, str]] = []
        seen = list(module.modules()) + ([] if model is None else list(model.modules()))
        for one in dict.fromkeys(seen):
            for key, value in one.named_parameters(recurse=False, remove_duplicate=False):
                if value is original:
                    self.places.append((one, key))
        for one, _ in self.places:
            if isinstance(one, nn.RNNBase):
                raise TypeError(
                    f"Site.weight: {type(one).__name__} keeps its weights in a list of its own; "
                    "perturb what goes in: Site.output(module)"
                )
        self.current: Tensor | None = None

    @property
    def original(self) -> nn.Parameter:
        """The parameter itself."""
        return dict(self.module.named_parameters(recurse=False))[self.name]

    @property
    def swapped(self) -> bool:
        """Whether another tensor is read instead."""
        return self.current is not None

    def swap(self, value: Tensor) -> None:
        """Let this thread read `value` instead of the parameter."""
        self.current = value
        for module, name in self.places:
            parameters = module._parameters
            if not isinstance(parameters, _Parameters):
                parameters = _Parameters(parameters)
                module.__dict__["_parameters"] = parameters
            parameters.swapped[name] = (threading.get_ident(), value)

    def restore(self) -> None:
        """Let everybody read the parameter again."""
        self.current = None
        for module, name in self.places:
            parameters = module._parameters
            if isinstance(parameters, _Parameters):
                parameters.swapped.pop(name, None)
                if not parameters.swapped:
                    module.__dict__["_parameters"] = dict(parameters)
