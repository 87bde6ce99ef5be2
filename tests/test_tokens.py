"""The discrete attack."""

from __future__ import annotations

from collections.abc import Callable

import embattle as eb
import pytest
import torch
import toys
from torch import Tensor, nn


class Bag(nn.Module):
    """A linear model of the mean embedding: first-order gains are exact."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(12, 4).double()
        self.weights = torch.randn(4, dtype=torch.float64)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.embedding(tokens).mean(1) @ self.weights

    def losses(self, tokens: Tensor) -> Callable[[], Tensor]:
        """The loss function of some tokens; what the model gives is what is ascended."""
        return lambda: self(tokens)


def test_a_linear_model_gets_the_best_exchange() -> None:
    model = Bag()
    tokens = torch.randint(0, 12, (4, 5), generator=torch.Generator().manual_seed(1))
    allowed = torch.arange(12) % 2 == 0
    mask = torch.arange(5)[None].expand(4, 5) != 0
    result = eb.TokenSwap(swaps=1, tries=2, allowed=allowed).run(
        model.losses, eb.Site(model.embedding), tokens, mask=mask
    )
    for b in range(4):
        best, best_loss = tokens[b], model(tokens[b : b + 1]).item()
        for t in range(1, 5):
            for v in range(0, 12, 2):
                trial = tokens[b].clone()
                trial[t] = v
                loss = model(trial[None]).item()
                if loss > best_loss:
                    best, best_loss = trial, loss
        assert torch.equal(result.tokens[b], best)
        assert result.losses[b].item() == pytest.approx(best_loss)
    assert torch.all(result.swapped.sum(1) <= 1)
    assert torch.equal(result.swapped, result.tokens != tokens)
    assert result.passes == 4  # the gradient, two tries, and the text that is returned


def test_several_exchanges_of_an_encoder() -> None:
    model = toys.encoder()
    tokens, labels = toys.text_batch()
    allowed = torch.arange(40) > 0

    def loss_of(ids: Tensor) -> Callable[[], eb.Evaluation]:
        return toys.classify(model, ids, labels)

    site = eb.Site(model.embedding)
    results = [
        eb.TokenSwap(swaps=swaps, tries=4, allowed=allowed).run(
            loss_of, site, tokens, mask=tokens != 0
        )
        for swaps in (1, 3)
    ]
    one, three = results
    assert torch.all(one.losses >= one.clean_losses)
    assert torch.all(three.losses >= one.losses)
    assert torch.any(three.losses > one.losses)
    for result, most in zip(results, (1, 3), strict=True):
        assert torch.all(result.swapped.sum(1) <= most)
        assert torch.all(result.tokens[tokens == 0] == 0)
        assert torch.all(result.tokens[tokens != 0] != 0)
        with torch.no_grad():
            again = loss_of(result.tokens)()
        assert torch.allclose(again.losses, result.losses)
        assert torch.equal(again.outputs, result.now.outputs)
    assert not site.busy


def test_a_sample_that_reached_the_goal_is_left_alone() -> None:
    model = toys.encoder()
    tokens, labels = toys.text_batch()
    result = eb.TokenSwap(swaps=3, tries=4).run(
        lambda ids: toys.classify(model, ids, labels),
        eb.Site(model.embedding),
        tokens,
        mask=tokens != 0,
        criterion=eb.Misclassify(labels),
    )
    right = result.clean_predictions == labels
    assert torch.equal(result.swapped.any(1), right)
    assert torch.equal(result.success, right & (result.predictions != labels))
    assert result.success.any()
    assert result.robust_accuracy == (result.predictions == labels).float().mean()


def test_similarity_keeps_exchanges_close() -> None:
    model = Bag()
    tokens = torch.randint(0, 12, (4, 5), generator=torch.Generator().manual_seed(1))
    site = eb.Site(model.embedding)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    near = eb.TokenSwap(swaps=5, tries=4, similarity=0.5).run(model.losses, site, tokens, mask=mask)
    rows = model.embedding.weight.detach()
    old, new = rows[tokens[near.swapped]], rows[near.tokens[near.swapped]]
    assert len(old) > 0
    assert torch.all(torch.cosine_similarity(old, new) >= 0.5 - 1e-6)
    nothing = eb.TokenSwap(allowed=torch.zeros(12, dtype=torch.bool)).run(
        model.losses, site, tokens, mask=mask
    )
    assert torch.equal(nothing.tokens, tokens)
    assert torch.allclose(nothing.losses, nothing.clean_losses)


def test_token_swap_says_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="swaps"):
        eb.TokenSwap(swaps=0)
    with pytest.raises(ValueError, match="tries"):
        eb.TokenSwap(tries=0)
    with pytest.raises(ValueError, match="similarity"):
        eb.TokenSwap(similarity=2.0)
    with pytest.raises(TypeError, match="bool"):
        eb.TokenSwap(allowed=torch.ones(3))
    model = Bag()
    site, tokens = eb.Site(model.embedding), torch.zeros(2, 3, dtype=torch.long)
    every = tokens == 0
    with pytest.raises(ValueError, match="12 rows"):
        eb.TokenSwap(allowed=torch.ones(3, dtype=torch.bool)).run(
            model.losses, site, tokens, mask=every
        )
    with pytest.raises(TypeError, match="Linear"):
        eb.TokenSwap().run(model.losses, eb.Site(nn.Linear(2, 2)), tokens, mask=every)
    with pytest.raises(TypeError, match="mask"):
        eb.TokenSwap().run(model.losses, site, tokens)
    with pytest.raises(TypeError, match="bool"):
        eb.TokenSwap().run(model.losses, site, tokens, mask=tokens)
    with pytest.raises(TypeError, match=r"return a loss function.*Tensor"):
        eb.TokenSwap().run(model, site, tokens, mask=every)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0)])
def test_nothing_to_exchange(shape: tuple[int, int]) -> None:
    model = Bag()
    tokens = torch.zeros(shape, dtype=torch.long)

    def loss_of(ids: Tensor) -> Callable[[], Tensor]:
        return lambda: model.embedding(ids).sum(1) @ model.weights

    mask = torch.ones(shape, dtype=torch.bool)
    result = eb.TokenSwap(swaps=2, tries=3).run(
        loss_of, eb.Site(model.embedding), tokens, mask=mask
    )
    assert result.tokens.shape == result.swapped.shape == shape
    assert result.losses.shape == (shape[0],)
    assert result.passes == 2  # as the texts are, and as they are returned
