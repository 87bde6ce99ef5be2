"""What clippers elsewhere get wrong, what must be refused, and what has to work together."""

from __future__ import annotations

import math
import weakref
from typing import Any

import devices
import pytest
import torch
import torch.nn.functional as F
from clipping_cases import SAMPLES, Apply, assert_close, clipped_sum, gradients
from embattle.clipping import PerSampleClipper, RowSelection
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def loop(model: nn.Module, x: Tensor, samples: list[int] | None = None) -> list[list[Tensor]]:
    """Gradients of single samples, of the losses used below."""
    found = []
    for b in range(len(x)) if samples is None else samples:
        loss = model(x[b : b + 1]).square().sum()
        found.append(list(torch.autograd.grad(loss, list(model.parameters()))))
    return found


def losses(model: nn.Module, *batch: Tensor) -> Tensor:
    return model(*batch).flatten(1).square().sum(1)


def mlp(**options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).to(**options)


def test_duplicates_that_cancel_have_norm_zero() -> None:
    table = nn.Embedding(4, 3)
    signs = torch.tensor([1.0, -1.0])[:, None] * 1e3
    with PerSampleClipper(table, 1.0) as clipper:
        out = table(torch.tensor([[2, 2], [1, 3]]))
        result = clipper.backward((out * signs).flatten(1).sum(1))
    assert result.norms[0] == 0
    assert result.factors[0] == 1
    assert float(result.norms[1]) == pytest.approx(1e3 * math.sqrt(6))
    assert table.weight.grad is not None
    assert table.weight.grad.isfinite().all()


def test_a_gradient_of_zero_without_gamma() -> None:
    """C / (0 + 0) is no factor; its product with zero would be NaN."""
    layer = nn.Linear(3, 2)
    x = torch.randn(4, 3)
    with PerSampleClipper(layer, 2.0, "automatic", gamma=0.0, reduction="sum") as clipper:
        out = layer(x).sum(1) * torch.tensor([1.0, 0.0, 1.0, 0.0])
        result = clipper.backward(out)
    assert result.factors.tolist()[1::2] == [0, 0]
    unit = x / (2 * (x.square().sum(1, keepdim=True) + 1)).sqrt()
    assert layer.weight.grad is not None
    assert_close([layer.weight.grad], [(2 * unit[::2].sum(0)).expand(2, 3)], 1e-6)


