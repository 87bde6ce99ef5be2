"""What an attack reports was evaluated: with the whole batch, under one set of random numbers."""

from __future__ import annotations

import copy
import gc
import pickle
import random
import weakref
from collections.abc import Callable
from typing import Any

import embattle as eb
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from embattle import Evaluation
from torch import Tensor, nn


class Mean(nn.Module):
    """Embeddings, their mean, an MLP; dropout or batch norm between."""

    def __init__(self, classes: int = 3, dropout: float = 0.0, norm: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 6)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.BatchNorm1d(6) if norm else nn.Identity()
        self.head = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, classes))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.dropout(self.embedding(tokens).mean(1))))


def batch(size: int = 16, classes: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randint(0, 30, (size, 4), generator=g),
        torch.randint(0, classes, (size,), generator=g),
    )


def loss_of(model: nn.Module, tokens: Tensor, labels: Tensor) -> Callable[[], Evaluation]:
    def loss() -> Evaluation:
        logits = model(tokens)
        return Evaluation(F.cross_entropy(logits, labels, reduction="none"), logits)

    return loss


def made(**options: object) -> tuple[Mean, Tensor, Tensor, Callable[[], Evaluation], eb.Site]:
    torch.manual_seed(1)
    model = Mean(**options).double()  # type: ignore[arg-type]
    tokens, _ = batch()
    with torch.no_grad():
        labels = copy.deepcopy(model).eval()(tokens).argmax(1)
    return model, tokens, labels, loss_of(model, tokens, labels), eb.Site(model.embedding)


def assert_reported_is_evaluated(
    result: eb.AttackResult, loss: Callable[[], Evaluation], criterion: eb.Criterion
) -> None:
    now = result.evaluate(loss)
    torch.testing.assert_close(result.losses, now.losses)
    assert torch.equal(result.predictions, criterion.predict(now.outputs))
    assert torch.equal(result.reached, criterion.reached(now, None))


# --- dropout --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["as_is", "same"])
@pytest.mark.parametrize("keep", ["last", "best"])
@pytest.mark.parametrize("start", [False, True])
def test_dropout_is_never_counted_as_success(mode: str, keep: str, start: bool) -> None:
    _, _, labels, loss, site = made(dropout=0.5)
    attack = eb.PGD(
        eps=0.0, step_size=0.1, steps=4, mode=mode, keep=keep, random_start=start,
        restarts=3 if start else 1,
    )  # fmt: skip
    result = attack.run(loss, site, criterion=eb.Misclassify(labels))
    assert not result.success.any()
    assert torch.equal(result.losses, result.clean_losses)


def test_dropout_is_no_gain_of_a_token_attack() -> None:
    model, tokens, labels, _, site = made(dropout=0.5)

    def loss_fn(ids: Tensor) -> Callable[[], Evaluation]:
        return loss_of(model, ids, labels)

    nothing = torch.zeros_like(tokens, dtype=torch.bool)
    result = eb.TokenSwap(swaps=3).run(
        loss_fn, site, tokens, mask=nothing, criterion=eb.Misclassify(labels)
    )
    assert torch.equal(result.tokens, tokens)
    assert torch.equal(result.losses, result.clean_losses)
    assert not result.success.any()


def test_samples_cannot_leave_a_model_that_draws_random_numbers() -> None:
    model, tokens, labels, loss, site = made(dropout=0.5)
    attack = eb.PGD(eps=0.0, step_size=0.1, steps=3, stop_when_fooled=True)
    with pytest.raises(ValueError, match=r"random numbers \(dropout\).*mode='eval'"):
        attack.run(
            loss, site, criterion=eb.Misclassify(labels),
            subset=lambda rows: loss_of(model, tokens[rows], labels[rows]),
        )  # fmt: skip


# --- samples that depend on each other ------------------------------------------------------------


def in_batch(model: nn.Module, site_of: nn.Module) -> tuple[Callable[[], Tensor], eb.Site]:
    users, items = torch.arange(8), torch.arange(8, 16)

    def loss() -> Tensor:
        scores = model.user(users) @ model.item(items).T
        return F.cross_entropy(4 * scores, torch.arange(8), reduction="none")

    return loss, eb.Site(site_of)


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(20, 5).double(), nn.Embedding(20, 5).double()


