"""A task of one's own: rents from the rooms, district and floor of made-up flats.

    embattle train examples/own_task.yaml --out runs/rents --trust-task
    embattle audit runs/rents --trust-task

`read`, `build` and `encode` are all that a task must have.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from embattle.tasks import Account, Batch, Regression, Section, Task
from torch import Tensor, nn

FIELDS = {"rooms": 6, "district": 8, "floor": 5}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(sum(FIELDS.values()), 8)
        self.head = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, fields: Tensor) -> Tensor:  # [B, 3] -> [B]
        starts = torch.tensor([0, 6, 14], device=fields.device)
        return self.head(self.embedding(fields + starts).flatten(1)).squeeze(1)


class Flats(Section):
    """The recipe's section `data`."""

    count: int = 600


class Rents(Task):
    Data, sample, vector = Flats, "flat", "field"
    kind = Regression(within=0.5)

    def read(self, account: Account) -> None:
        draw, n = random.Random(self.seed), self.data_options.count
        rows = [{name: draw.randrange(x) for name, x in FIELDS.items()} for _ in range(n)]
        for row in rows:
            row["rent"] = row["rooms"] / 2 + row["district"] * row["floor"] / 8 + draw.gauss(0, 0.1)
        cut = n // 6
        self.parts = {"train": rows[2 * cut :], "validation": rows[:cut], "test": rows[cut:][:cut]}
        account.note("made up", f"{n:,} flats")

    def build(self) -> nn.Module:
        return Net()

    def encode(self, model: nn.Module, rows: Sequence[Mapping[str, Any]]) -> Batch:
        fields = torch.tensor([[int(row[name]) for name in FIELDS] for row in rows])
        rents = [float(row["rent"]) for row in rows if "rent" in row]
        return Batch({"fields": fields}, torch.tensor(rents) if rents else None)
