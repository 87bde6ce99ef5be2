"""The monitor tells each known failure, once, and only when it is there."""

from __future__ import annotations

import warnings

import embattle as eb
import pytest
import torch
import toys
from embattle.objectives.monitor import Monitor, RobustTrainingWarning
from torch import Tensor, nn


def test_collapse_and_inflation() -> None:
    table = nn.Embedding(10, 4)
    monitor = Monitor(sites=eb.Site(table))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert monitor.check_tables() == []
        assert monitor.check_tables() == []
    start = table.weight.detach().clone()
    with torch.no_grad():
        table.weight.copy_(0.1 * start)
    with pytest.warns(RobustTrainingWarning, match="collapse"):
        assert len(monitor.check_tables()) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(monitor.check_tables()) == 1  # told once
    with torch.no_grad():
        table.weight.copy_(3 * start)
    with pytest.warns(RobustTrainingWarning, match="Relative"):
        monitor.check_tables()


def test_vanishing_gradients() -> None:
    monitor = Monitor(sites=eb.Site(nn.Embedding(3, 2)), window=3)

    def metrics(gain: float, scale: float = 1.0) -> dict[str, Tensor]:
        return {
            "clean_loss": torch.tensor(0.5),
            "adversarial_loss": torch.tensor(0.5 + gain),
            "eps_scale": torch.tensor(scale),
        }

    for _ in range(6):
        assert monitor.update(metrics(0.2)) == []
        assert monitor.update(metrics(0.0, scale=0.0)) == []
    monitor.update(metrics(0.0))
    monitor.update(metrics(0.0))
    with pytest.warns(RobustTrainingWarning, match="vanish"):
        monitor.update(metrics(0.0))


class Overfitted(nn.Module):
    """Right at the input and at the corner where FGSM ends; wrong between, when `bad`."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1, 1, _weight=torch.zeros(1, 1))
        self.bad = False

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)[:, 0, 0]
        right = 0.5 - 2.4 * x + 2.2 * x * x if self.bad else 1.0 - 0.1 * x
        return torch.stack([right, torch.zeros_like(right)], 1)


def test_catastrophic_overfitting() -> None:
    model = Overfitted()
    tokens, labels = torch.zeros(4, 1, dtype=torch.long), torch.zeros(4, dtype=torch.long)
    monitor = Monitor(sites=eb.Site(model.embedding))
    loss_fn, goal = toys.classify(model, tokens, labels), eb.Misclassify(labels)
    model.bad = False
    assert monitor.check_held(loss_fn, criterion=goal, eps=1.0) == []
    model.bad = True
    with torch.no_grad():
        model.embedding.weight.zero_()
    with pytest.warns(RobustTrainingWarning, match="catastrophic"):
        monitor.check_held(loss_fn, criterion=goal, eps=1.0)
    with pytest.raises(ValueError, match="outputs"):
        monitor.check_held(lambda: loss_fn().losses, criterion=goal, eps=1.0)
    with pytest.raises(ValueError, match="accuracy"):
        monitor.check_held(loss_fn, criterion=eb.MaximizeLoss(), eps=1.0)
