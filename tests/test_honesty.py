"""Models that hide their gradients are caught, and honest ones pass."""

from __future__ import annotations

import embattle as eb
import pytest
import torch
from embattle.attacks.noise import UniformNoise
from embattle.audit import Check, evaluate, measure, smallest, worst_of
from embattle.audit.honesty import converged_check, eps_check, gradient_free_check
from embattle.audit.outcomes import Attacked
from embattle.audit.trust import check_victims
from embattle.audit.victim import Victim
from embattle.data.batch import Batch
from embattle.tasks import Classification
from embattle.tasks.evaluator import Evaluator
from torch import Tensor, nn
from torch.nn import functional as F

pytestmark = pytest.mark.filterwarnings("ignore::embattle.attacks.AttackWarning")
EPS = 0.5


class Reviews(nn.Module):
    """Words in, two classes out; `hide` says what is done to the gradient."""

    def __init__(self, hide: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(40, 8)
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))
        self.hide = hide

    def forward(self, tokens: Tensor) -> Tensor:
        words = self.embedding(tokens)
        if self.hide == "shattered":
            words = torch.round(words * 4) / 4
        if self.hide == "stochastic":
            words = words + 0.3 * torch.randn_like(words)
        logits: Tensor = self.layers(words.mean(1))
        if self.hide == "saturated":
            return logits * 1e6
        if self.hide == "misleading":  # as a straight-through estimate of the wrong sign
            return 2 * logits.detach() - logits
        return logits


def data(count: int = 80) -> Batch:
    """Which half of the words is more frequent, with every tenth label wrong."""
    tokens = torch.randint(0, 40, (count, 5), generator=torch.Generator().manual_seed(1))
    labels = ((tokens < 20).sum(1) > 2).long()
    labels[::10] = 1 - labels[::10]
    return Batch({"tokens": tokens}, labels)


def trained(hardened: bool) -> Reviews:
    model, batch = Reviews(), data()
    best = torch.optim.Adam(model.parameters(), 0.02)
    site = eb.Site(model.embedding)

    def losses() -> Tensor:
        return F.cross_entropy(model(batch.inputs["tokens"]), batch.labels, reduction="none")

    for _ in range(60):
        loss = losses().mean()
        if hardened:
            found = eb.PGD(eps=EPS, steps=2, step_size=0.4).run(losses, site)
            with found.applied():
                loss = loss + losses().mean()
        best.zero_grad()
        loss.backward()
        best.step()
    site.remove()
    return model.eval()


@pytest.fixture(scope="module")
def honest() -> dict[str, Reviews]:
    return {"plain": trained(False), "hardened": trained(True)}


def examined(model: Reviews) -> Victim:
    """What the audit job finds of a model."""
    evaluator, batches = Evaluator(), data().split(40)
    kind, labels = evaluator.kind, data().known_labels()
    site = eb.Site(model.embedding)
    size = measure(model, batches, site, to=None, evaluator=evaluator)
    right = kind.right(size.outputs, labels)
    victim = Victim(model, [site], size.outputs, right, "l2", EPS)
    generator = torch.Generator().manual_seed(0)
    victim.attacks = {
        "Noise": UniformNoise(norm="l2", eps=EPS, restarts=2, generator=generator),
        "FGM": eb.FGM(norm="l2", eps=EPS),
        "PGD": eb.PGD(norm="l2", eps=EPS, steps=10, step_size=0.125, keep="best"),
        "Ensemble": eb.AutoAttack(
            norm="l2", eps=EPS, steps=10, queries=60, eot=3, generator=generator
        ),
    }
    known = victim.unattacked
    victim.radii = smallest(
        model, batches, site, eb.FMN(norm="l2", steps=20), known=known, evaluator=evaluator
    ).radii
    for label, attack in victim.attacks.items():
        found = [*victim.attacked.values()]
        before = worst_of(kind, labels, [known, *found]) if label == "Ensemble" else known
        done = evaluate(model, batches, site, {label: attack}, known=before, leave=True)
        victim.attacked[label] = done[label]
    victim.worst = worst_of(kind, labels, [known, *victim.attacked.values()])
    return victim


