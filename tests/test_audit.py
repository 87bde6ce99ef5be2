"""Audit: scores against hand counts, the worst of all tries, and checks that can fail."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from embattle.attacks import FMN, PGD, UniformNoise
from embattle.attacks.minimum import NoSmallestError
from embattle.audit.evaluation import evaluate, predict, sweep
from embattle.audit.honesty import order_checks, transfer_check, unbounded_check
from embattle.audit.measure import measure
from embattle.audit.outcomes import Attacked, success_rate
from embattle.audit.smallest import smallest, standing
from embattle.data.batch import Batch
from embattle.perturb.evaluation import Evaluation
from embattle.perturb.site import Site
from embattle.perturb.strength import Measured, Relative
from embattle.tasks import Classification
from embattle.tasks.evaluator import Evaluator
from torch import Tensor, nn


class Linear(nn.Module):
    """Two tokens of two features; the class is the sign of the first feature's sum."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(3, 2)
        with torch.no_grad():
            self.embedding.weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.2, 0.0]]))

    def forward(self, tokens: Tensor) -> Tensor:
        embedded = self.embedding(tokens)
        total = embedded[..., 0].sum(1)
        return torch.stack([-total, total], dim=1)


class _Backwards(Linear):
    """Hides its gradient: the backward pass tells the opposite of the truth."""

    def forward(self, tokens: Tensor) -> Tensor:
        logits = super().forward(tokens)
        return 2 * logits.detach() - logits


def _swap(target: tuple[nn.Module, Site]) -> tuple[nn.Module, list[Batch], Site]:
    return target[0], batches(), target[1]


def batches(*, size: int = 2) -> list[Batch]:
    tokens = torch.tensor([[0, 0], [1, 1], [2, 2], [0, 2]])
    return Batch({"tokens": tokens}, torch.tensor([1, 0, 1, 1])).split(size)


def test_scores_by_hand() -> None:
    logits = torch.tensor([[0.0, 2.0], [0.0, 1.0], [3.0, 0.0], [0.0, 0.5]])
    labels = torch.tensor([1, 0, 0, 1])
    found = Classification().scores(logits, labels)
    assert found["accuracy"] == pytest.approx(0.75)
    # Class 0: precision 1, recall 1/2; class 1: precision 2/3, recall 1.
    assert found["f1"] == pytest.approx((2 / 3 + 0.8) / 2)
    # One of the four pairs (right class 1, class 0) is in the wrong order.
    assert found["auc"] == pytest.approx(0.75)
    ones = torch.ones(4, dtype=torch.int64)
    assert math.isnan(Classification().scores(logits, ones)["auc"])


def test_success_counts_only_what_was_right() -> None:
    clean = torch.tensor([True, True, False])
    assert success_rate(clean, torch.tensor([False, True, True])) == 0.5
    assert success_rate(~clean, torch.tensor([True, True, True])) == 0.0
    assert success_rate(clean & ~clean, clean) == 0.0


def test_attacks_fool_exactly_the_examples_within_reach() -> None:
    model = Linear()
    site = Site(model.embedding)
    labels = torch.tensor([1, 0, 1, 1], device="cpu")  # where the logits come back
    # In l2 a ball of eps moves the sum of the first features by eps * sqrt(2):
    # the sums are 2, -2, 0.4 and 1.2.
    attack = PGD(norm="l2", eps=0.5, step_size=0.5, steps=3)
    results = evaluate(model, batches(), site, {"PGD": attack})
    assert results["PGD"].right.tolist() == [True, True, False, True]
    assert (results["PGD"].outputs.argmax(1) == labels).tolist() == [True, True, False, True]
    assert results["PGD"].norm == pytest.approx(0.5, rel=1e-5)
    attacks = [PGD(norm="l2", eps=e, step_size=e, steps=2) for e in (0.1, 0.5, 1.0, 2.0)]
    assert sweep(model, batches(), site, attacks) == [1.0, 0.75, 0.5, 0.0]
    # Who is known to fall is not attacked again, there or in a larger ball.
    known = [None, torch.tensor([True, False, False, False]), None, None]
    assert sweep(model, batches(), site, attacks, fallen=known) == [1.0, 0.5, 0.25, 0.0]
    assert sweep(model, batches(), site, [attacks[0], None], fallen=known[:2]) == [1.0, 0.75]
    assert (predict(model, batches()).argmax(1) == labels).all()
    assert all(weight.requires_grad for weight in model.parameters())


def test_restarts_keep_the_worst_try() -> None:
    model = Linear()
    site = Site(model.embedding)

    def accuracy(restarts: int) -> float:
        generator = torch.Generator().manual_seed(0)
        noise = UniformNoise(norm="l2", eps=0.9, restarts=restarts, generator=generator)
        return float(
            evaluate(model, batches(), site, {"noise": noise})["noise"].right.float().mean()
        )

    # The third example lies 0.28 from the boundary: some of 40 draws cross it, one draw need not.
    assert accuracy(40) <= accuracy(1)
    assert accuracy(40) == 0.75


