"""Partial batches: which samples are perturbed, the passes, and the numbers of a plain loop."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import devices
import embattle as eb
import pytest
import torch
import toys
from embattle.errors import InputError
from embattle.objectives.parts import Parts, mean_of_rows
from embattle.objectives.rows import Key
from embattle.perturb import chosen as of_chosen
from embattle.perturb.evaluation import Evaluation
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

TOKENS, LABELS = toys.text_batch(12, 9, seed=5)


def cut(samples: list[int]) -> tuple[Tensor, Tensor]:
    """A batch, padded to its longest text."""
    tokens = TOKENS[samples]
    return tokens[:, : int((tokens != 0).sum(1).max())], LABELS[samples]


def step(
    objective: eb.AdversarialObjective | eb.AWP,
    model: nn.Module,
    texts: list[int],
    **more: Any,
) -> tuple[Tensor, dict[str, Tensor], list[list[int]]]:
    """One call on some texts; the rows that were chosen, too."""
    chosen: list[list[int]] = []

    def some(rows: Tensor) -> Callable[[], Evaluation]:
        chosen.append(rows.tolist())
        return toys.classify(model, *cut([texts[row] for row in rows]))

    tokens, labels = cut(texts)
    options = {
        "samples": texts,
        "subset": some,
        "mask": tokens != 0,
        "criterion": eb.Misclassify(labels),
    } | more
    loss, metrics = objective(toys.classify(model, tokens, labels), **options)
    return loss, metrics, chosen


FORM = ("share", "choose", "delay", "schedule", "every")


def partial(model: nn.Module, attack: eb.Attack | None = None, **options: Any) -> Any:
    form = {k: options.pop(k) for k in FORM if k in options}
    site = options.pop("site", None) or eb.Site(model.embedding, model=model)  # type: ignore[arg-type]
    attack = attack or eb.FGM(eps=0.4)
    return eb.AdversarialObjective(attack, site, form=eb.Partial(**form), **options)


# --- the numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("lam", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("rows", [torch.tensor([1, 3, 4]), slice(2, 5)])
def test_the_mean_is_that_of_the_parts(lam: float, masked: bool, rows: Key) -> None:
    kept = torch.tensor([1.0, 0.0, 1.0]) if masked else None
    losses = torch.arange(1.0, 7.0).requires_grad_()
    parts = Parts.of_rows(losses, torch.arange(6)[rows], kept, lam).summed.mean()
    mean = mean_of_rows(losses, rows, kept, lam)
    torch.testing.assert_close(mean, parts)
    grads = [torch.autograd.grad(value, losses)[0] for value in (mean, parts)]
    torch.testing.assert_close(*grads)


def test_a_sample_that_is_left_out_adds_no_nan() -> None:
    losses = torch.tensor([1.0, torch.nan], requires_grad=True)
    mean = mean_of_rows(losses, torch.tensor([1]), torch.tensor([0.0]), 1.0)
    mean.backward()
    assert mean.item() == 0.5
    assert losses.grad is not None
    assert losses.grad.tolist() == [0.5, 0.0]


class _Keeping(nn.Embedding):
    def forward(self, rows: Tensor) -> Tensor:
        self.kept = super().forward(rows)
        return self.kept


@pytest.mark.parametrize("way", ["in place", "hook", "hook of all modules", "class"])
def test_what_is_added_in_place_gives_the_numbers_of_a_sum(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where somebody may have seen the look-up's output, the deltas are added to a copy."""
    added: list[Any] = []
    add_in_place = of_chosen._add_in_place
    monkeypatch.setattr(
        of_chosen, "_add_in_place", lambda *args: added.append(args) or add_in_place(*args)
    )
    found: list[float] = []
    batch = toys.triplets()
    for other in (False, True):
        model = toys.factors()
        handles: list[Any] = []
        if other and way == "hook":
            for table in (model.user, model.item):
                table.register_forward_hook(lambda m, a, out: None)
        elif other and way == "hook of all modules":
            handles.append(register_module_forward_hook(lambda m, a, out: None))
        elif other and way == "class":
            for name in ("user", "item"):
                table = getattr(model, name)
                own = _Keeping(*table.weight.shape, _weight=table.weight)
                setattr(model, name, own)
        added.clear()
        sites = [eb.Site(model.user), eb.Site(model.item)]
        objective = eb.AdversarialObjective(eb.FGM(eps=0.4), sites, form=eb.Partial(), lam=2.0)
        optimizer = torch.optim.SGD(model.parameters(), 0.5)
        torch.manual_seed(3)
        for _ in range(3):
            loss, _ = objective(
                toys.rank(model, batch),
                samples=9,
                subset=lambda rows, model=model: toys.rank(
                    model, (batch[0][rows], batch[1][rows], batch[2][rows])
                ),
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        for handle in handles:
            handle.remove()
        if devices.kind != "pretend":  # whose tensors are a subclass
            assert bool(added) == (not other or way == "in place")
    assert found[:3] == pytest.approx(found[3:], abs=1e-12)


def plain_step(
    model: toys.Encoder,
    samples: list[int],
    rows: list[int],
    norm: str = "l2",
    lam: float = 1.0,
    steps: int = 1,
    size: float = 0.3,
) -> Tensor:
    """The loss as one would write it, with the deltas of the chosen texts found by themselves."""
    embeddings: dict[str, Tensor] = {}
    hook = model.embedding.register_forward_hook(lambda m, a, out: out + embeddings["delta"])
    tokens, labels = cut([samples[row] for row in rows])
    delta = torch.zeros(*tokens.shape, 8, dtype=torch.float64)
    for _ in range(steps):
        embeddings["delta"] = delta = delta.detach().requires_grad_()
        losses = nn.functional.cross_entropy(model(tokens), labels, reduction="none")
        (grad,) = torch.autograd.grad(losses.sum(), delta)
        grad = grad * (tokens != 0).unsqueeze(-1)
        with torch.no_grad():
            if norm == "linf":
                delta = (delta + size * grad.sign()).clamp(-0.4, 0.4)
            else:
                flat = grad.flatten(1)
                moved = delta.flatten(1) + size * flat / flat.norm(dim=1, keepdim=True)
                moved = moved * (0.4 / moved.norm(dim=1, keepdim=True)).clamp(max=1)
                delta = moved.view_as(delta)
    tokens, labels = cut(samples)
    whole = torch.zeros(*tokens.shape, 8, dtype=torch.float64)
    whole[rows, : delta.shape[1]] = delta.detach()
    embeddings["delta"] = whole
    losses = nn.functional.cross_entropy(model(tokens), labels, reduction="none")
    hook.remove()
    weights = torch.ones(len(samples), dtype=torch.float64)
    weights[rows] = lam
    return (weights * losses).sum() / weights.sum()


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize(("share", "lam", "steps"), [(0.5, 1.0, 1), (0.3, 2.5, 3), (1.0, 1.0, 2)])
def test_the_numbers_are_those_of_a_plain_loop(
    norm: str, share: float, lam: float, steps: int
) -> None:
    one, two = toys.encoder(), toys.encoder()
    optimizers = [torch.optim.SGD(model.parameters(), 0.2) for model in (one, two)]
    attack = eb.PGD(norm=norm, eps=0.4, step_size=0.3, steps=steps)  # type: ignore[arg-type]
    objective = partial(one, attack, share=share, lam=lam)
    for samples in ([0, 5, 7, 2, 9, 1], [3, 4, 6, 8, 10, 11], [11, 0, 2, 4, 6, 8]):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss, metrics, chosen = step(objective, one, samples)
        expected = plain_step(two, samples, chosen[0], norm, lam, steps)
        assert len(chosen) == 1
        assert len(chosen[0]) == int(metrics["perturbed"]) == {0.5: 3, 0.3: 2, 1.0: 6}[share]
        loss.backward()
        expected.backward()
        assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
        for optimizer in optimizers:
            optimizer.step()
        for p, q in zip(one.parameters(), two.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-12)
    assert ("clean_loss" in metrics) == (share < 1)
    assert metrics["adversarial_loss"] > 0
    assert 0 <= metrics["robust_accuracy"] <= 1
    assert int(metrics["nonfinite"]) == int(metrics["zero_gradient"]) == 0


def test_the_attack_runs_the_model_on_the_chosen_samples_alone() -> None:
    model = toys.encoder()
    sizes: list[int] = []
    model.layer.register_forward_pre_hook(lambda m, args: sizes.append(len(args[0])))
    samples = [0, 1, 2, 3, 4, 5, 6, 7]
    step(partial(model, share=0.25), model, samples)
    assert sizes == [2, 8]
    sizes.clear()
    step(partial(model, eb.PGD(eps=0.4, steps=3), share=0.25), model, samples)
    assert sizes == [2, 2, 2, 8]
    sizes.clear()
    step(partial(model, share=0.25, choose="loss"), model, samples, samples=8)
    assert sizes == [8, 2, 8]  # nothing is known of the samples: a pass shows it
    sizes.clear()
    for options in ({"delay": 1}, {"share": 0.0}, {"lam": 0.0}, {"schedule": lambda s: 0.0}):
        step(partial(model, **options), model, samples)
    assert sizes == [8] * 4


@pytest.mark.parametrize(
    ("attack", "options"),
    [
        (eb.APGD(eps=0.4, steps=3), {}),
        (eb.MIFGSM(eps=0.4, steps=2), {}),
        (eb.PGD(eps=0.4, steps=2, random_start=True, restarts=2), {}),
        (eb.PGD(eps=eb.Relative(0.3), steps=2, keep="best", mode="eval"), {}),
        (eb.PGD(eps=0.4, steps=2, mode="same"), {}),
        (eb.FGM(eps=0.4), {"group": "token"}),
        (eb.FGM(eps=0.4), {"scope": "row"}),
        (eb.FGM(eps=0.4), {"joint": True}),
        (eb.UniformNoise(eps=0.4), {}),
    ],
    ids=str,
)
def test_any_attack_and_site(attack: eb.Attack, options: dict[str, Any]) -> None:
    """The outputs are those under the attack's own deltas where chosen, and clean elsewhere."""
    joint = options.get("joint", False)
    model = toys.encoder()
    site = eb.Site(
        model.embedding,
        model=model,
        group=options.get("group", "sample"),
        scope=options.get("scope", "output"),
    )
    outputs: list[Tensor] = []
    samples = [0, 5, 7, 2, 9, 1]
    objective = partial(model, attack, site=site)
    handle = model.embedding.register_forward_hook(lambda m, a, out: outputs.append(out.detach()))
    loss, metrics, (rows,) = step(objective, model, samples, joint=joint)
    handle.remove()
    tokens, _ = cut(samples)
    moved = (outputs[-1] - model.embedding(tokens)).detach()
    rest = [row for row in range(6) if row not in rows]
    assert moved[rest].abs().max() == 0
    assert moved[rows][tokens[rows] == 0].abs().max() == 0
    assert (moved[rows].flatten(1).norm(dim=1) > 0.01).all()
    if options.get("scope") == "row":
        torch.testing.assert_close(
            moved[rows][tokens[rows] != 0].norm(dim=1).max(), torch.tensor(0.4).double()
        )
    loss.backward()
    assert "adversarial_loss" in metrics


def test_several_sites() -> None:
    model = toys.factors()
    sites = [eb.Site(model.user), eb.Site(model.item)]
    objective = eb.AdversarialObjective(eb.FGM(eps=0.5), sites, form="partial")
    batch = toys.triplets(8)
    sizes: list[int] = []
    model.user.register_forward_hook(lambda m, a, out: sizes.append(len(out)))
    with pytest.raises(ValueError, match="how many samples the batch has"):
        objective(toys.rank(model, batch), subset=lambda rows: toys.rank(model, batch))
    loss, metrics = objective(
        toys.rank(model, batch),
        samples=8,
        subset=lambda rows: toys.rank(model, tuple(x[rows] for x in batch)),  # type: ignore[arg-type]
    )
    loss.backward()
    assert sizes == [4, 8]
    assert metrics["adversarial_loss"] > metrics["clean_loss"]


def test_packed_rows() -> None:
    """Ragged batches: the samples' rows one after the other, with offsets."""
    torch.manual_seed(0)
    table, head = nn.Embedding(40, 4).double(), nn.Linear(4, 1).double()
    lengths = torch.tensor([2, 3, 1, 4, 2])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    indices = torch.randint(0, 40, (int(lengths.sum()),))
    mask = torch.ones(len(indices), dtype=torch.bool)
    mask[4] = False

    def loss_of(samples: list[int]) -> Callable[[], Tensor]:
        def loss_fn() -> Tensor:
            mine = torch.cat([indices[offsets[i] : offsets[i + 1]] for i in samples])
            owner = torch.cat([torch.full((int(lengths[i]),), n) for n, i in enumerate(samples)])
            sums = torch.zeros(len(samples), 4, dtype=torch.float64)
            return head(sums.index_add(0, owner, table(mine))).squeeze(1).tanh()

        return loss_fn

    seen: list[Tensor] = []
    objective = eb.AdversarialObjective(eb.FGM(eps=0.5), eb.Site(table), form=eb.Partial(0.4))
    handle = table.register_forward_hook(lambda m, a, out: seen.append(out.detach()))
    chosen: list[list[int]] = []
    objective(
        loss_of([0, 1, 2, 3, 4]),
        samples=5,
        mask=mask,
        offsets=offsets,
        subset=lambda rows: (chosen.append(rows.tolist()), loss_of(rows.tolist()))[1],
    )
    handle.remove()
    moved = (seen[-1] - table(indices)).detach()
    norms = torch.stack([moved[offsets[i] : offsets[i + 1]].norm() for i in range(5)])
    expected = torch.zeros(5, dtype=torch.float64)
    expected[chosen[0]] = 0.5
    torch.testing.assert_close(norms, expected)
    assert moved[4].norm() == 0


def test_masking_awp_and_parts() -> None:
    samples = [0, 5, 7, 2, 9, 1]
    model = toys.encoder()
    bound = lambda outcome: outcome.losses < -1.0  # noqa: E731
    loss, metrics, (rows,) = step(partial(model, masking=bound), model, samples)
    assert int(metrics["masked"]) == len(rows) == 3
    tokens, labels = cut(samples)
    rest = [row for row in range(6) if row not in rows]
    clean = toys.classify(model, tokens, labels)().losses
    assert clean is not None
    assert loss.item() == pytest.approx(clean[rest].sum().item() / 6)
    # Of every sample, for clipping: as a call, not averaged.
    torch.manual_seed(1)
    loss, _, _ = step(partial(model, lam=2.0), model, samples)
    torch.manual_seed(1)
    objective = partial(model, lam=2.0)
    parts, _ = objective.parts(
        toys.classify(model, tokens, labels),
        samples=6,
        mask=tokens != 0,
        subset=lambda rows: toys.classify(model, *cut([samples[row] for row in rows])),
    )
    assert parts.summed.shape == (6,)
    assert parts.summed.mean().item() == pytest.approx(loss.item())
    # The weights' perturbation is of the same samples under the same deltas.
    awp = eb.AWP(partial(model), model, gamma=0.01)
    loss, _, chosen = step(awp, model, samples)
    assert len(chosen) == 1
    loss.backward()


def test_clipping() -> None:
    """Every sample's gradient is no longer than the bound, whether it was chosen or not."""
    model = toys.encoder()
    clipper = eb.PerSampleClipper(model, max_norm=1e-3)
    objective = partial(model)
    samples = [0, 5, 7, 2]
    tokens, labels = cut(samples)
    with clipper:
        parts, _ = objective.parts(
            toys.classify(model, tokens, labels),
            samples=4,
            mask=tokens != 0,
            subset=lambda rows: toys.classify(model, *cut([samples[row] for row in rows])),
        )
        result = clipper.backward(parts.summed)
    assert result.norms.shape == (4,)
    total = sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None)
    assert 0 < total**0.5 <= 1e-3 + 1e-9


