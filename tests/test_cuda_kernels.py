"""Every sample of every op against the reference: the CUDA kernels, run by the emulator."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import samples
import torch
from compare import assert_matches_reference, run
from emulated_case import IN_EMULATOR, ORDERS, emulated

pytestmark = IN_EMULATOR

GROUP_OPS, OTHER_OPS = samples.GROUP_OPS, samples.OPS[len(samples.GROUP_OPS) :]


def cases(ops: Sequence[str]) -> Iterator[tuple[str, samples.Sample, torch.dtype, tuple[str, int]]]:
    """Each sample in two dtypes; dtypes and orders take turns."""
    turn = 0
    for op in ops:
        for sample in samples.for_op(op):
            for _ in range(2):
                yield op, sample, samples.DTYPES[turn % 4], ORDERS[turn // 2 % 4]
                turn += 1
            turn += 1


@pytest.mark.parametrize(
    ("op", "sample", "dtype", "order"),
    [
        pytest.param(*case, id=f"{case[0]}-{case[1].name}-{str(case[2])[6:]}-{case[3][0]}")
        for case in (*cases(GROUP_OPS), *cases(OTHER_OPS))
    ],
)
def test_a_kernel_matches_the_reference(
    op: str, sample: samples.Sample, dtype: torch.dtype, order: tuple[str, int]
) -> None:
    emulated.kernels().set_order(*order)
    call = sample.call(dtype)
    assert_matches_reference(op, call, run(op, call.clone(), emulated))
