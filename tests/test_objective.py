"""Objectives: the loss, its gradients, masking and schedules."""

from __future__ import annotations

from typing import Any

import embattle as eb
import pytest
import torch
import toys
from embattle.objectives.masking import Outcome
from torch import Tensor, nn


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.allclose(value, other[name], atol=1e-12), name


@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize("early", [False, True])
def test_mixed_is_clean_plus_lambda_times_adversarial(random: bool, early: bool) -> None:
    model = toys.encoder()
    tokens, labels = toys.text_batch()
    loss_fn = toys.classify(model, tokens, labels)
    site = eb.Site(model.embedding)
    attack = eb.PGD(
        eps=0.7, steps=2, random_start=random, generator=torch.Generator().manual_seed(3)
    )
    objective = eb.AdversarialObjective(attack, site, lam=0.5, early_backward=early)
    loss, metrics = objective(loss_fn, mask=tokens != 0, criterion=eb.Misclassify(labels))
    got = gradients(model, 3.0 * loss)

    attack.generator.manual_seed(3)  # type: ignore[union-attr]
    result = attack.run(loss_fn, site, mask=tokens != 0, criterion=eb.Misclassify(labels))
    clean = loss_fn().losses.mean()
    with result.applied():
        adversarial = loss_fn().losses.mean()
    expected = clean + 0.5 * adversarial
    assert torch.allclose(loss, expected)
    assert_same(got, gradients(model, 3.0 * expected))
    assert torch.allclose(metrics["clean_loss"], clean)
    assert torch.allclose(metrics["adversarial_loss"], adversarial)
    assert not any(value.requires_grad for value in metrics.values())
    assert torch.equal(metrics["clean_accuracy"], result.clean_accuracy)
    assert torch.equal(metrics["robust_accuracy"], result.robust_accuracy)
    assert not site.busy


