"""Find the embeddings in what a module returns, and put others in their place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

Key: TypeAlias = str | int | None


class Part(NamedTuple):
    """One tensor of embeddings in a module's output.

    Attributes:
        key: where it stands in a dict or tuple; None if it is (or starts) the output.
        value: the embeddings; of ragged outputs the packed rows.
        offsets: `[B + 1]`, bounds of the samples in packed rows; None if not ragged.
    """

    key: Key
    value: Tensor
    offsets: Tensor | None


def parts_of(output: Any, key: Key = None) -> list[Part]:
    """List the embeddings in an output.

    Tensors and jagged nested tensors are one part; of a tuple the first element counts (or the one
    that `key` names); of a dict (a Hugging Face `ModelOutput` is one) every floating-point value,
    or the one that `key` names. TorchRec's `KeyedTensor`, which is a dict of features, and its
    `JaggedTensor` are taken by what they offer, without importing that library.

    Raises:
        TypeError: there are no floating-point tensors.
        KeyError, IndexError: `key` names none of the output's elements.
    """
    keyed = _torchrec(output) == "keyed"
    if keyed or isinstance(output, Mapping):
        names = output.keys()
        keys = [k for k in names if _holds(output[k])] if key is None else [key]
        if not keys or key not in (None, *names):
            kind = "KeyedTensor" if keyed else "dict"
            asked = "a floating-point tensor" if key is None else f"{key!r}"
            raise KeyError(
                f"Site: the module returned a {kind} of {', '.join(map(repr, names))}, without "
                f"{asked}"
            )
        return [Part(k, *_rows(output[k], output)) for k in keys]
    if isinstance(output, (tuple, list)) and output:
        index = 0 if key is None else key
        if not isinstance(index, int) or not -len(output) <= index < len(output):
            raise IndexError(f"Site: key {key!r} names no element of a tuple of {len(output)}")
        return [Part(index, *_rows(output[index], output))]
    if key is not None:
        raise KeyError(
            f"Site: key {key!r} was given, and the module returned one {type(output).__name__}"
        )
    return [Part(None, *_rows(output, output))]


def replace_parts(output: Any, values: Mapping[Key, Tensor]) -> Any:
    """Make an output like `output` in which the parts of these keys hold other values."""
    if isinstance(output, Tensor):
        return _with_rows(output, values[None])
    if _torchrec(output) == "keyed":
        names = list(output.keys())
        parts = [values[name] if name in values else output[name] for name in names]
        return _with_rows(output, torch.cat(parts, dim=output.key_dim()))
    if isinstance(output, Mapping):
        made = copy(output)
        for key, value in values.items():
            made[key] = _with_rows(output[key], value)  # type: ignore[index]
        return made
    if isinstance(output, (tuple, list)):
        items = list(output)
        for key, value in values.items():
            items[key] = _with_rows(output[key], value)  # type: ignore[index]
        if isinstance(output, tuple) and hasattr(output, "_make"):
            return output._make(items)
        return type(output)(items)
    return _with_rows(output, values[None])


def _holds(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.is_floating_point()
    return _torchrec(value) is not None and value.values().is_floating_point()


def _torchrec(value: Any) -> str | None:
    """Return "keyed" or "jagged" for TorchRec's containers, known by their methods; else None."""
    if isinstance(value, (Tensor, Mapping)):  # first: compiled code may not ask a tensor
        return None
    if callable(getattr(value, "values", None)):
        if callable(getattr(value, "key_dim", None)):
            return "keyed"
        if callable(getattr(value, "offsets", None)) and callable(getattr(value, "lengths", None)):
            return "jagged"
    return None


def _rows(value: Any, output: Any) -> tuple[Tensor, Tensor | None]:
    kind = _torchrec(value)
    if kind == "keyed":
        return value.values(), None
    if kind == "jagged":
        return value.values(), value.offsets().long()
    if not isinstance(value, Tensor) or not value.is_floating_point():
        within = "" if value is output else f" (in a {type(output).__name__})"
        raise TypeError(
            "Site: the module must return a floating-point tensor, a tuple that starts with one, "
            f"or a dict that holds some; got {type(value).__name__}{within}"
            + (f" of {value.dtype}" if isinstance(value, Tensor) else "")
        )
    if not value.is_nested:
        return value, None
    if value.layout != torch.jagged:
        raise TypeError("Site: nested tensors must be of layout torch.jagged")
    return value.values(), value.offsets()  # type: ignore[attr-defined]


def _with_rows(old: Any, value: Tensor) -> Any:
    kind = _torchrec(old)
    if kind == "keyed":
        make: Callable[..., Any] = type(old)
        return make(
            keys=old.keys(),
            length_per_key=old.length_per_key(),
            values=value,
            key_dim=old.key_dim(),
        )
    if kind == "jagged":
        weights = getattr(old, "weights_or_none", lambda: None)()
        return type(old)(values=value, lengths=old.lengths(), weights=weights)
    if old.is_nested:
        return torch.nested.nested_tensor_from_jagged(
            value, old.offsets(), old.lengths(), old._ragged_idx
        )
    return value
