"""Certified ranks: how far down the attacker can push the item that a user should be recommended.

An item that others beat has rank 1 plus their number; here ties count against it. Every rival is
given its own worst case (`margins.worst_margin`), although one move of the user's vector has to
serve them all, so the certified rank is an upper bound of the worst rank. Where the user's vector
stays it is the worst rank itself: the held-out item then has one worst move against all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from embattle import checks
from embattle.certify.margins import Balls, first_order_attack, lower_bound, rounding


@dataclass(frozen=True)
class Ranker:
    """An inner-product ranker and the users on whom it is examined.

    Attributes:
        users: `[U, d]`, each user's vector.
        items: `[N, d]`.
        held: `[U]` int64, the item that each user should be recommended.
        seen: gives bool `[B, N]` for positions `[B]` in `users`: what is not recommended. The
            held-out item is never among it.
        bias: `[N]`, what is added to each item's scores; None: nothing. It does not move.
        batch_size: users that are ranked at once.
    """

    users: Tensor
    items: Tensor
    held: Tensor
    seen: Callable[[Tensor], Tensor] | None = None
    bias: Tensor | None = None
    batch_size: int = 256

    def __post_init__(self) -> None:
        shapes = self.users.shape, self.items.shape
        if any(len(shape) != 2 for shape in shapes) or shapes[0][1] != shapes[1][1]:
            raise ValueError(
                f"Ranker: users and items must be [U, d] and [N, d]; got {tuple(shapes[0])} and "
                f"{tuple(shapes[1])}"
            )
        if not bool(self.users.isfinite().all() and self.items.isfinite().all()):
            raise ValueError("Ranker: vectors have NaNs or infinities; nothing holds for them")
        if self.held.shape != self.users.shape[:1] or self.held.is_floating_point():
            raise ValueError(
                f"Ranker: held must be integers [{len(self.users)}], one item for each user; got "
                f"{self.held.dtype}, {tuple(self.held.shape)}"
            )
        wrong = self.held[(self.held < 0) | (self.held >= len(self.items))]
        if len(wrong):
            raise ValueError(
                f"Ranker: held must lie in [0, {len(self.items)}), got {int(wrong[0])}"
            )
        if self.bias is not None and self.bias.shape != self.items.shape[:1]:
            raise ValueError(
                f"Ranker: bias must be [{len(self.items)}], got {tuple(self.bias.shape)}"
            )
        checks.integer("Ranker", "batch_size", self.batch_size, 1)

    def __len__(self) -> int:
        return len(self.users)

    def batches(self) -> Iterator[Tensor]:
        """Give positions of users, some at a time."""
        every = torch.arange(len(self), device=self.users.device)
        yield from torch.split(every, self.batch_size)

    def rivals(self, rows: Tensor) -> Tensor:
        """Give bool `[B, N]`: the items that may be recommended in the held-out one's place."""
        shape = len(rows), len(self.items)
        if self.seen is None:
            allowed = torch.ones(shape, dtype=torch.bool, device=self.users.device)
        else:
            allowed = ~self.seen(rows)
        return allowed.scatter(1, self.held[rows][:, None], False)


@dataclass(frozen=True)
class Ranks:
    """Places of the held-out items, and how good a list of them is.

    Attributes:
        ranks: `[U]` int64, 1 is the first place.
    """

    ranks: Tensor

    def hit_rate(self, k: int = 10) -> float:
        """Give the share of users whose item is among the first k."""
        return float((self.ranks <= k).double().mean())

    def ndcg(self, k: int = 10) -> float:
        """Give the mean of `1 / log2(1 + rank)`, 0 beyond k."""
        gain = 1 / (1 + self.ranks.double()).log2()
        return float(torch.where(self.ranks <= k, gain, 0.0).mean())


def certified_ranks(ranker: Ranker, balls: Balls) -> Ranks:
    """Give an upper bound of each held-out item's rank, wherever the vectors move in their balls.

    What is certified is the function of the given vectors in exact arithmetic; all of it is
    computed in float64 and rounded against the item.

    Args:
        ranker: vectors, and who should be recommended what.
        balls: how far they may move, in the vectors' own unit.
    """
    products = _Products(ranker)
    found = []
    for rows in ranker.batches():
        allowed = ranker.rivals(rows)
        beaten = ~products.certified(rows, balls) & allowed
        found.append(beaten.sum(1) + 1)
    return Ranks(torch.cat(found))


