"""Criteria that a user writes: what they must give, and what they may hold."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import embattle as eb
import numpy as np
import pytest
import torch
from embattle.criteria import ascended, reached
from test_criteria import checked, seen
from torch import Tensor

Evaluation, Criterion = eb.Evaluation, eb.Criterion


class Shrink(Criterion):
    """A recommendation is to lose its lead over the runner-up."""

    per_sample = ("items",)
    needs_outputs = True

    def __init__(self, items: Tensor, gap: float) -> None:
        self.items, self.gap = items, gap

    def objective(self, now: eb.Evaluation, clean: eb.Evaluation | None) -> Tensor:
        return eb.losses.margin(now.outputs, self.items)

    def reached(self, now: eb.Evaluation, clean: eb.Evaluation | None) -> Tensor:
        return self.objective(now, clean) > -self.gap


def test_own_criterion() -> None:
    outputs = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 4.0], [3.0, 3.0, 0.0]])
    criterion = Shrink(torch.tensor([0, 2, 1]), gap=1.5)
    now = checked(criterion, outputs)
    assert ascended(criterion, now, None).tolist() == [-1.0, -3.0, 0.0]
    assert reached(criterion, now, None).tolist() == [True, False, True]
    assert criterion.predict(outputs) is None
    assert criterion.accuracy(now) is None
    assert criterion.counted(now) is None
    some = criterion.select(torch.tensor([1, 2]))
    assert some.items.tolist() == [2, 1]
    assert criterion.items.tolist() == [0, 2, 1]
    assert repr(criterion) == "Shrink(items=tensor [3], gap=1.5)"
    with pytest.raises(ValueError, match=r"items.*each of 2 samples.*\(3,\).*\(2, 3\)"):
        criterion.check(seen(outputs[:2]))
    with pytest.raises(ValueError, match="needs the model's outputs"):
        criterion.check(Evaluation(torch.zeros(3)))
    with pytest.raises(TypeError, match=r"items.*tensor.*list"):
        Shrink([0, 2, 1], gap=1.5).check(now)
    with pytest.raises(TypeError, match=r"items.*tensor.*list"):
        Shrink([0, 2, 1], gap=1.5).select(torch.tensor([1]))


def own(**members: Any) -> type[eb.Criterion]:
    """A class of criteria with these members."""
    members.setdefault("objective", lambda self, now, clean: now.losses)
    return type("Own", (Criterion,), members)


def holding(value: Any, **members: Any) -> eb.Criterion:
    criterion = own(**members)()
    criterion.held = value
    return criterion


def test_select_refuses_what_may_belong_to_samples() -> None:
    tensor, rows = torch.arange(3), torch.tensor([1])
    batch = SimpleNamespace  # what is not looked into

    @dataclass
    class Labels:
        values: Tensor

    for value in (
        tensor,
        [tensor],
        (1, {"a": tensor}),
        np.arange(3),
        Labels(tensor),
        [eb.Target(1)],
    ):
        with pytest.raises(TypeError, match=r"'held'.*per_sample = \('held',\).*shared"):
            holding(value).select(rows)
        assert holding(value, shared=("held",)).select(rows).held is value
    with pytest.raises(TypeError, match="'table'"):
        own(table=tensor)().select(rows)
    slotted = own(__slots__=("slot",))()
    slotted.slot = tensor
    with pytest.raises(TypeError, match="'slot'"):
        slotted.select(rows)
    assert own(table=tensor, per_sample=("table",))().select(rows).table.tolist() == [1]
    assert holding(tensor, per_sample=("held",)).select(rows).held.tolist() == [1]
    for value in (None, 3, "name", [1, 2], torch.nn.Linear(2, 2), batch(a=1)):
        assert holding(value).select(rows).held is value
    assert holding(None, per_sample=("held",)).select(rows).held is None


def test_select_reaches_criteria_inside_others() -> None:
    both = holding(eb.Misclassify(torch.tensor([0, 1, 2])))
    assert both.select(torch.tensor([2])).held.labels.tolist() == [2]


@pytest.mark.parametrize("kind", ["per_sample", "shared"])
@pytest.mark.parametrize("names", ["labels", ["labels"], (1,)])
def test_names_must_be_a_tuple(kind: str, names: Any) -> None:
    with pytest.raises(TypeError, match=rf"Own: {kind} must be a tuple of names"):
        own(**{kind: names})


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (torch.zeros(3, 1), ValueError),
        (torch.zeros(3, 3), ValueError),
        (torch.zeros(1), ValueError),
        (torch.tensor(0.0), ValueError),
        (torch.zeros(3, dtype=torch.int64), TypeError),
        (0.0, TypeError),
        (None, TypeError),
    ],
)
def test_objectives_that_are_not_one_number_for_each_sample(
    value: Any, error: type[Exception]
) -> None:
    criterion = own(objective=lambda self, now, clean: value)()
    with pytest.raises(error, match=r"Own: objective must return .*\[3\]; got"):
        ascended(criterion, Evaluation(torch.zeros(3)), None)


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (torch.zeros(3, 1, dtype=torch.bool), ValueError),
        (torch.zeros(3, 3, dtype=torch.bool), ValueError),
        (torch.tensor(True), ValueError),
        (torch.zeros(3), TypeError),
        (True, TypeError),
    ],
)
def test_goals_that_are_not_one_bool_for_each_sample(value: Any, error: type[Exception]) -> None:
    criterion = own(reached=lambda self, now, clean: value)()
    with pytest.raises(error, match=r"Own: reached must return .*\[3\]; got"):
        reached(criterion, Evaluation(torch.zeros(3)), None)


def test_an_objective_must_be_written() -> None:
    with pytest.raises(TypeError, match="objective"):
        type("Own", (Criterion,), {})()


@pytest.mark.parametrize("label", range(3))
def test_a_nan_is_a_wrong_answer_whatever_the_label(label: int) -> None:
    good = torch.zeros(3)
    good[label] = 2.0
    outputs = good.repeat(4, 1)
    outputs[range(3), range(3)] = torch.nan  # beside the label, or its own
    for criterion in (
        eb.Misclassify(torch.full((4,), label)),
        eb.MultiLabel((good > 0).expand(4, 3)),
        eb.Deviate(good.repeat(4, 1), by=0.5),
        eb.Diverge(),
    ):
        clean = checked(criterion, good.repeat(4, 1))
        found = reached(criterion, seen(outputs), clean)
        assert found.tolist() == [True, True, True, False], criterion
    wrong = eb.Misclassify(torch.full((4,), label))
    assert wrong.predict(outputs).tolist() == [-1, -1, -1, label]
    assert wrong.accuracy(seen(outputs)) == 0.25
    assert reached(eb.Target(label), seen(outputs), None).tolist() == [False, False, False, True]
    own = outputs[label].expand(1, 3)
    assert not reached(eb.Promote(label, 2), seen(own), None)
    assert reached(eb.Demote(label, 2), seen(own), None)
    single = torch.tensor([[torch.nan], [1.0], [-1.0]])
    for value, fooled in ((0, [True, True, False]), (1, [True, False, True])):
        criterion = eb.Misclassify(torch.full((3,), value))
        assert reached(criterion, seen(single), None).tolist() == fooled
    # What was no class before has none to lose, and AutoAttack leaves it alone.
    assert not reached(eb.Diverge(), seen(good.repeat(4, 1)), seen(outputs)).any()


def test_a_model_that_breaks_under_attack_counts_as_fooled() -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Flatten(), torch.nn.Linear(8, 2))
    tokens = torch.arange(6).reshape(3, 2)
    with torch.no_grad():
        table = model[0].weight.clone()

    def loss_fn() -> eb.Evaluation:
        embedded = model[0](tokens)
        moved = (embedded - table[tokens]).abs().amax((1, 2)) > 1e-6
        logits = model[2](model[1](embedded))
        return eb.Evaluation(outputs=torch.where(moved[:, None], torch.nan, logits))

    site = eb.Site(model[0])
    for labels in (torch.zeros(3), torch.ones(3)):
        criterion = eb.Misclassify(labels.long())
        result = eb.UniformNoise(eps=1.0).run(loss_fn, site, criterion=criterion)
        assert result.robust_accuracy == 0
        assert result.predictions.tolist() == [-1, -1, -1]
