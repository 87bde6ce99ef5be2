"""Random models under the clipper, in float64: exact, or refused with a sentence.

A case draws layers, how they are shared and tied, where the samples are, a mode, weights, users,
and batches whose sizes change. The reference is each loss's gradient by itself. Models without
anything odd must be exact. EMBATTLE_CLIPPING_CASES is how many cases are drawn (1,000).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from clipping_cases import clipped_sum, gradients
from embattle.clipping import PerSampleClipper
from torch import Tensor, nn

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

D = 4
VOCABULARY = 5
CASES = int(os.environ.get("EMBATTLE_CLIPPING_CASES", "1000"))
PARTS = 10


class Gain(nn.Module):
    """Parameters that a module uses itself, of any shape that spreads over [B, T, D]."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.gain, self.shift = (nn.Parameter(torch.randn(shape)) for _ in range(2))

    def forward(self, h: Tensor) -> Tensor:
        return h * self.gain.exp() + self.shift


class Mixer(nn.Module):
    """A use of a parameter that no rule knows."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(D, D))
        self.inner = nn.Sequential(nn.Linear(D, D), nn.Dropout(0.0))

    def forward(self, h: Tensor) -> Tensor:
        return torch.einsum("...i,ij->...j", self.inner(h), self.mix).tanh()


class Coupled(Mixer):
    def forward(self, h: Tensor) -> Tensor:
        return super().forward(h - h.mean(0))


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.tanh(), self.bias) * 2


class Doubled(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + F.embedding(input, self.weight, self.padding_idx)


class Start(nn.Module):
    """A recurrent layer with a learned initial state."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.randn(1, 1, D))
        self.rnn = nn.GRU(D, D, batch_first=True)

    def forward(self, h: Tensor) -> Tensor:
        return self.rnn(h, self.start.expand(-1, len(h), -1).contiguous())[0]


class LowRank(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factors = nn.ParameterList([torch.randn(D, 2), torch.randn(2, D)])

    def forward(self, h: Tensor) -> Tensor:
        return h + h @ self.factors[0] @ self.factors[1]


def weight_norm() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Linear(D, D))


def rows(layer: nn.Module, h: Tensor) -> Tensor:
    return layer(h.flatten(0, 1)).reshape(h.shape)


def per_time(layer: nn.Module, h: Tensor, first: bool) -> Tensor:
    """Layers that have samples first and channels second, along time."""
    x = h.permute(1, 2, 0) if first else h.transpose(1, 2)
    x = layer(F.pad(x, (0, 2)))[..., : x.shape[-1]]
    return x.permute(2, 0, 1) if first else x.transpose(1, 2)


def recurrent(layer: nn.Module, h: Tensor, first: bool) -> Tensor:
    out, last = layer(h.transpose(0, 1) if first else h)
    last = (last[0] if isinstance(last, tuple) else last)[-1]
    out = out + last[:, None]
    return out.transpose(0, 1) if first else out


def cells(layer: nn.Module, h: Tensor, first: bool) -> Tensor:
    state: Any = None
    outs = []
    for step in h.unbind(0 if first else 1):
        state = layer(step, state)
        outs.append(state[0] if isinstance(state, tuple) else state)
    return torch.stack(outs, 0 if first else 1)


def attend(layer: nn.Module, h: Tensor, first: bool) -> Tensor:
    x = h if layer.batch_first != first else h.transpose(0, 1)
    mask = torch.ones(2 * [x.shape[1 if layer.batch_first else 0]]).tril()
    out = layer(x, x, x, attn_mask=mask, need_weights=False)[0]
    return out if layer.batch_first != first else out.transpose(0, 1)


def twice(layer: nn.Module, h: Tensor) -> Tensor:
    return layer(layer(h).tanh())


def look_up(layer: nn.Module, h: Tensor, ids: Tensor, first: bool) -> Tensor:
    return h + layer(ids.t() if first else ids)


