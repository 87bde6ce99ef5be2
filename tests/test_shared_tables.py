"""Tables of a recommender that samples share: what forms and attacks do with their rows."""

from __future__ import annotations

from collections.abc import Callable

import embattle as eb
import pytest
import torch
import torch.nn.functional as F
from embattle.objectives.masking import Outcome
from torch import Tensor, nn


class Pairs(nn.Module):
    """Inner products of two tables."""

    def __init__(self, *, sparse: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.user = nn.Embedding(7, 4, sparse=sparse, dtype=torch.float64)
        self.item = nn.Embedding(9, 4, sparse=sparse, dtype=torch.float64)

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        return (self.user(users) * self.item(items)).sum(-1)


def losses(model: Pairs, seed: int = 1) -> Callable[[], Tensor]:
    """The BPR losses of a batch that has some of the rows."""
    generator = torch.Generator().manual_seed(seed)
    users, one, two = (torch.randint(0, 6, (8,), generator=generator) for _ in range(3))
    return lambda: F.softplus(model(users, two) - model(users, one))


def grads(model: Pairs) -> list[Tensor]:
    return [p.grad.to_dense() for p in (model.user.weight, model.item.weight)]


@pytest.mark.parametrize("form", ["mixed", "adversarial", "free", "freeat"])
@pytest.mark.parametrize("random", [False, True])
def test_weights_that_are_looked_up_with_sparse_gradients(form: str, random: bool) -> None:
    found = []
    for sparse in (False, True):
        model = Pairs(sparse=sparse)
        attack = eb.PGD(
            eps=0.5, step_size=0.3, steps=2, random_start=random,
            generator=torch.Generator().manual_seed(2),
        )  # fmt: skip
        sites = [eb.Site.weight(model.user), eb.Site.weight(model.item)]
        result = attack.run(losses(model), sites)
        objective = eb.AdversarialObjective(attack, sites, form=form)
        loss, _ = objective(losses(model))
        loss.backward()
        assert model.user.weight.grad.is_sparse == sparse
        found.append([*result.deltas, loss.detach(), *grads(model)])
    for plain, other in zip(*found, strict=True):
        torch.testing.assert_close(other, plain)


def sites_of(model: Pairs, kind: str) -> list[eb.Site]:
    if kind == "weight":
        return [eb.Site.weight(model.user), eb.Site.weight(model.item)]
    if kind == "shared":
        return [eb.Site(table, samples=None) for table in (model.user, model.item)]
    return [eb.Site(table, scope="row", rows=kind) for table in (model.user, model.item)]


@pytest.mark.parametrize("kind", ["batch", "table", "weight"])
def test_free_training_keeps_the_deltas_of_rows(kind: str) -> None:
    """By hand: three calls, the last one for a batch that has other rows, and fewer of them."""
    model, attack = Pairs(), eb.FGM(eps=0.5)
    objective = eb.AdversarialObjective(attack, sites_of(model, kind), form="freeat")
    tables = [model.user.weight.detach(), model.item.weight.detach()]
    deltas = [torch.zeros_like(table) for table in tables]
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randint(0, size, (3, 8), generator=generator) for size in (6, 5)]
    for number, (users, one, two) in enumerate((batches[0], batches[0], batches[1])):
        if number == 1:  # goes on from a state
            state = objective.state_dict()
            objective = eb.AdversarialObjective(attack, sites_of(model, kind), form="freeat")
            objective.load_state_dict(state)
        loss, _ = objective(
            lambda u=users, i=one, j=two: F.softplus(model(u, j) - model(u, i))  # type: ignore[misc]
        )
        for delta in deltas:
            delta.requires_grad_()
        user, item = (table + delta for table, delta in zip(tables, deltas, strict=True))
        expected = F.softplus((user[users] * (item[two] - item[one])).sum(-1)).mean()
        torch.testing.assert_close(loss.detach(), expected.detach())
        moved = torch.autograd.grad(expected, deltas)
        deltas = [
            eb.ops.project(delta.detach() + 0.5 * F.normalize(grad), eps=0.5, group="token")
            for delta, grad in zip(deltas, moved, strict=True)
        ]
        if kind == "batch":  # what a batch does not read is forgotten
            for delta, read in zip(deltas, (users, torch.cat([one, two])), strict=True):
                delta[~torch.isin(torch.arange(len(delta)), read)] = 0


def test_free_training_keeps_the_deltas_of_an_output_that_samples_share() -> None:
    model = Pairs()
    objective = eb.AdversarialObjective(eb.FGM(eps=0.5), sites_of(model, "shared"), form="freeat")
    first, second = (objective(losses(model))[0].detach() for _ in range(2))
    assert second > 1.2 * first


