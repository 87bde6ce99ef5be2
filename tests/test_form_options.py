"""Options of forms: what a form would pass over is refused, and what it keeps is kept."""

from __future__ import annotations

import math
from typing import Any

import embattle as eb
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import toys


@pytest.mark.parametrize("form", ["adversarial", "free", "freeat", eb.FreeAT()])
def test_a_form_of_one_part_has_no_weight(form: Any) -> None:
    site, attack = eb.Site(toys.encoder().embedding), eb.PGD(eps=0.1, steps=2)
    for options, words in (
        ({"lam": 0.5}, r"lam=0\.5, lam_schedule=None would not weigh; .*form='mixed'"),
        ({"lam_schedule": eb.schedules.WarmUp(3)}, r"lam_schedule=WarmUp\(steps=3"),
    ):
        with pytest.raises(ValueError, match=words):
            eb.AdversarialObjective(attack, site, form=form, **options)
    constant = eb.schedules.Constant()
    eb.AdversarialObjective(attack, site, form=form, lam=1, lam_schedule=constant)


@pytest.mark.parametrize("scope", ["output", "row"])
def test_free_training_keeps_the_velocity(scope: Any) -> None:
    """By hand: MI-FGSM's steps, one in each call, the last ones of a run that was resumed."""
    model = toys.encoder()
    tokens, labels = toys.text_batch()
    mask = (tokens != 0).unsqueeze(-1)
    attack = eb.MIFGSM(norm="l2", eps=0.5, step_size=0.2, decay=0.7)

    def made() -> eb.AdversarialObjective:
        return eb.AdversarialObjective(attack, eb.Site(model.embedding, scope=scope), form="freeat")

    objective, loss_fn = made(), toys.classify(model, tokens, labels)
    table = model.embedding.weight.detach()
    delta = torch.zeros_like(table if scope == "row" else table[tokens])
    velocity = torch.zeros_like(delta)
    for number in range(4):
        if number == 2:
            state = objective.state_dict()
            objective = made()
            objective.load_state_dict(state)
        loss, _ = objective(loss_fn, mask=tokens != 0)
        delta.requires_grad_()
        addition = delta[tokens] if scope == "row" else delta
        with_delta = model.embedding.register_forward_hook(
            lambda module, args, out, more=addition: out + more * mask
        )
        losses = loss_fn().losses
        with_delta.remove()
        torch.testing.assert_close(loss.detach(), losses.mean().detach())
        (grad,) = torch.autograd.grad(losses.sum(), delta)
        grad, delta = grad.flatten(1), delta.detach()
        velocity = 0.7 * velocity + F.normalize(grad, p=1).view_as(delta)
        step = delta.flatten(1) + 0.2 * F.normalize(velocity.flatten(1))
        delta = (step * (0.5 / step.norm(dim=1, keepdim=True).clamp(min=0.5))).view_as(delta)


def test_free_training_makes_single_steps_alone() -> None:
    model = toys.encoder()
    site, attack = eb.Site(model.embedding), eb.APGD(eps=0.1, keep="last")
    objective = eb.AdversarialObjective(attack, site, form="freeat")
    with pytest.raises(ValueError, match=r"APGD\(.*more than single steps.*PGD or MIFGSM"):
        objective(toys.classify(model, *toys.text_batch()))


def test_labels_that_number_the_batch_have_no_part() -> None:
    model, (users, items, _) = toys.factors(), toys.triplets(6)

    def of(rows: Any) -> Any:
        def loss_fn() -> eb.Evaluation:
            scores = model.user(users[rows]) @ model.item(items[rows]).T
            labels = torch.arange(len(scores))
            return eb.Evaluation(eb.losses.cross_entropy(scores, labels), scores)

        return loss_fn

    form = eb.Partial(0.5, choose="loss")
    objective = eb.AdversarialObjective(eb.FGM(eps=0.1), eb.Site(model.user), form=form)
    form.load_state_dict({"last": torch.arange(6.0)})  # the last three are chosen
    with pytest.raises(ValueError, match=r"negatives of the batch.*whole batches \(form='mixed'"):
        objective(
            of(slice(None)), subset=of, samples=range(6), criterion=eb.Misclassify(torch.arange(6))
        )


