"""Recommenders: their formulas, ranking measures, sites, attacks and hardening."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import devices
import embattle as eb
import numpy as np
import pytest
import torch
from embattle.data.ratings import Ratings
from embattle.models import DLRM, MF, DeepFM, Interactions, LightGCN, SASRec
from embattle.models.fields import Fields
from embattle.models.ranking import evaluate, measures, rank
from embattle.models.sequences import histories, windows
from torch import Tensor, nn

USERS, ITEMS = 12, 20


def pairs(seed: int = 0, share: float = 0.3) -> Interactions:
    met = torch.rand(USERS, ITEMS, generator=torch.Generator().manual_seed(seed)) < share
    users, items = met.nonzero().T
    return Interactions(users, items, USERS, ITEMS)


def here(model: Any) -> Any:
    """The model where the tests' tensors are: the package makes it on the CPU."""
    return model.to(devices.kind)


def triplets(count: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    graph = pairs()
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(0, len(graph), (count,), generator=generator)
    users = graph.users[rows]
    unmet = (~graph.mask(users)).float()
    return users, graph.items[rows], unmet.argmax(1)


class Case(NamedTuple):
    """A model, its loss function with outputs, and the sites it can be perturbed at."""

    model: nn.Module
    loss_fn: Callable[[], eb.Evaluation]
    sites: Callable[[], list[eb.Site]]
    scores: Callable[[], Tensor] | None = None


def mf() -> Case:
    model, batch = here(MF(USERS, ITEMS, dim=6, std=0.3)), triplets()
    return Case(
        model,
        lambda: eb.Evaluation(model.losses(*batch)),
        lambda: [eb.Site.embeddings(model)],
        lambda: model.scores(batch[0]),
    )


def lightgcn() -> Case:
    model, batch = here(LightGCN(pairs(), dim=6, std=0.3)), triplets()
    return Case(
        model,
        lambda: eb.Evaluation(model.losses(*batch)),
        lambda: [eb.Site.weight(model.user), eb.Site.weight(model.item)],
        lambda: model.scores(batch[0]),
    )


def sasrec() -> Case:
    model = here(SASRec(ITEMS, length=7, dim=8, dropout=0.0))
    generator = torch.Generator().manual_seed(2)
    items = torch.randint(0, ITEMS, (9, 8), generator=generator)
    items[0, 4:] = items[1, 2:] = ITEMS
    return Case(
        model,
        lambda: eb.Evaluation(model.losses(items[:, :-1], items[:, 1:])),
        lambda: [eb.Site.embeddings(model)],
        lambda: model.scores(items[:, :-1]),
    )


def clicks(dense: bool) -> Case:
    generator = torch.Generator().manual_seed(3)
    values = torch.randint(0, 3, (16, 4), generator=generator)
    features = torch.randn(16, 2, generator=generator)
    labels = torch.randint(0, 2, (16,), generator=generator)
    sizes = [3, 5, 4, 3]
    batch = (values, features) if dense else (values,)
    model: Any = here(DLRM(sizes, 2, dim=4) if dense else DeepFM(sizes, dim=4))
    with torch.no_grad():
        model.embedding.weight.normal_(std=0.5)

    def loss_fn() -> eb.Evaluation:
        logits = model(*batch)
        return eb.Evaluation(eb.losses.cross_entropy(logits, labels), logits)

    return Case(model, loss_fn, lambda: [eb.Site.embeddings(model)])


CASES: dict[str, Callable[[], Case]] = {
    "MF": mf,
    "LightGCN": lightgcn,
    "SASRec": sasrec,
    "DeepFM": lambda: clicks(False),
    "DLRM": lambda: clicks(True),
}
RANKERS = ("MF", "LightGCN", "SASRec")


def made(name: str) -> Case:
    torch.manual_seed(0)
    return CASES[name]()


# --- attacks and hardening ------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_pgd_raises_each_loss(name: str) -> None:
    case = made(name)
    clean = case.loss_fn().losses
    result = eb.PGD(eps=0.5, steps=4).run(case.loss_fn, case.sites())
    assert clean is not None
    assert clean.dim() == 1
    torch.testing.assert_close(result.clean_losses, clean)
    assert result.losses.mean() > clean.mean() + 0.01
    if name != "LightGCN":  # whose samples share what is perturbed
        assert torch.all(result.losses > clean)


@pytest.mark.parametrize("name", CASES)
def test_hardening_lowers_the_loss_under_attack(name: str) -> None:
    case = made(name)
    sites = case.sites()
    attack = eb.PGD(eps=0.3, steps=2)
    before = attack.run(case.loss_fn, sites).losses.mean()
    objective = eb.AdversarialObjective(attack, sites)
    optimizer = torch.optim.Adam(case.model.parameters(), lr=0.01)
    for _ in range(15):
        loss, metrics = objective(case.loss_fn)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert metrics["adversarial_loss"] > metrics["clean_loss"]
    assert attack.run(case.loss_fn, sites).losses.mean() < before - 0.02


@pytest.mark.parametrize("name", RANKERS)
@pytest.mark.parametrize("goal", [eb.Promote, eb.Demote])
def test_items_are_promoted_and_demoted(name: str, goal: Any) -> None:
    case = made(name)
    assert case.scores is not None
    scores = case.scores
    with torch.no_grad():
        order = scores().argsort(1, descending=True)
    item = order[:, -1] if goal is eb.Promote else order[:, 0]
    model: Any = case.model
    result = eb.PGD(eps=3.0, steps=20).run(
        lambda: eb.Evaluation(outputs=scores()), eb.Site.weight(model.item), criterion=goal(item, 3)
    )
    assert result.success.float().mean() > 0.5


@pytest.mark.parametrize("name", ["DeepFM", "DLRM"])
def test_clicks_are_mispredicted_under_attack(name: str) -> None:
    case = made(name)
    outputs = case.loss_fn().outputs
    assert outputs is not None
    goal = eb.Misclassify((outputs > 0).long(), ascend="margin")
    result = eb.PGD(eps=5.0, steps=10).run(case.loss_fn, case.sites(), criterion=goal)
    assert result.success.all()


def test_rows_of_mf_are_perturbed_as_apr_does() -> None:
    case = made("MF")
    model: Any = case.model
    sites = [eb.Site(model.user, scope="row"), eb.Site(model.item, scope="row")]
    result = eb.FGM(eps=0.5).run(case.loss_fn, sites)
    assert result.losses.mean() > result.clean_losses.mean()
    assert [len(d) for d in result.deltas] == [
        len(triplets()[0].unique()),
        len(torch.cat(triplets()[1:]).unique()),
    ]


# --- formulas -------------------------------------------------------------------------------------


def test_mf_scores_and_losses() -> None:
    case = made("MF")
    model: Any = case.model
    nn.init.normal_(model.bias)
    users, positive, negative = triplets()
    p, q, b = model.user.weight, model.item.weight, model.bias
    by_hand = torch.stack(
        [(p[u] * q[i]).sum() + b[i] for u, i in zip(users, positive, strict=True)]
    )
    torch.testing.assert_close(model(users, positive), by_hand)
    scores = model.scores(users)
    torch.testing.assert_close(scores.gather(1, positive[:, None]).squeeze(1), by_hand)
    margin = by_hand - scores.gather(1, negative[:, None]).squeeze(1)
    torch.testing.assert_close(model.losses(users, positive, negative), -margin.sigmoid().log())
    penalty = model.penalty(users, positive, negative)
    used = [p[users[0]], q[positive[0]], q[negative[0]], b[positive[0]], b[negative[0]]]
    torch.testing.assert_close(penalty[0], sum(x.square().sum() for x in used) / 2)


def test_lightgcn_is_the_mean_of_dense_propagations() -> None:
    graph = pairs()
    torch.manual_seed(0)
    model = here(LightGCN(graph, dim=6, layers=2))
    met = torch.zeros(USERS, ITEMS)
    met[graph.users, graph.items] = 1
    whole = torch.zeros(USERS + ITEMS, USERS + ITEMS)
    whole[:USERS, USERS:], whole[USERS:, :USERS] = met, met.T
    degree = whole.sum(1).clamp(min=1)
    whole = whole / degree.sqrt() / degree.sqrt()[:, None]
    first = torch.cat([model.user.weight, model.item.weight])
    final = (first + whole @ first + whole @ whole @ first) / 3
    users, positive, negative = triplets()
    expected = final[users] @ final[USERS:].T
    torch.testing.assert_close(model.scores(users), expected)
    torch.testing.assert_close(
        model(users, positive), expected.gather(1, positive[:, None]).squeeze(1)
    )
    gap = expected.gather(1, negative[:, None]) - expected.gather(1, positive[:, None])
    torch.testing.assert_close(
        model.losses(users, positive, negative), nn.functional.softplus(gap.squeeze(1))
    )
    used = [model.user.weight[users[3]], model.item.weight[positive[3]]]
    used.append(model.item.weight[negative[3]])
    torch.testing.assert_close(
        model.penalty(users, positive, negative)[3], sum(x.square().sum() for x in used) / 2
    )


def test_deepfm_adds_all_pairs_of_vectors() -> None:
    model: Any = made("DeepFM").model
    nn.init.normal_(model.first.weight)
    values = torch.tensor([[2, 4, 0, 1]])
    rows = [2, 3 + 4, 3 + 5 + 0, 3 + 5 + 4 + 1]
    vectors = model.embedding.weight[rows]
    pairs_ = sum(vectors[i] @ vectors[j] for i in range(4) for j in range(i))
    expected = pairs_ + model.first.weight[rows].sum() + model.bias
    expected = expected + model.deep(vectors.reshape(1, -1)).squeeze()
    torch.testing.assert_close(model(values)[0], expected)
    loss = model.losses(values, torch.tensor([1]))
    torch.testing.assert_close(loss[0], -expected.sigmoid().log())


def test_dlrm_takes_each_pair_of_vectors_once() -> None:
    model: Any = made("DLRM").model
    values, dense = torch.tensor([[0, 1, 2, 0]]), torch.tensor([[0.5, -1.0]])
    own = model.bottom(dense).relu()
    vectors = [own[0], *model.embedding.weight[[0, 3 + 1, 8 + 2, 12 + 0]]]
    products = [vectors[i] @ vectors[j] for i in range(5) for j in range(i)]
    expected = model.top(torch.cat([own[0], torch.stack(products)]))
    torch.testing.assert_close(model(values, dense), expected)
    loss = model.losses(values, dense, torch.tensor([0]))
    torch.testing.assert_close(loss, -(-expected).sigmoid().log())


def test_sasrec_never_looks_ahead_and_ignores_padding() -> None:
    model: Any = made("SASRec").model
    model.eval()
    whole = torch.tensor([[3, 5, 1, 8, 2, 9, 4]])
    states = model(whole)
    other = whole.clone()
    other[0, 4:] = torch.tensor([7, 7, 0])
    torch.testing.assert_close(model(other)[:, :4], states[:, :4])
    assert not torch.allclose(model(other)[:, 4:], states[:, 4:])
    padded = whole.clone()
    padded[0, 4:] = ITEMS
    torch.testing.assert_close(model.scores(padded), model.scores(whole[:, :4]))
    torch.testing.assert_close(model.scores(padded)[0], model.item.weight[:ITEMS] @ states[0, 3])
    with pytest.raises(ValueError, match=r"\(1, 8\).* length=7; give the latest 7"):
        model.scores(torch.cat([whole, whole[:, :1]], 1))


def test_sasrec_losses_are_means_over_the_targets() -> None:
    model: Any = made("SASRec").model
    met = torch.tensor([[3, 5, 1, ITEMS], [2, 9, 4, 6]])
    after = torch.tensor([[5, 1, 7, ITEMS], [9, 4, 6, 0]])
    absent = torch.tensor([[0, 2, 2, 1], [3, 3, 5, 5]])
    states = model(met)
    over_all = (states @ model.item.weight[:ITEMS].T).log_softmax(-1)
    expected = -over_all[0, range(3), after[0, :3]].mean()
    torch.testing.assert_close(model.losses(met, after)[0], expected)
    right, wrong = ((states * model.item.weight[x]).sum(-1) for x in (after, absent))
    paper = -(right.sigmoid().log() + (1 - wrong.sigmoid()).log())
    both = model.losses(met, after, absent)
    torch.testing.assert_close(both, torch.stack([paper[0, :3].mean(), paper[1].mean()]))


@pytest.mark.parametrize("wrong", [[3, 0, 0], [0, -1, 0], [0, 0, 2]])
def test_a_value_that_its_field_does_not_have_is_not_read_in_another(wrong: list[int]) -> None:
    model = DeepFM([3, 5, 2], dim=4, hidden=(4,))
    with pytest.raises(IndexError, match=re.escape(f"[3, 5, 2]; got {wrong}")):
        model(torch.tensor([[2, 4, 1], wrong]))
    for shape in ((3,), (1, 1, 3)):
        with pytest.raises(IndexError, match=re.escape(f"[3, 5, 2]; got {wrong}")):
            Fields([3, 5, 2], dim=4)(torch.tensor(wrong).view(shape))


# --- who met what ---------------------------------------------------------------------------------


def test_interactions_know_each_pair_once() -> None:
    graph = pairs()
    met = torch.zeros(USERS, ITEMS, dtype=torch.bool)
    met[graph.users, graph.items] = True
    users = torch.tensor([3, 0, 3, 11])
    assert torch.equal(graph.mask(users), met[users])
    assert torch.equal(graph.counts, met.sum(1))
    again = Interactions(graph.users.repeat(2), graph.items.repeat(2), USERS, ITEMS)
    assert len(again) == len(graph) == int(met.sum())


def test_interactions_refuse_what_they_cannot_hold() -> None:
    one = torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"items must lie in \[0, 2\); got 2"):
        Interactions(one, torch.tensor([1, 2]), 2, 2)
    with pytest.raises(ValueError, match=r"one item for each user; got \(2,\) and \(1,\)"):
        Interactions(one, one[:1], 2, 2)
    with pytest.raises(ValueError, match=r"users must be integers, got torch\.float32"):
        Interactions(one.float(), one, 2, 2)