def test_samples_leave_and_known_ones_are_left_alone() -> None:
    model, seen = Linear(), []
    site = Site(model.embedding)
    labels = torch.tensor([1, 0, 1, 1], device="cpu")

    class Counting(Evaluator):
        def evaluate(self, model: nn.Module, batch: Batch) -> Evaluation:
            seen.append(len(batch))
            return super().evaluate(model, batch)

    evaluator = Counting()
    clean = predict(model, batches())
    known = Attacked.clean(clean, torch.tensor([True, False, True, True], device="cpu"))
    attack = PGD(norm="l2", eps=0.9, step_size=0.1, steps=9)
    options: dict[str, Any] = {"evaluator": evaluator, "known": known}
    whole = evaluate(model, batches(size=4), site, {"a": attack}, **options)["a"]
    passes, made = sum(seen), len(seen)
    seen.clear()
    left = evaluate(model, batches(size=4), site, {"a": attack}, leave=True, **options)["a"]
    # The second is known to be wrong, the third lies within 0.28 of the border, the fourth at 0.85.
    assert whole.right.tolist() == left.right.tolist() == [True, False, False, False]
    assert (left.outputs.argmax(1) == labels).tolist()[2:] == [False, False]
    assert torch.equal(left.outputs[1], clean[1])
    assert left.steps.tolist() == [9, 0, 3, 9]
    assert whole.steps.tolist() == [9, 0, 9, 9]
    assert left.norms[1] == 0
    assert float(left.norms[2]) == pytest.approx(0.3, rel=1e-5)
    assert sum(seen) < passes
    assert len(seen) <= made + 2
    # Without `known` all are attacked, and a model that draws random numbers keeps them all.
    assert evaluate(model, batches(), site, {"a": attack})["a"].steps.tolist() == [9] * 4
    noisy = _Noisy()
    assert (
        evaluate(noisy, batches(), Site(noisy.embedding), {"a": attack}, leave=True)[
            "a"
        ].steps.tolist()
        == [9] * 4
    )


class _Noisy(Linear):
    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) + 0.01 * torch.randn(len(tokens), 2)


def test_further_restarts_are_one_pass() -> None:
    model, seen = Linear(), []
    site = Site(model.embedding)

    class Counting(Evaluator):
        def evaluate(self, model: nn.Module, batch: Batch) -> Evaluation:
            seen.append(len(batch))
            return super().evaluate(model, batch)

    attack = PGD(norm="l2", eps=0.9, step_size=0.5, steps=8, random_start=True, restarts=3)
    options: dict[str, Any] = {"evaluator": Counting(), "leave": True}
    found = evaluate(model, batches(size=4), site, {"a": attack}, **options)["a"]
    assert found.right.tolist() == [True, True, False, False]
    assert found.steps[:2].tolist() == [24, 24]
    assert max(found.steps[2:].tolist()) <= 8
    passes = len(seen)
    seen.clear()
    # Where they do not leave, each is tried three times.
    on = evaluate(model, batches(size=4), site, {"a": attack}, evaluator=Counting())["a"]
    assert on.right.tolist() == found.right.tolist()
    assert on.steps.tolist() == [24] * 4
    assert set(seen) == {4}
    assert len(seen) > passes


def test_the_smallest_radii_give_the_whole_curve() -> None:
    model = Linear()
    site = Site(model.embedding)
    labels = torch.tensor([1, 0, 1, 1], device="cpu")
    clean = predict(model, batches())
    known = Attacked.clean(clean, torch.tensor([True, True, True, False], device="cpu"))
    fmn = FMN(norm="l2", steps=30)
    found = smallest(model, batches(), site, fmn, known=known, radius=0.5)
    radii = found.radii
    # Sums of 2, -2 and 0.4 over sqrt(2).
    assert radii.tolist() == pytest.approx([2**0.5, 2**0.5, 0.08**0.5, 0], rel=0.01)
    assert (found.found.outputs.argmax(1) == labels).tolist() == [False, False, False, True]
    assert standing(radii, [0.0, 0.27, 0.3, 1.0, 2.0]) == [0.75, 0.75, 0.5, 0.5, 0.0]
    inside = found.within(0.5)
    assert inside.right.tolist() == [True, True, False, False]
    assert torch.equal(inside.outputs[:2], clean[:2])
    assert inside.norm == pytest.approx(float(radii[2]), rel=1e-5)
    # At the edge of the ball the sum moves by 0.5 * sqrt(2), to 0.4 - 0.707.
    assert found.edge.right.tolist() == [True, True, False, False]
    assert found.edge.outputs[2].tolist() == pytest.approx([0.3071, -0.3071], abs=1e-3)
    assert found.edge.norm == pytest.approx(0.5, rel=1e-5)
    assert torch.equal(found.edge.outputs[:2], clean[:2])
    # At the same radii, the sweep finds no more.
    attacks = [PGD(norm="l2", eps=e, step_size=e / 2, steps=20) for e in (0.27, 0.3, 1.0, 2.0)]
    swept = sweep(model, batches(), site, attacks, fallen=[~known.right])
    assert all(a <= b for a, b in zip(standing(radii, [0.27, 0.3, 1, 2]), swept, strict=True))
    shared = Site(model.embedding, scope="row")
    with pytest.raises(NoSmallestError, match="share deltas"):
        smallest(model, batches(), shared, FMN(norm="l2", steps=3), known=known)


