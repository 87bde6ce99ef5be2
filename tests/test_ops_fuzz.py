"""Every op against the reference on calls as they come.

What is drawn is in tests/hostile_values.py: shapes, strides, offsets into memory, masks, boxes,
dtypes, values. EMBATTLE_FUZZ_CASES is how many calls are drawn (2,000, the same each time). Above
that hypothesis draws them, others each time, and makes simple what fails; a call that takes 50
times the median of its op and size fails, too.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from random import Random
from typing import Any

import hostile_values as hostile
import pytest
import samples
import torch
from compare import assert_close, run, same_bits
from embattle import ops
from samples import Call
from torch import Tensor

CASES = int(os.environ.get("EMBATTLE_FUZZ_CASES", "2000"))
NIGHT = CASES > 2000
PARTS = 8
OPS = (*hostile.OPS, *samples.WRITING, "embedding_grad_rows", "embedding_perturb_backward")
WRITTEN = {**samples.WRITING, "rowwise_adagrad_": 2}  # the first of their arguments
SLOW = 50  # times the median


def described(call: Call) -> str:
    """All that a call is given; of large tensors no values."""

    def words(value: Any) -> str:
        if isinstance(value, list):
            return f"[{', '.join(map(words, value))}]"
        if not isinstance(value, Tensor):
            return repr(value)
        where = f"{str(value.dtype)[6:]} {list(value.shape)}, strides {list(value.stride())}"
        where += f", offset {value.storage_offset()}"
        return f"<{where}{f': {value.tolist()}' if value.numel() <= 12 else ''}>"

    named = [f"{name}={words(value)}" for name, value in call.kwargs.items()]
    return ", ".join([*map(words, call.args), *named])


# ---- What is the same for all ----


class Times:
    """How long calls took, by op and size: the slowest of them are kept and timed again."""

    def __init__(self) -> None:
        self.taken: dict[tuple[str, int], list[float]] = {}
        self.slowest: dict[tuple[str, int], list[tuple[float, Call]]] = {}

    def add(self, op: str, call: Call, elements: int, seconds: float) -> None:
        size = (op, elements.bit_length() // 2)  # within a factor of 4
        self.taken.setdefault(size, []).append(seconds)
        kept = [*self.slowest.get(size, []), (seconds, call)]
        self.slowest[size] = sorted(kept, key=lambda pair: pair[0])[-3:]

    def faults(self) -> list[str]:
        found = []
        for (op, size), taken in self.taken.items():
            median = statistics.median(taken)
            for once, call in self.slowest[op, size]:
                if len(taken) < 20 or once <= SLOW * median:
                    continue
                again = min(timed(op, call)[1] for _ in range(5))
                if again > SLOW * median:
                    found.append(f"{op}({described(call)}) takes {again / median:.0f} medians")
        return found


def functional(op: str) -> str:
    """The op that an in-place form stands for."""
    return op.removesuffix("_") if op in samples.WRITING else op


def drawn(op: str, d: hostile.Draw) -> Call:
    """What a form is given; what it writes lies anyhow in memory that is not its alone."""
    if op == "embedding_perturb_backward":
        weight, _, delta, inverse = hostile.draw("embedding_perturb", d).args
        grad = d.layout(d.moderate((*inverse.shape, weight.shape[1]), delta.dtype))
        return Call([grad, inverse, len(delta)], {})
    if op == "embedding_grad_rows":
        return hostile.draw("embedding_grad_sum", d)
    call = hostile.draw(functional(op), d)
    if op == "project" and d.chance(50):  # else it is a constant to autograd: another op
        call.args[0].requires_grad_()
    for index in range(WRITTEN.get(op, 0)):
        call.args[index] = d.placed(call.args[index].clone())
    return call


def native(op: str, call: Call, source: Any = ops) -> list[Tensor]:
    if op == "embedding_perturb_backward":
        return [torch.ops.embattle.embedding_perturb_backward(*call.args)]
    results = run(op, call, ops.embedding if op == "embedding_grad_rows" else source)
    return [t.detach() for t in results]


def timed(op: str, call: Call, source: Any = ops) -> tuple[list[Tensor], float]:
    begin = time.perf_counter()
    results = native(op, call, source)
    return results, time.perf_counter() - begin


def tensors(call: Call) -> list[Tensor]:
    found: list[Tensor] = []
    call.map(lambda t: (found.append(t), t)[1])
    return found


TIMES = Times()


@pytest.fixture(scope="module", autouse=True)
def none_is_slow() -> Iterator[None]:
    yield
    faults = TIMES.faults()
    assert not faults, "\n".join(faults)


def whole(t: Tensor) -> Tensor:
    """All the memory behind a view."""
    size = t.untyped_storage().nbytes() // t.element_size()
    return t.as_strided((size,), (1,), 0)


def checked(op: str, call: Call, source: Any = ops) -> list[Tensor]:
    """The results of a call that has written what it says, and nothing else."""
    count = WRITTEN.get(op, 0)
    before = [t.detach().clone() for t in tensors(call)]
    memory = [whole(t).clone() for t in call.args[:count]]
    results, seconds = timed(op, call, source)
    counted = call.kwargs.get("nonfinite")
    for given_, kept in zip(tensors(call)[count:], before[count:], strict=True):
        assert given_ is counted or same_bits(given_, kept), "the op wrote an argument"
    for view, around, result in zip(call.args[:count], memory, results, strict=False):
        assert result is view or same_bits(result, view)
        around.as_strided(view.shape, view.stride(), view.storage_offset()).copy_(view)
        assert same_bits(whole(view), around), "written beside the view"
    if NIGHT:
        elements = sum(t.numel() for t in (*tensors(call), *results))
        TIMES.add(op, call, elements, seconds)
    return results


# ---- What each form promises ----


def check_in_place(op: str, call: Call) -> None:
    """It writes the functional form's bits."""
    name = functional(op)
    wanted = checked(name, call)
    hostile.assert_matches(name, call, wanted, described(call))
    for result, want in zip(checked(op, call), wanted, strict=True):
        assert same_bits(result, want), "in place differs from functional"