def test_a_part_of_bags_with_as_many_indices_as_bags() -> None:
    """The chosen two have an index each, but not those at the same places of the batch."""
    torch.manual_seed(0)
    bag, head = nn.EmbeddingBag(9, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    bags = [torch.tensor(one, dtype=torch.int64) for one in ([1, 2], [3], [4], [])]

    def of(rows: Tensor) -> Callable[[], Tensor]:
        some = [bags[row] for row in rows.tolist()]
        starts = torch.tensor([0, *map(len, some)])[:-1].cumsum(0)
        return lambda: (bag(torch.cat(some), starts) @ head + 1).square()

    objective = eb.AdversarialObjective(
        eb.FGM(eps=0.5), eb.Site(bag), form=eb.Partial(0.5, choose="loss"), lam=2.0
    )
    objective.form.load_state_dict({"last": torch.tensor([0.0, 9.0, 9.0, 0.0])})
    every = of(torch.arange(4))
    loss, _ = objective(every, subset=of, samples=[0, 1, 2, 3])
    clean = every().detach()
    under = (clean.sqrt() + 0.5 * head.norm()).square()  # away from zero
    weighted = clean[0] + 2 * under[1] + 2 * under[2] + clean[3]
    torch.testing.assert_close(loss.detach(), weighted / 6)


@pytest.mark.parametrize("form", ["trades", "mart", "alp", "vat", "smart"])
def test_items_that_are_ruled_out_count_nowhere(form: str) -> None:
    """As if a ranker had no scores of them."""
    model, users = Pairs(), torch.tensor([0, 1, 2, 3])
    seen = torch.tensor([1, 4, 7])
    left = torch.tensor([0, 2, 3, 5, 6, 8])
    site, right = eb.Site(model.user), torch.tensor([0, 1, 2, 5])  # among those left
    found = []
    for labels, ruled_out in ((left[right], True), (right, False)):

        def ranked(labels: Tensor = labels, ruled_out: bool = ruled_out) -> eb.Evaluation:
            scores = model.user(users) @ model.item.weight.T
            scores = scores.index_fill(1, seen, -torch.inf) if ruled_out else scores[:, left]
            return eb.Evaluation(eb.losses.cross_entropy(scores, labels), scores)

        start = eb.GaussianStart(0.1)
        attack = eb.PGD(
            eps=0.5, steps=2, random_start=start, generator=torch.Generator().manual_seed(3)
        )
        # The mean over logits has those of all items.
        lam = 1.5 if form == "alp" and ruled_out else 1.0
        objective = eb.AdversarialObjective(attack, site, form=form, lam=lam)
        model.zero_grad()
        loss, _ = objective(ranked, criterion=eb.Misclassify(labels))
        loss.backward()
        found.append([loss.detach(), *grads(model)])
    for whole, part in zip(*found, strict=True):
        torch.testing.assert_close(whole, part)


def test_personalised_ranking_moves_rows_wherever_they_are_read() -> None:
    found = []
    for kind in ("batch", "weight"):
        model = Pairs()
        objective = eb.AdversarialObjective(eb.FGM(eps=0.5), sites_of(model, kind), form="apr")
        loss, _ = objective(losses(model))
        loss.backward()
        found.append([loss.detach(), *grads(model)])
    for rows, weights in zip(*found, strict=True):
        torch.testing.assert_close(weights, rows)
    for site in (eb.Site(model.user), eb.Site.weight(model.user, group="table")):
        objective = eb.AdversarialObjective(eb.FGM(eps=0.5), site, form="apr")
        with pytest.raises(ValueError, match="perturbs table rows"):
            objective(losses(model))


def test_the_nearest_row_is_looked_for_in_the_table_of_each_call() -> None:
    """One site on all tables of a model, of different widths."""
    torch.manual_seed(0)
    tables = nn.ModuleList([nn.Embedding(5, 2), nn.Embedding(7, 3)]).double()
    rows = torch.randint(0, 5, (6, 2))

    def loss() -> Tensor:
        return tables[0](rows[:, 0]).square().sum(1) + tables[1](rows[:, 1]).square().sum(1)

    site, attack = eb.Site.embeddings(tables), eb.FGM(eps=1.0)
    same = []
    for table, row, delta in zip(tables, rows.T, attack.run(loss, site).deltas, strict=True):
        moved = table(row).detach() + delta
        same.append(torch.cdist(moved, table.weight.detach()).argmin(1) == row)
    expected, found = torch.stack(same).double().mean(0), []

    def policy(outcome: Outcome) -> Tensor:
        assert outcome.agreement is not None
        found.append(outcome.agreement())
        return found[-1] >= 0.5

    for sites in (site, [eb.Site(table) for table in tables]):
        eb.AdversarialObjective(attack, sites, masking=policy)(loss)
    assert 0 < expected.mean() < 1
    for agreement in found:
        torch.testing.assert_close(agreement.double(), expected)
