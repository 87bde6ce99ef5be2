"""The monitor tells each known failure, once, and only when it is there."""

from __future__ import annotations

import warnings

import embattle as eb
import pytest
import torch
import toys
from embattle.objectives.monitor import Monitor, RobustTrainingWarning
from torch import Tensor, nn


def test_collapse_and_inflation() -> None:
    table = nn.Embedding(10, 4)
    monitor = Monitor(sites=eb.Site(table))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert monitor.check_tables() == []
        assert monitor.check_tables() == []
    start = table.weight.detach().clone()
    with torch.no_grad():
        table.weight.copy_(0.1 * start)
    with pytest.warns(RobustTrainingWarning, match="collapse"):
        assert len(monitor.check_tables()) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(monitor.check_tables()) == 1  # told once
    with torch.no_grad():
        table.weight.copy_(3 * start)
    with pytest.warns(RobustTrainingWarning, match="Relative"):
        monitor.check_tables()


def test_every_table_is_watched_and_named() -> None:
    """Those of all modules of a site, after a site that has none."""
    users, items = nn.Embedding(5, 4), nn.Embedding(7, 4)
    monitor = Monitor(sites=[eb.Site(nn.ReLU()), eb.Site([users, items])])
    monitor.check_tables()
    with torch.no_grad():
        items.weight.mul_(0.1)
    with pytest.warns(RobustTrainingWarning, match=r"Embedding.*table \(7, 4\).*collapse"):
        assert len(monitor.check_tables()) == 1
    with torch.no_grad():
        users.weight.mul_(3)
    with pytest.warns(RobustTrainingWarning, match=r"Embedding.*table \(5, 4\).*Relative"):
        assert len(monitor.check_tables()) == 2


def test_all_tables_of_a_site_are_looked_at() -> None:
    model = toys.factors()
    model.position = nn.Parameter(torch.ones(3, 4))
    sites = [eb.Site.embeddings(model), eb.Site.weight(model, "position")]
    monitor = Monitor(sites=sites)
    assert monitor.check_tables() == []
    with torch.no_grad():
        model.item.weight.mul_(0.1)
        model.position.mul_(0.1)
    with pytest.warns(RobustTrainingWarning):
        found = monitor.check_tables()
    assert len(found) == 2
    assert str(tuple(model.item.weight.shape)) in found[0]


def test_vanishing_gradients() -> None:
    monitor = Monitor(sites=eb.Site(nn.Embedding(3, 2)), window=3)

    def metrics(gain: float, scale: float = 1.0) -> dict[str, Tensor]:
        return {
            "clean_loss": torch.tensor(0.5),
            "adversarial_loss": torch.tensor(0.5 + gain),
            "eps_scale": torch.tensor(scale),
        }

    for _ in range(6):
        assert monitor.update(metrics(0.2)) == []
        assert monitor.update(metrics(0.0, scale=0.0)) == []
    monitor.update(metrics(0.0))
    monitor.update(metrics(0.0))
    with pytest.warns(RobustTrainingWarning, match="vanish"):
        monitor.update(metrics(0.0))


# --- trainings that fail, and healthy ones -------------------------------------------------------


class Hidden(nn.Module):
    """Two layers on embeddings that are given: `features` is the site."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.features = nn.Identity()
        self.layers = nn.Sequential(
            nn.Linear(dim, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)
        )

    def forward(self, values: Tensor) -> Tensor:
        return self.layers(self.features(values))


def data(count: int, dim: int) -> tuple[Tensor, Tensor]:
    """Classes that many weak features tell apart, and one strong one, right in nine of ten."""
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (count,), generator=g)
    sign = 2.0 * labels - 1
    right = torch.where(torch.rand(count, generator=g) < 0.9, sign, -sign)
    weak = 0.2 * sign[:, None] + torch.randn(count, dim - 1, generator=g)
    return torch.cat([right[:, None], weak], 1), labels


class Carried:
    """The fault of carrying each sample's delta from epoch to epoch, never found afresh."""

    name = "carried"

    def __init__(self) -> None:
        self.kept: dict[int, Tensor] = {}

    def __call__(self, batch: eb.objectives.Batch) -> Tensor:
        attacked, attack = batch.attacked, batch.attack
        samples: list[int] = list(batch.samples)  # type: ignore[arg-type]
        recorded = attacked.record(attach=True)
        (own,) = attacked.perturbations
        known = [self.kept.get(s, torch.zeros_like(own.base[0])) for s in samples]
        batch.report("clean", recorded.evaluation)
        own.set(torch.stack(known))
        evaluation = attacked.evaluate(grad=True)
        attacked.clear()
        batch.report("adversarial", evaluation)
        losses = batch.losses(evaluation)
        (grad,) = torch.autograd.grad(losses.sum(), own.delta, retain_graph=True)
        attack.step(own, grad, attack.begin(own, 1.0), 0, losses.detach())
        self.kept.update(zip(samples, own.delta.detach().clone(), strict=True))
        return losses.mean()


