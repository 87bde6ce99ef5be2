"""The rules leave the model's function as it is: a plain pass beside the watched one tells.

That pass leaves nothing behind.
"""

from __future__ import annotations

import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from copy import copy, deepcopy
from dataclasses import dataclass
from typing import Any

import embattle as eb
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from clipping_cases import Apply, gradients
from embattle.clipping import PerSampleClipper, operators
from embattle.perturb import model_state
from test_clipping_verify import _float64, exact, per_sample, refused
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

B = 4
assert _float64  # a fixture, for every test here
OTHER = "another function inside the with block"


def _layer(kind: str) -> nn.Module:
    if kind == "grouped":
        return nn.Conv1d(B * 6, B * 6, 3, groups=B * 6)
    return nn.Embedding(9, 5) if kind == "embedding" else nn.Linear(5, 3)


@pytest.mark.parametrize("kind", ["linear", "grouped", "embedding", "without a rule"])
@pytest.mark.parametrize("computed", [True, False])
@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_samples_in_one_row_are_not_copied_for_each(
    kind: str, computed: bool, pooled: bool, training: bool
) -> None:
    """The layer would be given as many copies of the batch."""

    def forward(m: Any, x: Tensor) -> Tensor:
        if computed:  # without a gradient
            x = x + 1 if kind == "embedding" else F.dropout(x, 0.1, m.training) * 2
        one = x.reshape(1, -1) if kind == "embedding" else x.reshape(1, -1, 5)
        out = torch.einsum("bti,ji->btj", one, m.p) if kind == "without a rule" else m.layer(one)
        return out.reshape(len(x), -1, out.shape[-1]).mean(1) if pooled else out.reshape(len(x), -1)

    own: dict[str, Any] = {"layer": _layer(kind)}
    if kind == "without a rule":
        own = {"p": nn.Parameter(torch.randn(3, 5))}
    model = Apply(forward, **own).train(training)
    x = torch.randint(0, 8, (B, 6)) if kind == "embedding" else torch.randn(B, 6, 5)
    for verify in ("first", "sampled", "always"):
        refused(model, lambda: per_sample(model(x)), OTHER, verify=verify)


def test_a_part_of_the_model_does_not_show_what_copies_do() -> None:
    model = Apply(lambda m, x: m.a(x), a=nn.Linear(5, 3))
    x = torch.randn(B, 6, 5)
    with PerSampleClipper(model, 1.0) as clipper:
        clipper.expect(B)
        with pytest.raises(RuntimeError, match="outside of a call of the model itself"):
            model.a((x * 2).reshape(1, -1, 5))


def test_a_rule_that_computes_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.GroupNorm(2, 4))
    right = operators.RULES[F.group_norm]

    def wrong(ops: Any, x: Tensor, groups: int, *args: Any, **kwargs: Any) -> Any:
        return right(ops, x, 1, *args, **kwargs)

    monkeypatch.setitem(operators.RULES, F.group_norm, wrong)
    refused(model, lambda: per_sample(model(torch.randn(B, 5))), OTHER)


@pytest.mark.parametrize("length", [1, 3])
def test_positions_are_still_given_a_row_for_each(length: int) -> None:
    model = Apply(
        lambda m, x: m.a(x) + m.p(torch.arange(x.shape[1])[None]),
        a=nn.Linear(5, 3),
        p=nn.Embedding(3, 3),
    )
    x = torch.randn(B, length, 5)
    exact(model, lambda: per_sample(model(x)), verify="always")


