"""Profiles that are optimised by gradients through a surrogate's training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from embattle.poisoning.crowd import Crowd, Profiles, Tick, nearest
from embattle.poisoning.factors import DIM, RIDGE, Factors

# Steps of Adam on worths and values.
RATE = 0.05
# Surrogates from different first vectors, which take turns: what deceives one of them alone is no
# use against a victim.
SURROGATES = 3
# How often they are all asked how the profiles do.
EVERY = 5
# How much more a popular item is worth at the start, of which the best for the attacker is taken.
TILTS = (0.0, 1.0, 2.0)
# Adam steps of an unrolled surrogate before there are fakes, and with them; of the latter so many
# more are differentiated.
EPOCHS, AGAIN, UNROLLED, INNER_RATE = 80, 20, 5, 0.05


class Chosen(NamedTuple):
    """Fillers [F, fillers] int64, and their values on the crowd's scale, of the same shape."""

    items: Tensor
    values: Tensor


class Surrogate(Protocol):
    """What is trained on genuine users and fakes."""

    def fit(self, fakes: Profiles, /) -> Tensor:
        """Train with fakes, and give the genuine users' scores [U, I]."""
        ...

    def answer(self, fakes: Profiles, /) -> Tensor:
        """Give the scores after more training, differentiable in the fakes."""
        ...


def by_gradient(crowd: Crowd, steps: int, generator: torch.Generator, tick: Tick) -> Chosen:
    """Profiles by the implicit gradient through alternating least squares.

    Li, Wang, Singh and Vorobeychik, "Data Poisoning Attacks on Factorization-Based Collaborative
    Filtering", NIPS 2016: gradient ascent with the normal equations differentiated.
    """
    many = [Factors(crowd, generator) for _ in range(SURROGATES)]
    return _ascend(crowd, many, steps, generator, tick)


def by_unrolling(crowd: Crowd, steps: int, generator: torch.Generator, tick: Tick) -> Chosen:
    """Profiles by the gradient through the last steps of a surrogate's training.

    Like RevAdv: Tang, Wen and Wang, "Revisiting Adversarially Learned Injection Attacks Against
    Recommender Systems", RecSys 2020.
    """
    many = [Unrolled(crowd, generator) for _ in range(SURROGATES)]
    return _ascend(crowd, many, steps, generator, tick)


class Unrolled:
    """Matrix factorisation by Adam on all cells at once, whose steps can be differentiated.

    Args:
        crowd: the genuine users.
        generator: of the first vectors.
    """

    def __init__(self, crowd: Crowd, generator: torch.Generator) -> None:
        self.crowd = crowd
        self._weights = crowd.weights()
        users, items = crowd.seen.shape
        drawn = [
            0.1 * torch.randn(count, DIM, generator=generator)
            for count in (users, crowd.accounts, items)
        ]
        nobody = torch.zeros(0, items)
        genuine, items_ = self._train(Profiles(nobody, nobody), [drawn[0], drawn[2]], EPOCHS)
        self._first = [torch.cat([genuine, drawn[1]]), items_]
        self._now = self._first

    @torch.no_grad()
    def fit(self, fakes: Profiles) -> Tensor:
        """Train with fakes, and give the genuine users' scores."""
        self._now = self._train(fakes, self._first, AGAIN)
        return self._scores(self._now)

    def answer(self, fakes: Profiles) -> Tensor:
        """The scores after `UNROLLED` more steps, with their graph."""
        return self._scores(self._train(fakes, self._now, UNROLLED))

    def _scores(self, tables: list[Tensor]) -> Tensor:
        users, items = tables
        return users[: len(self.crowd.seen)] @ items.T

    def _train(self, fakes: Profiles, tables: list[Tensor], steps: int) -> list[Tensor]:
        fake_weights, fake_values = self.crowd.cells(fakes)
        weights = torch.cat([self._weights, fake_weights])
        values = torch.cat([self.crowd.values, fake_values])
        means = [torch.zeros_like(table) for table in tables]
        squares = [torch.zeros_like(table) for table in tables]
        for step in range(1, steps + 1):
            users, items = tables
            errors = weights * (users @ items.T - values)
            grads = [errors @ items + RIDGE * users, errors.T @ users + RIDGE * items]
            means = [0.9 * m + 0.1 * g for m, g in zip(means, grads, strict=True)]
            squares = [0.99 * s + 0.01 * g.square() for s, g in zip(squares, grads, strict=True)]
            moved = [
                INNER_RATE * (m / (1 - 0.9**step)) / (s / (1 - 0.99**step) + 1e-8).sqrt()
                for m, s in zip(means, squares, strict=True)
            ]
            tables = [table - move for table, move in zip(tables, moved, strict=True)]
        return tables


def _ascend(
    crowd: Crowd,
    surrogates: Sequence[Surrogate],
    steps: int,
    generator: torch.Generator,
    tick: Tick,
) -> Chosen:
    """Keep the profiles under which the surrogates, trained on them, do worst on average.

    A worth of each item to each account says which items are fillers: those of largest worth. In
    the backward pass it counts as presence itself (a straight-through gradient), so that items that
    are no fillers have a gradient too. The accounts' first worths differ, by the generator, or they
    would all become the same.
    """
    shape = (crowd.accounts, crowd.seen.shape[1])
    noise = torch.randn(shape, generator=generator)
    popularity = crowd.seen.float().sum(0).log1p()
    popularity = (popularity - popularity.mean()) / (popularity.std() + 1e-6)
    drawn = torch.randint(len(crowd.scale), shape, generator=generator)
    values = crowd.scale[drawn].requires_grad_()

    def losses(worth: Tensor) -> tuple[float, Chosen]:
        chosen = crowd.best(worth.detach())
        rounded = crowd.scale[nearest(crowd.scale, values.detach())]
        fakes = crowd.profiles(chosen, rounded)
        found = [float(crowd.loss(one.fit(fakes))) for one in surrogates]
        return sum(found) / len(found), Chosen(chosen, rounded.gather(1, chosen))

    starts = [noise + tilt * popularity for tilt in TILTS]
    tried = [losses(start) for start in starts]
    place = min(range(len(tried)), key=lambda i: tried[i][0])
    lowest, best = tried[place]
    tick(0, lowest)
    worth = starts[place].requires_grad_()
    optimizer = torch.optim.Adam([worth, values], lr=RATE)
    bounds = float(crowd.scale[0]), float(crowd.scale[-1])
    for step in range(1, steps + 1):
        hard = crowd.profiles(crowd.best(worth.detach()), values)
        one = surrogates[step % len(surrogates)]
        one.fit(Profiles(hard.presence, hard.values.detach()))
        presence = hard.presence + (worth - worth.detach()) * crowd.free
        loss = crowd.loss(one.answer(Profiles(presence, hard.values)))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        with torch.no_grad():
            values.clamp_(*bounds)
        if step % EVERY == 0 or step == steps:
            now, found = losses(worth)
            if now < lowest:
                best, lowest = found, now
        tick(step, lowest)
    return best
