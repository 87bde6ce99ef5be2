"""Intervals, paired tests and corrections, against counts by hand and scipy."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

pytest.importorskip("scipy")

from embattle.audit.outcomes import Attacked
from embattle.audit.scores import (
    CLEAN,
    WORST,
    corrected,
    read_outcomes,
    score_models,
    write_outcomes,
)
from embattle.audit.statistics import (
    bootstrap,
    holm,
    mcnemar,
    percentile_interval,
    permutation_tests,
    wilson,
)
from embattle.tasks import (
    BinaryClassification,
    Classification,
    Kind,
    MultiLabelClassification,
    Ranking,
    Regression,
)
from embattle.tasks.kinds.weighted import Area, Mean
from scipy import stats


def made(kind: Kind, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Outputs that have something to do with the labels, some of them equal."""
    draw = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, 4, generator=draw).mul(4).round() / 4
    if isinstance(kind, BinaryClassification):
        labels = torch.randint(2, (count,), generator=draw)
        return noise[:, 0] + labels, labels
    if isinstance(kind, Classification):
        labels = torch.randint(3, (count,), generator=draw)
        return noise[:, :3] + torch.eye(3)[labels], labels
    if isinstance(kind, MultiLabelClassification):
        labels = torch.randint(2, (count, 4), generator=draw)
        return noise + labels, labels
    if isinstance(kind, Regression):
        labels = torch.randn(count, generator=draw)
        return labels + noise[:, 0] / 2, labels
    scores = torch.randn(count, 20, generator=draw).mul(2).round()
    return scores, torch.randint(20, (count,), generator=draw)


KINDS = [
    Classification(("a", "b", "c")),
    BinaryClassification(),
    MultiLabelClassification(),
    Regression(within=0.5),
    Ranking(5),
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: type(kind).__name__)
def test_weighted_measures_are_the_scores_of_repeated_samples(kind: Kind) -> None:
    outputs, labels = made(kind, 60)
    found = kind.weighted(outputs, labels)
    assert set(found) == set(kind.scores(outputs, labels))
    counts = torch.randint(1, 4, (2, 60), generator=torch.Generator().manual_seed(1))
    counts[0] = 1
    counts[1, ::7] = 0
    for row in counts:
        times = torch.repeat_interleave(torch.arange(60), row)
        expected = kind.scores(outputs[times], labels[times])
        for key, measure in found.items():
            value = float(measure(row[None].double())[0])
            assert value == pytest.approx(expected[key], rel=1e-5, abs=1e-6), key


def test_what_is_not_defined_is_nan() -> None:
    scores = torch.tensor([0.1, 0.2, 0.3])
    area = Area(scores, torch.tensor([True, False, True]))
    weights = torch.tensor([[1.0, 1, 1], [1, 0, 1], [0, 2, 3]]).double()
    assert area(weights).nan_to_num(-1).tolist() == [0.5, -1, 1]
    kind = Regression(within=1.0)
    same = kind.weighted(torch.arange(3.0), torch.full((3,), 7.0))
    assert math.isnan(float(same["r2"](torch.ones(1, 3).double())))


def test_an_area_has_no_interval_where_draws_lack_a_class() -> None:
    """The mean over the classes that are left is another measure, and may be far away."""
    labels = torch.tensor([0, 1] * 10 + [2])
    logits = torch.eye(3)[labels] * 4
    logits[-1] = torch.tensor([4.0, 4.0, -9.0])
    kind = Classification()
    assert kind.scores(logits, labels)["auc"] < 0.7
    intervals = bootstrap(kind.weighted(logits, labels), len(labels))
    assert percentile_interval(intervals["auc"]) is None
    assert percentile_interval(intervals["accuracy"]) is not None


def test_wilson_against_its_formula() -> None:
    z = float(stats.norm.ppf(0.975))
    for k, n in ((0, 20), (7, 20), (20, 20), (611, 1000)):
        p = k / n
        centre, half = p + z * z / 2 / n, z * math.sqrt(p * (1 - p) / n + z * z / 4 / n / n)
        low, high = wilson(k, n)
        assert low == pytest.approx((centre - half) / (1 + z * z / n), abs=1e-12)
        assert high == pytest.approx((centre + half) / (1 + z * z / n), abs=1e-12)


