"""Sites, strengths, and what an attack leaves behind."""

from __future__ import annotations

import copy
import itertools
import math

import embattle as eb
import pytest
import torch
import toys
from torch import nn


def test_a_resting_site_changes_nothing() -> None:
    model = toys.encoder()
    tokens, _ = toys.text_batch()
    before = model(tokens)
    with eb.Site(model.embedding) as site:
        assert torch.equal(model(tokens), before)
        assert not site.busy
    assert not model.embedding._forward_hooks


def test_site_takes_a_hugging_face_models_input_embeddings() -> None:
    class Fake(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Embedding(3, 2)

        def get_input_embeddings(self) -> nn.Module:
            return self.inner

    model = Fake()
    site = eb.Site(model)
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
        perturbed = loss()[0]
        again = loss()[0]
    assert torch.equal(perturbed, again)
    assert torch.allclose(perturbed, result.losses)
    assert torch.allclose(loss()[0], result.clean_losses)
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
    assert not any(torch.equal(one, seen[0]) for one in seen[1:])


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
    with pytest.raises(ValueError, match="2 masks"):
        attack.run(toys.classify(model, tokens, labels), site, mask=[None, None])
    with pytest.raises(ValueError, match="samples must come first"):
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