@pytest.mark.parametrize("mode", ["as_is", "same", "eval"])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_mixed_looks_up_once_and_makes_no_extra_pass_from_a_random_start(
    mode: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = toys.encoder()
    tokens, labels = toys.text_batch()
    passes, lookups = [], []
    loss_fn = toys.classify(model, tokens, labels)
    plain = torch.embedding
    monkeypatch.setattr(torch, "embedding", lambda *a, **k: (lookups.append(1), plain(*a, **k))[1])

    def counted() -> eb.Evaluation:
        passes.append(1)
        return loss_fn()

    site = eb.Site(model.embedding, model=model)
    attack = eb.PGD(eps=0.7, steps=steps, random_start=True, mode=mode)  # type: ignore[arg-type]
    eb.AdversarialObjective(attack, site)(counted, mask=tokens != 0)[0].backward()
    assert (len(passes), len(lookups)) == (2 + steps, 1)


@pytest.mark.parametrize("kind", ["output", "row", "joint", "compiled"])
def test_a_random_start_is_the_one_of_the_attack_by_itself(kind: str) -> None:
    model = toys.encoder().eval()
    tokens, labels = toys.text_batch()
    scope = "row" if kind == "row" else "output"
    site = eb.Site(model.embedding, model=model, scope=scope)  # type: ignore[arg-type]
    used = torch.compile(model, backend="eager") if kind == "compiled" else model
    loss_fn = toys.classify(used, tokens, labels)
    joint, mask = kind == "joint", tokens != 0

    def attack() -> eb.PGD:
        source = torch.Generator().manual_seed(5)
        return eb.PGD(eps=2.0, step_size=0.3, steps=1, random_start=True, generator=source)

    objective = eb.AdversarialObjective(attack(), site, form="adversarial")
    loss, _ = objective(loss_fn, mask=mask, joint=joint)
    alone = attack().run(loss_fn, site, mask=mask, joint=joint)
    torch.testing.assert_close(loss.detach(), alone.losses.mean())


@pytest.mark.parametrize("random", [False, True])
def test_adversarial_alone(random: bool) -> None:
    model = toys.encoder()
    tokens, labels = toys.text_batch()
    loss_fn = toys.classify(model, tokens, labels)
    site = eb.Site(model.embedding)
    attack = eb.PGD(
        eps=0.7, steps=2, random_start=random, generator=torch.Generator().manual_seed(3)
    )
    passes = 0

    def counted() -> eb.Evaluation:
        nonlocal passes
        passes += 1
        return loss_fn()

    loss, _ = eb.AdversarialObjective(attack, site, form="adversarial")(counted, mask=tokens != 0)
    assert passes == 3  # two ascent steps and the training pass
    attack.generator.manual_seed(3)  # type: ignore[union-attr]
    result = attack.run(loss_fn, site, mask=tokens != 0)
    assert torch.allclose(loss, result.losses.mean())
    with result.applied():
        expected = gradients(model, loss_fn().losses.mean())
    assert_same(gradients(model, loss), expected)


@pytest.mark.parametrize(("random", "passes"), [(False, 4), (True, 5)])
def test_the_first_ascent_step_shares_the_clean_pass(random: bool, passes: int) -> None:
    model = toys.encoder()
    loss_fn = toys.classify(model, *toys.text_batch())
    made = 0

    def counted() -> eb.Evaluation:
        nonlocal made
        made += 1
        return loss_fn()

    attack = eb.PGD(eps=0.7, steps=3, random_start=random)
    eb.AdversarialObjective(attack, eb.Site(model.embedding))(counted)
    assert made == passes


def test_apr_is_its_equation() -> None:
    """He et al., SIGIR 2018, eq. 7-9: delta = eps * g / ||g|| for each row, zero elsewhere."""
    model, batch = toys.factors(), toys.triplets()
    loss_fn = toys.rank(model, batch)
    sites = [eb.Site(model.user, scope="row"), eb.Site(model.item, scope="row")]
    loss, _ = eb.AdversarialObjective(eb.FGM(eps=0.5), sites, lam=0.8)(loss_fn)
    got = gradients(model, loss)

    model.zero_grad()
    clean = loss_fn().mean()
    clean.backward()
    deltas = []
    for table in (model.user, model.item):
        g = table.weight.grad
        norm = g.norm(dim=1, keepdim=True)
        deltas.append(torch.where(norm > 0, 0.5 * g / norm.clamp(min=1e-300), 0.0))
    u, p, n = (
        (table.weight + delta)[i]
        for table, delta, i in zip(
            (model.user, model.item, model.item),
            (deltas[0], deltas[1], deltas[1]),
            batch,
            strict=True,
        )
    )
    perturbed = torch.nn.functional.softplus((u * n).sum(1) - (u * p).sum(1)).mean()
    expected = loss_fn().mean() + 0.8 * perturbed
    assert torch.allclose(loss, expected)
    assert_same(got, gradients(model, expected))


def test_sparse_embedding_gradients_are_carried() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 4, sparse=True), nn.Flatten(), nn.Linear(12, 1)).double()
    tokens = torch.randint(0, 20, (5, 3))

    def loss_fn() -> Tensor:
        return model(tokens).squeeze(-1).square()

    objective = eb.AdversarialObjective(eb.FGM(eps=0.3), eb.Site(model[0]))
    loss, _ = objective(loss_fn)
    (2.0 * loss).backward()
    sparse = model[0].weight.grad
    assert sparse.is_sparse
    early = eb.AdversarialObjective(eb.FGM(eps=0.3), objective.sites, early_backward=False)
    model.zero_grad()
    (2.0 * early(loss_fn)[0]).backward()
    assert torch.allclose(sparse.to_dense(), model[0].weight.grad.to_dense())


def test_a_carried_loss_cannot_be_backpropagated_twice() -> None:
    model = toys.encoder()
    objective = eb.AdversarialObjective(eb.FGM(eps=0.3), eb.Site(model.embedding))
    loss, _ = objective(toys.classify(model, *toys.text_batch()))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="before"):
        loss.backward()


def test_zero_lambda_makes_no_attack() -> None:
    model = toys.encoder()
    loss_fn = toys.classify(model, *toys.text_batch())
    objective = eb.AdversarialObjective(eb.FGM(eps=0.3), eb.Site(model.embedding), lam=0.0)
    loss, metrics = objective(loss_fn)
    assert "adversarial_loss" not in metrics
    assert_same(gradients(model, loss), gradients(model, loss_fn().losses.mean()))


def test_evaluation_without_gradients() -> None:
    model = toys.encoder()
    tokens, labels = toys.text_batch()
    objective = eb.AdversarialObjective(eb.PGD(eps=0.3, steps=2), eb.Site(model.embedding))
    with torch.no_grad():
        loss, metrics = objective(
            toys.classify(model, tokens, labels), criterion=eb.Misclassify(labels)
        )
    assert not loss.requires_grad
    assert metrics["adversarial_loss"] > metrics["clean_loss"]


