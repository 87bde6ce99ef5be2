"""Options do what they say, or are refused: at construction, with the argument and the value."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable
from typing import Any

import embattle as eb
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import toys
from embattle import Evaluation, attacks, objectives
from torch import Tensor, nn


@pytest.mark.parametrize(
    ("kind", "options", "error", "words"),
    [
        (eb.PGD, {"eps": "0.3"}, TypeError, "eps must be a number.*'0.3'"),
        (eb.PGD, {"eps": None}, TypeError, "eps must be a number.*None"),
        (eb.PGD, {"eps": True}, TypeError, "eps must be a number.*True"),
        (eb.PGD, {"eps": -0.1}, ValueError, "eps must be at least 0, got -0.1"),
        (eb.PGD, {"eps": math.nan}, ValueError, "eps must be at least 0, got nan"),
        (eb.PGD, {"eps": torch.ones(2, 3)}, ValueError, r"eps must be one value.*\(2, 3\)"),
        (eb.PGD, {"eps": torch.ones(2, dtype=torch.int64)}, ValueError, "torch.int64"),
        (eb.PGD, {"eps": 1.0, "steps": 2.5}, TypeError, "steps must be an integer, got 2.5"),
        (eb.PGD, {"eps": 1.0, "steps": True}, TypeError, "steps must be an integer, got True"),
        (eb.PGD, {"eps": 1.0, "steps": -1}, ValueError, "steps must be at least 0, got -1"),
        (eb.PGD, {"eps": 1.0, "step_size": "a"}, TypeError, "step_size must be a number.*'a'"),
        (eb.PGD, {"eps": 1.0, "step_size": -1.0}, ValueError, "step_size.*got -1"),
        (eb.PGD, {"eps": 1.0, "step_size": math.inf}, ValueError, "step_size must be finite"),
        (eb.PGD, {"eps": math.inf}, ValueError, "eps=inf needs a step_size"),
        (eb.PGD, {"eps": 1.0, "restarts": 0}, ValueError, "restarts must be at least 1, got 0"),
        (eb.PGD, {"eps": 1.0, "restarts": 2}, ValueError, "restarts=2 needs random_start"),
        (eb.PGD, {"eps": 1.0, "random_start": 1}, TypeError, "random_start must be True or False"),
        (eb.PGD, {"eps": 1.0, "keep": "all"}, ValueError, "keep must be one of.*'all'"),
        (eb.PGD, {"eps": 1.0, "mode": "train"}, ValueError, "mode must be one of.*'train'"),
        (eb.PGD, {"eps": 1.0, "norm": "l3"}, ValueError, "norm must be.*'l3'"),
        (eb.PGD, {"eps": 1.0, "norm": 3}, ValueError, "norm must be.*3"),
        (eb.PGD, {"eps": 1.0, "norm": None}, ValueError, "norm must be.*None"),
        (eb.PGD, {"eps": 1.0, "generator": 7}, TypeError, "generator must be.*7"),
        (eb.PGD, {"eps": 1.0, "lower": "x"}, TypeError, "lower must be a number, got 'x'"),
        (eb.PGD, {"eps": 1.0, "lower": 1, "upper": 0}, ValueError, "lower=1 is above upper=0"),
        (eb.PGD, {"eps": 1.0, "top": 0}, ValueError, "top"),
        (eb.PGD, {"eps": 1.0, "max_groups": 1.5}, TypeError, "max_groups must be an integer"),
        (eb.PGD, {"eps": 1.0, "stop_when_fooled": 1}, TypeError, "stop_when_fooled must be True"),
        (eb.MIFGSM, {"eps": 1.0, "max_groups": 2}, ValueError, "max_groups=2.*use PGD"),
        (eb.MIFGSM, {"eps": 1.0, "decay": "1"}, TypeError, "decay must be a number"),
        (eb.FGM, {"eps": 1.0, "steps": 2}, ValueError, "makes one step, got 2; use PGD"),
        (eb.APGD, {"eps": math.inf}, ValueError, "APGD: eps must be finite"),
        (eb.APGD, {"eps": 1.0, "share": 2}, ValueError, "share must be in"),
        (eb.VAT, {"eps": 1.0, "xi": "small"}, TypeError, "xi must be a number"),
        (eb.VAT, {"eps": 1.0, "random_start": False}, ValueError, "from a random start"),
        (eb.VAT, {"eps": 1.0, "steps": 0}, ValueError, "steps must be at least 1"),
        (eb.VAT, {"eps": 1.0, "keep": "best"}, ValueError, "directions"),
        (eb.SMARTStep, {"random_start": False}, ValueError, "random_start=False"),
        (eb.SMARTStep, {"sigma": -1}, ValueError, "sigma must be at least 0"),
        (eb.SMARTStep, {"projection": "x"}, ValueError, "projection must be one of"),
        (eb.GaussianNoise, {"std": "x"}, TypeError, "std must be a number"),
        (eb.UniformNoise, {"eps": 1.0, "steps": 3}, ValueError, "makes no steps"),
        (eb.NEFTune, {"alpha": -1}, ValueError, "alpha must be at least 0"),
        (eb.NEFTune, {"eps": 1.0}, TypeError, "eps"),
        (eb.GaussianStart, {"std": "x"}, TypeError, "std must be a number"),
        (eb.BoxStart, {"size": -1.0}, ValueError, "size must be at least 0"),
        (eb.Relative, {"value": "x"}, TypeError, "value must be a number"),
        (eb.TokenSwap, {"swaps": 1.5}, TypeError, "swaps must be an integer"),
        (eb.TokenSwap, {"allowed": [True]}, TypeError, "allowed must be a tensor of dtype bool"),
    ],
)
def test_arguments_are_checked_at_construction(
    kind: type, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        kind(**options)


def test_numbers_of_numpy_are_numbers() -> None:
    attack = eb.PGD(eps=np.float32(0.5), steps=np.int64(3), step_size=np.float64(0.2), norm=np.inf)
    assert attack == eb.PGD(eps=0.5, steps=3, step_size=0.2, norm="linf")


def test_what_run_takes_is_checked() -> None:
    model = toys.encoder()
    tokens, labels = toys.text_batch()
    site, loss = eb.Site(model.embedding), toys.classify(model, tokens, labels)
    attack = eb.FGM(eps=0.5)
    with pytest.raises(TypeError, match=r"write embattle.Evaluation\(losses, outputs\)"):
        attack.run(lambda: (loss().losses, loss().outputs), site)  # type: ignore[arg-type,return-value]
    with pytest.raises(TypeError, match=r"criterion must be an embattle.Criterion.*Tensor"):
        attack.run(loss, site, criterion=labels)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"sites must be an embattle.Site.*Embedding"):
        attack.run(loss, model.embedding)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the same site is given twice"):
        attack.run(loss, [site, site])
    with pytest.raises(ValueError, match=r"one loss per sample.*\(6, 3\)"):
        attack.run(lambda: model(tokens), site)
    with pytest.raises(TypeError, match=r"outputs must be a tensor, got dict; give .*logits"):
        attack.run(lambda: eb.Evaluation(outputs={"logits": model(tokens)}), site)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="loss_fn must be a function"):
        attack.run(loss(), site)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Diverge.*no gradient at zero.*GaussianStart"):
        attack.run(loss, site, criterion=eb.Diverge())
    leaving = eb.PGD(eps=0.5, stop_when_fooled=True)
    with pytest.raises(ValueError, match=r"needs the loss function of the samples.*subset"):
        leaving.run(loss, site, criterion=eb.Misclassify(labels))


# --- boxes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["l2", "linf", "l1"])
@pytest.mark.parametrize(
    "attack",
    [
        lambda **o: eb.PGD(steps=4, random_start=True, **o),
        lambda **o: eb.PGD(steps=4, keep="best", **o),
        lambda **o: eb.PGD(steps=2, random_start=eb.BoxStart(0.3), **o),
        lambda **o: eb.PGD(steps=2, random_start=eb.GaussianStart(0.3), **o),
        lambda **o: eb.APGD(steps=6, **o),
        lambda **o: eb.MIFGSM(steps=3, **o),
        lambda **o: eb.UniformNoise(**o),
        lambda **o: eb.GaussianNoise(std=0.4, **o),
        lambda **o: eb.VAT(**(o | {"norm": "l2"})),
        lambda **o: eb.SMARTStep(step_size=5.0, **o),
        lambda **o: eb.SMARTStep(step_size=5.0, projection="code", **o),
        lambda **o: eb.MSAP(steps=3, projection="box", **(o | {"norm": "l2"})),
    ],
)
def test_boxes(attack: Callable[..., eb.attacks.Attack], norm: str) -> None:
    """Perturbed embeddings lie in the box; those outside already go no further."""
    model = toys.encoder()
    tokens, labels = toys.text_batch()
    upper = torch.full((8,), 0.9, dtype=torch.float64)
    made = attack(eps=0.8, norm=norm, lower=-0.8, upper=upper)
    result = made.run(toys.classify(model, tokens, labels), eb.Site(model.embedding))
    base = model.embedding(tokens).detach()
    perturbed = base + result.delta
    assert torch.all(perturbed <= torch.maximum(base, upper) + 1e-12)
    assert torch.all(perturbed >= base.clamp(max=-0.8) - 1e-12)
    assert result.delta.abs().sum() > 0
    assert "inside a box" in repr(made)


# --- attacks --------------------------------------------------------------------------------------


def test_smart_keeps_the_delta_where_a_gradient_is_no_number() -> None:
    torch.manual_seed(0)
    table, head = nn.Embedding(9, 4).double(), nn.Linear(4, 3).double()
    tokens = torch.randint(0, 9, (5, 2))

    def loss() -> Evaluation:
        logits = head(table(tokens).mean(1))
        logits = logits.index_put((torch.tensor(2),), logits[2] * torch.nan)
        return Evaluation(outputs=logits)

    attack = eb.SMARTStep(step_size=1.0, sigma=0.1, eps=0.2)
    result = attack.run(loss, eb.Site(table))
    assert torch.all(result.delta.isfinite())
    assert int(result.nonfinite) == 1
    assert torch.all(result.delta.abs() <= 0.2 + 1e-12)


@pytest.mark.parametrize("start", [eb.BoxStart(0.05), eb.GaussianStart(0.5)])
def test_smart_starts_where_it_is_told_to(start: Any) -> None:
    model = toys.encoder()
    tokens, labels = toys.text_batch()
    attack = eb.SMARTStep(random_start=start, eps=1.0, step_size=0.0, norm="linf")
    delta = attack.run(toys.classify(model, tokens, labels), eb.Site(model.embedding)).delta
    assert 0.02 < delta.abs().max() <= 1.0


def test_smart_as_its_code_is_scaled_with_a_schedule() -> None:
    model = toys.encoder()
    tokens, labels = toys.text_batch()
    attack = eb.SMARTStep(projection="code")
    loss, site = toys.classify(model, tokens, labels), eb.Site(model.embedding)
    assert float(attack.run(loss, site, scale=0.0).delta.abs().max()) == 0
    assert float(attack.run(loss, site, scale=0.5).delta.abs().max()) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("given", "group"), [("mask", "sample"), ("mask", "token"), ("offsets", "sample")]
)
def test_neftune_counts_the_tokens_of_the_sample(given: str, group: str) -> None:
    torch.manual_seed(0)
    table = nn.Embedding(50, 8).double()
    lengths = torch.tensor([3, 9, 6])
    tokens = torch.randint(0, 50, (3, 9))
    site = eb.Site(table, group=group)  # type: ignore[arg-type]
    if given == "mask":
        mask = torch.arange(9) < lengths[:, None]
        delta = eb.NEFTune(alpha=5).run(lambda: table(tokens).sum((1, 2)), site, mask=mask).delta
        largest = delta.abs().flatten(1).amax(1)
    else:
        flat = tokens.flatten()[:18]
        offsets = torch.tensor([0, 3, 12, 18])
        delta = (
            eb.NEFTune(alpha=5)
            .run(
                lambda: torch.stack([x.sum() for x in table(flat).split([3, 9, 6])]),
                site,
                offsets=offsets,
            )
            .delta
        )
        largest = torch.stack([x.abs().max() for x in delta.split([3, 9, 6])])
    bound = 5 / (lengths * 8).double().sqrt()
    assert torch.all(largest <= bound)
    assert torch.all(largest > 0.8 * bound)


# --- objectives -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["free", "freeat"])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "eval"}, "mode='eval'"),
        ({"restarts": 2, "random_start": True}, "restarts=2"),
        ({"keep": "best"}, "keep='best'"),
    ],
)
def test_forms_refuse_what_they_would_pass_over(form: str, options: dict, words: str) -> None:
    model = toys.encoder()
    site = eb.Site(model.embedding, model=model)
    with pytest.raises(ValueError, match=f"form '{form}'.*{words}"):
        eb.AdversarialObjective(eb.PGD(eps=1.0, **options), site, form=form)


def test_objectives_refuse_early_leaving_and_wrong_types() -> None:
    site = eb.Site(nn.Embedding(3, 2))
    with pytest.raises(ValueError, match=r"stop_when_fooled=True.*masking"):
        eb.AdversarialObjective(eb.PGD(eps=1.0, stop_when_fooled=True), site)
    with pytest.raises(TypeError, match="attack must be an Attack"):
        eb.AdversarialObjective("pgd", site)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="lam must be a number, got '1'"):
        eb.AdversarialObjective(eb.FGM(eps=1.0), site, lam="1")  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["mixed", "adversarial", "free"])
@pytest.mark.parametrize("early", [True, False])
def test_a_custom_attack_gets_each_samples_own_gradient(form: str, early: bool) -> None:
    """Raw-gradient steps: nothing is averaged over the batch, whoever makes the pass."""
    model = toys.encoder()
    tokens, labels = toys.text_batch()
    loss = toys.classify(model, tokens, labels)
    seen: list[Tensor] = []

    class Raw(eb.attacks.Attack):
        def step(self, perturbation: Any, grad: Tensor, *rest: Any) -> None:
            seen.append(grad.clone())
            perturbation.set(perturbation.delta.detach() + 0.1 * grad)

    site = eb.Site(model.embedding)
    Raw(eps=1.0, steps=2).run(loss, site, evaluate=False)
    expected = list(seen)
    seen.clear()
    objective = eb.AdversarialObjective(
        Raw(eps=1.0, steps=3 if form == "free" else 2), site, form=form, early_backward=early
    )
    objective(loss)
    assert len(seen) == 2
    for got, right in zip(seen, expected, strict=True):
        torch.testing.assert_close(got, right)


class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 6).double()
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(6, 3).double()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.dropout(self.embedding(tokens).mean(1)))


@pytest.mark.parametrize("form", ["trades", "smart", "vat"])
def test_divergences_are_measured_in_the_mode_of_the_attack(form: str) -> None:
    """In eval mode the clean outputs are those of eval mode: at delta 0 nothing diverges."""
    torch.manual_seed(0)
    model = Dropped().train()
    tokens, labels = torch.randint(0, 20, (6, 3)), torch.randint(0, 3, (6,))
    values: list[Tensor] = []

    class Still(eb.PGD):
        def step(self, perturbation: Any, grad: Tensor, state: Any, number: int, v: Tensor) -> None:
            values.append(v)

    attack = Still(eps=0.0, step_size=0.1, steps=2, random_start=True, mode="eval")
    site = eb.Site(model.embedding, model=model)
    objective = eb.AdversarialObjective(attack, site, form=form)
    objective(toys.classify(model, tokens, labels))
    assert len(values) == 2
    for value in values:
        torch.testing.assert_close(value, torch.zeros_like(value))


def test_free_training_projects_the_deltas_that_it_takes_over() -> None:
    model = toys.encoder()
    tokens, labels = toys.text_batch()
    other = tokens.roll(1, 0)
    objective = eb.AdversarialObjective(
        eb.FGSM(eps=0.5), eb.Site(model.embedding), form="freeat",
        eps_schedule=lambda step: [1.0, 0.1][step],
    )  # fmt: skip
    objective(toys.classify(model, tokens, labels))
    assert torch.all(objective.form.deltas[0].abs() <= 0.5)
    seen: list[Tensor] = []
    handle = model.embedding.register_forward_hook(lambda m, a, out: seen.append(out.detach()))
    objective(toys.classify(model, other, labels))
    handle.remove()
    clean = model.embedding(other).detach()
    moved = (seen[0] - clean).abs()
    assert torch.all(moved[other == 0] == 0)
    assert 0.04 < moved.max() <= 0.05 + 1e-12


def test_a_resumed_objective_goes_on_as_if_nothing_had_happened() -> None:
    tokens, labels = toys.text_batch()

    def build() -> tuple[nn.Module, list[eb.AdversarialObjective]]:
        model = toys.encoder()
        site = eb.Site(model.embedding)
        bregman = eb.Bregman(model, momentum=0.5)
        attack = eb.SMARTStep(generator=torch.Generator().manual_seed(3), sigma=0.1, eps=1.0)
        smart = eb.AdversarialObjective(attack, site, form=eb.Smart(bregman=bregman))
        free = eb.AdversarialObjective(eb.FGSM(eps=0.2), site, form="freeat")
        return model, [smart, free]

    def train(model: nn.Module, objectives: list[Any], steps: int) -> list[float]:
        optimizer, losses = torch.optim.SGD(model.parameters(), 0.5), []
        for _ in range(steps):
            for objective in objectives:
                optimizer.zero_grad()
                loss, _ = objective(toys.classify(model, tokens, labels))
                loss.backward()
                optimizer.step()
                losses.append(float(loss.detach()))
        return losses

    model, objectives = build()
    train(model, objectives, 3)
    states = [objective.state_dict() for objective in objectives]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    expected = train(model, objectives, 3)
    other, resumed = build()
    other.load_state_dict(weights)
    for objective, state in zip(resumed, states, strict=True):
        objective.load_state_dict(state)
    assert train(other, resumed, 3) == expected


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 6)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 3))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.embedding(tokens).mean(1)))


@pytest.mark.parametrize("wrapped", ["plain", "awp", "bregman"])
def test_an_objective_counts_its_training_passes_alone(wrapped: str) -> None:
    """Batch norms see the clean and the perturbed pass, no pass at other weights."""
    torch.manual_seed(0)
    model = Normed()
    tokens, labels = torch.randint(0, 20, (8, 3)), torch.randint(0, 3, (8,))
    site = eb.Site(model.embedding, model=model)
    if wrapped == "bregman":
        form = eb.Smart(bregman=eb.Bregman(model))
        objective: Any = eb.AdversarialObjective(eb.SMARTStep(), site, form=form)
    else:
        objective = eb.AdversarialObjective(eb.PGD(eps=0.5, steps=3), site)
    if wrapped == "awp":
        objective = eb.AWP(objective, model, gamma=0.01)
    loss, _ = objective(toys.classify(model, tokens, labels))
    assert int(model.norm.num_batches_tracked) == 2
    loss.backward()


@pytest.mark.parametrize("given", ["losses", "outputs"])
def test_vat_without_labels(given: str) -> None:
    """The divergence alone: its value and gradient are those of the KL at the same delta."""
    torch.manual_seed(0)
    model = toys.encoder()
    tokens, labels = toys.text_batch()

    def loss() -> Evaluation:
        logits = model(tokens)
        if given == "outputs":
            return Evaluation(outputs=logits)
        return Evaluation(F.cross_entropy(logits, labels, reduction="none"), logits)

    attack = eb.VAT(eps=1.0, generator=torch.Generator().manual_seed(1))
    objective = eb.AdversarialObjective(attack, eb.Site(model.embedding), form="vat", lam=2.0)
    total, metrics = objective(loss)
    total.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    attack = eb.VAT(eps=1.0, generator=torch.Generator().manual_seed(1))
    result = attack.run(loss, eb.Site(model.embedding))
    clean = model(tokens)
    with result.applied():
        moved = model(tokens)
    expected = 2 * eb.losses.kl(clean.detach(), moved).mean()
    if given == "losses":
        expected = expected + F.cross_entropy(clean, labels)
    torch.testing.assert_close(total.detach(), expected.detach())
    expected.backward()
    for got, parameter in zip(grads, model.parameters(), strict=True):
        torch.testing.assert_close(got, parameter.grad)
    assert ("clean_loss" in metrics) == (given == "losses")


@pytest.mark.parametrize("kind", ["awp", "bregman"])
def test_weights_that_change_inside_autocast_are_seen(kind: str) -> None:
    torch.manual_seed(0)
    model = toys.Encoder()
    tokens, labels = toys.text_batch()
    loss = toys.classify(model, tokens, labels)
    site = eb.Site(model.embedding)

    def value(autocast: bool) -> float:
        if kind == "awp":
            inner = eb.AdversarialObjective(eb.FGM(eps=0.5), site)
            objective: Any = eb.AWP(inner, model, gamma=0.5)
        else:
            form = eb.Smart(bregman=eb.Bregman(model, weight=50.0, momentum=0.9))
            attack = eb.SMARTStep(generator=torch.Generator().manual_seed(0))
            objective = eb.AdversarialObjective(attack, site, form=form)
        before = [p.detach().clone() for p in model.parameters()]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            if kind == "bregman":
                objective(loss)
                with torch.no_grad():
                    for p in model.parameters():
                        p.add_(0.3 * torch.ones_like(p).cumsum(0).sin())
                torch.clear_autocast_cache()
            total, _ = objective(loss)
        with torch.no_grad():
            for p, old in zip(model.parameters(), before, strict=True):
                p.copy_(old)
        return float(total.detach())

    exact = value(False)
    assert value(True) == pytest.approx(exact, rel=0.05)


def test_an_attack_and_a_training_pass_in_one_autocast_block() -> None:
    torch.manual_seed(0)
    model = toys.Encoder()
    tokens, labels = toys.text_batch()
    loss = toys.classify(model, tokens, labels)
    site = eb.Site(model.embedding, model=model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = eb.PGD(eps=0.5, steps=2).run(loss, site)
        with result.applied():
            total = loss().losses.mean()
    total.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.head.parameters())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_attacks_run_where_gradients_are_off(context: Any) -> None:
    model = toys.encoder()
    tokens, labels = toys.text_batch()
    attack = eb.PGD(eps=0.5, steps=3, keep="best")
    expected = attack.run(toys.classify(model, tokens, labels), eb.Site(model.embedding))
    with context():
        inside, known = tokens.clone(), labels.clone()
        result = attack.run(
            toys.classify(model, inside, known),
            eb.Site(model.embedding),
            criterion=eb.Misclassify(known),
        )
        again = result.evaluate(toys.classify(model, inside, known))
    torch.testing.assert_close(result.losses, expected.losses)
    torch.testing.assert_close(again.losses.clone(), expected.losses)


def test_noise_that_bfloat16_rounds_away_is_warned_of_in_training() -> None:
    model = toys.Encoder().bfloat16()
    tokens, labels = toys.text_batch()
    noise = eb.UniformNoise(norm="linf", eps=1e-5)
    objective = eb.AdversarialObjective(noise, eb.Site(model.embedding), form="r3f")
    with pytest.warns(eb.attacks.AttackWarning, match="bfloat16, which rounds"):
        objective(toys.classify(model, tokens, labels))


# --- directions, boxes, integers of 32 bits -------------------------------------------------------


def test_samples_do_not_leave_with_a_direction() -> None:
    """VAT's iterates are of length xi: one that fools is no perturbation of length eps."""
    with pytest.raises(ValueError, match="VAT: stop_when_fooled=True has no meaning"):
        eb.VAT(eps=0.5, stop_when_fooled=True)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"lower": torch.ones(4), "upper": torch.tensor([2.0, 2.0, 2.0, 0.5])}, "lower.*is above"),
        ({"lower": 1.0, "upper": torch.zeros(4)}, "lower=1 is above upper"),
        ({"upper": torch.tensor(float("nan"))}, "upper must be numbers, none of them NaN"),
        ({"lower": torch.ones(4, dtype=torch.bool)}, r"lower must be numbers.*torch.bool"),
    ],
)
def test_boxes_are_checked(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        eb.PGD(eps=1.0, **options)


def test_boxes_that_do_not_fit_say_so() -> None:
    model = toys.encoder()
    tokens, labels = toys.text_batch()
    loss, site = toys.classify(model, tokens, labels), eb.Site(model.embedding)
    with pytest.raises(ValueError, match=r"lower of shape \(5,\) does not broadcast.*\(6, 7, 8\)"):
        eb.PGD(eps=1.0, lower=torch.zeros(5)).run(loss, site)
    with pytest.raises(ValueError, match="joint: one upper for all outputs: give a number"):
        eb.PGD(eps=1.0, upper=torch.zeros(8)).run(loss, site, joint=True)
    one = eb.PGD(eps=1.0, lower=-0.2, steps=2).run(loss, site)
    other = eb.PGD(eps=1.0, lower=torch.full((8,), -0.2, dtype=torch.float64), steps=2).run(
        loss, site
    )
    assert torch.equal(one.delta, other.delta)


def test_rows_of_indices_of_32_bits() -> None:
    model = toys.encoder()
    tokens, labels = toys.text_batch()
    site = eb.Site(model.embedding, scope="row")
    attack = eb.PGD(eps=0.5, steps=2, keep="best")
    short = attack.run(toys.classify(model, tokens.int(), labels), site)
    long = attack.run(toys.classify(model, tokens, labels), site)
    assert torch.equal(short.delta, long.delta)
    assert torch.equal(short.losses, long.losses)


# --- defaults -------------------------------------------------------------------------------------

_BALL = {
    "norm": "l2", "steps": 1, "random_start": False, "restarts": 1, "keep": "last", "lower": None,
    "upper": None, "stop_when_fooled": False, "mode": "as_is", "generator": None, "compile": False,
}  # fmt: skip
_PGD = _BALL | {"steps": 10, "step_size": None, "top": 1, "max_groups": None}
_NOISE = _BALL | {"steps": 0, "random_start": True}
_BATCH = {"criterion": None, "mask": None, "offsets": None, "joint": False}
_OBJECTIVE = _BATCH | {"samples": None, "subset": None}
_SITE = {
    "group": "sample", "scope": "output", "rows": "batch", "model": None, "samples": 0,
    "per_sample": 1, "mask": None, "offsets": None, "key": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        (eb.PGD, _PGD),
        (eb.FGM, _PGD | {"steps": 1}),
        (eb.FGSM, _PGD | {"steps": 1, "norm": "linf"}),
        (eb.MSAP, _PGD | {"projection": "ball"}),
        (eb.MIFGSM, _PGD | {"norm": "linf", "decay": 1.0}),
        (
            eb.APGD,
            _BALL
            | {"steps": 20, "random_start": True, "keep": "best", "momentum": 0.75, "share": 0.75}
            | {"checkpoints": "paper"},
        ),
        (eb.VAT, _BALL | {"random_start": True, "xi": 0.1}),
        (
            eb.SMARTStep,
            _BALL
            | {"norm": "linf", "eps": 1e-5, "random_start": True, "step_size": 1e-3}
            | {"sigma": 1e-5, "projection": "paper"},
        ),
        (eb.GaussianNoise, _NOISE | {"eps": math.inf}),
        (eb.UniformNoise, _NOISE),
        (attacks.Attack.run, _BATCH | {"scale": 1.0, "subset": None, "evaluate": True}),
        (eb.AdversarialObjective.__call__, _OBJECTIVE),
        (eb.AdversarialObjective.parts, _OBJECTIVE),
        (eb.AdversarialObjective.batch, _OBJECTIVE),
        (eb.AWP.__call__, _OBJECTIVE),
        (
            eb.Partial,
            {"share": 0.5, "choose": "random", "delay": 0, "schedule": None, "every": 1},
        ),
        (eb.AWP, {"gamma": 0.01, "delay": 0}),
        (eb.StaggeredReplays, {"visits": 2, "share": 1.0}),
        (
            eb.StaggeredBatches,
            {"visits": 2, "seed": 0, "share": 1.0, "lengths": None, "rank": 0, "ranks": 1},
        ),
        (eb.Bregman, {"weight": 1.0, "momentum": 0.99}),
        (
            eb.AdversarialObjective,
            {"form": "mixed", "lam": 1.0, "masking": None, "eps_schedule": None}
            | {"lam_schedule": None, "steps_schedule": None, "early_backward": True}
            | {"compile": False},
        ),
        (eb.Site, _SITE),
        (eb.Site.weight, {"name": "weight", "group": "row", "model": None}),
        (eb.Relative, {"to": "mean_norm"}),
        (eb.Misclassify, {"ignore_index": -100, "ascend": "loss"}),
        (eb.Target, {"ascend": "cross_entropy", "ignore_index": -100}),
        (eb.MultiLabel, {"threshold": 0.5, "ascend": "loss", "ignore_index": -100}),
        (eb.Deviate, {"ascend": "loss"}),
        (eb.Diverge, {"divergence": "kl"}),
    ],
)
def test_defaults(what: Any, expected: dict[str, Any]) -> None:
    parameters = inspect.signature(what).parameters.values()
    found = {p.name: p.default for p in parameters if p.default is not p.empty}
    assert found == expected


