"""The attacks against transcriptions of their papers' equations, and their loop's choices."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import embattle as eb
import pytest
import torch
import toys
from embattle.attacks import AttackWarning
from embattle.perturb import gradients
from torch import Tensor


class Text:
    """An encoder and a batch, with the loss as a function of the perturbed embeddings."""

    def __init__(self) -> None:
        self.model = toys.encoder()
        self.tokens, self.labels = toys.text_batch()
        self.mask = self.tokens != 0
        self.base = self.model.embedding(self.tokens).detach()
        self.loss_fn = toys.classify(self.model, self.tokens, self.labels)
        self.site = eb.Site(self.model.embedding)

    def losses(self, delta: Tensor) -> Tensor:
        handle = self.model.embedding.register_forward_hook(lambda m, a, out: out + delta)
        try:
            return eb.losses.cross_entropy(self.model(self.tokens), self.labels)
        finally:
            handle.remove()

    def gradient(self, delta: Tensor) -> Tensor:
        delta = delta.detach().requires_grad_()
        (grad,) = torch.autograd.grad(self.losses(delta).sum(), delta)
        return grad * self.mask.unsqueeze(-1)


@pytest.fixture(scope="module")
def text() -> Text:
    return Text()


def project(delta: Tensor, eps: float, norm: str) -> Tensor:
    """Write the projections out, sample by sample."""
    out = delta.clone()
    for b, one in enumerate(delta.flatten(1)):
        if norm == "linf":
            new = one.clamp(-eps, eps)
        elif norm == "l2":
            new = one * min(1.0, eps / max(one.norm().item(), 1e-300))
        elif one.abs().sum() <= eps:
            new = one
        else:
            ordered = one.abs().sort(descending=True).values
            sums = ordered.cumsum(0)
            k = max(j for j in range(len(one)) if ordered[j] - (sums[j] - eps) / (j + 1) > 0)
            new = one.sign() * (one.abs() - (sums[k] - eps) / (k + 1)).clamp(min=0)
        out[b] = new.reshape(delta[b].shape)
    return out


def steepest(grad: Tensor, norm: str) -> Tensor:
    flat = grad.flatten(1)
    if norm == "linf":
        return grad.sign()
    if norm == "l2":
        return (flat / flat.norm(dim=1, keepdim=True)).reshape(grad.shape)
    one = torch.zeros_like(flat)
    top = flat.abs().argmax(1, keepdim=True)
    return one.scatter(1, top, flat.gather(1, top).sign()).reshape(grad.shape)


@pytest.mark.parametrize(
    ("norm", "eps", "size"), [("l2", 1.0, 0.4), ("linf", 0.2, 0.08), ("l1", 2.0, 0.9)]
)
@pytest.mark.parametrize("steps", [1, 4])
def test_pgd_is_its_equation(text: Text, norm: str, eps: float, size: float, steps: int) -> None:
    result = eb.PGD(norm=norm, eps=eps, step_size=size, steps=steps).run(
        text.loss_fn, text.site, mask=text.mask
    )
    delta = torch.zeros_like(text.base)
    for _ in range(steps):
        delta = project(delta + size * steepest(text.gradient(delta), norm), eps, norm)
    assert torch.allclose(result.deltas[0], delta, atol=1e-6, rtol=0)
    assert torch.allclose(result.losses, text.losses(delta), atol=1e-6, rtol=0)
    assert result.steps.tolist() == [steps] * 6


def test_fgm_and_fgsm_are_their_equations(text: Text) -> None:
    grad = text.gradient(torch.zeros_like(text.base))
    fgm = eb.FGM(eps=0.8).run(text.loss_fn, text.site, mask=text.mask)
    assert torch.allclose(fgm.deltas[0], 0.8 * steepest(grad, "l2"), atol=1e-6, rtol=0)
    fgsm = eb.FGSM(eps=0.1).run(text.loss_fn, text.site, mask=text.mask)
    assert torch.allclose(fgsm.deltas[0], 0.1 * grad.sign(), atol=1e-6, rtol=0)


def test_pgd_on_factors_is_its_equation() -> None:
    model, batch = toys.factors(), toys.triplets()
    sites = [eb.Site(model.user), eb.Site(model.item)]
    result = eb.PGD(eps=0.6, step_size=0.25, steps=3).run(toys.rank(model, batch), sites)
    base = [t(i).detach() for t, i in zip((model.user, model.item, model.item), batch, strict=True)]
    deltas = [torch.zeros_like(b) for b in base]
    for _ in range(3):
        leaves = [d.clone().requires_grad_() for d in deltas]
        u, p, n = (b + d for b, d in zip(base, leaves, strict=True))
        loss = torch.nn.functional.softplus((u * n).sum(1) - (u * p).sum(1)).sum()
        grads = torch.autograd.grad(loss, leaves)
        deltas = [
            project(d + 0.25 * steepest(g, "l2"), 0.6, "l2")
            for d, g in zip(deltas, grads, strict=True)
        ]
    for got, expected in zip(result.deltas, deltas, strict=True):
        assert torch.allclose(got, expected, atol=1e-6, rtol=0)


def test_a_random_start_is_where_the_steps_begin(text: Text) -> None:
    attack = eb.PGD(eps=1.0, step_size=0.3, steps=2, random_start=True, generator=torch.Generator())
    attack.generator.manual_seed(5)  # type: ignore[union-attr]
    result = attack.run(text.loss_fn, text.site, mask=text.mask)
    seed = torch.randint(2**62, (), generator=torch.Generator().manual_seed(5))
    start = eb.ops.random_start(
        torch.zeros_like(text.base),
        eps=1.0,
        mask=text.mask,
        generator=torch.Generator().manual_seed(int(seed)),
    )
    delta = start
    for _ in range(2):
        delta = project(delta + 0.3 * steepest(text.gradient(delta), "l2"), 1.0, "l2")
    assert torch.allclose(result.deltas[0], delta, atol=1e-6, rtol=0)


def test_restarts_and_best_iterates_never_do_worse(text: Text) -> None:
    def losses(seed: int = 0, **options: object) -> Tensor:
        attack = eb.PGD(
            norm="linf",
            eps=4.0,
            step_size=8.0,
            steps=3,
            generator=torch.Generator().manual_seed(seed),
            **options,  # type: ignore[arg-type]
        )
        return attack.run(text.loss_fn, text.site, mask=text.mask).losses

    last, best = losses(), losses(keep="best")
    assert torch.all(best >= last)
    assert torch.any(best > last)
    one = losses(random_start=True, keep="best")
    four = losses(random_start=True, restarts=4, keep="best")
    assert torch.all(four >= one)
    assert torch.any(four > one)


def test_the_reported_best_is_reproduced_by_its_deltas(text: Text) -> None:
    result = eb.PGD(
        eps=1.0, step_size=3.0, steps=3, restarts=3, random_start=True, keep="best"
    ).run(text.loss_fn, text.site, mask=text.mask, criterion=eb.Misclassify(text.labels))
    assert torch.allclose(text.losses(result.deltas[0]), result.losses)
    with result.applied():
        logits = text.model(text.tokens)
    assert torch.equal(logits.argmax(-1), result.predictions)
    right = result.clean_predictions == text.labels
    assert torch.equal(result.success, right & (result.predictions != text.labels))


def test_a_fooled_sample_outranks_a_larger_loss() -> None:
    """Of two iterates the one that changes the prediction is kept, whatever the loss says."""
    embedding = torch.nn.Embedding(1, 1, _weight=torch.zeros(1, 1))
    tokens = torch.zeros(1, dtype=torch.long)

    def loss() -> eb.Evaluation:
        x = embedding(tokens)[:, 0]
        # The loss is largest at 1; the prediction (x > 1.5) turns only later.
        return eb.Evaluation(1 - (x - 1).square(), (x - 1.5)[:, None])

    attack = eb.PGD(eps=2.0, norm="linf", step_size=1.0, steps=1, keep="best", random_start=False)
    goal = eb.Misclassify(torch.zeros(1, dtype=torch.long))
    calm = attack.run(loss, eb.Site(embedding), criterion=goal)
    assert calm.success.tolist() == [False]
    assert calm.deltas[0].item() == 1.0
    bold = eb.PGD(eps=2.0, norm="linf", step_size=2.0, steps=1, keep="best")
    found = bold.run(loss, eb.Site(embedding), criterion=goal)
    assert found.deltas[0].item() == 2.0  # the same loss as at 0, but fooled
    assert found.success.tolist() == [True]


def test_nonfinite_gradients_stay_in_their_group() -> None:
    embedding = torch.nn.Embedding(4, 3)

    def loss() -> Tensor:
        x = embedding(torch.tensor([0, 1, 2]))
        scale = torch.tensor([1.0, math.nan, 1.0])
        return (x * scale[:, None]).sum(1)

    result = eb.PGD(eps=1.0, steps=2).run(loss, eb.Site(embedding))
    assert result.nonfinite.item() == 1
    assert torch.all(result.deltas[0][1] == 0)
    assert torch.allclose(result.norms[0], torch.tensor([1.0, 0.0, 1.0]))


def test_groups_without_a_gradient_are_counted_and_told() -> None:
    """Where the goal is not reached: a wrong sample with a flat loss is no sign of robustness."""
    rows = torch.tensor([[1.0, 0.0, -1.0], [-1.0, 1.0, 0.0], [2.0, 0.0, 1.0]])
    embedding = torch.nn.Embedding(3, 3, _weight=rows)

    def attack(labels: Tensor, **options: Any) -> eb.AttackResult:
        goal = eb.Misclassify(labels, **options)
        return eb.FGM(eps=0.1).run(
            lambda: eb.Evaluation(outputs=1e5 * embedding(torch.arange(3))),
            eb.Site(embedding),
            criterion=goal,
        )

    right, worst = rows.argmax(1), rows.argmin(1)
    with pytest.warns(AttackWarning, match="3 of 3 groups"):
        assert attack(right).zero_gradient == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert attack(right, ascend="margin").zero_gradient == 0
        assert attack(worst, ascend="dlr").zero_gradient == 3


def test_scale_multiplies_eps_and_steps(text: Text) -> None:
    half = eb.PGD(eps=1.0, step_size=0.4, steps=2).run(
        text.loss_fn, text.site, mask=text.mask, scale=0.5
    )
    same = eb.PGD(eps=0.5, step_size=0.2, steps=2).run(text.loss_fn, text.site, mask=text.mask)
    assert torch.equal(half.deltas[0], same.deltas[0])
    zero = eb.PGD(eps=1.0, steps=2).run(text.loss_fn, text.site, scale=0.0)
    assert torch.all(zero.deltas[0] == 0)


def test_noise_has_the_stated_size(text: Text) -> None:
    torch.manual_seed(0)
    gaussian = eb.GaussianNoise(std=0.1).run(text.loss_fn, text.site, mask=text.mask)
    values = gaussian.deltas[0][text.mask]
    assert abs(values.std().item() - 0.1) < 0.02
    assert torch.all(gaussian.deltas[0][~text.mask] == 0)
    uniform = eb.UniformNoise(eps=0.5).run(text.loss_fn, text.site, mask=text.mask)
    assert torch.all(uniform.norms[0] <= 0.5)
    tuned = eb.NEFTune(alpha=5.0).run(text.loss_fn, text.site, mask=text.mask)
    bound = 5.0 / (text.mask.sum(1).double() * 8).sqrt()
    largest = tuned.deltas[0].abs().flatten(1).amax(1)
    assert torch.all(largest <= bound * (1 + 1e-6))
    assert torch.all(largest > 0.7 * bound)
    assert tuned.steps.tolist() == [0] * 6


def test_two_runs_draw_different_numbers_and_a_seed_repeats_them(text: Text) -> None:
    torch.manual_seed(0)
    attack = eb.UniformNoise(eps=0.5)
    first = attack.run(text.loss_fn, text.site).deltas[0]
    second = attack.run(text.loss_fn, text.site).deltas[0]
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(attack.run(text.loss_fn, text.site).deltas[0], first)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: eb.PGD(eps=-1.0), "eps must be at least 0, got -1"),
        (lambda: eb.PGD(eps=math.nan), "got nan"),
        (lambda: eb.PGD(eps=1.0, norm="l3"), "'l3'"),
        (lambda: eb.PGD(eps=1.0, steps=-1), "steps"),
        (lambda: eb.PGD(eps=1.0, restarts=2), "random_start"),
        (lambda: eb.PGD(eps=1.0, restarts=0), "restarts"),
        (lambda: eb.PGD(eps=1.0, keep="worst"), "'worst'"),
        (lambda: eb.PGD(eps=1.0, mode="test"), "'test'"),
        (lambda: eb.PGD(eps=math.inf), "step_size"),
        (lambda: eb.PGD(eps=1.0, step_size=math.inf), "finite"),
        (lambda: eb.FGM(eps=1.0, steps=3), "use PGD"),
        (lambda: eb.GaussianNoise(std=1.0, steps=2), "no steps"),
    ],
)
def test_attacks_say_what_is_wrong(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_norms_may_be_numbers() -> None:
    assert eb.PGD(eps=1.0, norm=2).norm == "l2"
    assert eb.PGD(eps=1.0, norm=math.inf).norm == "linf"
    assert eb.PGD(eps=1.0, norm="LINF").norm == "linf"


def test_gradients_do_not_depend_on_the_way_into_the_engine(
    text: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine is called without the front; a torch that lacks a way takes the next one."""
    attack = eb.PGD(eps=0.5, step_size=0.2, steps=3)
    direct = attack.run(text.loss_fn, text.site, mask=text.mask).delta
    assert direct.abs().max() > 0
    for way in ("_run_here", "run_backward"):
        assert getattr(gradients, way) is not None
        monkeypatch.setattr(gradients, way, None)
        other = attack.run(text.loss_fn, text.site, mask=text.mask).delta
        assert torch.equal(direct, other)
