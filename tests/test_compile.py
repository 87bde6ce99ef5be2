"""`compile=True`: the same numbers from compiled passes."""

from __future__ import annotations

import embattle as eb
import pytest
import torch
import toys
from embattle.perturb import model_state
from torch import Tensor, nn


class Small(nn.Module):
    """Little to compile, with dropout-free layers whose weights get gradients."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.hidden = nn.Embedding(40, 8), nn.Linear(8, 16)
        self.head = nn.Linear(16, 3)

    eager = 0

    def forward(self, tokens: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            Small.eager += 1
        return self.head(self.hidden(self.embedding(tokens)).tanh().mean(1))


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.mark.parametrize("form", ["mixed", "free"])
def test_a_compiled_objective_gives_the_same_gradients(form: str) -> None:
    model = Small()
    tokens, labels = toys.text_batch()
    site = eb.Site(model.embedding, model=model)
    found = []
    for compiled in (False, True):
        objective = eb.AdversarialObjective(
            eb.PGD(eps=0.4, steps=3), site, form=form, compile=compiled
        )
        for _ in range(2):  # a new closure for each batch, as in a loop
            model.zero_grad()
            Small.eager = 0
            loss, metrics = objective(toys.classify(model, tokens, labels), mask=tokens != 0)
            loss.backward()
        grads = [p.grad.clone() for p in model.parameters()]
        found.append([loss.detach(), metrics["adversarial_loss"], *grads])
    for eager, other in zip(*found, strict=True):
        assert torch.allclose(eager, other, atol=1e-5)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] > 0
    assert Small.eager == 0
    assert len(counters["graph_break"]) == 1  # at the site, in the pass that opens the attack
    assert "torch.compiler.disable" in next(iter(counters["graph_break"]))


def test_a_compiled_attack_needs_its_model() -> None:
    model = toys.encoder()
    with pytest.raises(ValueError, match="model=model"):
        eb.PGD(eps=0.4, compile=True).run(
            toys.classify(model, *toys.text_batch()), eb.Site(model.embedding)
        )


def test_a_model_compiled_as_one_graph_is_given_without_compile() -> None:
    model = Small()
    whole = torch.compile(model, fullgraph=True, backend="eager")
    tokens, labels = toys.text_batch()
    site = eb.Site(model.embedding, model=model)
    found = []
    for used in (model, whole):
        model.zero_grad()
        loss, _ = eb.AdversarialObjective(eb.PGD(eps=0.4, steps=2), site)(
            toys.classify(used, tokens, labels)
        )
        loss.backward()
        found.append([loss.detach(), *[p.grad.clone() for p in model.parameters()]])
    for eager, other in zip(*found, strict=True):
        assert torch.allclose(eager, other, atol=1e-5)
    attack = eb.PGD(eps=0.4, steps=2, compile=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="disable"):
        eb.AdversarialObjective(attack, site)(toys.classify(whole, tokens, labels))
    assert not site.busy


def test_large_buffers_that_are_watched_do_not_keep_a_model_from_being_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(model_state, "_TOTAL_BYTES", 100)
    monkeypatch.setattr(model_state, "_LARGE_BYTES", 50)
    model, graphs = nn.BatchNorm1d(64).eval(), []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph.forward

    with model_state.kept_state([model]):
        torch.compile(model, backend=backend)(torch.randn(3, 64))
    assert len(graphs) == 1
