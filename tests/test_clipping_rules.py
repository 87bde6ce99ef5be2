"""What runs sample by sample for want of a rule; and which small rules of the clipper hold."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import devices
import pytest
import torch
import torch.nn.functional as F
from clipping_cases import Apply, assert_close, clipped_sum, gradients
from embattle.clipping import PerSampleClipper, RowSelection, grad_sample, layers
from embattle.clipping.context import Layout, alike
from embattle.clipping.context import layouts as layouts_of
from embattle.clipping.grad_sample import ConvGradSample, LinearGradSample
from embattle.clipping.norms import _order, merge, parameter_norms
from embattle.clipping.table_grad_sample import EmbeddingGradSample
from embattle.clipping.users import Users
from embattle.clipping.verify import Known, Verifier, find_layouts
from test_clipping_verify import _float64, exact, per_sample, reference, refused
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

B = 4
assert _float64  # a fixture, for every test here


def own(function: Any, *shape: int, **parts: Any) -> Any:
    """A model with a parameter p of the given shape."""
    return Apply(function, p=nn.Parameter(torch.randn(*shape)), **parts)


# --- operators without a rule ---------------------------------------------------------------------


def test_rows_of_samples_wherever_they_are() -> None:
    x = torch.randn(B, 3, 2)
    folded = own(lambda m, x: F.prelu(x.flatten(0, 1), m.p).reshape(x.shape), 2)
    exact(folded, lambda: per_sample(folded(x)))
    turned = own(lambda m, x: torch.einsum("bti,ij->tbj", x, m.p), 2, 3)
    exact(turned, lambda: per_sample(turned(x).transpose(0, 1)))
    second = own(lambda m, x: torch.einsum("tbi,ij->tbj", x, m.p), 2, 3)
    exact(second, lambda: per_sample(second(x.transpose(0, 1)).transpose(0, 1)), batch_dim=1)
    shared = own(lambda m, x: x + torch.einsum("bti,ij->btj", x[:1] * 0 - 2, m.p), 3, 3)
    exact(shared, lambda: per_sample(shared(torch.ones(B, 2, 3))))


def test_constants_as_large_as_the_batch() -> None:
    model = own(lambda m, x: torch.einsum("bti,jk,ik->btj", x, m.fixed, m.p), 2, B)
    model.register_buffer("fixed", torch.randn(B, B))
    x = torch.randn(B, 3, 2)
    exact(model, lambda: per_sample(model(x)))


def test_derived_parameters_and_several_of_them() -> None:
    x = torch.randn(B, 3)
    model = own(lambda m, x: F.bilinear(x, x, m.p.exp(), m.q), 2, 3, 3)
    model.q = nn.Parameter(torch.randn(2))
    exact(model, lambda: per_sample(model(x)))
    scaled = own(lambda m, x: F.linear(x, m.p.clone().mul_(m.share)), 2, 3)
    scaled.register_buffer("share", torch.full((2, 1), 0.5))
    exact(scaled, lambda: per_sample(scaled(x)))


def test_what_single_samples_cannot_run_is_refused() -> None:
    x = torch.randn(B, 3)
    coupled = own(lambda m, x: torch.einsum("bi,ci,i->bc", x, x, m.p), 3)
    refused(coupled, lambda: per_sample(coupled(x)), "no clipping rule for einsum, and cannot run")
    mixed = own(lambda m, x, y: torch.einsum("bi,cd,i->bi", x, y, m.p), 3)
    square = torch.randn(B, B)
    refused(mixed, lambda: per_sample(mixed(x, square)), "einsum gives other values for single")
    changed = own(lambda m, x: x.clone().index_add_(0, x.new_zeros(1).long(), m.p[None]), 3)
    refused(changed, lambda: per_sample(changed(x)), "changes a tensor in place by index_add_")


def test_reentrant_checkpointing_of_nothing_else() -> None:
    inner = own(lambda m, x: torch.einsum("bi,ij->bj", x, m.p), 3, 2)
    model, x = nn.Sequential(nn.Linear(3, 3), inner), torch.randn(B, 3)
    singles = reference(model, lambda: per_sample(model(x)))
    wanted, norms = clipped_sum(singles, 1.0)
    with PerSampleClipper(model, 1.0, reduction="sum") as clipper:
        out = checkpoint(inner, model[0](x), use_reentrant=True)
        result = clipper.backward(per_sample(out))
    assert_close([result.norms, *gradients(model)], [norms, *wanted], 1e-10)


def test_a_log_line_names_the_operator_once(caplog: pytest.LogCaptureFixture) -> None:
    model = own(lambda m, x: torch.einsum("bi,ij->bj", x, m.p), 3, 5)
    with caplog.at_level(logging.INFO, "embattle.clipping"), PerSampleClipper(model, 1) as clipper:
        for _ in range(2):
            clipper.backward(per_sample(model(torch.randn(B, 3))))
    (record,) = caplog.records
    assert "'Apply' (Apply) has no clipping rule for einsum" in record.getMessage()
    assert "(15 numbers a sample)" in record.getMessage()


WITH_RULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear": (lambda: nn.Linear(3, 2), (2, 2, 3)),
    "Conv1d": (lambda: nn.Conv1d(2, 2, 2), (2, 4)),
    "Conv2d": (lambda: nn.Conv2d(2, 2, 2), (2, 4, 3)),
    "Conv3d": (lambda: nn.Conv3d(2, 2, 2), (2, 3, 2, 2)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(2, 2, 2), (2, 4)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(2, 2, 2), (2, 4, 3)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(2, 2, 2), (2, 3, 2, 2)),
    "LayerNorm": (lambda: nn.LayerNorm(3), (2, 3)),
    "RMSNorm": (lambda: nn.RMSNorm(3), (2, 3)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), (4, 3)),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(3).eval(), (3,)),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(3, affine=True), (3, 4)),
    "RNN": (lambda: nn.RNN(3, 2, batch_first=True), (2, 3)),
    "ReLU RNN": (lambda: nn.RNN(3, 2, batch_first=True, nonlinearity="relu"), (2, 3)),
    "GRU": (lambda: nn.GRU(3, 2, batch_first=True), (2, 3)),
    "LSTM": (lambda: nn.LSTM(3, 2, batch_first=True), (2, 3)),
    "RNNCell": (lambda: nn.RNNCell(3, 2), (3,)),
    "ReLU RNNCell": (lambda: nn.RNNCell(3, 2, nonlinearity="relu"), (3,)),
    "GRUCell": (lambda: nn.GRUCell(3, 2), (3,)),
    "LSTMCell": (lambda: nn.LSTMCell(3, 2), (3,)),
    "matmul": (lambda: own(lambda m, x: x @ m.p, 3, 2), (3,)),
    "addmm": (lambda: own(lambda m, x: torch.addmm(m.p[0], x, m.p), 3, 3), (3,)),
    "tile": (lambda: own(lambda m, x: torch.cat([x, m.p.tile(len(x), 1)], 1), 1, 2), (3,)),
    "expand": (lambda: own(lambda m, x: torch.cat([x, m.p.expand(len(x), 2)], 1), 2), (3,)),
    "rows": (lambda: own(lambda m, x: m.p[x[:, 0].abs().long().clamp(max=4)], 5, 2), (1,)),
}


@pytest.mark.parametrize("name", WITH_RULES)
def test_layers_with_rules_need_no_copies(name: str, caplog: pytest.LogCaptureFixture) -> None:
    build, shape = WITH_RULES[name]
    model, x = build(), torch.randn(B, *shape)

    def losses() -> Tensor:
        out = model(x)
        return per_sample(out[0] if isinstance(out, tuple) else out)

    with caplog.at_level(logging.INFO, "embattle.clipping"):
        exact(model, losses, modes=["flat"])
    assert not caplog.records


@pytest.mark.parametrize("layer", [nn.Linear(3, 2), nn.LayerNorm(3), nn.Embedding(5, 2)])
def test_plain_layers_are_not_watched(layer: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer.double()
    x = torch.randint(5, (B, 2)) if isinstance(layer, nn.Embedding) else torch.randn(B, 2, 3)
    exact(layer, lambda: per_sample(layer(input=x)))
    monkeypatch.setattr(layers, "Operators", None)
    exact(layer, lambda: per_sample(layer(x)))


def test_the_longest_name_says_where_the_samples_are() -> None:
    dims = {"": 1, "a": 2, "a.b": 3}
    names = {"": 1, "c": 1, "ab": 1, "a": 2, "a.c": 2, "a.b": 3, "a.b.c": 3}
    assert {name: layers._batch_dim(dims, name) for name in names} == names
    assert layers._batch_dim({"a": 2}, "c") == 0


# --- small rules ----------------------------------------------------------------------------------


def test_dropout_between_recurrent_layers_alone() -> None:
    rnn = nn.GRU(3, 4, num_layers=2, dropout=1.0, batch_first=True)
    x = torch.randn(B, 2, 3)
    assert bool(rnn(x)[0].any())
    exact(rnn, lambda: per_sample(rnn(x)[0]))


def test_bags_whose_last_end_is_not_given() -> None:
    model = own(lambda m, i, offsets: F.embedding_bag(i, m.p, offsets), 7, 3)
    ids, offsets = torch.randint(7, (9,)), torch.tensor([0, 2, 2, 5])
    exact(model, lambda: per_sample(model(ids, offsets)))


def test_parameters_repeated_along_the_last_dim() -> None:
    model = own(lambda m, x: x.t()[None] * torch.tile(m.p, (len(x),)), 1, 3, 1)
    x = torch.randn(B, 3)
    exact(model, lambda: per_sample(model(x).permute(2, 0, 1)))


def test_zeros_have_a_graph_checked_again_sixteen_times() -> None:
    verifier, found = Verifier("first"), Known([[Layout(0, 0, 1)]], [torch.tensor([[False]])])
    assert verifier.known("graph", "kinds")[1]
    verifier.remember("graph", found)
    assert [verifier.known("graph", "kinds")[1] for _ in range(18)] == [True] * 16 + [False] * 2


def test_a_single_loss_of_a_sparse_table() -> None:
    table = nn.Embedding(9, 3, sparse=True)
    with PerSampleClipper(table, 1.0) as clipper:
        clipper.backward(table(torch.tensor([[2, 2, 5]])).flatten(1).sum(1))
    assert table.weight.grad is not None
    assert table.weight.grad.is_sparse
    assert float(table.weight.grad.to_dense().norm()) == pytest.approx(1.0)


def test_noise_of_bounds_per_layer() -> None:
    model = nn.Sequential(nn.Linear(100, 90), nn.Linear(90, 90, bias=False))
    for bound, most in ((0.5, 0.5 * math.sqrt(3)), ((0.3, 0.4, 1.2), 1.3)):
        generator = torch.Generator().manual_seed(0)
        clipper = PerSampleClipper(
            model, bound, "per_layer", noise_multiplier=2.0, generator=generator
        )
        model.zero_grad()
        with clipper:
            clipper.backward(model(torch.zeros(8, 100)).sum(1) * 0)
        for noise in gradients(model):
            if noise.dim() == 2:
                assert float(noise.std()) == pytest.approx(2.0 * most / 8, rel=0.05)


@pytest.mark.parametrize("name", ["gamma", "noise_multiplier"])
@pytest.mark.parametrize("value", [-1.0, math.inf, math.nan])
def test_options_out_of_range(name: str, value: float) -> None:
    options: dict[str, Any] = {name: value}
    words = f"{name} must be (finite|at least 0), got {value:g}"
    with pytest.raises(ValueError, match=words):
        PerSampleClipper(nn.Linear(2, 2), 1.0, **options)


def test_options_that_are_unknown() -> None:
    for name in ("mode", "reduction", "verify"):
        options: dict[str, Any] = {name: "odd"}
        with pytest.raises(ValueError, match=f"{name} must be one of .*; got 'odd'"):
            PerSampleClipper(nn.Linear(2, 2), 1.0, **options)


def test_inputs_are_kept_as_autocast_has_them() -> None:
    layer = nn.Linear(3, 2).float()
    with PerSampleClipper(layer, 1.0):
        for dtype in (torch.float32, torch.float64):
            with torch.autocast(devices.kind, torch.bfloat16):
                out = layer.to(dtype)(torch.randn(B, 3, dtype=dtype))
            kept = out.grad_fn.metadata["_embattle_clipping"].x
            assert kept.dtype == (torch.bfloat16 if dtype == torch.float32 else dtype)


def test_packed_sequences_that_are_sorted_already() -> None:
    rnn = nn.LSTM(3, 4, batch_first=True)

    def losses() -> Tensor:
        lengths = torch.tensor([3, 3, 2, 1])
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
        out, (_, cell) = rnn(packed)
        padded, _ = nn.utils.rnn.pad_packed_sequence(out, batch_first=True)
        return per_sample(torch.cat([padded.flatten(1), cell[0]], 1))

    x = torch.randn(B, 3, 3)
    exact(rnn, losses)


def test_weights_and_users_of_another_number_than_the_losses() -> None:
    layer = nn.Linear(3, 2)
    with PerSampleClipper(layer, 1.0) as clipper:
        out = per_sample(layer(torch.randn(B, 3)))
        for count in (B - 1, B + 1):
            with pytest.raises(ValueError, match="weights must have the losses' shape"):
                clipper.backward(out, weights=torch.ones(count))
            with pytest.raises(ValueError, match=f"users must be {B} integers"):
                clipper.backward(out, users=torch.ones(count, dtype=torch.long))
        with pytest.raises(ValueError, match=f"users must be {B} integers"):
            clipper.backward(out, users=torch.ones(B))


def test_products_of_which_a_parameter_is_the_left_factor() -> None:
    model = own(lambda m, x: torch.addmm(m.shift, m.p, x), 2, 3)
    model.register_buffer("shift", torch.ones(1))
    x = torch.randn(3, B)
    exact(model, lambda: per_sample(model(x).t()), batch_dim=1)


def test_parameters_repeated_no_times() -> None:
    model = own(lambda m, x: F.linear(x, torch.cat([m.p, m.p.repeat(0, 1)])), 2, 3)
    x = torch.randn(B, 3)
    exact(model, lambda: per_sample(model(x)))


def test_views_of_a_weight_that_are_not_its_rows() -> None:
    x = torch.randn(B, 3)
    turned = own(lambda m, x: F.linear(x, m.p.t()), 3, 3)
    exact(turned, lambda: per_sample(turned(x)))
    every_second = own(lambda m, x: F.linear(x, m.p[::2]), 4, 3)
    exact(every_second, lambda: per_sample(every_second(x)))


def test_bags_whose_padding_is_counted_from_the_end() -> None:
    model = own(lambda m, i: F.embedding_bag(i, m.p, padding_idx=-1), 7, 3)
    ids = torch.tensor([[6, 1], [2, 6], [3, 3], [0, 5]])
    exact(model, lambda: per_sample(model(ids)))


def test_parameters_that_the_losses_do_not_use() -> None:
    model = own(lambda m, x: m.fc(x), 3, fc=nn.Linear(3, 2))
    x = torch.randn(B, 3)
    exact(model, lambda: per_sample(model(x)))


def test_a_gradient_of_ones_own_that_runs_a_layer() -> None:
    class Guided(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, guide: nn.Module) -> Tensor:
            ctx.save_for_backward(x)
            ctx.guide = guide
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            with torch.enable_grad():
                x = ctx.saved_tensors[0].detach().requires_grad_()
                (slope,) = torch.autograd.grad(ctx.guide(x).square().sum(), x)
            return grad * slope, None

    parts = {"fc": nn.Linear(3, 3), "guide": nn.Linear(3, 2)}
    model = Apply(lambda m, x: Guided.apply(m.fc(x), m.guide), **parts)
    x = torch.randn(B, 3)
    exact(model, lambda: per_sample(model(x)))


@pytest.mark.parametrize("mode", ["flat", "per_layer"])
def test_weight_zero_removes_a_non_finite_sample_of_a_user(mode: Any) -> None:
    model, x = nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 2)), torch.randn(B, 3)
    found = []
    for x[1, 0] in (math.nan, 1.0):
        model.zero_grad()
        with PerSampleClipper(model, 0.5, mode, reduction="sum") as clipper:
            result = clipper.backward(
                per_sample(model(x)),
                users=torch.tensor([5, 5, 2, 7]),
                weights=torch.tensor([1.0, 0.0, 1.0, 1.0]),
            )
        found.append([result.norms, *gradients(model)])
    assert_close(*found, 1e-12)


def test_non_finite_samples_have_no_say_in_which_rows_are_selected() -> None:
    table = nn.Embedding(20, 3, sparse=True)
    clipper = PerSampleClipper(
        table,
        1.0,
        noise_multiplier=1.0,
        row_selection=RowSelection(threshold=0.5, noise_multiplier=0.01),
        generator=torch.Generator().manual_seed(0),
    )
    with clipper:
        scale = torch.tensor([1.0, 1.0, math.nan])
        clipper.backward(table(torch.tensor([7, 9, 3])).sum(1) * scale)
    assert table.weight.grad is not None
    assert table.weight.grad.coalesce().indices()[0].tolist() == [7, 9]


# --- what is found out, and what it costs ---------------------------------------------------------


def test_values_that_differ_beside_an_infinite_one() -> None:
    tiny = torch.tensor([1e-12, math.inf])
    assert alike(tiny, tiny, 1e-9)
    assert not alike(tiny * 2, tiny, 1e-9)


def test_what_is_known_after_two_batches() -> None:
    """The samples seen in either, and the layouts that fit both."""
    first, second = Layout(0, 0, 1), Layout(1, 1, 1)
    some, every = torch.tensor([[True], [False]]), torch.ones(2, 1, dtype=torch.bool)
    verifier = Verifier("first")
    verifier.remember("graph", Known([[first], [first, second], []], [some, every, None]))
    assert verifier.known("graph", "kinds")[1]
    verifier.remember("graph", Known([[first], [second], [first]], [~some, every, every]))
    found, checked = verifier.known("graph", "kinds")
    assert found.layouts == [first, second, first]
    assert not checked


def test_rows_are_seen_as_the_likeliest_layout_has_them() -> None:
    grad, r = torch.zeros(2, 4), torch.tensor([1.0, -2.0])
    grad[0, 0] = grad[1, 3] = 1.0
    likeliest = Layout(0, 0, 1)
    record: Any = SimpleNamespace(
        shaped=lambda x: x, layouts=lambda x, samples: layouts_of(x.shape, [0, 1], samples)
    )
    found = find_layouts([(record, grad)], [(record, grad * r[:, None])], r, 1e-9, finite=True)
    assert found.fits == [[likeliest, Layout(1, 1, 2), Layout(1, 1, 1)]]
    assert found.seen[0] is not None
    assert found.seen[0].tolist() == [[True], [True]]


def test_a_tied_table_is_not_made_dense() -> None:
    shape = torch.Size((5, 3))
    head = LinearGradSample(torch.randn(B, 2, 3), torch.randn(B, 2, 5), (0, 5))
    table = EmbeddingGradSample(torch.randint(5, (B, 4)), torch.randn(B, 4, 3), None, False)
    merged = merge([table, head], shape)
    assert [type(each) for each in merged] == [LinearGradSample, EmbeddingGradSample]
    wanted = (head.dense(shape) + table.dense(shape)).flatten(1).norm(dim=1)
    assert_close([parameter_norms(merged, Users(B))], [wanted], 1e-9)


def test_convolutions_are_unfolded_a_part_of_the_batch_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernel = torch.Size((3, 2, 3))
    x, grad = torch.randn(5, 1, 2, 6), torch.randn(5, 1, 3, 4)
    whole = ConvGradSample(x, grad, kernel, (1,), (0,), (1,), 1)
    wanted = whole.dense(kernel).flatten(1).norm(dim=1)
    unfolded, parts = ConvGradSample._unfolded, list[int]()

    def noted(self: ConvGradSample, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        parts.append(len(x))
        return unfolded(self, x, grad)

    monkeypatch.setattr(ConvGradSample, "_unfolded", noted)
    # A sample has 4 places of 2 * 3 inputs.
    for samples, chunk, sizes in ((5, 72, [3, 2]), (5, 71, [2, 2, 1]), (1, 1, [1])):
        monkeypatch.setattr(grad_sample, "_CHUNK", chunk)
        parts.clear()
        use = whole.select(torch.arange(samples))
        assert_close([use.norms(Users(samples))], [wanted[:samples]], 1e-9)
        assert parts == sizes


def test_gradients_that_free_memory_are_formed_first() -> None:
    def use(tokens: int, width: int) -> tuple[nn.Parameter, list[LinearGradSample]]:
        x = torch.zeros(1, tokens, width)
        return nn.Parameter(torch.zeros(width, width)), [LinearGradSample(x, x, (0, width))]

    # The first two free 4 and 51 numbers, and need 8 and 39 for it; the others take more.
    items = [use(1, 10), use(10, 3), use(1, 20), use(2, 2)]
    assert [len(p) for p, _ in sorted(items, key=_order)] == [2, 3, 20, 10]
