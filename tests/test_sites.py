"""A site says what is perturbed: which calls, whose samples, which vectors; and nothing else is."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
from collections.abc import Callable
from typing import Any

import embattle as eb
import pytest
import torch
import torch.nn.functional as F
import toys
from embattle import Evaluation
from torch import Tensor, nn


class Pairs(nn.Module):
    """Two texts through one encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 4).double()

    def encode(self, tokens: Tensor) -> Tensor:
        return self.embedding(tokens).tanh().mean(1)

    def forward(self, one: Tensor, two: Tensor) -> Tensor:
        return (self.encode(one) - self.encode(two)).square().sum(1)


def pairs(length: int = 5) -> tuple[Pairs, Tensor, Tensor, eb.Site]:
    torch.manual_seed(0)
    model = Pairs()
    one, two = torch.randint(0, 20, (3, length)), torch.randint(0, 20, (3, 5))
    return model, one, two, eb.Site(model.embedding)


# --- masks belong to calls ------------------------------------------------------------------------


def test_one_mask_for_two_calls_is_refused() -> None:
    model, one, two, site = pairs()
    mask = torch.rand(one.shape) < 0.5
    with pytest.raises(ValueError, match=r"mask: one tensor .* called 2 times .* each call"):
        eb.FGM(eps=1.0).run(lambda: model(one, two), site, mask=mask)
    with pytest.raises(ValueError, match="mask: 3 entries were given for the 2 calls"):
        eb.FGM(eps=1.0).run(lambda: model(one, two), site, mask=[mask, mask, mask])


@pytest.mark.parametrize("scope", ["output", "row"])
def test_each_call_has_its_own_mask(scope: str) -> None:
    model, one, two, _ = pairs()
    masks = [torch.rand(one.shape) < 0.5, torch.rand(two.shape) < 0.5]
    site = eb.Site(model.embedding, scope=scope)  # type: ignore[arg-type]

    def by_call(call: Any) -> Tensor:
        return masks[0] if call.args[0] is one else masks[1]

    for given in (masks, by_call):
        result = eb.PGD(eps=1.0, steps=2).run(lambda: model(one, two), site, mask=given)
        if scope == "output":
            for delta, mask in zip(result.deltas, masks, strict=True):
                assert torch.all(delta[~mask] == 0)
                assert torch.all(delta[mask].norm(dim=1) > 0)
        else:
            rows = torch.cat([one[masks[0]], two[masks[1]]]).unique()
            assert result.delta.shape == (len(rows), 4)
    always = eb.Site(model.embedding, mask=by_call)
    again = eb.PGD(eps=1.0, steps=2).run(lambda: model(one, two), always)
    assert torch.all(again.deltas[0][~masks[0]] == 0)


def test_padding_never_moves_though_no_mask_is_given() -> None:
    model = toys.encoder()
    tokens, labels = toys.text_batch()
    for attack in (
        eb.PGD(eps=1.0, steps=2, random_start=True),
        eb.UniformNoise(eps=1.0),
        eb.MIFGSM(eps=1.0, steps=2),
        eb.VAT(eps=1.0),
        eb.SMARTStep(projection="code"),
    ):
        result = attack.run(toys.classify(model, tokens, labels), eb.Site(model.embedding))
        assert torch.all(result.delta[tokens == 0] == 0), attack
        assert torch.all(result.delta[tokens != 0].norm(dim=1) > 0), attack


def test_padding_is_known_of_look_ups_alone() -> None:
    """An embedding that pools gives no vector for each index: nothing of it is padding."""

    class Pooled(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).mean(1)

    torch.manual_seed(0)
    table, tokens = Pooled(9, 4, padding_idx=0), torch.tensor([[0, 3], [0, 0], [1, 0]])
    result = eb.FGM(eps=0.5).run(lambda: table(tokens).exp().sum(1), eb.Site(table))
    torch.testing.assert_close(result.norms[0], torch.full((3,), 0.5))


def test_a_tensor_is_not_given_to_a_site_and_a_float_mask_not_to_a_run() -> None:
    model, one, two, site = pairs()
    with pytest.raises(TypeError, match=r"Site: mask must be a function.*run\(..., mask=...\)"):
        eb.Site(model.embedding, mask=torch.ones(2, dtype=torch.bool))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"mask must be of dtype bool, got torch.float32"):
        eb.FGM(eps=1.0).run(lambda: model(one, two), site, mask=lambda call: torch.ones(3, 5))
    with pytest.raises(ValueError, match=r"mask has shape \(3, 4\).*need \(3, 5\)"):
        eb.FGM(eps=1.0).run(
            lambda: model(one, two), site, mask=lambda call: torch.ones(3, 4).bool()
        )


# --- whose samples --------------------------------------------------------------------------------


class TimeFirst(nn.Module):
    """Embeddings `[T, B, D]`; the losses look at all times, or at one alone."""

    def __init__(self, time: int | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 4).double()
        self.head = nn.Linear(4, 3).double()
        self.time = time

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens).tanh()
        return self.head(hidden.mean(0) if self.time is None else hidden[self.time])