@pytest.mark.parametrize("seed", range(4))
def test_negatives_from_the_batch(seed: int) -> None:
    """Worst iterates of single samples do not make the worst batch: that one is reported."""
    torch.manual_seed(seed)
    model = Towers()
    loss, site = in_batch(model, model.item)
    totals = []
    for restarts in (1, 2, 4):
        attack = eb.PGD(
            eps=1.0, step_size=0.6, steps=5, random_start=True, restarts=restarts, keep="best",
            generator=torch.Generator().manual_seed(7),
        )  # fmt: skip
        result = attack.run(loss, site)
        torch.testing.assert_close(result.losses, result.evaluate(loss).losses)
        totals.append(float(result.losses.sum()))
    assert totals == sorted(totals), "more restarts ended weaker"


@pytest.mark.parametrize("seed", [13, 25, 37, 54])
def test_samples_that_interact_at_some_deltas_alone(seed: int) -> None:
    """A hinge between samples: what few restarts joined is kept when later ones show it."""
    table, x = nn.Embedding(2, 1).double(), torch.arange(2)[:, None]
    nn.init.zeros_(table.weight)

    def loss() -> Tensor:
        d = table(x).reshape(2)
        return (3 * d).sin() - 5 * torch.relu(d.abs() - 0.5).prod()

    totals = []
    for restarts in range(1, 7):
        attack = eb.UniformNoise(
            eps=1.0, norm="linf", restarts=restarts, generator=torch.Generator().manual_seed(seed)
        )
        result = attack.run(loss, eb.Site(table))
        torch.testing.assert_close(result.losses, result.evaluate(loss).losses)
        totals.append(float(result.losses.sum()))
    assert totals == sorted(totals), "more restarts ended weaker"


@pytest.mark.parametrize("seed", range(6))
def test_goals_that_interact_though_values_do_not(seed: int) -> None:
    """Each sample is to be well ahead of the other: not both can be, whatever their own values."""

    class Ahead(eb.Criterion):
        needs_outputs = True

        def objective(self, now: Evaluation, clean: Evaluation | None) -> Tensor:
            return now.losses

        def reached(self, now: Evaluation, clean: Evaluation | None) -> Tensor:
            return now.outputs > 0.2

    table, x = nn.Embedding(2, 1).double(), torch.arange(2)[:, None]
    nn.init.zeros_(table.weight)

    def loss() -> Evaluation:
        d = table(x).reshape(2)
        return Evaluation(d, d - d.flip(0))

    attack = eb.UniformNoise(
        eps=1.0, norm="linf", restarts=8, generator=torch.Generator().manual_seed(seed)
    )
    result = attack.run(loss, eb.Site(table), criterion=Ahead())
    assert int(result.reached.sum()) == 1
    assert torch.equal(result.outputs, result.evaluate(loss).outputs)


@pytest.mark.parametrize("keep", ["last", "best"])
def test_batch_norm_in_train_mode(keep: str) -> None:
    model, _, labels, loss, site = made(norm=True)
    model.train()
    attack = eb.PGD(eps=1.5, step_size=0.7, steps=6, random_start=True, restarts=3, keep=keep)
    criterion = eb.Misclassify(labels)
    assert_reported_is_evaluated(attack.run(loss, site, criterion=criterion), loss, criterion)


def test_samples_cannot_leave_a_batch_whose_samples_interact() -> None:
    model, tokens, _, _, site = made(norm=True)
    model.train()
    with torch.no_grad():
        labels = model(tokens).argmax(1)
    attack = eb.PGD(eps=1.5, step_size=0.5, steps=6, stop_when_fooled=True)
    with pytest.raises(ValueError, match=r"depend on each other.*batch norm"):
        attack.run(
            loss_of(model, tokens, labels), site, criterion=eb.Misclassify(labels),
            subset=lambda rows: loss_of(model, tokens[rows], labels[rows]),
        )  # fmt: skip


# --- best -----------------------------------------------------------------------------------------


def test_the_clean_point_is_a_candidate() -> None:
    model, tokens, labels, _, site = made()
    model.eval()
    with torch.no_grad():  # labels that are wrong: noise lowers the loss of many
        labels = (model(tokens).argmax(1) + 1) % 3
    loss = loss_of(model, tokens, labels)
    result = eb.UniformNoise(eps=2.0, restarts=3).run(loss, site)
    assert torch.all(result.losses >= result.clean_losses)
    best = eb.PGD(eps=3.0, step_size=3.0, steps=3, keep="best").run(loss, site)
    assert torch.all(best.losses >= best.clean_losses)