class _Products:
    """The vectors in float64, and what all batches need of them."""

    def __init__(self, ranker: Ranker) -> None:
        self.users, self.items = ranker.users.double(), ranker.items.double()
        self.held = ranker.held
        self.bias = None if ranker.bias is None else ranker.bias.double()
        self.norms = self.items.norm(dim=1)
        self.off = rounding(self.items.shape[1])

    def certified(self, rows: Tensor, balls: Balls) -> Tensor:
        """Tell which items `[B, N]` stay behind the held-out one, bool."""
        users, held = self.users[rows], self.held[rows]
        own = self.items[held]
        off = self.off
        scores = users @ self.items.T
        w = (users * own).sum(1, keepdim=True) - scores
        size = self.norms[held][:, None] + self.norms
        # |i - j|^2 from products: its error counts to the square of the norms' sum.
        vv = size.square() - 2 * (self.norms[held][:, None] * self.norms + own @ self.items.T)
        vv = vv.clamp(min=0) + 4 * off * size.square()
        uu = (users.square().sum(1, keepdim=True) * (1 + off)).expand_as(w)
        shift = torch.zeros_like(w)
        if self.bias is not None:
            shift = self.bias[held][:, None] - self.bias
        # What the sums above may be off by, with the biases' own.
        w = w - off * uu.sqrt() * size
        shift = shift - off * (shift.abs() + (uu.sqrt() + balls.user) * (size + balls.items))
        sure: Tensor = lower_bound(w, uu, vv, balls, off, halvings=0) + shift > 0
        # Few are left between the bound's first guess and the attack's first step.
        open_ = ~sure & (first_order_attack(w, uu, vv, balls) + shift > 0)
        parts = w[open_], uu[open_], vv[open_]
        sure[open_] = lower_bound(*parts, balls, off) + shift[open_] > 0
        return sure


def attacked_ranks(
    ranker: Ranker, balls: Balls, *, k: int = 10, steps: int = 100, seed: int = 0
) -> Ranks:
    """Give the worst ranks that projected gradient steps find, from below the certified ones.

    The items' best answers are known in closed form, so only the user's vector is searched, by
    steps against those of the k nearest rivals that do not beat the held-out item yet. It is
    stronger than steps on all vectors at once.

    Args:
        ranker, balls: see `certified_ranks`.
        k: length of the list from which the item shall fall.
        steps: gradient steps, from a random point of the ball.
        seed: of that point.
    """
    k = checks.integer("attacked_ranks", "k", k, 1)
    steps = checks.integer("attacked_ranks", "steps", steps, 0)
    users, items = ranker.users.double(), ranker.items.double()
    bias = items.new_zeros(len(items)) if ranker.bias is None else ranker.bias.double()
    draw = torch.Generator().manual_seed(seed)
    found = []
    for rows in ranker.batches():
        base, held = users[rows], ranker.held[rows]
        own, allowed = items[held], ranker.rivals(rows)
        near = min(k, max(1, int(allowed.sum(1).min())))
        start = torch.randn(base.shape, generator=draw, dtype=base.dtype, device="cpu").to(base)
        x = base + balls.user * start / start.norm(dim=1, keepdim=True)
        worst = torch.ones_like(held)
        for step in range(steps + 1):
            length = x.norm(dim=1, keepdim=True).clamp(min=1e-300)
            behind = (x * own).sum(1, keepdim=True) + bias[held][:, None] - x @ items.T - bias
            margins = (behind - balls.items * length).masked_fill(~allowed, torch.inf)
            worst = worst.maximum((margins < 0).sum(1) + 1)
            if step == steps or balls.user == 0:
                break
            nearest, which = margins.topk(near, dim=1, largest=False)
            left = (nearest >= 0).to(x)
            left = torch.where(left.sum(1, keepdim=True) > 0, left, 1.0)
            grad = left.sum(1, keepdim=True) * (own - balls.items * x / length)
            grad = grad - (left[:, :, None] * items[which]).sum(1)
            size = balls.user * (0.25 if step < steps / 2 else 0.05)
            x = x - size * grad / grad.norm(dim=1, keepdim=True).clamp(min=1e-300)
            moved = x - base
            far = moved.norm(dim=1, keepdim=True).clamp(min=1e-300)
            x = base + moved * (balls.user / far).clamp(max=1)
        found.append(worst)
    return Ranks(torch.cat(found))
