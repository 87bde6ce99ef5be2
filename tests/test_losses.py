"""Losses against their formulas, on shapes and numbers that have broken such losses before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import plain
import pytest
import torch
from embattle import losses
from torch import Tensor

LABELLED = {name: getattr(losses, name) for name in ("cross_entropy", "margin", "dlr")}
# Logits and the labels' shape: one logit, with and without a class dim; classes; sequences.
LAYOUTS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "one logit": ((5,), (5,)),
    "one logit in a column": ((5, 1), (5,)),
    "two classes": ((5, 2), (5,)),
    "classes": ((5, 4), (5,)),
    "as many classes as samples": ((4, 4), (4,)),
    "one sample": ((1, 3), (1,)),
    "sequences": ((5, 3, 4), (5, 3)),
    "binary sequences": ((5, 3, 1), (5, 3)),
    "planes": ((2, 3, 2, 4), (2, 3, 2)),
}
RULED_OUT = float("-inf")


def drawn(layout: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits that are small integers, so that there are ties; labels, some of them -100."""
    torch.manual_seed(seed)
    shape, of_labels = LAYOUTS[layout]
    logits = torch.randint(-2, 3, shape).double()
    labels = torch.randint(0, losses.classes(logits), of_labels)
    labels = torch.where(torch.rand(of_labels) < 0.3, -100, labels)
    labels[0] = -100 if len(labels) > 1 else 0  # a sample without labels
    return logits, labels


def gradient(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    at = at.detach().requires_grad_()
    return torch.autograd.grad(function(at).sum(), at)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", LABELLED)
def test_loss_is_its_formula(name: str, layout: str) -> None:
    for seed in range(3):
        logits, labels = drawn(layout, seed)
        if name == "dlr" and losses.classes(logits) < 3:
            continue
        expected = plain.over_labels(getattr(plain, name), logits.tolist(), labels.tolist())
        got = LABELLED[name](logits, labels)
        torch.testing.assert_close(got, torch.tensor(expected).double())


@pytest.mark.parametrize("name", LABELLED)
@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 255])
def test_ignored_labels_add_nothing(name: str, ignore_index: int) -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(4, 3, 5).double(), torch.randint(1, 5, (4, 3))
    labels[0], labels[1, 1:] = ignore_index, ignore_index

    def loss(logits: Tensor) -> Tensor:
        return LABELLED[name](logits, labels, ignore_index=ignore_index)

    values, slopes = loss(logits), gradient(loss, logits)
    assert values[0] == 0
    torch.testing.assert_close(values[1:2], LABELLED[name](logits[1:2, 0], labels[1:2, 0]))
    assert not slopes[0].any()
    assert not slopes[1, 1:].any()
    assert (slopes[1, 0] != 0).sum() >= 2
    torch.testing.assert_close(values[2:], LABELLED[name](logits[2:], labels[2:]))


@pytest.mark.parametrize("name", LABELLED)
@pytest.mark.parametrize("ruled_out", [0, 3])
def test_ruled_out_classes_change_nothing(name: str, ruled_out: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 5).double()
    rest = [i for i in range(5) if i != ruled_out]
    labels = torch.randint(0, 4, (6,))
    among_all = torch.tensor(rest)[labels]

    def masked(logits: Tensor) -> Tensor:
        return logits.index_fill(1, torch.tensor([ruled_out]), RULED_OUT)

    loss = LABELLED[name]
    torch.testing.assert_close(loss(masked(logits), among_all), loss(logits[:, rest], labels))
    got = gradient(lambda z: loss(masked(z), among_all), logits)
    torch.testing.assert_close(got, gradient(lambda z: loss(z[:, rest], labels), logits))


