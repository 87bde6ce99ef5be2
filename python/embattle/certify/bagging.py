"""Recommendations that no few fake users can change: bagged matrix factorisation.

Jia, Liu, Hu and Gong, "PORE: Provably Robust Recommender Systems against Data Poisoning Attacks",
USENIX Security 2023. Each submodel is trained on s users drawn without replacement from all n, and
recommends N' items to each of them; the ensemble recommends a user the N items that are recommended
to her most often, by the probability `p_i` that a submodel *with her in it* recommends item i.

The attacker adds at most e users, whose profiles may be anything. A submodel drawn from the n + e
users that has user u in it has no fake one with probability

    q = C(n - 1, s - 1) / C(n - 1 + e, s - 1),

and is then distributed as the submodels without attack are. So after the attack `p'_i` lies
between `q p_i` and `q p_i + 1 - q`, and as every submodel gives N' items, what those with fake
users add is at most `N' (1 - q)` in sum.

Of a set I of items (those that the user likes, or her list without attack) fewer than r are among
the N recommended only if one of the r best of I is not, with `p'` of at least `L = q p_(r)`, and
N - r + 1 others are: each must gain `max(0, L - q p_j)`, at most 1 - q of it, N' (1 - q) in sum.
Where that cannot be, r of I stay. Bounds of Clopper and Pearson stand for the `p`, all at once with
a confidence of 1 - alpha (Bonferroni), lower ones in I and upper ones outside; both count for each
item, as I may itself depend on the votes. Moreover the `p` of the others sum to at most N' less
those of I.

The derivation here is ours from the paper's idea; it conditions on the user being in the submodel,
and counts ties against the certificate. What is proven is of the ensemble of all submodels there
are, of which those that were trained are a sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from embattle import checks
from embattle.certify.smoothing import lower_confidence, upper_confidence
from embattle.certify.submodels import SubmodelSettings, train_submodels
from embattle.models.interactions import Interactions


@dataclass(frozen=True)
class Votes:
    """What T submodels recommended.

    Attributes:
        counts: `[U, N]` int32, how many submodels recommended an item to a user.
        voters: `[U]` int64, how many had the user in them.
        size: users in a submodel, s.
        each: items that a submodel recommends to each of its users, N'.
        seen: bool `[U, N]`, what a user has met; it is not recommended.
    """

    counts: Tensor
    voters: Tensor
    size: int
    each: int
    seen: Tensor

    def best(self, k: int = 10) -> Tensor:
        """Give the ensemble's k items for each user, `[U, k]`, best first."""
        return self.counts.masked_fill(self.seen, -1).topk(k, dim=1).indices


def collect_votes(
    pairs: Interactions,
    *,
    submodels: int,
    size: int = 200,
    each: int = 1,
    settings: SubmodelSettings | None = None,
    seed: int = 0,
    tick: Callable[[int], None] | None = None,
) -> Votes:
    """Train submodels on random users, and count what they recommend.

    Args:
        pairs: who met what: the training part.
        submodels: how many.
        size: users in each.
        each: items that a submodel recommends to each of its users.
        settings: how they are trained.
        seed: decides all draws.
        tick: is told after some submodels how many there are.

    Raises:
        ValueError: numbers that do not fit the data.
    """
    submodels = checks.integer("collect_votes", "submodels", submodels, 1)
    size = checks.integer("collect_votes", "size", size, 1)
    each = checks.integer("collect_votes", "each", each, 1)
    users, items = pairs.user_count, pairs.item_count
    if size > users:
        raise ValueError(f"collect_votes: size is {size}, but there are {users} users")
    everyone = torch.arange(users, device=pairs.users.device)
    seen = pairs.mask(everyone)
    free = int((~seen).sum(1).min())
    if each > free:
        raise ValueError(
            f"collect_votes: each is {each}, but a user has {free} items left that she has not met"
        )
    draw = torch.Generator().manual_seed(seed)
    members = torch.stack([torch.randperm(users, generator=draw)[:size] for _ in range(submodels)])
    weights = torch.Generator(pairs.users.device).manual_seed(seed + 1)
    counts = torch.zeros(users * items, dtype=torch.int32, device=pairs.users.device)
    one = torch.ones((), dtype=torch.int32, device=pairs.users.device)
    done = 0
    for some in train_submodels(pairs, members, settings, generator=weights):
        who = some.members.to(counts.device)
        scores = torch.bmm(some.users, some.items.transpose(1, 2))
        best = scores.masked_fill_(seen[who], -torch.inf).topk(each, dim=2).indices
        at = (who[:, :, None] * items + best).flatten()
        counts.index_put_((at,), one.expand(len(at)), accumulate=True)
        done += len(who)
        if tick is not None:
            tick(done)
    voters = members.flatten().bincount(minlength=users).to(counts.device)
    return Votes(counts.view(users, items), voters, size, each, seen)


