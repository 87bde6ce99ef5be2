"""Bagged MF: the fused trainer beside plain training, and what fake users cannot change."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from embattle.certify import (
    SubmodelSettings,
    Votes,
    certified_overlap,
    clean_share,
    collect_votes,
    mean_share,
    train_submodels,
)
from embattle.models import MF, Interactions
from torch import Tensor

pytest.importorskip("scipy")


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pairs(users: int = 30, items: int = 40) -> Interactions:
    """Two groups of users, each with items of its own group."""
    met = torch.rand(users, items, generator=draw()) < 0.25
    same = torch.arange(users)[:, None] % 2 == torch.arange(items) % 2
    who, what = (met & same).nonzero().T
    return Interactions(who, what, users, items)


def test_a_step_is_that_of_autograd() -> None:
    # One step of one model: the gradient of the summed losses and penalties, times lr.
    graph, members = pairs(), torch.tensor([[3, 8, 11, 20]])
    settings = SubmodelSettings(dim=6, steps=1, lr=0.5, l2=0.3)

    def seeded(steps: int) -> tuple[Tensor, Tensor]:
        few = SubmodelSettings(dim=6, steps=steps, lr=0.5, l2=0.3)
        (made,) = train_submodels(graph, members, few, generator=draw(5))
        return made.users[0], made.items[0]

    after = seeded(1)
    again = draw(5)
    p = settings.std * torch.randn(4, 6, generator=again)
    q = settings.std * torch.randn(40, 6, generator=again)
    model = MF(4, 40, dim=5)
    with torch.no_grad():
        model.user.weight.copy_(p[:, :-1])
        model.item.weight.copy_(q[:, :-1])
        assert model.bias is not None
        model.bias.zero_()
    drawn = torch.rand(2, 1, 4, generator=again)[:, 0]
    own = [graph.items[graph.users == user] for user in members[0].tolist()]
    positive = torch.stack([of[int(r * len(of))] for of, r in zip(own, drawn[0], strict=True)])
    negative = (drawn[1] * 40).long()
    usable = torch.tensor([int(n) not in of.tolist() for of, n in zip(own, negative, strict=True)])
    batch = (torch.arange(4), positive, negative)
    ((model.losses(*batch) + 0.3 * model.penalty(*batch)) * usable).sum().backward()
    with torch.no_grad():
        for weight in model.parameters():
            assert weight.grad is not None
            weight -= 0.5 * weight.grad
    assert torch.allclose(after[0][:, :-1], model.user.weight, atol=1e-6)
    assert torch.equal(after[0][:, -1], torch.ones(4))
    assert torch.allclose(after[1][:, :-1], model.item.weight, atol=1e-6)
    assert torch.allclose(after[1][:, -1], model.bias, atol=1e-6)


def test_models_that_are_trained_together_learn_as_alone() -> None:
    graph = pairs()
    members = torch.stack([torch.randperm(30, generator=draw(s))[:12] for s in range(5)])
    settings = SubmodelSettings(dim=8, steps=150, at_once=2)
    found = list(train_submodels(graph, members, settings, generator=draw()))
    assert [len(some.members) for some in found] == [2, 2, 1]
    for some in found:
        scores = torch.bmm(some.users, some.items.transpose(1, 2))
        same = some.members[:, :, None] % 2 == torch.arange(40) % 2
        # Items of one's own group are above the others for nearly all.
        means = [(scores * at).sum(2) / at.sum(2) for at in (same, ~same)]
        assert float((means[0] > means[1]).double().mean()) > 0.9


def test_users_without_items_and_a_user_with_all_sit_out() -> None:
    graph = Interactions(torch.zeros(3, dtype=torch.int64), torch.arange(3), 2, 3)
    (made,) = train_submodels(graph, torch.tensor([[0, 1]]), generator=draw())
    again = draw()
    start = 0.1 * torch.randn(2, 32, generator=again)
    start[:, -1] = 1
    assert torch.equal(made.users[0], start)


def test_votes_are_of_the_submodels_with_the_user() -> None:
    graph = pairs()
    settings = SubmodelSettings(dim=4, steps=20)
    votes = collect_votes(graph, submodels=9, size=10, each=3, settings=settings, seed=1)
    assert int(votes.voters.sum()) == 90
    assert torch.equal(votes.counts.sum(1).long(), 3 * votes.voters)
    assert int(votes.counts[votes.seen].sum()) == 0
    again = collect_votes(graph, submodels=9, size=10, each=3, settings=settings, seed=1)
    assert torch.equal(votes.counts, again.counts)
    assert not bool(votes.seen.gather(1, votes.best(5)).any())


def test_a_submodel_without_fakes_is_as_likely_as_counted() -> None:
    users, size, fakes = 6, 3, 2
    others = range(1, users + fakes)  # user 0 is in all of them, the last two are fake
    chosen = list(itertools.combinations(others, size - 1))
    clean = sum(max(some) < users for some in chosen) / len(chosen)
    assert clean_share(users, size, fakes) == pytest.approx(clean)
    assert clean_share(users, size, fakes) == pytest.approx(math.comb(5, 2) / math.comb(7, 2))
    assert clean_share(users, size, 0) == 1


def votes_of(shares: list[float], voters: int, each: int, size: int = 3) -> Votes:
    """Of one user, of whom the submodels agree by these shares; 50 users in all."""
    counts = torch.zeros(50, len(shares), dtype=torch.int32)
    counts[0] = torch.tensor([round(share * voters) for share in shares])
    who = torch.full((50,), voters)
    return Votes(counts, who, size, each, torch.zeros(50, len(shares), dtype=torch.bool))


def worst_overlap(shares: list[float], wanted: list[int], q: float, each: int, k: int) -> int:
    """The least overlap that an attacker reaches, by trying all lists she may aim at.

    She has `each` votes in a share 1 - q of the submodels, at most one for an item in each.
    """
    fewest = k
    for aim in itertools.combinations(range(len(shares)), k):
        left_out = [i for i in wanted if i not in aim]
        bar = max((q * shares[i] for i in left_out), default=0.0)
        gains = [max(0.0, bar - q * shares[j]) for j in aim if j not in wanted]
        if all(g <= 1 - q for g in gains) and sum(gains) <= each * (1 - q):
            fewest = min(fewest, len(set(aim) & set(wanted)))
    return fewest


@pytest.mark.parametrize("each", [1, 2])
@pytest.mark.parametrize("seed", range(6))
def test_what_is_certified_is_what_no_attack_gets_below(each: int, seed: int) -> None:
    # So many submodels that the confidence bounds are the shares.
    shares = torch.rand(9, generator=draw(seed)) ** 3
    shares = (each * shares / shares.sum()).clamp(max=1)
    votes = votes_of(shares.tolist(), 2_000_000_000, each)
    wanted = torch.zeros(50, 9, dtype=torch.bool)
    wanted[0, shares.topk(4).indices] = True
    mine = wanted[0].nonzero().flatten().tolist()
    tight = 0
    for fakes in (0, 1, 3, 8, 20, 45):
        found = int(certified_overlap(votes, wanted, [fakes], k=4)[0, 0])
        least = worst_overlap(shares.tolist(), mine, clean_share(50, 3, fakes), each, 4)
        assert found <= least
        tight += found == least
    assert tight >= 4  # the bound is what an attacker reaches, but for how she reaches others


@pytest.mark.parametrize("voters", [17, 18])
def test_the_confidence_is_for_lists_of_the_votes_too(voters: int) -> None:
    """Of an item that all submodels name or none, either side's bound may be the wrong one."""
    wanted = torch.zeros(50, 2, dtype=torch.bool)
    wanted[0, 0] = True
    level = 0.001 / (2 * wanted.numel())  # then it is sure where level ** (1 / voters) > 1 / 2
    found = int(certified_overlap(votes_of([1.0, 0.0], voters, 1), wanted, [0], k=1)[0, 0])
    assert found == (voters > math.log2(1 / level))


