"""Early stopping: fooled samples leave the batch."""

from __future__ import annotations

import embattle as eb
import pytest
import torch
import toys
from torch import Tensor


def setup() -> tuple[toys.Encoder, Tensor, Tensor, list[int]]:
    model = toys.encoder()
    tokens, labels = toys.text_batch(batch=10)
    with torch.no_grad():
        predicted = model(tokens).argmax(1)
    labels = torch.where(torch.arange(10) < 8, predicted, labels)
    return model, tokens, labels, []


@pytest.mark.parametrize("keep", ["last", "best"])
@pytest.mark.parametrize("joint", [False, True])
def test_fooled_samples_cost_nothing_more(keep: str, joint: bool) -> None:
    model, tokens, labels, sizes = setup()

    def loss(rows: Tensor) -> tuple[Tensor, Tensor]:
        sizes.append(len(rows))
        logits = model(tokens[rows])
        return eb.losses.cross_entropy(logits, labels[rows]), logits

    def whole() -> tuple[Tensor, Tensor]:
        logits = model(tokens)
        return eb.losses.cross_entropy(logits, labels), logits

    site = eb.Site(model.embedding)
    options = {"eps": 2.0, "step_size": 0.3, "steps": 8, "keep": keep}
    arguments = {"mask": tokens != 0, "labels": labels, "joint": joint}
    early = eb.PGD(**options, stop_when_fooled=True).run(loss, site, **arguments)
    full = eb.PGD(**options).run(whole, site, **arguments)

    wrong = early.clean_predictions != labels
    assert sizes[0] == 10
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < sizes[0]
    # Whoever is fooled in the end was fooled on the way at the latest.
    assert torch.all(early.success | ~full.success)
    assert torch.all(early.steps[wrong] == 0)
    assert torch.all(early.deltas[0][wrong] == 0)
    assert torch.all(early.steps <= 8)
    unfooled = ~early.success & ~wrong
    for got, expected in zip(early.deltas, full.deltas, strict=True):
        assert torch.allclose(got[unfooled], expected[unfooled])
    with early.applied():
        losses, logits = whole()
    assert torch.allclose(losses, early.losses)
    assert torch.equal(logits.argmax(1), early.predictions)
    assert torch.equal(early.success, ~wrong & (early.predictions != labels))


@pytest.mark.parametrize("attack", ["apgd", "mi", "restarts", "token"])
def test_attacks_with_memory_leave_too(attack: str) -> None:
    model, tokens, labels, sizes = setup()

    def loss(rows: Tensor) -> tuple[Tensor, Tensor]:
        sizes.append(len(rows))
        logits = model(tokens[rows])
        return eb.losses.cross_entropy(logits, labels[rows]), logits

    made = {
        "apgd": eb.APGD(eps=1.0, steps=10, stop_when_fooled=True),
        "mi": eb.MIFGSM(eps=0.3, steps=5, stop_when_fooled=True),
        "restarts": eb.PGD(eps=0.6, steps=4, random_start=True, restarts=3, stop_when_fooled=True),
        "token": eb.PGD(eps=eb.Relative(0.3, to="group_norm"), steps=4, stop_when_fooled=True),
    }[attack]
    site = eb.Site(model.embedding, group="token" if attack == "token" else "sample")
    result = made.run(loss, site, mask=tokens != 0, labels=labels)
    assert result.success.any()
    assert min(sizes) < 10
    with result.applied():
        losses, logits = loss(torch.arange(10))
    assert torch.allclose(losses, result.losses)
    assert torch.equal(logits.argmax(1), result.predictions)


def test_leaving_says_what_it_needs() -> None:
    model, tokens, labels, _ = setup()
    attack = eb.PGD(eps=1.0, stop_when_fooled=True)
    with pytest.raises(ValueError, match="labels"):
        attack.run(toys.classify(model, tokens, labels), eb.Site(model.embedding))
    with pytest.raises(ValueError, match="outputs"):
        attack.run(
            lambda rows: eb.losses.cross_entropy(model(tokens[rows]), labels[rows]),
            eb.Site(model.embedding),
            labels=labels,
        )
    factors = toys.factors()
    with pytest.raises(ValueError, match="'row'"):
        attack.run(
            toys.rank(factors, toys.triplets()),
            eb.Site(factors.user, scope="row"),
            labels=torch.zeros(9),
        )
