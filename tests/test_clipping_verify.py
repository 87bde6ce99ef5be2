"""What a clipper once got wrong without a word: exact now, or refused with a sentence.

The reference is each loss's gradient by itself, by plain autograd, in the batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from clipping_cases import Apply, assert_close, clipped_sum, gradients
from embattle.clipping import PerSampleClipper
from torch import Tensor, nn

B = 4


def reference(model: nn.Module, losses: Callable[[], Tensor]) -> list[list[Tensor]]:
    """Each loss's gradient of all trained parameters."""
    trained = [p for p in model.parameters() if p.requires_grad]
    found = losses()
    singles = []
    for loss in found.unbind():
        grads = torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True)
        singles.append(
            [
                torch.zeros_like(p) if g is None else (g.to_dense() if g.is_sparse else g)
                for p, g in zip(trained, grads, strict=True)
            ]
        )
    return singles


def exact(
    model: nn.Module,
    losses: Callable[[], Tensor],
    clipper: PerSampleClipper | None = None,
    modes: Sequence[str] = ("flat", "per_layer"),
    **options: Any,
) -> None:
    """Norms and clipped sums are those of the definition; in the modes, or of a clipper in use."""
    singles = reference(model, losses)
    for mode in modes if clipper is None else [clipper.mode]:
        _, norms = clipped_sum(singles, 1.0, mode)
        bound = float(norms[norms > 0].median()) * 0.9 if bool((norms > 0).any()) else 1.0
        wanted, norms = clipped_sum(singles, bound, mode)
        own = clipper or PerSampleClipper(model, 1.0, mode, reduction="sum", **options)
        model.zero_grad()
        with own:
            result = own.backward(losses(), max_norm=bound)
        assert_close([result.norms], [norms], 1e-9)
        assert_close(gradients(model), wanted, 1e-9)
    model.zero_grad()


def refused(
    model: nn.Module,
    losses: Callable[[], Tensor],
    words: str,
    clipper: PerSampleClipper | None = None,
    **options: Any,
) -> None:
    """An error that says so, before anything is written to .grad."""
    own = clipper or PerSampleClipper(model, 1.0, **options)
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0)
    with pytest.raises((ValueError, RuntimeError), match=words), own:
        own.backward(losses())
    assert all(bool((p.grad == 7).all()) for p in model.parameters() if p.grad is not None)
    for p in model.parameters():
        assert p.grad is not None
        p.grad = None
    assert not any("_embattle" in key for m in model.modules() for key in vars(m))
    assert all(p._backward_hooks is None for p in model.parameters())


@pytest.fixture(autouse=True)
def _float64() -> Any:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def per_sample(out: Tensor) -> Tensor:
    """A loss of each row of out."""
    return (out.flatten(1).sin() * 3 + out.flatten(1).square()).sum(1)


COUPLED = "losses of some samples depend"


# --- a parameter in several uses ------------------------------------------------------------------


@pytest.mark.parametrize("scales", [(1, 1), (1, 2)])
def test_a_convolution_and_a_transposed_one_share_a_weight(scales: tuple[int, int]) -> None:
    down, up = nn.Conv1d(3, 4, 3), nn.ConvTranspose1d(4, 3, 3)
    up.weight = down.weight
    x = torch.randn(B, 3, 12)

    def forward(m: Any, x: Tensor) -> Tensor:
        each = [m.up(m.down(x[..., ::s]).tanh()).flatten(1).sum(1, True) for s in scales]
        return torch.cat([*each, m.down(x[..., :7]).flatten(1)], 1)

    model = Apply(forward, down=down, up=up)
    exact(model, lambda: per_sample(model(x)))


def test_conv1d_of_transformers_tied_to_a_linear_layer() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    for width in (3, 5):
        first, last = conv1d(width, 3), nn.Linear(width, 3)
        last.weight = first.weight
        model = Apply(lambda m, x: m.b(m.a(x).tanh()), a=first.double(), b=last)
        for shape in ((B, 3), (B, 5, 3), (B, B, 3)):
            x = torch.randn(*shape)
            exact(model, lambda x=x, model=model: per_sample(model(x)))