@pytest.mark.parametrize("measure", ["mean", "area", "share"])
def test_intervals_cover_what_they_should(measure: str) -> None:
    """95 % of the intervals hold the truth; of 300, 4 standard deviations are 15."""
    draw = torch.Generator().manual_seed(5)
    held = 0
    for _ in range(300):
        if measure == "mean":
            values = torch.randn(80, generator=draw).exp()
            truth, one = math.exp(0.5), Mean(values)
        elif measure == "area":
            positive = torch.arange(80) < 40
            values = torch.randn(80, generator=draw) + positive
            # P(x + 1 > y) of two standard normals.
            truth, one = float(stats.norm.cdf(1 / math.sqrt(2))), Area(values, positive)
        else:
            truth = 0.93
            right = int((torch.rand(80, generator=draw) < truth).sum())
            low, high = wilson(right, 80)
            held += low <= truth <= high
            continue
        interval = percentile_interval(bootstrap({0: one}, 80, draws=400)[0])
        assert interval is not None
        held += interval[0] <= truth <= interval[1]
    # Percentiles of the mean of a skewed distribution cover somewhat less than they should.
    least = {"mean": 255, "area": 270, "share": 270}[measure]
    assert least <= held <= 299


def test_mcnemar_is_the_binomial_test_of_the_discordant_pairs() -> None:
    first = torch.tensor([True] * 50 + [True] * 12 + [False] * 3 + [False] * 9)
    second = torch.tensor([True] * 50 + [False] * 12 + [True] * 3 + [False] * 9)
    by_hand = 2 * sum(math.comb(15, k) for k in range(4)) / 2**15
    assert mcnemar(first, second) == pytest.approx(by_hand, rel=1e-9)
    assert mcnemar(second, first) == pytest.approx(by_hand, rel=1e-9)
    assert mcnemar(first, second) == pytest.approx(stats.binomtest(3, 15).pvalue, rel=1e-12)
    assert mcnemar(first, first) == 1.0


def test_permutations_against_all_of_them() -> None:
    a, b = torch.tensor([1.0, 2, 3, 0, 2, 5, 1, 4]), torch.tensor([2.0, 2, 5, 3, 1, 6, 4, 4])
    off = (b - a).tolist()
    every = [
        abs(sum(s * d for s, d in zip(signs, off, strict=True)))
        for signs in itertools.product((1, -1), repeat=8)
    ]
    exact = sum(total >= abs(sum(off)) - 1e-9 for total in every) / len(every)
    found = permutation_tests({"mean": Mean(torch.cat([a, b]))}, 8, draws=20_000)
    assert found["mean"][0] == pytest.approx(sum(off) / 8)
    assert found["mean"][1] == pytest.approx(exact, abs=0.01)
    # It agrees with McNemar's test, which is the same of truth values.
    kept, lost = torch.rand(2, 40, generator=torch.Generator().manual_seed(0)) < 0.7
    both = permutation_tests({0: Mean(torch.cat([kept, lost]))}, 40, draws=20_000)[0]
    assert both[1] == pytest.approx(mcnemar(kept, lost), abs=0.015)


def test_permutations_are_rarely_sure_where_nothing_differs() -> None:
    """At most 5 % of the tests reject, also of AUC: of 200, 4 standard deviations are 12."""
    draw = torch.Generator().manual_seed(2)
    positive, rejected = torch.arange(40) < 20, 0
    for _ in range(200):
        shared = torch.randn(40, generator=draw) + positive
        pair = torch.cat([shared + torch.randn(40, generator=draw) for _ in range(2)])
        joined = {0: Area(pair, torch.cat([positive, positive]))}
        rejected += permutation_tests(joined, 40, draws=199)[0][1] <= 0.05
    assert rejected <= 22
    better = torch.cat([torch.randn(40, generator=draw), 3.0 * positive])
    assert permutation_tests({0: Area(better, positive.repeat(2))}, 40, draws=199)[0][1] < 0.01


def test_holm_by_hand() -> None:
    # Ordered .005, .01, .03, .04: times 4, 3, 2, 1, and never smaller than the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
    left = holm([0.02, math.nan, 0.03])
    assert left[0] == pytest.approx(0.04)
    assert math.isnan(left[1])
    assert left[2] == pytest.approx(0.04)
    family = [{"measure": key, "p": p} for key, p in (("a", 0.03), ("b", 0.04), ("a", 0.02))]
    found = corrected(family)
    assert [one["p_corrected"] for one in found] == pytest.approx([0.04, 0.04, 0.04])
    assert [one["correction"] for one in found] == ["Holm, of 2", "Holm, of 1", "Holm, of 2"]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: type(kind).__name__)
