"""Profiles from a generator that learns to deceive a discriminator and a surrogate."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embattle.poisoning.ascent import SURROGATES, Chosen
from embattle.poisoning.crowd import Crowd, Profiles, Tick, nearest
from embattle.poisoning.factors import Factors

HIDDEN = 64
RATE = 1e-3
# The discriminator's loss and that of reconstruction beside the attacker's.
DECEIVE, RECONSTRUCT = 0.2, 0.2
# Steps of both networks before the attacker's loss counts.
FIRST = 20
# How much more an item of the genuine profile is worth at first, on the scale of the outputs.
KEPT = 3.0


def by_generator(crowd: Crowd, steps: int, generator: torch.Generator, tick: Tick) -> Chosen:
    """Profiles that a generator makes of genuine ones.

    Like AUSH and Leg-UP (Lin et al., "Attacking Recommender Systems with Augmented User Profiles",
    CIKM 2020, and "Shilling Black-box Recommender Systems by Learning to Generate Fake User
    Profiles", TNNLS 2022): each fake begins as a sample of a genuine user's items; a generator says
    what it has instead, and how it rates it; a discriminator tells such profiles from genuine ones;
    and the attacker's loss comes from a surrogate that is trained on the fakes, here with the
    gradient of `Factors.answer`. Which items have the largest outputs is differentiated straight
    through.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
        return _Game(crowd, generator).play(steps, tick)


class _Game:
    """Generator against discriminator and surrogates."""

    def __init__(self, crowd: Crowd, generator: torch.Generator) -> None:
        self.crowd, self._draw = crowd, generator
        items = crowd.seen.shape[1]
        self.surrogates = [Factors(crowd, generator) for _ in range(SURROGATES)]
        self.maker = nn.Sequential(
            nn.Linear(2 * items, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 2 * items)
        )
        self.judge = nn.Sequential(nn.Linear(2 * items, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1))
        long = crowd.seen.sum(1) >= min(crowd.fillers, int(crowd.seen.sum(1).amax()))
        self.models = torch.nonzero(long).flatten()

    def play(self, steps: int, tick: Tick) -> Chosen:
        """Learn, and give the best profiles that were made on the way."""
        crowd = self.crowd
        makes = torch.optim.Adam(self.maker.parameters(), lr=RATE)
        judges = torch.optim.Adam(self.judge.parameters(), lr=RATE)
        seeds = self._sample(crowd.accounts)
        best, lowest = self._made(seeds)[1], torch.inf
        for step in range(FIRST + steps):
            learning = step < FIRST
            seed = seeds if not learning else self._sample(crowd.accounts)
            fakes, chosen, worth = self._made(seed)
            fair = self._sample(crowd.accounts)
            told = self.judge(torch.cat([_flat(fair), _flat(_detached(fakes))]))[:, 0]
            real = torch.cat([torch.ones(len(fair.presence)), torch.zeros(crowd.accounts)])
            self._step(judges, F.binary_cross_entropy_with_logits(told, real))
            doubt = F.softplus(-self.judge(_flat(fakes))).mean()
            same = F.binary_cross_entropy_with_logits(worth, seed.presence, reduction="sum")
            same = same / (crowd.accounts * crowd.fillers)
            loss = DECEIVE * doubt + RECONSTRUCT * same
            if not learning:
                one = self.surrogates[step % len(self.surrogates)]
                one.fit(_detached(fakes))
                loss = loss + crowd.loss(one.answer(fakes))
                now = step - FIRST
                if now % 5 == 0 or now == steps - 1:
                    aim = self._loss(_detached(fakes))
                    if aim < lowest:
                        best, lowest = chosen, aim
                tick(now + 1, lowest)
            self._step(makes, loss)
        return best

    def _loss(self, fakes: Profiles) -> float:
        found = [float(self.crowd.loss(one.fit(fakes))) for one in self.surrogates]
        return sum(found) / len(found)

    def _sample(self, count: int) -> Profiles:
        """Genuine users' profiles, cut to the fillers, without targets."""
        crowd = self.crowd
        rows = self.models[torch.randint(len(self.models), (count,), generator=self._draw)]
        worth = crowd.seen[rows] + torch.rand(count, crowd.seen.shape[1], generator=self._draw)
        chosen = crowd.best(worth)
        presence = torch.zeros_like(worth).scatter(1, chosen, 1.0) * crowd.seen[rows]
        return Profiles(presence, crowd.values[rows] * presence)

    def _made(self, seed: Profiles) -> tuple[Profiles, Chosen, Tensor]:
        """Fakes whose presence and values have gradients, their fillers, and the items' worths."""
        crowd = self.crowd
        worth, values = self.maker(_flat(seed)).chunk(2, dim=1)
        worth = worth + KEPT * seed.presence
        chosen = crowd.best(worth.detach())
        least, most = float(crowd.scale[0]), float(crowd.scale[-1])
        values = least + (most - least) * torch.sigmoid(values)
        rounded = crowd.scale[nearest(crowd.scale, values.detach())]
        values = rounded + values - values.detach()
        hard = crowd.profiles(chosen, values)
        presence = hard.presence + (worth - worth.detach()) * crowd.free
        return Profiles(presence, hard.values), Chosen(chosen, rounded.gather(1, chosen)), worth

    @staticmethod
    def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def _flat(profiles: Profiles) -> Tensor:
    """[F, 2 I] what a network reads of profiles."""
    return torch.cat([profiles.presence, profiles.presence * profiles.values], dim=1)


def _detached(profiles: Profiles) -> Profiles:
    return Profiles(profiles.presence.detach(), profiles.values.detach())
