"""The measures of each kind of prediction, against counts by hand and torchmetrics."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from embattle.perturb.evaluation import Evaluation
from embattle.tasks import (
    BinaryClassification,
    Classification,
    Kind,
    MultiLabelClassification,
    Ranking,
    Regression,
)
from embattle.tasks.kinds.weighted import Area
from torch import Tensor


def logit(share: float) -> float:
    return math.log(share / (1 - share))


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Logits, some of them equal."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).mul(4).round() / 4


def precise(values: list[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def classes_of(count: int, among: int) -> Tensor:
    return torch.randint(among, (count,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("count", [2, 5])
def test_classes_agree_with_torchmetrics(count: int) -> None:
    metrics = pytest.importorskip("torchmetrics.functional.classification")
    logits, labels = drawn(50, count), classes_of(50, count - 1)  # the last class is absent
    found = Classification().scores(logits, labels)
    expected = metrics.multiclass_f1_score(logits, labels, num_classes=count, average="macro")
    assert found["f1"] == pytest.approx(float(expected))
    assert math.isnan(found["auc"])
    labels = classes_of(50, count)
    if count == 2:  # in float64, as equal numbers may have unequal sigmoids in float32
        area = metrics.binary_auroc((logits[:, 1] - logits[:, 0]).double().sigmoid(), labels)
        assert Classification().scores(logits, labels)["auc"] == pytest.approx(float(area))
    stats = metrics.multiclass_stat_scores(logits, labels, num_classes=count, average=None)
    per_class = Classification().details(logits, labels)["per_class"]
    for entry, (hits, wrong, _, missed, there) in zip(
        per_class.values(), stats.tolist(), strict=True
    ):
        assert entry["precision"] == pytest.approx(hits / max(1, hits + wrong))
        assert entry["recall"] == pytest.approx(hits / max(1, hits + missed))
        assert entry["count"] == there


def test_several_labels_agree_with_torchmetrics() -> None:
    metrics = pytest.importorskip("torchmetrics.functional.classification")
    logits, labels = drawn(50, 3), drawn(50, 3, seed=1).gt(0).long()
    found = MultiLabelClassification().scores(logits, labels)
    expected = metrics.multilabel_f1_score(logits.sigmoid(), labels, num_labels=3)
    assert found["f1"] == pytest.approx(float(expected))
    area = metrics.multilabel_auroc(logits.double().sigmoid(), labels, num_labels=3)
    assert found["auc"] == pytest.approx(float(area))


def test_certain_predictions_share_the_last_bin_of_the_calibration_error() -> None:
    """Two of four are right with 1, all four with .95: one bin, (4 * 1 + 4 * .95 - 6) / 8."""
    logits = torch.tensor([[0.0, 200.0]] * 4 + [[0.0, logit(0.95)]] * 4)
    labels = torch.tensor([1, 1, 0, 0, 1, 1, 1, 1])
    found = Classification().details(logits, labels)["calibration"]["ece"]
    assert found == pytest.approx((4 + 3.8 - 6) / 8, abs=1e-6)
    several = MultiLabelClassification().details(logits[:, 1:], labels[:, None])
    assert several["calibration"]["ece"] == pytest.approx((4 + 3.8 - 6) / 8, abs=1e-6)


def test_an_edge_belongs_to_the_bin_below_it() -> None:
    """Of five classes alike each has 1/5, the edge of the third bin; .21 is in the fourth."""
    logits = torch.zeros(4, 5)
    logits[2:, 0] = math.log(0.21 / 0.1975)
    found = Classification().details(logits, torch.tensor([0, 1, 0, 1]))["calibration"]["ece"]
    assert found == pytest.approx((abs(1 - 0.4) + abs(1 - 0.42)) / 4, abs=1e-6)


def test_one_label_of_several() -> None:
    kind, logits = MultiLabelClassification(), torch.tensor([[1.0], [-1.0], [2.0]])
    found = kind.scores(logits, torch.tensor([[1], [1], [0]]))
    assert found["all_right"] == pytest.approx(1 / 3)
    assert (found["f1"], found["auc"]) == (0.5, 0)
    assert kind.details(logits, torch.tensor([[1], [1], [0]]))["per_class"]["0"]["count"] == 2


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool])
def test_class_numbers_of_any_integers(dtype: torch.dtype) -> None:
    logits, labels = drawn(20, 2), classes_of(20, 2)
    kind = Classification()
    assert kind.scores(logits, labels.to(dtype)) == kind.scores(logits, labels)
    assert kind.details(logits, labels.to(dtype)) == kind.details(logits, labels)
    if dtype != torch.bool:  # which is no item number
        assert Ranking(1).scores(logits, labels.to(dtype)) == Ranking(1).scores(logits, labels)
        assert Ranking(1).show(logits[0], labels[0].to(dtype)) in ("1", "2")


def test_labels_that_are_not_known_count_nowhere() -> None:
    """The measures of each label are those of the samples of which it is known."""
    kind, logits = MultiLabelClassification(), drawn(40, 3)
    labels = drawn(40, 3, seed=1).gt(0).long()
    unknown = drawn(40, 3, seed=2).gt(0.5)
    some = labels.masked_fill(unknown, -100)
    found, told = kind.scores(logits, some), kind.details(logits, some)
    alone = [
        kind.scores(logits[~gone, c : c + 1], labels[~gone, c : c + 1])
        for c, gone in enumerate(unknown.T)
    ]
    for key in ("f1", "auc"):
        assert found[key] == pytest.approx(sum(one[key] for one in alone) / 3)
    wrong = (logits > 0) != labels.bool()
    assert found["all_right"] == pytest.approx(float((~(wrong & ~unknown)).all(1).double().mean()))
    off = (logits.double().sigmoid() - labels).square()[~unknown]
    assert told["calibration"]["brier"] == pytest.approx(float(off.mean()), abs=1e-6)
    assert [one["count"] for one in told["per_class"].values()] == (some == 1).sum(0).tolist()
    logits[unknown] = 50.0  # whatever is predicted there
    again = kind.scores(logits, some)
    assert again == pytest.approx(found)
    assert kind.show(logits[0], torch.tensor([1, -100, -100])).endswith("of 1")


@pytest.mark.parametrize(
    ("kind", "logits", "labels"),
    [
        (Classification(), (4, 3), [0, 0, 1, 2]),
        (BinaryClassification(), (4,), [0, 0, 1, 1]),
        (MultiLabelClassification(), (4, 2), [[0, 0], [0, 1], [1, 0], [1, 1]]),
        (Ranking(1), (4, 3), [0, 0, 1, 2]),
    ],
)
def test_outputs_that_are_nan_are_the_worst(
    kind: Kind, logits: tuple[int, ...], labels: list[int]
) -> None:
    outputs, truth = torch.full(logits, math.nan), torch.tensor(labels)
    found = kind.scores(outputs, truth)
    assert found[kind.measures[0][0]] == 0
    assert not kind.right(outputs, truth).any()
    if "auc" in found:
        assert found["auc"] == 0
        assert math.isnan(kind.details(outputs, truth)["calibration"]["ece"])


def test_a_right_item_that_is_ruled_out_is_no_hit() -> None:
    """However few others are left; one that is not is a hit then, whatever its score."""
    kind, scores = (
        Ranking(3),
        torch.tensor([[2.0, 1.0, -math.inf, -math.inf, -math.inf]]).repeat(2, 1),
    )
    labels = torch.tensor([3, 1])
    found = kind.scores(scores, labels)
    assert [found[key] for key in ("hit_rate", "ndcg", "mrr")] == [
        0.5, pytest.approx(0.5 / math.log2(3)), 0.25
    ]  # fmt: skip
    assert kind.right(scores, labels).tolist() == [False, True]
    assert kind.badness(scores, labels).tolist() == [5, 1]
    assert Ranking(9).scores(scores, labels)["hit_rate"] == 0.5


@pytest.mark.parametrize("size", [1e-9, 1.0, 1e9])
def test_r2_does_not_depend_on_the_unit(size: float) -> None:
    labels = precise([1.0, 2.0, 4.0, 5.0])
    outputs = precise([1.5, 2.0, 4.0, 4.0])
    kind = Regression(within=0.6)
    once = torch.ones(1, 4).double()
    for found in (
        kind.scores(outputs * size, labels * size)["r2"],
        float(kind.weighted(outputs * size, labels * size)["r2"](once)),
    ):
        assert found == pytest.approx(1 - 1.25 / 10)
    # Drawn thrice, one label is all there is.
    alone = torch.tensor([[0.0, 0.0, 3.0, 0.0]]).double()
    assert kind.weighted(outputs * size, labels * size)["r2"](alone).isnan().all()


@pytest.mark.parametrize("count", [3, 7, 10, 11])
def test_r2_is_not_defined_where_all_labels_are_one(count: int) -> None:
    """Although the mean of so many tenths is not a tenth."""
    labels = precise([0.1] * count)
    assert math.isnan(Regression(within=1.0).scores(labels + 1, labels)["r2"])


def test_the_area_counts_a_score_that_is_nan_against_the_model() -> None:
    area = Area(torch.tensor([math.nan, 1.0, 0.0, math.nan]), torch.tensor([1, 1, 0, 0]).bool())
    assert area(torch.ones(1, 4).double()).tolist() == [0.25]


@pytest.mark.parametrize(
    ("kind", "outputs", "labels"),
    [
        # In float32 the distance of 3.1 and 2.6 is .5, and 3.1 in float64 is a little larger.
        (Regression(within=0.5), torch.tensor([2.6]), precise([3.1])),
        # What float32 cannot tell apart.
        (Classification(), precise([[1.0, 1 + 1e-12]]), torch.tensor([0])),
        (BinaryClassification(), precise([1e-50]), torch.tensor([1])),
        (MultiLabelClassification(), precise([[1e-9]]), torch.tensor([[1]])),
        (Ranking(1), precise([[1.0, 1 + 1e-12]]), torch.tensor([0])),
    ],
)
def test_figures_say_what_is_right_as_attacks_do(
    kind: Kind, outputs: Tensor, labels: Tensor
) -> None:
    """In the outputs' and labels' own precision, whichever it is."""
    at = Evaluation(outputs=outputs)
    reached = kind.criterion(labels).reached(at, at)
    assert reached is not None
    right = float((~reached).double().mean())
    key = kind.measures[0][0]
    assert kind.scores(outputs, labels)[key] == right
    once = torch.ones(1, len(labels), dtype=torch.float64)
    assert float(kind.weighted(outputs, labels)[key](once)) == right
