"""What models are called with, what they return and what surrounds them, when they run twice."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from clipping_cases import Apply, gradients
from embattle.clipping import PerSampleClipper
from embattle.clipping.verify import Verifier
from test_clipping_verify import _float64, exact, per_sample, refused
from torch import Tensor, nn

B = 4
assert _float64  # a fixture, for every test here


def _draws_more(graph: Callable[..., Any], _: Any) -> Callable[..., Any]:
    """A backend whose code draws other numbers than the model does, as Inductor's."""

    def run(*args: Any) -> Any:
        torch.rand(1, device="cpu")
        return graph(*args)

    return run


def test_compiled_code_that_draws_its_own_numbers() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        noise = F.dropout(torch.ones(len(x), 3, dtype=x.dtype, device="cpu")).to(x.device)
        return m.a(x) * noise

    x = torch.randn(B, 5)
    model = Apply(forward, a=nn.Linear(5, 3))
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend=_draws_more)
    with PerSampleClipper(compiled, 1.0, verify="always") as clipper:
        clipper.backward(per_sample(compiled(x)))
    assert bool(gradients(model)[0].any())


def test_a_part_of_the_model_is_compiled() -> None:
    part = nn.Sequential(nn.Linear(5, 4), nn.Tanh())
    torch._dynamo.reset()
    model = nn.Sequential(torch.compile(part, backend="aot_eager"), nn.Linear(4, 3))
    x = torch.randn(B, 5)
    for training in (True, False):
        model.train(training)
        exact(model, lambda: per_sample(model(x)), verify="always")


def test_a_frozen_part_that_is_scripted() -> None:
    part = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5)).eval().requires_grad_(False)
    model = nn.Sequential(torch.jit.script(part), nn.Linear(5, 3))
    x = torch.randn(B, 5)
    exact(model, lambda: per_sample(model(x)), verify="always")


def test_a_frozen_part_that_is_differentiated_by_torch_func() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.a(torch.func.grad(lambda y: m.score(y).sin().sum())(x))

    model = Apply(forward, a=nn.Linear(5, 3), score=nn.Linear(5, 2).requires_grad_(False))
    x = torch.randn(B, 5)
    exact(model, lambda: per_sample(model(x)), verify="always")


@pytest.mark.parametrize(
    ("fill", "added"),
    [
        (-1e4, False),
        (-1e9, False),
        (-3e38, False),
        (-torch.inf, False),
        (-1e9, True),
        (-3e38, True),
    ],
)
def test_masks_in_the_outputs_hide_nothing(fill: float, added: bool) -> None:
    """All samples lie in one row, and one class is masked."""

    def forward(m: Any, x: Tensor) -> Tensor:
        found = m.a((x * 2).reshape(1, -1, 5)).reshape(len(x), -1, 3).mean(1)
        mask = torch.tensor([False, False, True], device=x.device).expand_as(found)
        return found + mask * fill if added else found.masked_fill(mask, fill)

    for kind in (torch.float32, torch.float64):
        model = Apply(forward, a=nn.Conv1d(B * 6, B * 6, 3, groups=B * 6)).to(kind)
        x = torch.randn(B, 6, 5, dtype=kind)
        refused(model, lambda: per_sample(model(x)[:, :2]), "another function .* instead of")  # noqa: B023


def test_what_is_given_twice_is_one_thing() -> None:
    def forward(m: Any, query: Tensor, key: Tensor) -> Tensor:
        return m.a(query) * (2 if query is key else 3)

    model, x = Apply(forward, a=nn.Linear(5, 3)), torch.randn(B, 5)
    exact(model, lambda: per_sample(model(x, x)), verify="always")


@pytest.mark.parametrize("kind", ["sparse", "nested"])
def test_outputs_that_are_not_dense(kind: str) -> None:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        parts = [x[0], x[1, :3]]
        return m.a(x), x.to_sparse() if kind == "sparse" else torch.nested.nested_tensor(parts)

    model, x = Apply(forward, a=nn.Linear(5, 3)), torch.randn(B, 5)
    exact(model, lambda: per_sample(model(x)[0]), verify="always")


@pytest.mark.parametrize("verify", ["first", "always"])
def test_texts_and_bags_of_other_sizes_are_not_run_twice_forever(verify: Any) -> None:
    calls: list[int] = []

    def forward(m: Any, texts: list[str], ids: Tensor, offsets: Tensor) -> Tensor:
        calls.append(len(ids))
        lengths = torch.tensor([len(text) for text in texts], device=ids.device)
        return m.bag(ids, offsets) * lengths[:, None]

    model = Apply(forward, bag=nn.EmbeddingBag(9, 3))
    clipper = PerSampleClipper(model, 1.0, verify=verify)
    offsets = torch.arange(B)
    for step in range(30):
        with clipper:
            clipper.expect(B)
            texts = ["a" * (step + sample + 1) for sample in range(B)]
            clipper.backward(per_sample(model(texts, torch.arange(B + step) % 9, offsets)))
    assert len(calls) == 30 + (16 if verify == "first" else 30)


def test_bags_are_probed_once_whatever_their_total(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Tensor] = []
    weights = Verifier.weights

    def counted(verifier: Verifier, like: Tensor) -> Tensor:
        drawn.append(like)
        return weights(verifier, like)

    monkeypatch.setattr(Verifier, "weights", counted)
    model = nn.Sequential(nn.EmbeddingBag(9, 3, mode="sum", sparse=True), nn.Linear(3, 2))
    table, head = model
    clipper = PerSampleClipper(model, 1.0, verify="first")
    for step in range(20):
        with clipper:
            clipper.expect(B)
            found = table(torch.arange(B + step) % 9, torch.arange(B))
            clipper.backward(per_sample(head(found)))
    assert len(drawn) == 1