# --- which samples -------------------------------------------------------------------------------


@pytest.mark.parametrize("choose", ["loss", "margin"])
def test_last_losses_and_margins_choose(choose: str) -> None:
    model = toys.encoder()
    objective = partial(model, share=0.5, choose=choose)
    _, _, (rows,) = step(objective, model, [0, 1, 2, 3])
    assert len(rows) == 2
    tokens, labels = cut(list(range(8)))
    got = toys.classify(model, tokens, labels)()
    assert got.losses is not None
    assert got.outputs is not None
    keys = got.losses if choose == "loss" else -eb.losses.margin(got.outputs, labels).abs()
    # All clean values of the first batch are known, those of the second one are not.
    samples = [3, 7, 0, 6]
    _, _, (rows,) = step(objective, model, samples)
    assert rows == [1, 3]
    samples = [0, 1, 2, 3]
    _, _, (rows,) = step(objective, model, samples)
    assert rows == sorted(keys[:4].argsort(descending=True)[:2].tolist())
    # Without indices the batch's own pass says the same.
    other = partial(model, share=0.5, choose=choose)
    _, _, (now,) = step(other, model, samples, samples=4)
    assert now == rows
    # And a resumed run goes on with the same choice.
    state = objective.state_dict()
    resumed = partial(model, share=0.5, choose=choose)
    resumed.load_state_dict(state)
    assert step(resumed, model, samples)[2] == [rows]