def test_masked_samples_leave_the_update_even_when_not_finite() -> None:
    model = toys.encoder()
    tokens, labels = toys.text_batch()
    loss_fn = toys.classify(model, tokens, labels)
    site = eb.Site(model.embedding)

    def first_two(outcome: Outcome) -> Tensor:
        return torch.arange(6) < 2

    attack = eb.FGM(eps=0.4)
    objective = eb.AdversarialObjective(attack, site, masking=first_two)
    loss, metrics = objective(loss_fn)
    assert metrics["masked"].item() == 4
    got = gradients(model, loss)
    result = attack.run(loss_fn, site)
    with result.applied():
        adversarial = loss_fn().losses
    expected = loss_fn().losses.mean() + adversarial[:2].sum() / 6
    assert torch.allclose(loss, expected)
    assert_same(got, gradients(model, expected))


def test_masking_policies() -> None:
    losses = torch.tensor([1.0, 4.0, 2.0, 3.0])
    outcome = Outcome(
        losses=losses,
        clean_losses=torch.tensor([1.0, 1.0, 1.0, 2.0]),
        outputs=torch.tensor([[0.0, 0.0], [9.0, 0.0], [1.0, 0.0], [0.0, 5.0]]),
        norms=torch.tensor([0.1, 0.2, 0.3, 0.4]),
        agreement=lambda: torch.tensor([1.0, 0.5, 0.4, 0.0]),
    )
    masking = eb.masking
    assert masking.LossQuantile(0.5)(outcome).tolist() == [True, False, True, False]
    assert masking.LossQuantile(1.0)(outcome).all()
    assert masking.LossQuantile(0.5)(Outcome(losses=torch.ones(4))).all()
    assert masking.LossBound(3.0)(outcome).tolist() == [True, False, True, True]
    assert masking.LossRatio(2.0)(outcome).tolist() == [True, False, True, True]
    assert masking.NormBound(0.25)(outcome).tolist() == [True, True, False, False]
    assert masking.Confidence(0.9)(outcome).tolist() == [True, False, True, False]
    assert masking.NearestAgreement(0.5)(outcome).tolist() == [True, True, False, False]
    bare = Outcome(losses=losses)
    for policy in (
        masking.LossRatio(2.0),
        masking.NormBound(1.0),
        masking.Confidence(0.9),
        masking.NearestAgreement(0.5),
    ):
        with pytest.raises(ValueError, match="needs"):
            policy(bare)
    with pytest.raises(ValueError, match=r"1\.5"):
        masking.LossQuantile(1.5)


def test_nearest_agreement_looks_at_the_table() -> None:
    embedding = nn.Embedding(3, 1, _weight=torch.tensor([[0.0], [1.0], [3.0]]))
    tokens = torch.tensor([[0, 1], [2, 2]])
    kept = []

    def policy(outcome: Outcome) -> Tensor:
        assert outcome.agreement is not None
        kept.append(outcome.agreement())
        return kept[-1] > 0

    attack = eb.FGSM(eps=0.6)
    objective = eb.AdversarialObjective(attack, eb.Site(embedding), masking=policy)
    # 0 moves to .6 (nearest 1), 1 to 1.6 (nearest 1), 3 to 3.6 (nearest 3); what is masked stays,
    # and does not count.
    for mask, expected in (
        (None, [0.5, 1.0]),
        ([[True, True], [True, False]], [0.5, 1.0]),
        ([[True, False], [True, True]], [0.0, 1.0]),
        ([[False, False], [True, True]], [0.0, 1.0]),
    ):
        given = None if mask is None else torch.tensor(mask)
        objective(lambda: embedding(tokens).sum((1, 2)), mask=given)
        assert kept.pop().tolist() == expected


@pytest.mark.parametrize("mode", ["as_is", "same", "eval"])
@pytest.mark.parametrize("keep", ["last", "best"])
@pytest.mark.parametrize("early", [False, True])
def test_dropout_masks_of_the_training_passes(mode: str, keep: str, early: bool) -> None:
    """Only mode "same" gives the pass under the deltas the masks of the clean one."""
    model = toys.encoder(dropout=0.5)
    tokens, labels = toys.text_batch()
    attack = eb.PGD(eps=0.0, step_size=0.1, steps=2, mode=mode, keep=keep)  # type: ignore[arg-type]
    site = eb.Site(model.embedding, model=model)
    objective = eb.AdversarialObjective(attack, site, early_backward=early)
    torch.manual_seed(0)
    _, metrics = objective(toys.classify(model, tokens, labels))
    assert bool(metrics["adversarial_loss"] == metrics["clean_loss"]) == (mode == "same")
    again = objective(toys.classify(model, tokens, labels))[1]
    assert again["clean_loss"] != metrics["clean_loss"], "the next batch draws anew"


