"""Corners where attacks were wrong without a word: hooks, shared tables, empty draws, masks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import devices
import embattle as eb
import numpy as np
import pytest
import torch
import toys
from embattle.data.batch import Batch
from embattle.objectives.masking import LossQuantile, Outcome
from embattle.perturb.strength import Measured
from embattle.tasks.kinds.classes import Classification
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_a_draw_of_no_coordinate_changes_nothing(norm: Any) -> None:
    """A wide margin, and few coordinates in a wide ball."""
    torch.manual_seed(0)
    table, weight = nn.Embedding(40, 4), torch.randn(16, 3) * 0.02
    rows, labels = torch.randint(0, 40, (32, 4)), torch.ones(32, dtype=torch.long)
    shift = torch.tensor([0.0, 50.0, 0.0])

    def loss() -> eb.Evaluation:
        return eb.Evaluation(outputs=table(rows).flatten(1) @ weight + shift)

    attack = eb.Square(eps=10.0, norm=norm, steps=60)
    found = attack.run(loss, eb.Site(table), criterion=eb.Misclassify(labels))
    assert found.delta.isfinite().all()
    assert found.robust_accuracy == 1
    assert found.norms[0].max() <= 10
    with pytest.raises(ValueError, match="eps must be finite"):
        eb.Square(eps=torch.tensor([1.0, torch.inf]))


def test_gradients_of_what_may_not_move_are_none() -> None:
    """The vectors that may move are saturated; the others are not."""
    table = nn.Embedding(10, 4)
    table.weight.data.abs_().mul_(1000)
    rows, labels = torch.arange(6).view(3, 2), torch.ones(3, dtype=torch.long)
    mask = torch.tensor([[True, False]]).expand(3, 2)

    def loss() -> eb.Evaluation:
        hidden = table(rows)
        score = torch.tanh(hidden[:, 0]).sum(1) + 0.01 * hidden[:, 1].sum(1)
        return eb.Evaluation(outputs=torch.stack([0 * score, 1 + score], 1))

    goal = eb.Misclassify(labels)
    found = eb.FMN(steps=30).run(loss, eb.Site(table), criterion=goal, mask=mask)
    assert found.delta.isfinite().all()
    assert not found.success.any()


@pytest.mark.parametrize("scope", ["output", "row"])
@pytest.mark.parametrize("everywhere", [False, True])
def test_a_hook_before_the_site_is_there_in_every_pass(scope: Any, everywhere: bool) -> None:
    model = toys.encoder()
    tokens, labels = toys.text_batch(batch=4)

    def twice(module: nn.Module, args: Any, out: Tensor) -> Tensor | None:
        return out.mul_(2) if module is model.embedding else None

    if everywhere:
        handle = register_module_forward_hook(twice)
    else:
        handle = model.embedding.register_forward_hook(twice)
    try:
        site = eb.Site(model.embedding, scope=scope)
        goal = eb.Misclassify(labels)
        found = eb.PGD(eps=0.3, steps=4).run(
            toys.classify(model, tokens, labels), site, criterion=goal
        )
        with found.applied():
            torch.testing.assert_close(model(tokens), found.outputs)
    finally:
        handle.remove()


@pytest.mark.parametrize("first", ["weight", "row"])
def test_a_table_has_one_site_whoever_looks_it_up(first: str) -> None:
    one, two = nn.Embedding(9, 4), nn.Embedding(9, 4)
    two.weight = one.weight
    site = eb.Site.weight(one) if first == "weight" else eb.Site(one, scope="row")
    rows = torch.arange(6)
    for sites in ([site, eb.Site(two)], [eb.Site(two), site]):
        with pytest.raises(ValueError, match="both perturb Embedding"):
            eb.FGM(eps=0.1).run(lambda: (one(rows) * two(rows)).sum(1), sites)


def test_a_model_of_several_inputs_says_which_part_to_name() -> None:
    class Pair(nn.Module):
        """Names no table, as CLIP of transformers does."""

        def get_input_embeddings(self) -> nn.Module:
            raise NotImplementedError("please override in the subclass")

    with pytest.raises(ValueError, match=r"Pair does not say .* Site\.embeddings\(model\.text"):
        eb.Site.embeddings(Pair())


def test_padding_stays_where_indices_are_named() -> None:
    """Outputs that all samples share; the call has no positional argument."""
    table = nn.Embedding(9, 4, padding_idx=0)
    rows, users = torch.tensor([5, 0, 7, 0]), torch.randn(3, 4)
    site = eb.Site(table, samples=None)
    norms = [
        eb.FGM(eps=0.5).run(lambda look=look: (users @ look().T).sum(1), site).norms[0].tolist()
        for look in (lambda: table(rows), lambda: table(input=rows))
    ]
    assert norms[0] == norms[1] == pytest.approx([0.5, 0, 0.5, 0])


def test_strengths_and_groups_that_have_no_meaning_are_refused() -> None:
    model = toys.factors()
    users, positive, negative = toys.triplets()
    loss = toys.rank(model, (users, positive, negative))
    sites = [eb.Site(model.user), eb.Site(model.item)]
    found = eb.FGM(eps=eb.Relative(0.3, to="token_norm")).run(loss, sites, joint=True)
    vectors = torch.cat([model.user(users), model.item(positive), model.item(negative)])
    mean = vectors.norm(dim=1).mean().detach()
    torch.testing.assert_close(found.norms[0], (0.3 * mean).expand(9))
    with pytest.raises(ValueError, match=r"packed rows.*group='sample'"):
        eb.FGM(eps=0.1).run(
            lambda: model.user(users).sum(1).view(3, 3).sum(1),
            eb.Site(model.user, group="token"),
            offsets=torch.tensor([0, 3, 6, 9]),
        )
    for wrong in (-0.1, torch.nan) if devices.kind == "cpu" else ():
        with pytest.raises(ValueError, match="eps must be at least 0"):
            eb.VAT(eps=torch.tensor(wrong))
    with pytest.raises(TypeError, match="mask must be a tensor, got ndarray"):
        eb.FGM(eps=0.1).run(loss, sites[0], mask=np.ones(9, dtype=bool))  # type: ignore[arg-type]
    swap = eb.TokenSwap(swaps=1)
    tokens, _ = toys.text_batch(batch=2)
    with pytest.raises(ValueError, match="CategorySwap"):
        swap.run(lambda t: lambda: None, sites[0], tokens, mask=tokens > 0, criterion=eb.Diverge())  # type: ignore[arg-type,return-value]


def test_modules_of_other_threads_are_left_alone() -> None:
    """A batch norm that another thread trains while an attack, which knows no model, runs."""
    model, other = toys.encoder(), nn.BatchNorm1d(3)
    tokens, labels = toys.text_batch(batch=4)

    def loss() -> eb.Evaluation:
        thread = threading.Thread(target=lambda: other(torch.randn(5, 3)))
        thread.start()
        thread.join()
        return toys.classify(model, tokens, labels)()

    eb.PGD(eps=0.3, steps=2).run(loss, eb.Site(model.embedding), evaluate=False)
    assert other.num_batches_tracked == 2


def test_what_was_not_evaluated_says_so() -> None:
    model = toys.encoder()
    tokens, labels = toys.text_batch(batch=4)
    some: Callable[[Tensor], Any] = lambda rows: toys.classify(model, tokens[rows], labels[rows])  # noqa: E731
    found = eb.PGD(eps=0.3, steps=2, stop_when_fooled=True).run(
        toys.classify(model, tokens, labels),
        eb.Site(model.embedding),
        criterion=eb.Misclassify(labels),
        subset=some,
        evaluate=False,
    )
    with pytest.raises(RuntimeError, match="evaluate"):
        _ = found.success


def test_a_batch_without_samples_has_a_smallest_eps() -> None:
    table, head = nn.Embedding(9, 4), nn.Linear(4, 3)
    tokens, labels = torch.zeros(0, 5, dtype=torch.long), torch.zeros(0, dtype=torch.long)
    found = eb.FMN(steps=2).run(
        lambda: eb.Evaluation(outputs=head(table(tokens).mean(1))),
        eb.Site(table),
        criterion=eb.Misclassify(labels),
    )
    assert len(found.delta) == 0


def test_an_area_of_absent_classes_is_no_figure() -> None:
    kind, outputs = Classification(()), torch.randn(6, 3)
    for labels, has in (([0, 1, 0, 1, 1, 0], False), ([0, 1, 2, 1, 1, 0], True)):
        assert ("auc" in kind.weighted(outputs, torch.tensor(labels))) == has


def test_only_what_is_as_wide_as_the_mask_is_cut() -> None:
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    inputs = {
        "input_ids": mask * 5,
        "attention_mask": mask,
        "age": torch.tensor([30.0, 40.0]),
        "features": torch.randn(2, 7),
    }
    found = Batch(inputs, None).take(torch.tensor([0])).inputs
    assert {name: tuple(x.shape) for name, x in found.items()} == {
        "input_ids": (1, 2), "attention_mask": (1, 2), "age": (1,), "features": (1, 7),
    }  # fmt: skip


# --- schedules, masking, weights, clipping, ops ---------------------------------------------------


def test_schedules_without_a_ramp_or_an_accuracy() -> None:
    ramp = eb.schedules.WarmUp(0, start=0.25, delay=5)
    assert [ramp(step) for step in (0, 4, 5, 6)] == [0.25, 0.25, 1.0, 1.0]
    adaptive = eb.schedules.Adaptive(target=0.5, start=0.5, every=2)
    for values, factor in (([torch.nan, torch.nan], 0.5), ([torch.nan, 0.9], 0.6)):
        for value in values:
            adaptive.update({"robust_accuracy": torch.tensor(value)})
        assert adaptive(0) == pytest.approx(factor)
    with pytest.raises(ValueError, match="start must be at least 0"):
        eb.schedules.Adaptive(target=0.5, start=torch.nan)


@pytest.mark.parametrize("form", ["free", "freeat", eb.FreeAT()])
def test_forms_in_the_passes_of_an_attack_have_no_masking(form: Any) -> None:
    model = toys.encoder()
    site, attack = eb.Site(model.embedding), eb.FGSM(eps=0.1)
    with pytest.raises(ValueError, match="cannot have masking="):
        eb.AdversarialObjective(attack, site, form=form, masking=LossQuantile(0.5))
    in_eval = eb.FGSM(eps=0.1, mode="eval")
    with pytest.raises(ValueError, match="cannot have mode='eval'"):
        eb.AdversarialObjective(in_eval, site, form=form)
    with pytest.raises(ValueError, match="moves its deltas while it trains"):
        eb.AWP(eb.AdversarialObjective(attack, site, form=form), model)


def test_a_share_that_follows_the_accuracy_is_told_of_it() -> None:
    model = toys.encoder()
    tokens, labels = toys.text_batch()

    def made() -> eb.AdversarialObjective:
        share = eb.schedules.Adaptive(target=0.999, start=1.0, shrink=0.5, every=2)
        form = eb.Partial(1.0, schedule=share)
        return eb.AdversarialObjective(eb.FGM(eps=50.0), eb.Site(model.embedding), form=form)

    def perturbed(objective: eb.AdversarialObjective) -> int:
        _, metrics = objective(
            toys.classify(model, tokens, labels),
            subset=lambda rows: toys.classify(model, tokens[rows], labels[rows]),
            criterion=eb.Misclassify(labels),
        )
        return int(metrics["perturbed"])

    objective = made()
    assert [perturbed(objective) for _ in range(3)] == [6, 6, 3]
    resumed = made()
    resumed.load_state_dict(objective.state_dict())
    assert [perturbed(resumed) for _ in range(2)] == [3, 2]


def test_a_quantile_is_not_off_by_its_rounding() -> None:
    for share, count in ((0.55, 100), (0.07, 100), (0.14, 50), (0.28, 25)):
        outcome = Outcome(torch.arange(float(count)), None, None, None, None)
        assert int(LossQuantile(share)(outcome).sum()) == round(share * count)


def test_weights_are_perturbed_once_and_as_they_are_trained() -> None:
    model = toys.encoder()
    tokens, labels = toys.text_batch(batch=4)
    losses = []
    for twice in (False, True):
        objective = eb.AdversarialObjective(eb.FGM(eps=0.1), eb.Site(model.embedding))
        weights = [p for p in model.parameters() if p.dim() > 1]
        awp = eb.AWP(objective, weights * 2 if twice else weights, gamma=0.1)
        model.head.weight.requires_grad_(False)  # after it was given
        losses.append(awp(toys.classify(model, tokens, labels))[0].item())
        model.head.weight.requires_grad_(True)
    assert losses[0] == losses[1]
    with pytest.raises(ValueError, match="no parameter of two dims"):
        eb.AWP(objective, [model.head.bias])


def test_clipping_of_weights_that_are_scaled_by_a_constant_of_theirs() -> None:
    """A norm or a mask of the parameter, through which no gradient goes."""
    torch.manual_seed(0)

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(5, 3, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            w = self.w / self.w.detach().norm()
            return x @ (w * (self.w.abs() > 0.3))

    model, x = Scaled(), torch.randn(6, 5, dtype=torch.float64)
    clipper = eb.PerSampleClipper(model, 0.01, reduction="sum", verify="always")
    with clipper:
        clipper.backward(model(x).square().sum(1))
    expected = torch.zeros_like(model.w)
    for row in x:
        (grad,) = torch.autograd.grad(model(row[None]).square().sum(), model.w)
        expected += grad * (0.01 / grad.norm()).clamp(max=1)
    torch.testing.assert_close(model.w.grad, expected)


def test_clipping_of_tiny_gradients_is_no_defect() -> None:
    model = nn.Linear(4, 3)
    clipper = eb.PerSampleClipper(model, 1.0, verify="always")
    with clipper:
        clipper.backward((model(torch.randn(6, 4)) * 1e-25).sum(1))
    assert model.weight.grad is not None
    assert model.weight.grad.abs().max() > 0


def test_options_of_clipping_that_cannot_be_are_refused() -> None:
    model = nn.Linear(4, 3)
    for size in (0, -4, torch.nan):
        with pytest.raises(ValueError, match=r"expected_batch_size must be (finite|above 0)"):
            eb.PerSampleClipper(model, 1.0, expected_batch_size=size)
    clipper = eb.PerSampleClipper(model, 1.0, noise_multiplier=1.0)
    for wrong in (torch.nan, -2.0):
        with clipper:
            losses, weights = model(torch.randn(2, 4)).sum(1), torch.tensor([1.0, wrong])
            with pytest.raises(ValueError, match=rf"in \[-1, 1\], got {wrong}"):
                clipper.backward(losses, weights=weights)
    model.weight.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(ValueError, match="'weight' has a gradient hook"), clipper:
        model(torch.randn(2, 4))


def test_ops_refuse_tensors_without_numbers_beside_others() -> None:
    x = torch.zeros(4, 8)
    calls: list[Callable[[], Any]] = [
        lambda: eb.ops.pgd_step(x, x.to("meta"), step_size=1.0, eps=1.0),
        lambda: eb.ops.pgd_step_(x, x.to("meta"), step_size=1.0, eps=1.0),
        lambda: eb.ops.clip_and_sum([x, x.to("meta")], max_norm=1.0),
        lambda: eb.ops.project(x, eps=torch.ones(4, device="meta")),
    ]
    for run in calls:
        with pytest.raises(ValueError, match="tensors are on cpu and meta"):
            run()
    assert eb.ops.pgd_step(x.to("meta"), x.to("meta"), step_size=1.0, eps=1.0).is_meta


def test_what_is_written_does_not_share_a_part_of_its_memory() -> None:
    """With what is read besides; the very same elements may be, where one step reads them once."""
    rows, square, grad = torch.randn(9, 8), torch.randn(8, 8), torch.randn(4, 8)
    step: dict[str, Any] = {"step_size": 0.1, "eps": 1.0}
    wrong: dict[str, Callable[[], Any]] = {
        "delta .* grad": lambda: eb.ops.pgd_step_(rows[1:], rows[:-1], **step),
        "delta .* x0": lambda: eb.ops.project_(rows[1:], eps=1.0, x0=rows[:-1]),
        "x .* upper": lambda: eb.ops.gaussian_noise_(rows[1:], std=1.0, upper=rows[:-1]),
        "delta .* velocity": lambda: eb.ops.momentum_step_(
            square[:4], square[2:6], grad, decay=0.9, **step
        ),
        "weight .* grad": lambda: eb.ops.rowwise_adagrad_(
            square, torch.zeros(8), torch.arange(8), square, lr=0.1
        ),
    }
    for words, run in wrong.items():
        with pytest.raises(
            ValueError, match=f"{words}: pass a clone".replace(" .* ", " is .* with ")
        ):
            run()
    for x, g in ((square, square), (rows[:4], rows[4:8]), (square[:, :4], square[:, 4:])):
        expected = eb.ops.pgd_step(x.clone(), g.clone(), **step)
        assert torch.equal(eb.ops.pgd_step_(x, g, **step), expected)


def test_starts_have_the_strengths_of_their_places() -> None:
    one, two = nn.Embedding(9, 4), nn.Embedding(9, 3)
    tokens = torch.arange(8).reshape(4, 2)

    def loss() -> Tensor:
        return one(tokens).tanh().sum((1, 2)) + two(tokens).tanh().sum((1, 2))

    def started(start: eb.BoxStart | eb.GaussianStart, joint: bool) -> list[float]:
        sites = [eb.Site(one), eb.Site(two)]
        attack = eb.PGD(eps=1e6, norm="linf", steps=0, random_start=start)
        return [float(d.abs().max()) for d in attack.run(loss, sites, joint=joint).deltas]

    measured = Measured({(0, 0): 1.0, (1, 0): 1000.0})
    for kind, most in ((eb.BoxStart, 1), (eb.GaussianStart, 6)):
        first, second = started(kind(measured), joint=False)
        assert 0.1 < first <= most
        assert 100 < second <= 1000 * most
        (both,) = started(kind(measured), joint=True)
        assert 100 < both <= 501 * most
    # Of a joint ball the norms of tokens are those of its outputs, not of single numbers.
    norms = [table(tokens).norm(dim=-1, p=torch.inf).flatten() for table in (one, two)]
    mean = float(torch.cat(norms).detach().mean())
    (drawn,) = started(eb.BoxStart(eb.Relative(1.0, to="token_norm")), joint=True)
    assert 0.8 * mean < drawn <= mean * 1.0001


@pytest.mark.filterwarnings("ignore:.*had no gradient")
@pytest.mark.parametrize("group", ["row", "table"])
@pytest.mark.parametrize(
    "attack",
    [
        eb.APGD(eps=1.0, steps=4),
        eb.Square(eps=1.0, steps=4),
        eb.AutoAttack(eps=1.0, steps=2, queries=4),
    ],
)
def test_a_shared_delta_of_no_samples(attack: eb.Attack, group: Any) -> None:
    table, labels = nn.Embedding(6, 3), torch.zeros(0, dtype=torch.long)
    tokens = labels.reshape(0, 2)

    def loss() -> eb.Evaluation:
        return eb.Evaluation(outputs=table(tokens).sum(1))

    result = attack.run(loss, eb.Site.weight(table, group=group), criterion=eb.Misclassify(labels))
    assert result.outputs.shape == (0, 3)
    assert result.delta.isfinite().all()