def test_ties_across_kinds_of_layers() -> None:
    table, head, bag = nn.Embedding(6, 6), nn.Linear(6, 6), nn.EmbeddingBag(6, 6, mode="sum")
    head.weight = bag.weight = table.weight
    ids = torch.randint(6, (B, 3))
    model = Apply(
        lambda m, i: m.head(m.table(i).tanh()).mean(1) * m.bag(i) + m.head(m.bag(i)),
        table=table,
        head=head,
        bag=bag,
    )
    exact(model, lambda: per_sample(model(ids)))
    norm = nn.LayerNorm(6)
    norm.bias = head.bias
    model = Apply(lambda m, i: m.head(m.norm(m.table(i))), table=table, norm=norm, head=head)
    exact(model, lambda: per_sample(model(ids)))


# --- subclasses and parametrisations --------------------------------------------------------------


class Bounded(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return F.embedding(input, self.weight, max_norm=0.5) * 2


class ByFrequency(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return F.embedding(input, self.weight, scale_grad_by_freq=True)


class Masked(nn.Linear):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.register_buffer("mask", (torch.rand(outputs, inputs) > 0.4).double())

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight * self.mask, self.bias.exp()) + self.bias


class Recurrent(nn.GRU):
    def forward(self, input: Tensor, hx: Any = None) -> Any:
        out, last = super().forward(input * 2, hx)
        return out.tanh(), last


def test_subclasses_with_a_forward_of_their_own() -> None:
    ids = torch.randint(5, (B, 3))
    table = Bounded(5, 4)
    table(torch.arange(5))  # in shape before: else the first pass changes the second's table
    exact(table, lambda: per_sample(table(ids)))
    refused(by := ByFrequency(5, 4), lambda: per_sample(by(ids)), "scale_grad_by_freq=True")
    for shape in ((B, 3), (B, 5, 3), (B, B, 3)):
        x = torch.randn(*shape)
        masked = nn.Sequential(Masked(3, B), nn.Tanh(), Masked(B, B))
        exact(masked, lambda masked=masked, x=x: per_sample(masked(x)))
    rnn = Recurrent(3, 4, batch_first=True)
    exact(rnn, lambda: per_sample(rnn(torch.ones(B, 3, 3).cumsum(0))[0]))


def test_parametrised_layers() -> None:
    weight_norm = nn.utils.parametrizations.weight_norm
    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    weight_norm(attention.out_proj)
    model = Apply(lambda m, x: m.attention(x, x, x)[0], attention=attention)
    for length in (1, 3, B):
        x = torch.randn(B, length, 4)
        exact(model, lambda x=x: per_sample(model(x)))
    model = nn.Sequential(
        weight_norm(nn.Conv1d(2, 3, 2)), nn.Flatten(), weight_norm(nn.Linear(9, 2))
    )
    exact(model, lambda: per_sample(model(torch.ones(B, 2, 4).cumsum(0))))
    spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4)).eval()
    exact(spectral, lambda: per_sample(spectral(torch.ones(B, 3).cumsum(0))))


def test_functional_call_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    x = torch.randn(B, 3)

    def masked() -> Tensor:
        weights = {n: p * 0.5 for n, p in model.named_parameters()}
        return per_sample(torch.func.functional_call(model, weights, (x,)))

    refused(model, masked, "is used where its per-sample gradients cannot be followed")


# --- where the samples are ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
@pytest.mark.parametrize("pick", ["last", "first", "squeeze", "layers"])
def test_heads_on_a_recurrent_state(kind: Any, pick: str) -> None:
    layers = 2 if pick == "layers" else 1
    rnn = kind(3, 4, batch_first=True, num_layers=layers)

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.rnn(x)[1]
        h = m.fc(h[0] if isinstance(h, tuple) else h)
        if pick == "layers":
            return h.transpose(0, 1)
        return h.squeeze(0) if pick == "squeeze" else h[0 if pick == "first" else -1]

    model = Apply(forward, rnn=rnn, fc=nn.Linear(4, 2))
    for length in (1, 3, B):
        x = torch.randn(B, length, 3)
        exact(model, lambda x=x: per_sample(model(x)))
    exact(model, lambda: per_sample(model(torch.ones(2, 5, 3))))