def bag(layer: nn.Module, h: Tensor, ids: Tensor, first: bool) -> Tensor:
    """One bag a sample; or a bag for each position, positions first."""
    if not first:
        return h + layer(ids)[:, None]
    lengths = (ids.t().flatten() > 1).long()
    offsets = lengths.cumsum(0) - lengths
    found = layer(ids.t().flatten()[lengths.bool()], offsets)
    return h + found.reshape(h.shape)


def positions(layer: nn.Module, h: Tensor, first: bool) -> Tensor:
    length = h.shape[0 if first else 1]
    spread = layer(torch.arange(length)[None])
    return h + (spread.transpose(0, 1) if first else spread)


@dataclass
class Kind:
    """How a block is made and run; `plain`: whether it must not be refused."""

    make: Callable[[], nn.Module | None]
    run: Callable[..., Tensor]
    plain: bool = True


KINDS: dict[str, Kind] = {
    "linear": Kind(lambda: nn.Linear(D, D), lambda m, h, i, f: m(h)),
    "no bias": Kind(lambda: nn.Linear(D, D, bias=False), lambda m, h, i, f: m(h)),
    "twice": Kind(lambda: nn.Linear(D, D), lambda m, h, i, f: twice(m, h)),
    "rows": Kind(lambda: nn.Linear(D, D), lambda m, h, i, f: rows(m, h)),
    "in place": Kind(lambda: nn.Linear(D, D), lambda m, h, i, f: F.relu(m(h), inplace=True) + h),
    "scaled": Kind(lambda: Scaled(D, D), lambda m, h, i, f: m(h)),
    "weight norm": Kind(weight_norm, lambda m, h, i, f: m(h)),
    "low rank": Kind(LowRank, lambda m, h, i, f: m(h)),
    "layer norm": Kind(lambda: nn.LayerNorm(D), lambda m, h, i, f: m(h)),
    "rms norm": Kind(lambda: nn.RMSNorm(D), lambda m, h, i, f: m(h)),
    "group norm": Kind(lambda: nn.GroupNorm(2, D), lambda m, h, i, f: rows(m, h)),
    "batch norm": Kind(lambda: nn.BatchNorm1d(D).eval(), lambda m, h, i, f: rows(m, h)),
    "gain": Kind(lambda: Gain(D), lambda m, h, i, f: m(h)),
    "gain [1, D]": Kind(lambda: Gain(1, D), lambda m, h, i, f: m(h)),
    "gain [1, 1, D]": Kind(lambda: Gain(1, 1, D), lambda m, h, i, f: m(h)),
    "gain []": Kind(lambda: Gain(), lambda m, h, i, f: m(h)),
    "conv": Kind(lambda: nn.Conv1d(D, D, 3), lambda m, h, i, f: per_time(m, h, f)),
    "deconv": Kind(lambda: nn.ConvTranspose1d(D, D, 3), lambda m, h, i, f: per_time(m, h, f)),
    "gru": Kind(lambda: nn.GRU(D, D, batch_first=True), lambda m, h, i, f: recurrent(m, h, f)),
    "lstm": Kind(lambda: nn.LSTM(D, D, batch_first=True), lambda m, h, i, f: recurrent(m, h, f)),
    "start": Kind(Start, lambda m, h, i, f: m(h.transpose(0, 1)).transpose(0, 1) if f else m(h)),
    "lstm cell": Kind(lambda: nn.LSTMCell(D, D), lambda m, h, i, f: cells(m, h, f)),
    "attention": Kind(lambda: nn.MultiheadAttention(D, 2), lambda m, h, i, f: attend(m, h, f)),
    "attention, batch first": Kind(
        lambda: nn.MultiheadAttention(D, 2, batch_first=True), lambda m, h, i, f: attend(m, h, f)
    ),
    "table": Kind(lambda: nn.Embedding(VOCABULARY, D), look_up),
    "padded table": Kind(lambda: nn.Embedding(VOCABULARY, D, padding_idx=1), look_up),
    "sparse table": Kind(lambda: nn.Embedding(VOCABULARY, D, sparse=True), look_up),
    "own table": Kind(lambda: Doubled(VOCABULARY, D, padding_idx=0), look_up),
    "bag": Kind(lambda: nn.EmbeddingBag(VOCABULARY, D, mode="sum"), bag),
    "mean bag": Kind(lambda: nn.EmbeddingBag(VOCABULARY, D, padding_idx=2), bag),
    "positions": Kind(
        lambda: nn.Embedding(9, D), lambda m, h, i, f: positions(m, h, f), plain=False
    ),
    "prelu": Kind(nn.PReLU, lambda m, h, i, f: m(h), plain=False),
    "mixer": Kind(Mixer, lambda m, h, i, f: m(h), plain=False),
    "coupled": Kind(Coupled, lambda m, h, i, f: m(h), plain=False),
    "statistics": Kind(lambda: None, lambda m, h, i, f: h - h.mean(1 if f else 0, True), False),
    "rolled": Kind(lambda: None, lambda m, h, i, f: h + h.roll(1, 1 if f else 0), plain=False),
    "roll of times": Kind(lambda: None, lambda m, h, i, f: h + h.roll(1, 0 if f else 1)),
    "positions shared": Kind(
        lambda: nn.Embedding(9, D),
        lambda m, h, i, f: h + m(torch.arange(h.shape[0 if f else 1])).unsqueeze(1 if f else 0),
        plain=False,
    ),
}


