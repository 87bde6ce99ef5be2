"""The CUDA kernels of the group ops against the reference, run by the emulator.

Their paths (lanes of a warp, a block, clusters, blocks at large, groups that shared memory does not
hold) are forced by small devices.
"""

from __future__ import annotations

import pytest
import samples
import torch
from compare import assert_matches_reference, distances, run, same_bits
from emulated_case import IN_EMULATOR, ORDERS, emulated

pytestmark = IN_EMULATOR

#: Devices on which longer groups leave shared memory: multiprocessors, capability, bytes of it.
DEVICES = {
    "clusters": {"multiprocessors": 2, "major": 9, "shared_per_block": 8192},
    "overflow": {"multiprocessors": 1, "major": 9, "shared_per_block": 4096},
    "no_clusters": {"multiprocessors": 3, "major": 8, "shared_per_block": 8192},
    "no_clusters_overflow": {"multiprocessors": 1, "major": 8, "shared_per_block": 4096},
}


@pytest.mark.parametrize("order", ORDERS, ids=lambda o: f"{o[0]}{o[1]}")
@pytest.mark.parametrize("norm", samples.NORMS)
@pytest.mark.parametrize("device", DEVICES)
def test_long_groups_take_every_path(device: str, norm: str, order: tuple[str, int]) -> None:
    kernels = emulated.kernels()
    kernels.set_device(**DEVICES[device], shared_per_multiprocessor=18432)
    kernels.set_order(*order)
    kernels.take_counters()
    g = torch.Generator().manual_seed(5)
    for shape in ((2, 11, 307), (1, 9001)):
        delta, grad, x0 = (torch.randn(shape, generator=g) for _ in range(3))
        mask = torch.rand(shape[:-1], generator=g) > 0.2
        options = {"eps": 2.0, "step_size": 0.7, "norm": norm}
        for extra in ({}, {"mask": mask}, {"x0": x0, "lower": -4.0, "upper": 4.0}):
            call = samples.Call([delta, grad], {**options, **extra})
            assert_matches_reference("pgd_step", call, run("pgd_step", call.clone(), emulated))
        call = samples.Call([delta], {"norm": norm})
        assert_matches_reference("group_norm", call, run("group_norm", call.clone(), emulated))
        call = samples.Call([delta], {"norm": norm, "eps": 1.5})
        assert_matches_reference("random_start", call, run("random_start", call.clone(), emulated))
    counters = kernels.take_counters()
    assert counters["clusters" if DEVICES[device]["major"] >= 9 else "cooperative"] > 0


@pytest.mark.parametrize("norm", samples.NORMS)
def test_a_cluster_reads_again_what_it_has_no_room_for(norm: str) -> None:
    kernels = emulated.kernels()
    kernels.set_device(**DEVICES["clusters"], shared_per_multiprocessor=18432)
    kernels.take_counters()
    g = torch.Generator().manual_seed(6)
    tensors = [torch.randn(2, 5501, generator=g) for _ in range(3)]  # eight blocks hold 4693
    for style in ("mi", "apgd"):
        options = {"decay": 0.75, "step_size": 0.7, "eps": 2.0, "norm": norm, "style": style}
        call = samples.Call(tensors, options)
        assert_matches_reference(
            "momentum_step", call, run("momentum_step", call.clone(), emulated)
        )
    counters = kernels.take_counters()
    if norm != "l1":  # whose kernel has no registers for two blocks
        assert counters["clusters"] == 2
        assert counters["cooperative"] == 0


@pytest.mark.parametrize("norm", samples.NORMS)
@pytest.mark.parametrize("dtype", samples.DTYPES, ids=lambda d: str(d)[6:])
def test_a_projection_lies_in_its_ball_and_is_idempotent(dtype: torch.dtype, norm: str) -> None:
    g = torch.Generator().manual_seed(3)
    for scale in (1e-3, 1.0, 1e3):
        delta = (torch.randn(7, 613, generator=g) * scale).to(dtype)
        for x0 in (None, torch.randn(7, 613, generator=g).to(dtype)):
            options = {"eps": 0.37, "norm": norm, **({} if x0 is None else {"x0": x0})}
            once = emulated.project(delta, **options)
            assert (distances(samples.Call([once], options), once) <= 0.37).all()
            assert same_bits(emulated.project(once, **options), once)


@pytest.mark.parametrize("dtype", samples.DTYPES, ids=lambda d: str(d)[6:])
def test_views_at_every_offset_leave_their_surroundings_alone(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(4)
    grad = torch.randn(5, 33, generator=g).to(dtype)
    start = torch.randn(5, 33, generator=g).to(dtype)
    want = emulated.pgd_step(start, grad, eps=0.5, step_size=0.3)
    for offset in range(9):
        memory = torch.full((5 * 33 + 16,), 77.0, dtype=dtype)
        view = memory[offset : offset + 5 * 33].view(5, 33).copy_(start)
        emulated.pgd_step_(view, grad, eps=0.5, step_size=0.3)
        assert same_bits(view, want)
        assert (memory[:offset] == 77).all()
        assert (memory[offset + 5 * 33 :] == 77).all()