@pytest.mark.parametrize("length", [1, 2, 3, B])
@pytest.mark.parametrize("batch_dim", [0, 1])
def test_sequences_with_time_first(length: int, batch_dim: int) -> None:
    """Without a word on it, too: the layers find out where the samples are."""
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0)
    model = Apply(
        lambda m, x: m.out(m.layer(x)) + m.gain * m.norm(x) + m.shift,
        layer=layer,
        out=nn.Linear(4, 4),
        norm=nn.LayerNorm(4),
        gain=nn.Parameter(torch.randn(1, 4)),
        shift=nn.Parameter(torch.randn(1, 4)),
    )
    x = torch.randn(length, B, 4)
    exact(model, lambda: per_sample(model(x).transpose(0, 1)), batch_dim=batch_dim)


def test_rows_of_samples_in_any_order() -> None:
    norm = nn.GroupNorm(2, 4)
    fc = nn.Linear(4, 3)
    model = Apply(lambda m, x: m.fc(m.norm(x)), norm=norm, fc=fc)
    for copies in (2, 3, B):
        x = torch.randn(B * copies, 4)
        exact(model, lambda x=x, k=copies: per_sample(model(x)).reshape(B, k).sum(1))
        exact(model, lambda x=x, k=copies: per_sample(model(x)).reshape(k, B).sum(0))
    grid = torch.randn(2, 2, 4)
    exact(model, lambda: per_sample(model(grid.flatten(0, 1))))
    exact(fc, lambda: fc(grid).square().sum(2).flatten())


def test_bags_with_keys_first() -> None:
    """As torchrec's KeyedJaggedTensor lays them out: bag k * B + b is sample b's, many empty."""
    model = nn.EmbeddingBag(7, 3, mode="sum", include_last_offset=True)
    for samples in (2, 4, 8):
        for seed in range(20):
            torch.manual_seed(seed)
            lengths = torch.randint(3, (2 * samples,))
            ids = torch.randint(7, (int(lengths.sum()),))
            offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
            weights = torch.randn(2, samples, 3)

            def losses(n=samples, ids=ids, o=offsets, w=weights) -> Tensor:  # type: ignore[no-untyped-def]
                return (model(ids, o).reshape(2, n, 3) * w).sum((0, 2))

            exact(model, losses, modes=["flat"])


def test_augmentations_in_a_layer_without_a_rule() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.PReLU(3), nn.Linear(3, 2))
    x = torch.randn(2 * B, 3)
    exact(model, lambda: per_sample(model(x)).reshape(B, 2).sum(1))
    exact(model, lambda: per_sample(model(x)).reshape(2, B).sum(0))


def test_parameters_spread_over_the_batch() -> None:
    for shape in ((1, 3), (3,), (1,), ()):
        own = nn.Parameter(torch.randn(shape))
        model = Apply(lambda m, x: m.fc(x * m.own + m.own), own=own, fc=nn.Linear(3, 2))
        for length in (1, 3, B):
            x = torch.randn(B, length, 3)
            exact(model, lambda x=x, model=model: per_sample(model(x)))
        x = torch.randn(B, 3)
        exact(model, lambda x=x, model=model: per_sample(model(x)))
        exact(model, lambda model=model: per_sample(model(torch.ones(1, 3))))

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.rnn(x, m.start.expand(-1, len(x), -1).contiguous())[0]

    rnn = nn.GRU(3, 4, batch_first=True)
    model = Apply(forward, rnn=rnn, start=nn.Parameter(torch.randn(1, 1, 4)))
    exact(model, lambda: per_sample(model(torch.ones(B, 2, 3).cumsum(0))))
    model = Apply(
        lambda m, x: torch.cat([m.cls.repeat(len(x), 1, 1), x + m.pos[:, : x.shape[1]]], 1),
        cls=nn.Parameter(torch.randn(1, 1, 3)),
        pos=nn.Parameter(torch.randn(1, 9, 3)),
    )
    for length in (1, 3, B):
        exact(model, lambda t=length: per_sample(model(torch.ones(B, t, 3).cumsum(0))))