def test_neftunes_default_is_the_papers_smallest() -> None:
    assert eb.NEFTune().alpha == 5.0
    assert eb.NEFTune().norm == "linf"


@pytest.mark.parametrize("form", ["Trades", "Vat", "Mart", "Alp", "R3F"])
def test_forms_are_values(form: str) -> None:
    make = getattr(objectives, form)
    assert make() == make()
    assert hash(make()) == hash(make())
    with pytest.raises(dataclasses.FrozenInstanceError):
        make().anything = 1


def test_infinite_bounds_are_no_box() -> None:
    model = toys.encoder()
    tokens, labels = toys.text_batch()
    loss, site = toys.classify(model, tokens, labels), eb.Site(model.embedding)
    free = eb.PGD(eps=1.0, steps=2).run(loss, site)
    boxed = eb.PGD(eps=1.0, steps=2, lower=-math.inf, upper=math.inf).run(loss, site)
    torch.testing.assert_close(boxed.delta, free.delta)


@pytest.mark.parametrize(
    "eps",
    [
        eb.Relative(0.1),
        eb.Relative(0.1, to="group_norm"),
        eb.PerDim(2.0),
        torch.tensor(0.4),
        torch.full((6,), 0.4),
        0.4,
    ],
)
def test_a_scale_multiplies_every_kind_of_strength(eps: Any) -> None:
    model = toys.encoder()
    tokens, labels = toys.text_batch()
    loss, site = toys.classify(model, tokens, labels), eb.Site(model.embedding)
    whole = eb.FGM(eps=eps).run(loss, site).norms[0]
    half = eb.FGM(eps=eps).run(loss, site, scale=0.5).norms[0]
    torch.testing.assert_close(half, whole / 2)
    assert torch.all(whole > 0)
    for factor in (1.0, 0.5):
        ours = eb.PGD(eps=100.0, step_size=eps, steps=1).run(loss, site, scale=factor)
        torch.testing.assert_close(ours.norms[0], factor * whole)


