"""Certified margins and ranks: exact beside a search, and never above what attacks find."""

from __future__ import annotations

import math

import pytest
import torch
from embattle.certify import (
    Balls,
    Ranker,
    attacked_ranks,
    certified_ranks,
    worst_margin,
)
from torch import Tensor


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def searched(u: Tensor, v: Tensor, a: float, c: float) -> float:
    """The worst `<x, v> - c |x|` over `|x - u| <= a`, by a fine search in the plane of u and v."""
    flat = torch.linalg.qr(torch.stack([u, v, torch.ones_like(u)], 1))[0][:, :2]
    u2, v2 = flat.T @ u, flat.T @ v
    angles = torch.linspace(0, 2 * math.pi, 20_001, dtype=torch.float64)

    def at(angles: Tensor) -> Tensor:
        x = u2 + a * torch.stack([angles.cos(), angles.sin()], 1)
        return x @ v2 - c * x.norm(dim=1)

    best = angles[at(angles).argmin()]
    fine = best + torch.linspace(-1, 1, 20_001, dtype=torch.float64) * 2 * math.pi / 20_000
    return float(at(fine).min())


@pytest.mark.parametrize("seed", range(40))
def test_the_worst_margin_is_what_a_search_finds(seed: int) -> None:
    generator = draw(seed)
    dim = (2, 3, 16)[seed % 3]
    u, i, j = torch.randn(3, dim, generator=generator, dtype=torch.float64)
    u *= 10 ** float(torch.randn((), generator=generator))
    radii = torch.rand(3, generator=generator, dtype=torch.float64) * (0.2, 1.5)[seed % 2]
    balls = Balls(*(radii * torch.stack([u.norm(), i.norm(), j.norm()])).tolist())
    if seed % 8 == 0:
        balls = Balls(0.0, balls.item, balls.others)
    if seed % 8 == 4:
        balls = Balls(balls.user, 0.0, 0.0)
    found = float(worst_margin(u, i, j, balls, bias=0.25))
    size = (u.norm() + balls.user) * (i.norm() + j.norm() + balls.items)
    wanted = searched(u, i - j, balls.user, balls.items) + 0.25
    assert found <= wanted + 1e-13 * size
    assert found >= wanted - 1e-7 * size
    quoted = u @ (i - j) - balls.user * (i - j).norm() - balls.items * (u.norm() + balls.user)
    assert found >= quoted + 0.25 - 1e-12 * size


def test_parallel_vectors_have_their_margin_in_closed_form() -> None:
    u = torch.tensor([2.0, 0.0])
    margin = worst_margin(u, torch.tensor([3.0, 0.0]), torch.zeros(2), Balls(0.5, 0.3, 0.2))
    assert float(margin) == pytest.approx(1.5 * 2.5, rel=1e-9)
    against = worst_margin(u, torch.zeros(2), torch.tensor([3.0, 0.0]), Balls(0.5, 0.3, 0.2))
    assert float(against) == pytest.approx(-2.5 * 3.5, rel=1e-9)
    same = worst_margin(u, u, u, Balls(0.5, 0.3, 0.2))
    assert float(same) == pytest.approx(-2.5 * 0.5, rel=1e-9)
    nothing = worst_margin(torch.zeros(2), u, u, Balls(0.5, 0.3, 0.2))
    assert float(nothing) == pytest.approx(-0.5 * 0.5, rel=1e-5)


def ranker(seed: int, *, bias: bool = True, users: int = 24, items: int = 60) -> Ranker:
    generator = draw(seed)
    made = torch.randn(users + items, 6, generator=generator)
    held = torch.randint(items, (users,), generator=generator)
    seen = torch.rand(users, items, generator=generator) < 0.2
    seen[torch.arange(users), held] = False
    # So that some are recommended.
    made[:users] += 0.8 * made[users:][held]
    return Ranker(
        made[:users],
        made[users:],
        held,
        lambda rows: seen[rows],
        torch.randn(items, generator=generator) if bias else None,
        batch_size=10,
    )