def test_masked_losses_given_to_backward() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    x = torch.randn(8, 3)
    for kept in ([2, 5, 6, 7], [1, 3, 4]):
        mask = torch.zeros(8, dtype=torch.bool)
        mask[kept] = True
        words = f"{COUPLED}|holds a row for each"
        refused(model, lambda mask=mask: per_sample(model(x))[mask], words)
    # What looks like pairs of rows is only right as long as it is.
    clipper = PerSampleClipper(model, 1.0, reduction="sum", verify="first")
    for kept in ([0, 3, 4, 6], [1, 2, 5, 7], [0, 2, 4, 7]):
        exact(model, lambda kept=kept: per_sample(model(x))[kept], clipper)
    refused(model, lambda: per_sample(model(x))[[0, 1, 4, 7]], COUPLED, clipper)
    # Some layout fits any two rows, another one each time.
    clipper = PerSampleClipper(model, 1.0, reduction="sum", verify="first")
    for _ in range(40):
        kept = torch.randperm(8)[:2].sort().values.tolist()
        exact(model, lambda kept=kept: per_sample(model(x))[kept], clipper)
    exact(model, lambda: per_sample(model(x))[[3]])


# --- samples that are coupled ---------------------------------------------------------------------


class BatchMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            return x - x.mean(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad - grad.mean(0)


def test_couplings_of_all_kinds() -> None:
    x = torch.randn(B, 3)
    fc = nn.Linear(3, 3)
    for couple in (
        lambda h: h - h.mean(0),
        BatchMean.apply,
        lambda h: h + h.roll(1, 0),
        lambda h: h.sort(0).values,
        lambda h: h.reshape(2, 2, -1).softmax(1).reshape(B, -1),
        lambda h: F.batch_norm(h, None, None, training=True),
        lambda h: torch.cat([h[:-1], h[-2:-1]]),
    ):
        refused(fc, lambda couple=couple: per_sample(couple(fc(x)).clone()), COUPLED)
    scores = nn.Linear(3, 1)
    for last in (0, B - 1):  # one leak in either direction

        def leak(last: int = last) -> Tensor:
            out = per_sample(scores(x))
            return out + torch.eye(B)[last] * out.flip(0)

        refused(scores, leak, COUPLED)
    labels = torch.arange(B)
    refused(fc, lambda: F.cross_entropy(fc(x) @ fc(x).t(), labels, reduction="none"), COUPLED)
    # A head of zeros lets nothing through: there is nothing wrong until it has been trained.
    body = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.BatchNorm1d(4, affine=False)))
    model = nn.Sequential(body, nn.Linear(4, 1))
    refused(model, lambda: per_sample(model(x)), "normalises over the batch")
    head = nn.Linear(3, 1)
    nn.init.zeros_(head.weight)
    model = Apply(lambda m, x: m.head(m.fc(x) - m.fc(x).mean(0)), fc=fc, head=head)
    clipper = PerSampleClipper(model, 1.0, reduction="sum", verify="first")
    exact(model, lambda: per_sample(model(x)), clipper)
    nn.init.ones_(head.weight)
    refused(model, lambda: per_sample(model(x)), COUPLED, clipper)