@pytest.mark.parametrize("kind", [eb.FGM, eb.FGSM])
def test_one_step_attacks_step_by_eps_from_wherever_they_start(kind: Any) -> None:
    model = toys.encoder()
    tokens, labels = toys.text_batch()
    loss, site = toys.classify(model, tokens, labels), eb.Site(model.embedding)

    def found(**options: Any) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        attack = kind(eps=0.7, random_start=True, generator=generator, **options)
        return attack.run(loss, site, evaluate=False).delta

    assert torch.equal(found(), found(step_size=0.7))
    assert not torch.allclose(found(), found(step_size=1.75))


@pytest.mark.parametrize(
    "make",
    [
        eb.PGD, eb.FGM, eb.FGSM, eb.MSAP, eb.MIFGSM, eb.APGD, eb.VAT, eb.SMARTStep,
        eb.UniformNoise, lambda **given: eb.GaussianNoise(std=1.0, **given),
    ],
)  # fmt: skip
def test_every_attack_checks_what_all_have(make: Any) -> None:
    with pytest.raises(ValueError, match="eps must be at least 0, got -1"):
        make(eps=-1)
    with pytest.raises(ValueError, match="mode must be one of"):
        make(eps=1.0, mode="train")
    with pytest.raises(ValueError, match="restarts must be at least 1"):
        make(eps=1.0, restarts=0)


