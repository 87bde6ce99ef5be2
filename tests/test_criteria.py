"""Criteria against their definitions in plain Python, and against input that they cannot take."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import embattle as eb
import numpy as np
import plain
import pytest
import torch
from embattle import criteria
from embattle.criteria import ascended, reached
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

Evaluation, Criterion = eb.Evaluation, eb.Criterion
INF = math.inf
# Outputs and the labels' shape.
LAYOUTS = {
    "one logit": ((6,), (6,)),
    "one logit in a column": ((6, 1), (6,)),
    "two classes": ((6, 2), (6,)),
    "classes": ((6, 4), (6,)),
    "as many classes as samples": ((4, 4), (4,)),
    "one sample": ((1, 3), (1,)),
    "sequences": ((6, 3, 4), (6, 3)),
    "binary sequences": ((6, 3, 1), (6, 3)),
}
SEEDS = range(3)


def outputs_of(layout: str, seed: int) -> Tensor:
    """Small integers, so that there are ties."""
    torch.manual_seed(seed)
    return torch.randint(-2, 3, LAYOUTS[layout][0]).double()


def labels_of(layout: str, outputs: Tensor, holes: bool = True) -> Tensor:
    """Class numbers, of which the first sample has none and others have gaps."""
    shape = LAYOUTS[layout][1]
    labels = torch.randint(0, eb.losses.classes(outputs), shape)
    if holes:
        labels = torch.where(torch.rand(shape) < 0.3, -100, labels)
        labels[0] = -100
    return labels


def seen(outputs: Tensor, losses: Tensor | None = None) -> eb.Evaluation:
    return Evaluation(losses, outputs)


def checked(criterion: eb.Criterion, outputs: Tensor) -> eb.Evaluation:
    evaluation = seen(outputs)
    criterion.check(evaluation)
    return evaluation


def same(got: Tensor | None, expected: list[Any]) -> None:
    assert got is not None
    want = torch.tensor(expected, dtype=got.dtype).reshape(got.shape)
    torch.testing.assert_close(got, want)


# ---- Definitions ----


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ascend", ["loss", "cross_entropy", "margin", "dlr"])
def test_misclassify_is_its_definition(ascend: Any, layout: str, seed: int) -> None:
    outputs = outputs_of(layout, seed)
    if ascend == "dlr" and eb.losses.classes(outputs) < 3:
        return  # refused, see below
    labels = labels_of(layout, outputs)
    criterion = eb.Misclassify(labels, ascend=ascend)
    now = checked(criterion, outputs)
    formula = getattr(plain, "cross_entropy" if ascend == "loss" else ascend)
    same(
        ascended(criterion, now, None),
        plain.over_labels(formula, outputs.tolist(), labels.tolist()),
    )
    right = [
        [plain.predicted(row) == label for row, label in plain.places(*pair)]
        for pair in zip(outputs.tolist(), labels.tolist(), strict=True)
    ]
    same(reached(criterion, now, None), [not all(sample) for sample in right])
    same(criterion.counted(now), [bool(sample) for sample in right])
    every = plain.flat(right, 2)
    accuracy = sum(every) / len(every) if every else math.nan
    torch.testing.assert_close(
        criterion.accuracy(now), torch.tensor(accuracy), equal_nan=True, check_dtype=False
    )
    full = labels.clamp(min=0).tolist()
    rows = [
        row for pair in zip(outputs.tolist(), full, strict=True) for row, _ in plain.places(*pair)
    ]
    same(criterion.predict(outputs), [plain.predicted(row) for row in rows])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ascend", ["cross_entropy", "margin"])
@pytest.mark.parametrize("one", [True, False])
def test_target_is_its_definition(ascend: Any, layout: str, seed: int, one: bool) -> None:
    outputs = outputs_of(layout, seed)
    classes = labels_of(layout, outputs)
    if one:
        classes = torch.ones_like(classes)
    criterion = eb.Target(1 if one else classes, ascend)
    now = checked(criterion, outputs)
    values = plain.over_labels(getattr(plain, ascend), outputs.tolist(), classes.tolist())
    same(ascended(criterion, now, None), [-value for value in values])
    hit = [
        [plain.predicted(row) == label for row, label in plain.places(*pair)]
        for pair in zip(outputs.tolist(), classes.tolist(), strict=True)
    ]
    same(reached(criterion, now, None), [bool(sample) and all(sample) for sample in hit])
    assert criterion.accuracy(now) is None
    if one:
        assert criterion.counted(now) is None
    else:
        same(criterion.counted(now), [bool(sample) for sample in hit])
    same(criterion.predict(outputs), eb.losses.predict(outputs).tolist())


@pytest.mark.parametrize("shape", [(6,), (6, 1), (6, 4), (4, 4), (1, 2), (3, 2, 4)])
@pytest.mark.parametrize("ascend", ["loss", "bce", "margin"])
@pytest.mark.parametrize("threshold", [0.5, 0.8])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_multi_label_is_its_definition(
    ascend: Any, shape: tuple[int, ...], threshold: float, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    outputs = torch.randint(-2, 3, shape).double()
    labels = torch.where(torch.rand(shape) < 0.2, -100, torch.randint(0, 2, shape))
    labels[0] = -100
    criterion = eb.MultiLabel(labels.to(dtype), threshold, ascend)
    now = checked(criterion, outputs)
    depth = len(shape) - 1
    cut = math.log(threshold / (1 - threshold))
    values, wrong = [], []
    for xs, ys in zip(outputs.tolist(), labels.tolist(), strict=True):
        pairs = zip(plain.flat(xs, depth), plain.flat(ys, depth), strict=True)
        kept = [(x, y) for x, y in pairs if y != -100]
        if ascend == "margin":
            values.append(max([(cut - x) if y else (x - cut) for x, y in kept], default=0.0))
        else:
            values.append(plain.mean([plain.bce(x, y) for x, y in kept]))
        wrong.append([(1 / (1 + math.exp(-x)) > threshold) != bool(y) for x, y in kept])
    same(ascended(criterion, now, None), values)
    same(reached(criterion, now, None), [any(sample) for sample in wrong])
    same(criterion.counted(now), [bool(sample) for sample in wrong])
    every = plain.flat(wrong, 2)
    accuracy = 1 - sum(every) / len(every) if every else math.nan
    torch.testing.assert_close(
        criterion.accuracy(now), torch.tensor(accuracy), equal_nan=True, check_dtype=False
    )
    same(criterion.predict(outputs), (outputs.sigmoid() > threshold).long().tolist())


@pytest.mark.parametrize("shape", [(6,), (6, 1), (6, 3), (4, 4), (1, 1), (3, 2, 4)])
@pytest.mark.parametrize("several", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_deviate_is_its_definition(
    shape: tuple[int, ...], several: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    outputs, targets = torch.randn(shape).double(), torch.randint(-1, 2, shape).to(dtype)
    by = torch.rand(shape[0]) + 0.5 if several else torch.tensor(1.2)
    criterion = eb.Deviate(targets, by if several else 1.2)
    now = checked(criterion, outputs)
    depth = len(shape) - 1
    off = [
        [abs(a - b) for a, b in zip(plain.flat(x, depth), plain.flat(y, depth), strict=True)]
        for x, y in zip(outputs.tolist(), targets.tolist(), strict=True)
    ]
    bounds = by.expand(shape[0]).tolist()
    same(ascended(criterion, now, None), [max(sample) for sample in off])
    far = [[d > bound for d in sample] for sample, bound in zip(off, bounds, strict=True)]
    same(reached(criterion, now, None), [any(sample) for sample in far])
    every = plain.flat(far, 2)
    same(criterion.accuracy(now), [1 - sum(every) / len(every)])
    assert criterion.predict(outputs) is outputs
    assert criterion.counted(now) is None


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("masked", [0.0, 0.4, 0.9])
@pytest.mark.parametrize("one", [True, False])
def test_places_in_a_ranking_are_their_definition(
    seed: int, k: int, masked: float, one: bool
) -> None:
    torch.manual_seed(seed)
    outputs = torch.randint(-2, 3, (12, 5)).double()
    outputs[torch.rand(12, 5) < masked] = -INF
    items = torch.full((12,), 3) if one else torch.randint(0, 5, (12,))
    own = [row[item] for row, item in zip(outputs.tolist(), items.tolist(), strict=True)]
    bars = [
        plain.kth_other(row, item, k)
        for row, item in zip(outputs.tolist(), items.tolist(), strict=True)
    ]
    pairs = list(zip(own, bars, strict=True))
    for kind, sign in ((eb.Promote, 1), (eb.Demote, -1)):
        criterion = kind(3 if one else items, k)
        now = checked(criterion, outputs)
        lead = [sign * (plain.finite(a) - plain.finite(b)) for a, b in pairs]
        same(ascended(criterion, now, None), lead)
        gone = kind is eb.Demote  # what is ruled out is not recommended, whatever else is
        expected = [sign * a > sign * b or (gone and a == -INF) for a, b in pairs]
        same(reached(criterion, now, None), expected)
        assert criterion.accuracy(now) is None
        best = criterion.predict(outputs)
        assert best.shape == (12, k)
        torch.testing.assert_close(outputs.gather(1, best), outputs.sort(1, True).values[:, :k])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("masked", [0.0, 0.4, 0.9])
def test_outrank_is_its_definition(seed: int, k: int, masked: float) -> None:
    torch.manual_seed(seed)
    outputs = torch.randint(-2, 3, (12, 5)).double()
    outputs[torch.rand(12, 5) < masked] = -INF
    items = torch.randint(0, 5, (12,))
    outrank, demote = eb.Outrank(items, k), eb.Demote(items, k)
    now = checked(outrank, outputs)
    expected = []
    for row, item in zip(outputs.tolist(), items.tolist(), strict=True):
        others = sorted((s for i, s in enumerate(row) if i != item), reverse=True)[:k]
        own, bar = row[item], others[-1]
        if own < bar:
            expected.append(plain.finite(bar) - plain.finite(own))
        else:
            expected.append(-sum(own - s for s in others if own > s > -INF))
    same(ascended(outrank, now, None), expected)
    same(reached(outrank, now, None), reached(demote, now, None).tolist())
    if k == 1 and not masked:
        same(ascended(outrank, now, None), ascended(demote, now, None).tolist())


def test_outrank_pushes_an_item_down_where_it_cannot_be_pushed_off() -> None:
    # Three rivals in reach and the other two not: `Demote` of 5 sees the last alone.
    first = torch.tensor([[0.0], [-0.5], [-0.6], [-0.7], [-9.0], [-9.0]])
    scores = torch.nn.Embedding.from_pretrained(first)
    places = {}
    for kind in (eb.Demote, eb.Outrank):
        with eb.Site.weight(scores) as site:
            found = eb.PGD(eps=0.4, norm="l2", steps=10).run(
                lambda: eb.Evaluation(None, scores(torch.arange(6)).T), site, criterion=kind(0, 5)
            )
        places[kind] = int((found.outputs > found.outputs[:, :1]).sum())
    assert places == {eb.Demote: 0, eb.Outrank: 3}


@pytest.mark.parametrize("divergence", eb.losses.DIVERGENCES)
@pytest.mark.parametrize("shape", [(6,), (6, 1), (6, 4), (4, 4), (3, 2, 4)])
def test_diverge_is_its_definition(divergence: Any, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    clean, now = (torch.randint(-2, 3, shape).double().requires_grad_() for _ in range(2))
    criterion = eb.Diverge(divergence)
    before, after = checked(criterion, clean), seen(now)
    value = ascended(criterion, after, before)
    torch.testing.assert_close(value, eb.losses.DIVERGENCES[divergence](clean, now))
    to_clean, to_now = torch.autograd.grad(value.sum(), (clean, now), allow_unused=True)
    assert to_clean is None
    assert to_now is not None
    got = reached(criterion, after, before)
    if divergence == "squared_distance":
        assert got is None
        assert criterion.predict(now) is None
    else:
        moved = eb.losses.predict(clean) != eb.losses.predict(now)
        same(got, [bool(sample.any()) for sample in moved])
        assert not reached(criterion, before, before).any()
        same(criterion.predict(now), eb.losses.predict(now).tolist())
    assert not ascended(criterion, before, before).any()
    with pytest.raises(ValueError, match="clean outputs"):
        criterion.objective(after, None)


def test_maximize_loss_ascends_the_losses() -> None:
    losses = torch.randn(3)
    criterion = eb.MaximizeLoss()
    now = Evaluation(losses)
    criterion.check(now)
    assert criterion.objective(now, None) is losses
    assert reached(criterion, now, None) is None
    assert criterion.accuracy(now) is None
    assert criterion.counted(now) is None
    with pytest.raises(ValueError, match="needs losses"):
        criterion.check(seen(losses))


@pytest.mark.parametrize(
    "criterion",
    [
        lambda: eb.Misclassify(torch.tensor([0, 1, 2])),
        lambda: eb.MultiLabel(torch.ones(3, 4)),
        lambda: eb.Deviate(torch.ones(3, 4), 1),
    ],
)
def test_losses_of_the_loss_function_come_first(criterion: Callable[[], eb.Criterion]) -> None:
    losses, outputs = torch.randn(3), torch.randn(3, 4)
    made = criterion()
    assert made.objective(seen(outputs, losses), None) is losses
    other = "distance" if isinstance(made, eb.Deviate) else "margin"
    formula = type(made)(**{**vars(made), "ascend": other})
    for one in (made, formula):
        assert ascended(one, seen(outputs), None).shape == (3,)
    torch.testing.assert_close(
        formula.objective(seen(outputs, losses), None), formula.objective(seen(outputs), None)
    )


# ---- What is refused ----


def of(labels: Any, kind: Any = torch.int64) -> Tensor:
    return torch.zeros(labels, dtype=kind)


@pytest.mark.parametrize(
    ("make", "outputs", "given", "hint"),
    [
        (lambda: eb.Misclassify(of((5, 1))), (5, 1), (5, 1), r"squeeze\(-1\)"),
        (lambda: eb.Misclassify(of((5, 1))), (5,), (5, 1), r"squeeze\(-1\)"),
        (lambda: eb.Misclassify(of((5, 1))), (5, 3), (5, 1), r"squeeze\(-1\)"),
        (lambda: eb.Misclassify(of((4, 4))), (4, 4), (4, 4), "MultiLabel"),
        (lambda: eb.Misclassify(of((5, 4), torch.bool)), (5, 4), (5, 4), "MultiLabel"),
        (lambda: eb.Misclassify(of((4,))), (5, 4), (4,), "integer labels"),
        (lambda: eb.Misclassify(of((1,))), (5,), (1,), "integer labels"),
        (lambda: eb.Misclassify(of((5, 3))), (5, 7, 3), (5, 3), "last dim"),
        (lambda: eb.Target(of((5, 1))), (5, 1), (5, 1), r"squeeze\(-1\)"),
        (lambda: eb.Target(of((4, 4))), (4, 4), (4, 4), "integer labels"),
        (lambda: eb.Target(of((1,))), (5, 4), (1,), "integer labels"),
        (lambda: eb.MultiLabel(of((5,))), (5, 4), (5,), "Misclassify"),
        (lambda: eb.MultiLabel(of((5,))), (5, 1), (5,), "Misclassify"),
        (lambda: eb.MultiLabel(of((5, 1))), (5,), (5, 1), "MultiLabel"),
        (lambda: eb.MultiLabel(of((4,))), (4, 4), (4,), "Misclassify"),
        (lambda: eb.MultiLabel(of((1, 4))), (5, 4), (1, 4), "MultiLabel"),
        (lambda: eb.Deviate(of((5, 1)), 1), (5,), (5, 1), "reshape"),
        (lambda: eb.Deviate(of((5,)), 1), (5, 1), (5,), "reshape"),
        (lambda: eb.Deviate(of((1,)), 1), (5,), (1,), r"targets \(1,\)$"),
        (lambda: eb.Deviate(of((5,)), torch.ones(4)), (5,), (4,), "by must"),
        (lambda: eb.Deviate(of((5,)), torch.ones(1)), (5,), (1,), "by must"),
        (lambda: eb.Promote(of((5, 1)), 1), (5, 4), (5, 1), "one for each"),
        (lambda: eb.Promote(of((1,)), 1), (5, 4), (1,), "one for each"),
        (lambda: eb.Demote(of((4,)), 1), (5, 4), (4,), "one for each"),
        (lambda: eb.Demote(of((5,)), 1), (5,), (5,), "scores of all items"),
        (lambda: eb.Promote(of((5,)), 1), (5, 4, 3), (5, 4, 3), "scores of all items"),
        (lambda: eb.Promote(0, 4), (5, 4), (5, 4), "k=4"),
        (lambda: eb.Demote(0, 1), (5, 1), (5, 1), "k=1"),
    ],
)
def test_shapes_that_do_not_match_are_refused(
    make: Callable[[], eb.Criterion], outputs: tuple[int, ...], given: tuple[int, ...], hint: str
) -> None:
    criterion, evaluation = make(), seen(torch.zeros(outputs))
    with pytest.raises(ValueError, match=hint) as error:
        criterion.check(evaluation)
    assert type(criterion).__name__ in str(error.value)
    assert str(outputs) in str(error.value)
    assert str(given) in str(error.value)
    if "by must" not in hint and "k=" not in hint:  # nor do they broadcast where nobody checked
        with pytest.raises(ValueError, match=r"\(.*\)"):
            criterion.reached(evaluation, evaluation)


@pytest.mark.parametrize(
    ("make", "outputs", "value"),
    [
        (lambda x: eb.Misclassify(x), (3, 4), 4),
        (lambda x: eb.Misclassify(x), (3, 4), -1),
        (lambda x: eb.Misclassify(x, ignore_index=-1), (3, 4), -100),
        (lambda x: eb.Misclassify(x.to(torch.int16)), (3, 4), 300),
        (lambda x: eb.Misclassify(x.to(torch.uint8)), (3, 4), 156),
        (lambda x: eb.Misclassify(x), (3,), 2),
        (lambda x: eb.Misclassify(x), (3, 1), 5),
        (lambda x: eb.Target(x), (3, 4), 4),
        (lambda x: eb.Target(x), (3, 4), -1),
        (lambda x: eb.Target(int(x[1])), (3, 4), 4),
        (lambda x: eb.Target(x), (3, 1), 2),
        (lambda x: eb.Promote(x, 1), (3, 4), 4),
        (lambda x: eb.Promote(x, 1), (3, 4), -100),
        (lambda x: eb.Demote(int(x[1]), 1), (3, 4), 4),
    ],
)
def test_numbers_that_are_no_class_are_refused(
    make: Callable[[Tensor], eb.Criterion], outputs: tuple[int, ...], value: int
) -> None:
    # On a GPU it is a device assertion, which ends the process.
    labels = torch.tensor([0, value, 0], device="cpu")
    criterion, evaluation = make(labels), seen(torch.zeros(outputs, device="cpu"))
    with pytest.raises(ValueError, match=rf"\[0, \d\) for outputs .*got {value}$"):
        criterion.check(evaluation)


@pytest.mark.parametrize("shape", [(3,), (3, 1), (3, 2)])
def test_dlr_of_two_classes_is_refused(shape: tuple[int, ...]) -> None:
    criterion = eb.Misclassify(of((3,)), ascend="dlr")
    with pytest.raises(ValueError, match=r"three classes.*margin"):
        criterion.check(seen(torch.zeros(shape)))


def labels(*values: float, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values, dtype=dtype, device="cpu")


FLOATS = torch.float32


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: eb.Misclassify([0, 1]), TypeError, "labels must be a tensor, got list"),
        (lambda: eb.Misclassify(np.zeros(2, int)), TypeError, "labels must be a tensor"),
        (lambda: eb.Misclassify(labels(0, 1, dtype=FLOATS)), ValueError, "integers.*Deviate"),
        (lambda: eb.Misclassify(labels(3.5, 2, dtype=FLOATS)), ValueError, "integers.*Deviate"),
        (lambda: eb.Misclassify(torch.tensor(1)), ValueError, "each sample"),
        (lambda: eb.Misclassify(labels(0), ignore_index=0.5), TypeError, "ignore_index"),
        (lambda: eb.Misclassify(labels(0), ignore_index=None), TypeError, "ignore_index"),
        (lambda: eb.Misclassify(labels(0), ascend="kl"), ValueError, "ascend must be one of"),
        (lambda: eb.Target(1.0), TypeError, "classes must be an integer"),
        (lambda: eb.Target(True), TypeError, "classes must be an integer"),
        (lambda: eb.Target([1]), TypeError, "classes must be an integer"),
        (lambda: eb.Target(-1), ValueError, "classes must be at least 0"),
        (lambda: eb.Target(labels(1, dtype=FLOATS)), ValueError, "classes must be integers"),
        (lambda: eb.Target(1, "loss"), ValueError, "ascend must be one of"),
        (lambda: eb.MultiLabel([[0, 1]]), TypeError, "labels must be a tensor"),
        (lambda: eb.MultiLabel(labels(0, 1, 2)), ValueError, "0, 1 or.*Misclassify; got 2"),
        (lambda: eb.MultiLabel(labels(0, -1)), ValueError, "0, 1 or.*got -1"),
        (lambda: eb.MultiLabel(labels(0.3, dtype=FLOATS)), ValueError, r"0, 1 or.*got 0\.3"),
        (lambda: eb.MultiLabel(labels(math.nan, dtype=FLOATS)), ValueError, "got nan"),
        (lambda: eb.MultiLabel(labels(0), threshold="0.5"), TypeError, "threshold"),
        (lambda: eb.MultiLabel(labels(0), threshold=0), ValueError, "threshold"),
        (lambda: eb.MultiLabel(labels(0), threshold=1), ValueError, "threshold"),
        (lambda: eb.MultiLabel(labels(0), threshold=math.nan), ValueError, "threshold"),
        (lambda: eb.MultiLabel(labels(0), ascend="dlr"), ValueError, "ascend"),
        (lambda: eb.Deviate([0.0], 1), TypeError, "targets must be a tensor"),
        (lambda: eb.Deviate(labels(1, dtype=torch.bool), 1), ValueError, "targets.*Misclassify"),
        (lambda: eb.Deviate(labels(1, math.nan, dtype=FLOATS), 1), ValueError, "finite.*got nan"),
        (lambda: eb.Deviate(labels(1, INF, dtype=FLOATS), 1), ValueError, "finite.*got inf"),
        (lambda: eb.Deviate(labels(1), 0), ValueError, "by must be above 0"),
        (lambda: eb.Deviate(labels(1), -1), ValueError, "by must be at least 0"),
        (lambda: eb.Deviate(labels(1), "1"), TypeError, "by must be a number"),
        (lambda: eb.Deviate(labels(1), True), TypeError, "by must be a number"),
        (lambda: eb.Deviate(labels(1, 1), labels(1, 0)), ValueError, "by must be above 0.*got 0"),
        (lambda: eb.Deviate(labels(1), torch.tensor(1.0)), ValueError, "number or .B. numbers"),
        (lambda: eb.Deviate(labels(1), torch.ones(1, 1)), ValueError, "number or .B. numbers"),
        (lambda: eb.Deviate(labels(1), 1, "margin"), ValueError, "ascend"),
        (lambda: eb.Promote(1.0, 1), TypeError, "items must be an integer"),
        (lambda: eb.Promote(-1, 1), ValueError, "items must be at least 0"),
        (lambda: eb.Promote(labels(1, dtype=FLOATS), 1), ValueError, "items must be integers"),
        (lambda: eb.Promote(labels(1, dtype=torch.bool), 1), ValueError, "item numbers"),
        (lambda: eb.Promote(1, 0), ValueError, "k must be at least 1"),
        (lambda: eb.Demote(1, 2.0), TypeError, "k must be an integer"),
        (lambda: eb.Demote(1, True), TypeError, "k must be an integer"),
        (lambda: eb.Diverge("js"), ValueError, "divergence must be one of"),
        (lambda: eb.Diverge(None), ValueError, "divergence must be one of"),
    ],
)
def test_arguments_are_checked_at_construction(
    make: Callable[[], object], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        make()


@pytest.mark.parametrize(
    "criterion", [eb.Misclassify(labels(0, 1)), eb.Promote(0, 1), eb.Diverge()]
)
def test_outputs_must_be_there_and_be_scores(criterion: eb.Criterion) -> None:
    for method in (criterion.check, lambda e: criterion.reached(e, e)):
        with pytest.raises(ValueError, match=r"outputs.*Evaluation\(losses, outputs\)"):
            method(Evaluation(torch.zeros(2)))
    with pytest.raises(ValueError, match="floating point"):
        criterion.check(seen(torch.zeros(2, 3, dtype=torch.int64)))


def test_labels_elsewhere_are_refused() -> None:
    criterion = eb.Misclassify(torch.zeros(3, dtype=torch.int64, device="meta"))
    with pytest.raises(ValueError, match=r"labels is on meta.*labels\.to\("):
        criterion.check(seen(torch.zeros(3, 4)))


# ---- Numbers that break such code ----


def test_samples_without_labels_are_neither_right_nor_wrong() -> None:
    outputs = torch.tensor([[3.0, 0.0], [0.0, 3.0], [3.0, 0.0], [0.0, 3.0]])
    criterion = eb.Misclassify(torch.tensor([0, -100, 1, -100]))
    now = checked(criterion, outputs)
    assert criterion.reached(now, None).tolist() == [False, False, True, False]
    assert criterion.counted(now).tolist() == [True, False, True, False]
    assert criterion.accuracy(now).item() == 0.5
    nothing = eb.Misclassify(torch.full((4,), -100))
    nothing.check(now)
    assert not nothing.reached(now, None).any()
    assert not nothing.counted(now).any()
    assert nothing.accuracy(now).isnan()
    assert not nothing.objective(now, None).any()


@pytest.mark.parametrize(
    ("criterion", "shape", "goal"),
    [
        (eb.Misclassify(torch.tensor([0, 1])), (2, 3), True),
        (eb.Misclassify(torch.tensor([0, 1])), (2,), True),
        (eb.Misclassify(torch.tensor([0, 1])), (2, 1), True),
        (eb.Misclassify(torch.zeros(2, 4).long()), (2, 4, 3), True),
        (eb.MultiLabel(torch.tensor([[0, 0], [1, 0]])), (2, 2), True),
        (eb.Deviate(torch.zeros(2, 3), by=1.0), (2, 3), True),
        (eb.Demote(0, k=1), (2, 3), True),
        (eb.Outrank(0, k=1), (2, 3), True),
        (eb.Target(0), (2, 3), False),
        (eb.Promote(0, k=1), (2, 3), False),
    ],
)
def test_outputs_that_are_nan_are_never_right(
    criterion: eb.Criterion, shape: tuple[int, ...], goal: bool
) -> None:
    """The label 0 is the class that argmax and comparisons give for them."""
    same(reached(criterion, seen(torch.full(shape, math.nan)), None), [goal, goal])
    one = torch.zeros(shape)
    one.view(-1)[-1] = math.nan
    if isinstance(criterion, eb.Misclassify):
        predicted = criterion.predict(one)
        assert predicted is not None
        assert (predicted[1] == -1).any()
        assert not (predicted[0] == -1).any()


def test_a_target_at_some_places_of_a_sequence() -> None:
    outputs = torch.eye(3)[torch.tensor([[1, 2, 0], [1, 1, 0], [0, 0, 0]])]
    criterion = eb.Target(torch.tensor([[1, 2, -100], [1, 2, -100], [-100, -100, -100]]))
    now = checked(criterion, outputs)
    assert criterion.reached(now, None).tolist() == [True, False, False]


@pytest.mark.parametrize(
    "criterion",
    [eb.Misclassify(labels(0, 1), ascend="margin"), eb.Target(2, "margin")],
)
def test_saturated_logits_keep_a_gradient(criterion: eb.Criterion) -> None:
    outputs = torch.tensor([[9e4, 0.0, -9e4], [0.0, 9e4, 0.0]], device="cpu").requires_grad_()
    value = ascended(criterion, checked(criterion, outputs), None)
    assert torch.autograd.grad(value.sum(), outputs)[0].abs().sum(1).tolist() == [2.0, 2.0]


@pytest.mark.parametrize("ascend", ["bce", "margin"])
def test_ruled_out_labels_do_no_harm(ascend: Any) -> None:
    outputs = torch.tensor([[-INF, 1.0], [-INF, -1.0]]).requires_grad_()
    criterion = eb.MultiLabel(torch.tensor([[0, 1], [0, 1]]), ascend=ascend)
    now = checked(criterion, outputs)
    value = ascended(criterion, now, None)
    expected = [plain.bce(1, 1) / 2, plain.bce(-1, 1) / 2] if ascend == "bce" else [-1.0, 1.0]
    same(value, expected)
    assert torch.autograd.grad(value.sum(), outputs)[0].isfinite().all()
    assert criterion.reached(now, None).tolist() == [False, True]


def test_ties_do_not_reach_a_place_and_keep_a_gradient() -> None:
    outputs = torch.ones(1, 4).requires_grad_()
    for kind, sign in ((eb.Promote, 1.0), (eb.Demote, -1.0), (eb.Outrank, -1.0)):
        for item in range(4):
            criterion = kind(item, 2)
            now = checked(criterion, outputs)
            assert not criterion.reached(now, None)
            slopes = torch.autograd.grad(criterion.objective(now, None).sum(), outputs)[0]
            assert slopes[0, item] == sign
            assert slopes.sum() == 0


def test_masked_items_keep_gradients_finite() -> None:
    scores = torch.tensor([[-INF, 2.0, 1.0, -INF], [-INF, -INF, -INF, 1.0]]).requires_grad_()
    for kind in (eb.Promote, eb.Demote, eb.Outrank):
        for item in range(4):
            criterion = kind(item, 2)
            now = checked(criterion, scores)
            value = ascended(criterion, now, None)
            assert value.isfinite().all()
            assert torch.autograd.grad(value.sum(), scores)[0].isfinite().all()
    promote, demote = eb.Promote(0, 2), eb.Demote(0, 2)
    assert promote.reached(seen(scores), None).tolist() == [False, False]
    # What is ruled out is not recommended, also where fewer than k others are left.
    assert demote.reached(seen(scores), None).tolist() == [True, True]
    assert eb.Demote(3, 2).reached(seen(scores), None).tolist() == [True, False]


def test_targets_that_are_the_clean_outputs_have_a_gradient() -> None:
    outputs = torch.tensor([1.0, 2.0]).requires_grad_()
    criterion = eb.Deviate(outputs, by=0.5)
    assert not criterion.targets.requires_grad
    value = ascended(criterion, checked(criterion, outputs), None)
    assert value.tolist() == [0.0, 0.0]
    assert torch.autograd.grad(value.sum(), outputs)[0].tolist() == [1.0, 1.0]


def test_masked_scores_diverge_by_what_is_left() -> None:
    clean, now = torch.tensor([[1.0, -INF, 0.0]]), torch.tensor([[0.0, -INF, 1.0]])
    now.requires_grad_()
    for name in eb.losses.DIVERGENCES:
        value = ascended(eb.Diverge(name), seen(now), seen(clean))
        assert 0 < value.item() < 1
        slopes = torch.autograd.grad(value.sum(), now)[0]
        assert slopes.isfinite().all()
        assert slopes[0, 1] == 0
    assert eb.Diverge().reached(seen(now), seen(clean)).tolist() == [True]


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: eb.Misclassify(of((0,))), (0, 3)),
        (lambda: eb.Misclassify(of((0,))), (0,)),
        (lambda: eb.Misclassify(of((0, 2)), ascend="margin"), (0, 2, 3)),
        (lambda: eb.Target(1), (0, 3)),
        (lambda: eb.Target(of((0,))), (0, 1)),
        (lambda: eb.MultiLabel(of((0, 3))), (0, 3)),
        (lambda: eb.MultiLabel(of((0, 3)), ascend="margin"), (0, 3)),
        (lambda: eb.Deviate(of((0,)), 1), (0,)),
        (lambda: eb.Deviate(of((0, 2)), torch.ones(0)), (0, 2)),
        (lambda: eb.Promote(of((0,)), 2), (0, 3)),
        (lambda: eb.Demote(0, 2), (0, 3)),
        (lambda: eb.Diverge(), (0, 3)),
    ],
)
def test_no_samples(make: Callable[[], eb.Criterion], shape: tuple[int, ...]) -> None:
    criterion = make()
    now = checked(criterion, torch.zeros(shape).requires_grad_())
    assert ascended(criterion, now, now).shape == (0,)
    assert reached(criterion, now, now).shape == (0,)
    assert criterion.predict(now.outputs).shape[0] == 0
    accuracy = criterion.accuracy(now)
    assert accuracy is None or accuracy.isnan()


# ---- One of each, for what all must do ----

EACH: dict[str, tuple[Callable[[], eb.Criterion], tuple[int, ...]]] = {
    "cross_entropy": (lambda: eb.Misclassify(torch.tensor([0, 1, -100, 2, 1, 0])), (6, 3)),
    "margin": (
        lambda: eb.Misclassify(torch.tensor([[0, 1], [-100, 2], [-100, -100]]), ascend="margin"),
        (3, 2, 4),
    ),
    "dlr": (lambda: eb.Misclassify(torch.tensor([0, 1, -100, 2]), ascend="dlr"), (4, 3)),
    "binary": (lambda: eb.Misclassify(torch.tensor([True, False, True])), (3, 1)),
    "target": (lambda: eb.Target(2), (4, 3)),
    "targets": (lambda: eb.Target(torch.tensor([2, -100, 1, 0]), "margin"), (4, 3)),
    "bce": (lambda: eb.MultiLabel(torch.tensor([[0, 1], [1, -100], [-100, -100]])), (3, 2)),
    "label margin": (
        lambda: eb.MultiLabel(torch.tensor([[0, 1], [1, -100], [-100, -100]]), 0.3, "margin"),
        (3, 2),
    ),
    "deviate": (lambda: eb.Deviate(torch.ones(3, 2), torch.tensor([0.1, 1.0, 2.0])), (3, 2)),
    "deviate by one": (lambda: eb.Deviate(torch.ones(3), 0.5), (3,)),
    "promote": (lambda: eb.Promote(torch.tensor([3, 0, 1]), 2), (3, 5)),
    "demote": (lambda: eb.Demote(1, 2), (3, 5)),
    "outrank": (lambda: eb.Outrank(1, 3), (3, 5)),
    "kl": (lambda: eb.Diverge(), (4, 3)),
    "symmetric_kl": (lambda: eb.Diverge("symmetric_kl"), (4, 2, 3)),
    "squared_distance": (lambda: eb.Diverge("squared_distance"), (4, 3)),
}
each = pytest.mark.parametrize("name", EACH)


def one_of_each(name: str) -> tuple[eb.Criterion, eb.Evaluation, eb.Evaluation]:
    make, shape = EACH[name]
    torch.manual_seed(0)
    clean, now = (seen(torch.randn(shape).double()) for _ in range(2))
    return make(), now, clean


# Those of `Outrank` are another function's: the next test.
@pytest.mark.parametrize("name", [name for name in EACH if name != "outrank"])
def test_gradients(name: str) -> None:
    criterion, now, clean = one_of_each(name)
    criterion.check(clean)
    at = now.outputs.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: ascended(criterion, seen(z), clean), at)


def test_outrank_has_the_slopes_of_the_mean_of_the_leads_that_are_left() -> None:
    scores = torch.tensor([[5.0, 9.0, 4.0, 3.0, 2.0], [0.0, 9.0, 4.0, 3.0, 2.0]]).requires_grad_()
    value = eb.Outrank(0, 3).objective(seen(scores), None)
    assert value.tolist() == [-3.0, 3.0]  # -(1 + 2), and the third best is 3 ahead
    slopes = torch.autograd.grad(value.sum(), scores)[0].tolist()
    assert slopes == [[-1.0, 0.0, 0.5, 0.5, 0.0], [-1.0, 0.0, 0.0, 1.0, 0.0]]


@each
def test_select_gives_the_criterion_of_some_samples(name: str) -> None:
    criterion, now, clean = one_of_each(name)
    rows = torch.tensor([2, 0])
    some, now_some, clean_some = criterion.select(rows), now.select(rows), clean.select(rows)
    assert type(some) is type(criterion)
    some.check(clean_some)
    torch.testing.assert_close(
        ascended(some, now_some, clean_some), ascended(criterion, now, clean)[rows]
    )
    whole, part = reached(criterion, now, clean), reached(some, now_some, clean_some)
    assert (whole is None) == (part is None)
    if whole is not None:
        torch.testing.assert_close(part, whole[rows])
    counted = criterion.counted(now)
    if counted is not None:
        torch.testing.assert_close(some.counted(now_some), counted[rows])
    nobody = criterion.select(rows[:0])
    assert ascended(nobody, now.select(rows[:0]), clean.select(rows[:0])).shape == (0,)


@each
def test_labels_made_in_inference_mode(name: str) -> None:
    make, shape = EACH[name]
    with torch.inference_mode():
        criterion = make()  # as under a validation loop
    clean, now = (seen(torch.randn(shape).requires_grad_()) for _ in range(2))
    criterion.check(clean)
    value = ascended(criterion, now, clean)
    assert torch.autograd.grad(value.sum(), now.outputs)[0].any()


@each
def test_pickles_and_copies(name: str) -> None:
    criterion, now, clean = one_of_each(name)
    value = ascended(criterion, now, clean)
    for other in (pickle.loads(pickle.dumps(criterion)), copy.deepcopy(criterion)):
        assert repr(other) == repr(criterion)
        torch.testing.assert_close(ascended(other, now, clean), value)
    assert len(repr(criterion)) < 100
    with pytest.raises(AttributeError):
        criterion.labels = None  # checked once, and so not to be exchanged


@each
def test_nothing_waits_for_a_gpu(name: str) -> None:
    make, shape = EACH[name]
    # Fake tensors have no values: whatever reads one raises.
    with FakeTensorMode(), torch.device("cuda"):
        criterion = make()
        clean, now = seen(torch.zeros(shape)), seen(torch.zeros(shape))
        criterion.check(clean)
        assert ascended(criterion, now, clean).device.type == "cuda"
        criterion.reached(now, clean)
        criterion.predict(now.outputs)
        criterion.accuracy(now)
        criterion.counted(now)


@each
def test_half_precision(name: str) -> None:
    criterion, now, clean = one_of_each(name)
    small, small_clean = seen(now.outputs.bfloat16()), seen(clean.outputs.bfloat16())
    criterion.check(small_clean)
    value = ascended(criterion, small, small_clean)
    torch.testing.assert_close(
        value.double(), ascended(criterion, now, clean), rtol=0.05, atol=0.05
    )


@pytest.mark.parametrize("name", ["Evaluation", *criteria.__all__[:-2]])
def test_criteria_are_public(name: str) -> None:
    assert name in eb.__all__
    assert getattr(eb, name).__module__.startswith(("embattle.criteria", "embattle.perturb"))