def test_fewer_submodels_certify_less_and_nothing_is_certified_without_any() -> None:
    shares = [0.5, 0.3, 0.1, 0.05, 0.05]
    wanted = torch.zeros(50, 5, dtype=torch.bool)
    wanted[0, :2] = True
    found = []
    for voters in (0, 10, 100, 10_000, 10_000_000):
        found.append(int(certified_overlap(votes_of(shares, voters, 1), wanted, [1], k=2)[0, 0]))
    assert found == sorted(found)
    assert found[0] == 0
    assert found[-1] == 2
    votes = votes_of(shares, 10_000_000, 1)
    overlap = certified_overlap(votes, wanted, [0, 1, 5, 20, 49], k=2)
    assert bool((overlap.diff(dim=0) <= 0).all())
    assert mean_share(overlap, 2)[0] == pytest.approx(1 / 50)
    # What was seen is not recommended, and not counted.
    votes.seen[0, 0] = True
    assert int(certified_overlap(votes, wanted, [0], k=2)[0, 0]) == 1


def test_what_is_wrong_is_said() -> None:
    graph = pairs()
    with pytest.raises(ValueError, match="size is 31, but there are 30 users"):
        collect_votes(graph, submodels=1, size=31)
    with pytest.raises(ValueError, match=r"members must lie in \[0, 30\), got 30"):
        next(train_submodels(graph, torch.tensor([[30]]), generator=draw()))
    with pytest.raises(ValueError, match="dim must be at least 2, got 1"):
        SubmodelSettings(dim=1)
    votes = votes_of([0.5, 0.5], 10, 1)
    with pytest.raises(ValueError, match=r"wanted must be bool \(50, 2\)"):
        certified_overlap(votes, torch.ones(2, dtype=torch.bool), [1])
