"""Early stopping: fooled samples leave the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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

    def subset(rows: Tensor) -> Callable[[], eb.Evaluation]:
        part = toys.classify(model, tokens[rows], labels[rows])

        def counted() -> eb.Evaluation:
            sizes.append(len(rows))
            return part()

        return counted

    whole = toys.classify(model, tokens, labels)

    site = eb.Site(model.embedding)
    options = {"eps": 2.0, "step_size": 0.3, "steps": 8, "keep": keep}
    goal = eb.Misclassify(labels)
    arguments = {"mask": tokens != 0, "criterion": goal, "joint": joint}
    attack = eb.PGD(**options, stop_when_fooled=True)
    early = attack.run(whole, site, subset=subset, **arguments)
    full = eb.PGD(**options).run(whole, site, **arguments)

    wrong = early.clean_predictions != labels
    assert sizes[0] < 10  # whoever is wrong already is not attacked
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < sizes[0]
    # Whoever is fooled in the end was fooled on the way at the latest.
    assert torch.all(early.success | ~full.success)
    assert torch.all(early.steps[wrong] == 0)
    assert torch.all(early.deltas[0][wrong] == 0)
    assert torch.all(early.steps <= 8)
    # Every pass over the rest of the batch follows a step of those samples.
    assert int(early.steps.sum()) == sum(sizes)
    unfooled = ~early.success & ~wrong
    for got, expected in zip(early.deltas, full.deltas, strict=True):
        assert torch.allclose(got[unfooled], expected[unfooled])
    again = early.evaluate(whole)
    assert torch.allclose(again.losses, early.losses)
    assert torch.equal(again.outputs.argmax(1), early.predictions)
    assert torch.equal(early.success, ~wrong & (early.predictions != labels))


def waves() -> tuple[Callable[[Tensor], Callable[[], eb.Evaluation]], Tensor, eb.Site]:
    """Losses that rise and fall, labels, and the site: the last iterate is mostly not the worst."""
    embedding = torch.nn.Embedding(6, 1).double()
    with torch.no_grad():
        embedding.weight.copy_(torch.tensor([[-0.5], [-0.3], [-0.1], [0.1], [-0.05], [0.5]]))
    # Four are never fooled, one is by and by, and one is wrong from the start.
    bars = torch.tensor([2.0, 2.0, 2.0, 2.0, 0.98, -3.0]).double()
    tokens, labels = torch.arange(6).unsqueeze(1), torch.zeros(6, dtype=torch.long)

    def of(rows: Tensor) -> Callable[[], eb.Evaluation]:
        def loss() -> eb.Evaluation:
            logits = torch.stack([bars[rows], (4 * embedding(tokens[rows])).sin().sum((1, 2))], 1)
            return eb.Evaluation(eb.losses.cross_entropy(logits, labels[rows]), logits)

        return loss

    return of, labels, eb.Site(embedding)


@pytest.mark.parametrize("keep", ["last", "best"])
def test_who_is_never_fooled_has_what_the_whole_batch_would_have(keep: str) -> None:
    """The last iterate is not the worst one here; and no group is said to lack a gradient."""
    of, labels, site = waves()
    options = {"norm": "linf", "eps": 1.0, "step_size": 0.45, "steps": 5}
    whole, goal = of(torch.arange(6)), eb.Misclassify(labels)
    early = eb.PGD(**options, keep=keep, stop_when_fooled=True).run(
        whole, site, criterion=goal, subset=of
    )
    last, best = (
        eb.PGD(**options, keep=k).run(whole, site, criterion=goal)  # type: ignore[arg-type]
        for k in ("last", "best")
    )
    assert early.reached.tolist() == [False] * 4 + [True] * 2
    assert not torch.allclose(last.delta[:4], best.delta[:4])
    torch.testing.assert_close(early.delta[:4], (last if keep == "last" else best).delta[:4])
    assert int(early.steps[0]) == 5
    assert 0 < int(early.steps[4]) < 5
    assert int(early.steps[5]) == 0
    assert int(early.zero_gradient) == 0
    random = eb.PGD(**options, keep=keep, stop_when_fooled=True, random_start=True)
    assert int(random.run(whole, site, criterion=goal, subset=of).zero_gradient) == 0


@pytest.mark.parametrize("keep", ["last", "best"])
def test_of_restarts_the_same_iterates_count_whether_samples_leave_or_not(keep: Any) -> None:
    of, labels, site = waves()
    found = {}
    for stop in (True, False):
        attack = eb.PGD(
            norm="linf", eps=1.0, step_size=0.45, steps=5, random_start=True, restarts=3, keep=keep,
            generator=torch.Generator().manual_seed(0), stop_when_fooled=stop,
        )  # fmt: skip
        found[stop] = attack.run(
            of(torch.arange(6)), site, criterion=eb.Misclassify(labels), subset=of
        )
    assert not found[True].reached[:4].any()
    torch.testing.assert_close(found[True].delta[:4], found[False].delta[:4])


@pytest.mark.parametrize("attack", ["apgd", "mi", "restarts", "token"])
def test_attacks_with_memory_leave_too(attack: str) -> None:
    model, tokens, labels, sizes = setup()

    def subset(rows: Tensor) -> Callable[[], eb.Evaluation]:
        part = toys.classify(model, tokens[rows], labels[rows])

        def counted() -> eb.Evaluation:
            sizes.append(len(rows))
            return part()

        return counted

    made = {
        "apgd": eb.APGD(eps=1.0, steps=10, stop_when_fooled=True),
        "mi": eb.MIFGSM(eps=0.3, steps=5, stop_when_fooled=True),
        "restarts": eb.PGD(eps=0.6, steps=4, random_start=True, restarts=3, stop_when_fooled=True),
        "token": eb.PGD(eps=eb.Relative(0.3, to="group_norm"), steps=4, stop_when_fooled=True),
    }[attack]
    site = eb.Site(model.embedding, group="token" if attack == "token" else "sample")
    whole = toys.classify(model, tokens, labels)
    goal = eb.Misclassify(labels)
    result = made.run(whole, site, mask=tokens != 0, criterion=goal, subset=subset)
    assert result.success.any()
    assert min(sizes) < max(sizes) < 10
    again = result.evaluate(whole)
    assert torch.allclose(again.losses, result.losses)
    assert torch.equal(again.outputs.argmax(1), result.predictions)


def test_early_stopping_says_what_it_needs() -> None:
    model, tokens, labels, _ = setup()
    attack = eb.PGD(eps=1.0, stop_when_fooled=True)
    site, whole = eb.Site(model.embedding), toys.classify(model, tokens, labels)

    def subset(rows: Tensor) -> Callable[[], eb.Evaluation]:
        return toys.classify(model, tokens[rows], labels[rows])

    with pytest.raises(ValueError, match="no goal that a sample can reach"):
        attack.run(whole, site, subset=subset)
    goal = eb.Misclassify(labels)
    with pytest.raises(ValueError, match="subset=lambda rows"):
        attack.run(whole, site, criterion=goal)
    with pytest.raises(ValueError, match="outputs"):
        attack.run(lambda: whole().losses, site, criterion=goal, subset=subset)
    longer = torch.nn.functional.pad(tokens, (0, 2))
    padded = toys.classify(model, longer, labels)
    with pytest.raises(RuntimeError, match=r"subset\(rows\) has the padding of the whole batch"):
        attack.run(padded, site, mask=longer != 0, criterion=goal, subset=subset)
    rows = eb.Site(model.embedding, scope="row")
    with pytest.raises(ValueError, match="'row'"):
        attack.run(whole, rows, criterion=goal, subset=subset)
    with pytest.raises(ValueError, match="stop_when_fooled=True"):
        eb.AdversarialObjective(attack, site)
    drawing = toys.encoder(dropout=0.5)
    with pytest.raises(ValueError, match="dropout"):
        attack.run(
            toys.classify(drawing, tokens, labels),
            eb.Site(drawing.embedding),
            criterion=goal,
            subset=lambda rows: toys.classify(drawing, tokens[rows], labels[rows]),
        )


def test_samples_that_depend_on_each_other_cannot_leave() -> None:
    model, tokens, labels, _ = setup()

    def centred(rows: Tensor) -> Callable[[], eb.Evaluation]:
        def loss() -> eb.Evaluation:
            logits = model(tokens[rows])
            logits = logits - logits.mean(0)
            return eb.Evaluation(eb.losses.cross_entropy(logits, labels[rows]), logits)

        return loss

    every = torch.arange(10)
    with torch.no_grad():
        labels = centred(every)().outputs.argmax(1)
    attack = eb.PGD(eps=2.0, step_size=0.3, steps=8, stop_when_fooled=True)
    with pytest.raises(ValueError, match="depend on each other"):
        attack.run(
            centred(every),
            eb.Site(model.embedding),
            criterion=eb.Misclassify(labels),
            subset=centred,
        )