def test_tokens_that_nearly_cancel() -> None:
    """A Gram matrix in float32 loses such a norm."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 64, bias=False)
    x = torch.randn(4, 1, 64).repeat(1, 2, 1)
    x[:, 1] += 1e-3 * torch.randn(4, 64)
    sign = torch.tensor([1.0, -1.0])[:, None]
    coefficients = torch.randn(4, 1, 64)
    with PerSampleClipper(layer, 1e-3) as clipper:
        result = clipper.backward((layer(x) * sign * coefficients).flatten(1).sum(1))
    exact = torch.einsum("bti,bto->boi", x.double(), (sign * coefficients).double())
    assert_close([result.norms], [exact.flatten(1).norm(dim=1)], 1e-4)


# 1e38 overflows in the weight's norm alone, so that per_layer rightly keeps the bias
@pytest.mark.parametrize(
    ("value", "mode"),
    [
        (math.inf, "flat"),
        (math.nan, "flat"),
        (1e38, "flat"),
        (math.inf, "per_layer"),
        (math.nan, "per_layer"),
        (math.nan, "automatic"),
    ],
)
def test_non_finite_samples_add_nothing(value: float, mode: str) -> None:
    model = mlp()
    x = torch.randn(4, 3)
    x[1] = value
    with PerSampleClipper(model, 0.5, mode, reduction="sum") as clipper:
        result = clipper.backward(model[0](x).square().sum(1))
    assert not bool(result.norms.reshape(4, -1)[1].isfinite().all())
    wanted, _ = clipped_sum(
        [
            [*torch.autograd.grad(model[0](x[b]).square().sum(), list(model[0].parameters()))]
            for b in (0, 2, 3)
        ],
        0.5,
        mode,
    )
    assert_close(gradients(model)[:2], wanted, 1e-5)


def test_weight_zero_removes_a_non_finite_sample() -> None:
    model = mlp()
    x = torch.randn(3, 3)
    x[2] = math.nan
    with PerSampleClipper(model, 0.5) as clipper:
        clipper.backward(losses(model, x), weights=torch.tensor([1.0, 1.0, 0.0]))
    assert all(g.isfinite().all() for g in gradients(model))


def test_users_and_weights_may_come_from_the_cpu() -> None:
    model = mlp()
    x = torch.randn(4, 3)
    found = []
    for device in ("cpu", x.device):
        model.zero_grad()
        users = torch.tensor([3, 1, 3, 2], device=device)
        weights = torch.tensor([1.0, 0.5, 1.0, 0.0], device=device)
        with PerSampleClipper(model, 0.5) as clipper:
            result = clipper.backward(losses(model, x), users=users, weights=weights)
        assert result.users is not None
        assert result.users.device == x.device
        found.append([result.norms, *gradients(model)])
    assert_close(*found, 0.0)


def test_parameters_used_elsewhere_raise() -> None:
    table = nn.Embedding(5, 3)
    model = Apply(lambda m, i: m.f(m.table(i)) @ m.table.weight.t(), table=table, f=nn.Linear(3, 3))
    with (
        PerSampleClipper(model, 1.0) as clipper,
        pytest.raises(RuntimeError, match=r"'table\.weight' is used where"),
    ):
        clipper.backward(losses(model, torch.tensor([1, 2, 3])))
    assert all(p.grad is None for p in model.parameters())


def test_coupled_samples_raise() -> None:
    table = nn.Embedding(SAMPLES, 3)
    model = Apply(
        lambda m, i: m.table(i) + m.pos(torch.arange(SAMPLES)), table=table, pos=nn.Embedding(9, 3)
    )
    ids = torch.randint(SAMPLES, (SAMPLES, SAMPLES))
    with (
        PerSampleClipper(model, 1.0) as clipper,
        pytest.raises(ValueError, match=r"in layer 'pos' \(Embedding\) the losses of some samples"),
    ):
        clipper.backward(losses(model, ids))
    linear = mlp()
    x = torch.randn(4, 3)
    with PerSampleClipper(linear, 1.0) as clipper:
        out = linear(x)
        in_batch = F.cross_entropy(out @ out.t(), torch.arange(4), reduction="none")
        with pytest.raises(ValueError, match="losses of some samples depend"):
            clipper.backward(in_batch)
    with (
        pytest.raises(ValueError, match=r"BatchNorm1d\) normalises over the batch"),
        PerSampleClipper(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), 1.0),
    ):
        pytest.fail("entered")


def test_wrong_calls_raise() -> None:
    model = mlp()
    x = torch.randn(4, 3)
    clipper = PerSampleClipper(model, 1.0)
    with pytest.raises(RuntimeError, match="inside 'with clipper:'"):
        clipper.backward(losses(model, x))
    with pytest.raises(ValueError, match="max_norm must be at least 0, got -1"):
        PerSampleClipper(model, -1)
    with pytest.raises(ValueError, match="max_norm must be at least 0, got nan"):
        PerSampleClipper(model, math.nan)
    with pytest.raises(ValueError, match="no module named 'nowhere'"):
        PerSampleClipper(model, 1.0, broadcast=["nowhere"])
    with clipper:
        with pytest.raises(ValueError, match=r"shape \[B\], got \(\)"):
            clipper.backward(losses(model, x).mean())
        with pytest.raises(ValueError, match="weights must have the losses' shape"):
            clipper.backward(losses(model, x), weights=torch.ones(3))
        with pytest.raises(ValueError, match="holds a row for each of the 3 losses"):
            clipper.backward(losses(model, x)[:3])
        with (
            pytest.raises(RuntimeError, match="inside another clipper"),
            PerSampleClipper(model, 1),
        ):
            pytest.fail("entered")


def test_second_derivatives_raise() -> None:
    model = mlp()
    x = torch.randn(4, 3, requires_grad=True)
    with PerSampleClipper(model, 1.0) as clipper:
        (g,) = torch.autograd.grad(losses(model, x).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="in a gradient that is itself differentiated"):
            clipper.backward(g.square().sum(1))


def test_an_overwritten_input_raises() -> None:
    """Of a first layer, whose own backward pass nobody runs, too."""
    for layer, x in ((nn.Linear(3, 2), torch.randn(4, 3)), (nn.Embedding(5, 2), torch.arange(4))):
        with PerSampleClipper(layer, 1.0, verify="first") as clipper:
            out = losses(layer, x)
            x.zero_()
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                clipper.backward(out)


def test_a_graph_serves_again_if_it_is_kept() -> None:
    layer = nn.Linear(3, 2)
    with PerSampleClipper(layer, 1.0) as clipper:
        out = layer(torch.randn(4, 3)).sum(1)
        first = clipper.backward(out, retain_graph=True)
        second = clipper.backward(out)
        assert torch.equal(first.norms, second.norms)
        with pytest.raises(RuntimeError, match="has had its backward pass"):
            clipper.backward(out)


def test_other_leaves_get_their_gradients() -> None:
    """What is not the model's is not clipped: an input, a head outside of the model."""
    model, head = mlp(dtype=torch.float64), nn.Parameter(torch.randn(2, dtype=torch.float64))
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)

    def run() -> Tensor:
        return (model(x) * head).square().sum(1)

    wanted = torch.autograd.grad(run().sum(), [x, head])
    seen: list[Tensor] = []
    head.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad))
    with PerSampleClipper(model, 0.5) as clipper:
        for _ in range(2):
            clipper.backward(run())
    assert x.grad is not None
    assert head.grad is not None
    assert_close([x.grad / 2, head.grad / 2], list(wanted), 1e-12)
    assert len(seen) == 2