def test_random_choice_follows_the_generator() -> None:
    model = toys.encoder()

    def draws(seed: int) -> list[list[int]]:
        generator = torch.Generator(device="cpu").manual_seed(seed)
        objective = partial(model, eb.FGM(eps=0.4, generator=generator))
        return [step(objective, model, list(range(12)))[2][0] for _ in range(4)]

    assert draws(0) == draws(0) != draws(1)
    counts = Counter(row for rows in draws(0) for row in rows)
    assert sum(counts.values()) == 24
    assert len(counts) > 8


def test_share_delay_and_schedule() -> None:
    model = toys.encoder()
    objective = partial(model, share=0.5, delay=1, schedule=eb.schedules.WarmUp(3))
    counts = [int(step(objective, model, list(range(12)))[1]["perturbed"]) for _ in range(5)]
    assert counts == [0, 2, 4, 6, 6]
    objective = partial(model, share=0.25, delay=1, every=3)
    counts = [int(step(objective, model, list(range(12)))[1]["perturbed"]) for _ in range(8)]
    assert counts == [0, 3, 0, 0, 3, 0, 0, 3]
    assert str(objective.form) == "Partial(0.25 of one batch in 3, by random)"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_does_not_matter(dtype: torch.dtype) -> None:
    model = toys.encoder()
    torch.set_default_dtype(dtype)
    try:
        step(partial(model, share=0.5, choose="loss"), model, [0, 1, 2, 3])
    finally:
        torch.set_default_dtype(torch.float32)