def watched(
    form: object, attack: eb.Attack, *, dim: int = 50, rate: float = 3e-3, epochs: int = 12
) -> list[str]:
    """Train on 500 samples; the kinds of what the monitor said."""
    torch.manual_seed(0)
    values, labels = data(700, dim)
    model = Hidden(dim)
    site = eb.Site(model.features)
    objective = eb.AdversarialObjective(attack, site, form=form)  # type: ignore[arg-type]
    monitor = Monitor(sites=site, window=25, every=50)
    optimizer = torch.optim.Adam(model.parameters(), rate)
    visits = 2 if isinstance(form, eb.StaggeredReplays) else 1
    said: list[str] = []
    for epoch in range(epochs // visits):
        for samples in eb.StaggeredBatches(500, 50, visits).batches(epoch):
            x, y = values[samples], labels[samples]
            optimizer.zero_grad()
            loss, metrics = objective(
                toys.classify(model, x, y),
                samples=samples,
                criterion=eb.Misclassify(y),
                subset=lambda rows, x=x, y=y: toys.classify(model, x[rows], y[rows]),
            )
            loss.backward()
            optimizer.step()
            said += monitor.update(metrics)
            if monitor.due:
                for check, part in (
                    (monitor.check_held, slice(500, 600)),
                    (monitor.check_training, slice(0, 100)),
                ):
                    said += check(
                        toys.classify(model, values[part], labels[part]),
                        criterion=eb.Misclassify(labels[part]),
                        attack=attack,
                    )
    return sorted({one.split(":")[0] for one in said})


@pytest.mark.filterwarnings("ignore::embattle.RobustTrainingWarning")
def test_carried_deltas_leak_the_labels() -> None:
    said = watched(Carried(), eb.FGSM(eps=0.5), epochs=20)
    assert "label leakage" in said


@pytest.mark.filterwarnings("ignore::embattle.RobustTrainingWarning")
@pytest.mark.filterwarnings("ignore::embattle.AttackWarning")
def test_one_large_step_overfits_catastrophically() -> None:
    said = watched("adversarial", eb.FGSM(eps=1.0), epochs=18, rate=1e-2)
    assert "catastrophic overfitting" in said


@pytest.mark.parametrize(
    ("form", "attack"),
    [
        ("mixed", eb.PGD(norm="linf", eps=0.15, steps=3)),
        (eb.Partial(0.5), eb.FGSM(eps=0.15)),
        (eb.StaggeredReplays(2), eb.FGSM(eps=0.15)),
    ],
    ids=str,
)
def test_healthy_trainings_are_silent(form: object, attack: eb.Attack) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        said = watched(form, attack)
    assert said == []


def test_checks_leave_random_numbers_alone() -> None:
    model = Hidden(4)
    values, labels = data(8, 4)
    generator = torch.Generator(device="cpu").manual_seed(3)
    attack = eb.FGSM(eps=0.1, random_start=True, generator=generator)
    before = torch.get_rng_state(), generator.get_state()
    Monitor(sites=eb.Site(model.features)).check_held(
        toys.classify(model, values, labels), criterion=eb.Misclassify(labels), attack=attack
    )
    assert torch.equal(before[0], torch.get_rng_state())
    assert torch.equal(before[1], generator.get_state())


def test_what_the_monitor_is_told_is_checked() -> None:
    site = eb.Site(nn.Embedding(3, 2))
    for options in ({"gap": -1.0}, {"window": 0}, {"every": 0}, {"leak": -0.1}):
        with pytest.raises(ValueError, match=next(iter(options))):
            Monitor(sites=site, **options)  # type: ignore[arg-type]
    loss_fn, goal = (lambda: torch.zeros(1)), eb.Misclassify(torch.zeros(1).long())
    with pytest.raises(ValueError, match="either eps"):
        Monitor(sites=site).check_held(loss_fn, criterion=goal)
    with pytest.raises(ValueError, match="either eps"):
        Monitor(sites=site).check_held(loss_fn, criterion=goal, eps=0.1, attack=eb.FGM(eps=0.1))


class Overfitted(nn.Module):
    """Right at the input and at the corner where FGSM ends; wrong between, when `bad`."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1, 1, _weight=torch.zeros(1, 1))
        self.bad = False

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)[:, 0, 0]
        right = 0.5 - 2.4 * x + 2.2 * x * x if self.bad else 1.0 - 0.1 * x
        return torch.stack([right, torch.zeros_like(right)], 1)


def test_catastrophic_overfitting() -> None:
    model = Overfitted()
    tokens, labels = torch.zeros(4, 1, dtype=torch.long), torch.zeros(4, dtype=torch.long)
    monitor = Monitor(sites=eb.Site(model.embedding))
    loss_fn, goal = toys.classify(model, tokens, labels), eb.Misclassify(labels)
    model.bad = False
    assert monitor.check_held(loss_fn, criterion=goal, eps=1.0) == []
    model.bad = True
    with torch.no_grad():
        model.embedding.weight.zero_()
    with pytest.warns(RobustTrainingWarning, match="catastrophic"):
        monitor.check_held(loss_fn, criterion=goal, eps=1.0)
    with pytest.raises(ValueError, match="outputs"):
        monitor.check_held(lambda: loss_fn().losses, criterion=goal, eps=1.0)
    with pytest.raises(ValueError, match="accuracy"):
        monitor.check_held(loss_fn, criterion=eb.MaximizeLoss(), eps=1.0)