def test_groups_with_a_gradient_that_is_no_number_are_counted() -> None:
    model = toys.factors()
    batch = toys.triplets()
    factor = torch.ones(9, dtype=torch.float64)
    factor[[2, 5]] = float("nan")

    def loss() -> Tensor:
        return toys.rank(model, batch)() * factor

    objective = eb.AdversarialObjective(eb.PGD(eps=0.5, steps=2), eb.Site(model.user))
    assert int(objective(loss)[1]["nonfinite"]) == 2
    assert int(objective(toys.rank(model, batch))[1]["nonfinite"]) == 0


def test_weights_without_a_gradient_stay_under_awp() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.extra = toys.factors(), nn.Linear(3, 3).double()

        def forward(self, *batch: Tensor) -> tuple[Tensor, Tensor]:
            positive, negative = self.inner(*batch)
            return positive + 0.0 * self.extra.weight.sum(), negative

    model = Unused()
    objective = eb.AdversarialObjective(eb.FGM(eps=0.3), eb.Site(model.inner.user))
    loss, _ = eb.AWP(objective, model, gamma=0.1)(toys.rank(model, toys.triplets()))  # type: ignore[arg-type]
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())


def test_awp_in_an_evaluation_is_the_objective() -> None:
    model, batch = toys.factors(), toys.triplets()
    objective = eb.AdversarialObjective(eb.FGM(eps=0.3), eb.Site(model.user))
    with torch.no_grad():
        expected, _ = objective(toys.rank(model, batch))
        found, _ = eb.AWP(objective, model, gamma=0.1)(toys.rank(model, batch))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("call", ["call", "parts", "awp"])
def test_each_output_has_a_ball_unless_they_are_joined(call: str) -> None:
    model = toys.factors()
    counts = []

    class Watched(eb.FGM):
        def begin(self, perturbation: Any, scale: float) -> dict[str, Any]:
            counts.append(perturbation.joined)
            return super().begin(perturbation, scale)

    sites = [eb.Site(model.user), eb.Site(model.item)]
    objective = eb.AdversarialObjective(Watched(eps=0.3), sites)
    make: Any = {"call": objective, "parts": objective.parts, "awp": eb.AWP(objective, model)}[call]
    for joined, balls in ((None, 3), (False, 3), (True, 1)):
        counts.clear()
        make(toys.rank(model, toys.triplets()), **({} if joined is None else {"joint": joined}))
        assert counts == [bool(joined)] * balls


def test_schedules() -> None:
    warm = eb.schedules.WarmUp(4, delay=2)
    assert [warm(step) for step in range(8)] == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1]
    assert eb.schedules.WarmUp(0)(0) == 1
    cosine = eb.schedules.Cosine(4, start=1.0, end=0.0)
    assert [round(cosine(step), 6) for step in (0, 2, 4, 9)] == [1.0, 0.5, 0.0, 0.0]
    assert eb.schedules.Constant(0.3)(7) == 0.3
    with pytest.raises(ValueError, match="steps"):
        eb.schedules.Cosine(0)


def test_eps_follows_its_schedule() -> None:
    model = toys.encoder()
    tokens, labels = toys.text_batch()
    loss_fn = toys.classify(model, tokens, labels)
    site = eb.Site(model.embedding)
    objective = eb.AdversarialObjective(
        eb.FGM(eps=0.8), site, eps_schedule=eb.schedules.WarmUp(2), lam_schedule=lambda step: 0.5
    )
    for scale in (0.0, 0.5, 1.0):
        _, metrics = objective(loss_fn)
        alone = eb.FGM(eps=0.8).run(loss_fn, site, scale=scale)
        assert metrics["eps_scale"].item() == scale
        assert metrics["lam"].item() == 0.5
        assert torch.allclose(metrics["adversarial_loss"], alone.losses.mean())
    resumed = eb.AdversarialObjective(eb.FGM(eps=0.8), site, eps_schedule=eb.schedules.WarmUp(2))
    resumed.load_state_dict(objective.state_dict())
    assert resumed.step == 3


