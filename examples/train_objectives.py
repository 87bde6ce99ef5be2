"""Train the same small classifier with every robust objective, in a plain loop.

python examples/train_objectives.py
"""

from __future__ import annotations

import math

import embattle as eb
import torch
from torch import Tensor, nn


class Classifier(nn.Module):
    """Mean of embeddings, one hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(200, 16)
        self.layers = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 2))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layers(self.embedding(tokens).mean(1))


EPS = 2.0
PGD = eb.PGD(eps=EPS, step_size=1.0, steps=3)
START = eb.GaussianStart(0.001)
OBJECTIVES: dict[str, tuple[eb.attacks.Attack, dict[str, object]]] = {
    "mixed": (PGD, {"lam": 1.0}),
    "adversarial": (PGD, {}),
    "trades": (eb.PGD(eps=EPS, steps=3, random_start=START), {"lam": 6.0}),
    "mart": (PGD, {"lam": 5.0}),
    "alp": (PGD, {"lam": 0.5}),
    "vat": (eb.VAT(eps=EPS), {"lam": 1.0}),
    "smart": (eb.SMARTStep(eps=0.1, step_size=10.0, sigma=0.01), {"lam": 1.0}),
    "r3f": (eb.UniformNoise(norm="linf", eps=0.1), {"lam": 0.7}),
    "free": (
        eb.PGD(eps=math.inf, step_size=0.5, steps=3, random_start=eb.BoxStart(eb.PerDim(1.0))),
        {},
    ),
    "freeat": (eb.FGSM(eps=0.1), {}),
}


def main(steps: int = 150) -> dict[str, tuple[float, float]]:
    """Train with each objective; returns clean accuracy and accuracy under PGD."""
    torch.manual_seed(0)
    tokens = torch.randint(0, 200, (256, 12))
    labels = ((tokens < 100).float().mean(1) > 0.5).long()
    goal = eb.Misclassify(labels)
    found: dict[str, tuple[float, float]] = {}
    for name, (attack, options) in OBJECTIVES.items():
        torch.manual_seed(1)
        model = Classifier()
        site = eb.Site(model.embedding)
        objective = eb.AdversarialObjective(
            attack, site, form=name, eps_schedule=eb.schedules.WarmUp(steps // 3), **options
        )
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

        def loss_fn(model: nn.Module = model) -> eb.Evaluation:
            logits = model(tokens)
            return eb.Evaluation(eb.losses.cross_entropy(logits, labels), logits)

        for _ in range(steps):
            loss, _ = objective(loss_fn, criterion=goal)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        result = eb.PGD(eps=EPS, steps=20, random_start=True, keep="best").run(
            loss_fn, site, criterion=goal
        )
        clean, robust = float(result.clean_accuracy), float(result.robust_accuracy)
        found[name] = (clean, robust)
        print(f"{name:12s} clean {clean:.3f}   under PGD-20 {robust:.3f}")
    return found


if __name__ == "__main__":
    main()
