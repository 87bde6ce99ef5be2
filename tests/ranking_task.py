"""A task of ranking: matrix factorisation by BPR on made-up visits, attacked at its tables."""

from __future__ import annotations

from typing import Any

import torch
from embattle import Evaluation, Site
from embattle.models import MF
from embattle.tasks import Account, Batch, Ranking, Section, Task
from torch import Tensor, nn

USERS, ITEMS = 40, 30


class Visits(Section):
    tables: bool = False


class Visited(Task):
    """Users visit the items of their own half; one visit of each is held out."""

    Data = Visits
    sample, vector = "user", "row"
    kind = Ranking(k=5)

    def read(self, account: Account) -> None:
        draw = torch.Generator().manual_seed(self.seed)
        likes = torch.arange(USERS)[:, None] % 2 == torch.arange(ITEMS) % 2
        self.seen = likes & (torch.rand(USERS, ITEMS, generator=draw) < 0.6)
        held = (self.seen * torch.rand(USERS, ITEMS, generator=draw)).argmax(1)
        self.seen[torch.arange(USERS), held] = False
        users = torch.stack([torch.arange(USERS), held], 1)
        self.parts = {"train": self.seen.nonzero(), "test": users}

    def build(self) -> nn.Module:
        return MF(USERS, ITEMS, dim=8, std=0.1)

    def encode(self, model: nn.Module, rows: Any) -> Batch:
        return Batch({"users": torch.tensor([row["user"] for row in rows])})

    def batch(self, model: nn.Module, part: str, rows: Tensor, *, seed: int = 0) -> Batch:
        users, items = self.parts[part][rows].T
        if part == "test":
            return Batch({"users": users}, items)
        draw = torch.Generator().manual_seed(seed)
        unseen = (~self.seen[users]).float()
        negative = torch.multinomial(unseen, 1, generator=draw).squeeze(1)
        return Batch({"users": users, "positive": items, "negative": negative})

    def evaluate(self, model: nn.Module, batch: Batch) -> Evaluation:
        if "negative" in batch.inputs:
            return Evaluation(model.losses(**batch.inputs))
        users = batch.inputs["users"]
        scores = model.scores(users).masked_fill(
            self.seen[users.cpu()].to(users.device), -torch.inf
        )
        return Evaluation(self.kind.losses(scores, batch.known_labels()), scores)

    def sites(self, model: nn.Module, group: Any) -> list[Site]:
        if self.data_options.tables:
            return [Site.weight(model.user, model=model), Site.weight(model.item, model=model)]
        return [Site(model.user, group=group)]
