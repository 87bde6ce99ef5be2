"""Sites, strengths, and what an attack leaves behind."""

from __future__ import annotations

import copy
import itertools
import math
from functools import partial
from typing import Any

import embattle as eb
import pytest
import torch
import toys
from embattle.perturb.perturbed_sites import PerturbedSites
from torch import nn


def test_a_resting_site_changes_nothing() -> None:
    model = toys.encoder()
    tokens, _ = toys.text_batch()
    before = model(tokens)
    with eb.Site(model.embedding) as site:
        assert torch.equal(model(tokens), before)
        assert not site.busy
    assert not model.embedding._forward_hooks


def test_a_whole_model_is_refused_and_its_input_embeddings_are_found() -> None:
    class Fake(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Embedding(3, 2)

        def get_input_embeddings(self) -> nn.Module:
            return self.inner

    model = Fake()
    with pytest.raises(TypeError, match=r"Site\.embeddings\(model\)"):
        eb.Site(model)
    site = eb.Site.embeddings(model)
    assert site.module is model.inner
    assert site.model is model


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"module": 3}, TypeError, "torch.nn.Module"),
        ({"module": nn.Linear(2, 2), "group": "batch"}, ValueError, "'batch'"),
        ({"module": nn.Linear(2, 2), "scope": "table"}, ValueError, "'table'"),
        ({"module": nn.Linear(2, 2), "scope": "row"}, TypeError, "nn.Embedding"),
        ({"module": nn.EmbeddingBag(3, 2, mode="max"), "scope": "row"}, ValueError, "'max'"),
        ({"module": nn.Embedding(3, 2), "scope": "row", "rows": "all"}, ValueError, "'all'"),
        ({"module": nn.Embedding(3, 2), "rows": "table"}, ValueError, "needs scope='row'"),
    ],
)
def test_site_says_what_is_wrong(arguments: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        eb.Site(**arguments)


def test_deltas_respect_the_mask_and_the_ball() -> None:
    model = toys.encoder()
    tokens, labels = toys.text_batch()
    site = eb.Site(model.embedding)
    result = eb.PGD(eps=0.7, steps=3).run(
        toys.classify(model, tokens, labels), site, mask=tokens != 0
    )
    (delta,) = result.deltas
    assert torch.all(delta[tokens == 0] == 0)
    assert torch.all(delta[tokens != 0].norm(dim=1) > 0)
    assert torch.all(delta.flatten(1).norm(dim=1) <= 0.7 + 1e-12)
    assert torch.allclose(result.norms[0], delta.flatten(1).norm(dim=1))


def test_applied_gives_the_reported_losses_and_ends() -> None:
    model = toys.encoder()
    tokens, labels = toys.text_batch()
    loss = toys.classify(model, tokens, labels)
    result = eb.PGD(eps=0.7, steps=2).run(loss, eb.Site(model.embedding))
    with result.applied():
        perturbed = loss().losses
        again = loss().losses
    assert torch.equal(perturbed, again)
    assert torch.allclose(perturbed, result.losses)
    assert torch.allclose(loss().losses, result.clean_losses)
    perturbed.mean().backward()
    assert model.head.weight.grad is not None


def test_a_module_called_twice_gets_a_delta_for_each_call() -> None:
    model = toys.factors()
    batch = toys.triplets()
    loss = toys.rank(model, batch)
    result = eb.FGM(eps=0.5).run(loss, [eb.Site(model.user), eb.Site(model.item)])
    assert len(result.deltas) == 3
    u, p, n = (
        table(i).detach() + d
        for table, i, d in zip(
            (model.user, model.item, model.item), batch, result.deltas, strict=True
        )
    )
    expected = torch.nn.functional.softplus(((n - p) * u).sum(-1))
    assert torch.allclose(result.losses, expected)


def test_joint_ball_spans_all_outputs() -> None:
    model = toys.factors()
    loss = toys.rank(model, toys.triplets())
    sites = [eb.Site(model.user), eb.Site(model.item)]
    result = eb.PGD(eps=0.5, steps=3, step_size=0.3).run(loss, sites, joint=True)
    (delta,) = result.deltas
    assert delta.shape == (9, 18, 1)
    assert torch.allclose(result.norms[0], torch.full((9,), 0.5, dtype=torch.float64))
    assert torch.all(result.losses > result.clean_losses)
    random = eb.PGD(eps=0.5, steps=2, random_start=True).run(loss, sites, joint=True)
    assert torch.all(random.norms[0] <= 0.5)


def test_joint_ball_takes_masks_and_refuses_tokens() -> None:
    model = toys.encoder()
    tokens, labels = toys.text_batch()
    loss = toys.classify(model, tokens, labels)
    result = eb.FGM(eps=0.5).run(loss, eb.Site(model.embedding), mask=tokens != 0, joint=True)
    alone = eb.FGM(eps=0.5).run(loss, eb.Site(model.embedding), mask=tokens != 0)
    assert torch.allclose(result.deltas[0].reshape(alone.deltas[0].shape), alone.deltas[0])
    with pytest.raises(ValueError, match="joint"):
        eb.FGM(eps=0.5).run(loss, eb.Site(model.embedding, group="token"), joint=True)


def test_token_groups_have_a_ball_each() -> None:
    model = toys.encoder()
    tokens, labels = toys.text_batch()
    site = eb.Site(model.embedding, group="token")
    result = eb.FGM(eps=0.2).run(toys.classify(model, tokens, labels), site, mask=tokens != 0)
    norms = result.deltas[0].norm(dim=-1)
    assert torch.allclose(norms, 0.2 * (tokens != 0).double())


def test_packed_rows_follow_offsets() -> None:
    """Attacking packed samples equals attacking each sample alone."""
    torch.manual_seed(0)
    embedding, head = nn.Embedding(30, 5).double(), nn.Linear(5, 1).double()
    tokens = torch.randint(0, 30, (9,))
    offsets = torch.tensor([0, 2, 6, 9])

    def pooled(rows: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
        parts = [rows[a:b].tanh().mean(0) for a, b in itertools.pairwise(bounds)]
        return head(torch.stack(parts)).squeeze(-1)

    site = eb.Site(embedding)
    attack = eb.PGD(eps=0.4, steps=3, keep="best")
    packed = attack.run(lambda: pooled(embedding(tokens), offsets), site, offsets=offsets)
    for sample, (a, b) in enumerate(((0, 2), (2, 6), (6, 9))):
        part = tokens[a:b]
        alone = attack.run(
            lambda part=part: pooled(embedding(part[None])[0], torch.tensor([0, len(part)])), site
        )
        assert torch.allclose(packed.deltas[0][a:b], alone.deltas[0][0])
        assert torch.allclose(packed.losses[sample], alone.losses[0])


def test_row_scope_shares_one_delta_between_occurrences() -> None:
    model = toys.factors()
    batch = toys.triplets()
    loss = toys.rank(model, batch)
    sites = [eb.Site(model.user, scope="row"), eb.Site(model.item, scope="row")]
    result = eb.FGM(eps=0.5).run(loss, sites)
    users, items = result.deltas
    assert users.shape == (len(batch[0].unique()), 6)
    assert items.shape == (len(torch.cat(batch[1:]).unique()), 6)
    loss().sum().backward()
    for table, delta in ((model.user, users), (model.item, items)):
        rows = torch.cat(batch[1:]).unique() if table is model.item else batch[0].unique()
        grad = table.weight.grad[rows]
        assert torch.allclose(delta, 0.5 * grad / grad.norm(dim=1, keepdim=True))
    with torch.no_grad():
        model.user.weight[batch[0].unique()] += users
        model.item.weight[torch.cat(batch[1:]).unique()] += items
    assert torch.allclose(loss(), result.losses)


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("padding", [None, 0])
def test_row_scope_in_bags(mode: str, padding: int | None) -> None:
    torch.manual_seed(0)
    bag = nn.EmbeddingBag(10, 4, mode=mode, padding_idx=padding).double()
    head = nn.Linear(4, 1).double()
    tokens = torch.randint(0, 10, (5, 6))
    mask = torch.rand(5, 6) < 0.8

    def loss() -> torch.Tensor:
        return head(bag(tokens).tanh()).squeeze(-1)

    result = eb.PGD(eps=0.5, steps=3, keep="best").run(loss, eb.Site(bag, scope="row"), mask=None)
    rows = tokens.unique()
    rows = rows[rows != padding] if padding is not None else rows
    assert result.losses.sum() > result.clean_losses.sum()
    with torch.no_grad():
        bag.weight[rows] += result.deltas[0]
        assert torch.allclose(loss(), result.losses)
        bag.weight[rows] -= result.deltas[0]
    masked = eb.FGM(eps=0.5).run(loss, eb.Site(bag, scope="row"), mask=mask)
    kept = tokens[mask & (tokens != (-1 if padding is None else padding))].unique()
    assert masked.deltas[0].shape == (len(kept), 4)


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_rows_of_the_whole_table(kind: type[nn.Module]) -> None:
    """The batch's rows move as they do alone; others stay at zero, or are drawn and not used."""
    torch.manual_seed(0)
    table = kind(10, 4, padding_idx=0).double()
    head = nn.Linear(4, 1).double()
    tokens = torch.randint(0, 8, (5, 3))

    def loss() -> torch.Tensor:
        found = table(tokens)
        return head((found if found.dim() == 2 else found.sum(1)).tanh()).squeeze(-1)

    rows = tokens.unique()
    rows = rows[rows != 0]
    alone = eb.PGD(eps=0.5, steps=3).run(loss, eb.Site(table, scope="row"))
    whole_site = eb.Site(table, scope="row", rows="table")
    whole = eb.PGD(eps=0.5, steps=3).run(loss, whole_site)
    expected = torch.zeros(10, 4, dtype=torch.float64)
    expected[rows] = alone.deltas[0]
    torch.testing.assert_close(whole.deltas[0], expected)
    torch.testing.assert_close(whole.losses, alone.losses)
    assert "all rows" in repr(whole_site)
    started = eb.UniformNoise(norm="l2", eps=0.5).run(loss, whole_site)
    assert torch.all(started.deltas[0][1:].norm(dim=1) > 0)
    assert not started.deltas[0][0].any()  # padding never moves
    measured = eb.FGM(eps=eb.Relative(1.0)).run(loss, whole_site).norms[0]
    torch.testing.assert_close(measured.amax(), table.weight[1:].detach().norm(dim=1).mean())
    with torch.no_grad():
        table.weight += started.deltas[0]
        torch.testing.assert_close(loss(), started.losses)


def test_relative_and_per_dimension_strengths() -> None:
    model = toys.encoder()
    tokens, labels = toys.text_batch()
    mask = tokens != 0
    loss = toys.classify(model, tokens, labels)
    site = eb.Site(model.embedding)
    base = model.embedding(tokens).detach() * mask.unsqueeze(-1)
    norms = base.flatten(1).norm(dim=1)

    def reached(eps: object) -> torch.Tensor:
        return eb.FGM(eps=eps).run(loss, site, mask=mask).norms[0]

    assert torch.allclose(reached(eb.Relative(0.3, to="group_norm")), 0.3 * norms)
    assert torch.allclose(reached(eb.Relative(0.3)), 0.3 * norms.mean().expand(6))
    tokenwise = base.norm(dim=-1).sum() / mask.sum()
    assert torch.allclose(reached(eb.Relative(0.3, to="token_norm")), 0.3 * tokenwise.expand(6))
    sizes = mask.sum(1).double() * 8
    assert torch.allclose(reached(eb.PerDim(2.0)), 2.0 / sizes.sqrt(), atol=1e-6)
    assert torch.allclose(reached(torch.tensor(0.4)), torch.full((6,), 0.4, dtype=torch.float64))
    each = torch.linspace(0.0, 1.0, 6, dtype=torch.float64)
    assert torch.allclose(reached(each), each)


def test_strengths_read_in_words() -> None:
    assert "0.3 x the mean norm" in repr(eb.PGD(eps=eb.Relative(0.3)))
    assert "5 / sqrt(elements" in repr(eb.FGM(eps=eb.PerDim(5)))
    assert repr(eb.PGD(eps=1.0, steps=3, step_size=0.4, random_start=True, mode="same")) == (
        "PGD(l2 ball of radius 1, 3 steps of 0.4, random start, same dropout masks)"
    )
    with pytest.raises(ValueError, match="-1"):
        eb.Relative(-1)
    with pytest.raises(ValueError, match="row_norm"):
        eb.Relative(1, to="row_norm")  # type: ignore[arg-type]


class Normed(nn.Module):
    """Embeddings, batch norm, dropout, logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 6)
        self.norm = nn.BatchNorm1d(6)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(6, 3)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.dropout.eval()  # a submodule in a mode of its own

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.embedding(tokens).mean(1))
        return self.head(torch.nn.functional.dropout(self.frozen(hidden), 0.3, self.training))


def snapshot(model: nn.Module) -> dict[str, object]:
    return {
        "state": copy.deepcopy(model.state_dict()),
        "modes": [module.training for module in model.modules()],
        "flags": [p.requires_grad for p in model.parameters()],
        "grads": [p.grad for p in model.parameters()],
        "tracks": [getattr(m, "track_running_stats", None) for m in model.modules()],
    }


def assert_unchanged(before: dict[str, object], model: nn.Module) -> None:
    after = snapshot(model)
    for key in ("modes", "flags", "tracks", "grads"):
        assert before[key] == after[key], key
    for name, value in before["state"].items():  # type: ignore[attr-defined]
        assert torch.equal(value, after["state"][name]), name  # type: ignore[index]


@pytest.mark.parametrize("mode", ["as_is", "same", "eval"])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("fails_at", [None, 0, 1, 3])
def test_an_attack_leaves_the_model_as_it_was(mode: str, known: bool, fails_at: int | None) -> None:
    torch.manual_seed(0)
    model = Normed()
    site = eb.Site(model.embedding, model=model if known or mode == "eval" else None)
    tokens, labels = torch.randint(0, 20, (5, 4)), torch.randint(0, 3, (5,))
    calls = 0

    def loss() -> torch.Tensor:
        nonlocal calls
        calls += 1
        if fails_at is not None and calls > fails_at:
            raise KeyError("from the user's loss")
        assert model.training == (mode != "eval")
        return eb.losses.cross_entropy(model(tokens), labels)

    attack = eb.PGD(eps=0.5, steps=3, random_start=True, mode=mode)
    before, state = snapshot(model), torch.get_rng_state()
    if fails_at is None:
        attack.run(loss, site)
        torch.set_rng_state(state)
        torch.randint(2**62, ())  # the one draw that seeds the attack
        expected = torch.rand(3)
        torch.set_rng_state(state)
        attack.run(loss, site)
        assert torch.equal(torch.rand(3), expected)
    else:
        with pytest.raises(KeyError):
            attack.run(loss, site)
        assert torch.equal(torch.get_rng_state(), state)
    assert not site.busy
    assert_unchanged(before, model)


def test_same_mode_replays_the_dropout_masks() -> None:
    model = toys.encoder(dropout=0.5)
    tokens, labels = toys.text_batch()
    site = eb.Site(model.embedding)
    seen: list[torch.Tensor] = []

    def loss() -> torch.Tensor:
        seen.append(torch.nn.functional.dropout(torch.ones(64), 0.5))
        return eb.losses.cross_entropy(model(tokens), labels)

    eb.PGD(eps=0.1, steps=3, mode="same").run(loss, site)
    assert len(seen) == 4
    assert all(torch.equal(one, seen[0]) for one in seen)
    seen.clear()
    eb.PGD(eps=0.1, steps=3).run(loss, site)
    assert not any(torch.equal(one, seen[0]) for one in seen[1:-1])
    assert torch.equal(seen[-1], seen[0])  # what is reported is compared under the same masks


def test_eval_mode_needs_the_model() -> None:
    model = toys.encoder()
    tokens, labels = toys.text_batch()
    with pytest.raises(ValueError, match="model=model"):
        eb.FGM(eps=1.0, mode="eval").run(
            toys.classify(model, tokens, labels), eb.Site(model.embedding)
        )


def test_weights_get_no_gradient_even_transiently() -> None:
    model = toys.encoder()
    tokens, labels = toys.text_batch()
    touched: list[str] = []
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda grad, name=name: touched.append(name))
    for attack in (eb.PGD(eps=1.0, steps=3), eb.PGD(eps=1.0, steps=2, random_start=True)):
        attack.run(toys.classify(model, tokens, labels), eb.Site(model.embedding))
    assert touched == []


def test_frozen_embeddings_and_half_precision() -> None:
    model = toys.encoder(dtype=torch.bfloat16)
    model.requires_grad_(False)
    tokens, labels = toys.text_batch()
    result = eb.PGD(eps=0.5, steps=2).run(
        toys.classify(model, tokens, labels), eb.Site(model.embedding), mask=tokens != 0
    )
    assert result.deltas[0].dtype == torch.float32
    assert torch.all(result.norms[0] > 0.3)


def test_errors_name_the_culprit() -> None:
    model = toys.encoder()
    tokens, labels = toys.text_batch()
    site = eb.Site(model.embedding)
    attack = eb.FGM(eps=1.0)
    with pytest.raises(ValueError, match="reduction='none'"):
        attack.run(lambda: model(tokens).sum(), site)
    with pytest.raises(TypeError, match="float"):
        attack.run(lambda: 1.0, site)
    with pytest.raises(RuntimeError, match="did not call"):
        attack.run(lambda: torch.ones(3, requires_grad=True), site)
    with pytest.raises(ValueError, match=r"\(6, 7\)"):
        attack.run(toys.classify(model, tokens, labels), site, mask=tokens[:, 1:] != 0)
    with pytest.raises(TypeError, match="int64"):
        attack.run(toys.classify(model, tokens, labels), site, mask=tokens)
    with pytest.raises(ValueError, match="2 entries were given for the 1 calls"):
        attack.run(toys.classify(model, tokens, labels), site, mask=[None, None])
    with pytest.raises(ValueError, match="say where the samples are"):
        attack.run(lambda: model(tokens).flatten(), site)
    with pytest.raises(TypeError, match="Site"):
        attack.run(toys.classify(model, tokens, labels), model.embedding)
    assert not site.busy


@pytest.mark.parametrize("random", [False, True])
def test_a_model_may_change_its_embeddings_in_place(random: bool) -> None:
    embedding = nn.Embedding(5, 3).double()
    tokens = torch.tensor([0, 1])

    def loss() -> torch.Tensor:
        return embedding(tokens).mul_(2).square().sum(1)

    result = eb.PGD(eps=1.0, steps=1, step_size=5.0, random_start=random).run(
        loss, eb.Site(embedding)
    )
    base = embedding(tokens).detach()
    assert torch.allclose(result.clean_losses, (2 * base).square().sum(1))
    assert torch.allclose(result.losses, (2 * (base + result.deltas[0])).square().sum(1))
    if not random:
        assert torch.allclose(result.deltas[0], base / base.norm(dim=1, keepdim=True))


class Chain(nn.Module):
    """Two places, the second computed from the first."""

    def __init__(self, in_place: bool = False) -> None:
        super().__init__()
        self.embedding, self.between = nn.Embedding(9, 4), nn.Linear(4, 4)
        self.head, self.in_place = nn.Linear(4, 1), in_place
        self.leaves: list[bool] = []

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        embedded = self.embedding(tokens)
        self.leaves.append(embedded.is_leaf)
        embedded = embedded.mul_(2.0) if self.in_place else embedded * 2.0
        return torch.tanh(self.head(torch.tanh(self.between(embedded)))).squeeze(-1).sum(-1)


@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize("layout", ["samples first", "time first", "joint", "token", "bfloat16"])
def test_gradients_at_leaves_are_those_at_the_deltas(
    layout: str, random: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = Chain()
    if layout == "bfloat16":
        model.bfloat16()
    tokens = torch.randint(0, 9, (5, 3))
    options = {"group": "token"} if layout == "token" else {}
    if layout == "time first":
        tokens, options = tokens.T, {"samples": 1}
    sites = [eb.Site(m, model=model, **options) for m in (model.embedding, model.between)]
    dim = 0 if layout == "time first" else -1

    def loss() -> torch.Tensor:
        out = torch.tanh(model.head(torch.tanh(model.between(model.embedding(tokens) * 2.0))))
        return out.squeeze(-1).sum(dim)

    def deltas() -> list[torch.Tensor]:
        torch.manual_seed(1)
        attack = eb.PGD(eps=0.5, steps=4, step_size=0.2, random_start=random)
        return attack.run(loss, sites, joint=layout == "joint", evaluate=False).deltas

    found = deltas()
    perturb = PerturbedSites.perturb
    seen: list[bool] = []

    def at_deltas(self: PerturbedSites, *, leaves: bool = False, **options: Any) -> None:
        seen.append(leaves)
        perturb(self, **options)

    monkeypatch.setattr(PerturbedSites, "perturb", at_deltas)
    for one, other in zip(found, deltas(), strict=True):
        assert torch.equal(one, other)
        assert one.abs().max() > 0
    assert seen[0]


def test_a_model_that_writes_into_its_embeddings_is_given_no_leaves() -> None:
    torch.manual_seed(0)
    models = [Chain(), Chain(in_place=True)]
    models[1].load_state_dict(models[0].state_dict())
    tokens = torch.randint(0, 9, (5, 3))
    attack = eb.PGD(eps=0.5, steps=4, step_size=0.2)
    one, other = (
        attack.run(partial(model, tokens), eb.Site(model.embedding, model=model)).delta
        for model in models
    )
    assert torch.equal(one, other)
    # Of the first pass and the evaluation there is no gradient at what the model is given.
    assert models[0].leaves[1:-1] == [True] * 3
    assert models[1].leaves[1:-1] == [True] + [False] * 3  # the pass that failed was made again


def test_tuple_outputs_keep_their_rest() -> None:
    class Pair(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, str]:
            return x * 2.0, "kept"

    module = Pair()
    seen: list[str] = []

    def loss() -> torch.Tensor:
        value, rest = module(torch.ones(3, 2))
        seen.append(rest)
        return value.square().sum(1)

    result = eb.FGM(eps=1.0).run(loss, eb.Site(module))
    assert torch.allclose(result.losses, torch.full((3,), (math.sqrt(8) + 1) ** 2))
    assert set(seen) == {"kept"}


def test_embeddings_are_looked_up_once_per_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tokens are not looked up again; a loss function that draws others is."""
    model = toys.encoder()
    tokens, labels = toys.text_batch()
    looked = 0
    plain = nn.Embedding.forward

    def counted(self: nn.Embedding, indices: torch.Tensor) -> torch.Tensor:
        nonlocal looked
        looked += 1
        return plain(self, indices)

    site = eb.Site(model.embedding)
    attack = eb.PGD(eps=0.5, steps=3)
    loss_fn = toys.classify(model, tokens, labels)
    expected = attack.run(toys.classify(model, tokens, labels), site)
    monkeypatch.setattr(nn.Embedding, "forward", counted)
    result = attack.run(loss_fn, site)
    assert looked == 1
    assert torch.equal(result.deltas[0], expected.deltas[0])
    assert "forward" not in model.embedding.__dict__
    attack.run(lambda: eb.losses.cross_entropy(model(tokens.clone()), labels), site)
    assert looked == 1 + 4  # another tensor each time: only its values are the same
    objective = eb.AdversarialObjective(attack, site)
    looked = 0
    objective(loss_fn)[0].backward()
    assert looked == 1
    kept = tokens.clone()
    tokens.add_(0)  # written: it may hold other tokens now
    attack.run(loss_fn, site)
    assert looked == 2
    assert torch.equal(tokens, kept)


def test_a_changing_batch_is_refused() -> None:
    embedding = nn.Embedding(9, 2).double()
    site = eb.Site(embedding)
    draws = iter(torch.tensor([[0, 1], [2, 3], [4, 5]]))
    with pytest.raises(RuntimeError, match="other inputs"):
        eb.PGD(eps=0.1, steps=2).run(lambda: embedding(next(draws)).square().sum(1), site)
    assert not site.busy


def test_jagged_batches_have_a_ball_per_sample() -> None:
    torch.manual_seed(0)
    embedding, head = nn.Embedding(30, 5).double(), nn.Linear(5, 1).double()
    parts = [torch.randint(0, 30, (n,)) for n in (2, 4, 3)]
    jagged = torch.nested.nested_tensor(parts, layout=torch.jagged)

    def loss() -> torch.Tensor:
        hidden = embedding(jagged).tanh()
        return head(torch.stack([one.mean(0) for one in hidden.unbind()])).squeeze(-1)

    for attack in (
        eb.PGD(eps=0.4, steps=3),
        eb.PGD(eps=0.4, steps=2, random_start=True, keep="best"),
    ):
        result = attack.run(loss, eb.Site(embedding))
        assert result.deltas[0].shape == (9, 5)
        assert result.norms[0].shape == (3,)
        assert torch.all(result.losses > result.clean_losses)
        with result.applied():
            assert torch.allclose(loss(), result.losses)
    zero = eb.PGD(eps=0.4, steps=3)
    jointly = zero.run(loss, eb.Site(embedding)).deltas[0].split([2, 4, 3])
    for part, delta in zip(parts, jointly, strict=True):
        alone = zero.run(
            lambda part=part: head(embedding(part[None]).tanh().mean(1)).squeeze(-1),
            eb.Site(embedding),
        )
        assert torch.allclose(alone.deltas[0][0], delta)
    objective = eb.AdversarialObjective(zero, eb.Site(embedding))
    objective(loss)[0].backward()
    assert torch.all(embedding.weight.grad[torch.cat(parts)].norm(dim=1) > 0)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("random", [False, True])
def test_a_checkpoint_around_the_site_is_refused(reentrant: bool, random: bool) -> None:
    """It would run the embedding again in the backward pass, when nothing perturbs it."""
    from torch.utils.checkpoint import checkpoint

    model = toys.encoder()
    tokens, _ = toys.text_batch()
    site = eb.Site(model.embedding)
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)

    def loss() -> torch.Tensor:
        def part(scale: torch.Tensor) -> torch.Tensor:
            return model(tokens) * scale

        return checkpoint(part, weight, use_reentrant=reentrant).square().sum(1)

    with pytest.raises(RuntimeError, match="checkpoint"):
        eb.PGD(eps=0.1, steps=2, random_start=random).run(loss, site)
    assert not site.busy
    with torch.no_grad():
        loss()  # a resting site minds nothing
    loss().sum().backward()


def test_projections_of_dense_features_and_bags() -> None:
    torch.manual_seed(0)
    dense, bag, head = nn.Linear(4, 3), nn.EmbeddingBag(10, 3), nn.Linear(6, 1)
    features, tokens = torch.randn(5, 4), torch.randint(0, 10, (5, 4))

    def loss() -> torch.Tensor:
        both = torch.cat([dense(features), bag(tokens)], 1)
        return head(both.tanh()).squeeze(-1).square()

    sites = [eb.Site(dense), eb.Site(bag)]
    for joint in (False, True):
        result = eb.PGD(eps=0.3, steps=3, keep="best").run(loss, sites, joint=joint)
        assert torch.all(result.losses >= result.clean_losses)
        assert torch.any(result.losses > result.clean_losses)
    module = nn.ModuleList([dense, bag, head])
    grads = []
    for early in (False, True):
        module.zero_grad()
        objective = eb.AdversarialObjective(eb.PGD(eps=0.3, steps=2), sites, early_backward=early)
        objective(loss)[0].backward()
        grads.append([p.grad.clone() for p in module.parameters()])
    for one, other in zip(*grads, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


class Reads(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts what would wait for the device: values read back, sizes that depend on them."""

    names = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__
        if name in self.names:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("attack", "seeds"),
    [
        (eb.PGD(eps=eb.Relative(0.3), steps=3, keep="best"), 0),
        (eb.PGD(eps=0.3, steps=2, norm="linf", random_start=True, restarts=2), 1),
        (eb.MIFGSM(eps=0.3, steps=2), 0),
        (eb.APGD(eps=0.3, steps=7), 1),
    ],
)
def test_nothing_waits_for_the_device_until_it_is_read(attack: eb.PGD, seeds: int) -> None:
    """A random start reads its seed, from a generator of the CPU; eps in mean norms is read where
    the embeddings are on the CPU themselves."""
    model = toys.encoder()
    tokens, labels = toys.text_batch()
    seeds += isinstance(attack.eps, eb.Relative) and tokens.is_cpu
    loss_fn = toys.classify(model, tokens, labels)
    site = eb.Site(model.embedding, group="token")
    with Reads() as reads:
        result = attack.run(loss_fn, site, mask=tokens != 0, evaluate=False)
        assert reads.found == ["_local_scalar_dense"] * seeds
        objective = eb.AdversarialObjective(attack, site)
        objective(loss_fn, mask=tokens != 0)
        assert reads.found == ["_local_scalar_dense"] * 2 * seeds
        float(result.deltas[0].sum())
    assert len(reads.found) == 2 * seeds + 1


def test_weights_are_frozen_in_passes_for_the_delta_only() -> None:
    model = toys.encoder()
    model.head.bias.requires_grad_(False)
    tokens, labels = toys.text_batch()
    flags: list[bool] = []

    def loss() -> torch.Tensor:
        flags.append(model.head.weight.requires_grad)
        return eb.losses.cross_entropy(model(tokens), labels)

    site = eb.Site(model.embedding, model=model)
    objective = eb.AdversarialObjective(eb.PGD(eps=0.3, steps=3), site)
    objective(loss)[0].backward()
    assert flags == [True, False, False, True]
    assert model.head.weight.requires_grad
    assert not model.head.bias.requires_grad
