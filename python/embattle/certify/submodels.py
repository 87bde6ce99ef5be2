"""Many small BPR-MF models at once, each on its own few users.

Models of the same sizes stand side by side in one tensor, and one step moves all of them: what a
step of a model of 200 users takes are the calls that make it, not the numbers. Gradients are
written out (LearnBPR: Rendle et al., "BPR", UAI 2009), so that no graph is built, and only the rows
of the batch are touched.

A model's draws and steps are its own: what becomes of it does not depend on the models beside it,
which certificates need.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from embattle import checks
from embattle.models.interactions import Interactions


@dataclass(frozen=True)
class SubmodelSettings:
    """How each model is trained.

    Attributes:
        dim: width of the vectors, whose last column is for the items' biases.
        steps: of gradient descent. Each takes, for every user of the model, one item that she met
            and one that she did not; where the latter is one that she met, she sits the step out.
        lr: of a pair's gradient.
        l2: weight of half the squared norms of the vectors that a pair uses.
        std: standard deviation of the first vectors.
        at_once: models that are trained side by side; a few megabytes of them fit into a CPU's
            cache, a GPU takes hundreds.
    """

    dim: int = 32
    steps: int = 400
    lr: float = 0.1
    l2: float = 0.01
    std: float = 0.1
    at_once: int = 8

    def __post_init__(self) -> None:
        for name, least in (("dim", 2), ("steps", 1), ("at_once", 1)):
            checks.integer("SubmodelSettings", name, getattr(self, name), least)
        for name in ("lr", "l2", "std"):
            checks.real("SubmodelSettings", name, getattr(self, name), 0)


@dataclass(frozen=True)
class Submodels:
    """M trained models of s users each.

    User r of model m scores item i by `users[m, r] @ items[m, i]`.

    Attributes:
        members: `[M, s]` int64, the users' numbers.
        users: `[M, s, dim]`, whose last column is 1.
        items: `[M, N, dim]`, whose last column is the biases.
    """

    members: Tensor
    users: Tensor
    items: Tensor


def train_submodels(
    pairs: Interactions,
    members: Tensor,
    settings: SubmodelSettings | None = None,
    *,
    generator: torch.Generator,
) -> Iterator[Submodels]:
    """Train a BPR-MF for each set of users, `settings.at_once` of them at a time.

    Args:
        pairs: who met what; on the device on which is trained.
        members: `[M, s]` int64, the users of each model, each once in a model.
        settings: how; None takes the defaults.
        generator: of first vectors and draws, on that device.

    Yields:
        The models, in the order of `members`.

    Raises:
        ValueError: members that are no such numbers.
    """
    settings = settings or SubmodelSettings()
    if members.dim() != 2 or members.is_floating_point() or not members.shape[1]:
        raise ValueError(
            f"train_submodels: members must be integers [M, s]; got {members.dtype}, "
            f"{tuple(members.shape)}"
        )
    wrong = members[(members < 0) | (members >= pairs.user_count)]
    if len(wrong):
        raise ValueError(
            f"train_submodels: members must lie in [0, {pairs.user_count}), got {int(wrong[0])}"
        )
    for some in torch.split(members, settings.at_once):
        yield _train(pairs, some, settings, generator)


# Steps whose draws are made together.
_DRAWN = 50


def _train(
    pairs: Interactions, members: Tensor, settings: SubmodelSettings, generator: torch.Generator
) -> Submodels:
    device, count, width = pairs.users.device, pairs.item_count, settings.dim
    models, size = members.shape
    who = members.to(device).flatten()
    rows = len(who)

    def normal(of: int) -> Tensor:
        return settings.std * torch.randn(of, width, generator=generator, device=device)

    p, q = normal(rows), normal(models * count)
    p[:, -1], q[:, -1] = 1, 0
    gradient = torch.empty(2 * rows, width, device=device)
    for at, weight in _draws(pairs, who, size, settings, generator):
        vectors = q.index_select(0, at)
        between = vectors[:rows] - vectors[rows:]
        # The loss -log sigmoid(x) has the derivative -sigmoid(-x).
        slope = torch.sigmoid(-torch.linalg.vecdot(p, between)) * weight
        step = torch.mul(p, slope[:, None], out=gradient[:rows])
        torch.neg(step, out=gradient[rows:])
        if settings.l2:
            decay = -settings.l2 * weight
            gradient.addcmul_(vectors, torch.cat([decay, decay])[:, None])
            between = torch.addcmul(between * slope[:, None], p, decay[:, None])
        else:
            between = between * slope[:, None]
        between[:, -1] = 0
        p += between
        q.scatter_add_(0, at[:, None].expand(-1, width), gradient)
    return Submodels(members, p.view(models, size, width), q.view(models, count, width))


def _draws(
    pairs: Interactions,
    who: Tensor,
    size: int,
    settings: SubmodelSettings,
    generator: torch.Generator,
) -> Iterator[tuple[Tensor, Tensor]]:
    """For each step the rows `[2 R]` of the item table, positive ones first, and weights `[R]`.

    R users of models of `size` each; a weight is the learning rate, or 0 where a user sits out.
    """
    device, count, rows = who.device, pairs.item_count, len(who)
    met = pairs.mask(who).flatten()
    own, first = pairs.counts[who], (pairs.counts.cumsum(0) - pairs.counts)[who]
    has = own > 0
    of = torch.arange(rows, device=device)
    base = of // size * count
    items = pairs.items if len(pairs) else torch.zeros(1, dtype=torch.int64, device=device)
    for start in range(0, settings.steps, _DRAWN):
        steps = min(_DRAWN, settings.steps - start)
        drawn = torch.rand(2, steps, rows, generator=generator, device=device)
        # A float32 below 1 may be rounded up to the count.
        place = (drawn[0] * own).long().minimum((own - 1).clamp(min=0))
        place = (first + place).clamp(max=len(items) - 1)
        positive = items.index_select(0, place.flatten()).view(steps, rows)
        negative = (drawn[1] * count).long().clamp(max=count - 1)
        hit = met.index_select(0, (of * count + negative).flatten()).view(steps, rows)
        weight = settings.lr * (has & ~hit)
        at = torch.cat([base + positive, base + negative], 1)
        yield from zip(at, weight, strict=True)