@pytest.mark.parametrize("time", [None, 0, 1, -1])
@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("joint", [False, True])
def test_time_first_is_noticed_where_sizes_coincide(
    time: int | None, start: bool, joint: bool
) -> None:
    torch.manual_seed(0)
    model, tokens = TimeFirst(time), torch.randint(0, 30, (6, 6))
    labels = torch.randint(0, 3, (6,))

    def loss() -> Tensor:
        return F.cross_entropy(model(tokens), labels, reduction="none")

    attack = eb.PGD(eps=0.5, steps=2, random_start=start)
    with pytest.raises(ValueError, match=r"are in dim 1.*Site\(..., samples=1\)"):
        attack.run(loss, eb.Site(model.embedding), joint=joint)
    result = attack.run(loss, eb.Site(model.embedding, samples=1), joint=joint)
    first = nn.Embedding.from_pretrained(model.embedding.weight.detach())

    def other() -> Tensor:
        hidden = first(tokens.T).tanh()
        hidden = hidden.mean(1) if time is None else hidden[:, time]
        return F.cross_entropy(model.head(hidden), labels, reduction="none")

    if not start:
        expected = attack.run(other, eb.Site(first), joint=joint)
        torch.testing.assert_close(result.delta, expected.delta)
        torch.testing.assert_close(result.losses, expected.losses)


@pytest.mark.parametrize("evaluate", [False, True])
@pytest.mark.parametrize(
    "attack",
    [
        eb.UniformNoise(eps=0.5),
        eb.Square(eps=0.5, steps=2),
        eb.PGD(eps=0.5, steps=0),
    ],
)
def test_attacks_without_a_gradient_notice_wrong_sites(attack: eb.Attack, evaluate: bool) -> None:
    torch.manual_seed(0)
    model, tokens = TimeFirst(), torch.randint(0, 30, (6, 6))
    passes = []

    def loss() -> Tensor:
        passes.append(1)
        return model(tokens).square().sum(1)

    with pytest.raises(ValueError, match=r"are in dim 1.*Site\(..., samples=1\)"):
        attack.run(loss, eb.Site(model.embedding), evaluate=evaluate)
    table = model.embedding
    site = eb.Site(table, scope="row")
    with pytest.raises(RuntimeError, match=r"reads the table in another way.*Site.weight"):
        attack.run(lambda: loss() + table.weight.sum(), site, evaluate=evaluate)
    # Of a right site the same shape is looked at once, in one pass more.
    passes.clear()
    attack.run(loss, site, evaluate=evaluate)
    first = len(passes)
    attack.run(loss, site, evaluate=evaluate)
    assert len(passes) == 2 * first - 1
    rounded = eb.Site(table)
    attack.run(lambda: loss().round().detach(), rounded, evaluate=evaluate)  # shows nothing


def test_a_layout_is_looked_at_once() -> None:
    torch.manual_seed(0)
    table, tokens = nn.Embedding(30, 4).double(), torch.randint(0, 30, (6, 6))
    site = eb.Site(table)
    eb.PGD(eps=0.5, steps=2).run(lambda: table(tokens).tanh().sum((1, 2)), site)
    assert site.known_shapes == {torch.Size([6, 6, 4])}


def test_other_sizes_say_what_to_do() -> None:
    model, tokens = TimeFirst(), torch.randint(0, 30, (4, 6))
    with pytest.raises(ValueError, match=r"6 losses for embeddings \(4, 6, 4\).*samples=1"):
        eb.FGM(eps=0.5).run(lambda: model(tokens).sum(1), eb.Site(model.embedding))
    with pytest.raises(ValueError, match="samples=5 names no dim"):
        eb.FGM(eps=0.5).run(lambda: model(tokens).sum(1), eb.Site(model.embedding, samples=5))


def test_negatives_that_all_samples_share() -> None:
    torch.manual_seed(0)
    user, item = nn.Embedding(9, 4).double(), nn.Embedding(20, 4).double()
    users, positive, shared = torch.arange(5), torch.arange(5), torch.arange(6, 13)

    def loss() -> Tensor:
        u = user(users)
        scores = torch.cat([(u * item(positive)).sum(1, keepdim=True), u @ item(shared).T], 1)
        return F.cross_entropy(scores, torch.zeros(5, dtype=torch.long), reduction="none")

    with pytest.raises(ValueError, match=r"5 losses for embeddings \(7, 4\).*samples=None"):
        eb.FGM(eps=0.5).run(loss, eb.Site(item))
    site = eb.Site(item, samples=lambda call: 0 if call.args[0] is positive else None)
    result = eb.PGD(eps=0.5, steps=3, keep="best").run(loss, site)
    assert [tuple(delta.shape) for delta in result.deltas] == [(5, 4), (7, 4)]
    assert torch.all(result.norms[1] <= 0.5 + 1e-12)
    torch.testing.assert_close(result.evaluate(loss).losses, result.losses)
    assert result.losses.sum() > result.clean_losses.sum()