def moved_ranks(of: Ranker, balls: Balls, seed: int) -> Tensor:
    """The ranks where all vectors have moved, each user's items apart; some of them half-way."""
    generator = draw(seed)
    users, items = of.users.double(), of.items.double().expand(len(of), -1, -1)
    own = items[torch.arange(len(of)), of.held]

    def to_the_edge(radius: float, *shape: int) -> Tensor:
        step = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return radius * step / step.norm(dim=-1, keepdim=True)

    x = users + to_the_edge(balls.user, *users.shape)
    if seed % 2:  # against the held-out item, towards a rival
        rival = items[:, int(torch.randint(items.shape[1], (), generator=generator))]
        aim = rival - own
        x = users + balls.user * aim / aim.norm(dim=-1, keepdim=True).clamp(min=1e-9)
    along = x / x.norm(dim=-1, keepdim=True)
    others = items + (
        balls.others * along[:, None] if seed % 2 else to_the_edge(balls.others, *items.shape)
    )
    own = own - (balls.item * along if seed % 2 else to_the_edge(balls.item, *own.shape))
    bias = torch.zeros(len(of.items)) if of.bias is None else of.bias
    ahead = (x[:, None] * others).sum(-1) + bias.double()
    at = (x * own).sum(-1, keepdim=True) + bias.double()[of.held][:, None]
    return ((ahead >= at) & of.rivals(torch.arange(len(of)))).sum(1) + 1


@pytest.mark.parametrize(
    "balls",
    [Balls(0.3, 0.2, 0.1), Balls(0.4, 0.0, 0.0), Balls(0.0, 0.2, 0.2), Balls(0.0, 0.0, 0.0)],
)
@pytest.mark.parametrize("bias", [True, False])
def test_no_attack_gets_below_the_certified_rank(balls: Balls, bias: bool) -> None:
    of = ranker(1, bias=bias)
    certified = certified_ranks(of, balls).ranks
    # 24 users each time: 19,200 attacks over the parameters.
    worst = torch.stack([moved_ranks(of, balls, seed) for seed in range(100)]).amax(0)
    assert bool((worst <= certified).all())
    stronger = attacked_ranks(of, balls, k=5, steps=30).ranks
    assert bool((stronger <= certified).all())
    if balls.user == 0:  # one move of the held-out item is the worst against all: nothing is lost
        assert bool((stronger == certified).all())


def test_the_certified_rank_counts_worst_margins() -> None:
    of, balls = ranker(2), Balls(0.3, 0.1, 0.2)
    assert of.bias is not None
    margins = worst_margin(
        of.users[:, None],
        of.items[of.held][:, None],
        of.items,
        balls,
        bias=of.bias[of.held][:, None] - of.bias,
    )
    wanted = ((margins <= 0) & of.rivals(torch.arange(len(of)))).sum(1) + 1
    found = certified_ranks(of, balls)
    assert bool((found.ranks == wanted).all())
    assert found.hit_rate(3) == pytest.approx(float((wanted <= 3).double().mean()))
    gains = [1 / math.log2(1 + rank) if rank <= 3 else 0 for rank in wanted.tolist()]
    assert found.ndcg(3) == pytest.approx(sum(gains) / len(gains))


def test_it_never_claims_more_than_holds_where_scores_are_all_but_equal() -> None:
    # Two items whose scores differ by less than the sums' rounding are not told apart.
    u = torch.tensor([[1.0, 1e8]], dtype=torch.float64)
    items = torch.tensor([[1e8 + 1e-9, 1.0], [1e8, 1.0]], dtype=torch.float64)
    assert certified_ranks(Ranker(u, items, torch.tensor([0])), Balls(0, 0, 0)).ranks.item() == 2


def test_what_is_wrong_is_said() -> None:
    vectors = torch.randn(3, 4)
    with pytest.raises(ValueError, match=r"Balls: user must be at least 0, got -1"):
        Balls(-1, 0, 0)
    with pytest.raises(ValueError, match=r"held must lie in \[0, 3\), got 5"):
        Ranker(vectors, vectors, torch.tensor([0, 5, 1]))
    with pytest.raises(ValueError, match=r"bias must be \[3\], got \(2,\)"):
        Ranker(vectors, vectors, torch.tensor([0, 2, 1]), bias=torch.zeros(2))
    with pytest.raises(ValueError, match="vectors have NaNs"):
        Ranker(vectors / 0, vectors, torch.tensor([0, 2, 1]))
    with pytest.raises(ValueError, match="users must be floating-point"):
        worst_margin(vectors.long(), vectors, vectors, Balls(0, 0, 0))