class Stateful(nn.Module):
    """Keeps a count, an average, its features, and a generator."""

    average: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.drop = nn.Linear(5, 5), nn.Dropout(0.5)
        self.calls = 0
        self.all: list[Tensor] = []
        self.generator = torch.Generator().manual_seed(0)
        self.register_buffer("average", torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.average.mul_(0.9).add_(x.mean(0))
        x -= self.average.detach().clone()
        self.features = self.layer(x) * self.calls
        self.all.append(self.features)
        noise = torch.randn(x.shape, generator=self.generator, device="cpu").to(x.device)
        return self.drop(self.features) + noise


def test_the_plain_pass_leaves_nothing_behind() -> None:
    def run(model: Stateful, x: Tensor, model_of: Callable[[Tensor], Tensor]) -> list[Tensor]:
        torch.manual_seed(1)
        model_of(x)
        counts = torch.tensor([model.calls, len(model.all)])
        own = [x, model.average, counts, model.generator.get_state()]
        return [t.clone() for t in [*own, model.features.detach(), torch.rand(3)]]

    torch.manual_seed(0)
    states = []
    for clipped in (False, True):
        torch.manual_seed(0)
        model, x = Stateful(), torch.randn(B, 5)
        if not clipped:
            states.append(run(model, x, model))
            continue
        kept: dict[str, Tensor] = {}
        model.layer.register_forward_hook(lambda _, __, out, kept=kept: kept.update(out=out))
        with PerSampleClipper(model, 1.0, verify="always") as clipper:
            states.append(run(model, x, model))
            clipper.backward(kept["out"].square().sum(1))
    for plain, watched in zip(*states, strict=True):
        assert torch.equal(plain, watched)


class Counting(nn.Module):
    """Counts its passes in all kinds of attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)
        self.last: int | None = None
        self.text, self.steps, self.number = "", (), np.int64(0)
        self.by_name: dict[str, list[int]] = {"steps": []}
        self.averages = [{"x": torch.zeros(5)}]
        self.recent: deque[int] = deque(maxlen=2)
        self.sums: defaultdict[str, int] = defaultdict(int)
        self.counts: Counter[str] = Counter()
        self.seen: set[int] = set()
        self.ordered: OrderedDict[int, int] = OrderedDict()
        self.python, self.numpy = random.Random(0), np.random.default_rng(0)
        self.old = np.random.RandomState(0)

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.added = (self.last or 0) + 1
        self.text, self.number = self.text + "a", self.number + 1
        self.steps = (*self.steps, 1)
        self.by_name["steps"].append(self.last)
        self.averages[0]["x"].lerp_(x.mean(0), 0.1)
        self.recent.append(self.last)
        self.sums["a"] += 1
        self.counts["a"] += 1
        self.seen.add(len(self.seen))
        self.total = getattr(self, "total", 0) + 1
        self.ordered[len(self.ordered)] = self.last
        drawn = self.python.random() + self.numpy.random() + self.old.random()
        return self.layer(x) * drawn

    def state(self) -> list[object]:
        average = self.averages[0]["x"].tolist()
        held = [average, self.last, self.added, self.text, self.steps, self.number, self.by_name]
        draws = [self.python.random(), self.numpy.random(), self.old.random()]
        held += [self.seen, self.total]
        return [*held, self.recent, self.sums, self.counts, list(self.ordered.items()), *draws]


def test_the_plain_pass_counts_nowhere() -> None:
    model = Counting()
    other, x = deepcopy(model), torch.randn(B, 5)
    with PerSampleClipper(model, 1.0, verify="always") as clipper:
        for _ in range(3):
            clipper.backward(per_sample(model(x)))
            other(x)
    assert model.state() == other.state()


@pytest.mark.parametrize("how", ["in place", "behind autograd", "other memory"])
@pytest.mark.parametrize("large", [True, False])
def test_weights_that_follow_others_move_once(
    how: str, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a momentum encoder's, or the codes of a quantiser."""
    if large:  # such are copied when they are written
        monkeypatch.setattr(model_state, "_TOTAL_BYTES", 0)
        monkeypatch.setattr(model_state, "_LARGE_BYTES", 0)

    def forward(m: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            if how == "in place":
                m.slow.weight.lerp_(m.fast.weight, 0.1)
            elif how == "behind autograd":
                m.slow.weight.data.lerp_(m.fast.weight, 0.1)
            else:
                m.slow.weight.data = m.slow.weight.lerp(m.fast.weight, 0.1)
        return m.fast(x) * m.slow(x)

    model = Apply(forward, fast=nn.Linear(5, 3), slow=nn.Linear(5, 3).requires_grad_(False))
    other, x = deepcopy(model), torch.randn(B, 5)
    with PerSampleClipper(model, 1.0, verify="always") as clipper:
        for _ in range(3):
            clipper.backward(per_sample(model(x)))
            other(x)
    assert torch.equal(model.slow.weight, other.slow.weight)


def test_checkpoints_count_what_they_save_without_the_plain_pass() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    x = torch.randn(B, 5)
    exact(model, lambda: per_sample(checkpoint(model, x, use_reentrant=False)), verify="always")


def test_perturbed_calls_keep_their_places() -> None:
    """Two calls of the model, with a perturbation each, and no call more for the site."""
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    one, two = torch.randn(2, B, 5)

    def losses() -> Tensor:
        return per_sample(model(one)) + per_sample(model(two)) + per_sample(model(one))

    attack, site = eb.PGD(eps=0.5, steps=2), eb.Site(model[0])
    result = attack.run(losses, site)
    with PerSampleClipper(model, 1.0, verify="always"):
        inside = attack.run(losses, site)
    torch.testing.assert_close(inside.deltas, result.deltas)
    with result.applied():
        wanted = losses().detach()
    with PerSampleClipper(model, 1.0, verify="always") as clipper, result.applied():
        found = losses()
        clipper.backward(found)
    torch.testing.assert_close(found.detach(), wanted)
    assert all(bool(g.any()) for g in gradients(model))


@pytest.mark.parametrize("own", [True, False])
def test_numbers_that_nobody_resets_are_no_fault_of_the_rules(own: bool) -> None:
    """As a sampler of negative items draws them."""
    sampler = random.Random(0)
    model = Apply(lambda m, x: m.a(x) * sampler.random(), a=nn.Linear(5, 3))
    if own:
        model.sampler = sampler
    x = torch.randn(B, 5)
    for _ in range(3):
        with PerSampleClipper(model, 1.0, verify="always") as clipper:
            clipper.backward(per_sample(model(x)))

    model = Apply(
        lambda m, x: m.p(torch.arange(5)[None]) + x * sampler.random(), p=nn.Embedding(5, 5)
    )
    refused(model, lambda: per_sample(model(x[:, None])), "two passes without a clipper differ")
    with PerSampleClipper(model, 1.0, broadcast="p") as clipper:
        clipper.backward(per_sample(model(x[:, None])))


@dataclass
class Answer:
    """A class that torch does not know."""

    logits: Tensor


def test_outputs_in_a_class_of_the_users() -> None:
    model = Apply(
        lambda m, x: Answer(m.a(x.reshape(1, -1, 5) * 2).reshape(len(x), -1)), a=nn.Linear(5, 3)
    )
    x = torch.randn(B, 6, 5)
    refused(model, lambda: per_sample(model(x).logits), OTHER)


def test_a_row_for_every_sample_that_no_output_can_show() -> None:
    def forward(m: Any, x: Tensor, positions: Tensor) -> None:
        m.out = m.a(x) + m.p(positions)

    def losses() -> Tensor:
        model(x, torch.arange(6)[None])
        return per_sample(model.out)

    model = Apply(forward, a=nn.Linear(5, 3), p=nn.Embedding(6, 3))
    x = torch.randn(B, 6, 5)
    refused(model, losses, "returns no floats")
    exact(model, losses, broadcast="p")


class Memory:
    """A cache that a model is given, and writes into."""

    def __init__(self, *, whole: bool = True) -> None:
        self.seen: list[Tensor] = []
        self.whole = whole

    def __deepcopy__(self, memo: dict[int, Any]) -> Memory:
        if not self.whole:
            raise TypeError("it cannot be copied")
        other = copy(self)
        other.seen = list(self.seen)
        return other


@pytest.mark.parametrize("whole", [True, False])
def test_caches_that_are_inputs_hold_one_pass(whole: bool) -> None:
    def forward(m: Any, x: Tensor, memory: Memory) -> Tensor:
        memory.seen.append(m.a(x))
        return torch.stack(memory.seen).sum(0)

    model = Apply(forward, a=nn.Linear(5, 3))
    x = torch.randn(2, B, 5)

    def losses() -> Tensor:
        memory = Memory(whole=whole)
        out = model(x[0], memory) * model(x[1], memory)
        assert len(memory.seen) == 2
        return per_sample(out)

    exact(model, losses, verify="always")
    positions = Apply(
        lambda m, x, memory: m.a(x) + m.p(torch.arange(3)[None]),
        a=nn.Linear(5, 3),
        p=nn.Embedding(3, 3),
    )
    y, memory = torch.randn(B, 3, 5), Memory(whole=whole)
    if whole:
        exact(positions, lambda: per_sample(positions(y, memory)))
    else:
        refused(positions, lambda: per_sample(positions(y, memory)), "cannot be copied")


def test_a_number_of_another_step_is_no_new_kind_of_call() -> None:
    calls: list[float] = []

    def forward(m: Any, x: Tensor, beta: float) -> Tensor:
        calls.append(beta)
        return m.a(x) * beta

    model, x = Apply(forward, a=nn.Linear(5, 3)), torch.randn(B, 5)
    clipper = PerSampleClipper(model, 1.0, verify="first")
    for beta in (0.0, 0.1, 0.2, 0.3):
        with clipper:
            clipper.backward(per_sample(model(x, beta)))
    assert calls == [0.0, 0.0, 0.1, 0.1, 0.2, 0.3]


def test_a_list_that_a_forward_hook_appends_to_ends_with_the_watched_pass() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x = torch.ones(B, 3)
    seen: list[Tensor] = []
    model[0].register_forward_hook(lambda m, given, out: seen.append(out))

    def losses(place: int) -> Tensor:
        seen.clear()
        return per_sample(model(x)) + per_sample(seen[place])

    exact(model, lambda: losses(-1))
    clipper = PerSampleClipper(model, 1.0)
    with clipper, pytest.raises(RuntimeError, match=r"hook appends to .* the last"):
        clipper.backward(losses(0))