def test_a_guess_at_a_size_that_is_not_compared() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        out = m.a(x)
        return out + m.p(torch.arange(1, device=x.device)[None]) if x.shape[1] == 30 else out

    model = Apply(forward, a=nn.Linear(5, 3), p=nn.Embedding(1, 3))
    clipper = PerSampleClipper(model, 1.0, verify="first")
    for length in range(1, 18):
        with clipper:
            clipper.backward(per_sample(model(torch.randn(B, length, 5))))
    x = torch.randn(B, 30, 5)
    refused(model, lambda: per_sample(model(x)), "16 sizes of its inputs", clipper)
    exact(model, lambda: per_sample(model(x)), broadcast="p")


def test_a_guess_that_is_right_at_some_sizes_alone() -> None:
    """Positions of short texts, and the items of long ones in one row."""

    def forward(m: Any, x: Tensor) -> Tensor:
        if x.shape[1] <= 16:
            rows = m.p(torch.arange(x.shape[1], device=x.device)[None]).expand(len(x), -1, -1)
        else:
            rows = m.p((x > 0).long().reshape(1, -1)).reshape(len(x), -1, 3)
        return rows.mean(1) * x.mean(1, keepdim=True)

    model = Apply(forward, p=nn.Embedding(16, 3))
    clipper = PerSampleClipper(model, 1.0, verify="first")
    for length in range(1, 17):
        with clipper:
            clipper.backward(per_sample(model(torch.randn(B, length))))
    x = torch.randn(B, 20)
    refused(model, lambda: per_sample(model(x)), "another function", clipper)


def test_flags_are_told_apart_by_their_places() -> None:
    def forward(m: Any, x: Tensor, *flags: bool) -> Tensor:
        if all(flags[1:]):
            return m.b((x * 2).reshape(1, -1, 5)).reshape(len(x), -1, 3).mean(1)
        return m.a(x).mean(1)

    grouped = nn.Conv1d(B * 6, B * 6, 3, groups=B * 6)
    model, x = Apply(forward, a=nn.Linear(5, 3), b=grouped), torch.randn(B, 6, 5)
    clipper = PerSampleClipper(model, 1.0, verify="first")
    with clipper:
        clipper.backward(per_sample(model(x, False, True, False)))
    refused(model, lambda: per_sample(model(x, False, True, True)), "another function", clipper)


def test_a_guess_in_a_known_call_is_compared_the_next_time() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        if m.packed:
            return m.b((x * 2).reshape(1, -1, 5)).reshape(len(x), -1, 3).mean(1)
        return m.a(x).mean(1)

    grouped = nn.Conv1d(B * 6, B * 6, 3, groups=B * 6)
    model, x = Apply(forward, a=nn.Linear(5, 3), b=grouped), torch.randn(B, 6, 5)
    clipper = PerSampleClipper(model, 1.0, verify="first")
    for packed in (False, True):
        model.packed = packed
        with clipper:
            clipper.backward(per_sample(model(x)))
    refused(model, lambda: per_sample(model(x)), "another function", clipper)


def test_another_hook_is_another_state() -> None:
    model = Apply(lambda m, x: m.a(x).reshape(len(x), -1, 3).mean(1), a=nn.Linear(5, 3))
    x, clipper = torch.randn(B, 6, 5), PerSampleClipper(model, 1.0, verify="first")
    hook = model.a.register_forward_pre_hook(lambda m, given: (given[0] * 2,))
    with clipper:
        clipper.backward(per_sample(model(x)))
    hook.remove()
    model.a.register_forward_pre_hook(lambda m, given: ((given[0] * 2).reshape(1, -1, 5),))
    refused(model, lambda: per_sample(model(x)), "another function", clipper)


@pytest.mark.parametrize("what", ["trained", "mode", "hooks"])
def test_states_that_a_model_alternates_between_are_known(what: str) -> None:
    calls: list[int] = []

    def forward(m: Any, x: Tensor) -> Tensor:
        calls.append(len(x))
        return m.b(m.a(x).tanh())

    model, x = Apply(forward, a=nn.Linear(5, 4), b=nn.Linear(4, 3)), torch.randn(B, 5)
    clipper = PerSampleClipper(model, 1.0, reduction="sum", verify="first")
    for step in range(6):
        if what == "trained":
            model.a.requires_grad_(step % 2 == 0)
        elif what == "mode":
            model.train(step % 2 == 0)
        elif step % 2:
            handle = model.a.register_forward_hook(lambda m, given, out: None)
        exact(model, lambda: per_sample(model(x)), clipper)
        if what == "hooks" and step % 2:
            handle.remove()
    # The reference's, the clipper's, and one more for each of the two states.
    assert len(calls) == 6 * 2 + 2


@pytest.mark.parametrize("frozen", [True, False])
def test_weights_that_were_exchanged_are_let_go(frozen: bool) -> None:
    model = Apply(lambda m, x: m.a(x) + m.b(x), a=nn.Linear(5, 3), b=nn.Linear(5, 3))
    model.b.requires_grad_(False)
    clipper, gone = PerSampleClipper(model, 1.0), []
    for _ in range(3):
        with clipper:
            clipper.backward(per_sample(model(torch.randn(B, 5))))
        gone.append(weakref.ref(model.b.weight if frozen else model.a.weight))
        if frozen:
            model.b = nn.Linear(5, 3).requires_grad_(False)
        else:
            model.a.weight = nn.Parameter(torch.randn(3, 5))
    with clipper:
        clipper.backward(per_sample(model(torch.randn(B, 5))))
    gc.collect()
    assert [ref() for ref in gone] == [None] * 3
