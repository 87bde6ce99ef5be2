"""Models and batches for the clipping tests, and the definition: a loop over samples."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SAMPLES = 6


class Apply(nn.Module):
    """A model whose forward is a function of its parts and the batch."""

    def __init__(self, forward: Callable[..., Tensor], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, nn.Parameter):
                self.register_parameter(name, part)
            else:
                setattr(self, name, part)
        self._function = [forward]

    def forward(self, *batch: Any) -> Tensor:
        return self._function[0](self, *batch)


@dataclass
class Case:
    """A model and what it is called with.

    Attributes:
        model: in float64.
        batch: tensors whose dim batch_dims[i] holds the samples.
        batch_dims: per tensor; 0 by default; None for a tensor shared by all samples.
        options: of PerSampleClipper.
    """

    model: nn.Module
    batch: list[Tensor]
    batch_dims: list[int | None] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)

    def dims(self) -> list[int | None]:
        return self.batch_dims or [0] * len(self.batch)

    def part(self, rows: list[int]) -> list[Tensor]:
        return [
            x if dim is None else x.index_select(dim, torch.tensor(rows))
            for x, dim in zip(self.batch, self.dims(), strict=True)
        ]

    def losses(
        self, batch: list[Tensor], samples: int, run: Callable[..., Tensor] | None = None
    ) -> Tensor:
        """One non-linear loss per sample of whatever the model returns; samples first or second.

        `run` calls the model, where it is not just called.
        """
        out = (self.model if run is None else run)(*batch)
        if "batch_dim" in self.options or out.shape[0] != samples:
            out = out.movedim(self.options.get("batch_dim", 1), 0)
        return (out.reshape(samples, -1).sin() * 3 + out.reshape(samples, -1).square()).sum(1)


def single_gradients(case: Case) -> list[list[Tensor]]:
    """For every sample the gradients of all trained parameters, by plain autograd."""
    trained = [p for p in case.model.parameters() if p.requires_grad]
    found = []
    for b in range(SAMPLES):
        loss = case.losses(case.part([b]), 1)
        grads = torch.autograd.grad(loss.sum(), trained, allow_unused=True)
        found.append(
            [
                torch.zeros_like(p) if g is None else (g.to_dense() if g.is_sparse else g)
                for p, g in zip(trained, grads, strict=True)
            ]
        )
    return found


def clipped_sum(
    grads: list[list[Tensor]],
    max_norm: float | list[float],
    mode: str = "flat",
    weights: Tensor | None = None,
    users: Tensor | None = None,
    gamma: float = 0.01,
) -> tuple[list[Tensor], Tensor]:
    """The definition: sums over samples (or users) of clipped gradients, and the norms."""
    if users is not None:
        scale = torch.ones(len(grads)).double() if weights is None else weights
        grads = [
            [
                sum(scale[b] * grads[b][i] for b in range(len(grads)) if users[b] == u)
                for i in range(len(grads[0]))
            ]
            for u in users.unique()
        ]
        weights = None
    norms = torch.stack([torch.stack([g.double().norm() for g in own]) for own in grads])
    if mode != "per_layer":
        norms = norms.norm(dim=1)
    limit = torch.as_tensor(max_norm, dtype=torch.float64)
    if mode == "automatic":
        factors = limit / (norms + gamma)
    else:
        factors = torch.where(norms > limit, limit / norms, 1.0)
    if weights is not None:
        factors = factors * weights.reshape(-1, *[1] * (factors.dim() - 1))
    sums = []
    for i in range(len(grads[0])):
        own = factors if factors.dim() == 1 else factors[:, i]
        sums.append(sum(c * g[i] for c, g in zip(own, grads, strict=True)))
    return sums, norms


def _cases() -> dict[str, Callable[[], Case]]:
    """name -> builder; built under a fixed seed."""
    made: dict[str, Callable[[], Case]] = {}

    def case(build: Callable[[], Case]) -> Callable[[], Case]:
        made[build.__name__] = build
        return build

    def x(*shape: int) -> Tensor:
        return torch.randn(SAMPLES, *shape)

    def ids(high: int, *shape: int) -> Tensor:
        return torch.randint(high, (SAMPLES, *shape))

    @case
    def linear() -> Case:
        return Case(nn.Linear(3, 4), [x(3)])

    @case
    def linear_3d() -> Case:
        return Case(
            nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2, bias=False)), [x(7, 3)]
        )

    @case
    def linear_5d() -> Case:
        return Case(nn.Linear(3, 4), [x(2, 3, 2, 3)])

    @case
    def linear_wide_gram() -> Case:
        return Case(nn.Linear(40, 50), [x(3, 40)])

    @case
    def linear_inplace() -> Case:
        return Case(nn.Sequential(nn.Linear(3, 5), nn.ReLU(inplace=True), nn.Linear(5, 2)), [x(3)])

    @case
    def linear_3d_inplace() -> Case:
        return Case(
            nn.Sequential(nn.Linear(3, 5), nn.ReLU(inplace=True), nn.Linear(5, 2)), [x(4, 3)]
        )

    @case
    def embedding_inplace() -> Case:
        def forward(m: Any, i: Tensor) -> Tensor:
            return m.f(m.table(i).mul_(2).add_(m.f(m.table(i))))

        return Case(Apply(forward, table=nn.Embedding(5, 3), f=nn.Linear(3, 3)), [ids(5, 4)])

    @case
    def linear_shared_twice() -> Case:
        return Case(
            Apply(lambda m, a, b: m.f(m.f(a).tanh()) * m.f(b).mean(1), f=nn.Linear(4, 4)),
            [x(4), x(3, 4)],
        )

    @case
    def linear_tied_bias_apart() -> Case:
        first, second = nn.Linear(4, 4), nn.Linear(4, 4)
        second.weight = first.weight
        return Case(nn.Sequential(first, nn.Tanh(), second), [x(2, 4)])

    @case
    def linear_rows_folded() -> Case:
        return Case(
            Apply(lambda m, a: m.f(a.reshape(-1, 3)).reshape(len(a), -1), f=nn.Linear(3, 4)),
            [x(5, 3)],
        )

    @case
    def frozen_parts() -> Case:
        model = nn.Sequential(
            nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 2)
        )
        model[2].requires_grad_(False)
        model[0].weight.requires_grad_(False)
        model[4].bias.requires_grad_(False)
        return Case(model, [x(3)])

    @case
    def embedding() -> Case:
        return Case(nn.Embedding(7, 3), [ids(7, 5)])

    @case
    def embedding_ids_1d() -> Case:
        return Case(
            Apply(lambda m, i: m.out(m.table(i)), table=nn.Embedding(5, 3), out=nn.Linear(3, 2)),
            [ids(5)],
        )

    @case
    def embedding_padding() -> Case:
        return Case(nn.Embedding(4, 3, padding_idx=2), [ids(4, 8)])

    @case
    def embedding_sparse() -> Case:
        return Case(nn.Embedding(6, 3, padding_idx=1, sparse=True), [ids(6, 2, 4)])

    @case
    def embedding_max_norm() -> Case:
        table = nn.Embedding(5, 3, max_norm=0.7)
        table(torch.arange(5))  # in shape before: the loop over samples does it one by one
        return Case(table, [ids(5, 3)])

    @case
    def embedding_shared_paddings() -> Case:
        first, second = nn.Embedding(6, 3, padding_idx=0), nn.Embedding(6, 3, padding_idx=3)
        second.weight = first.weight
        return Case(
            Apply(lambda m, i, j: m.a(i) * m.b(j), a=first, b=second), [ids(6, 4), ids(6, 4)]
        )

    @case
    def embedding_tables() -> Case:
        def forward(m: Any, i: Tensor, j: Tensor) -> Tensor:
            return m.f(torch.cat([m.a(i), m.b(i), m.c(j).mean(1), m.d(j).sum(1)], 1))

        parts = {
            "a": nn.Embedding(5, 3),
            "b": nn.Embedding(9, 3, padding_idx=2),
            "c": nn.Embedding(6, 3, padding_idx=0),
            "d": nn.Embedding(6, 2),
            "f": nn.Linear(11, 2),
        }
        return Case(Apply(forward, **parts), [ids(5), ids(6, 4)])

    @case
    def embedding_tables_joined() -> Case:
        def forward(m: Any, i: Tensor, j: Tensor) -> Tensor:
            found = [table(column) for table, column in zip(m.tables, i.unbind(1), strict=True)]
            return m.f(torch.cat([*found, m.other(j.int())], 1))

        tables = nn.ModuleList(nn.Embedding(rows, 3) for rows in (4, 6, 5))
        parts = {"tables": tables, "other": nn.Embedding(7, 3), "f": nn.Linear(12, 2)}
        return Case(Apply(forward, **parts), [ids(4, 3), ids(7)])

    @case
    def tied_head() -> Case:
        table, head = nn.Embedding(9, 4, padding_idx=0), nn.Linear(4, 9)
        head.weight = table.weight
        return Case(
            Apply(
                lambda m, i: m.head(m.mid(m.table(i)).tanh()),
                table=table,
                mid=nn.Linear(4, 4),
                head=head,
            ),
            [ids(9, 5)],
        )

    def bag(mode: str, **options: Any) -> Callable[[], Case]:
        return lambda: Case(nn.EmbeddingBag(6, 3, mode=mode, **options), [ids(6, 4)])

    made["bag_sum"] = bag("sum")
    made["bag_mean_padding"] = bag("mean", padding_idx=1)
    made["bag_max"] = bag("max", padding_idx=1)
    made["bag_sum_sparse"] = bag("sum", sparse=True)

    @case
    def bag_weights() -> Case:
        return Case(
            Apply(
                lambda m, i, a: m.bag(i, per_sample_weights=m.gate(a).sigmoid()),
                bag=nn.EmbeddingBag(6, 3, mode="sum", padding_idx=0),
                gate=nn.Linear(2, 4),
            ),
            [ids(6, 4), x(2)],
        )

    @case
    def bag_twice() -> Case:
        return Case(
            Apply(lambda m, i, j: m.bag(i) * m.bag(j), bag=nn.EmbeddingBag(6, 3, mode="mean")),
            [ids(6, 4), ids(6, 3)],
        )

    class Scaled(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input + 1) * 3.0

    class Squashed(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            return F.embedding(input, self.weight.tanh(), self.padding_idx)

    @case
    def embedding_subclass_tied() -> Case:
        table, head = Scaled(9, 4, padding_idx=2), nn.Linear(4, 9)
        head.weight = table.weight
        return Case(
            Apply(lambda m, i: m.head(m.table(i).tanh()), table=table, head=head), [ids(8, 5)]
        )

    @case
    def embedding_subclass_functional() -> Case:
        return Case(Squashed(6, 4, padding_idx=2), [ids(6, 5)])

    @case
    def embedding_inside_functional() -> Case:
        def forward(m: Any, i: Tensor) -> Tensor:
            return m.table(i) * m.gain

        parts = {"table": nn.Embedding(6, 4, padding_idx=2), "gain": nn.Parameter(torch.randn(4))}
        return Case(Apply(forward, **parts), [ids(6, 5)])

    @case
    def bag_inside_functional() -> Case:
        def forward(m: Any, i: Tensor) -> Tensor:
            return m.table(i) * m.gain

        table = nn.EmbeddingBag(6, 4, padding_idx=2)
        return Case(Apply(forward, table=table, gain=nn.Parameter(torch.randn(4))), [ids(6, 5)])

    def ragged(**options: Any) -> Callable[[], Case]:
        """1-D indices and offsets; each sample's bag has as many words as its length says."""

        def build() -> Case:
            last = options.get("include_last_offset", False)

            def forward(m: Any, i: Tensor, length: Tensor, gate: Tensor) -> Tensor:
                inside = torch.arange(i.shape[1], device=i.device) < length[:, None]
                ends = length.cumsum(0)
                offsets = torch.cat([ends.new_zeros(1), ends if last else ends[:-1]])
                weights = (i[inside] * 0.1 * gate[0]).to(m.bag.weight.dtype)
                given = {"per_sample_weights": weights} if m.bag.mode == "sum" else {}
                return m.bag(i[inside], offsets, **given)

            lengths = torch.tensor([3, 1, 0, 4, 4, 2])
            return Case(
                Apply(forward, bag=nn.EmbeddingBag(6, 3, padding_idx=1, **options)),
                [ids(6, 4), lengths, torch.ones(SAMPLES)],
            )

        return build

    made["bag_offsets_sum"] = ragged(mode="sum")
    made["bag_offsets_mean"] = ragged(mode="mean", include_last_offset=True)
    made["bag_offsets_max"] = ragged(mode="max")

    @case
    def bag_per_feature() -> Case:
        return Case(
            Apply(
                lambda m, i: m.bag(i.flatten(0, 1)).reshape(len(i), -1), bag=nn.EmbeddingBag(6, 3)
            ),
            [ids(6, 2, 4)],
        )

    @case
    def positions_1_t() -> Case:
        def forward(m: Any, i: Tensor) -> Tensor:
            return m.f(m.table(i) + m.pos(torch.arange(i.shape[1], device=i.device)[None]))

        parts = {"table": nn.Embedding(5, 3), "pos": nn.Embedding(8, 3), "f": nn.Linear(3, 2)}
        return Case(Apply(forward, **parts), [ids(5, 4)])

    @case
    def positions_t() -> Case:
        def forward(m: Any, i: Tensor) -> Tensor:
            return m.f(m.table(i) + m.pos(torch.arange(i.shape[1], device=i.device)))

        parts = {"table": nn.Embedding(5, 3), "pos": nn.Embedding(8, 3), "f": nn.Linear(3, 2)}
        # as many positions as samples, which nothing but the declaration tells apart
        return Case(Apply(forward, **parts), [ids(5, SAMPLES)], options={"broadcast": ["pos"]})

    @case
    def positions_parameter() -> Case:
        def forward(m: Any, i: Tensor) -> Tensor:
            token = m.cls.expand(len(i), -1, -1)
            return m.f(torch.cat([token, m.table(i) + m.pos[:, : i.shape[1]]], 1))

        parts = {
            "table": nn.Embedding(5, 3),
            "pos": nn.Parameter(torch.randn(1, 6, 3)),
            "cls": nn.Parameter(torch.randn(1, 1, 3)),
            "f": nn.Linear(3, 2),
        }
        return Case(Apply(forward, **parts), [ids(5, 4)])

    def norm(layer: Callable[[], nn.Module], *shape: int) -> Callable[[], Case]:
        def build() -> Case:
            made_layer = layer()
            for p in made_layer.parameters():
                nn.init.normal_(p)
            return Case(nn.Sequential(nn.Linear(shape[-1], shape[-1]), made_layer), [x(*shape)])

        return build

    made["layer_norm"] = norm(lambda: nn.LayerNorm(4), 3, 4)
    made["layer_norm_no_bias"] = norm(lambda: nn.LayerNorm(4, bias=False), 4)
    made["layer_norm_2d"] = norm(lambda: nn.LayerNorm((3, 4)), 2, 3, 4)
    made["rms_norm"] = norm(lambda: nn.RMSNorm(4), 3, 4)
    made["group_norm_functional"] = norm(lambda: nn.GroupNorm(2, 4), 4, 5)
    made["batch_norm_eval"] = norm(lambda: nn.BatchNorm1d(4).eval(), 4)

    @case
    def conv1d() -> Case:
        return Case(
            nn.Sequential(
                nn.Conv1d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv1d(4, 4, 2, stride=2, groups=2)
            ),
            [x(2, 7)],
        )

    @case
    def conv1d_same_circular() -> Case:
        return Case(
            nn.Sequential(
                nn.Conv1d(2, 3, 4, padding="same"),
                nn.Conv1d(3, 2, 3, padding=2, padding_mode="circular"),
            ),
            [x(2, 6)],
        )

    @case
    def conv2d() -> Case:
        return Case(
            nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2),
            [x(4, 6, 7)],
        )

    @case
    def conv2d_depthwise_twice() -> Case:
        return Case(
            Apply(
                lambda m, a: m.f(m.f(a).tanh()),
                f=nn.Conv2d(3, 3, 3, padding=1, groups=3, bias=False),
            ),
            [x(3, 4, 4)],
        )

    @case
    def conv1d_two_lengths() -> Case:
        return Case(
            Apply(lambda m, a, b: m.f(a).mean(2) * m.f(b).mean(2), f=nn.Conv1d(2, 3, 2)),
            [x(2, 4), x(2, 6)],
        )

    def recurrent(kind: type[nn.Module], **options: Any) -> Callable[[], Case]:
        def build() -> Case:
            layer = kind(3, 4, **options)
            first = options.get("batch_first", True)
            data = x(5, 3) if first else torch.randn(5, SAMPLES, 3)
            return Case(
                Apply(
                    lambda m, a: m.f(m.rnn(a)[0]),
                    rnn=layer,
                    f=nn.Linear(layer.proj_size * 2 or (8 if layer.bidirectional else 4), 2),
                ),
                [data],
                [0 if first else 1],
                {} if first else {"batch_dim": 1},
            )

        return build

    made["rnn_relu"] = recurrent(nn.RNN, batch_first=True, nonlinearity="relu")
    made["gru_two_layers"] = recurrent(nn.GRU, batch_first=True, num_layers=2)
    made["gru_bidirectional_time_first"] = recurrent(nn.GRU, batch_first=False, bidirectional=True)
    made["lstm"] = recurrent(nn.LSTM, batch_first=True, bias=False)
    made["lstm_projected"] = recurrent(nn.LSTM, batch_first=True, proj_size=2, bidirectional=True)

    @case
    def gru_packed() -> Case:
        def forward(m: Any, a: Tensor, lengths: Tensor) -> Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(
                a, lengths.cpu(), batch_first=True, enforce_sorted=False
            )
            out, last = m.rnn(packed)
            padded, _ = nn.utils.rnn.pad_packed_sequence(out, batch_first=True, total_length=5)
            return torch.cat([padded.flatten(1), last.transpose(0, 1).flatten(1)], 1)

        return Case(
            Apply(forward, rnn=nn.GRU(3, 4, batch_first=True, bidirectional=True)),
            [x(5, 3), torch.tensor([3, 5, 1, 2, 5, 4])],
        )

    def attention(batch_first: bool, cross: bool, **options: Any) -> Callable[[], Case]:
        def build() -> Case:
            layer = nn.MultiheadAttention(4, 2, batch_first=batch_first, **options)
            hidden = (
                torch.zeros(5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), -math.inf).bool()
            )
            padding = torch.zeros(SAMPLES, 5, dtype=torch.bool)
            padding[::2, 3:] = True

            def forward(m: Any, q: Tensor, k: Tensor, pad: Tensor) -> Tensor:
                key, value = (k, k * 2) if cross else (q, q)
                out, w = m.attn(
                    q, key, value, key_padding_mask=pad, attn_mask=hidden, need_weights=cross
                )
                return out if w is None else out + w.sum() * 0 + out.tanh()

            def data() -> Tensor:
                size = options.get("kdim", 4)
                return x(5, size) if batch_first else torch.randn(5, SAMPLES, size)

            query = x(5, 4) if batch_first else torch.randn(5, SAMPLES, 4)
            where = 0 if batch_first else 1
            options_ = {} if batch_first else {"batch_dim": 1}
            return Case(
                Apply(forward, attn=layer), [query, data(), padding], [where, where, 0], options_
            )

        return build

    made["attention_self"] = attention(True, False)
    made["attention_cross_time_first"] = attention(False, True, bias=False)
    made["attention_separate"] = attention(True, True, kdim=3, vdim=3)
    made["attention_extra_keys"] = attention(True, True, add_bias_kv=True, add_zero_attn=True)

    @case
    def attention_self_and_cross() -> Case:
        def forward(m: Any, a: Tensor, b: Tensor) -> Tensor:
            a = m.attn(a, a, a, need_weights=False)[0]
            return m.attn(a, b, b, need_weights=False)[0]

        return Case(
            Apply(forward, attn=nn.MultiheadAttention(4, 2, batch_first=True)), [x(3, 4), x(2, 4)]
        )

    @case
    def transformer_layer() -> Case:
        layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        return Case(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), [x(3, 4)])

    @case
    def batch_second() -> Case:
        return Case(
            Apply(
                lambda m, i: m.f(m.norm(m.table(i))),
                table=nn.Embedding(5, 3),
                norm=nn.LayerNorm(3),
                f=nn.Linear(3, 2),
            ),
            [torch.randint(5, (4, SAMPLES))],
            [1],
            {"batch_dim": 1},
        )

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.randn(3))
            self.shift = nn.Parameter(torch.randn(()))

        def forward(self, a: Tensor) -> Tensor:
            return a * self.scale + self.shift

    @case
    def scaled_parameters() -> Case:
        return Case(nn.Sequential(nn.Linear(3, 3), Scale(), nn.Tanh(), nn.Linear(3, 2)), [x(4, 3)])

    @case
    def weight_norm() -> Case:
        inner = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))
        return Case(nn.Sequential(nn.Linear(3, 3), inner), [x(3)])

    @case
    def bilinear_functional() -> Case:
        return Case(nn.Bilinear(3, 2, 4), [x(3), x(2)])

    @case
    def module_with_children_and_parameter() -> Case:
        def forward(m: Any, a: Tensor) -> Tensor:
            return m.f(a) * m.gain

        return Case(Apply(forward, f=nn.Linear(3, 4), gain=nn.Parameter(torch.randn(4))), [x(3)])

    @case
    def parameter_list() -> Case:
        def forward(m: Any, a: Tensor) -> Tensor:
            return m.f(a) @ m.held[0] + m.held[1]

        held = nn.ParameterList([torch.randn(4, 2), torch.randn(2)])
        return Case(Apply(forward, f=nn.Linear(3, 4), held=held), [x(5, 3)])

    @case
    def lora() -> Case:
        base = nn.Linear(4, 5)
        base.requires_grad_(False)

        def forward(m: Any, a: Tensor) -> Tensor:
            return m.base(a) + 0.5 * m.up(m.down(a))

        parts = {"down": nn.Linear(4, 2, bias=False), "up": nn.Linear(2, 5, bias=False)}
        return Case(Apply(forward, base=base, **parts), [x(3, 4)])

    @case
    def recommender() -> Case:
        parts = {
            "user": nn.Embedding(5, 3, sparse=True),
            "item": nn.Embedding(7, 3),
            "mlp": nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1)),
        }

        def forward(m: Any, u: Tensor, i: Tensor) -> Tensor:
            return m.mlp(torch.cat([m.user(u), m.item(i)], -1)) + (m.user(u) * m.item(i)).sum(
                -1, True
            )

        return Case(Apply(forward, **parts), [ids(5), ids(7)])

    return made


