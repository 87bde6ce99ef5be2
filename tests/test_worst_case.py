"""What an audit's measures under attack are the worst of, for each kind of prediction."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from embattle.attacks import PGD, Attack, AutoAttack, UniformNoise
from embattle.audit.examine import Curve, Examination, note_of
from embattle.audit.outcomes import Attacked, worst_of
from embattle.audit.victim import Victim
from embattle.data.batch import Batch
from embattle.perturb.evaluation import Evaluation
from embattle.perturb.site import Site
from embattle.tasks.evaluator import Evaluator
from embattle.tasks.kinds import (
    BinaryClassification,
    Classification,
    Kind,
    MultiLabelClassification,
    Ranking,
    Regression,
)
from torch import Tensor, nn

COUNT = 24
# Each with the number of its outputs, and an eps at which some samples fall.
KINDS: dict[str, tuple[Kind, int, float]] = {
    "two classes": (Classification(), 2, 0.6),
    "classes": (Classification(), 4, 0.4),
    "binary": (BinaryClassification(), 1, 0.6),
    "labels": (MultiLabelClassification(), 3, 0.15),
    "values": (Regression(within=0.5), 1, 0.15),
    "ranks": (Ranking(k=3), 12, 0.4),
}


class Model(nn.Module):
    """Curved, so that an attack's last point is not always its worst."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(20, 4)
        self.inner, self.outer = nn.Linear(8, 12), nn.Linear(12, outputs)

    def forward(self, tokens: Tensor, row: Tensor) -> Tensor:
        hidden = torch.sin(2 * self.inner(self.embedding(tokens).flatten(1)))
        out: Tensor = 2 * self.outer(hidden)
        return out.squeeze(1) if out.shape[1] == 1 else out


class Spy(Evaluator):
    """Keeps each sample's worst point of all that is evaluated: wrong first, then by its loss."""

    def __init__(self, kind: Kind) -> None:
        super().__init__(kind)
        self.fell = torch.zeros(COUNT, dtype=torch.bool)
        self.loss = torch.full((COUNT,), -torch.inf)
        self.largest = torch.full((COUNT,), -torch.inf)

    def evaluate(self, model: nn.Module, batch: Batch) -> Evaluation:
        at = super().evaluate(model, batch)
        assert at.losses is not None
        assert at.outputs is not None
        wrong = ~self.kind.right(at.outputs.detach(), batch.known_labels())
        losses, rows = at.losses.detach(), batch.inputs["row"]
        # Copies of a sample may stand side by side, for further restarts.
        for row, loss, fell in zip(rows.tolist(), losses, wrong, strict=True):
            self.largest[row] = torch.maximum(self.largest[row], loss)
            if fell > self.fell[row] or (fell == self.fell[row] and loss > self.loss[row]):
                self.fell[row], self.loss[row] = fell, loss
        return at


def table(eps: float) -> dict[str, Attack]:
    draw, ball = torch.Generator().manual_seed(0), {"norm": "l2", "eps": eps}
    start: dict[str, Any] = {"random_start": True, "keep": "best", "generator": draw, **ball}
    return {
        "Noise x3": UniformNoise(restarts=3, generator=draw, **ball),  # type: ignore[arg-type]
        "PGD-6 x2": PGD(steps=6, step_size=0.4 * eps, restarts=2, **start),
        "Ensemble-5": AutoAttack(steps=5, queries=10, targets=2, generator=draw, **ball),  # type: ignore[arg-type]
    }