def failed(checks: list[Check]) -> set[str]:
    assert all(check.reason and check.detail for check in checks)
    return {check.name for check in checks if not check.passed}


def test_honest_models_pass(honest: dict[str, Reviews]) -> None:
    victims = {name: examined(model) for name, model in honest.items()}
    checks = check_victims(victims, data().split(40), evaluator=Evaluator())
    assert failed(checks) == set()
    names = " ".join(check.name for check in checks)
    for demanded in ("noise", "larger ball", "without gradients", "converged", "vanish"):
        assert demanded in names
    for demanded in ("transferred", "bound", "loss changes", "one step", "same outputs"):
        assert demanded in names
    plain, hardened = (float(v.worst.right.double().mean()) for v in victims.values() if v.worst)
    assert plain < hardened  # the attacks tell them apart


@pytest.mark.parametrize(
    ("hide", "caught"),
    [
        ("shattered", "gradients do not vanish"),
        ("stochastic", "the same samples give the same outputs"),
        ("saturated", "gradients do not vanish"),
        ("misleading", "gradients tell how the loss changes"),
    ],
)
def test_models_that_hide_their_gradients_are_caught(
    honest: dict[str, Reviews], hide: str, caught: str
) -> None:
    model = Reviews(hide)
    model.load_state_dict(honest["plain"].state_dict())
    victims = {"m": examined(model.eval())}
    checks = check_victims(victims, data().split(40), evaluator=Evaluator())
    assert f"m: {caught}" in failed(checks), failed(checks)


def outcome(right: list[bool], steps: list[int], by: tuple[str, ...] = ()) -> Attacked:
    count = len(right)
    return Attacked(
        torch.zeros(count, 2), torch.tensor(right), torch.zeros(count), torch.tensor(steps), by=by
    )


def test_checks_that_need_no_model() -> None:
    early = outcome([True, *[False] * 4], [8, 1, 1, 2, 2])
    late = outcome([True, *[False] * 4], [8, 7, 7, 8, 7])
    for under, passed in ((early, True), (late, False)):
        check = converged_check("m", "PGD", under)
        assert check is not None
        assert check.passed == passed
    for unknown in (outcome([False], [3]), outcome([True, False], [8, 8])):
        assert converged_check("m", "PGD", unknown) is None
    free = outcome([False] * 4, [1] * 4, ("square", "square", "apgd-ce", ""))
    assert not gradient_free_check("m", "Ensemble", free).passed
    free = outcome([False] * 4, [1] * 4, ("square", "apgd-ce", "apgd-ce", ""))
    assert gradient_free_check("m", "Ensemble", free).passed
    inside, larger = torch.tensor([True, False]), torch.tensor([True, True])
    assert not eps_check("m", "PGD", inside, larger, 2.0).passed
    assert eps_check("m", "PGD", larger, inside, 2.0).passed


def test_the_worst_of_several_attacks_by_hand() -> None:
    labels = torch.tensor([0, 0, 0])
    one = Attacked(
        torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]]),
        torch.tensor([True, False, True]),
        torch.tensor([0.1, 0.2, 0.3]),
        torch.tensor([1, 1, 1]),
    )
    two = Attacked(
        torch.tensor([[0.0, 1.0], [0.0, 3.0], [9.0, 0.0]]),
        torch.tensor([False, False, True]),
        torch.tensor([0.4, 0.5, 0.6]),
        torch.tensor([2, 2, 2]),
    )
    for pair in ((one, two), (two, one)):
        worst = worst_of(Classification(), labels, pair)
        assert worst.outputs.tolist() == [[0.0, 1.0], [0.0, 3.0], [3.0, 0.0]]
        assert worst.right.tolist() == [False, False, True]
        assert worst.norms.tolist() == pytest.approx([0.4, 0.5, 0.3])