def events() -> Ratings:
    #        user 0: 4 2 7 1 5 (the two at time 3 by number), user 1: 6, user 3: 0 3
    users = np.array([3, 0, 0, 0, 1, 0, 0, 3])
    items = np.array([0, 7, 2, 4, 6, 5, 1, 3])
    times = np.array([1.0, 3, 2, 1, 5, 9, 3, 2])
    return Ratings(users, items, np.ones(8), times, 4, 8)


def test_histories_are_the_latest_items_in_order() -> None:
    assert histories(events(), 3).tolist() == [[1, 7, 5], [6, 8, 8], [8, 8, 8], [0, 3, 8]]
    assert histories(events(), 6)[0].tolist() == [4, 2, 1, 7, 5, 8]


def test_windows_have_each_item_as_a_target_once() -> None:
    sequences, targets = windows(events(), 3)
    found = {
        tuple(map(tuple, (s, t))) for s, t in zip(sequences.tolist(), targets.tolist(), strict=True)
    }
    assert found == {
        ((2, 1, 7), (1, 7, 5)),
        ((4, 8, 8), (2, 8, 8)),
        ((0, 8, 8), (3, 8, 8)),
    }


# --- ranking --------------------------------------------------------------------------------------


def by_hand(order: list[int], relevant: set[int], k: int) -> dict[str, float]:
    """The measures in plain Python, as their definitions are written."""
    hits = [item in relevant for item in order[:k]]
    precisions = [sum(hits[: r + 1]) / (r + 1) for r in range(len(hits)) if hits[r]]
    ideal = sum(1 / np.log2(r + 2) for r in range(min(k, len(relevant))))
    return {
        "hit_rate": float(any(hits)),
        "precision": sum(hits) / k,
        "recall": sum(hits) / len(relevant),
        "ndcg": sum(hit / np.log2(r + 2) for r, hit in enumerate(hits)) / ideal,
        "mrr": 1 / (hits.index(True) + 1) if any(hits) else 0.0,
        "map": sum(precisions) / len(relevant),
        "map_at_k": sum(precisions) / min(k, len(relevant)),
    }


