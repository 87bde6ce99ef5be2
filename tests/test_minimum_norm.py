"""The smallest perturbation of each sample."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import embattle as eb
import pytest
import torch
import torch.nn.functional as F
import toys
from embattle.attacks import MinimumNormResult
from torch import Tensor, nn

ORDER = {"l2": 2.0, "linf": math.inf, "l1": 1.0}


def linear(classes: int = 4, batch: int = 12) -> tuple[nn.Sequential, Tensor, Tensor, Tensor]:
    """A linear model, a batch, labels (mostly right), and the margins' slopes `[B, C, D]`."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Identity(), nn.Linear(6, classes))
    x = torch.randn(batch, 6)
    with torch.no_grad():
        labels = model(x).argmax(1)
    labels[0] = (labels[0] + 1) % classes
    weight = model[1].weight.detach()
    return model, x, labels, weight[None] - weight[labels][:, None]


def nearest(model: nn.Module, x: Tensor, labels: Tensor, slopes: Tensor, norm: str) -> Tensor:
    """The distance to the nearest other class, `[B]`; 0 where the label is not predicted."""
    with torch.no_grad():
        outputs = model(x)
    lead = outputs.gather(1, labels[:, None]) - outputs
    dual = {"l2": 2.0, "linf": 1.0, "l1": math.inf}[norm]
    ways = lead / slopes.norm(p=dual, dim=2).clamp(min=1e-12)
    return ways.scatter(1, labels[:, None], math.inf).amin(1).clamp(min=0)


def smallest(
    model: nn.Module,
    x: Tensor,
    criterion: eb.Criterion,
    *,
    site: dict[str, Any] | None = None,
    mask: Tensor | None = None,
    **options: Any,
) -> MinimumNormResult:
    with eb.Site(model[0], model=model, **(site or {})) as place:  # type: ignore[index]
        return eb.FMN(**options).run(
            lambda: eb.Evaluation(None, model(x)), place, criterion=criterion, mask=mask
        )


@pytest.mark.parametrize("norm", ["l2", "linf", "l1"])
def test_linear_model_has_the_distance_of_the_nearest_boundary(norm: str) -> None:
    model, x, labels, slopes = linear()
    result = smallest(model, x, eb.Misclassify(labels), norm=norm, steps=200)
    exact = nearest(model, x, labels, slopes, norm)
    assert result.eps[0] == 0
    assert torch.all(result.delta[0] == 0)
    ratio = result.eps[1:] / exact[1:]
    assert torch.all(ratio >= 1 - 1e-4)
    # The search may end at the boundary to another class than the nearest.
    assert ratio.median() < 1.01
    assert torch.all(ratio <= 1.4)
    assert torch.allclose(result.delta.norm(p=ORDER[norm], dim=1), result.eps, rtol=1e-5)
    with torch.no_grad():
        assert torch.all(model(x + result.delta).argmax(1) != labels)
    assert torch.equal(result.reached, torch.ones(12, dtype=torch.bool))
    assert torch.equal(result.clean_reached, torch.arange(12) == 0)


def test_a_dozen_steps_come_near_to_many() -> None:
    model = toys.encoder(dtype=torch.float32)
    tokens, _ = toys.text_batch(batch=24)
    with torch.no_grad():
        labels = model(tokens).argmax(1)

    def found(steps: int) -> Tensor:
        with eb.Site(model.embedding, model=model) as site:
            return (
                eb.FMN(steps=steps)
                .run(
                    lambda: eb.Evaluation(None, model(tokens)),
                    site,
                    criterion=eb.Misclassify(labels),
                    mask=tokens != 0,
                )
                .eps
            )

    ratio = found(12) / found(150)
    assert ratio.median() < 1.1
    assert ratio.quantile(0.9) < 1.35


@pytest.mark.filterwarnings("ignore:.*groups had no gradient")  # the one without a label
def test_one_attack_gives_robust_accuracy_at_every_eps() -> None:
    model, x, labels, _ = linear()
    labels[3] = -100
    result = smallest(model, x, eb.Misclassify(labels))
    radii, accuracies = result.curve()
    assert radii[0] == 0
    assert accuracies[0] == pytest.approx(10 / 11)
    assert accuracies[-1] == 0
    assert torch.all(accuracies.diff() < 0)
    assert result.eps[3] == math.inf
    assert torch.all(result.delta[3] == 0)
    middle = float(result.eps.median())
    stands = (result.eps > middle) & (labels != -100)
    assert result.robust_accuracy_at(middle) == pytest.approx(int(stands.sum()) / 11)
    # Attacks at that radius find as much, but for a sample.
    with eb.Site(model[0], model=model) as site:
        other = eb.AutoAttack(eps=middle, steps=20, queries=0).run(
            lambda: eb.Evaluation(None, model(x)), site, criterion=eb.Misclassify(labels)
        )
    assert abs(float(other.robust_accuracy) - float(result.robust_accuracy_at(middle))) < 1.1 / 11
    for copied in (pickle.loads(pickle.dumps(result)), copy.deepcopy(result)):
        assert torch.equal(copied.curve()[1], accuracies)