class Net(nn.Module):
    def __init__(self, names: list[str], first: bool) -> None:
        super().__init__()
        self.inside = nn.Linear(D, D)
        self.blocks = nn.ModuleList(KINDS[name].make() or nn.Identity() for name in names)
        self.head = nn.Linear(D, 2)
        self.names, self.first = names, first

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        h = self.inside(x)
        h = h.transpose(0, 1) if self.first else h
        for name, block in zip(self.names, self.blocks, strict=True):
            h = KINDS[name].run(block, h, ids, self.first)
        out = self.head(h)
        return out.transpose(0, 1) if self.first else out


def tie(model: Net, pairs: list[tuple[int, int]]) -> bool:
    """Shares weights of the first's shape, across kinds of layers; whether any was tied."""
    tied = False
    for a, b in pairs:
        layers = [m for m in model.modules() if isinstance(m._parameters.get("weight"), Tensor)]
        first, second = layers[a % len(layers)], layers[b % len(layers)]
        if first.weight.shape == second.weight.shape and first is not second:
            second.weight = first.weight
            tied = True
    return tied


@dataclass
class Case:
    """What is drawn."""

    names: list[str]
    first: bool
    batches: list[tuple[int, int]]
    ties: list[tuple[int, int]]
    frozen: list[int]
    mode: str
    weights: bool
    users: bool
    copies: int
    hook: str
    loss: str
    verify: str
    functional: bool
    seed: int


@st.composite
def cases(draw: Any) -> Case:
    samples = draw(st.integers(1, 4))
    sizes = st.tuples(
        st.sampled_from([samples, samples, 1, 2, 3]), st.sampled_from([1, 2, 3, samples])
    )
    seldom = st.integers(0, 15)
    return Case(
        names=draw(st.lists(st.sampled_from(list(KINDS)), min_size=1, max_size=4)),
        first=draw(st.booleans()),
        batches=draw(st.lists(sizes, min_size=1, max_size=3)),
        ties=draw(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=2)),
        frozen=draw(st.lists(st.integers(0, 12), max_size=2)),
        mode=draw(st.sampled_from(["flat", "per_layer", "automatic"])),
        weights=draw(st.booleans()),
        users=draw(st.booleans()),
        copies=draw(st.sampled_from([1, 1, 1, 2])),
        hook={0: "scales", 1: "couples"}.get(draw(seldom), ""),
        loss={0: "pairs", 1: "listwise", 2: "masked", 3: "zeros"}.get(draw(seldom), ""),
        verify=draw(st.sampled_from(["sampled", "always", "first"])),
        functional=draw(seldom) == 0,
        seed=draw(st.integers(0, 2**31)),
    )


