"""The CUDA kernels on per-sample gradients and embedding tables, run by the emulator."""

from __future__ import annotations

import pytest
import samples
import torch
from compare import assert_close, assert_matches_reference, run, same_bits
from emulated_case import IN_EMULATOR, ORDERS, emulated

pytestmark = IN_EMULATOR


@pytest.mark.parametrize("order", ORDERS, ids=lambda o: f"{o[0]}{o[1]}")
@pytest.mark.parametrize("multiprocessors", [1, 8])
def test_a_list_takes_one_launch_and_a_long_one_as_few_as_its_arguments_allow(
    multiprocessors: int, order: tuple[str, int]
) -> None:
    kernels = emulated.kernels()
    g = torch.Generator().manual_seed(1)
    widths = [1 + i % 3 for i in range(70)]
    widths[3], widths[66], widths[67] = 5_001, 1024, 0
    # Where blocks cannot wait for each other, every step is a launch.
    for count, mode, launches, apart in (
        (70, "flat", 3, 5),
        (70, "per_layer", 2, 6),
        (64, "flat", 1, 3),
        (64, "automatic", 1, 3),
    ):
        grads = [torch.randn(5, w, generator=g) for w in widths[-count:]]
        grads[-4][3, 7] = torch.nan
        call = samples.Call([grads], {"max_norm": 1.5, "mode": mode})
        for cooperative in (True, False):
            kernels.set_device(multiprocessors=multiprocessors, cooperative=cooperative)
            kernels.set_order(*order)
            kernels.take_counters()
            results = run("clip_and_sum", call.clone(), emulated)
            counters = kernels.take_counters()
            assert counters["launches"] == (launches if cooperative else apart)
            assert (counters["cooperative"] > 0) is cooperative
            assert_matches_reference("clip_and_sum", call, results)
            norms = run("per_sample_norm", samples.Call([grads], {}), emulated)
            assert_matches_reference("per_sample_norm", samples.Call([grads], {}), norms)
            steps = (count + 63) // 64 if cooperative else (count + 63) // 64 + 1
            assert kernels.take_counters()["launches"] == steps


@pytest.mark.parametrize("order", ORDERS, ids=lambda o: f"{o[0]}{o[1]}")
def test_samples_and_pieces_spread_over_any_number_of_blocks(order: tuple[str, int]) -> None:
    kernels = emulated.kernels()
    g = torch.Generator().manual_seed(7)
    for batch, width, multiprocessors in ((3, 30_000, 1), (3, 30_000, 4), (70, 33, 3), (1, 5, 4)):
        kernels.set_device(multiprocessors=multiprocessors)
        kernels.set_order(*order)
        grads = [torch.randn(batch, width, generator=g), torch.randn(batch, 7, generator=g)]
        for mode in ("flat", "per_layer", "automatic"):
            call = samples.Call([grads], {"max_norm": 100.0, "mode": mode})
            results = run("clip_and_sum", call.clone(), emulated)
            assert_matches_reference("clip_and_sum", call, results)
        norms = run("per_sample_norm", samples.Call([grads], {}), emulated)
        assert_matches_reference("per_sample_norm", samples.Call([grads], {}), norms)