def test_passes_without_a_backward_pass_are_forgotten() -> None:
    """What an attack or a prediction inside of the block computes goes when its graph goes."""
    model = mlp()
    x = torch.randn(4, 3)
    with PerSampleClipper(model, 0.5) as clipper:
        out = model(x)
        hidden = weakref.ref(out.grad_fn.metadata["_embattle_clipping"])
        assert hidden() is not None
        del out
        assert hidden() is None
        clipper.backward(losses(model, x))


def test_inner_attack_leaves_no_trace() -> None:
    """An attack's gradients to the input record nothing; clean and adversarial clip jointly."""
    model = mlp(dtype=torch.float64)
    x = torch.randn(4, 3, dtype=torch.float64)

    def step(x: Tensor) -> Tensor:
        delta = torch.zeros_like(x, requires_grad=True)
        (g,) = torch.autograd.grad(losses(model, x + delta).sum(), delta)
        return x + 0.1 * g.sign()

    singles = []
    for b in range(4):
        one = x[b : b + 1]
        loss = (losses(model, one) + 2 * losses(model, step(one))).sum()
        singles.append(list(torch.autograd.grad(loss, list(model.parameters()))))
    wanted, _ = clipped_sum(singles, 1.0)
    with PerSampleClipper(model, 1.0, reduction="sum") as clipper:
        clipper.backward(losses(model, x) + 2 * losses(model, step(x)))
    assert_close(gradients(model), wanted, 1e-10)


@pytest.mark.parametrize("first", [nn.Linear(3, 5), nn.LayerNorm(3), nn.Embedding(6, 5)])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool, first: nn.Module) -> None:
    torch.manual_seed(0)
    width = 3 if isinstance(first, nn.LayerNorm) else 5
    model = nn.Sequential(first, nn.Tanh(), nn.LayerNorm(width), nn.Linear(width, 2)).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    if isinstance(first, nn.Embedding):
        x = torch.randint(6, (4,))
    wanted, _ = clipped_sum(loop(model, x), 0.5)
    model.zero_grad()
    with PerSampleClipper(model, 0.5, reduction="sum") as clipper:
        hidden = model[1](model[0](x))
        out = checkpoint(model[2:], hidden, use_reentrant=reentrant)
        clipper.backward(out.square().sum(1))
    assert_close(gradients(model), wanted, 1e-10)


def test_leaves_hidden_by_reentrant_checkpointing_get_their_gradients() -> None:
    model, head = mlp(dtype=torch.float64), nn.Parameter(torch.randn(2, dtype=torch.float64))
    x = torch.randn(4, 3, dtype=torch.float64)
    (wanted,) = torch.autograd.grad((model(x) * head).square().sum(), head)
    with PerSampleClipper(model, 0.5) as clipper:
        hidden = model[1](model[0](x))
        out = checkpoint(lambda h: model[2](h) * head, hidden, use_reentrant=True)
        clipper.backward(out.square().sum(1))
    assert head.grad is not None
    assert_close([head.grad], [wanted], 1e-10)


def test_parameters_used_elsewhere_raise_under_reentrant_checkpointing() -> None:
    model = mlp()
    with PerSampleClipper(model, 0.5) as clipper:
        hidden = model[1](model[0](torch.randn(4, 3)))
        out = checkpoint(lambda h: model[2](h) + model[2].weight.sum(), hidden, use_reentrant=True)
        with pytest.raises(RuntimeError, match=r"'2\.weight' do not add up to autograd's"):
            clipper.backward(out.square().sum(1))
    assert all(p.grad is None for p in model.parameters())


def test_loss_scaling() -> None:
    model = mlp()
    x = torch.randn(4, 3)
    wanted, norms = clipped_sum(loop(model, x), 0.5)
    scaler = torch.amp.GradScaler(devices.kind, init_scale=1024.0)
    clipper = PerSampleClipper(model, 0.5, reduction="sum")
    with clipper:
        result = clipper.backward(losses(model, x), scaler=scaler)
    assert_close([result.norms], [norms], 1e-5)
    assert_close([g / 1024 for g in gradients(model)], wanted, 1e-5)
    with clipper:
        clipper.backward(losses(model, x * math.inf), scaler=scaler)
    assert not gradients(model)[0].isfinite().all()