def test_all_restarts_count_when_the_last_iterate_is_kept() -> None:
    """`keep="last"` takes the worst of the restarts' last iterates."""
    _, _, _, loss, site = made()

    def attack(restarts: int, seed: int) -> Tensor:
        made_ = eb.PGD(
            eps=0.7, step_size=0.3, steps=2, random_start=True, restarts=restarts,
            generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip
        return made_.run(loss, site).losses

    for seed in range(3):
        one, four = attack(1, seed), attack(4, seed)
        assert torch.all(four >= one)
        assert torch.any(four > one)


def test_each_restart_differentiates_at_its_own_start() -> None:
    _, _, _, loss, site = made()
    calls = 0

    def counted() -> Evaluation:
        nonlocal calls
        calls += 1
        return loss()

    eb.PGD(eps=0.5, steps=2, random_start=True, restarts=3).run(counted, site)
    # The clean pass; of each restart two steps, the evaluation of where they led, and that of the
    # worst of each sample so far.
    assert calls == 1 + 3 * 4


def test_the_default_step_size() -> None:
    """2.5 * eps / steps: after one of four steps from zero, delta is 2.5 / 4 of the radius long."""
    _, _, _, loss, site = made()
    lengths = []

    class Watched(eb.PGD):
        def step(self, perturbation: object, *args: object) -> None:  # type: ignore[override]
            super().step(perturbation, *args)  # type: ignore[arg-type]
            lengths.append(perturbation.delta.detach().flatten(1).norm(dim=1))  # type: ignore[attr-defined]

    Watched(eps=0.8, steps=4).run(loss, site)
    torch.testing.assert_close(lengths[0], torch.full_like(lengths[0], 0.8 * 2.5 / 4))


# --- passes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "evaluated"), [(False, 11), (True, 12)])
def test_an_attack_that_nobody_asks_to_evaluate_makes_no_pass_more(
    start: bool, evaluated: int
) -> None:
    _, _, labels, loss, site = made()
    calls = 0

    def counted() -> Evaluation:
        nonlocal calls
        calls += 1
        return loss()

    attack = eb.PGD(eps=0.5, steps=10, random_start=start)
    result = attack.run(counted, site, criterion=eb.Misclassify(labels), evaluate=False)
    assert calls == 10
    for name in ("losses", "clean_losses", "success", "robust_accuracy", "predictions"):
        with pytest.raises(RuntimeError, match=r"evaluate=False.*result.evaluate"):
            getattr(result, name)
    assert result.delta.shape == (16, 4, 6)
    calls = 0
    attack.run(counted, site, criterion=eb.Misclassify(labels))
    assert calls == evaluated


# --- gradients that are not there -----------------------------------------------------------------


def test_groups_without_a_gradient_are_counted_and_warned_of() -> None:
    model, tokens, _, _, site = made()
    model.head[2].weight.data *= 1e6
    with torch.no_grad():
        labels = model(tokens).argmax(1)
    loss = loss_of(model, tokens, labels)
    with pytest.warns(eb.attacks.AttackWarning, match="16 of 16 groups had no gradient"):
        result = eb.PGD(eps=2.0, steps=5).run(loss, site, criterion=eb.Misclassify(labels))
    assert int(result.zero_gradient) == 16
    margin = eb.Misclassify(labels, ascend="margin")
    result = eb.PGD(eps=2.0, steps=5).run(loss, site, criterion=margin)
    assert int(result.zero_gradient) == 0
    assert result.success.any()


@pytest.mark.parametrize("scope", ["output", "row"])
def test_samples_without_a_label_are_not_said_to_lack_a_gradient(scope: str) -> None:
    model, tokens, labels, _, _ = made()
    labels = labels.clone()
    labels[::4] = -100
    site = eb.Site(model.embedding, scope=scope)  # type: ignore[arg-type]
    attack = eb.PGD(eps=1.0, steps=2)
    result = attack.run(loss_of(model, tokens, labels), site, criterion=eb.Misclassify(labels))
    if scope == "output":
        assert torch.all(result.delta[::4] == 0)
        assert int(result.zero_gradient) == 0
    else:
        seen = tokens[labels >= 0].unique()
        assert int(result.zero_gradient) == len(tokens.unique()) - len(seen)


def test_an_objective_counts_groups_without_a_gradient() -> None:
    model, tokens, _, _, site = made()
    model.head[2].weight.data *= 1e6
    with torch.no_grad():
        labels = model(tokens).argmax(1)
    objective = eb.AdversarialObjective(eb.PGD(eps=1.0, steps=2), site)
    _, metrics = objective(loss_of(model, tokens, labels))
    assert int(metrics["zero_gradient"]) == 16


def test_vat_on_saturated_logits_is_counted() -> None:
    model, tokens, labels, _, site = made()
    model.head[2].weight.data *= 1e6
    with pytest.warns(eb.attacks.AttackWarning, match="no gradient other than zero"):
        result = eb.VAT(eps=1.0).run(loss_of(model, tokens, labels), site)
    assert int(result.zero_gradient) > 0


def test_small_gradients_are_not_lost_in_float16() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 8), nn.Flatten(), nn.Linear(16, 2)).half()
    model[2].weight.data *= 10
    tokens = torch.randint(0, 20, (12, 2))
    with torch.no_grad():
        labels = model(tokens).float().argmax(1)

    def loss() -> Tensor:
        return F.cross_entropy(model(tokens).float(), labels, reduction="none")

    exact = copy.deepcopy(model).double()

    def exact_loss() -> Tensor:
        return F.cross_entropy(exact(tokens), labels, reduction="none")

    assert (loss() < 1e-6).any(), "some samples must be confident"
    result = eb.FGM(eps=0.5).run(loss, eb.Site(model[0]), evaluate=False)
    right = eb.FGM(eps=0.5).run(exact_loss, eb.Site(exact[0]), evaluate=False)
    moving = right.delta.flatten(1).norm(dim=1) > 0
    cosine = F.cosine_similarity(result.delta.flatten(1).double(), right.delta.flatten(1))
    kept = moving & (exact_loss() > 1e-9)
    assert kept.sum() >= 8
    assert torch.all(cosine[kept] > 0.99)