def test_size_of_embeddings_and_of_logits_does_not_matter() -> None:
    model, x, labels, _ = linear()
    plain = smallest(model, x, eb.Misclassify(labels)).eps
    for factor, of_logits in ((1e-3, 1.0), (1e3, 1.0), (1.0, 1e5), (1.0, 1e-4)):
        other = copy.deepcopy(model)
        with torch.no_grad():
            other[1].weight.mul_(of_logits / factor)
            other[1].bias.mul_(of_logits)
        got = smallest(other, x * factor, eb.Misclassify(labels)).eps
        assert torch.allclose(got / factor, plain, rtol=0.03)


@pytest.mark.parametrize("norm", ["l2", "linf", "l1"])
@pytest.mark.parametrize("factor", [0.0, 1e-3, "some"])
def test_embeddings_far_smaller_than_their_perturbation(norm: str, factor: float | str) -> None:
    """Rows that were never trained, beside others or not: the border is no less found."""
    model, x, _, _ = linear()
    few = torch.arange(len(x)) < 4
    x = torch.where(few[:, None], 1e-5 * x, x) if isinstance(factor, str) else factor * x
    x[0] = 0
    with torch.no_grad():
        labels = model(x).argmax(1)
    slopes = model[1].weight.detach()[None] - model[1].weight.detach()[labels][:, None]
    expected = nearest(model, x, labels, slopes, norm)
    found = smallest(model, x, eb.Misclassify(labels), norm=norm).eps
    assert torch.all((found >= expected * 0.999) & (found <= expected * 1.5))


def test_an_infinite_embedding_is_no_other_samples_size() -> None:
    model, x, labels, _ = linear()
    labels[0] = (labels[0] + 1) % 4  # it is not predicted without attack
    alone = smallest(model, x[1:], eb.Misclassify(labels[1:])).eps
    x[0, 0] = math.inf
    assert torch.allclose(smallest(model, x, eb.Misclassify(labels)).eps[1:], alone, rtol=1e-3)


def test_masks_boxes_and_relative_units() -> None:
    model, x, labels, _ = linear()
    mask = torch.arange(12) != 5
    result = smallest(model, x, eb.Misclassify(labels), mask=mask)
    assert result.eps[5] == math.inf
    assert torch.all(result.delta[5] == 0)
    low, high = -1.5, 1.5
    boxed = smallest(model, x, eb.Misclassify(labels), lower=low, upper=high)
    moved = x + boxed.delta
    assert torch.all((moved >= x.clamp(max=low) - 1e-6) & (moved <= x.clamp(min=high) + 1e-6))
    found = boxed.eps.isfinite()
    assert torch.all(boxed.eps[found & mask] >= result.eps[found & mask] * 0.98)
    own = smallest(model, x, eb.Misclassify(labels), unit=eb.Relative(1.0, to="group_norm"))
    plain = smallest(model, x, eb.Misclassify(labels))
    assert torch.allclose(own.eps * x.norm(dim=1), plain.eps, rtol=0.02)


def test_tokens_share_the_sample_radius() -> None:
    model = toys.encoder(dtype=torch.float32)
    tokens, _ = toys.text_batch()
    with torch.no_grad():
        labels = model(tokens).argmax(1)
    with eb.Site(model.embedding, group="token", model=model) as site:
        result = eb.FMN(steps=40).run(
            lambda: eb.Evaluation(None, model(tokens)), site, criterion=eb.Misclassify(labels)
        )
        with result.applied(), torch.no_grad():
            assert torch.equal(model(tokens).argmax(1) != labels, result.reached)
    assert result.eps.shape == (6,)
    assert torch.all(result.delta[tokens == 0] == 0)
    fell = result.eps.isfinite()
    assert fell.float().mean() > 0.5
    assert torch.allclose(result.delta.norm(dim=2).amax(1)[fell], result.eps[fell], rtol=1e-5)


class Flip(eb.Criterion):
    """A user's own goal, whose objective says nothing of where it is reached."""

    per_sample = ("labels",)
    needs_outputs = True

    def __init__(self, labels: Tensor) -> None:
        self.labels = labels

    def objective(self, now: eb.Evaluation, clean: eb.Evaluation | None) -> Tensor:
        return F.cross_entropy(now.outputs, self.labels, reduction="none")

    def reached(self, now: eb.Evaluation, clean: eb.Evaluation | None) -> Tensor:
        return now.outputs.argmax(1) != self.labels


