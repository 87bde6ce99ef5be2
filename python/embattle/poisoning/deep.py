"""Profiles by a deep recommender that is trained to recommend the targets."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embattle.poisoning.ascent import Chosen
from embattle.poisoning.crowd import Crowd, Tick, nearest

DIM, HIDDEN = 16, 16
BATCH, RATE = 2048, 5e-3
# Users whose whole lists a step of the poison model looks at.
LISTED = 64
# The attacker's loss beside the recommender's.
WEIGHT = 1.0
# Of an item that was chosen, how much of the probability to be chosen is left.
DECAY = 0.9
# The fakes are made in so many rounds, each trained on those before.
ROUNDS = 4
# Steps of the poison model in each round, for a step of the others' optimisation.
SMALL = 5


class _Neural(nn.Module):
    """NeuMF in small: a product of vectors and a perceptron of both (He et al., WWW 2017).

    A bias of each item stands for what all think of it.
    """

    def __init__(self, users: int, items: int, generator: torch.Generator) -> None:
        super().__init__()

        def drawn(*shape: int) -> nn.Parameter:
            return nn.Parameter(0.1 * torch.randn(shape, generator=generator))

        self.user, self.item = drawn(users, DIM), drawn(items, DIM)
        self.of_user, self.of_item = drawn(DIM, HIDDEN), drawn(DIM, HIDDEN)
        self.last, self.bias = drawn(HIDDEN), nn.Parameter(torch.zeros(items))
        self.hidden = nn.Parameter(torch.zeros(HIDDEN))

    def pairs(self, users: Tensor, items: Tensor) -> Tensor:
        """[B] scores of pairs."""
        one, two = self.user[users], self.item[items]
        hidden = F.relu(one @ self.of_user + two @ self.of_item + self.hidden)
        score: Tensor = (one * two).sum(1) + hidden @ self.last + self.bias[items]
        return score

    def every(self, users: Tensor) -> Tensor:
        """[B, I] scores of all items."""
        one = self.user[users]
        of_users, of_items = one @ self.of_user, self.item @ self.of_item
        hidden = F.relu(of_users[:, None] + of_items[None] + self.hidden)
        score: Tensor = one @ self.item.T + hidden @ self.last + self.bias
        return score


def by_deep_model(crowd: Crowd, steps: int, generator: torch.Generator, tick: Tick) -> Chosen:
    """Profiles of what a poisoned model predicts that the fakes like.

    After Huang et al., "Data Poisoning Attacks to Deep Learning Based Recommender Systems", NDSS
    2021: a recommender is trained on the genuine users and the fakes so far; the poison model goes
    on from there with the attacker's loss beside its own; the fakes' fillers are the items it
    scores highest for them, times a probability that falls each time an item is chosen. Here the
    fakes are made in `ROUNDS` groups and not one by one, and the values of explicit fillers are the
    poison model's predictions.

    Args:
        steps: times `SMALL`, those of the poison model in each round.
    """
    steps *= SMALL
    users, count = crowd.seen.shape[0], crowd.accounts
    model = _Neural(users + count, crowd.seen.shape[1], generator)
    present = torch.zeros(count, crowd.seen.shape[1], dtype=torch.bool)
    values = torch.zeros(count, crowd.seen.shape[1])
    if crowd.rated:
        present[:, crowd.targets], values[:, crowd.targets] = True, crowd.aimed
    chance = torch.ones(crowd.seen.shape[1])
    chosen = torch.zeros(count, crowd.fillers, dtype=torch.int64)
    groups = [g for g in torch.arange(count).chunk(ROUNDS) if len(g)]
    _train(model, crowd, present[:0], values[:0], 3 * steps, generator)
    for number, group in enumerate(groups):
        known = int(group[-1]) + 1
        if number:
            _train(model, crowd, present[:known], values[:known], steps // 2, generator)
        poison = copy.deepcopy(model)
        loss = _train(poison, crowd, present[:known], values[:known], steps, generator, poison=True)
        with torch.no_grad():
            scores = poison.every(users + group)
        for account, score in zip(group.tolist(), scores, strict=True):
            worth = score if crowd.explicit else torch.sigmoid(score)
            worth = (worth - worth.amin()) * chance
            best = crowd.best(worth[None])[0]
            chosen[account] = best
            chance[best] *= DECAY
            if bool((chance[crowd.free] < 1).all()):
                chance = torch.ones_like(chance)
            present[account, best] = True
            rounded = crowd.scale[nearest(crowd.scale, score)]
            values[account, best] = rounded[best] if crowd.explicit else 1.0
        tick(number + 1, loss)
    return Chosen(chosen, values.gather(1, chosen))


def _train(
    model: _Neural,
    crowd: Crowd,
    present: Tensor,
    values: Tensor,
    steps: int,
    generator: torch.Generator,
    *,
    poison: bool = False,
) -> float:
    """Train by squared errors of ratings, or by cross-entropy with one unmet item for each met.

    Returns:
        The attacker's last loss, 0 without one.
    """
    met = torch.cat([crowd.seen, present])
    rated = torch.cat([crowd.values, values])
    who, what = met.nonzero(as_tuple=True)
    users, items = crowd.seen.shape
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    last = 0.0
    for _ in range(steps):
        rows = torch.randint(len(who), (BATCH,), generator=generator)
        user, item = who[rows], what[rows]
        if crowd.explicit:
            loss = (model.pairs(user, item) - rated[user, item]).square().mean()
        else:
            other = torch.randint(items, (BATCH,), generator=generator)
            logits = model.pairs(user.repeat(2), torch.cat([item, other]))
            labels = torch.cat([torch.ones(BATCH), met[user, other].float()])
            loss = F.binary_cross_entropy_with_logits(logits, labels)
        if poison:
            some = torch.randint(users, (min(LISTED, users),), generator=generator)
            aim = crowd.loss(model.every(some), some)
            loss, last = loss + WEIGHT * aim, float(aim.detach())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return last
