"""Audit a model of one's own: attacks, intervals, checks on the attacks, and the report.

python examples/audit_own_model.py
embattle report runs/liked --out runs/liked.html
"""

from __future__ import annotations

from pathlib import Path

import embattle as eb
import torch
from embattle.audit import Audit, audit_models
from embattle.tasks import Batch, BinaryClassification
from torch import Tensor, nn


class Liked(nn.Module):
    """Whether a user likes an item, from the embeddings of both."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(80, 8)
        self.head = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, pair: Tensor) -> Tensor:  # [B, 2] -> [B]
        return self.head(self.embedding(pair).flatten(1)).squeeze(1)


def train(pairs: Tensor, liked: Tensor, steps: int, eps: float) -> Liked:
    """Train on PGD's perturbations of so many mean norms; without any if eps is 0."""
    torch.manual_seed(1)
    model = Liked()
    site = eb.Site(model.embedding)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.3)
    attack = eb.PGD(eps=eb.Relative(eps, to="token_norm"), steps=2)

    def losses() -> Tensor:
        return eb.losses.cross_entropy(model(pairs), liked)

    for _ in range(steps):
        found = attack.run(losses, site)
        optimizer.zero_grad()
        with found.applied():
            losses().mean().backward()
        optimizer.step()
    return model


def main(folder: str | Path = "runs/liked", steps: int = 100) -> Audit:
    """Train two models on a made-up rule, audit both, print, and save the report."""
    torch.manual_seed(0)
    pairs = torch.stack([torch.randint(40, (600,)), torch.randint(40, 80, (600,))], dim=1)
    liked = (pairs.sum(1) % 2 == 0).long()  # tastes and items of two kinds
    models = {
        "plain": train(pairs[:400], liked[:400], steps, 0.0),
        "hardened": train(pairs[:400], liked[:400], steps, 0.1),
    }

    test = Batch({"pair": pairs[400:]}, liked[400:])
    places = {name: (model, eb.Site(model.embedding)) for name, model in models.items()}
    audit = audit_models(places, test, eps=0.3, kind=BinaryClassification(("no", "yes")))
    print(audit.summary())
    audit.save(folder)
    return audit


if __name__ == "__main__":
    main()