@pytest.mark.parametrize("k", [1, 5, 30])
def test_measures_are_those_of_the_definitions(k: int) -> None:
    seen, relevant = pairs(0), pairs(1, 0.15)
    keep = ~seen.mask(relevant.users).gather(1, relevant.items[:, None]).squeeze(1)
    relevant = Interactions(relevant.users[keep], relevant.items[keep], USERS, ITEMS)
    scores = torch.randn(USERS, ITEMS, generator=torch.Generator().manual_seed(7))
    found = evaluate(lambda users: scores[users], relevant, seen, k=k, batch_size=5)
    users = [u for u in range(USERS) if relevant.counts[u]]
    assert found.users.tolist() == users
    assert 0 < len(users) < USERS
    wanted = relevant.mask(torch.arange(USERS))
    hidden = seen.mask(torch.arange(USERS))
    for place, user in enumerate(users):
        order = sorted(
            (i for i in range(ITEMS) if not hidden[user, i]),
            key=lambda i, user=user: -float(scores[user, i]),  # type: ignore[misc]
        )
        expected = by_hand(order, set(wanted[user].nonzero().squeeze(1).tolist()), k)
        for name, value in expected.items():
            assert float(getattr(found, name)[place]) == pytest.approx(value), (name, user)
    assert found.means()["ndcg"] == pytest.approx(float(found.ndcg.mean()))


