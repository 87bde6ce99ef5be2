"""How the CUDA launchers deal with the runtime, in the emulator.

What kernels were compiled for, limits of shared memory, errors; and that kernels take what the
CPU's take.
"""

from __future__ import annotations

import hostile_values as hostile
import pytest
import samples
import torch
from compare import assert_matches_reference, run, same_bits
from emulated_case import IN_EMULATOR, ORDERS, emulated

pytestmark = IN_EMULATOR


@pytest.mark.parametrize("code", [80, 89, 90, 100])
def test_kernels_that_are_older_than_the_device_use_no_clusters(code: int) -> None:
    # Code for 8.0 that a driver has translated for a device of capability 9.0.
    kernels = emulated.kernels()
    small = {"shared_per_block": 8192, "shared_per_multiprocessor": 18432}
    kernels.set_device(multiprocessors=2, major=9, code=code, **small)
    kernels.take_counters()
    g = torch.Generator().manual_seed(5)
    delta, grad = torch.randn(2, 2, 11, 307, generator=g)
    for norm in samples.NORMS:
        call = samples.Call([delta], {"norm": norm})
        assert_matches_reference("group_norm", call, run("group_norm", call.clone(), emulated))
        call = samples.Call([delta, grad], {"norm": norm, "eps": 2.0, "step_size": 0.7})
        assert_matches_reference("pgd_step", call, run("pgd_step", call.clone(), emulated))
    counters = kernels.take_counters()
    assert (counters["clusters"] > 0) == (code >= 90)


def test_the_kernels_are_behind_the_checks_of_the_package() -> None:
    x = torch.randn(3, 5)
    with pytest.raises(ValueError, match=r"embattle\.pgd_step: grad must have the shape of delta"):
        emulated.pgd_step(x, x[:, :4], step_size=0.1, eps=1.0)
    with pytest.raises(ValueError, match=r"embattle\.pgd_step_: eps must not be negative, got -1"):
        emulated.pgd_step_(x, x, step_size=0.1, eps=torch.tensor([1.0, -1.0, 1.0]))
    transposed = torch.randn(5, 3).t()
    once = emulated.project(transposed, eps=0.5)
    assert same_bits(emulated.project_(transposed, eps=0.5), once)  # through a packed copy
    assert transposed.t().is_contiguous()


def test_no_call_lowers_what_another_was_allowed() -> None:
    # Host threads share a kernel's limit; so do a captured graph and a later call.
    kernels = emulated.kernels()
    kernels.take_counters()
    for tokens in (8000, 4096, 5000):
        ids = torch.arange(tokens)[None] % 7
        emulated.embedding_grad_norm(ids, torch.ones(1, tokens, 1))
        counters = kernels.take_counters()
        assert counters["largest_shared"] > 48 << 10, "no launch that needs to be allowed"
        assert counters["lowered_limits"] == 0


def test_a_refused_launch_leaves_no_error_behind() -> None:
    kernels = emulated.kernels()
    x = torch.randn(3, 5)
    kernels.refuse_launches(1)
    with pytest.raises(RuntimeError, match="refused"):
        emulated.group_norm(x)
    assert kernels.last_error() == 0
    torch.testing.assert_close(emulated.group_norm(x), x.norm(dim=1))


def test_an_error_of_others_is_not_taken_for_ones_own() -> None:
    kernels = emulated.kernels()
    kernels.leave_error()
    x = torch.randn(3, 5)
    torch.testing.assert_close(emulated.group_norm(x), x.norm(dim=1))
    assert kernels.last_error() != 0, "it is for others to see"
    kernels.forget_error()


@pytest.mark.parametrize(("count", "launches"), [(0, 0), (1, 2), (2048, 2), (2049, 3)])
def test_a_short_batch_is_sorted_in_one_launch_and_a_long_one_by_cub(
    count: int, launches: int
) -> None:
    kernels = emulated.kernels()
    inverse = torch.arange(count) % 5
    kernels.take_counters()
    sums = emulated.segment_sum(torch.ones(count, 3), inverse, 5)
    assert kernels.take_counters()["launches"] == launches  # one of them sums
    assert torch.equal(sums[:, 0], torch.bincount(inverse, minlength=5).float())


def test_a_refused_sort_fails_and_an_error_of_others_does_not() -> None:
    kernels = emulated.kernels()
    grad, inverse = torch.ones(3000, 2), torch.arange(3000) % 7
    want = torch.zeros(7, 2).index_add_(0, inverse, grad)
    for after in range(3):  # the pairs, CUB's sort, the sums
        kernels.refuse_launches(1, after)
        with pytest.raises(RuntimeError, match="refused"):
            emulated.segment_sum(grad, inverse, 7)
        assert kernels.last_error() == 0
    kernels.leave_error()
    assert torch.equal(emulated.segment_sum(grad, inverse, 7), want)
    assert kernels.last_error() == 0, "CUB takes all errors"