def test_a_layer_without_a_rule_that_couples() -> None:
    class Block(nn.Module):
        def __init__(self, *inner: nn.Module) -> None:
            super().__init__()
            self.inner = nn.Sequential(*inner)
            self.mix = nn.Parameter(torch.randn(3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("...i,ij->...j", self.inner(x), self.mix)

    x = torch.randn(B, 3, 4, 4)
    own = Block(nn.Dropout(0.5), nn.BatchNorm2d(3, track_running_stats=False))
    refused(own, lambda: per_sample(own(x)), "normalises over the batch")

    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - x.mean(0)

    rows = torch.randn(B, 3)
    for dropout in (nn.Identity(), nn.Dropout(0.5)):
        block = Block(nn.Linear(3, 3), dropout, Mean())
        refused(block, lambda block=block: per_sample(block(rows)), COUPLED)
    centred = Block(Mean())  # what is coupled are the data, not the losses by a parameter
    exact(centred, lambda: per_sample(centred(rows)))
    mask = torch.randn(B, B)

    class Mixed(Block):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return torch.einsum("bti,st,ij->bsj", self.inner(x), mask, self.mix)

    mixed = Mixed(nn.Dropout(0.0))
    x = torch.randn(B, B, 3)
    refused(mixed, lambda: per_sample(mixed(x, mask)), "for the batch")
    exact(mixed, lambda: per_sample(mixed(x[:3], mask)))


# --- batches that differ from the first -----------------------------------------------------------


def test_what_the_first_batch_hides() -> None:
    fc = nn.Linear(3, 2)
    model = Apply(lambda m, x: m.fc(x.transpose(0, 1).flatten(0, 1)), fc=fc)

    def losses(x: Tensor) -> Tensor:  # rows by time
        return model(x).reshape(x.shape[1], len(x), -1).square().sum((0, 2))

    clipper = PerSampleClipper(model, 1.0, reduction="sum", verify="first")
    for length in (1, 3, B):
        x = torch.randn(B, length, 3)
        exact(model, lambda x=x: losses(x), clipper)
    # Sorting depends on data alone: found by chance, and the chance is one in 80.
    model = Apply(lambda m, x: m.fc(x).sort(0).values, fc=fc)
    rising = torch.arange(12.0).reshape(B, 3)
    with torch.no_grad():
        fc.weight.fill_(1.0)
    clipper = PerSampleClipper(model, 1.0, verify="sampled")
    with clipper:
        clipper.backward(per_sample(model(rising)))
    found = False
    with clipper:
        for _ in range(1000):
            try:
                clipper.backward(per_sample(model(rising.flip(0))))
            except RuntimeError as error:
                found = COUPLED in str(error)
                break
    assert found
    always = PerSampleClipper(model, 1.0, verify="always")
    with always:
        always.backward(per_sample(model(rising)))
    refused(model, lambda: per_sample(model(rising.flip(0))), COUPLED, always)


def test_lengths_that_become_the_batch_size() -> None:
    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    model = Apply(lambda m, x, mask: m.a(x, x, x, attn_mask=mask)[0] * m.gain, a=attention)
    model.gain = nn.Parameter(torch.randn(4))
    clipper = PerSampleClipper(model, 1.0, reduction="sum", verify="first")
    for length in (3, B, 1, 5, B):
        x, mask = torch.randn(B, length, 4), torch.randn(length, length)
        exact(model, lambda x=x, mask=mask: per_sample(model(x, mask)), clipper)


# --- a model that changes -------------------------------------------------------------------------


def test_graphs_that_differ_in_dims_alone() -> None:
    layer, x = nn.Linear(3, 2), torch.randn(B, B, 3)
    clipper = PerSampleClipper(layer, 1.0, verify="first", reduction="sum")
    for dim in (1, 0, 1):
        exact(layer, lambda dim=dim: layer(x).square().sum((dim, 2)), clipper)
    for out in (lambda h: h, lambda h: h.permute(1, 0, 2), lambda h: h.permute(0, 1, 2)):
        exact(layer, lambda out=out: per_sample(out(layer(x))), clipper)


def test_changes_inside_of_the_block_are_refused() -> None:
    x = torch.randn(B, 3)

    def fresh() -> nn.Sequential:
        return nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))

    words = "was not the model's, or not trained"
    model = fresh()
    with PerSampleClipper(model, 1.0) as clipper:
        model[0] = nn.Linear(3, 3)
        with pytest.raises(RuntimeError, match=words):
            clipper.backward(per_sample(model(x)))
    model = fresh()
    model[0].requires_grad_(False)
    with PerSampleClipper(model, 1.0) as clipper:
        model[0].requires_grad_(True)
        with pytest.raises(RuntimeError, match=words):
            clipper.backward(per_sample(model(x)))
    with PerSampleClipper(model, 1.0) as clipper:
        model[0].weight = nn.Parameter(torch.randn(3, 3))
        with pytest.raises(RuntimeError, match=words):
            clipper.backward(per_sample(model(x)))
    with PerSampleClipper(model, 1.0) as clipper:
        model[2].forward = lambda x: F.linear(x, model[2].weight)
        with pytest.raises(RuntimeError, match="is used where"):
            clipper.backward(per_sample(model(x)))
    for p in model.parameters():
        assert p.grad is None


def test_changes_between_blocks_count() -> None:
    conv = nn.Conv1d(2, 3, 3)
    model = nn.Sequential(conv, nn.Flatten())
    clipper = PerSampleClipper(model, 1.0, reduction="sum", verify="first")
    x = torch.randn(B, 2, 6)
    exact(model, lambda: per_sample(model(x)), clipper)
    conv.padding, conv.stride = (2,), (2,)
    exact(model, lambda: per_sample(model(x)), clipper)
    model[0] = nn.Conv1d(2, 3, 2)
    exact(model, lambda: per_sample(model(x)), clipper)
    model[0].bias.requires_grad_(False)
    exact(model, lambda: per_sample(model(x)), clipper)
    nn.utils.parametrizations.weight_norm(model[0])
    exact(model, lambda: per_sample(model(x)), clipper)