def losses_of(case: Case, model: Net, x: Tensor, ids: Tensor) -> Tensor:
    if case.functional:
        scaled = {n: p * 0.7 for n, p in model.named_parameters()}
        out = torch.func.functional_call(model, scaled, (x, ids))
    else:
        out = model(x, ids)
    each = (out.sin() * 3 + out.square()).flatten(1).sum(1)
    if case.copies > 1:
        each = each.reshape(-1, case.copies).sum(1)
    if case.loss == "pairs":
        each = each + 0.1 * each.roll(1) * each
    elif case.loss == "listwise":
        each = -each.log_softmax(0)
    elif case.loss == "masked":
        each = each[: max(len(each) - 1, 1)]
    elif case.loss == "zeros":
        each = each * (torch.arange(len(each)) % 2)
    return each


def build(case: Case) -> tuple[Net, bool]:
    """The model, and whether it must be exact."""
    model = Net(case.names, case.first)
    plain = all(KINDS[name].plain for name in case.names)
    tie(model, case.ties)
    parameters = list(model.parameters())
    for i in case.frozen:
        parameters[i % len(parameters)].requires_grad_(False)
    if all(not p.requires_grad for p in parameters):
        parameters[0].requires_grad_(True)
    if case.hook == "scales":
        model.blocks[0].register_forward_hook(
            lambda m, args, out: out * 2 if isinstance(out, Tensor) else None
        )
    elif case.hook == "couples":
        model.inside.register_forward_hook(lambda m, args, out: out + out.flip(0))
    # Ids [1, B] look like positions [1, T], which are the same for all samples.
    ids = case.first and any("table" in name for name in case.names)
    odd = ids and any(length == 1 for _, length in case.batches)
    odd |= case.functional or case.hook == "couples" or case.loss in ("pairs", "listwise", "masked")
    return model, plain and not odd


def run(case: Case) -> None:
    """Raises AssertionError where a result is wrong, or a plain model refused."""
    torch.manual_seed(case.seed)
    model, plain = build(case)
    clipper = PerSampleClipper(model, 1.0, case.mode, reduction="sum", verify=case.verify)
    trained = [p for p in model.parameters() if p.requires_grad]
    for samples, length in case.batches:
        x = torch.randn(samples * case.copies, length, D)
        ids = torch.randint(VOCABULARY, x.shape[:2])
        losses = losses_of(case, model, x, ids)
        if not losses.requires_grad:
            return
        singles = []
        for loss in losses.unbind():
            grads = torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True)
            singles.append(
                [
                    torch.zeros_like(p) if g is None else (g.to_dense() if g.is_sparse else g)
                    for p, g in zip(trained, grads, strict=True)
                ]
            )
        count = len(losses)
        weights = torch.rand(count).mul(3).floor() if case.weights else None
        users = torch.randint(2, (count,)) if case.users else None
        bound = 0.7 * float(torch.stack([g.norm() for g in singles[0]]).norm()) + 1e-3
        wanted, norms = clipped_sum(singles, bound, case.mode, weights, users)
        for p in trained:
            p.grad = None
        refused: Exception | None = None
        try:
            with clipper:
                result = clipper.backward(
                    losses_of(case, model, x, ids), weights=weights, users=users, max_norm=bound
                )
        except (ValueError, RuntimeError) as error:
            refused = error
        if refused is not None:
            assert "PerSampleClipper: " in str(refused), f"a raw error: {refused!r}"
            assert all(p.grad is None for p in trained), "refused, and yet in .grad"
            assert not plain, f"refused: {refused}"
            return
        scale = max(float(norms.max()), 1e-6)
        assert float((result.norms - norms).abs().max()) <= 1e-8 * scale, "norms"
        for found, exact in zip(gradients(model), wanted, strict=True):
            assert float((found - exact).abs().max()) <= 1e-8 * max(scale, bound), "sums"


# Each part is a test of its own to hypothesis, which then draws other cases for it.
@pytest.mark.parametrize("part", range(PARTS))
@settings(
    max_examples=CASES // PARTS,
    derandomize=CASES <= 1000,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(cases())
def test_random_models_are_exact_or_refused(part: int, case: Case) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        run(case)
    finally:
        torch.set_default_dtype(torch.float32)
