"""Matrix factorisation on ratings, with fake accounts that push one unpopular film."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from embattle.data.profiles import fake_profiles, inject
from embattle.data.ratings import Ratings, hold_out_latest
from study import Clip, Fit, Stepper
from torch import Tensor, nn

CUT = 10
USERS_PER_STEP = 32


class Factors(nn.Module):
    """score(u, i) = offset + bias_u + bias_i + <p_u, q_i>."""

    def __init__(self, users: int, items: int, width: int, offset: float) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(users, width), nn.Embedding(items, width)
        self.user_bias, self.item_bias = nn.Embedding(users, 1), nn.Embedding(items, 1)
        self.offset = offset
        for table in (self.user, self.item):
            nn.init.normal_(table.weight, std=0.1)
        for table in (self.user_bias, self.item_bias):
            nn.init.zeros_(table.weight)

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        """Scores [B] of users [B] and items [B]; [B, n] of items [B, n]."""
        p = self.user(users).reshape(len(users), *[1] * (items.dim() - 1), -1)
        inner = (p * self.item(items)).sum(-1) + self.item_bias(items).squeeze(-1)
        bias = self.user_bias(users).reshape(len(users), *[1] * (items.dim() - 1))
        return self.offset + inner + bias

    @torch.no_grad()
    def table(self, users: int) -> Tensor:
        """[users, items] scores of the first users."""
        inner = self.user.weight[:users] @ self.item.weight.T + self.item_bias.weight.T
        return self.offset + inner + self.user_bias.weight[:users]


@dataclass(frozen=True)
class Push:
    """An attack: the accounts, and how often each comes back to the target."""

    accounts: int
    repeats: int = 1


def batches(users: Tensor, count: int) -> Iterator[Tensor]:
    """Positions of the events of some users at a time, all of each user's together."""
    order = users.argsort(stable=True)
    start = torch.searchsorted(users[order].contiguous(), torch.arange(count + 1))
    mixed = torch.randperm(count).tolist()
    for first in range(0, count, USERS_PER_STEP):
        rows = [order[start[u] : start[u + 1]] for u in mixed[first : first + USERS_PER_STEP]]
        found = torch.cat(rows)
        if len(found):
            yield found


def target_hit_ratio(scores: Tensor, rated: Tensor, target: int) -> float:
    """Share of the users who have not rated the target and find it among their first ten.

    Args:
        scores: [users, items].
        rated: [users, items] bool: what is not recommended.
        target: the item.
    """
    open_to = ~rated[:, target]
    seen = scores.masked_fill(rated, -math.inf)[open_to]
    return float(((seen > seen[:, target, None]).sum(1) < CUT).float().mean())


class Recommender:
    """What the two tasks share: the data's parts, the target, the fakes, the training loop."""

    units = ("sample", "user")
    width = 16

    def __init__(self, ratings: Ratings, pushes: dict[str, Push], epochs: int) -> None:
        self.ratings, self.pushes, self.epochs = ratings, pushes, epochs
        counts = ratings.popularity()
        self.unpopular = np.flatnonzero((counts >= 5) & (counts <= 20))
        self.attacks = {"none": "genuine data"}
        for name, push in pushes.items():
            again = f", each {push.repeats} times on the target" if push.repeats > 1 else ""
            self.attacks[name] = f"{push.accounts} fake accounts, average template{again}"

    def target(self, seed: int) -> int:
        """The pushed item: one that few have rated."""
        return int(np.random.default_rng([seed, 1]).choice(self.unpopular))

    def attacked(self, train: Ratings, seed: int, attack: str) -> Ratings:
        """The training data, with the fake accounts of an attack."""
        if attack == "none":
            return train
        push = self.pushes[attack]
        fakes = fake_profiles(
            self.ratings,
            [self.target(seed)],
            template="average",
            accounts=push.accounts,
            fillers=min(36, self.ratings.item_count - 1),
            repeats=push.repeats,
            seed=seed,
        )
        return inject(train, self.kept(fakes.ratings))

    def kept(self, events: Ratings) -> Ratings:
        """The events that the model learns from."""
        return events

    def marks(self, events: Ratings) -> Tensor:
        """[genuine users, items] bool: the items of these events."""
        seen = torch.zeros(self.ratings.user_count, self.ratings.item_count, dtype=torch.bool)
        genuine = events.users < self.ratings.user_count
        seen[events.users[genuine], events.items[genuine]] = True
        return seen