@pytest.mark.parametrize("form", ["mixed", "vat", "free", "freeat"])
def test_passes_share_a_graph_that_was_made_outside(form: str) -> None:
    """Encoded items, say: their weights' gradients are those of items encoded in each pass."""
    torch.manual_seed(0)
    model, (users, items, _) = toys.factors(), toys.triplets()
    encode = torch.nn.Linear(6, 6).double()
    attack = eb.PGD(
        eps=0.3, steps=2, random_start=form == "vat", generator=torch.Generator().manual_seed(0)
    )
    found = []
    for outside in (False, True):
        attack.generator.manual_seed(0)  # type: ignore[union-attr]
        encoded = encode(model.item.weight).tanh()

        def loss_fn(encoded: Any = encoded, outside: bool = outside) -> eb.Evaluation:
            if not outside:
                encoded = encode(model.item.weight).tanh()
            scores = model.user(users) @ encoded.T
            return eb.Evaluation(eb.losses.cross_entropy(scores, items), scores)

        objective = eb.AdversarialObjective(attack, eb.Site(model.user), form=form)
        loss, _ = objective(loss_fn)
        (loss + encoded.square().mean()).backward()  # a penalty besides
        weights = [*model.parameters(), *encode.parameters()]
        found.append([loss.detach(), *[weight.grad for weight in weights]])
        model.zero_grad()
        encode.zero_grad()
    torch.testing.assert_close(*found)


def test_perturbed_weights_do_not_reach_what_was_made_outside() -> None:
    model, (users, items, _) = toys.factors(), toys.triplets()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    encoded = model.item.weight.tanh()
    objective = eb.AdversarialObjective(eb.FGM(eps=0.3), eb.Site(model.user))
    with pytest.raises(RuntimeError, match="AWP: what loss_fn takes from outside"):
        eb.AWP(objective, model)(
            lambda: eb.losses.cross_entropy(model.user(users) @ encoded.T, items)
        )
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("form", ["mixed", "vat", "free"])
def test_carried_gradients_are_not_differentiated_again(form: str) -> None:
    model = toys.encoder()
    attack = eb.PGD(eps=0.3, steps=2, random_start=form == "vat")
    loss_fn = toys.classify(model, *toys.text_batch())
    for early in (True, False):
        objective = eb.AdversarialObjective(
            attack, eb.Site(model.embedding), form=form, early_backward=early
        )
        loss, _ = objective(loss_fn)
        if early or form == "free":
            with pytest.raises(RuntimeError, match=r"create_graph=True.*early_backward=False"):
                torch.autograd.grad(loss, model.head.weight, create_graph=True)
        else:
            (grad,) = torch.autograd.grad(loss, model.head.weight, create_graph=True)
            assert grad.requires_grad


@pytest.mark.parametrize("attack", [eb.AutoAttack(eps=0.1), eb.FMN()])
def test_attacks_with_a_run_of_their_own_do_not_train(attack: Any) -> None:
    with pytest.raises(ValueError, match=r"(AutoAttack|FMN)\(.*is for audits: train against PGD"):
        eb.AdversarialObjective(attack, eb.Site(toys.encoder().embedding))


def test_a_form_of_ones_own_is_not_taken_for_another_by_its_name() -> None:
    model = toys.encoder()
    loss_fn = toys.classify(model, *toys.text_batch())

    def adversarial(batch: Any) -> torch.Tensor:
        batch.ascend()
        return batch.lam * batch.losses(batch.perturbed()).sum()

    site, attack = eb.Site(model.embedding), eb.FGM(eps=0.1)
    objective = eb.AdversarialObjective(attack, site, form=adversarial, lam=2.0)
    known = eb.AdversarialObjective(attack, site, form="adversarial")
    torch.testing.assert_close(objective(loss_fn)[0], 12 * known(loss_fn)[0])
    with pytest.raises(ValueError, match=r"got '<function .*adversarial.*no losses to add"):
        objective.parts(loss_fn)


@pytest.mark.parametrize("form", ["mixed", "adversarial"])
@pytest.mark.parametrize("early", [True, False])
def test_the_masks_of_the_pass_under_the_deltas(form: str, early: bool) -> None:
    """Ascent steps draw their own; this pass has those of the first that the attack made itself."""
    model = toys.encoder(dropout=0.5)
    losses = []

    def loss_fn() -> eb.Evaluation:
        found = toys.classify(model, *toys.text_batch())()
        losses.append(found.losses.detach())  # type: ignore[union-attr]
        return found

    attack = eb.PGD(eps=0.0, step_size=0.1, steps=3)
    site = eb.Site(model.embedding)
    eb.AdversarialObjective(attack, site, form=form, early_backward=early)(loss_fn)
    masks = [next(i for i, x in enumerate(losses) if torch.equal(x, one)) for one in losses]
    assert masks == [*range(len(losses) - 1), 0 if form == "adversarial" else 1]