@pytest.mark.parametrize("start", [False, True])
def test_several_entries_of_one_sample(start: bool) -> None:
    """Multiple choice: `[B * K, T]`, one loss for K texts, one ball for them together."""
    torch.manual_seed(0)
    model = toys.Encoder(classes=1).double()
    tokens = torch.randint(1, 40, (4 * 3, 5))
    labels = torch.tensor([0, 2, 1, 1])

    def loss() -> Tensor:
        return F.cross_entropy(model(tokens).reshape(4, 3), labels, reduction="none")

    for each in (3, lambda call: call.value.shape[0] // 4):
        site = eb.Site(model.embedding, per_sample=each)
        result = eb.PGD(eps=0.5, steps=3, random_start=start).run(loss, site)
        assert result.delta.shape == (4, 3, 5, 8)
        assert torch.all(result.delta.flatten(1).norm(dim=1) <= 0.5 + 1e-12)
        torch.testing.assert_close(result.evaluate(loss).losses, result.losses)
    with pytest.raises(ValueError, match="per_sample=5 does not divide the 12"):
        eb.FGM(eps=0.5).run(loss, eb.Site(model.embedding, per_sample=5))


# --- what a site is on ----------------------------------------------------------------------------


def test_outputs_in_dicts_and_tuples() -> None:
    torch.manual_seed(0)

    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Embedding(9, 3).double(), nn.Embedding(9, 2).double()

        def forward(self, x: Tensor) -> dict[str, Any]:
            return {"a": self.a(x), "count": x.sum(), "b": self.b(x)}

    features, x = Features(), torch.randint(0, 9, (4, 2))

    def loss() -> Tensor:
        found = features(x)
        return found["a"].sin().sum((1, 2)) + found["b"].cos().sum((1, 2))

    both = eb.PGD(eps=0.5, steps=2).run(loss, eb.Site(features))
    assert [tuple(d.shape) for d in both.deltas] == [(4, 2, 3), (4, 2, 2)]
    torch.testing.assert_close(both.evaluate(loss).losses, both.losses)
    one = eb.PGD(eps=0.5, steps=2).run(loss, eb.Site(features, key="b"))
    assert torch.equal(one.delta, both.deltas[1])
    with pytest.raises(KeyError, match="a dict of 'a', 'count', 'b', without 'c'"):
        eb.FGM(eps=0.5).run(loss, eb.Site(features, key="c"))

    lstm = nn.LSTM(3, 3, batch_first=True).double()
    second = eb.Site.output(lstm, key=0)
    result = eb.FGM(eps=0.5).run(lambda: lstm(features.a(x))[0].sum((1, 2)), second)
    assert result.delta.shape == (4, 2, 3)


def test_look_ups_of_an_encoder_decoder_are_found() -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config).eval()
    ids, labels = torch.randint(1, 40, (3, 6)), torch.randint(1, 40, (3, 4))

    def loss() -> Tensor:
        logits = model(input_ids=ids, labels=labels).logits
        return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").mean(1)

    site = eb.Site.embeddings(model)
    result = eb.PGD(eps=1.0, steps=3).run(loss, site)
    assert [tuple(d.shape) for d in result.deltas] == [(3, 6, 16), (3, 4, 16)]
    assert torch.all(result.losses > result.clean_losses)
    with pytest.raises(RuntimeError, match=r"Site.embeddings"):
        eb.FGM(eps=1.0).run(loss, eb.Site(nn.Embedding(3, 4)))


def test_a_whole_model_is_no_site() -> None:
    with pytest.raises(TypeError, match=r"Site.embeddings\(model\).*Site.output"):
        eb.Site(toys.tiny_bert())


def test_embeddings_of_a_plain_model_are_all_its_look_ups() -> None:
    model = toys.factors()
    result = eb.FGM(eps=0.5).run(toys.rank(model, toys.triplets()), eb.Site.embeddings(model))
    assert len(result.deltas) == 3
    with pytest.raises(ValueError, match=r"has no nn.Embedding"):
        eb.Site.embeddings(nn.Linear(2, 2))