@pytest.mark.parametrize("order", ORDERS, ids=lambda o: f"{o[0]}{o[1]}")
def test_norms_of_pieces_whose_squares_doubles_cannot_hold(order: tuple[str, int]) -> None:
    kernels = emulated.kernels()
    kernels.set_order(*order)
    grad = torch.randn(4, 3000, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    grad *= torch.tensor([[1e-200], [1e200], [0.0], [1.0]], dtype=torch.float64)
    call = samples.Call([[grad]], {"max_norm": 1.0})
    results = run("clip_and_sum", call.clone(), emulated)
    assert_matches_reference("clip_and_sum", call, results)


@pytest.mark.parametrize("dtype", samples.DTYPES, ids=lambda d: str(d)[6:])
def test_clipped_sums_are_the_same_bits_in_every_order_and_at_every_address(
    dtype: torch.dtype,
) -> None:
    g = torch.Generator().manual_seed(2)
    grad = torch.randn(37, 129, generator=g).to(dtype)
    results = []
    for order in ORDERS:
        emulated.kernels().set_order(*order)
        for offset in (0, 1, 3):
            memory = torch.empty(grad.numel() + 4, dtype=dtype)
            view = memory[offset : offset + grad.numel()].view(grad.shape).copy_(grad)
            results.append(emulated.clip_and_sum([view], max_norm=3.0))
    for sums, norms in results[1:]:
        assert same_bits(sums[0], results[0][0][0])
        assert same_bits(norms, results[0][1])


@pytest.mark.parametrize("order", ORDERS, ids=lambda o: f"{o[0]}{o[1]}")
@pytest.mark.parametrize("method", ["gram", "direct"])
def test_linear_norms_where_tokens_cancel_are_taken_again(
    method: str, order: tuple[str, int]
) -> None:
    emulated.kernels().set_order(*order)
    g = torch.Generator().manual_seed(3)
    a, b = torch.randn(3, 40, 70, generator=g), torch.randn(3, 40, 33, generator=g)
    a[1, 20:], b[1, 20:] = a[1, :20], -b[1, :20]
    b[1, 0] *= 1 + 2.0**-12
    a[2] *= 1e-30  # squares that float32 cannot hold
    for bias in (False, True):
        call = samples.Call([a, b], {"method": method, "bias": bias})
        results = run("linear_grad_norm", call.clone(), emulated)
        assert_matches_reference("linear_grad_norm", call, results)
    few = [(8 * x[:1]).round() / 8 for x in (a, b)]  # few digits, which denormal numbers have too
    near = run("linear_grad_norm", samples.Call(few, {}))[0].double()
    for left, right in ((300, 300), (-1030, 700)):
        far = [x.double() * 2.0**by for x, by in zip(few, (left, right), strict=True)]
        norm = emulated.linear_grad_norm(*far, method=method) / 2.0 ** (left + right)
        assert torch.allclose(norm, near)
    b[1, 20:] = -b[1, :20]  # nothing is left
    assert emulated.linear_grad_norm(a, b, method=method)[1] < 1e-10


@pytest.mark.parametrize("order", ORDERS, ids=lambda o: f"{o[0]}{o[1]}")
def test_samples_that_shared_memory_cannot_sort(order: tuple[str, int]) -> None:
    kernels = emulated.kernels()
    kernels.set_device(shared_per_block=2048)
    kernels.set_order(*order)
    g = torch.Generator().manual_seed(4)
    indices = torch.randint(0, 40, (3, 150), generator=g)
    grad = torch.randn(3, 150, 5, generator=g)
    call = samples.Call([indices, grad], {"padding_idx": 7})
    assert_matches_reference(
        "embedding_grad_norm", call, run("embedding_grad_norm", call.clone(), emulated)
    )
    kernels.set_device()
    # One bag far beyond the average.
    offsets = torch.tensor([*range(30), 430])
    bags = samples.Call([torch.randint(0, 9, (430,), generator=g), torch.randn(30, 6)], {})
    bags.kwargs["offsets"] = offsets
    results = run("embedding_grad_norm", bags.clone(), emulated)
    assert_matches_reference("embedding_grad_norm", bags, results)


@pytest.mark.parametrize("order", ORDERS, ids=lambda o: f"{o[0]}{o[1]}")
@pytest.mark.parametrize("dtype", samples.DTYPES, ids=lambda d: str(d)[6:])
def test_segment_sums(dtype: torch.dtype, order: tuple[str, int]) -> None:
    emulated.kernels().set_order(*order)
    g = torch.Generator().manual_seed(5)
    # Few and many items, short and long runs, one pass of the sort and three, untouched rows.
    for count, rows, dim in (
        (0, 3, 4),
        (7, 4, 1),
        (300, 3, 13),
        (900, 5, 150),
        (2500, 200, 3),
        (5000, 70_000, 2),
    ):
        inverse = torch.randint(-1, rows, (count,), generator=g)
        inverse[inverse == 1] = -1
        if rows > 1000:
            inverse[::3] = 65_537  # hot, and its lowest digits are those of others
        grad = torch.randn(count, dim, generator=g).to(dtype)
        kept = inverse >= 0
        want = torch.zeros(rows, dim, dtype=torch.float64)
        want.index_add_(0, inverse[kept], grad[kept].double())
        size = torch.zeros(rows, dim, dtype=torch.float64)
        size.index_add_(0, inverse[kept], grad[kept].double().abs())
        assert_close(emulated.segment_sum(grad, inverse, rows), want, size, count, str(dtype))


@pytest.mark.parametrize("count", [1500, 2500])  # by our own sort and by CUB's
@pytest.mark.parametrize("rows", [1, 2, 255, 256, 257, 65_535, 65_536])
def test_what_is_in_no_row_comes_behind_the_last_row(rows: int, count: int) -> None:
    g = torch.Generator().manual_seed(8)
    inverse = torch.randint(0, rows, (count,), generator=g)
    inverse[::5] = rows - 1
    inverse[1::3] = -1
    grad = torch.randint(-9, 9, (count, 2), generator=g).float()
    kept = inverse >= 0
    want = torch.zeros(rows, 2).index_add_(0, inverse[kept], grad[kept])
    assert torch.equal(emulated.segment_sum(grad, inverse, rows), want)


@pytest.mark.parametrize("order", ORDERS, ids=lambda o: f"{o[0]}{o[1]}")
@pytest.mark.parametrize("dtype", samples.DTYPES, ids=lambda d: str(d)[6:])
def test_weighted_sums_beside_a_padding_row(dtype: torch.dtype, order: tuple[str, int]) -> None:
    emulated.kernels().set_order(*order)
    g = torch.Generator().manual_seed(9)
    # Runs of a team and of the block, of the padding as well; one item a sample and many.
    for shape, rows, dim in (((7, 9), 4, 5), ((300,), 3, 13), ((40, 3, 7), 5, 150), ((3, 1), 9, 2)):
        indices = torch.randint(0, rows, shape, generator=g)
        grad = torch.randn(*shape, dim, generator=g).to(dtype)
        for weights in samples.DTYPES:
            for padding in (None, int(indices.flatten()[0]), rows - 1):
                options = {
                    "weights": torch.randn(shape[0], generator=g).to(weights),
                    "padding_idx": padding,
                }
                call = samples.Call([indices, grad, rows], options)
                sums = run("embedding_grad_sum", call.clone(), emulated)
                assert_matches_reference("embedding_grad_sum", call, sums)
                if padding is not None:
                    assert not sums[0][padding].any()


@pytest.mark.parametrize("order", ORDERS, ids=lambda o: f"{o[0]}{o[1]}")
def test_a_step_of_hot_rows(order: tuple[str, int]) -> None:
    emulated.kernels().set_order(*order)
    g = torch.Generator().manual_seed(6)
    for dim in (6, 200):
        indices = torch.randint(0, 4, (500,), generator=g) * 97
        call = samples.Call(
            [
                torch.randn(300, dim, generator=g),
                torch.rand(300, generator=g),
                indices,
                torch.randn(500, dim, generator=g),
            ],
            {"lr": 0.1, "max_norm": 3.0},
        )
        call.args[3][5, 1] = torch.nan
        changed = call.clone()
        assert_matches_reference(
            "rowwise_adagrad_", call, run("rowwise_adagrad_", changed, emulated)
        )
        bad = int(indices[5])
        assert same_bits(changed.args[0][bad], call.args[0][bad])