def test_long_samples_are_sorted_not_searched() -> None:
    kernels = emulated.kernels()
    kernels.set_device(shared_per_block=2048)  # room for 64 indices
    accesses = {}
    for tokens in (64, 65, 500, 1000):
        ids = torch.arange(tokens)[None] * 3  # none repeats: a search looks at all that come before
        call = samples.Call([ids, torch.ones(1, tokens, 1)], {})
        kernels.take_counters()
        results = run("embedding_grad_norm", call.clone(), emulated)
        accesses[tokens] = kernels.take_counters()["accesses"]
        assert_matches_reference("embedding_grad_norm", call, results)
    # Of n log(n)^2 comparisons; squares would be 4 and more.
    assert accesses[65] <= 3.5 * accesses[64]
    assert accesses[1000] <= 3 * accesses[500]


@pytest.mark.parametrize("order", ORDERS, ids=lambda o: f"{o[0]}{o[1]}")
def test_long_bags_beside_short_ones(order: tuple[str, int]) -> None:
    kernels = emulated.kernels()
    kernels.set_order(*order)
    kernels.set_device(shared_per_block=2048)
    g = torch.Generator().manual_seed(2)
    lengths = [0, 3, 300, 0, 129, 64, 65, 1]
    ids = torch.randint(0, 50, (sum(lengths),), generator=g)
    for mode in ("sum", "mean"):
        call = samples.Call([ids, torch.randn(len(lengths), 6, generator=g)], {"mode": mode})
        call.kwargs["offsets"] = torch.tensor([0, *lengths]).cumsum(0)
        call.kwargs["padding_idx"] = 4
        results = run("embedding_grad_norm", call.clone(), emulated)
        assert_matches_reference("embedding_grad_norm", call, results)


@pytest.mark.parametrize("dtype", samples.DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("style", ["mi", "apgd"])
def test_a_velocity_may_be_of_any_dtype(style: str, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(8)
    shape = (3, 4, 9)
    for other in samples.DTYPES:
        for norm in samples.NORMS:
            delta, grad = (torch.randn(shape, generator=g).to(dtype) for _ in range(2))
            velocity = torch.randn(shape, generator=g).to(other)
            options = {"decay": 0.75, "style": style, "step_size": 0.5, "eps": 2.0, "norm": norm}
            for extra in (
                {},
                {"mask": torch.rand(shape[:-1], generator=g) > 0.3},
                {"mask": torch.rand(shape[:-1], generator=g) > 0.3, "x0": delta / 2, "upper": 0.4},
            ):
                call = samples.Call([delta, velocity, grad], {**options, **extra})
                results = run("momentum_step", call.clone(), emulated)
                assert results[1].dtype == other
                assert_matches_reference("momentum_step", call, results)


def test_rows_that_never_had_a_gradient_stay_with_eps_0() -> None:
    for dtype in samples.DTYPES:
        weight, state = torch.ones(3, 4, dtype=dtype), torch.zeros(3, dtype=dtype)
        ids, grad = torch.tensor([0, 2, 2]), torch.zeros(3, 4, dtype=dtype)
        grad[0, 1] = 2.0
        call = samples.Call([weight, state, ids, grad], {"lr": 0.1, "eps": 0.0})
        changed = call.clone()
        results = run("rowwise_adagrad_", changed, emulated)
        assert_matches_reference("rowwise_adagrad_", call, results)
        assert (changed.args[0][2] == 1).all()


@pytest.mark.parametrize("op", hostile.OPS)
def test_hostile_values_give_what_the_reference_says(op: str) -> None:
    for seed in range(30):
        emulated.kernels().set_order(*ORDERS[seed % 4])
        call = hostile.call(op, 1000 + seed)
        hostile.assert_matches(op, call, run(op, call.clone(), emulated), 1000 + seed)


def test_a_box_that_wins_wins_in_the_kernels_too() -> None:
    g = torch.Generator().manual_seed(3)
    for dtype in samples.DTYPES:
        x0 = torch.randn(2, 40, generator=g).to(dtype)
        x = (x0.double() * 1.5 + 0.7).to(dtype)
        for norm in samples.NORMS:
            for eps in (0.0, 0.3, 2.0, 4.0):
                options = {"eps": eps, "norm": norm, "x0": x0, "lower": -0.4, "upper": 0.9}
                call = samples.Call([x], options)
                results = run("project", call.clone(), emulated)
                assert_matches_reference("project", call, results)
                again = emulated.project(results[0], **options)
                assert same_bits(again, results[0])