def test_measures_agree_with_torchmetrics() -> None:
    functional = pytest.importorskip("torchmetrics.functional.retrieval")
    relevant = pairs(1)
    # It takes what is not above 0 for not relevant.
    scores = torch.rand(USERS, ITEMS, generator=torch.Generator().manual_seed(7)) + 0.1
    found = evaluate(lambda users: scores[users], relevant, k=4)
    whole = evaluate(lambda users: scores[users], relevant, k=ITEMS)
    names = {
        "hit_rate": "retrieval_hit_rate",
        "precision": "retrieval_precision",
        "recall": "retrieval_recall",
        "ndcg": "retrieval_normalized_dcg",
        "mrr": "retrieval_reciprocal_rank",
    }
    for place, user in enumerate(found.users.tolist()):
        target = relevant.mask(torch.tensor([user]))[0]
        for name, other in names.items():
            value = getattr(functional, other)(scores[user], target, top_k=4)
            assert float(getattr(found, name)[place]) == pytest.approx(float(value)), name
        # Over the whole list both ways to average precisions are one.
        value = functional.retrieval_average_precision(scores[user], target)
        assert float(whole.map[place]) == pytest.approx(float(value))


def test_seen_items_are_never_recommended() -> None:
    scores = torch.tensor([[5.0, 4.0, 3.0, 2.0]])
    seen = torch.tensor([[True, False, False, False]])
    assert rank(scores, seen, 3).tolist() == [[1, 2, 3]]
    assert rank(scores, seen, 4).tolist() == [[1, 2, 3, -1]]
    assert rank(scores, None, 2).tolist() == [[0, 1]]
    one = Interactions(torch.tensor([0]), torch.tensor([0]), 1, 4)
    # What is relevant and seen is not found, and does not count as found at rank -1 either.
    assert evaluate(lambda users: scores[users], one, one, k=4).means()["hit_rate"] == 0
    assert float(measures(torch.tensor([[False, True]]), torch.tensor([2]), 2)["recall"]) == 0.5