def test_other_backward_passes_inside_of_the_block_are_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    x = torch.randn(B, 3, requires_grad=True)
    with PerSampleClipper(model, 1.0) as clipper:
        with pytest.raises(RuntimeError, match=r"other than clipper\.backward"):
            model(x).sum().backward()
        torch.autograd.grad(model(x).sum(), x)
        clipper.backward(per_sample(model(x)))
    assert all(p.grad is not None for p in model.parameters())
    model.zero_grad()
    model(x).sum().backward()


def test_gradient_hooks_are_refused() -> None:
    model = nn.Linear(3, 2)
    handle = model.weight.register_hook(lambda g: g * 0)
    with (
        pytest.raises(ValueError, match="'weight' has a gradient hook"),
        PerSampleClipper(model, 1),
    ):
        pytest.fail("entered")
    assert len(model.weight._backward_hooks or {}) == 1
    handle.remove()
    exact(model, lambda: per_sample(model(torch.ones(B, 3).cumsum(0))))


def test_copies_made_inside_of_the_block_are_plain() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    x = torch.randn(B, 3)
    with PerSampleClipper(model, 1.0):
        copied = copy.deepcopy(model)
        assert torch.equal(copied(x), model(x))
    copied(x).square().sum().backward()
    model(x).square().sum().backward()
    assert_close(gradients(copied), gradients(model), 0.0)


# --- what crashed ---------------------------------------------------------------------------------


def test_lazy_layers_that_first_run_inside_of_the_block() -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.LazyConv1d(3, 2), nn.Flatten())
    x = torch.randn(B, 2, 3)
    with PerSampleClipper(model, 1.0, reduction="sum") as clipper:
        first = clipper.backward(per_sample(model(x)))
        second = clipper.backward(per_sample(model(x)))
    assert_close([first.norms], [second.norms], 1e-12)
    assert type(model[0]) is nn.Linear
    assert model[0].in_features == 3
    assert type(model[2]) is nn.Conv1d
    exact(model, lambda: per_sample(model(x)))


@pytest.mark.parametrize("sparse", [True, False])
def test_matrix_factorisation_with_a_mean(sparse: bool) -> None:
    tables = {name: nn.Embedding(9, 3, sparse=sparse) for name in ("user", "item")}
    model = Apply(
        lambda m, u, i: (m.user(u) * m.item(i)).sum(1) + m.mean,
        mean=nn.Parameter(torch.tensor(0.5)),
        **tables,
    )
    u, i = torch.randint(9, (2, B))
    exact(model, lambda: model(u, i).square())
    with PerSampleClipper(model, 1.0) as clipper:
        clipper.backward(model(u, i).square())
    assert model.user.weight.grad.is_sparse == sparse


def test_flat_indices_as_first_argument() -> None:
    bag, odd = nn.EmbeddingBag(7, 3), nn.PReLU(3)
    whole = Apply(lambda m, i, offsets: m.odd(m.bag(i, offsets)), bag=bag, odd=odd)
    ids = torch.randint(7, (11,))
    offsets = torch.tensor([0, 3, 3, 9])
    exact(whole, lambda: per_sample(whole(ids, offsets)))
    with PerSampleClipper(whole, 1.0) as clipper:
        clipper.expect(B)
        clipper.backward(per_sample(whole(ids, offsets)))
        clipper.backward(per_sample(whole(ids, offsets)))


