"""Randomised smoothing: a linear classifier, whose radius is known, and the statistics."""

from __future__ import annotations

import math

import pytest
import torch
from embattle import Site
from embattle.certify import (
    ABSTAIN,
    Smoothed,
    certified_radii,
    lower_confidence,
    smoothed_predictions,
    upper_confidence,
)
from embattle.data.batch import Batch
from torch import Tensor, nn

pytest.importorskip("scipy")


class Linear(nn.Module):
    """Two classes by the sum of `<w, e>` over a sample's vectors."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.words = nn.Embedding(9, width)
        self.weight = nn.Parameter(torch.randn(width, generator=generator))
        with torch.no_grad():
            self.words.weight.copy_(torch.randn(9, width, generator=generator))

    def forward(self, ids: Tensor) -> Tensor:
        score = (self.words(ids) @ self.weight).sum(1)
        return torch.stack([-score, score], 1) / 2


def made(sigma: float = 1.0, **options: int) -> tuple[Linear, Smoothed]:
    model = Linear().eval()
    return model, Smoothed(model, Site(model.words), sigma, **options)


def batch(movable: Tensor | None = None) -> Batch:
    ids = torch.tensor([[0, 1, 2], [3, 4, 5], [6, 7, 8], [1, 3, 7]])
    return Batch({"ids": ids}, torch.tensor([0, 1, 0, 1]), movable)


def distances(model: Linear, of: Batch, vectors: int) -> Tensor:
    """How far each sample is from the boundary, where so many of its vectors move."""
    with torch.no_grad():
        logits = model(**of.inputs)
        return (logits[:, 1] - logits[:, 0]) / (model.weight.norm() * vectors**0.5)


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("movable", [False, True])
def test_radii_reach_the_boundary_of_a_linear_classifier_and_not_beyond(movable: bool) -> None:
    # Of it, p = Phi(distance / sigma) exactly: the true radius is the distance.
    model, smoothed = made(sigma=2.0)
    free = torch.tensor([[True, True, False]] * 4) if movable else None
    of = batch(free)
    true = distances(model, of, 2 if movable else 3)
    found = certified_radii(smoothed, of, n=20_000, n0=50, alpha=0.001, generator=draw())
    sure = found.classes != ABSTAIN
    assert bool(sure.any())
    assert bool((found.classes[sure] == (true > 0).long()[sure]).all())
    assert bool((found.radii <= true.abs()).all())
    assert bool((found.radii[sure] >= true.abs()[sure] - 0.1 * 2.0).all())


def test_a_certificate_fails_no_more_often_than_it_says() -> None:
    model, smoothed = made(sigma=1.0)
    of = batch().take(torch.tensor([0]))
    true = float(distances(model, of, 3).abs())
    many = Batch({"ids": of.inputs["ids"].expand(400, -1)})
    radii = certified_radii(smoothed, many, n=60, n0=10, alpha=0.2, generator=draw(3)).radii
    failures = int((radii > true).sum())
    assert failures > 0  # the bound is not idle at such an alpha
    # 80 expected at most; 4 standard deviations more.
    assert failures <= 80 + 4 * math.sqrt(400 * 0.2 * 0.8)


def test_confidence_bounds_are_those_of_the_binomial_distribution() -> None:
    hits = torch.tensor([0, 1, 37, 100])
    low, high = lower_confidence(hits, 100, 0.01), upper_confidence(hits, 100, 0.01)
    assert low[0] == 0
    assert high[3] == 1
    assert float(low[3]) == pytest.approx(0.01 ** (1 / 100))
    assert float(high[0]) == pytest.approx(1 - 0.01 ** (1 / 100))

    def tail(p: float, least: int) -> float:
        return sum(math.comb(100, k) * p**k * (1 - p) ** (100 - k) for k in range(least, 101))

    assert tail(float(low[2]), 37) == pytest.approx(0.01)
    assert 1 - tail(float(high[2]), 38) == pytest.approx(0.01)


def test_draws_are_those_of_the_generator_and_all_sizes_are_taken() -> None:
    _, smoothed = made()
    first = smoothed.counts(batch(), 37, draw())
    assert torch.equal(first, smoothed.counts(batch(), 37, draw()))
    assert not torch.equal(first, smoothed.counts(batch(), 37, draw(1)))
    assert first.sum(1).tolist() == [37] * 4
    _, small = made(batch_size=10)
    assert small.counts(batch(), 7, draw()).sum(1).tolist() == [7] * 4


def test_predictions_abstain_where_two_classes_are_as_frequent() -> None:
    model, smoothed = made(sigma=1.0)
    true = distances(model, batch(), 3)
    found = smoothed_predictions(smoothed, batch(), n=2000, generator=draw())
    sure = true.abs() > 0.2
    assert bool((found[sure] == (true > 0).long()[sure]).all())
    with torch.no_grad():
        model.weight.zero_()  # both logits are 0, and the noise has no say
        model.weight[0] = 1e-20
        model.words.weight.zero_()
    undecided = smoothed_predictions(smoothed, batch(), n=200, generator=draw())
    assert ABSTAIN in undecided.tolist()
    with torch.no_grad():
        model.weight.fill_(torch.nan)  # what is no number votes for no class
    assert smoothed_predictions(smoothed, batch(), n=9, generator=draw()).eq(ABSTAIN).all()


def test_accuracy_counts_what_is_right_and_far_enough() -> None:
    model, smoothed = made(sigma=2.0)
    of = batch()
    labels = (distances(model, of, 3) > 0).long()
    found = certified_radii(smoothed, of, n=4000, generator=draw())
    sure = found.classes != ABSTAIN
    assert found.accuracy(labels, 0.0) == pytest.approx(float(sure.double().mean()))
    assert found.accuracy(1 - labels, 0.0) == 0
    largest = float(found.radii.max())
    assert found.accuracy(labels, largest) == 0.25
    assert found.accuracy(labels, largest + 1e-9) == 0


@pytest.mark.parametrize("column", [1, slice(1, 2)])
def test_one_logit_is_two_classes(column: int | slice) -> None:
    model = Linear().eval()
    inner = model.forward
    model.forward = lambda ids: inner(ids)[:, column]  # type: ignore[method-assign]
    smoothed = Smoothed(model, Site(model.words), 1.0)
    counts = smoothed.counts(batch(), 50, draw())
    model.forward = inner  # type: ignore[method-assign]
    assert torch.equal(counts, Smoothed(model, Site(model.words), 1.0).counts(batch(), 50, draw()))


def test_what_is_wrong_is_said() -> None:
    model, smoothed = made()
    with pytest.raises(ValueError, match="sigma must be above 0"):
        Smoothed(model, Site(model.words), 0.0)
    with pytest.raises(ValueError, match=r"scope 'output'"):
        Smoothed(model, Site(model.words, scope="row"), 1.0)
    with pytest.raises(ValueError, match="in training mode"):
        Smoothed(Linear(), Site(model.words), 1.0)
    with pytest.raises(ValueError, match="alpha must be between 0 and 1, got 1"):
        certified_radii(smoothed, batch(), alpha=1.0, generator=draw())
    other = Linear()
    with pytest.raises(ValueError, match="ran without the sites' modules"):
        Smoothed(model, Site(other.words), 1.0).counts(batch(), 2, draw())
    with pytest.raises(ValueError, match=r"movable is \(8, 2\)"):
        smoothed.counts(batch(torch.ones(4, 2, dtype=torch.bool)), 2, draw())