def test_evaluation_refuses_what_cannot_be_ranked() -> None:
    relevant = pairs()
    with pytest.raises(ValueError, match=r"scores must be \[12, 20\].*got \(12, 3\)"):
        evaluate(lambda users: torch.zeros(len(users), 3), relevant)
    with pytest.raises(ValueError, match="scores have NaNs"):
        evaluate(lambda users: torch.full((len(users), ITEMS), torch.nan), relevant)
    nothing = Interactions(relevant.users[:0], relevant.items[:0], USERS, ITEMS)
    with pytest.raises(ValueError, match="relevant has no pairs"):
        evaluate(lambda users: torch.zeros(len(users), ITEMS), nothing)
    with pytest.raises(ValueError, match="12 users and 20 items, seen 12 and 21"):
        evaluate(
            lambda users: torch.zeros(len(users), ITEMS),
            relevant,
            Interactions(relevant.users, relevant.items, USERS, ITEMS + 1),
        )


def test_models_are_copied_and_their_state_is_restored() -> None:
    for name in CASES:
        case = made(name)
        other = copy.deepcopy(case.model)
        with torch.no_grad():
            for p in other.parameters():
                p.add_(1)
        other.load_state_dict(case.model.state_dict())
        for key, value in case.model.state_dict().items():
            assert torch.equal(other.state_dict()[key], value), (name, key)