def test_models_are_scored_and_compared(kind: Kind) -> None:
    outputs, labels = made(kind, 60)
    others = made(kind, 60, seed=3)[0]
    models = {
        "a": {CLEAN: Attacked.clean(outputs, kind.right(outputs, labels))},
        "b": {CLEAN: Attacked.clean(others, kind.right(others, labels))},
    }
    for name, rows in models.items():
        moved = others if name == "a" else outputs
        rows["PGD"] = Attacked.clean(moved, kind.right(moved, labels))
        rows[WORST] = rows["PGD"]
    scored, comparisons = score_models(kind, labels, models)
    headline = kind.measures[0][0]
    for rows in scored.values():
        for row, entry in rows.items():
            for key, (low, high) in entry["intervals"].items():
                assert low <= entry[key] <= high, (row, key)
            assert set(entry["intervals"]) >= {key for key, _ in kind.measures}
            assert ("success_rate" in entry) == (row != CLEAN)
    assert len(comparisons) == 3 * len(kind.measures)
    for one in comparisons:
        assert one["models"] == ["a", "b"]
        entries = [scored[name][one["attack"]][one["measure"]] for name in "ab"]
        assert one["difference"] == pytest.approx(entries[1] - entries[0], abs=1e-6)
        assert one["interval"][0] <= one["difference"] <= one["interval"][1]
        assert 0 < one["p"] <= one["p_corrected"] <= 1
        assert (one["test"] == "exact McNemar") == (one["measure"] in (headline, "hit_rate"))


def test_reports_of_classes_by_hand() -> None:
    logits = torch.tensor([[0.0, 2.0], [0.0, 1.0], [3.0, 0.0], [0.0, 0.5]])
    labels = torch.tensor([1, 0, 0, 1])
    found = Classification(("no", "yes")).details(logits, labels)
    assert found["per_class"]["no"] == pytest.approx(
        {"precision": 1, "recall": 0.5, "f1": 2 / 3, "count": 2}
    )
    assert found["per_class"]["yes"] == pytest.approx(
        {"precision": 2 / 3, "recall": 1, "f1": 0.8, "count": 2}
    )
    sure = [1 / (1 + math.exp(-x)) for x in (2.0, 1.0, 3.0, 0.5)]
    off = [1 - sure[0], sure[1], 1 - sure[2], 1 - sure[3]]
    assert found["calibration"]["brier"] == pytest.approx(2 * sum(x * x for x in off) / 4)
    # Each is in a bin of its own (of 15): .881, .731, .953 and .622.
    ece = sum(abs(right - p) for right, p in zip((1, 0, 1, 1), sure, strict=True)) / 4
    assert found["calibration"]["ece"] == pytest.approx(ece, abs=1e-6)
    both = MultiLabelClassification(("x", "y")).details(logits, torch.tensor([[0, 1]] * 4))
    assert both["per_class"]["x"] == {"precision": 0, "recall": 0, "f1": 0, "count": 0}
    assert both["per_class"]["y"] == {"precision": 1, "recall": 0.75, "f1": 6 / 7, "count": 4}


def test_outcomes_are_read_back(tmp_path: Path) -> None:
    right = torch.tensor([True, False, True])
    wanted = {
        "m": {CLEAN: Attacked.clean(right, right), "PGD-3, step 0.5": Attacked.clean(right, ~right)}
    }
    write_outcomes(tmp_path / "o.safetensors", wanted, part="abc")
    part, found = read_outcomes(tmp_path / "o.safetensors")
    assert part == "abc"
    assert {row: found["m"][row].tolist() for row in found["m"]} == {
        CLEAN: [True, False, True],
        "PGD-3, step 0.5": [False, True, False],
    }
    old, once = tmp_path / "old.safetensors", (tmp_path / "o.safetensors").read_bytes()
    for _ in range(20):  # an order of keys would be drawn anew each time
        write_outcomes(tmp_path / "o.safetensors", wanted, part="abc")
        assert (tmp_path / "o.safetensors").read_bytes() == once
    about = {"part": "abc", "names": json.dumps([["m", CLEAN]])}  # as it was written once
    safetensors.torch.save_file({"0": right}, old, metadata=about)
    assert read_outcomes(old)[1]["m"][CLEAN].tolist() == right.tolist()