def audited(which: str, labels: tuple[str, ...] = (), **options: Any) -> tuple[Spy, Victim, Tensor]:
    """What was seen of a model of a kind under some attacks of the table (all), and the answers."""
    kind, outputs, eps = KINDS[which]
    model, spy = Model(outputs), Spy(kind)
    tokens = torch.randint(20, (COUNT, 2), generator=torch.Generator().manual_seed(1))
    inputs = {"tokens": tokens, "row": torch.arange(COUNT)}
    with torch.no_grad():
        clean = model(**inputs)
    draw = torch.Generator().manual_seed(2)
    if isinstance(kind, Regression):
        answers = clean + 0.4 * torch.randn(COUNT, generator=draw)
    else:  # some are wrong from the start
        several = clean.dim() == 2 and not isinstance(kind, MultiLabelClassification)
        answers = clean.argmax(1) if several else (clean > 0).long()
        answers[:6] = answers[:6].flip(0)
    one = Examination(
        model,
        Batch(inputs, answers).split(COUNT // 2),
        Site(model.embedding),
        evaluator=spy,
        norm="l2",
        eps=eps,
        unit="absolute",
        **options,
    )
    every = table(eps)
    one.run({label: (every[label], 1.0) for label in labels or every}, Curve())
    return spy, one.victim, answers


@pytest.mark.parametrize("which", KINDS)
def test_who_stands_stood_at_every_point_that_was_evaluated(which: str) -> None:
    spy, victim, _ = audited(which)
    assert victim.worst is not None
    assert torch.equal(~victim.worst.right, spy.fell)
    assert int((~victim.right).sum()) < int(spy.fell.sum()) < COUNT


@pytest.mark.parametrize("labels", [(), *((label,) for label in table(1.0))])
@pytest.mark.parametrize(
    ("which", "go_on"),
    [
        ("binary", False),
        ("values", False),
        ("labels", False),
        ("two classes", True),
        ("classes", True),
    ],
)
def test_attacks_that_go_on_keep_the_largest_loss(
    which: str, go_on: bool, labels: tuple[str, ...]
) -> None:
    spy, victim, answers = audited(which, labels, go_on=go_on)
    assert victim.worst is not None
    found = spy.kind.losses(victim.worst.outputs, answers)
    assert torch.equal(~victim.worst.right, spy.fell)
    assert torch.allclose(found, spy.loss, rtol=1e-4, atol=1e-5)
    if which in ("binary", "values", "two classes"):
        # Of one score a wrong one has a larger loss than a right one: nothing was worse.
        assert torch.allclose(found, spy.largest, rtol=1e-4, atol=1e-5)
    assert note_of(spy.kind, go_on=go_on) == spy.kind.note


def test_the_area_of_a_binary_score_is_that_of_each_sample_at_its_worst() -> None:
    spy, victim, answers = audited("binary")
    assert victim.worst is not None
    # The loss of one logit says what it is, but for the side.
    lowest = -(spy.largest.expm1().log())
    scores = torch.where(answers == 1, lowest, -lowest)
    found = spy.kind.scores(victim.worst.outputs, answers)
    expected = spy.kind.scores(scores, answers)
    assert found == pytest.approx(expected, rel=1e-3)
    assert found["auc"] < spy.kind.scores(victim.clean, answers)["auc"]


@pytest.mark.parametrize("which", ["two classes", "classes", "ranks"])
def test_samples_that_leave_have_the_loss_of_their_first_success(which: str) -> None:
    spy, victim, answers = audited(which)
    assert victim.worst is not None
    found = spy.kind.losses(victim.worst.outputs, answers)
    assert bool((found <= spy.largest + 1e-4).all())
    further, again, _ = audited(which, go_on=True)
    assert again.worst is not None
    on = further.kind.losses(again.worst.outputs, answers)
    assert float(on.mean()) > float(found.mean())
    assert "first success" in note_of(spy.kind)
    if which == "ranks":  # who has left the list counts for nothing, wherever
        scores = spy.kind.scores(victim.worst.outputs[spy.fell], answers[spy.fell])
        assert scores["ndcg"] == scores["mrr"] == scores["hit_rate"] == 0


def test_the_worst_of_several_rankings_is_the_lowest_rank() -> None:
    scores = torch.tensor([[9.0, 8.0, 7.0, 0.0], [5.0, 9.0, 8.0, 0.0]])
    one = torch.tensor([[1.0, 9.0, -5.0, -5.0], [2.0, 2.0, 9.0, 9.0]])  # second; third
    two = torch.tensor([[1.0, 1.2, 1.1, -9.0], [1.0, 2.0, 2.0, 2.0]])  # third; has left
    losses = [Ranking(k=3).losses(outputs, torch.tensor([0, 0])) for outputs in (one, two)]
    assert bool((losses[0] > losses[1]).all())
    kind, answers, zeros = Ranking(k=3), torch.tensor([0, 0]), torch.zeros(2)
    clean, *under = (
        Attacked(outputs, kind.right(outputs, answers), zeros, zeros.long())
        for outputs in (scores, one, two)
    )
    for order in (under, under[::-1]):
        worst = worst_of(kind, answers, [clean, *order])
        assert torch.equal(worst.outputs, two)
        assert worst.right.tolist() == [True, False]


def test_an_ensemble_that_goes_on_names_what_turned_a_sample_first() -> None:
    _, left, _ = audited("two classes", ("Ensemble-5",))
    _, on, _ = audited("two classes", ("Ensemble-5",), go_on=True)
    for victim in (left, on):
        under = victim.attacked["Ensemble-5"]
        for by, before, now, steps in zip(
            under.by, victim.right, under.right, under.steps.tolist(), strict=True
        ):
            assert bool(by) == bool(before & ~now)
            assert bool(before) or steps == 0
    assert on.attacked["Ensemble-5"].steps.unique().numel() > 2