def test_neftune_checks_what_all_attacks_have() -> None:
    with pytest.raises(ValueError, match="mode must be one of"):
        eb.NEFTune(mode="train")  # type: ignore[arg-type]


def test_numbers_are_no_flags_and_words_no_numbers() -> None:
    with pytest.raises(TypeError, match=r"PGD: eps must be a number, a tensor \[groups\].*'0.3'"):
        eb.PGD(eps="0.3")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"PGD: eps must be a number, a tensor \[groups\].*True"):
        eb.PGD(eps=True)
    with pytest.raises(ValueError, match="ignore_index"):
        eb.Misclassify(torch.zeros(2, dtype=torch.long), ignore_index=-(2**63) - 1)
    eb.Misclassify(torch.zeros(2, dtype=torch.long), ignore_index=-(2**63))


def test_starts_are_values() -> None:
    for make in (eb.GaussianStart, eb.BoxStart):
        start = make(0.1)
        assert start == make(0.1)
        with pytest.raises(dataclasses.FrozenInstanceError):
            start.std = 1.0  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        eb.Relative(0.1).value = 0.2  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        eb.PerDim(0.1).value = 0.2  # type: ignore[misc]


def test_criteria_say_what_they_need() -> None:
    for kind in (
        eb.Misclassify,
        eb.Target,
        eb.MultiLabel,
        eb.Deviate,
        eb.Promote,
        eb.Demote,
        eb.Outrank,
    ):
        assert kind.needs_outputs
        assert not kind.needs_clean
    assert eb.Diverge.needs_outputs
    assert eb.Diverge.needs_clean
    assert not eb.MaximizeLoss.needs_outputs
    assert not eb.MaximizeLoss.needs_clean