def certified_overlap(
    votes: Votes, wanted: Tensor, fakes: Sequence[int], *, k: int = 10, alpha: float = 0.001
) -> Tensor:
    """Give how many of each user's wanted items stay among the k recommended, whatever fakes do.

    Args:
        votes: of submodels, without attack.
        wanted: bool `[U, N]`, each user's set of items, of the votes or not; what she has seen is
            not counted.
        fakes: numbers of fake users.
        k: length of a list of recommendations.
        alpha: probability that any of the certificates (of all users) is wrong.

    Returns:
        `[len(fakes), U]` int64.

    Raises:
        InputError: scipy is not installed.
        ValueError: arguments that do not fit.
    """
    k = checks.integer("certified_overlap", "k", k, 1)
    if not 0 < checks.real("certified_overlap", "alpha", alpha) < 1:
        raise ValueError(f"certified_overlap: alpha must be between 0 and 1, got {alpha:g}")
    if wanted.shape != votes.counts.shape or wanted.dtype != torch.bool:
        raise ValueError(
            f"certified_overlap: wanted must be bool {tuple(votes.counts.shape)}; got "
            f"{wanted.dtype}, {tuple(wanted.shape)}"
        )
    for count in fakes:
        checks.integer("certified_overlap", "fakes", count, 0)
    counts, voters = votes.counts.cpu().long(), votes.voters.cpu()
    seen = votes.seen.cpu()
    inside = wanted.cpu() & ~seen
    users, items = counts.shape
    level = alpha / (2 * users * items)  # either bound of an item may be the wrong one
    times = voters[:, None].expand_as(counts)
    # A user without a submodel has no bounds but 0 and 1.
    drawn = times.clamp(min=1)
    hits = counts.minimum(times)
    lower = lower_confidence(hits, drawn, level).where(times > 0, 0.0)
    upper = upper_confidence(hits, drawn, level).where(times > 0, 1.0)
    # With equal bounds the best r of I are those with the largest lower bounds.
    best = _padded(lower.masked_fill(~inside, -1).topk(min(k, items), dim=1).values, k)
    rivals = _padded(upper.masked_fill(inside | seen, -1).topk(min(k, items), dim=1).values, k)
    rest = votes.each - (lower * inside).sum(1)
    found = [_certified(best, rivals, rest, votes, users, count, k) for count in fakes]
    return torch.stack(found)


def clean_share(users: int, size: int, fakes: int) -> float:
    """Give q: how likely a submodel with a given user in it has no fake one."""
    share = 1.0
    for one in range(1, fakes + 1):
        share *= (users - size + one) / (users - 1 + one)
    return share


def _certified(
    best: Tensor, rivals: Tensor, rest: Tensor, votes: Votes, users: int, fakes: int, k: int
) -> Tensor:
    """The largest r for each user for which the rivals cannot gain enough, `[U]`."""
    q = clean_share(users, votes.size, fakes)
    room = 1 - q
    found = torch.zeros(len(best), dtype=torch.int64)
    for r in range(1, k + 1):
        least = q * best[:, r - 1]
        others = rivals[:, : k - r + 1]
        gains = (least[:, None] - q * others).clamp(min=0)
        total = gains.sum(1).maximum((k - r + 1) * least - q * rest)
        # Floats are rounded: what is equal up to them counts as possible.
        impossible = (gains > room + 1e-12).any(1) | (total > votes.each * room + 1e-12)
        impossible |= (others < 0).any(1)  # there are not as many rivals
        found = torch.where(impossible & (best[:, r - 1] >= 0), r, found)
    return found


def _padded(values: Tensor, width: int) -> Tensor:
    """-1 where there are fewer than `width` columns."""
    return torch.nn.functional.pad(values, (0, width - values.shape[1]), value=-1)


def mean_share(overlap: Tensor, k: int) -> list[float]:
    """Give the certified precision: the mean over users of what stays, over k, for each number."""
    return (overlap.double() / k).mean(1).tolist() if math.prod(overlap.shape) else []