class RatingTask(Recommender):
    """Ratings, squared error."""

    name = "rating MF"
    about = (
        "Matrix factorisation on all ratings (80% to train, 10% to validate, 10% to test), squared "
        "error, SGD with momentum 0.9, batches of 32 users with all their ratings."
    )
    quality = "RMSE"
    smaller_is_better = True
    rates = (0.1, 0.3, 1.0)

    def __init__(self, ratings: Ratings, pushes: dict[str, Push], epochs: int) -> None:
        super().__init__(ratings, pushes, epochs)
        order = np.random.default_rng(0).permutation(len(ratings))
        cuts = [len(ratings) * 8 // 10, len(ratings) * 9 // 10]
        self.train, self.validation, self.test = (ratings.take(x) for x in np.split(order, cuts))

    def fit(self, clip: Clip, rate: float, epochs: int, seed: int, attack: str) -> Fit:
        torch.manual_seed(seed)
        data = self.attacked(self.train, seed, attack)
        users, items = torch.from_numpy(data.users), torch.from_numpy(data.items)
        values = torch.from_numpy(data.values).float()
        model = Factors(data.user_count, data.item_count, self.width, float(values.mean()))
        optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=1e-5)
        stepper = Stepper(model, optimizer, clip)
        figures, norms = [], []
        for _ in range(epochs):
            for rows in batches(users, data.user_count):
                u, i, y = users[rows], items[rows], values[rows]
                stepper.step(lambda u=u, i=i, y=y: (model(u, i) - y).square(), u)
            figures.append(self.rmse(model, self.validation))
            norms = stepper.take_norms()
        scores = model.table(self.ratings.user_count)
        hits = target_hit_ratio(scores, self.marks(self.train), self.target(seed))
        return Fit(figures, {"RMSE": self.rmse(model, self.test), "target HR@10": hits}, norms)

    @torch.no_grad()
    def rmse(self, model: Factors, part: Ratings) -> float:
        scores = model(torch.from_numpy(part.users), torch.from_numpy(part.items))
        return float((scores - torch.from_numpy(part.values)).square().mean().sqrt())


class RankingTask(Recommender):
    """Liked items above others: BPR."""

    name = "MF-BPR"
    about = (
        "Matrix factorisation with the BPR loss on ratings of 4 and 5, one random negative for "
        "each event; each user's last two events validate and test (leave-one-out, all other "
        "items as candidates); Adagrad, batches of 32 users with all their events."
    )
    quality = "HR@10"
    smaller_is_better = False
    rates = (0.05, 0.15)

    def __init__(self, ratings: Ratings, pushes: dict[str, Push], epochs: int) -> None:
        super().__init__(ratings, pushes, epochs)
        rest, self.test = hold_out_latest(self.kept(ratings))
        self.train, self.validation = hold_out_latest(rest)

    def kept(self, events: Ratings) -> Ratings:
        return events.take(events.values >= 4)

    def fit(self, clip: Clip, rate: float, epochs: int, seed: int, attack: str) -> Fit:
        torch.manual_seed(seed)
        data = self.attacked(self.train, seed, attack)
        users, items = torch.from_numpy(data.users), torch.from_numpy(data.items)
        liked = torch.zeros(data.user_count, data.item_count, dtype=torch.bool)
        liked[users, items] = True
        model = Factors(data.user_count, data.item_count, self.width, 0.0)
        model.user_bias.requires_grad_(False)  # it cancels in the difference
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adagrad(trained, lr=rate)
        stepper = Stepper(model, optimizer, clip)
        figures, norms = [], []
        for _ in range(epochs):
            for rows in batches(users, data.user_count):
                u, i = users[rows], items[rows]
                other = torch.randint(data.item_count, i.shape)
                again = liked[u, other]
                other[again] = torch.randint(data.item_count, (int(again.sum()),))
                pair = torch.stack([i, other], 1)

                def losses(u: Tensor = u, pair: Tensor = pair) -> Tensor:
                    margin = model(u, pair)
                    return F.softplus(margin[:, 1] - margin[:, 0])

                stepper.step(losses, u)
            figures.append(self.hit_ratio(model, self.validation, self.marks(self.train)))
            norms = stepper.take_norms()
        known = self.marks(self.train) | self.marks(self.validation)
        scores = model.table(self.ratings.user_count)
        hits = target_hit_ratio(scores, known, self.target(seed))
        quality = self.hit_ratio(model, self.test, known)
        return Fit(figures, {"HR@10": quality, "target HR@10": hits}, norms)

    def hit_ratio(self, model: Factors, held: Ratings, known: Tensor) -> float:
        """Share of the held-out events whose item is among the user's first ten unknown ones."""
        scores = model.table(self.ratings.user_count)
        if not bool(scores.isfinite().all()):
            return 0.0
        users, items = torch.from_numpy(held.users), torch.from_numpy(held.items)
        wanted = scores[users, items]
        seen = scores.masked_fill(known, -math.inf)[users]
        return float(((seen > wanted[:, None]).sum(1) < CUT).float().mean())