# --- balls ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"keep": "best", "steps": 2}, {"steps": 0}])
def test_a_start_that_may_be_the_result_is_in_the_ball(options: dict[str, Any]) -> None:
    """SMART's start, N(0, sigma^2), is not projected by itself; as a candidate it must be."""
    _, _, labels, loss, site = made()
    attack = eb.SMARTStep(eps=0.02, sigma=1.0, step_size=0.0, **options)
    result = attack.run(loss, site, criterion=eb.Misclassify(labels))
    assert torch.all(result.norms[0] <= 0.02 + 1e-12)
    assert torch.all(result.delta.abs() <= 0.02 + 1e-12)


# --- rounding -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_are_those_after_rounding(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    table = nn.Embedding(30, 6).to(dtype)
    head = nn.Linear(6, 2).to(dtype)
    tokens = torch.randint(0, 30, (5, 3))

    def loss() -> Tensor:
        return head(table(tokens).mean(1)).float().logsumexp(1)

    seen: list[Tensor] = []
    handle = table.register_forward_hook(lambda m, a, out: None)
    site = eb.Site(table)
    with pytest.warns(eb.attacks.AttackWarning, match="rounds the perturbations"):
        result = eb.FGSM(eps=1e-4).run(loss, site)
    handle = table.register_forward_hook(lambda m, a, out: seen.append(out.detach()))
    clean = table(tokens)
    with result.applied():
        table(tokens)
    handle.remove()
    moved = (seen[-1].float() - clean.float()).flatten(1).abs().amax(1)
    assert torch.equal(result.norms[0], moved)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_of_half_types_are_rounded_alike_in_all_passes(dtype: torch.dtype) -> None:
    """The attack's quick look-ups round as those under the returned deltas do."""
    torch.manual_seed(0)
    table = nn.Embedding(9, 6).to(dtype)
    tokens = torch.randint(0, 9, (6, 3))

    def loss() -> Tensor:
        return table(tokens).float().sin().sum((1, 2)) * 50

    for keep in ("last", "best"):
        attack = eb.PGD(eps=0.3, step_size=0.1, steps=4, keep=keep)  # type: ignore[arg-type]
        result = attack.run(loss, eb.Site(table, scope="row"))
        assert torch.equal(result.losses, result.evaluate(loss).losses)


# --- labels ---------------------------------------------------------------------------------------


def test_success_and_accuracy_know_what_does_not_count() -> None:
    _, tokens, labels, _, site = made()
    model = site.module
    labels = labels.clone()
    labels[::4] = -100
    net, *_ = made()
    del model
    loss = loss_of(net, tokens, labels)
    site = eb.Site(net.embedding)
    result = eb.PGD(eps=2.0, steps=5).run(loss, site, criterion=eb.Misclassify(labels))
    assert float(result.clean_accuracy) == 1.0
    assert not result.success[::4].any()
    counted = labels != -100
    expected = (result.predictions == labels)[counted].double().mean()
    assert float(result.robust_accuracy) == pytest.approx(float(expected))


