"""A classifier of reviews whose training labels were flipped."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import torch
import torch.nn.functional as F
from embattle.data.splits import Splits
from study import Clip, Fit, Stepper
from torch import Tensor, nn

WORDS = 64
BATCH = 128


class Bag(nn.Module):
    """The mean of word vectors, one hidden layer."""

    def __init__(self, words: int, width: int = 32) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(words, width, mode="mean", padding_idx=0)
        self.head = nn.Sequential(nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, 2))

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids))


class ReviewTask:
    """Is the garment recommended? Equally many of both answers in each part."""

    name = "reviews"
    about = (
        "Mean of word vectors and one hidden layer, trained from nothing on reviews with as many "
        "of both labels in each part; Adam, batches of 128; validation and test labels are true."
    )
    quality = "accuracy"
    smaller_is_better = False
    units = ("sample",)
    rates = (0.001, 0.003, 0.01)

    def __init__(self, splits: Splits, epochs: int) -> None:
        self.epochs = epochs
        self.attacks = {
            "none": "true labels",
            "random": "20% of the training labels flipped",
            "one class": "40% of the recommended flipped (20% of all)",
        }
        found = {name: [_words(text) for text in part.texts] for name, part in splits.parts.items()}
        counts = Counter(word for words in found["train"] for word in set(words))
        known = sorted(word for word, count in counts.items() if count >= 3)
        number = {word: i for i, word in enumerate(known, 1)}
        self.words = len(known) + 1
        self.ids = {name: _table(texts, number) for name, texts in found.items()}
        self.labels = {name: torch.tensor(part.labels) for name, part in splits.parts.items()}

    def flipped(self, seed: int, attack: str) -> Tensor:
        """The training labels under an attack."""
        labels = self.labels["train"].clone()
        rng = np.random.default_rng([seed, 2])
        if attack == "random":
            rows = rng.choice(len(labels), len(labels) // 5, replace=False)
        elif attack == "one class":
            those = torch.nonzero(labels == 1).flatten().numpy()
            rows = rng.choice(those, len(those) * 2 // 5, replace=False)
        else:
            return labels
        labels[rows] = 1 - labels[rows]
        return labels

    def fit(self, clip: Clip, rate: float, epochs: int, seed: int, attack: str) -> Fit:
        torch.manual_seed(seed)
        ids, labels = self.ids["train"], self.flipped(seed, attack)
        model = Bag(self.words)
        stepper = Stepper(model, torch.optim.Adam(model.parameters(), lr=rate), clip)
        figures, norms = [], []
        for _ in range(epochs):
            for rows in torch.randperm(len(ids)).split(BATCH):
                x, y = ids[rows], labels[rows]
                stepper.step(lambda x=x, y=y: F.cross_entropy(model(x), y, reduction="none"))
            figures.append(self.accuracy(model, "validation"))
            norms = stepper.take_norms()
        return Fit(figures, {"accuracy": self.accuracy(model, "test")}, norms)

    @torch.no_grad()
    def accuracy(self, model: Bag, part: str) -> float:
        return float((model(self.ids[part]).argmax(1) == self.labels[part]).float().mean())


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())[:WORDS]


def _table(texts: list[list[str]], number: dict[str, int]) -> Tensor:
    """[texts, WORDS] numbers of the known words; 0 fills up."""
    table = torch.zeros(len(texts), WORDS, dtype=torch.long)
    for row, words in enumerate(texts):
        known = [number[word] for word in words if word in number]
        table[row, : len(known)] = torch.tensor(known, dtype=torch.long)
    return table
