"""Every op on a real GPU: the reference, the CPU, graph capture, two streams, two devices."""

from __future__ import annotations

import embattle as eb
import hostile_values as hostile
import pytest
import samples
import torch
import toys
from compare import assert_matches_reference, run, same_bits
from embattle import _C, ops

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and _C.build_info()["cuda"]),
    reason="needs a GPU and a build with CUDA kernels",
)


def on_gpu(call: samples.Call, device: str = "cuda") -> samples.Call:
    return call.map(lambda t: t.detach().to(device))


@pytest.mark.parametrize("dtype", samples.DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("op", samples.OPS)
def test_a_gpu_matches_the_reference(op: str, dtype: torch.dtype) -> None:
    for sample in samples.for_op(op):
        results = run(op, on_gpu(sample.call(dtype)))
        assert_matches_reference(op, sample.call(dtype), [r.cpu() for r in results])


@pytest.mark.parametrize("op", samples.OPS)
def test_results_are_the_same_in_every_run(op: str) -> None:
    for sample in samples.for_op(op):
        first, second = (run(op, on_gpu(sample.call())) for _ in range(2))
        assert all(same_bits(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("op", samples.OPS)
def test_a_captured_call_gives_the_same_bits(op: str) -> None:
    if op in ("random_start", "gaussian_noise"):
        pytest.skip("fresh numbers at every replay: a test of their own")
    for sample in samples.for_op(op)[::5]:
        call = on_gpu(sample.call())
        want = run(op, call.clone())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = run(op, call)
        graph.replay()
        torch.cuda.synchronize()
        assert all(same_bits(a, b) for a, b in zip(results, want, strict=True)), sample.name


@pytest.mark.parametrize("op", samples.OPS)
def test_a_second_stream_gives_the_same_bits(op: str) -> None:
    stream = torch.cuda.Stream()
    for sample in samples.for_op(op)[::5]:
        call = on_gpu(sample.call())
        other = call.clone()
        torch.cuda.synchronize()
        want = run(op, call)
        with torch.cuda.stream(stream):
            results = run(op, other)
        torch.cuda.synchronize()
        assert all(same_bits(a, b) for a, b in zip(results, want, strict=True)), sample.name


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("op", samples.OPS)
def test_a_second_device_gives_the_same_bits(op: str) -> None:
    for sample in samples.for_op(op)[::5]:
        results = run(op, on_gpu(sample.call(), "cuda:1"))
        assert all(r.device.index == 1 for r in results)
        want = run(op, on_gpu(sample.call(), "cuda:0"))
        assert all(same_bits(a.cpu(), b.cpu()) for a, b in zip(results, want, strict=True))


@pytest.mark.parametrize("norm", samples.NORMS)
@pytest.mark.parametrize("shape", [(256, 32, 128), (4, 512, 768), (2, 3_000_001)])
def test_a_large_captured_step_is_what_the_reference_says(
    norm: str, shape: tuple[int, ...]
) -> None:
    # Sizes at which groups are shared by clusters, and by blocks at large; with an origin and a box
    # as well, which other kernels serve.
    delta, grad, x0 = torch.randn(3, *shape, device="cuda")
    options = {"step_size": 0.3, "eps": 1.0, "norm": norm}
    for more in ({}, {"x0": x0, "lower": -1.0, "upper": 1.5}):
        call = samples.Call([delta, grad], {**options, **more})
        want = run("pgd_step", call)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = run("pgd_step", call)
        graph.replay()
        torch.cuda.synchronize()
        assert same_bits(results[0], want[0])
        assert_matches_reference("pgd_step", call.map(lambda t: t.cpu()), [results[0].cpu()])


@pytest.mark.parametrize("op", hostile.OPS)
def test_hostile_values_give_what_the_reference_says(op: str) -> None:
    for seed in range(60):
        call = hostile.call(op, seed)
        results = run(op, on_gpu(call))
        hostile.assert_matches(op, call, [r.cpu() for r in results], seed)


def test_noise_under_capture_is_fresh_or_refused() -> None:
    x = torch.zeros(4, 100, device="cuda")
    generator = torch.Generator("cuda").manual_seed(1)
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        noise = ops.gaussian_noise(x, std=1.0, generator=generator)
    graph.replay()
    first = noise.clone()
    graph.replay()
    torch.cuda.synchronize()
    assert not torch.equal(first, noise)
    with pytest.raises(RuntimeError, match="generator"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        ops.gaussian_noise(x, std=1.0)


def test_two_streams_do_not_disturb_each_other() -> None:
    inputs = [torch.randn(2, 8, 200_000, device="cuda") for _ in range(2)]
    want = [ops.pgd_step(d, g, step_size=0.3, eps=1.0, norm="l1") for d, g in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    results: list[torch.Tensor] = []
    for _ in range(20):
        for (d, g), stream in zip(inputs, streams, strict=True):
            with torch.cuda.stream(stream):
                results.append(ops.pgd_step(d, g, step_size=0.3, eps=1.0, norm="l1"))
    torch.cuda.synchronize()
    for i, result in enumerate(results):
        assert same_bits(result, want[i % 2])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_device_of_the_data_counts_not_the_current_one() -> None:
    x = torch.randn(4, 1000, device="cuda:1")
    result = ops.project(x, eps=1.0)
    assert result.device == x.device
    assert same_bits(result.cpu(), ops.project(x.to("cuda:0"), eps=1.0).cpu())


@pytest.mark.parametrize("norm", samples.NORMS)
def test_an_attack_finds_on_a_gpu_what_it_finds_on_the_cpu(norm: str) -> None:
    found = []
    for device in ("cpu", "cuda"):
        model = toys.encoder().to(device)
        tokens, labels = (t.to(device) for t in toys.text_batch())
        site = eb.Site(model.embedding)
        attack = eb.PGD(norm=norm, eps=0.5, step_size=0.2, steps=4)
        adversary = attack.run(toys.classify(model, tokens, labels), site, mask=tokens != 0)
        found.append(adversary.deltas[0].detach().cpu())
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-8)


def test_the_gradient_to_a_perturbed_table_is_that_of_the_cpu() -> None:
    call = samples.for_op("embedding_perturb")[0].call(torch.float64)
    grads = []
    for device in ("cpu", "cuda"):
        weight, indices, delta, inverse = (t.to(device) for t in call.args)
        delta = delta.requires_grad_()
        ops.embedding_perturb(weight, indices, delta, inverse).square().sum().backward()
        grads.append(delta.grad.cpu())
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(("count", "rows"), [(2049, 255), (70_000, 3), (1_000_000, 1 << 20)])
def test_a_long_batch_is_sorted_by_cub_in_a_graph_and_out_of_it(count: int, rows: int) -> None:
    # The emulator does not run the kernels of CUB.
    g = torch.Generator().manual_seed(2)
    inverse = torch.randint(-1, rows, (count,), generator=g)
    grad = torch.randint(-9, 9, (count, 3), generator=g).float()
    kept = inverse >= 0
    want = torch.zeros(rows, 3).index_add_(0, inverse[kept], grad[kept])
    inputs = grad.cuda(), inverse.cuda(), rows
    assert torch.equal(torch.ops.embattle.embedding_perturb_backward(*inputs).cpu(), want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sums = torch.ops.embattle.embedding_perturb_backward(*inputs)
    for _ in range(2):
        sums.fill_(7)
        graph.replay()
        assert torch.equal(sums.cpu(), want)