@pytest.mark.parametrize("name", LABELLED)
@pytest.mark.parametrize(
    ("logits", "labels", "hint"),
    [
        ((5, 1), (5, 1), r"labels\.squeeze\(-1\)"),
        ((5, 4), (5, 1), r"labels\.squeeze\(-1\)"),
        ((5, 3, 4), (5, 3, 1), r"labels\.squeeze\(-1\)"),
        ((4, 4), (4, 4), "MultiLabel"),
        ((5, 4), (5, 4), "MultiLabel"),
        ((5, 4), (4,), "integer labels"),
        ((5, 4), (1,), "integer labels"),
        ((5,), (1,), "integer labels"),
        ((5,), (5, 5), "integer labels"),
        ((5, 4), (), "integer labels"),
        ((5, 4, 3), (5, 3), "last dim"),
        ((5, 3, 4), (5,), "integer labels"),
        ((5, 3, 4), (3,), "integer labels"),
    ],
)
def test_labels_of_another_shape_are_refused(
    name: str, logits: tuple[int, ...], labels: tuple[int, ...], hint: str
) -> None:
    if name == "dlr" and losses.classes(torch.zeros(logits)) < 3:
        name = "margin"
    with pytest.raises(ValueError, match=hint) as error:
        LABELLED[name](torch.zeros(logits), torch.zeros(labels, dtype=torch.int64))
    assert str(logits) in str(error.value)
    assert str(labels) in str(error.value)


@pytest.mark.parametrize("name", LABELLED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.complex64])
def test_labels_that_are_no_integers_are_refused(name: str, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"integer labels.*Deviate"):
        LABELLED[name](torch.zeros(3, 4), torch.zeros(3, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32])
@pytest.mark.parametrize("name", LABELLED)
def test_labels_of_any_integer_type(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 0, 1, 1, 0])
    got = LABELLED[name](logits, labels.to(dtype))
    torch.testing.assert_close(got, LABELLED[name](logits, labels))


def test_no_narrow_label_is_taken_for_the_ignored_one() -> None:
    logits = torch.zeros(1, 2, 200)
    labels = torch.full((1, 2), 156, dtype=torch.uint8)  # -100 of eight bits
    for loss in LABELLED.values():
        torch.testing.assert_close(loss(logits, labels), loss(logits, labels.long()))
    assert losses.cross_entropy(logits, labels).item() > 5


@pytest.mark.parametrize("shape", [(3,), (3, 1), (3, 2), (3, 4, 2)])
def test_dlr_refuses_two_classes(shape: tuple[int, ...]) -> None:
    logits = torch.zeros(shape)
    labels = torch.zeros(shape[:-1] if len(shape) > 1 else shape, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"three classes.*margin"):
        losses.dlr(logits, labels)


def test_dlr_of_two_finite_logits_is_the_margin() -> None:
    logits = torch.tensor([[2.0, 5.0, RULED_OUT], [RULED_OUT, 1.0, 4.0]])
    labels = torch.tensor([0, 2])
    got = losses.dlr(logits, labels)
    torch.testing.assert_close(got, torch.tensor([3.0, -3.0]))
    slopes = gradient(lambda z: losses.dlr(z, labels), logits)
    torch.testing.assert_close(slopes, torch.tensor([[-1.0, 1.0, 0.0], [0.0, 1.0, -1.0]]))


def test_margin_keeps_its_gradient_where_the_cross_entropy_has_none() -> None:
    logits = torch.tensor([[9e4, -3e4, 1e4], [-5e4, 8e4, 0.0]])
    labels = torch.tensor([0, 1])
    assert not gradient(lambda z: losses.cross_entropy(z, labels), logits).any()
    slopes = gradient(lambda z: losses.margin(z, labels), logits)
    torch.testing.assert_close(slopes, torch.tensor([[-1.0, 0.0, 1.0], [0.0, -1.0, 1.0]]))
    assert gradient(lambda z: losses.dlr(z, labels), logits).abs().amax(1).min() > 1e-6


def test_a_ruled_out_right_class_is_always_beaten() -> None:
    logits, labels = torch.tensor([[RULED_OUT, 1.0, 2.0, 3.0]]), torch.tensor([0])
    for loss in LABELLED.values():
        assert loss(logits, labels).item() == float("inf")
        assert gradient(lambda z, loss=loss: loss(z, labels), logits).isfinite().all()