def check_rows(call: Call) -> None:
    """The rows that occur, as the whole table has them."""
    found, sums = checked("embedding_grad_rows", call)
    occur, padding = call.args[0].unique().long(), call.kwargs["padding_idx"]
    assert torch.equal(found, occur if padding is None else occur[occur != padding])
    assert same_bits(sums, ops.embedding_grad_sum(*call.args, **call.kwargs)[found])


def check_perturb_backward(call: Call) -> None:
    """Sums by row of delta."""
    grad, inverse, rows = call.args
    kept = inverse.flatten() >= 0
    flat = grad.reshape(inverse.numel(), grad.shape[-1])[kept].double()
    sums, sizes = (
        flat.new_zeros(rows, grad.shape[-1]).index_add(0, inverse.flatten()[kept], part)
        for part in (flat, flat.abs())
    )
    (result,) = checked("embedding_perturb_backward", call)
    assert_close(result, sums.to(result.dtype), sizes, inverse.numel(), "a segment sum")


def check(op: str, call: Call) -> None:
    if op in samples.WRITING:
        check_in_place(op, call)
    elif op == "embedding_grad_rows":
        check_rows(call)
    elif op == "embedding_perturb_backward":
        check_perturb_backward(call)
    else:
        before = call.map(lambda t: t.detach().clone())
        hostile.assert_matches(op, before, checked(op, call), described(call))


def by_hypothesis(count: int) -> None:
    pytest.importorskip("hypothesis")
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    @settings(max_examples=count, database=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(OPS), st.randoms(use_true_random=False), st.integers(0, 2**31))
    def calls(op: str, choose: Random, seed: int) -> None:
        check(op, drawn(op, hostile.Draw(choose, seed, wide=True)))

    calls()


@pytest.mark.parametrize("part", range(PARTS))
def test_calls_as_they_come_are_what_the_reference_says(part: int) -> None:
    if NIGHT:
        by_hypothesis(CASES // PARTS)
        return
    # Hypothesis would draw others for each set of modules that the process has loaded.
    for seed in range(part, CASES, PARTS):
        op = OPS[seed // PARTS % len(OPS)]
        try:
            check(op, drawn(op, hostile.Draw(Random(seed), seed, wide=True)))
        except AssertionError as error:
            raise AssertionError(f"{op}, hostile.Draw(Random({seed}), {seed}): {error}") from error


def test_every_registered_op_is_drawn() -> None:
    registered = {
        name.removeprefix("embattle::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("embattle::")
    }
    seen: set[str] = set()
    from torch.utils._python_dispatch import TorchDispatchMode

    class Record(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func.namespace == "embattle":
                seen.add(func._schema.name.removeprefix("embattle::"))
            return func(*args, **(kwargs or {}))

    for seed in range(100):
        for op in OPS if registered != seen else ():
            call = drawn(op, hostile.Draw(Random(seed), seed, wide=True))
            with Record():
                native(op, call)
    assert registered == seen