def test_other_goals() -> None:
    model, x, _, _ = linear()
    with torch.no_grad():
        outputs = model(x)
    first = outputs.argmax(1)
    weight = model[1].weight.detach()
    plain = nearest(model, x, first, weight[None] - weight[first][:, None], "l2")
    for goal in (eb.Demote(first, 1), eb.Outrank(first, 1), eb.Diverge(), Flip(first)):
        ratio = smallest(model, x, goal).eps / plain
        assert torch.all(ratio >= 1 - 1e-4), goal
        assert ratio.median() < 1.05, goal
    one = smallest(model, x, eb.Target((first + 1) % 4)).eps
    two = smallest(model, x, eb.Promote((first + 1) % 4, 1)).eps
    assert torch.all(one >= plain * 0.97)
    assert torch.allclose(one, two, rtol=0.05)
    near, far = (smallest(model, x, eb.Deviate(outputs, by=by)).eps for by in (0.1, 0.2))
    assert torch.all(far.isfinite())  # at the targets themselves up and down cancel out
    assert torch.allclose(2 * near, far, rtol=0.15)
    several = smallest(model, x, eb.MultiLabel(outputs > 0)).eps
    exact = (outputs.abs() / model[1].weight.detach().norm(dim=1)).amin(1)
    assert torch.allclose(several, exact, rtol=0.05)


def test_more_steps_are_no_weaker_and_runs_repeat() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Identity(), nn.Linear(6, 32), nn.Dropout(0.2), nn.Tanh())
    model.append(nn.Linear(32, 3))
    x = torch.randn(20, 6)
    with torch.no_grad():
        labels = model.eval()(x).argmax(1)
    few, many = (smallest(model, x, eb.Misclassify(labels), steps=n).eps for n in (15, 150))
    assert many.median() <= few.median()
    model.train()
    random = torch.get_rng_state()
    one, two = (
        smallest(
            model, x, eb.Misclassify(labels), steps=10, generator=torch.Generator().manual_seed(0)
        )
        for _ in range(2)
    )
    assert torch.equal(one.eps, two.eps)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in model.parameters())


def test_what_has_no_smallest_eps_is_refused() -> None:
    model, x, labels, _ = linear()
    with pytest.raises(ValueError, match="no goal"):
        smallest(model, x, eb.Diverge("squared_distance"))
    factors, batch = toys.factors(torch.float32), toys.triplets()

    def scores() -> eb.Evaluation:
        return eb.Evaluation(None, torch.stack(factors(*batch), dim=1))

    with (
        eb.Site(factors.item, scope="row", model=factors) as site,
        pytest.raises(ValueError, match="share deltas"),
    ):
        eb.FMN().run(scores, site, criterion=eb.Misclassify(torch.zeros(9).long()))
    normed = nn.Sequential(nn.Identity(), nn.BatchNorm1d(6), model[1]).train()
    with torch.no_grad():
        labels = normed(x).argmax(1)
    with pytest.raises(ValueError, match="depend on each other"):
        smallest(normed, x, eb.Misclassify(labels))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: eb.FMN(steps=0), "steps"),
        (lambda: eb.FMN(gamma=1.5), "gamma"),
        (lambda: eb.FMN(unit=0.0), "unit"),
        (lambda: eb.FMN(unit=math.inf), "unit"),
        (lambda: eb.FMN(norm="l0"), "norm"),
        (lambda: eb.FMN(step_size="1"), "step_size"),
    ],
)
def test_arguments_are_checked(make: Callable[[], object], match: str) -> None:
    with pytest.raises((TypeError, ValueError), match=match):
        make()


@pytest.mark.parametrize("attack", [eb.FMN(steps=2), eb.AutoAttack(eps=0.5, steps=2)])
@pytest.mark.parametrize(
    "goal",
    [
        lambda: eb.Target(torch.zeros(0, dtype=torch.int64)),
        lambda: eb.MultiLabel(torch.zeros(0, 3)),
        lambda: eb.Deviate(torch.zeros(0, 3), 0.5),
    ],
)
def test_margins_of_no_samples(attack: Any, goal: Callable[[], eb.Criterion]) -> None:
    model, x = nn.Linear(4, 3), torch.randn(0, 4)
    result = attack.run(lambda: seen(model(x)), eb.Site(model), criterion=goal())
    assert result.deltas[0].shape == (0, 3)


def seen(outputs: Tensor) -> eb.Evaluation:
    return eb.Evaluation(outputs.square().sum(1), outputs)
