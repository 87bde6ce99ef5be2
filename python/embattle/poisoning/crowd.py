"""Genuine users as a surrogate sees them, the fakes among them, and what the attacker wants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from embattle.data.profile_request import Request
from embattle.errors import InputError

# Cells of the table of users and items that a surrogate holds; of more users, some are drawn.
CELLS = 2**24
# Of implicit feedback, the weight of an item that a user has not met (Hu, Koren and Volinsky, ICDM
# 2008, with 1 for those met).
UNSEEN = 0.05
# How long the lists are that the attacker aims at.
TOP = 50

# Called after each step with the number of steps done and the attacker's loss.
Tick: TypeAlias = Callable[[int, float], None]


class Profiles(NamedTuple):
    """The fakes as a surrogate sees them, both [F, I]: presence in [0, 1], and values."""

    presence: Tensor
    values: Tensor


@dataclass(frozen=True)
class Crowd:
    """U genuine users and I items; ratings are shifted by their mean and scaled to a span of 1.

    Attributes:
        seen: bool [U, I], who met what.
        values: [U, I] ratings, 0 where there is none; of implicit feedback 1 where met.
        explicit: whether ratings matter, and not only who met what.
        targets: [T] int64.
        free: bool [I], what may be a filler.
        scale: [S] the ratings that occur, shifted and scaled, ascending.
        aimed: what the targets are rated.
        rated: whether the profiles have the targets.
        accounts, fillers: how many fakes, and how many fillers of each.
        weight: of each fake among the U users: below 1 where these are a sample.
        nuke: whether the targets are to be recommended less.
    """

    seen: Tensor
    values: Tensor
    explicit: bool
    targets: Tensor
    free: Tensor
    scale: Tensor
    aimed: float
    rated: bool
    accounts: int
    fillers: int
    weight: float
    nuke: bool

    @classmethod
    def of(cls, request: Request, *, explicit: bool) -> Crowd:
        """Take the users of a request, or as many of them as fit into `CELLS`.

        Raises:
            InputError: there are too many items or accounts for a surrogate.
        """
        ratings = request.ratings
        room = CELLS // ratings.item_count - request.accounts
        if room < min(ratings.user_count, 50):
            raise InputError(
                f"{request.accounts:,} optimised accounts of {ratings.item_count:,} items need a "
                f"surrogate of more than {CELLS:,} cells; ask for fewer, or use a template, such "
                "as bandwagon"
            )
        users = np.arange(ratings.user_count)
        if room < len(users):
            users = np.sort(np.random.default_rng(0).choice(users, room, replace=False))
        row = np.full(ratings.user_count, -1)
        row[users] = np.arange(len(users))
        kept = row[ratings.users] >= 0
        cells = (row[ratings.users[kept]], ratings.items[kept])
        seen = np.zeros((len(users), ratings.item_count), dtype=bool)
        seen[cells] = True
        values = seen.astype(np.float32)
        scale, aimed = np.ones(1), 1.0
        if explicit:
            mean, span = ratings.values.mean(), np.ptp(request.scale)
            scale, aimed = (request.scale - mean) / span, (request.aimed - mean) / span
            values[cells] = (ratings.values[kept] - mean) / span
        free = torch.zeros(ratings.item_count, dtype=torch.bool)
        free[torch.from_numpy(request.others)] = True
        return cls(
            torch.from_numpy(seen),
            torch.from_numpy(values),
            explicit,
            torch.from_numpy(request.targets),
            free,
            torch.from_numpy(scale).float(),
            float(aimed),
            request.rated,
            request.accounts,
            request.fillers,
            len(users) / ratings.user_count,
            request.nuke,
        )

    def weights(self) -> Tensor:
        """[U, I] how much each cell counts in a surrogate's squared loss."""
        return self.seen + (0.0 if self.explicit else UNSEEN) * ~self.seen

    def cells(self, fakes: Profiles) -> tuple[Tensor, Tensor]:
        """Weights and values [F, I] of the fakes' cells."""
        least = 0.0 if self.explicit else UNSEEN
        weights = self.weight * (least + (1 - least) * fakes.presence)
        return weights, fakes.values if self.explicit else fakes.presence

    def profiles(self, chosen: Tensor, values: Tensor | None = None) -> Profiles:
        """Profiles of the targets and some fillers.

        Args:
            chosen: [F, fillers] int64.
            values: [F, I] of the fillers; None: 1.
        """
        shape = (len(chosen), self.seen.shape[1])
        presence = torch.zeros(shape).scatter(1, chosen, 1.0)
        values = torch.ones(shape) if values is None else values.clone()
        if self.rated:
            presence[:, self.targets] = 1.0
            values[:, self.targets] = self.aimed
        return Profiles(presence, values)

    def best(self, worth: Tensor) -> Tensor:
        """The fillers of largest worth [F, I] of each account, [F, fillers] int64."""
        return worth.masked_fill(~self.free, -torch.inf).topk(self.fillers, dim=1).indices

    def loss(self, scores: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
        """What the attacker lowers, given scores [B, I] of some of the users.

        The softplus of how far a target stays behind the best `TOP` other items of a user, on the
        scale of the scores' deviation; the mean over targets and the users who have not met them. A
        nuke's is that of how far it is ahead.
        """
        seen = self.seen[rows]
        others = scores.masked_fill(seen, -torch.inf).index_fill(1, self.targets, -torch.inf)
        top = min(TOP, max(1, scores.shape[1] // 4))
        bar = others.topk(min(top, others.shape[1]), dim=1).values[:, -1:]
        counted = ~seen[:, self.targets] & bar.isfinite()
        lead = (scores[:, self.targets] - bar.masked_fill(bar.isinf(), 0.0)) / (
            scores.detach().std() + 1e-12
        )
        losses = F.softplus(lead if self.nuke else -lead)
        return (losses * counted).sum() / counted.sum().clamp(min=1)


def nearest(scale: Tensor, values: Tensor) -> Tensor:
    """Places in an ascending scale of the values nearest to others."""
    return torch.bucketize(values, (scale[1:] + scale[:-1]) / 2)