def test_steps_follow_their_schedule() -> None:
    model = toys.encoder()
    loss_fn = toys.classify(model, *toys.text_batch())
    site = eb.Site(model.embedding)
    objective = eb.AdversarialObjective(
        eb.PGD(eps=0.8, steps=4),
        site,
        form="adversarial",
        steps_schedule=eb.schedules.WarmUp(4, start=0.0),
    )
    for steps in (1, 1, 2, 3, 4, 4):
        _, metrics = objective(loss_fn)
        alone = eb.PGD(eps=0.8, steps=steps).run(loss_fn, site)
        assert metrics["steps"].item() == steps
        assert torch.allclose(metrics["adversarial_loss"], alone.losses.mean())
    noise = eb.AdversarialObjective(
        eb.UniformNoise(eps=0.1), site, steps_schedule=eb.schedules.Cosine(3)
    )
    assert noise(loss_fn)[1]["steps"].item() == 0
    assert len(eb.APGD(eps=1.0, steps=20).with_steps(0.5)._checks) < 10


def test_adaptive_eps_grows_while_the_target_holds() -> None:
    schedule = eb.schedules.Adaptive(target=0.6, start=0.2, grow=0.3, shrink=0.5, every=2)
    good, bad = {"robust_accuracy": torch.tensor(0.9)}, {"robust_accuracy": torch.tensor(0.2)}
    seen = []
    for metrics in (good, good, good, bad, bad, bad, good, good):
        schedule.update(metrics)
        seen.append(round(schedule(0), 6))
    assert seen == [0.2, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125, 0.425]
    other = eb.schedules.Adaptive(target=0.6)
    other.load_state_dict(schedule.state_dict())
    assert other(0) == schedule(0)
    with pytest.raises(ValueError, match="labels"):
        schedule.update({"adversarial_loss": torch.tensor(1.0)})


def test_adaptive_schedule_in_an_objective() -> None:
    model = toys.encoder()
    tokens, _ = toys.text_batch()
    schedule = eb.schedules.Adaptive(target=0.01, start=0.1, grow=0.2, every=1)
    objective = eb.AdversarialObjective(
        eb.FGM(eps=0.01), eb.Site(model.embedding), eps_schedule=schedule
    )
    with torch.no_grad():
        predicted = model(tokens).argmax(-1)
    for _ in range(2):
        objective(toys.classify(model, tokens, predicted), criterion=eb.Misclassify(predicted))
    assert schedule(0) == pytest.approx(0.5)
    state = objective.state_dict()
    objective.eps_schedule = eb.schedules.Adaptive(target=0.01)
    objective.load_state_dict(state)
    assert objective.eps_schedule(0) == pytest.approx(0.5)
    objective.lam_schedule = eb.schedules.Constant(0.0)  # no attack: nothing to learn from
    objective(toys.classify(model, tokens, predicted), criterion=eb.Misclassify(predicted))
    assert objective.eps_schedule(0) == pytest.approx(0.5)


def test_objective_says_what_is_wrong() -> None:
    site = eb.Site(nn.Embedding(3, 2))
    with pytest.raises(ValueError, match="'best'"):
        eb.AdversarialObjective(eb.FGM(eps=1.0), site, form="best")
    with pytest.raises(ValueError, match="-1"):
        eb.AdversarialObjective(eb.FGM(eps=1.0), site, lam=-1)
    assert "mixed" in repr(eb.AdversarialObjective(eb.FGM(eps=1.0), site))


class Shared(nn.Module):
    """Autograd gives `one` and `two` the same tensor, and `bias` an expanded number."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(10, 4)
        self.one, self.two = (nn.Parameter(torch.randn(4)) for _ in range(2))
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, tokens: Tensor) -> Tensor:
        return (self.embedding(tokens).mean(1) * (self.one + self.two)).tanh().sum(1)


@pytest.mark.parametrize("form", ["mixed", "free"])
def test_gradients_that_share_memory_are_carried(form: str) -> None:
    model = Shared()
    tokens = torch.randint(0, 10, (5, 3))
    steps = 2

    def losses() -> Tensor:
        return model(tokens) + model.bias.sum()

    attack = eb.PGD(eps=0.3, step_size=0.2, steps=steps)
    loss, _ = eb.AdversarialObjective(attack, eb.Site(model.embedding), form=form)(losses)
    (0.25 * loss).backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    # The deltas of each pass, from attacks of fewer steps.
    counts = range(steps) if form == "free" else (0, steps)
    total = torch.zeros(())
    for count in counts:
        site = eb.Site(model.embedding)
        at = eb.PGD(eps=0.3, step_size=0.2, steps=count).run(losses, site)
        with at.applied():
            total = total + losses().mean()
        site.remove()
    (0.25 * total / (steps if form == "free" else 1)).backward()
    for one, parameter in zip(found, model.parameters(), strict=True):
        assert torch.allclose(one, parameter.grad, atol=1e-6)