def test_balls_are_the_same_in_every_batch() -> None:
    model = Linear()
    site = Site(model.embedding)
    for norm, to, expected in (("l2", "token_norm", 0.7), ("l1", "mean_norm", 1.4)):
        size = measure(model, batches(size=3), site, to=to, norm=norm)  # type: ignore[arg-type]
        # Tokens of norm 1 (five), 1 (none) and 0.2 (three).
        assert size.unit.values == pytest.approx({(0, 0): expected})
        assert size.vector_norm == pytest.approx(0.7)
        assert torch.equal(size.outputs, predict(model, batches()))
    assert measure(model, batches(), site, to=None).unit.values == {(0, 0): 1.0}
    unit = measure(model, batches(), site, to="token_norm").unit
    attack = PGD(norm="l2", eps=unit.times(0.5), steps=1, step_size=unit.times(0.5))
    for size in (1, 2, 4):
        found = evaluate(model, batches(size=size), site, {"a": attack})["a"]
        assert found.norms.tolist() == pytest.approx([0.35] * 4)
    assert str(unit.times(2)) == "1.4"
    with pytest.raises(ValueError, match="call 0 of site 1 was not measured"):
        unit.at((1, 0))
    with pytest.raises(ValueError, match="several places"):
        Measured({(0, 0): 1.0, (1, 0): 2.0}).resolve(torch.ones(2, 2), norm="l2", geometry={})


def test_checks_hold_for_a_real_attack_and_fail_for_one_that_is_too_weak() -> None:
    far = PGD(norm="l2", eps=1000.0, step_size=100.0, steps=10)
    weak = PGD(norm="l2", eps=1.2, step_size=0.3, steps=5)
    first, second = Linear(), Linear()
    with torch.no_grad():
        second.embedding.weight.mul_(-1)
    target, source = (first, Site(first.embedding)), (second, Site(second.embedding))
    assert unbounded_check("m", *_swap(target), [weak, far]).passed
    assert not unbounded_check("m", *_swap(target), [weak]).passed
    assert transfer_check("m", target, source, batches(), weak).passed
    # An attack that goes the wrong way on the target alone: the transferred one is stronger.
    hidden = _Backwards()
    pair = (hidden, Site(hidden.embedding)), target
    assert not transfer_check("m", *pair, batches(), weak).passed
    # What stands under the target's own attack may be known: two of four fall to the other's.
    for right, holds in (([True, True, False, True], False), ([True, False, False, False], True)):
        check = transfer_check("m", *pair, batches(), weak, right=torch.tensor(right))
        assert check.passed == holds, check

    # A ball that is relative to a model's own embeddings is not that of another model.
    own = PGD(norm="l2", eps=Relative(0.1, to="token_norm"), steps=2)
    with torch.no_grad():
        second.embedding.weight.copy_(10 * first.embedding.weight)
    found = transfer_check("m", target, source, batches(), own)
    assert found.passed
    assert "0 of 4 wrong under the transferred attack, 0 under its own" in found.detail

    accuracies = {"Noise": 0.4, "FGM": 0.5, "PGD": 0.6}
    failed = order_checks("m", accuracies, noise=["Noise"], gradient=["FGM", "PGD"])
    assert [check.passed for check in failed] == [False, False]
    close = {"Noise": 0.499, "FGM": 0.499, "PGD": 0.501}
    for slack, holds in ((0.0, False), (0.005, True)):
        some = order_checks("m", close, noise=["Noise"], gradient=["FGM", "PGD"], slack=slack)
        assert [check.passed for check in some] == [holds, holds]
    accuracies = {"Noise": 0.8, "FGM": 0.5, "PGD": 0.5}
    held = order_checks("m", accuracies, noise=["Noise"], gradient=["FGM", "PGD"])
    assert [check.passed for check in held] == [True, True]


def test_the_public_names_are_what_they_say() -> None:
    import embattle.audit as audit

    for name in audit.__all__:
        assert getattr(audit, name).__name__ == name
