"""Bound what one account can do to a model: per-sample and per-user clipping.

python examples/clipping.py

A model learns how often each item is clicked. One fake account clicks the item that it pushes
thousands of times. Clipping each click changes little, as there are so many; clipping each
account's joint gradient makes it an account like any other.
"""

from __future__ import annotations

import embattle as eb
import torch
import torch.nn.functional as F
from torch import Tensor, nn

USERS, ITEMS, TARGET = 60, 12, 7


class Popularity(nn.Module):
    """Items as vectors, and how attractive such a vector is."""

    def __init__(self) -> None:
        super().__init__()
        self.item = nn.Embedding(ITEMS, 16, sparse=True)
        self.score = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, items: Tensor) -> Tensor:
        """Logits [B] of a click."""
        return self.score(self.item(items)).squeeze(1)


def events() -> tuple[Tensor, Tensor, Tensor]:
    """Users, items, clicked or not: the genuine ones click the target rarely; then the flood."""
    users, items = torch.randint(USERS, (4000,)), torch.randint(ITEMS, (4000,))
    chance = torch.rand(ITEMS)
    chance[TARGET] = 0.1
    clicked = chance[items].bernoulli()
    users = torch.cat([users, torch.full((2000,), USERS)])
    items = torch.cat([items, torch.full((2000,), TARGET)])
    return users, items, torch.cat([clicked, torch.ones(2000)])


def main(steps: int = 100) -> dict[str, float]:
    """Train in four ways; returns what each model makes of the pushed item (true: 0.1)."""
    torch.manual_seed(0)
    users, items, clicked = events()
    found: dict[str, float] = {}
    for way in ("plain", "per sample", "per user", "per user, adversarial"):
        torch.manual_seed(1)
        model = Popularity()
        optimizer = torch.optim.SGD(model.parameters(), lr=2.0)
        # How the last way attacks, and which samples' adversarial loss it leaves out.
        objective = eb.AdversarialObjective(
            eb.FGM(eps=0.1),
            eb.Site(model.item),
            lam=0.5,
            masking=eb.masking.LossQuantile(0.95),
        )
        # A user's gradient is the sum over her samples, so that her bound is a larger one.
        clipper = eb.PerSampleClipper(model, 0.1 if way == "per sample" else 1.0, reduction="sum")
        for _ in range(steps):
            rows = torch.randint(len(users), (512,))
            u, i, y = users[rows], items[rows], clicked[rows]

            def losses(i: Tensor = i, y: Tensor = y, model: nn.Module = model) -> Tensor:
                return F.binary_cross_entropy_with_logits(model(i), y, reduction="none")

            optimizer.zero_grad()
            if way == "plain":
                losses().mean().backward()
            elif way == "per user, adversarial":
                with clipper:
                    # One backward pass clips each user's clean and adversarial gradient together.
                    # To clip one of the two alone: parts.clean, or parts.adversarial with
                    # weights=parts.kept, which gives masked samples weight 0.
                    parts, _ = objective.parts(losses)
                    clipper.backward(parts.summed, users=u, scale=1 / len(u))
            else:
                with clipper:
                    own = u if way == "per user" else None
                    clipper.backward(losses(), users=own, scale=1 / len(u))
            optimizer.step()
        with torch.no_grad():
            found[way] = float(model(torch.tensor([TARGET])).sigmoid())
        print(f"{way:22s} the pushed item is clicked with probability {found[way]:.2f}")
    return found


if __name__ == "__main__":
    main()