def test_bags_with_indices_behind_the_last_offset() -> None:
    ids = torch.randint(7, (11,))
    offsets = torch.tensor([0, 3, 3, 7, 9])
    for mode in ("sum", "mean", "max"):
        model = nn.EmbeddingBag(7, 3, mode=mode, include_last_offset=True)
        weights = torch.randn(11) if mode == "sum" else None
        exact(model, lambda model=model, w=weights: per_sample(model(ids, offsets, w)))
    single = nn.EmbeddingBag(7, 3, include_last_offset=True).float()
    refused(single, lambda: per_sample(single(ids, offsets)), "its last offset leaves out 2")


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_of_all_dims(dims: int, groups: int) -> None:
    size = (5, 4, 3)[:dims]
    options = {"groups": groups, "stride": 2, "padding": 1}
    conv = getattr(nn, f"Conv{dims}d")(2, 4, 2, **options)
    transposed = getattr(nn, f"ConvTranspose{dims}d")(2, 4, 2, output_padding=1, **options)
    dilated = getattr(nn, f"ConvTranspose{dims}d")(
        2, 4, 2, dilation=3, output_padding=2, groups=groups, stride=1
    )
    x = torch.randn(2, B, *size).transpose(0, 1)  # not contiguous
    for layer in (conv, transposed, dilated):
        exact(layer, lambda layer=layer: per_sample(layer(x)))
        layer.bias.requires_grad_(False)
        exact(layer, lambda layer=layer: per_sample(layer(x)))
        model = Apply(lambda m, x: m.a(x).mean(tuple(range(2, 2 + dims))) * m.b, a=layer)
        model.b = nn.Parameter(torch.randn(4))
        exact(model, lambda model=model: per_sample(model(x)))


@pytest.mark.parametrize("layer", ["GroupNorm", "Conv3d", "ConvTranspose2d"])
def test_empty_batches(layer: str) -> None:
    model, shape = {
        "GroupNorm": (nn.GroupNorm(2, 4), (4, 3)),
        "Conv3d": (nn.Conv3d(2, 3, 2), (2, 3, 3, 3)),
        "ConvTranspose2d": (nn.ConvTranspose2d(2, 3, 2), (2, 3, 3)),
    }[layer]
    with PerSampleClipper(model, 1.0) as clipper:
        result = clipper.backward(model(torch.randn(0, *shape)).flatten(1).sum(1))
    assert result.norms.shape == (0,)
    exact(model, lambda: per_sample(model(torch.ones(B, *shape).cumsum(0).sin())))


@pytest.mark.parametrize("kind", ["RNNCell", "GRUCell", "LSTMCell"])
@pytest.mark.parametrize("bias", [True, False])
def test_recurrent_cells(kind: str, bias: bool) -> None:
    cell = getattr(nn, kind)(3, 4, bias=bias)

    def forward(m: Any, x: Tensor) -> Tensor:
        state = None
        for step in x.unbind(1):
            state = m.cell(step, state)
        return state[0] if isinstance(state, tuple) else state

    model = Apply(forward, cell=cell)
    exact(model, lambda: per_sample(model(torch.ones(B, 3, 3).cumsum(0).sin())))


def test_instance_norm_with_running_statistics() -> None:
    norm = nn.InstanceNorm2d(3, affine=True, track_running_stats=True)
    model = nn.Sequential(nn.Conv2d(2, 3, 2), norm, nn.ReLU(inplace=True))
    x = torch.randn(B, 2, 4, 4)
    exact(model, lambda: per_sample(model(x)))
    exact(model.eval(), lambda: per_sample(model(x)))


# --- noise ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(2, 8), (8, 2), (8, 0), (0, 8), (8, 8), (2,)])
def test_noise_is_added_once_a_step_for_the_most_that_a_sample_adds(sizes: tuple[int, ...]) -> None:
    layer = nn.Linear(100, 100, bias=False)
    generator = torch.Generator().manual_seed(0)
    clipper = PerSampleClipper(layer, 0.5, noise_multiplier=2.0, generator=generator)
    for _ in range(2):
        layer.zero_grad()
        with clipper:
            for i, size in enumerate(sizes):
                losses = layer(torch.zeros(size, 100)).sum(1)
                clipper.backward(losses, last=i + 1 == len(sizes))
        most = 2.0 * 0.5 / min(size for size in sizes if size)
        assert float(gradients(layer)[0].std()) == pytest.approx(most, rel=0.05)


def test_a_single_loss_of_rows_that_were_spread() -> None:
    table = nn.Embedding(3, 4)
    model = Apply(lambda m, x: x.transpose(0, 1) + m.table(torch.arange(1))[None], table=table)
    x = torch.randn(2, 1, 4)  # two rows for one sample, time first inside of the model
    exact(model, lambda: model(x).square().sum().reshape(1))
    added = Apply(lambda m, x: x.sum((0, 1)) + m.table(torch.arange(1)).sum(0), table=table)
    refused(added, lambda: added(x).square().sum().reshape(1), "'table'.* given a row for every")