def test_weights_that_awp_perturbs_are_in_no_average() -> None:
    """The proximal point is that of the weights as they are trained, once for each call."""
    model = toys.encoder()
    tokens, labels = toys.text_batch()
    bregman = eb.Bregman(model, weight=0.5, momentum=0.5)
    inner = eb.AdversarialObjective(
        eb.SMARTStep(eps=0.05, sigma=0.02),
        eb.Site(model.embedding),
        form=eb.Smart(bregman=bregman),
    )
    objective = eb.AWP(inner, model, gamma=0.2)
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(3):
        with torch.no_grad():
            old = torch.func.functional_call(model, average, (tokens,))
        seen: list[torch.Tensor] = []
        with model.register_forward_hook(lambda m, a, out, seen=seen: seen.append(out.detach())):
            loss, metrics = objective(toys.classify(model, tokens, labels), mask=tokens != 0)
        clean = seen[-2]  # of the passes at w + v, the first of two
        torch.testing.assert_close(metrics["bregman"], eb.losses.symmetric_kl(clean, old).mean())
        average = {n: (average[n] + p.detach()) / 2 for n, p in model.named_parameters()}
        kept = bregman.state_dict().values()
        for one, expected in zip(kept, average.values(), strict=True):
            torch.testing.assert_close(one, expected)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("group", ["sample", "token"])
def test_strengths_of_groups_are_those_of_the_chosen_samples(group: Any, start: bool) -> None:
    """Where the chosen samples' pass has less padding than the batch, too."""
    model = toys.encoder()
    tokens, labels = toys.text_batch(batch=8)
    there = tokens != 0
    shape = (8, 1) if group == "sample" else tuple(tokens.shape)
    each = torch.rand(shape, dtype=torch.float64) + 0.5
    attack: eb.Attack = eb.FGM(eps=each.flatten())
    if start:  # of which only the size is known beforehand
        attack = eb.PGD(norm="linf", eps=9.0, steps=0, random_start=eb.BoxStart(each.flatten()))
    chosen: list[torch.Tensor] = []

    def some(rows: torch.Tensor) -> Any:
        chosen.append(rows)
        longest = int(there[rows].sum(1).max())
        return toys.classify(model, tokens[rows, :longest], labels[rows])

    seen: list[torch.Tensor] = []
    model.layer.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
    objective = eb.AdversarialObjective(
        attack, eb.Site(model.embedding, group=group), form=eb.Partial(0.25)
    )
    for _ in range(4):
        objective(toys.classify(model, tokens, labels), subset=some, samples=8, mask=there)
        deltas = (seen[-1] - model.embedding.weight[tokens].detach())[chosen[-1]]
        moved, expected = there[chosen[-1]], each[chosen[-1]]
        if start:
            size = deltas.abs().amax(-1)[moved]
            assert torch.all(size <= (expected * moved)[moved])
            assert torch.all(size > 0.2 * (expected * moved)[moved])
        else:
            norms = deltas.norm(dim=-1) if group == "token" else deltas.flatten(1).norm(dim=1)
            wanted = expected * moved if group == "token" else expected.flatten()
            torch.testing.assert_close(norms, wanted)
    assert any(there[rows].sum(1).max() < tokens.shape[1] for rows in chosen)


@pytest.mark.parametrize("rows", ["batch", "table"])
def test_strengths_of_rows_are_those_of_the_table(rows: Any) -> None:
    model, batch = toys.factors(), toys.triplets()
    each = torch.linspace(0.1, 1.2, 12, dtype=torch.float64)  # of the users
    site = eb.Site(model.user, scope="row", rows=rows)
    objective = eb.AdversarialObjective(eb.FGM(eps=each), site, form=eb.Partial(0.5))
    seen: list[torch.Tensor] = []
    model.user.register_forward_hook(lambda m, args, out: seen.append(out.detach()))

    def some(rows: torch.Tensor) -> Any:
        return toys.rank(model, tuple(part[rows] for part in batch))  # type: ignore[arg-type]

    if rows == "batch":
        with pytest.raises(ValueError, match=r"12 strengths, one for each row.*rows='table'"):
            objective(toys.rank(model, batch), subset=some, samples=9)
        return
    objective(toys.rank(model, batch), subset=some, samples=9)
    norms = (seen[-1] - model.user.weight[batch[0]].detach()).norm(dim=1)
    moved = norms > 0
    assert moved.sum() >= 5
    torch.testing.assert_close(norms[moved], each[batch[0]][moved])