def test_samples_without_a_label_do_not_stop_the_others() -> None:
    model, tokens, labels, _, site = made()
    labels = labels.clone()
    labels[3] = -100

    def subset(rows: Tensor) -> Callable[[], Evaluation]:
        return loss_of(model, tokens[rows], labels[rows])

    result = eb.PGD(eps=2.0, steps=5, stop_when_fooled=True).run(
        loss_of(model, tokens, labels), site, criterion=eb.Misclassify(labels), subset=subset
    )
    assert result.success.any()
    assert int(result.steps[3]) == 0


def test_targeted_attacks_know_their_target() -> None:
    _, _, labels, loss, site = made()
    target = (labels + 1) % 3
    criterion = eb.Target(target)
    result = eb.PGD(eps=4.0, steps=20, keep="best").run(loss, site, criterion=criterion)
    assert torch.equal(result.reached, result.predictions == target)
    assert result.success.float().mean() > 0.5
    untargeted = eb.PGD(eps=4.0, steps=20).run(loss, site, criterion=eb.Misclassify(labels))
    assert (result.predictions == target).sum() >= (untargeted.predictions == target).sum()


# --- copies ---------------------------------------------------------------------------------------


def test_results_are_pickled_and_copied_without_model_and_graph() -> None:
    model, _, labels, loss, site = made()
    result = eb.PGD(eps=0.5, steps=2).run(loss, site, criterion=eb.Misclassify(labels))
    read = pickle.loads(pickle.dumps(result))
    assert len(pickle.dumps(result)) < 60_000
    for name in ("delta", "losses", "clean_losses", "success", "steps", "nonfinite"):
        assert torch.equal(getattr(read, name), getattr(result, name)), name
    assert torch.equal(read.norms[0], result.norms[0])
    with pytest.raises(RuntimeError, match="pickled"), read.applied():
        pass
    copied = copy.deepcopy(result)
    copied.delta.zero_()
    assert result.delta.abs().sum() > 0
    torch.testing.assert_close(copied.evaluate(loss).losses, result.clean_losses)
    assert not any(isinstance(x, nn.Module) for x in gc.get_referents(read))
    assert model is not None


def test_a_result_keeps_neither_the_loss_function_nor_the_graph() -> None:
    model, tokens, labels, _, site = made()
    loss = loss_of(model, tokens, labels)
    seen = weakref.ref(loss)
    result = eb.PGD(eps=0.5, steps=2).run(loss, site)
    del loss
    gc.collect()
    assert seen() is None
    assert not result.delta.requires_grad


# --- random numbers of others ---------------------------------------------------------------------


@pytest.mark.parametrize("source", ["numpy", "python"])
@pytest.mark.parametrize("keep", ["last", "best"])
def test_what_numpy_and_python_draw_is_never_success(source: str, keep: str) -> None:
    """Negatives and masks are often drawn with numpy: an evaluation draws the clean one's again."""
    model, tokens, labels, _, site = made()

    def drawn() -> Tensor:
        if source == "numpy":
            return torch.from_numpy(np.random.rand(16, 3) < 0.5)  # noqa: NPY002
        return torch.tensor([[random.random() < 0.5 for _ in range(3)] for _ in range(16)])

    def loss() -> Evaluation:
        logits = model(tokens) * drawn()
        return Evaluation(F.cross_entropy(logits, labels, reduction="none"), logits)

    np.random.seed(0)  # noqa: NPY002
    random.seed(0)
    attack = eb.PGD(eps=0.0, step_size=0.1, steps=3, keep=keep)  # type: ignore[arg-type]
    before = np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    result = attack.run(loss, site, criterion=eb.Misclassify(labels))
    assert not result.success.any()
    assert torch.equal(result.losses, result.clean_losses)
    assert torch.equal(result.losses, result.evaluate(loss).losses)
    random.setstate(before[1])
    leaving = eb.PGD(eps=0.1, steps=3, stop_when_fooled=True)
    with pytest.raises(ValueError, match=r"draws random numbers"):
        leaving.run(loss, site, criterion=eb.Misclassify(labels), subset=lambda rows: loss)
