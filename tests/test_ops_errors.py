"""What every op says to a wrong argument, and that it then has written nothing.

A message starts with the op's name, and names the argument and what was found in it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import devices
import pytest
import torch
from compare import accepts, same_bits
from embattle import ops
from samples import INF, NAN
from torch import Tensor

SHAPE = (4, 5, 6)
GROUP_OPS = {
    "pgd_step": ("delta", "grad"),
    "pgd_step_": ("delta", "grad"),
    "project": ("delta",),
    "project_": ("delta",),
    "random_start": ("like",),
    "gaussian_noise": ("x",),
    "gaussian_noise_": ("x",),
    "momentum_step": ("delta", "velocity", "grad"),
    "momentum_step_": ("delta", "velocity", "grad"),
    "group_norm": ("x",),
}


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


def ints(*values: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def floats(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


class Bad(NamedTuple):
    """A call that is right but for one argument."""

    op: str
    argument: str
    value: Any
    said: str  # what the message says of the value
    others: dict[str, Any] = {}  # noqa: RUF012 - what else differs from good(op)

    @property
    def told_by_values(self) -> bool:
        """Whether values of a tensor are wrong, which are not read where that waits for a GPU."""
        return isinstance(self.value, Tensor) and re.match(r"-?\d|nan|inf", self.said) is not None


def good(op: str) -> dict[str, Any]:
    """Arguments that the op takes, by name."""
    if op in GROUP_OPS:
        numbers = {"eps": 1.0, "step_size": 0.5, "std": 0.1, "decay": 0.9}
        return {
            **{name: ones(*SHAPE) for name in GROUP_OPS[op]},
            **{name: value for name, value in numbers.items() if accepts(op, name)},
            **(
                {"nonfinite": torch.zeros(4, dtype=torch.int32)} if accepts(op, "nonfinite") else {}
            ),
        }
    rows = torch.tensor([[0, 1, 2], [2, 2, 1]])
    calls: dict[str, dict[str, Any]] = {
        "per_sample_norm": {"grads": [ones(3, 4), ones(3)]},
        "clip_and_sum": {"grads": [ones(3, 4), ones(3)], "max_norm": 1.0},
        "linear_grad_norm": {"input": ones(3, 2, 4), "grad_output": ones(3, 2, 5)},
        "embedding_grad_norm": {"indices": rows, "grad_output": ones(2, 3, 4)},
        "embedding_grad_sum": {"indices": rows, "grad_output": ones(2, 3, 4), "rows": 7},
        "embedding_perturb": {
            "weight": ones(7, 4),
            "indices": rows,
            "delta": ones(3, 4),
            "inverse": rows - 1,
        },
        "rowwise_adagrad_": {
            "weight": ones(7, 4),
            "state": ones(7),
            "indices": rows,
            "grad": ones(2, 3, 4),
            "lr": 0.1,
        },
    }
    return calls[op]


def _tensors(op: str, name: str) -> Iterator[Bad]:
    """What no floating tensor argument may be."""
    shape = good(op)[name].shape if name in good(op) else torch.Size(SHAPE)
    yield Bad(op, name, ones(*shape, dtype=torch.int64), "Long")
    yield Bad(op, name, ones(*shape, dtype=torch.complex64), "ComplexFloat")
    yield Bad(op, name, ones(*shape, dtype=torch.bool), "Bool")
    yield Bad(op, name, "delta", "str")
    yield Bad(op, name, [1.0, 2.0], "list")
    if name in good(op):
        yield Bad(op, name, None, "None")


def _strength(op: str, name: str) -> Iterator[Bad]:
    """What no strength may be, as a number or as one per group."""
    yield Bad(op, name, NAN, "nan")
    yield Bad(op, name, floats(1, 1, NAN, 1), "nan")
    yield Bad(op, name, floats(1, 1, 1), "[3]")
    yield Bad(op, name, ones(4, 1), "[4, 1]")
    yield Bad(op, name, ints(1, 1, 1, 1), "Long")
    yield Bad(op, name, torch.ones(4, dtype=torch.bool), "Bool")
    yield Bad(op, name, "0.3", "str")
    if name == "step_size" or op == "random_start":
        yield Bad(op, name, INF, "inf")
        yield Bad(op, name, floats(1, INF, 1, 1), "inf")
    if name == "step_size":
        return
    yield Bad(op, name, -0.5, "-0.5")
    yield Bad(op, name, -INF, "-inf")
    yield Bad(op, name, floats(1, 1, 1, -2), "-2")
    yield Bad(op, name, ones(4).double() * -0.25, "-0.25")
    yield Bad(op, name, ones(1).half() * -3, "-3", {"group": "token"})


def _group_op(op: str) -> Iterator[Bad]:
    first = GROUP_OPS[op][0]
    for name in GROUP_OPS[op]:
        yield from _tensors(op, name)
        if name != first:
            yield Bad(op, name, ones(4, 5), "[4, 5]")
            yield Bad(op, name, ones(4, 1, 6), "[4, 1, 6]")
            yield Bad(op, name, ones(5, 6), "[5, 6]")
    for norm in ("l3", "", 3, 0.5, 0, -1, NAN, None):
        yield Bad(op, "norm", norm, repr(norm))
    for group in ("row", "Sample", "", None, 1):
        yield Bad(op, "group", group, repr(group))
    yield Bad(op, "offsets", ints(0, 13, 12, 20), "13 then 12")
    yield Bad(op, "offsets", ints(0, -3, 20), "0 then -3")
    yield Bad(op, "offsets", ints(0, 5, 19), "19")
    yield Bad(op, "offsets", ints(0, 5, 21), "21")
    yield Bad(op, "offsets", ints(1, 5, 20), "1 to 20")
    yield Bad(op, "offsets", ints(0), "0 to 0")
    yield Bad(op, "offsets", ints(), "[0]")
    yield Bad(op, "offsets", ints(0, 20).view(1, 2), "[1, 2]")
    yield Bad(op, "offsets", ints(0, 20, dtype=torch.int32), "Int")
    yield Bad(op, "offsets", floats(0, 20), "Float")
    yield Bad(op, "offsets", [0, 20], "list")
    yield Bad(op, "mask", ones(*SHAPE, dtype=torch.bool), "[4, 5, 6]")
    yield Bad(op, "mask", ones(4, dtype=torch.bool), "[4]")
    yield Bad(op, "mask", ones(5, 4, dtype=torch.bool), "[5, 4]")
    yield Bad(op, "mask", ones(1, 5, dtype=torch.bool), "[1, 5]")
    yield Bad(op, "mask", ones(4, 5, dtype=torch.uint8), "Byte")
    yield Bad(op, "mask", ones(4, 5), "Float")
    yield Bad(op, "mask", True, "bool")
    for name in ("eps", "step_size", "std"):
        if accepts(op, name):
            yield from _strength(op, name)
            if not (op.startswith("gaussian") and name == "eps"):  # None there: no ball
                yield Bad(op, name, None, "NoneType")
    if not accepts(op, "x0"):
        return
    for name in ("x0", "lower", "upper"):
        yield from _tensors(op, name)
        yield Bad(op, name, ones(5, 6), "[5, 6]")
        yield Bad(op, name, ones(4, 5, 1), "[4, 5, 1]")
        yield Bad(op, name, ones(1, 1), "[1, 1]")
    yield Bad(op, "x0", 0.5, "float")
    yield Bad(op, "x0", ones(1), "[1]")
    if accepts(op, "generator"):
        yield Bad(op, "generator", "seed", "'seed'")
        yield Bad(op, "generator", 7, "7")
    if not accepts(op, "top"):
        return
    for top in (0, -1, -0.5, 1.5, NAN):
        yield Bad(op, "top", top, str(top), {"norm": "l1"})
    yield Bad(op, "top", "all", "str", {"norm": "l1"})
    yield Bad(op, "nonfinite", ones(4), "Float")
    yield Bad(op, "nonfinite", ones(4, dtype=torch.int64), "Long")
    yield Bad(op, "nonfinite", ones(3, dtype=torch.int32), "[3]")
    yield Bad(op, "nonfinite", ones(4, 1, dtype=torch.int32), "[4, 1]")
    yield Bad(op, "nonfinite", ones(8, dtype=torch.int32)[::2], "not contiguous")
    yield Bad(op, "nonfinite", True, "bool")
    if accepts(op, "max_groups"):
        token: dict[str, Any] = {"group": "token", "nonfinite": None}
        for k in (-1, -2):
            yield Bad(op, "max_groups", k, str(k), token)
        for k in (1.5, "all"):
            yield Bad(op, "max_groups", k, type(k).__name__, token)
        yield Bad(op, "max_groups", 2, "group='sample'")
        yield Bad(op, "max_groups", 2, "offsets", {**token, "offsets": ints(0, 20)})
    if accepts(op, "decay"):
        for decay in (NAN, INF, -INF):
            yield Bad(op, "decay", decay, str(decay))
        yield Bad(op, "decay", "0.9", "str")
        for style in ("nesterov", "", None):
            yield Bad(op, "style", style, repr(style))


def _lists(op: str) -> Iterator[Bad]:
    yield Bad(op, "grads", [], "empty")
    yield Bad(op, "grads", (), "empty")
    yield Bad(op, "grads", ones(3, 4), "Tensor")
    yield Bad(op, "grads", None, "NoneType")
    yield Bad(op, "grads", 3.0, "float")
    yield Bad(op, "grads", [ones(3), None], "None")
    yield Bad(op, "grads", [ones(3), 1.0], "float")
    yield Bad(op, "grads", [ones(3, 4), ones(2, 4)], "2 in grads[1]")
    yield Bad(op, "grads", [ones(3, 4), torch.tensor(1.0)], "grads[1]")
    yield Bad(op, "grads", [torch.tensor(1.0)], "grads[0]")
    yield Bad(op, "grads", [ones(3, 4), ones(3, dtype=torch.int64)], "Long")
    yield Bad(op, "grads", [ones(3, dtype=torch.complex64)], "ComplexFloat")


def _clip_and_sum() -> Iterator[Bad]:
    op = "clip_and_sum"
    for mode in ("flat", "per_layer", "automatic"):
        some = {"mode": mode}
        yield Bad(op, "max_norm", -1.0, "-1", some)
        yield Bad(op, "max_norm", NAN, "nan", some)
        yield Bad(op, "max_norm", [1.0, 1.0, 1.0], "3", some)
        yield Bad(op, "max_norm", [], "0", some)
        yield Bad(op, "max_norm", "1", "'1'", some)
        yield Bad(op, "max_norm", None, "None", some)
        yield Bad(op, "max_norm", [None], "None", some)
        yield Bad(op, "weights", ones(4), "[4]", some)
        yield Bad(op, "weights", ones(3, 1), "[3, 1]", some)
        yield Bad(op, "weights", torch.tensor(1.0), "[]", some)
        yield Bad(op, "weights", ones(3, dtype=torch.bool), "Bool", some)
        yield Bad(op, "weights", [1.0, 1.0, 1.0], "list", some)
    yield Bad(op, "max_norm", [1.0, 1.0], "2")
    yield Bad(op, "max_norm", [1.0, -2.0], "-2", {"mode": "per_layer"})
    yield Bad(op, "max_norm", INF, "inf", {"mode": "automatic"})
    for mode in ("Flat", "", "global"):
        yield Bad(op, "mode", mode, repr(mode))
    yield Bad(op, "mode", None, "NoneType")
    for gamma in (-0.5, NAN, INF):
        yield Bad(op, "gamma", gamma, str(gamma), {"mode": "automatic"})
    yield Bad(op, "gamma", "0.1", "str")


def _linear_grad_norm() -> Iterator[Bad]:
    op = "linear_grad_norm"
    for name in ("input", "grad_output"):
        yield from _tensors(op, name)
        yield Bad(op, name, ones(3, 2), "[3, 2]")
        yield Bad(op, name, ones(2, 2, 4), "[2, 2, 4]")
        yield Bad(op, name, ones(3, 1, 4), "[3, 1, 4]")
        yield Bad(op, name, torch.tensor(1.0), "[]")
    yield Bad(op, "input", ones(4), "[4]", {"grad_output": ones(4)})
    yield Bad(op, "method", "fast", "'fast'")
    yield Bad(op, "method", None, "NoneType")
    yield Bad(op, "bias", "yes", "str")


def _indices(op: str, name: str) -> Iterator[Bad]:
    yield Bad(op, name, ones(2, 3), "Float")
    yield Bad(op, name, ones(2, 3, dtype=torch.bool), "Bool")
    yield Bad(op, name, [[0, 1, 2]], "list")
    yield Bad(op, name, None, "NoneType")


def _embedding_grad_norm() -> Iterator[Bad]:
    op = "embedding_grad_norm"
    yield from _indices(op, "indices")
    yield from _tensors(op, "grad_output")
    yield Bad(op, "grad_output", ones(2, 4), "[2, 4]")
    yield Bad(op, "grad_output", ones(2, 4, 4), "[2, 4, 4]")
    yield Bad(op, "indices", torch.tensor(3), "[]", {"grad_output": ones(4)})
    yield Bad(op, "padding_idx", -1, "-1")
    yield Bad(op, "padding_idx", 1.5, "float")
    yield Bad(op, "mode", "max", "'max'")
    yield Bad(op, "mode", None, "None")
    yield Bad(op, "mode", "mean", "'mean'")  # needs offsets
    bag: dict[str, Any] = {"indices": ints(0, 1, 2, 2, 1), "grad_output": ones(2, 4)}
    yield Bad(op, "offsets", ints(0, 3, 2), "2 at 2", bag)
    yield Bad(op, "offsets", ints(1, 3), "1 at 0", bag)
    yield Bad(op, "offsets", ints(0, 3, 6), "6 at 2", bag)
    yield Bad(op, "offsets", ints(0, 3, 4, 5), "[4]", bag)
    yield Bad(op, "offsets", ints(0), "[1]", bag)
    yield Bad(op, "offsets", ints(0, 3).view(1, 2), "[1, 2]", bag)
    yield Bad(op, "offsets", floats(0, 3, 5), "Float", bag)
    yield Bad(op, "offsets", [0, 3, 5], "list", bag)
    bag["offsets"] = ints(0, 3, 5)
    yield Bad(op, "indices", ints(0, 1, 2, 2).view(2, 2), "[2, 2]", {**bag, "indices": None})
    yield Bad(op, "grad_output", ones(2, 1, 4), "[2, 1, 4]", bag)
    yield Bad(op, "per_sample_weights", ones(4), "[4]", bag)
    yield Bad(op, "per_sample_weights", ones(5, dtype=torch.int64), "Long", bag)
    yield Bad(op, "per_sample_weights", [1.0], "list", bag)
    yield Bad(op, "per_sample_weights", ones(5), "'mean'", {**bag, "mode": "mean"})
    yield Bad(op, "per_sample_weights", ones(2, 3), "no offsets")


def _embedding_grad_sum() -> Iterator[Bad]:
    op = "embedding_grad_sum"
    yield from _indices(op, "indices")
    yield from _tensors(op, "grad_output")
    yield Bad(op, "grad_output", ones(2, 4), "[2, 4]")
    yield Bad(op, "grad_output", ones(6, 4), "[6, 4]")
    yield Bad(op, "grad_output", ones(2, 4, 4), "[2, 4, 4]")
    bad = torch.tensor([[0, 1, 2], [2, 7, 1]])
    yield Bad(op, "indices", bad, "7 at position 4")
    yield Bad(op, "indices", bad.int(), "7 at position 4")
    yield Bad(op, "indices", -bad, "-1 at position 1")
    yield Bad(op, "indices", bad, "7 at position 4", {"padding_idx": 1, "weights": ones(2)})
    scalar = {"grad_output": ones(4), "weights": ones(1)}
    yield Bad(op, "indices", torch.tensor(3), "[]", scalar)
    yield Bad(op, "rows", -1, "-1")
    yield Bad(op, "rows", 1.5, "float")
    yield Bad(op, "rows", "7", "str")
    yield Bad(op, "rows", None, "None")
    yield Bad(op, "padding_idx", -1, "-1")
    yield Bad(op, "padding_idx", 7, "7")
    yield Bad(op, "padding_idx", 1.5, "float")
    yield Bad(op, "weights", ones(3), "[3]")
    yield Bad(op, "weights", ones(2, 1), "[2, 1]")
    yield Bad(op, "weights", ones(2, 3), "[2, 3]")
    yield Bad(op, "weights", torch.tensor(1.0), "[]")
    yield Bad(op, "weights", ones(2, dtype=torch.int64), "Long")
    yield Bad(op, "weights", ones(2, dtype=torch.bool), "Bool")
    yield Bad(op, "weights", [1.0, 2.0], "list")
    yield Bad(op, "weights", 1.0, "float")


def _tables(op: str) -> Iterator[Bad]:
    yield from _tensors(op, "weight")
    yield from _indices(op, "indices")
    yield Bad(op, "weight", ones(7), "[7]")
    yield Bad(op, "weight", ones(7, 4, 1), "[7, 4, 1]")
    bad = torch.tensor([[0, 1, 2], [2, 7, 1]])
    yield Bad(op, "indices", bad, "7 at position 4")
    yield Bad(op, "indices", bad.int(), "7 at position 4")
    yield Bad(op, "indices", -bad, "-1 at position 1")


def _embedding_perturb() -> Iterator[Bad]:
    op = "embedding_perturb"
    yield from _tables(op)
    yield from _tensors(op, "delta")
    yield from _indices(op, "inverse")
    yield Bad(op, "delta", ones(4), "[4]")
    yield Bad(op, "delta", ones(3, 5), "5")
    yield Bad(op, "inverse", ints(0, 1), "[2]")
    yield Bad(op, "inverse", ints(0, 1, 2, 2, 3, 1).view(2, 3), "3 at position 4")
    yield Bad(op, "inverse", ints(0, 1, 2, -2, 0, 1).view(2, 3), "-2 at position 3")


def _rowwise_adagrad() -> Iterator[Bad]:
    op = "rowwise_adagrad_"
    yield from _tables(op)
    yield from _tensors(op, "state")
    yield from _tensors(op, "grad")
    yield Bad(op, "state", ones(6), "[6]")
    yield Bad(op, "state", ones(7, 1), "[7, 1]")
    yield Bad(op, "grad", ones(2, 3, 5), "5")
    yield Bad(op, "grad", ones(6, 4), "[6, 4]")
    for name in ("lr", "eps", "max_norm"):
        yield Bad(op, name, NAN, "nan")
        yield Bad(op, name, "0.1", "str")
        if name == "lr":
            yield Bad(op, name, INF, "inf")
        else:
            yield Bad(op, name, -1.0, "-1")
    yield Bad(op, "weight", ones(1, 4).expand(7, 4), "expanded")
    yield Bad(op, "state", ones(1).expand(7), "expanded")


def _written() -> Iterator[Bad]:
    """Tensors without memory of their own cannot be written."""
    for op in ("pgd_step_", "project_", "gaussian_noise_", "momentum_step_"):
        yield Bad(op, GROUP_OPS[op][0], ones(1, 5, 6).expand(SHAPE), "expanded")
    yield Bad("momentum_step_", "velocity", ones(4, 5, 1).expand(SHAPE), "expanded")
    shared = ones(*SHAPE)
    yield Bad(
        "momentum_step_", "velocity", shared, "shares memory with velocity", {"delta": shared}
    )


CASES = [
    *(bad for op in GROUP_OPS for bad in _group_op(op)),
    *(bad for op in ("per_sample_norm", "clip_and_sum") for bad in _lists(op)),
    *_clip_and_sum(),
    *_linear_grad_norm(),
    *_embedding_grad_norm(),
    *_embedding_grad_sum(),
    *_embedding_perturb(),
    *_rowwise_adagrad(),
    *_written(),
]


@pytest.mark.parametrize("op", ops.__all__)
def test_good_arguments_are_good(op: str) -> None:
    getattr(ops, op)(**good(op))


@pytest.mark.parametrize("op", ops.__all__)
def test_no_argument_is_left_out(op: str) -> None:
    shown = {bad.argument for bad in CASES if bad.op == op}
    assert shown == set(inspect.signature(getattr(ops, op)).parameters)


@pytest.mark.parametrize("bad", [pytest.param(b, id=f"{b.op}-{b.argument}") for b in CASES])
def test_wrong_arguments_are_named_and_nothing_is_written(bad: Bad) -> None:
    if devices.kind == "cuda" and bad.told_by_values:
        pytest.skip("values on CUDA are not checked")
    call = {**good(bad.op), **bad.others, bad.argument: bad.value}
    before = {name: t.clone() for name, t in call.items() if isinstance(t, Tensor)}
    with pytest.raises((ValueError, TypeError)) as caught:
        getattr(ops, bad.op)(**call)
    message = str(caught.value)
    assert message.startswith(f"embattle.{bad.op}: ")
    text = message.removeprefix(f"embattle.{bad.op}: ")
    assert bad.argument in text, message
    assert bad.said in text, message
    assert "\n" not in message
    for name, kept in before.items():
        assert same_bits(call[name], kept), f"{name} was written"
