"""Attack a text classifier: noise, FGM, PGD, APGD, and a discrete attack that ends in tokens.

python examples/attack_a_classifier.py
"""

from __future__ import annotations

from collections.abc import Callable

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


def main(steps: int = 200) -> dict[str, float]:
    """Train on a synthetic rule, attack, print; returns the accuracy under each attack."""
    torch.manual_seed(0)
    tokens = torch.randint(0, 200, (256, 12))
    labels = ((tokens < 100).float().mean(1) > 0.5).long()
    model = Classifier()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens), labels).backward()
        optimizer.step()

    site = eb.Site(model.embedding)
    goal = eb.Misclassify(labels)

    def loss_of(ids: Tensor) -> Callable[[], eb.Evaluation]:
        def loss_fn() -> eb.Evaluation:
            logits = model(ids)
            return eb.Evaluation(eb.losses.cross_entropy(logits, labels), logits)

        return loss_fn

    eps = eb.Relative(0.1)  # of the mean norm of a sample's embeddings
    attacks = [
        eb.UniformNoise(eps=eps),
        eb.FGM(eps=eps),
        eb.PGD(eps=eps, steps=10, random_start=True, keep="best"),
        eb.APGD(eps=eps, steps=20),
    ]
    accuracy = {"no attack": float((model(tokens).argmax(1) == labels).float().mean())}
    for attack in attacks:
        result = attack.run(loss_of(tokens), site, criterion=goal)
        accuracy[type(attack).__name__] = float(result.robust_accuracy)

    movable = torch.ones_like(tokens, dtype=torch.bool)  # False at special tokens
    swaps = eb.TokenSwap(swaps=2, tries=4).run(loss_of, site, tokens, mask=movable, criterion=goal)
    accuracy["TokenSwap"] = float(swaps.robust_accuracy)
    for name, value in accuracy.items():
        print(f"{name:15s} accuracy {value:.3f}")
    return accuracy


if __name__ == "__main__":
    main()
