"""Attacks on models whose parameters, or weights of bags, are given in each call."""

from __future__ import annotations

import copy
from typing import Any

import embattle as eb
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize

TOKENS = torch.tensor([[0, 3, 5], [1, 1, 7], [2, 8, 0]])
LABELS = torch.tensor([0, 1, 1])


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(9, 4).double(), nn.Linear(4, 2).double()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens).mean(1).tanh())


def evaluated(logits: Tensor) -> eb.Evaluation:
    return eb.Evaluation(eb.losses.cross_entropy(logits, LABELS), logits)


SITES: dict[str, Any] = {
    "output": lambda model: eb.Site(model.embedding),
    "row": lambda model: eb.Site(model.embedding, scope="row"),
    "table": lambda model: eb.Site(model.embedding, scope="row", rows="table"),
}
ATTACK = eb.PGD(eps=eb.Relative(0.3), steps=3)


@pytest.mark.parametrize("where", SITES)
@pytest.mark.parametrize("fresh", [False, True])
def test_parameters_of_a_call_are_those_that_are_perturbed(where: str, fresh: bool) -> None:
    model = Model()
    loaded = copy.deepcopy(model)
    loaded.load_state_dict({name: 2 * value for name, value in model.state_dict().items()})
    expected = ATTACK.run(lambda: evaluated(loaded(TOKENS)), SITES[where](loaded))
    given = {name: 2 * value for name, value in model.named_parameters()}

    def loss() -> eb.Evaluation:
        params = given
        if fresh:  # computed anew in each pass
            params = {name: 2 * value for name, value in model.named_parameters()}
        return evaluated(functional_call(model, params, (TOKENS,)))

    site = SITES[where](model)
    found = ATTACK.run(loss, site)
    torch.testing.assert_close(found.delta, expected.delta)
    torch.testing.assert_close(found.losses, expected.losses)
    torch.testing.assert_close(found.evaluate(loss).losses, expected.losses)
    # Gradients of an objective reach what was given. A graph that passes share is freed once.
    objective = eb.AdversarialObjective(ATTACK, site, early_backward=fresh)
    objective(loss)[0].backward()
    other = eb.AdversarialObjective(ATTACK, SITES[where](loaded))
    other(lambda: evaluated(loaded(TOKENS)))[0].backward()
    for one, two in zip(model.parameters(), loaded.parameters(), strict=True):
        torch.testing.assert_close(one.grad, 2 * two.grad)


def test_a_perturbed_parameter_is_not_exchanged() -> None:
    model = Model()
    table, site = model.embedding.weight, eb.Site.weight(model.embedding, model=model)
    own = dict(model.named_parameters())
    for given in (own, {"embedding.weight": 2 * table.detach()}):
        before = dict(given)
        with pytest.raises(RuntimeError, match=r"'weight' is exchanged.*functional_call"):
            ATTACK.run(
                lambda given=given: evaluated(functional_call(model, given, (TOKENS,))), site
            )
        assert model.embedding.weight is table
        assert type(model.embedding._parameters) is dict
        assert all(given[name] is value for name, value in before.items())
    # Of other parameters it may give what it likes.
    head = {name: value for name, value in own.items() if name.startswith("head")}
    expected = ATTACK.run(lambda: evaluated(model(TOKENS)), site)
    found = ATTACK.run(lambda: evaluated(functional_call(model, head, (TOKENS,))), site)
    torch.testing.assert_close(found.delta, expected.delta)
    assert model.embedding.weight is table


@pytest.mark.parametrize("inside", [False, True])
def test_weights_of_a_bag_get_the_gradient_of_its_perturbed_rows(inside: bool) -> None:
    torch.manual_seed(0)
    bag, head = nn.EmbeddingBag(9, 4, mode="sum").double(), nn.Linear(4, 2).double()
    learnt = nn.Parameter(torch.rand(3, 3, dtype=torch.float64))

    def loss() -> eb.Evaluation:
        weights = learnt.square() if inside else learnt
        return evaluated(head(bag(TOKENS, per_sample_weights=weights).tanh()))

    site = eb.Site(bag, scope="row")
    objective = eb.AdversarialObjective(ATTACK, site, form="adversarial")
    objective(loss)[0].backward()
    found, delta = learnt.grad, ATTACK.run(loss, site).delta
    learnt.grad = None
    table = bag.weight.detach().clone()
    table[TOKENS.unique()] += delta

    def by_hand() -> eb.Evaluation:
        weights = learnt.square() if inside else learnt
        summed = (weights.unsqueeze(-1) * table[TOKENS]).sum(1)
        return evaluated(head(summed.tanh()))

    by_hand().losses.mean().backward()
    torch.testing.assert_close(found, learnt.grad)
    # Weights that are others than in the attack are those that weigh the deltas.
    result = ATTACK.run(loss, site)
    with torch.no_grad():
        learnt.mul_(1.5)
    torch.testing.assert_close(result.evaluate(loss).losses, by_hand().losses.detach())


def test_learnt_weights_of_a_bag_are_refused_where_a_part_is_perturbed() -> None:
    bag, head = nn.EmbeddingBag(9, 4, mode="sum").double(), nn.Linear(4, 2).double()
    weights = torch.rand(3, 3, dtype=torch.float64)

    def of(rows: Any = slice(None)) -> Any:
        def loss() -> eb.Evaluation:
            logits = head(bag(TOKENS[rows], per_sample_weights=weights[rows]).tanh())
            losses = eb.losses.cross_entropy(logits, LABELS[rows])
            return eb.Evaluation(losses, logits)

        return loss

    site, form = eb.Site(bag, scope="row"), eb.Partial(0.5)
    objective = eb.AdversarialObjective(ATTACK, site, form=form)
    objective(of(), subset=of, samples=3)[0].backward()
    weights.requires_grad_()
    with pytest.raises(ValueError, match=r"learnt per_sample_weights.*form='mixed'"):
        objective(of(), subset=of, samples=3)
    assert not site.busy


class Doubled(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return 2 * value


def test_a_table_that_is_computed_says_where_its_parameter_is() -> None:
    model = Model()
    parametrize.register_parametrization(model.embedding, "weight", Doubled())
    with pytest.raises(AttributeError, match=r"module\.parametrizations\.weight, 'original'"):
        eb.Site.weight(model.embedding)
    with pytest.raises(TypeError, match="ParametrizedEmbedding may scale"):
        eb.Site(model.embedding, scope="row")
    inner: Any = model.embedding.parametrizations
    site = eb.Site.weight(inner.weight, "original", model=model)
    result = ATTACK.run(lambda: evaluated(model(TOKENS)), site)
    assert result.losses.sum() > result.clean_losses.sum()
