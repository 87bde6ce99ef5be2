"""Functions made of two things: an op's schema, and its definition in plain torch.

The definition (:mod:`embattle.ops.reference`) has the public signature and the words; the schema
has the order of what the op takes. Both are read once, when a function is made: no list of
arguments is written down here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from embattle.ops._arguments import NORMS, argument_error, draw_key, is_token, norm_order, written

P = ParamSpec("P")
R = TypeVar("R")

_MISSING: Any = inspect.Parameter.empty
_STYLES = {"mi": False, "apgd": True}


def _is_apgd(op: str, style: str) -> bool:
    if style not in _STYLES:
        raise ValueError(f"embattle.{op}: style must be 'mi' or 'apgd', got {style!r}")
    return _STYLES[style]


def _order(op: str, norm: str | float) -> float:
    return NORMS.get(norm) or norm_order(op, norm)


def _number(op: str, value: object) -> object:
    """A bound as the schema takes it; what is none is refused there, by the argument's name."""
    return float(value) if isinstance(value, Real) else value


#: Keywords that the field says otherwise than a schema: the schema's name, and the translation.
_TRANSLATED: dict[str, tuple[str, Callable[[str, Any], Any]]] = {
    "norm": ("norm", _order),
    "group": ("token", is_token),
    "style": ("apgd", _is_apgd),
    "generator": ("key", draw_key),  # once all else is good: a bad call draws nothing
}


def named(
    function: Callable[..., R], definition: Callable[P, R], written: Sequence[str] = ()
) -> Callable[P, R]:
    """A function with the signature and the words of its definition.

    Args:
        function: what runs.
        definition: in :mod:`embattle.ops.reference`.
        written: the arguments that the function writes and returns, if it is the in-place form.
    """
    dressed: Any = function
    dressed.__name__ = dressed.__qualname__ = definition.__name__ + ("_" if written else "")
    dressed.__doc__ = definition.__doc__
    if written:
        names = " and ".join(f"`{name}`" for name in written)
        verb = "is" if len(written) == 1 else "are"
        dressed.__doc__ = (
            f"As :func:`{definition.__name__}`, written into {names}, which {verb} returned."
        )
    dressed.__module__ = "embattle.ops"
    dressed.__signature__ = inspect.signature(definition)
    return cast("Callable[P, R]", dressed)


def front(definition: Callable[P, R], op: str, **instead: float) -> Callable[P, R]:
    """A function that calls an op.

    A keyword goes to the schema's argument of its name; a tensor where the schema has a number
    goes to the argument beside it (``eps_per_group``, ``lower_per_element``). An in-place op's
    function returns what it wrote.

    Args:
        definition: in :mod:`embattle.ops.reference`: gives the signature.
        op: the name of the op in ``torch.ops.embattle``.
        instead: numbers that stand for a keyword's None.

    Raises:
        RuntimeError: for a keyword that the schema has no argument for.
    """
    overload = getattr(torch.ops.embattle, op).default
    arguments = overload._schema.arguments
    signature = inspect.signature(definition)
    name = definition.__name__ + ("_" if op.endswith("_") else "")
    defaults = {a.name: a.default_value if a.has_default_value() else _MISSING for a in arguments}
    defaults.update(instead)
    targets = [a.name for a in arguments if a.alias_info is not None and not a.has_default_value()]
    draws = "key" in defaults

    #: Of a keyword: its argument, the translation, and the argument of a tensor beside a number.
    slots: dict[str, tuple[str, Callable[[str, Any], Any] | None, str | None]] = {}
    for key in signature.parameters:
        slot, translate = _TRANSLATED.get(key, (key, None))
        if slot not in defaults:
            raise RuntimeError(f"embattle.{op}: the schema has no argument for {key}")
        beside = None
        if f"{key}_per_group" in defaults:
            beside = f"{key}_per_group"
        elif f"{key}_per_element" in defaults:
            beside, translate = f"{key}_per_element", _number
        slots[key] = (slot, translate, beside)
    parameters = signature.parameters.values()
    tensors = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
    count = len(tensors)
    needed = [slot for slot, value in defaults.items() if value is _MISSING and slot != "key"]

    def refuse(given: tuple[Any, ...], options: dict[str, Any]) -> None:
        try:
            signature.bind(*given, **options)
        except TypeError as error:
            raise TypeError(f"embattle.{name}: {error}") from None

    def call(*given: Any, **options: Any) -> Any:
        values = defaults.copy()
        if len(given) > count:
            refuse(given, options)
        for slot, value in zip(tensors, given, strict=False):
            values[slot] = value
        for key, value in options.items():
            if key not in slots:
                refuse(given, options)
            slot, translate, beside = slots[key]
            if beside is not None and isinstance(value, Tensor):
                values[beside] = value
                if values[slot] is _MISSING:
                    values[slot] = 0.0
            elif slot != "key" and not (value is None and key in instead):
                values[slot] = value if translate is None else translate(name, value)
        for slot in needed:
            if values[slot] is _MISSING:
                refuse(given, options)
        if draws:
            values["key"] = draw_key(name, options.get("generator"))
        try:
            out = overload(*values.values())
        except RuntimeError as error:
            raise argument_error(error) from None
        if not targets:
            return out
        found = [values[target] for target in targets]
        written(*found)
        return found[0] if len(found) == 1 else tuple(found)

    return named(call, definition, targets)