def test_strengths_of_another_batch_are_refused() -> None:
    model = toys.encoder()
    tokens, labels = toys.text_batch()
    attack = eb.FGM(eps=torch.ones(5))
    objective = eb.AdversarialObjective(attack, eb.Site(model.embedding), form=eb.Partial(0.5))
    with pytest.raises(ValueError, match=r"5 strengths, one for each group, do not belong to .* 6"):
        objective(
            toys.classify(model, tokens, labels),
            subset=lambda rows: toys.classify(model, tokens[rows], labels[rows]),
            samples=6,
        )


@pytest.mark.parametrize("kind", ["eps_schedule", "lam_schedule", "steps_schedule", "schedule"])
def test_factors_of_schedules_are_checked(kind: str) -> None:
    """A negative one would train towards the perturbed losses."""
    model = toys.encoder()
    tokens, labels = toys.text_batch()

    def step(value: Any) -> torch.Tensor:
        torch.manual_seed(0)  # which samples are chosen
        schedule = {kind: lambda step: value}
        form = eb.Partial(1.0, **schedule) if kind == "schedule" else "mixed"  # type: ignore[arg-type]
        objective = eb.AdversarialObjective(
            eb.PGD(eps=0.3, steps=2),
            eb.Site(model.embedding),
            form=form,
            **({} if kind == "schedule" else schedule),  # type: ignore[arg-type]
        )
        return objective(
            toys.classify(model, tokens, labels),
            mask=tokens != 0,
            samples=6,
            subset=lambda rows: toys.classify(model, tokens[rows], labels[rows]),
        )[0]

    for wrong, kinds in ((-0.5, ValueError), (math.nan, ValueError), (None, TypeError)):
        with pytest.raises(kinds, match=f"factor of {kind} at step 0 must be"):
            step(wrong)
    for one in (torch.tensor(0.5), np.array(0.5), np.float32(0.5)):
        torch.testing.assert_close(step(one), step(0.5))
    for one in (False, np.False_, torch.tensor(False)):  # such as `lambda step: step % 4 == 0`
        torch.testing.assert_close(step(one), step(0.0))


def test_a_schedule_of_eps_and_lam_is_told_of_a_step_once() -> None:
    model = toys.encoder()
    tokens, _ = toys.text_batch()
    with torch.no_grad():
        predicted = model(tokens).argmax(1)
    schedule = eb.schedules.Adaptive(target=0.01, start=0.1, grow=0.1, every=2)
    objective = eb.AdversarialObjective(
        eb.FGM(eps=0.01), eb.Site(model.embedding), eps_schedule=schedule, lam_schedule=schedule
    )
    loss_fn = toys.classify(model, tokens, predicted)
    factors = []
    for _ in range(4):
        _, metrics = objective(loss_fn, criterion=eb.Misclassify(predicted))
        assert float(metrics["lam"]) == pytest.approx(float(metrics["eps_scale"]))
        factors.append(schedule(0))
    assert factors == pytest.approx([0.1, 0.2, 0.2, 0.3])


@pytest.mark.parametrize("wrapped", [False, True])
def test_an_evaluation_is_no_step(wrapped: bool) -> None:
    """It sees what a step would, and leaves the state of schedules, averages and choices alone."""
    model = toys.encoder()
    tokens, labels = toys.text_batch()
    site, loss_fn = eb.Site(model.embedding), toys.classify(model, tokens, labels)
    accuracy = eb.schedules.Adaptive(target=0.01, start=0.2, every=1)
    for form in (eb.Smart(bregman=eb.Bregman(model, momentum=0.5)), eb.Partial(choose="loss")):
        attack = eb.PGD(eps=0.3, steps=2, random_start=True)
        inner = eb.AdversarialObjective(attack, site, form=form, eps_schedule=accuracy)
        objective: Any = eb.AWP(inner, model, gamma=0.01) if wrapped else inner

        def step(objective: Any = objective) -> torch.Tensor:
            return objective(
                loss_fn,
                criterion=eb.Misclassify(labels),
                mask=tokens != 0,
                samples=range(6),
                subset=lambda rows: toys.classify(model, tokens[rows], labels[rows]),
            )[0]

        with torch.no_grad():  # before there is anything to keep, too
            step()
        assert "0" not in getattr(form, "bregman", form).state_dict()
        step().backward()
        with torch.no_grad():
            for p in model.parameters():
                p += 0.01
        before = objective.state_dict()
        with torch.no_grad():
            assert not step().requires_grad
        after = objective.state_dict()
        torch.testing.assert_close(after, before, rtol=0, atol=0)
        step()
        assert objective.step == before["step"] + 1 == 2