class TiedSoftmax(nn.Module):
    """Next-item scores with the same table that is looked up."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 5, padding_idx=0).double()
        self.out = nn.Linear(5, 12, bias=False).double()
        self.out.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.table(x).tanh().mean(1))


@pytest.mark.parametrize("group", ["row", "table"])
@pytest.mark.parametrize("start", [False, True])
def test_a_table_is_perturbed_wherever_it_is_used(group: str, start: bool) -> None:
    torch.manual_seed(0)
    model = TiedSoftmax()
    x, y = torch.randint(1, 12, (6, 3)), torch.randint(1, 12, (6,))

    def loss() -> Tensor:
        return F.cross_entropy(model(x), y, reduction="none")

    site = eb.Site.weight(model.table, model=model, group=group)  # type: ignore[arg-type]
    before = model.table.weight.detach().clone()
    attack = eb.PGD(eps=0.7, step_size=0.3, steps=4, random_start=start)
    result = attack.run(loss, site)
    assert torch.equal(model.table.weight, before)
    assert type(model.table._parameters) is dict
    delta = result.delta.reshape(12, 5)
    assert torch.all(delta[0] == 0), "the padding row stays"
    with torch.no_grad():
        model.table.weight += delta
        torch.testing.assert_close(loss(), result.losses)
        model.table.weight.copy_(before)
    if not start:  # one step is the table's own gradient
        once = eb.FGM(eps=0.7).run(loss, site, evaluate=False)
        (grad,) = torch.autograd.grad(loss().sum(), model.table.weight)
        grad[0] = 0
        norm = grad.norm(dim=1, keepdim=True) if group == "row" else grad.norm()
        expected = torch.where(norm > 0, 0.7 * grad / norm, 0.0)
        torch.testing.assert_close(once.delta.reshape(12, 5), expected)
    else:  # without an evaluation the first pass is perturbed already
        found = eb.FGM(eps=0.7, random_start=True).run(loss, site, evaluate=False).delta
        norms = found.reshape(12, 5).norm(dim=1) if group == "row" else found.norm()
        assert torch.all(norms <= 0.7 + 1e-6)
        assert torch.count_nonzero(norms) >= (11 if group == "row" else 1)


def test_the_graphs_of_earlier_passes_are_let_go() -> None:
    from embattle.perturb.attacked_batch import AttackedBatch

    torch.manual_seed(0)
    model, x = TiedSoftmax(), torch.randint(1, 12, (6, 3))
    batch = AttackedBatch(lambda: model(x).logsumexp(1), eb.Site.weight(model.table, model=model))
    with batch.attacking():
        batch.record(attach=True)
        sizes = []
        for _ in range(3):
            batch.evaluate(grad=True)
            sizes.append(len(batch.perturbed.nodes))
    assert sizes[0] == sizes[2]


def test_a_table_that_is_also_read_directly_is_refused_by_rows() -> None:
    torch.manual_seed(0)
    model = TiedSoftmax()
    x, y = torch.randint(1, 12, (6, 3)), torch.randint(1, 12, (6,))

    def loss() -> Tensor:
        return F.cross_entropy(model(x), y, reduction="none")

    for frozen in (False, True):
        model.requires_grad_(not frozen)
        for attack in (eb.FGM(eps=0.5), eb.PGD(eps=0.5, steps=2, random_start=True)):
            with pytest.raises(RuntimeError, match=r"reads the table in another way.*Site.weight"):
                attack.run(loss, eb.Site(model.table, scope="row"))
            with pytest.raises(RuntimeError, match=r"another way.*model=model"):
                attack.run(loss, eb.Site.weight(model.table))
        assert model.table.weight.requires_grad is not frozen


def test_rows_of_a_table_that_two_modules_look_up() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Embedding(9, 4), "b": nn.Embedding(9, 4)}).double()
    model["b"].weight = model["a"].weight
    x, y = torch.randint(0, 9, (5,)), torch.randint(0, 9, (5,))

    def loss() -> Tensor:
        return (model["a"](x) * model["b"](y).sin()).sum(1)

    with pytest.raises(RuntimeError, match=r"another way.*Site\(..., model=model\)"):
        eb.FGM(eps=0.5).run(loss, eb.Site(model["a"], scope="row"))
    result = eb.FGM(eps=0.5).run(loss, eb.Site(model["a"], scope="row", model=model))
    rows = torch.cat([x, y]).unique()
    assert result.delta.shape == (len(rows), 4)
    with torch.no_grad():
        model["a"].weight[rows] += result.delta
        torch.testing.assert_close(loss(), result.losses)


def test_propagation_reads_its_tables_directly() -> None:
    """LightGCN: look-ups serve the penalty alone; the scores come from propagated tables."""
    torch.manual_seed(0)
    user, item = nn.Embedding(6, 4).double(), nn.Embedding(6, 4).double()
    graph = torch.rand(6, 6, dtype=torch.float64)
    users, positive, negative = torch.randint(0, 6, (3, 8))

    def loss() -> Tensor:
        u, i = graph @ item.weight, graph.T @ user.weight
        return F.softplus((u[users] * (i[negative] - i[positive])).sum(1))

    def with_penalty() -> Tensor:
        with torch.no_grad():
            penalty = user(users).square().sum(1)
        return loss() + penalty

    with pytest.raises(RuntimeError, match=r"do not depend on what it perturbs.*Site.weight"):
        eb.FGM(eps=0.5).run(with_penalty, eb.Site(user))
    result = eb.PGD(eps=0.5, steps=3).run(loss, [eb.Site.weight(user), eb.Site.weight(item)])
    assert torch.all(result.losses.mean() > result.clean_losses.mean())
    with torch.no_grad():
        user.weight += result.deltas[0]
        item.weight += result.deltas[1]
        torch.testing.assert_close(loss(), result.losses)


def test_weight_sites_train_their_parameter() -> None:
    """APR on full-softmax scores: both passes reach the table."""
    torch.manual_seed(0)
    model = TiedSoftmax()
    x, y = torch.randint(1, 12, (6, 3)), torch.randint(1, 12, (6,))

    def loss() -> Tensor:
        return F.cross_entropy(model(x), y, reduction="none")

    site = eb.Site.weight(model.table, model=model)
    for early in (True, False):
        objective = eb.AdversarialObjective(eb.FGM(eps=0.5), site, early_backward=early)
        model.zero_grad()
        total, _ = objective(loss)
        total.backward()
        got = model.table.weight.grad.clone()
        delta = eb.FGM(eps=0.5).run(loss, site).delta
        model.zero_grad()
        loss().mean().backward()
        with torch.no_grad():
            model.table.weight += delta
        loss().mean().backward()
        with torch.no_grad():
            model.table.weight -= delta
        torch.testing.assert_close(got, model.table.weight.grad)


@pytest.mark.parametrize("detached", ["output", "loss"])
def test_a_site_that_the_loss_does_not_depend_on_is_refused(detached: str) -> None:
    model = toys.factors()
    users, positive, negative = toys.triplets()

    def loss() -> Tensor:
        u = model.user(users).detach() if detached == "output" else model.user(users)
        p, n = model.item(positive), model.item(negative)
        value = F.softplus((u * (n - p)).sum(1))
        return value.detach() if detached == "loss" else value

    words = "do not depend on"
    for attack in (eb.FGM(eps=0.5), eb.PGD(eps=0.5, random_start=True)):
        with pytest.raises(RuntimeError, match=words):
            attack.run(loss, [eb.Site(model.item), eb.Site(model.user)])
        for form in ("mixed", "free", "adversarial"):
            objective = eb.AdversarialObjective(attack, eb.Site(model.user), form=form)
            with pytest.raises(RuntimeError, match=words):
                objective(loss)


@pytest.mark.parametrize(
    "module", [nn.Embedding(9, 4, max_norm=0.5), toys.encoder().embedding.__class__(9, 4)]
)
def test_rows_of_look_ups_that_are_not_plain(module: nn.Module) -> None:
    class Scaled(nn.Embedding):
        def forward(self, x: Tensor) -> Tensor:
            return 3 * super().forward(x)

    for one in (Scaled(9, 4), nn.Embedding(9, 4, max_norm=0.5)):
        with pytest.raises(TypeError, match=r"may scale or renormalise.*Site.weight"):
            eb.Site(one, scope="row")
    scaled = Scaled(9, 4).double()
    x = torch.randint(0, 9, (5, 2))

    def loss() -> Tensor:
        return scaled(x).sin().sum((1, 2))

    result = eb.FGM(eps=0.3).run(loss, eb.Site.weight(scaled))
    with torch.no_grad():
        scaled.weight += result.delta
        torch.testing.assert_close(loss(), result.losses)


# --- applied(): the attacked batch, and nothing else ----------------------------------------------


def test_applied_nests() -> None:
    model, one, two, site = pairs()

    def loss() -> Tensor:
        return model(one, two)

    outer = eb.PGD(eps=0.5, steps=2).run(loss, site)
    inner = eb.PGD(eps=2.0, steps=2).run(loss, site)
    with outer.applied():
        with inner.applied():
            torch.testing.assert_close(loss(), inner.losses)
            with outer.applied():
                torch.testing.assert_close(loss(), outer.losses)
            torch.testing.assert_close(loss(), inner.losses)
        torch.testing.assert_close(loss(), outer.losses)
    torch.testing.assert_close(loss(), outer.clean_losses)


def test_weight_sites_nest_too() -> None:
    model = TiedSoftmax()
    x = torch.randint(1, 12, (4, 3))

    def loss() -> Tensor:
        return model(x).logsumexp(1)

    site = eb.Site.weight(model.table, model=model)
    outer, inner = (eb.PGD(eps=e, steps=2).run(loss, site) for e in (0.3, 1.0))
    with outer.applied():
        with inner.applied():
            torch.testing.assert_close(loss(), inner.losses)
        torch.testing.assert_close(loss(), outer.losses)
    torch.testing.assert_close(loss(), outer.clean_losses)


@pytest.mark.parametrize("other", ["indices", "length", "batch"])
def test_another_batch_is_refused_inside_applied(other: str) -> None:
    model = toys.encoder()
    tokens, labels = toys.text_batch()
    loss = toys.classify(model, tokens, labels)
    result = eb.FGM(eps=0.5).run(loss, eb.Site(model.embedding))
    changed = {
        "indices": torch.where(tokens > 0, tokens % 39 + 1, 0),
        "length": tokens[:, :4],
        "batch": tokens[:2],
    }[other]
    with result.applied():
        with pytest.raises(RuntimeError, match=r"other inputs than those of the attacked batch"):
            model(changed)
        torch.testing.assert_close(model(tokens.clone()), result_outputs(loss))


def result_outputs(loss: Callable[[], Any]) -> Tensor:
    return loss().outputs


def test_generation_is_refused_inside_applied() -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=30, n_positions=32, n_embd=16, n_layer=1, n_head=2, bos_token_id=1,
        eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.randint(3, 30, (2, 5))

    def loss() -> Tensor:
        return model(ids).logits.logsumexp(-1).mean(1)

    result = eb.FGM(eps=0.5).run(loss, eb.Site.embeddings(model))
    with result.applied(), pytest.raises(RuntimeError, match="generate"):
        model.generate(ids, max_new_tokens=3, do_sample=False)
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > 5


def test_a_call_more_and_a_pass_that_raised_shift_nothing() -> None:
    model, one, two, site = pairs()

    def loss() -> Tensor:
        return model(one, two)

    result = eb.PGD(eps=0.5, steps=2).run(loss, site)
    with result.applied():
        model.encode(one)  # a call more
        torch.testing.assert_close(loss(), result.losses)
        model.embedding(one)  # as far as a pass came that raised
        torch.testing.assert_close(loss(), result.losses)
    same = torch.randint(0, 20, (3, 5))
    result = eb.PGD(eps=0.5, steps=2).run(lambda: model(same, same).sqrt() + model(same, one), site)
    words = "run in part, or its modules once more"
    with pytest.raises(RuntimeError, match=words), result.applied():
        model.encode(same)


def test_a_loss_function_that_changes_its_calls_is_refused() -> None:
    model, one, two, site = pairs()
    calls = 0

    def loss() -> Tensor:
        nonlocal calls
        calls += 1
        value = model(one, two)
        return value + model.encode(one).sum(1) if calls > 1 else value

    with pytest.raises(
        RuntimeError, match=r"in another number than in the pass before|other inputs"
    ):
        eb.PGD(eps=0.5, steps=3).run(loss, site)


def test_negatives_that_are_drawn_anew_in_each_pass_are_refused() -> None:
    model = toys.factors()
    users, positive, _ = toys.triplets()

    def loss() -> Tensor:
        p, n = model(users, positive, torch.randint(0, 20, (9,)))
        return F.softplus(n - p)

    with pytest.raises(RuntimeError, match="draw negatives before it, or use mode='same'"):
        eb.PGD(eps=0.5, steps=3).run(loss, eb.Site(model.item))
    result = eb.PGD(eps=0.5, steps=3, mode="same").run(loss, eb.Site(model.item))
    assert torch.all(result.losses >= result.clean_losses)


@pytest.mark.parametrize("kind", ["output", "weight"])
def test_another_thread_stays_unperturbed(kind: str) -> None:
    model = toys.encoder()
    tokens, labels = toys.text_batch()
    loss = toys.classify(model, tokens, labels)
    site = eb.Site(model.embedding) if kind == "output" else eb.Site.weight(model.embedding)
    clean = model(tokens).detach()
    seen: list[Tensor] = []

    def elsewhere() -> None:
        thread = threading.Thread(target=lambda: seen.append(model(tokens).detach()))
        thread.start()
        thread.join()

    def watched() -> Any:
        elsewhere()
        return loss()

    result = eb.PGD(eps=0.9, steps=2).run(watched, site)
    with result.applied():
        elsewhere()
        assert not torch.allclose(model(tokens), clean)
    assert len(seen) == 4
    for one in seen:
        torch.testing.assert_close(one, clean)


def test_a_copy_of_the_model_stays_unperturbed() -> None:
    model = toys.encoder()
    tokens, labels = toys.text_batch()
    clean = model(tokens).detach()
    copies: list[nn.Module] = []
    loss = toys.classify(model, tokens, labels)

    def watched() -> Any:
        copies.append(copy.deepcopy(model))
        torch.testing.assert_close(copies[-1](tokens), clean)
        return loss()

    for site in (eb.Site(model.embedding), eb.Site.weight(model.embedding)):
        result = eb.PGD(eps=0.9, steps=2).run(watched, site)
        with result.applied():
            torch.testing.assert_close(copy.deepcopy(model)(tokens), clean)
    torch.testing.assert_close(copies[1](tokens), clean)
    read = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(read(tokens), clean)


def test_a_copied_site_belongs_to_the_copied_model() -> None:
    model = toys.encoder()
    tokens, labels = toys.text_batch()
    other, site = copy.deepcopy((model, eb.Site(model.embedding)))
    result = eb.FGM(eps=0.5).run(toys.classify(other, tokens, labels), site)
    assert torch.all(result.losses > result.clean_losses)


def test_replicas_are_refused() -> None:
    model = toys.encoder()
    tokens, labels = toys.text_batch()
    replica = model._replicate_for_data_parallel()
    replica.embedding = model.embedding._replicate_for_data_parallel()
    replica.embedding.weight = model.embedding.weight
    with pytest.raises(RuntimeError, match="DataParallel is not supported"):
        eb.FGM(eps=0.5).run(toys.classify(replica, tokens, labels), eb.Site(model.embedding))


def test_a_site_for_each_batch_leaves_no_hooks() -> None:
    model = toys.encoder()
    tokens, labels = toys.text_batch()
    for _ in range(5):
        eb.FGM(eps=0.5).run(toys.classify(model, tokens, labels), eb.Site(model.embedding))
    gc.collect()
    assert not model.embedding._forward_hooks


@pytest.mark.parametrize("reentrant", [True, False])
def test_reentrant_checkpoints_say_so(reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(0)
    table, head = nn.Embedding(9, 4).double(), nn.Linear(4, 3).double()
    x = torch.randint(0, 9, (5,))

    def behind() -> Tensor:
        hidden = checkpoint(lambda h: head(h).tanh(), table(x), use_reentrant=reentrant)
        return hidden.logsumexp(1)

    def around() -> Tensor:
        one = torch.ones(1, dtype=torch.float64, requires_grad=True)
        return checkpoint(lambda o: o * head(table(x)), one, use_reentrant=reentrant).logsumexp(1)

    for attack in (eb.FGM(eps=0.5), eb.PGD(eps=0.5, steps=2, random_start=True)):
        if reentrant:
            with pytest.raises(RuntimeError, match=r"use_reentrant=False"):
                attack.run(behind, eb.Site(table))
        else:
            assert torch.all(attack.run(behind, eb.Site(table)).losses > behind() - 1e-9)
        with pytest.raises(RuntimeError, match="inside a gradient checkpoint"):
            attack.run(around, eb.Site(table))


def test_empty_batches() -> None:
    model = toys.encoder()
    tokens, labels = torch.zeros(0, 7, dtype=torch.long), torch.zeros(0, dtype=torch.long)
    table = model.embedding

    def loss() -> Evaluation:
        hidden = table(tokens).mean(1)
        logits = model.head(hidden)
        return Evaluation(F.cross_entropy(logits, labels, reduction="none"), logits)

    for eps in (0.5, eb.Relative(0.1), eb.Relative(0.1, to="token_norm"), eb.PerDim(5)):
        for group in ("sample", "token"):
            for attack in (
                eb.PGD(eps=eps, steps=2),
                eb.PGD(eps=eps, steps=2, step_size=0.1, random_start=True, keep="best"),
            ):
                site = eb.Site(table, group=group)  # type: ignore[arg-type]
                result = attack.run(loss, site, criterion=eb.Misclassify(labels))
                assert result.delta.shape == (0, 7, 8)
                assert result.success.shape == (0,)


def test_features_first_is_noticed_where_sizes_coincide() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(3, 5).double(), torch.randn(5, 3, dtype=torch.float64)
    turned = nn.Sequential(layer)
    turned.register_forward_hook(lambda m, a, out: out.T)  # [features, samples]
    with pytest.raises(ValueError, match=r"are in dim 1.*samples=1"):
        eb.FGM(eps=0.5).run(lambda: turned(x).square().sum(0), eb.Site(turned))
    result = eb.FGM(eps=0.5).run(lambda: turned(x).square().sum(0), eb.Site(turned, samples=1))
    torch.testing.assert_close(result.norms[0], torch.full((5,), 0.5, dtype=torch.float64))


def test_two_sites_on_one_module_are_refused() -> None:
    model = toys.factors()
    loss = toys.rank(model, toys.triplets())
    with pytest.raises(ValueError, match="both perturb Embedding: their balls would add up"):
        eb.FGM(eps=0.5).run(loss, [eb.Site(model.item), eb.Site(model.item, group="token")])


def test_sites_overlap_whichever_comes_first() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Embedding(9, 3), nn.Embedding(9, 3)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"a": self.a(x), "b": self.b(x)}

    torch.manual_seed(0)
    model, layer, x = Two(), nn.Linear(3, 2), torch.randint(0, 9, (4, 2))

    def loss() -> Tensor:
        found = model(x)
        return layer(found["a"] * found["b"]).square().sum((1, 2))

    whole, one, other = eb.Site(model), eb.Site(model, key="a"), eb.Site(model, key="b")
    rows = [eb.Site(m, scope="row") for m in (model.a, model.b)]
    table = eb.Site.weight(model.a, model=model)
    attack = eb.PGD(eps=0.1, steps=1)
    for sites in (
        [whole, one], [one, whole], rows, [table, rows[1]], [rows[0], table],
        [table, eb.Site(model.a)], [table, eb.Site.weight(model.b, model=model)],
    ):  # fmt: skip
        with pytest.raises(ValueError, match="their balls would add up"):
            attack.run(loss, sites)
    apart = [eb.Site.weight(layer), eb.Site.weight(layer, "bias"), eb.Site(layer)]
    for sites in ([one, other], [*apart, other]):
        result = attack.run(loss, sites)
        torch.testing.assert_close(result.evaluate(loss).losses, result.losses)
        assert all(float(norms.max()) > 0.09 for norms in result.norms)


def test_a_site_that_was_removed_perturbs_nothing_and_says_so() -> None:
    model = toys.factors()
    loss, site = toys.rank(model, toys.triplets()), eb.Site(model.item)
    result = eb.FGM(eps=0.5).run(loss, site)
    site.remove()
    with pytest.raises(RuntimeError, match="was removed"), result.applied():
        loss()


# --- places that are made from one another --------------------------------------------------------


class Stacked(nn.Module):
    """Embeddings, and one layer that is run twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layer = nn.Embedding(9, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, deltas: list[Any] | None = None) -> Tensor:
        d = deltas or [0, 0, 0]
        hidden = self.layer(self.embedding(x) + d[0]).tanh() + d[1]
        return (self.layer(hidden).tanh() + d[2]).square().sum((1, 2))