@pytest.mark.parametrize("name", LABELLED)
def test_long_sequences_in_half_precision_stay_finite(name: str) -> None:
    logits = torch.zeros(1, 3000, 4, dtype=torch.float16)
    logits[..., 0] = 100
    labels = torch.ones(1, 3000, dtype=torch.int64)
    expected = LABELLED[name](logits[:, :1], labels[:, :1])
    got = LABELLED[name](logits, labels)
    assert got.dtype == torch.float16
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("shape", [(0,), (0, 1), (0, 3), (0, 2, 3)])
def test_no_samples_give_no_losses(shape: tuple[int, ...]) -> None:
    logits = torch.zeros(shape)
    labels = torch.zeros(shape[:-1] if len(shape) > 1 else shape, dtype=torch.int64)
    for name, loss in LABELLED.items():
        if name != "dlr" or losses.classes(logits) > 2:
            assert loss(logits, labels).shape == (0,)
    for divergence in losses.DIVERGENCES.values():
        assert divergence(logits, logits).shape == (0,)
    assert losses.predict(logits).shape == labels.shape


# ---- Divergences ----


@pytest.mark.parametrize("name", losses.DIVERGENCES)
@pytest.mark.parametrize("shape", [(5,), (5, 1), (5, 4), (4, 4), (5, 3, 4), (1, 2)])
def test_divergence_is_its_formula(name: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    p, q = torch.randn(shape).double(), torch.randn(shape).double()
    formula: Any = getattr(plain, name)
    depth = max(p.dim() - 2, 0)

    def rows(sample: Any) -> list[Any]:
        parts = plain.flat(sample, depth)
        parts = [[part] if isinstance(part, float) else part for part in parts]
        return parts if name == "squared_distance" else [plain.two_sided(part) for part in parts]

    expected = [
        plain.mean([formula(*pair) for pair in zip(rows(one), rows(two), strict=True)])
        for one, two in zip(p.tolist(), q.tolist(), strict=True)
    ]
    torch.testing.assert_close(losses.DIVERGENCES[name](p, q), torch.tensor(expected).double())


@pytest.mark.parametrize("name", ["kl", "symmetric_kl"])
def test_ruled_out_classes_add_nothing_to_a_divergence(name: str) -> None:
    torch.manual_seed(0)
    p, q = torch.randn(6, 5).double(), torch.randn(6, 5).double()
    divergence, kept, out = losses.DIVERGENCES[name], [0, 2, 3], torch.tensor([1, 4])

    def masked(p: Tensor, q: Tensor) -> Tensor:
        return divergence(p.index_fill(1, out, RULED_OUT), q.index_fill(1, out, RULED_OUT))

    def without(p: Tensor, q: Tensor) -> Tensor:
        return divergence(p[:, kept], q[:, kept])

    torch.testing.assert_close(masked(p, q), without(p, q))
    for one, two in (
        (lambda z: masked(p, z), lambda z: without(p, z)),
        (lambda z: masked(z, q), lambda z: without(z, q)),
    ):
        torch.testing.assert_close(gradient(one, p + q), gradient(two, p + q))


def test_masked_scores_have_no_squared_distance() -> None:
    p = torch.tensor([[1.0, RULED_OUT, 3.0]])
    q = torch.tensor([[0.0, RULED_OUT, 1.0]])
    got = losses.squared_distance(p, q)
    torch.testing.assert_close(got, torch.tensor([5 / 3]))
    slopes = gradient(lambda z: losses.squared_distance(p, z), q)
    torch.testing.assert_close(slopes, torch.tensor([[-2 / 3, 0.0, -4 / 3]]))


def test_kl_towards_a_ruled_out_class_is_infinite() -> None:
    p, q = torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([[0.0, RULED_OUT, 0.0]])
    assert losses.kl(p, q).item() == float("inf")
    assert losses.symmetric_kl(p, q).item() == float("inf")
    torch.testing.assert_close(losses.kl(q, p), torch.tensor([1.5]).log())
    assert gradient(lambda z: losses.kl(p, z), q).isfinite().all()
    assert gradient(lambda z: losses.kl(q, z), p).isfinite().all()


def test_saturated_logits_have_finite_divergences() -> None:
    p, q = torch.tensor([[2e4, 0.0, -1e4]]), torch.tensor([[0.0, 1e4, RULED_OUT]])
    assert losses.kl(p, q).item() == 1e4
    assert losses.kl(q, p).item() == 2e4
    for one, two in ((p, q), (q, p)):
        assert gradient(lambda z, one=one: losses.kl(one, z), two).isfinite().all()
        assert gradient(lambda z, two=two: losses.kl(z, two), one).isfinite().all()
    finite = torch.tensor([[0.0, 1e4, -3e4]])
    assert losses.symmetric_kl(p, finite).item() == 3e4
    assert losses.symmetric_kl(p, q).item() == 3e4
    assert gradient(lambda z: losses.symmetric_kl(p, z), q).isfinite().all()


def test_symmetric_kl_of_near_equals_is_accurate() -> None:
    torch.manual_seed(0)
    p = torch.randn(50, 8)
    q = p + 1e-4 * torch.randn(50, 8)
    got = losses.symmetric_kl(p, q)
    assert (got > 0).all()
    torch.testing.assert_close(
        got.double(), losses.symmetric_kl(p.double(), q.double()), rtol=0.02, atol=0
    )


@pytest.mark.parametrize("name", losses.DIVERGENCES)
@pytest.mark.parametrize(
    ("p", "q"), [((5, 1), (5,)), ((5, 4), (1, 4)), ((5,), (1,)), ((4,), (4, 4))]
)
def test_divergence_of_other_shapes_is_refused(
    name: str, p: tuple[int, ...], q: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=name) as error:
        losses.DIVERGENCES[name](torch.zeros(p), torch.zeros(q))
    assert str(p) in str(error.value)
    assert str(q) in str(error.value)


def test_bpr_is_its_formula_and_broadcasts_negatives_alone() -> None:
    positive, negative = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0, 3.0], [2.0, 2.0]])
    expected = [[1 / (1 + torch.e), torch.e**2 / (1 + torch.e**2)], [0.5, 0.5]]
    log = -(1 - torch.tensor(expected)).log()
    torch.testing.assert_close(losses.bpr(positive, negative), log.mean(1))
    torch.testing.assert_close(losses.bpr(positive[:, 0], negative[:, 0]), log[:, 0])
    for one, two in ((positive[:, 0], positive), (positive, positive[:, 0])):
        with pytest.raises(ValueError, match="one shape"):
            losses.bpr(one, two)


# ---- Gradients ----


@pytest.mark.parametrize("name", LABELLED)
@pytest.mark.parametrize("layout", ["one logit in a column", "classes", "sequences"])
def test_gradient_of_a_loss(name: str, layout: str) -> None:
    logits, labels = drawn(layout)
    if name == "dlr" and losses.classes(logits) < 3:
        return
    logits = torch.randn(logits.shape).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: LABELLED[name](z, labels), logits)


@pytest.mark.parametrize("name", losses.DIVERGENCES)
def test_gradient_of_a_divergence(name: str) -> None:
    torch.manual_seed(0)
    mask = torch.tensor([False, False, True, False])
    p, q = (torch.randn(3, 2, 4).double().requires_grad_() for _ in range(2))

    def masked(p: Tensor, q: Tensor) -> Tensor:
        return losses.DIVERGENCES[name](
            p.masked_fill(mask, RULED_OUT), q.masked_fill(mask, RULED_OUT)
        )

    assert torch.autograd.gradcheck(masked, (p, q))
