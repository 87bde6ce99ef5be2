"""Which words an attack used, and the loss around the clean embeddings.

python examples/explain_an_attack.py [FOLDER]    # FOLDER: where pictures are written
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import embattle as eb
import torch
from embattle.explain import carried, landscape, parts, pictures
from torch import Tensor, nn

WORDS = [*(f"word{i}" for i in range(48)), "good", "bad"]


class Classifier(nn.Module):
    """Attention picks among the words of a text; a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(WORDS), 16)
        self.attention, self.head = nn.Linear(16, 1), nn.Linear(16, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        vectors = self.embedding(tokens)
        return self.head((self.attention(vectors).softmax(1) * vectors).sum(1))


def main(folder: Path | None = None, steps: int = 150) -> dict[str, float]:
    """Train on texts of which one word tells the class; returns the words' shares in an attack."""
    torch.manual_seed(0)
    labels = torch.arange(256) % 2
    tokens = torch.randint(0, 48, (256, 8))
    tokens[:, 3] = torch.where(labels == 1, 48, 49)
    model = Classifier()
    site = eb.Site(model.embedding, group="token")  # each word may move as far

    def loss_of(rows: Tensor) -> Callable[[], eb.Evaluation]:
        def loss_fn() -> eb.Evaluation:
            logits = model(tokens[rows])
            return eb.Evaluation(eb.losses.cross_entropy(logits, labels[rows]), logits)

        return loss_fn

    every = torch.arange(256)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(every)().losses.mean().backward()
        optimizer.step()

    attack = eb.PGD(eps=eb.Relative(0.3), steps=10)
    some = every[:32]
    result = attack.run(loss_of(some), site, criterion=eb.Misclassify(labels[some]))
    found = carried(loss_of(some), site, result.deltas)
    print(f"loss {float(found.clean.mean()):.3f} to {float(found.attacked.mean()):.3f}")
    print(f"what the parts miss of it: {float(found.gap.abs().max()):.1e} at most")

    texts = [[WORDS[token] for token in text] for text in tokens[some].tolist()]
    names = parts.names_of(found, [texts], "word")
    averages = parts.averages(found, names)
    for entry in averages[:4]:
        print(f"{entry['name']:8s} {entry['share']:6.1%} of the rise, in {entry['count']} texts")

    plane = landscape(loss_of(some), site, result.deltas, eps=attack.eps, lines=11)
    middle = len(plane.x) // 2
    print("loss along the attack:", " ".join(f"{value:.2f}" for value in plane.z[middle]))
    print("loss across it:       ", " ".join(f"{line[middle]:.2f}" for line in plane.z))
    if folder is not None:
        (folder / "carried.svg").write_text(pictures.bars("what raised the loss", averages))
        (folder / "landscape.svg").write_text(pictures.heat_map("mean loss", vars(plane)))
    return {entry["name"]: entry["share"] for entry in averages}


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