class Tanh(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).tanh()


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("start", [False, True])
def test_places_that_are_made_from_one_another(known: bool, start: bool) -> None:
    """A place upstream keeps its gradient through the perturbed places that come after it."""
    torch.manual_seed(0)
    model, x = Stacked().double(), torch.randint(0, 9, (3, 2))
    embedding, layer = model.embedding, model.layer
    block = Tanh(layer)

    def loss() -> Tensor:
        return block(block(embedding(x))).square().sum((1, 2))

    whole = nn.ModuleList([embedding, block]) if known else None
    sites = [eb.Site(embedding, model=whole), eb.Site(block, model=whole)]
    attack = eb.PGD(
        eps=0.5, step_size=0.1, steps=2, random_start=start,
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    seen: list[list[Tensor]] = []

    class Watched(eb.PGD):
        def step(self, perturbation: Any, grad: Tensor, *args: Any) -> None:  # type: ignore[override]
            seen.append([perturbation.delta.detach().clone(), grad.clone()])
            super().step(perturbation, grad, *args)

    for evaluate in (False, True):
        seen.clear()
        result = Watched(**vars_of(attack)).run(loss, sites, evaluate=evaluate)
        for step in range(2):
            deltas = [pair[0].requires_grad_() for pair in seen[3 * step : 3 * step + 3]]
            right = torch.autograd.grad(model(x, deltas).sum(), deltas)
            for (_, grad), expected in zip(seen[3 * step :], right, strict=False):
                torch.testing.assert_close(grad, expected)
    torch.testing.assert_close(result.losses, model(x, list(result.deltas)).detach())


def vars_of(attack: eb.Attack) -> dict[str, Any]:
    names = ("eps", "step_size", "steps", "random_start", "generator")
    return {name: getattr(attack, name) for name in names}


@pytest.mark.parametrize("early", [False, True])
def test_training_on_places_that_are_made_from_one_another(early: bool) -> None:
    torch.manual_seed(0)
    model, x = Stacked().double(), torch.randint(0, 9, (3, 2))
    block = Tanh(model.layer)

    def loss() -> Tensor:
        return block(block(model.embedding(x))).square().sum((1, 2))

    sites = [eb.Site(model.embedding), eb.Site(block)]
    attack = eb.PGD(eps=0.5, step_size=0.1, steps=2)
    value, _ = eb.AdversarialObjective(attack, sites, lam=0.7, early_backward=early)(loss)
    found = torch.autograd.grad(value, list(model.parameters()))
    deltas = attack.run(loss, sites, evaluate=False).deltas
    expected = model(x).mean() + 0.7 * model(x, list(deltas)).mean()
    torch.testing.assert_close(value.detach(), expected.detach())
    for one, two in zip(
        found, torch.autograd.grad(expected, list(model.parameters())), strict=True
    ):
        torch.testing.assert_close(one, two)


def test_each_pass_reads_the_parameter_under_the_current_delta() -> None:
    """One ball for a whole table: the steps of PGD are those of a loop written out."""
    torch.manual_seed(0)
    model = TiedSoftmax()
    model.table.padding_idx = None
    x, y = torch.randint(1, 12, (6, 3)), torch.randint(1, 12, (6,))

    def loss() -> Tensor:
        return F.cross_entropy(model(x), y, reduction="none")

    for group in ("table", "row"):
        site = eb.Site.weight(model.table, model=model, group=group)  # type: ignore[arg-type]
        result = eb.PGD(norm="linf", eps=0.9, step_size=0.2, steps=4).run(loss, site)
        clean, delta = model.table.weight.detach().clone(), torch.zeros(12, 5).double()
        for _ in range(4):
            with torch.no_grad():
                model.table.weight.copy_(clean + delta)
            (grad,) = torch.autograd.grad(loss().sum(), model.table.weight)
            delta = (delta + 0.2 * grad.sign()).clamp(-0.9, 0.9)
        with torch.no_grad():
            model.table.weight.copy_(clean)
        torch.testing.assert_close(result.delta.reshape(12, 5), delta)