CASES = _cases()


def make(name: str, dtype: torch.dtype = torch.float64) -> Case:
    """The case of that name, always with the same numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sum(map(ord, name)))
        case = CASES[name]()
    case.model.to(dtype)
    case.batch = [b.to(dtype) if b.is_floating_point() else b for b in case.batch]
    return case


def gradients(model: nn.Module) -> list[Tensor]:
    """Dense .grad of all trained parameters; zero where there is none."""
    found = []
    for p in model.parameters():
        if p.requires_grad:
            g = torch.zeros_like(p) if p.grad is None else p.grad
            found.append(g.to_dense() if g.is_sparse else g)
    return found


def assert_close(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    """Relative to the largest entry of each tensor."""
    for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
        scale = max(float(b.abs().max()), 1e-3) if b.numel() else 1.0
        error = float((a.double() - b.double()).abs().max()) / scale if b.numel() else 0.0
        assert error <= tolerance, f"gradient {i} of shape {tuple(b.shape)}: relative error {error}"


def float_copy(case: Case) -> Case:
    """The case in float32."""
    batch = [b.float() if b.is_floating_point() else b for b in case.batch]
    return Case(copy.deepcopy(case.model).float(), batch, case.batch_dims, case.options)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """[B] losses."""
    return F.cross_entropy(logits, labels, reduction="none")