def test_bounds_and_strengths_are_those_of_the_chosen() -> None:
    """One for each sample, for each element, for all."""
    model = toys.encoder()
    samples = [0, 1, 2, 3]
    length = cut(samples)[0].shape[1]
    each = torch.linspace(5.0, 8.0, 4, dtype=torch.float64)
    for upper in (each.view(4, 1, 1), each.view(4, 1, 1).expand(4, length, 8), each[:1]):
        attack = eb.PGD(norm="linf", eps=torch.tensor([9.0]), step_size=9.0, steps=1, upper=upper)
        objective = partial(model, attack, share=0.5)
        seen: list[Tensor] = []
        hook = model.embedding.register_forward_hook(
            lambda m, a, out, seen=seen: seen.append(out.detach().clone())
        )
        rows = step(objective, model, samples)[2][0]
        hook.remove()
        most = seen[-1].flatten(1).amax(1)
        bounds = upper.reshape(len(upper), -1)[:, 0].expand(4)
        torch.testing.assert_close(most[rows], bounds[rows])


# --- what is refused -----------------------------------------------------------------------------


def test_what_the_form_cannot_have_is_refused() -> None:
    model = toys.encoder()
    samples = [0, 1, 2, 3]
    tokens, labels = cut(samples)
    with pytest.raises(InputError, match=r"subset=lambda rows"):
        step(partial(model), model, samples, subset=None)
    with pytest.raises(ValueError, match="how many samples"):
        step(partial(model), model, samples, samples=None, criterion=None)
    wrong = {"subset": lambda rows: toys.classify(model, tokens[:1], labels[:1])}
    with pytest.raises(ValueError, match="1 losses for 2 samples"):
        step(partial(model), model, samples, **wrong, mask=None, samples=4, criterion=None)
    others = lambda rows: toys.classify(model, TOKENS[rows + 6], LABELS[rows + 6])  # noqa: E731
    if devices.kind == "cpu":  # elsewhere the comparison would wait for the device
        with pytest.raises(ValueError, match="these samples"):
            step(partial(model), model, samples, subset=others, mask=None)
    site = eb.Site.weight(model.embedding, model=model)
    with pytest.raises(ValueError, match="all samples share"):
        step(partial(model, site=site), model, samples, mask=None)
    with pytest.raises(ValueError, match="needs classes"):
        step(partial(model, choose="margin"), model, samples, samples=4, criterion=None)
    with pytest.raises(InputError, match="whole numbers from 0"):
        step(partial(model, choose="loss"), model, samples, samples=[0, 1, 2, -3])
    with pytest.raises(InputError, match=r"got 1000000000000\. A number is kept"):
        step(partial(model, choose="loss"), model, samples, samples=[0, 1, 2, 10**12])
    for choose in ("random", "loss"):
        with pytest.raises(InputError, match="4 losses for 3 samples"):
            step(partial(model, choose=choose), model, samples, samples=3, criterion=None)
    for options in ({"share": 1.5}, {"choose": "best"}, {"delay": -1}, {"every": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            eb.Partial(**options)  # type: ignore[arg-type]