def test_autocast() -> None:
    model = nn.Sequential(nn.LayerNorm(3), mlp())
    x = torch.randn(8, 4, 3)
    wanted, norms = clipped_sum(loop(model, x), 0.5)
    with (
        PerSampleClipper(model, 0.5, reduction="sum") as clipper,
        torch.autocast(devices.kind, torch.bfloat16),
    ):
        result = clipper.backward(losses(model, x).float())
    assert_close([result.norms], [norms], 0.05)
    assert_close(gradients(model), wanted, 0.1)
    assert all(p.grad is None or p.grad.dtype == p.dtype for p in model.parameters())


def test_noise_has_the_promised_deviation() -> None:
    layer = nn.Linear(100, 100, bias=False)
    clipper = PerSampleClipper(
        layer, 0.5, noise_multiplier=2.0, generator=torch.Generator().manual_seed(0)
    )
    with clipper:
        clipper.backward(losses(layer, torch.zeros(10, 100)))
    noise = gradients(layer)[0]
    assert float(noise.std()) == pytest.approx(2.0 * 0.5 / 10, rel=0.05)
    with clipper, pytest.raises(ValueError, match="weights must lie in"):
        clipper.backward(losses(layer, torch.zeros(10, 100)), weights=torch.full((10,), 2.0))


def test_noise_on_selected_rows() -> None:
    table = nn.Embedding(1000, 4, sparse=True)
    selection = RowSelection(threshold=5.0, noise_multiplier=1.0)
    clipper = PerSampleClipper(
        table,
        1.0,
        noise_multiplier=1.0,
        row_selection=selection,
        generator=torch.Generator().manual_seed(0),
    )
    with clipper:
        clipper.backward(losses(table, torch.tensor([[7]] * 50 + [[3]])))
    assert table.weight.grad is not None
    rows = table.weight.grad.coalesce().indices()[0].tolist()
    assert 7 in rows
    assert 3 not in rows
    assert len(rows) < 5
    assert clipper.effective_noise_multiplier == pytest.approx(math.sqrt(0.5))


def test_noise_makes_sparse_dense_with_a_warning() -> None:
    table = nn.Embedding(10, 2, sparse=True)
    with (
        PerSampleClipper(table, 1.0, noise_multiplier=1.0) as clipper,
        pytest.warns(UserWarning, match="sparse gradient of 'weight' dense"),
    ):
        clipper.backward(losses(table, torch.tensor([[1], [2]])))
    assert table.weight.grad is not None
    assert not table.weight.grad.is_sparse


def test_sparse_gradient_follows_the_batch() -> None:
    table = nn.Embedding(50_000, 4, sparse=True)
    with PerSampleClipper(table, 1.0) as clipper:
        clipper.backward(losses(table, torch.tensor([[1, 5], [5, 9]])))
    assert table.weight.grad is not None
    assert table.weight.grad.coalesce().indices()[0].tolist() == [1, 5, 9]


def test_large_sparse_gradient_holds_each_row_once() -> None:
    ids = torch.randint(0, 500, (64, 20))
    model = nn.Sequential(nn.Embedding(50_000, 64, padding_idx=3), nn.Flatten(), nn.Linear(1280, 2))
    with PerSampleClipper(model, 0.1) as clipper:
        clipper.backward(losses(model, ids))
    wanted = gradients(model)[0]
    model.zero_grad()
    model[0].sparse = True
    with clipper:
        clipper.backward(losses(model, ids))
        clipper.backward(losses(model, ids), scale=0.5)
    table = model[0].weight.grad
    assert table is not None
    rows = set(ids.flatten().tolist()) - {3}
    assert table.is_coalesced() or table.device.type != "cpu"
    assert table.coalesce().indices()[0].tolist() == sorted(rows)
    assert torch.allclose(table.to_dense(), 1.5 * wanted, rtol=1e-6, atol=1e-9)


def test_compiled_model() -> None:
    model = mlp()
    x = torch.randn(4, 3)
    wanted, _ = clipped_sum(loop(model, x), 0.5)
    compiled = torch.compile(model, backend="aot_eager")
    plain = compiled(x).detach()
    with PerSampleClipper(compiled, 0.5, reduction="sum") as clipper:
        clipper.backward(losses(compiled, x))
    assert_close(gradients(model), wanted, 1e-5)
    assert torch.equal(compiled(x), plain)
