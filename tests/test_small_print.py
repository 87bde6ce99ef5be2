"""Small print of criteria, sites, attacks and objectives, which `make mutation` showed unread."""

from __future__ import annotations

import math
import warnings
from types import SimpleNamespace
from typing import Any

import embattle as eb
import pytest
import torch
import toys
from embattle import Evaluation
from torch import Tensor, nn


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


class Returns(nn.Module):
    """A module that returns what a function makes of its input."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.make = make

    def forward(self, value: Tensor) -> Any:
        return self.make(value)


# --- sites ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda x: x.long(), "Tensor of torch.int64"),
        (lambda x: "text", "got str"),
        (lambda x: ("text", x), r"got str \(in a tuple\)"),
    ],
)
def test_outputs_that_are_no_embeddings_are_refused(make: Any, words: str) -> None:
    module, value = Returns(make), torch.randn(3, 4)

    def loss() -> Tensor:
        module(value)
        return value.sum(1)

    with pytest.raises(TypeError, match=words):
        eb.FGM(eps=0.1).run(loss, eb.Site(module))


@pytest.mark.parametrize("used", [0, 1])
def test_a_call_that_no_loss_depends_on_is_counted_and_not_refused(used: int) -> None:
    """Also where the sizes leave it open which dim has the samples."""
    embedding = nn.Embedding(9, 5).double()
    tokens = torch.randint(0, 9, (4, 4))

    def loss() -> Tensor:
        calls = embedding(tokens), embedding(tokens)
        return calls[used].square().sum((1, 2))

    with pytest.warns(eb.attacks.AttackWarning, match="4 of 8 groups"):
        result = eb.PGD(eps=0.1, steps=2).run(loss, eb.Site(embedding))
    assert int(result.zero_gradient) == 4


def test_something_else_among_sites_is_refused() -> None:
    site, x = eb.Site(nn.Identity()), torch.randn(4, 3)
    for sites, got in (([site, nn.Identity()], "Identity"), ([], "none"), (3, "int")):
        with pytest.raises(TypeError, match=f"sequence of them, got {got}"):
            eb.FGM(eps=0.1).run(lambda: site.module(x).sum(1), sites)  # type: ignore[arg-type]


@pytest.mark.parametrize("unused", [0, 1, 2])
def test_each_site_of_a_joint_ball_is_looked_at(unused: int) -> None:
    modules = [nn.Identity(), nn.Tanh(), nn.Sigmoid()]
    values = [torch.randn(4, 3) for _ in modules]

    def loss() -> Tensor:
        made = [module(value).sum(1) for module, value in zip(modules, values, strict=True)]
        return torch.stack([one for i, one in enumerate(made) if i != unused]).sum(0)

    sites = [eb.Site(module) for module in modules]
    with pytest.raises(RuntimeError, match=f"{type(modules[unused]).__name__}.*do not depend"):
        eb.PGD(eps=0.1, steps=2).run(loss, sites, joint=True)


@pytest.mark.parametrize("shape", [(3, 2), (4,)])
def test_a_joint_ball_needs_outputs_of_the_same_samples(shape: tuple[int, ...]) -> None:
    modules, values = [nn.Identity(), nn.Identity()], [torch.randn(4, 3), torch.randn(shape)]

    def loss() -> Tensor:
        one, two = (module(value) for module, value in zip(modules, values, strict=True))
        return one.sum(1) + two.sum()

    with pytest.raises(ValueError, match="joint: the outputs must agree in dim 0"):
        eb.FGM(eps=0.1).run(loss, [eb.Site(module) for module in modules], joint=True)


def test_time_first_is_noticed_in_each_output_of_a_joint_ball() -> None:
    modules, values = [nn.Identity(), nn.Identity()], [torch.randn(4, 3), torch.randn(4, 4, 3)]

    def loss() -> Tensor:
        one, two = (module(value) for module, value in zip(modules, values, strict=True))
        return one.square().sum(1) + two.square().sum((0, 2))

    with pytest.raises(ValueError, match=r"samples of an output \(4, 4, 3\) are in dim 1"):
        eb.FGM(eps=0.1).run(loss, [eb.Site(module) for module in modules], joint=True)


def test_balls_of_a_parameter_are_rows_or_the_table() -> None:
    with pytest.raises(ValueError, match=r"Site.weight: group must be one of.*'sample'"):
        eb.Site.weight(nn.Linear(2, 2), group="sample")  # type: ignore[arg-type]


def test_a_static_graph_of_ddp_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch tells of the model that is running; `test_libraries.py` has two processes."""
    running = SimpleNamespace(static_graph=True)
    monkeypatch.setattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", running)
    module, x = nn.Identity(), torch.randn(4, 3)
    with pytest.raises(RuntimeError, match="static_graph=False"):
        eb.FGM(eps=0.1).run(lambda: module(x).sum(1), eb.Site(module))


@pytest.mark.parametrize("read", [True, False])
def test_rows_that_a_batch_does_not_read_lack_no_gradient(read: bool) -> None:
    """But all of them do where nothing has one."""
    embedding = nn.Embedding(9, 4)
    tokens = torch.tensor([[0, 1], [2, 3]])
    attack, site = eb.FGM(eps=0.1), eb.Site(embedding, scope="row", rows="table")

    def loss() -> Tensor:
        return embedding(tokens).sum((1, 2)) * float(read)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", eb.attacks.AttackWarning)
        assert int(attack.run(loss, site).zero_gradient) == (0 if read else 9)


# --- criteria -------------------------------------------------------------------------------------


def test_ratings_as_labels_of_two_classes_say_what_they_are_a_matter_for() -> None:
    labels = torch.tensor([0, 4])
    for classes, said in ((2, True), (3, False)):
        with pytest.raises(ValueError, match="labels must lie in") as caught:
            eb.Misclassify(labels).check(Evaluation(outputs=torch.zeros(2, classes)))
        assert ("embattle.Deviate" in str(caught.value)) == said


@pytest.mark.parametrize(
    "make",
    [
        eb.MaximizeLoss,
        lambda: eb.Misclassify(torch.tensor([0, 1])),
        lambda: eb.Target(torch.tensor([0, 1])),
        lambda: eb.MultiLabel(torch.tensor([[0, 1], [1, 1]])),
        lambda: eb.Deviate(torch.tensor([0.0, 1.0]), by=0.5),
        lambda: eb.Promote(torch.tensor([0, 1]), k=1),
        lambda: eb.Demote(torch.tensor([0, 1]), k=1),
        lambda: eb.Outrank(torch.tensor([0, 1]), k=1),
        eb.Diverge,
    ],
)
def test_a_criterion_equals_itself_alone(make: Any) -> None:
    """By its tensors it could neither be compared nor be a key."""
    one, other = make(), make()
    assert one == one
    assert one != other
    assert len({one, other}) == 2


@pytest.mark.parametrize("make", [eb.MultiLabel, lambda given: eb.Deviate(given, by=0.5)])
def test_what_a_criterion_is_given_is_cut_off_its_graph(make: Any) -> None:
    given = torch.tensor([[0.0, 1.0]], requires_grad=True) * 1.0
    held = vars(make(given))
    assert not any(isinstance(one, Tensor) and one.requires_grad for one in held.values())


def test_labels_in_bool_are_numbers() -> None:
    assert eb.MultiLabel(torch.tensor([[True, False]])).labels.dtype == torch.int64


# --- attacks --------------------------------------------------------------------------------------


def test_an_ensemble_averages_over_draws_of_which_the_first_is_the_clean_one() -> None:
    x, drawn = torch.randn(4, 3), []
    module = nn.Identity()

    def loss() -> Tensor:
        drawn.append(float(torch.rand(())))
        return module(x).sum(1) * (1 + drawn[-1])

    eb.AutoAttack(eps=0.5, steps=2, queries=0, eot=3).run(loss, eb.Site(module))
    clean, _, *rest = drawn  # the second clean pass shows that the model draws
    looks = [rest[i : i + 3] for i in range(0, 9, 3)]
    assert all(look[0] == clean for look in looks)
    assert len({number for look in looks for number in look}) == 1 + 2 * 3


def test_small_draws_in_single_precision_are_noticed() -> None:
    x, module = torch.randn(4, 3), nn.Identity()

    def loss() -> Tensor:
        return module(x).square().sum(1) * (1 + 0.01 * torch.rand(()))

    assert eb.AutoAttack(eps=0.5, steps=1, queries=0).run(loss, eb.Site(module)).randomised


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: eb.PGD(eps=1.0, max_groups=0), "max_groups must be at least 1"),
        (lambda: eb.PGD(eps=1.0, top=0.0), "top"),
        (lambda: eb.APGD(eps=1.0, momentum=-0.1), "momentum"),
        (lambda: eb.APGD(eps=1.0, momentum=1.1), "momentum"),
        (lambda: eb.APGD(eps=1.0, share=-0.1), "share"),
        (lambda: eb.AutoAttack(eps=1.0, queries=-1), "queries"),
        (lambda: eb.AutoAttack(eps=1.0, targets=-1), "targets"),
        (lambda: eb.AutoAttack(eps=1.0, eot=0), "eot must be at least 1"),
        (lambda: eb.AutoAttack(eps=1.0, mode="train"), "mode"),  # type: ignore[arg-type]
        (lambda: eb.AutoAttack(eps=1.0, restarts=0), "restarts must be at least 1"),
        (lambda: eb.FMN(steps=0), "steps must be at least 1"),
        (lambda: eb.FMN(gamma=-0.1), "gamma"),
        (lambda: eb.FMN(step_size=-0.1), "step_size"),
        (lambda: eb.FMN(unit=0.0), "unit must be above 0"),
        (lambda: eb.TokenSwap(swaps=0), "swaps must be at least 1"),
        (lambda: eb.TokenSwap(tries=0), "tries must be at least 1"),
        (lambda: eb.TokenSwap(similarity=-1.1), "similarity"),
        (lambda: eb.TokenSwap(similarity=1.1), "similarity"),
        (lambda: eb.TokenSwap(mode="train"), "mode"),  # type: ignore[arg-type]
    ],
)
def test_numbers_beyond_the_border_are_refused(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    ("attack", "words"),
    [
        (eb.PGD(eps=0.5), "PGD(l2 ball of radius 0.5, 10 steps of 2.5 x eps / steps)"),
        (
            eb.PGD(
                eps=0.5, steps=1, step_size=0.1, restarts=2, random_start=True, keep="best",
                lower=0.0, stop_when_fooled=True, mode="same",
            ),
            "PGD(l2 ball of radius 0.5, 1 step of 0.1, random start, worst of 2 restarts, best "
            "iterate, inside a box, until fooled, same dropout masks)",
        ),
        (
            eb.PGD(eps=1.0, steps=0, upper=1.0, random_start=eb.GaussianStart(0.1), mode="eval"),
            "PGD(l2 ball of radius 1, 0 steps of 2.5 x eps / steps, gaussian start of standard "
            "deviation 0.1, inside a box, eval mode)",
        ),
        (eb.MSAP(eps=0.1, steps=2), "MSAP(l2 ball of radius 0.1, 2 steps of eps / 4)"),
        (eb.FGSM(eps=0.1), "FGSM(linf ball of radius 0.1, 1 step)"),
        (
            eb.MIFGSM(eps=1.0, steps=2),
            "MIFGSM(linf ball of radius 1, 2 steps of eps / steps, momentum 1)",
        ),
        (eb.APGD(eps=1.0), "APGD(l2 ball of radius 1, 20 steps, random start, best iterate)"),
        (eb.MSAP(eps=0.1), "MSAP(l2 ball of radius 0.1, 10 steps of eps / 4)"),
        (eb.VAT(eps=1.0), "VAT(l2 ball of radius 1, 1 power iteration at 0.1, random start)"),
        (
            eb.VAT(eps=1.0, steps=2),
            "VAT(l2 ball of radius 1, 2 power iterations at 0.1, random start)",
        ),
        (
            eb.SMARTStep(),
            "SMARTStep(linf ball of radius 1e-05, 1 raw step of 0.001 x gradient, random start)",
        ),
        (
            eb.SMARTStep(steps=2),
            "SMARTStep(linf ball of radius 1e-05, 2 raw steps of 0.001 x gradient, random start)",
        ),
        (eb.UniformNoise(eps=0.1), "UniformNoise(l2 ball of radius 0.1, random start)"),
        (
            eb.GaussianNoise(std=0.1),
            "GaussianNoise(l2 ball of radius inf, standard deviation 0.1, random start)",
        ),
        (
            eb.NEFTune(),
            "NEFTune(linf ball of radius 5 / sqrt(elements in the group), random start)",
        ),
        (
            eb.AutoAttack(eps=1.0),
            "AutoAttack(l2 ball of radius 1, 100 steps, 9 targets, 5000 queries, random start, "
            "best iterate)",
        ),
        (eb.FMN(), "FMN(smallest l2 norm, 100 steps)"),
        (
            eb.FMN(unit=eb.Relative(1.0)),
            "FMN(smallest l2 norm, in units of 1 x the mean norm of the batch's groups, 100 steps)",
        ),
    ],
)  # fmt: skip
def test_attacks_read_in_words(attack: eb.Attack, words: str) -> None:
    assert repr(attack) == words


def test_nothing_is_compiled_that_nobody_asks_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("compiled")

    monkeypatch.setattr(torch, "compile", refuse)
    model = toys.encoder()
    tokens, labels = toys.text_batch()
    loss, site = toys.classify(model, tokens, labels), eb.Site(model.embedding)
    eb.PGD(eps=0.1, steps=2, random_start=True, keep="best").run(loss, site)
    eb.AdversarialObjective(eb.FGM(eps=0.1), site)(loss)
    with pytest.raises(AssertionError, match="compiled"):
        eb.PGD(eps=0.1, compile=True).run(loss, eb.Site(model.embedding, model=model))


@pytest.mark.parametrize("leave", [False, True])
def test_only_passes_that_are_differentiated_have_a_graph(leave: bool) -> None:
    x, labels, graphs = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2]), []
    module = nn.Identity()

    def loss_of(rows: Tensor) -> Any:
        def loss() -> Evaluation:
            logits = module(x[rows])
            graphs.append(logits.requires_grad)
            return Evaluation(eb.losses.cross_entropy(logits, labels[rows]), logits)

        return loss

    attack = eb.PGD(eps=1e-3, steps=3, keep="best", stop_when_fooled=leave)
    goal, subset = eb.Misclassify(labels), loss_of if leave else None
    result = attack.run(loss_of(torch.arange(6)), eb.Site(module), criterion=goal, subset=subset)
    assert int(result.steps.max()) == 3
    assert sum(graphs) == 3
    assert not graphs[-1]


def test_the_target_of_two_classes_is_the_other_class() -> None:
    model, x = nn.Sequential(nn.Identity(), nn.Linear(6, 2)), torch.randn(5, 6)
    with torch.no_grad():
        first = model(x).argmax(1)

    def smallest(goal: eb.Criterion) -> Tensor:
        site = eb.Site(model[0])
        return eb.FMN(steps=100).run(lambda: Evaluation(None, model(x)), site, criterion=goal).eps

    torch.testing.assert_close(
        smallest(eb.Target(1 - first)), smallest(eb.Misclassify(first)), rtol=0.01, atol=0
    )
    one = torch.ones(5, dtype=torch.int64)
    assert torch.equal(smallest(eb.Target(1)), smallest(eb.Target(one)))


@pytest.mark.parametrize("steep", [1.0, 3000.0])
def test_one_sample_without_a_gradient_costs_the_others_nothing_in_float16(steep: float) -> None:
    """Nor does one whose gradient overflows under the factor that keeps small ones."""
    x, module = torch.randn(3, 4).half(), nn.Identity()
    factor = torch.tensor([0.0, 1.0, steep]).half()

    def loss() -> Tensor:
        return (module(x) * factor[:, None]).float().square().sum(1) / steep

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", eb.attacks.AttackWarning)
        result = eb.FGM(eps=0.5).run(loss, eb.Site(module))
    assert result.zero_gradient == 1
    assert result.nonfinite == 0
    direction = x.float() / x.float().norm(dim=1, keepdim=True)
    expected = 0.5 * direction * (factor > 0)[:, None]
    torch.testing.assert_close(result.delta, expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("kind", [eb.Misclassify, eb.MultiLabel, eb.Target])
@pytest.mark.parametrize("attack", [eb.AutoAttack, eb.PGD])
def test_what_does_not_count_may_have_any_number(kind: Any, attack: Any) -> None:
    module, head = nn.Identity(), nn.Linear(3, 3)
    base = torch.randn(4, 3) if kind is eb.MultiLabel else torch.randn(4, 5, 3)
    with torch.no_grad():
        logits = head(base)
    labels = (logits > 0).long() if kind is eb.MultiLabel else logits.argmax(-1)
    labels = (labels + 1) % 3 if kind is eb.Target else labels
    labels[:, 0] = 7
    options = {"steps": 2, "eps": 0.5, "generator": torch.Generator()}
    if attack is eb.AutoAttack:
        options |= {"queries": 3}
    ascend = {"ascend": "margin"} if attack is eb.PGD else {}
    found = []
    for ignored in (7, -100):
        options["generator"].manual_seed(0)  # type: ignore[union-attr]
        goal = kind(labels.masked_fill(labels == 7, ignored), ignore_index=ignored, **ascend)
        result = attack(**options).run(
            lambda: Evaluation(None, head(module(base))), eb.Site(module), criterion=goal
        )
        assert not result.clean_reached.any()
        found.append(result.delta)
    assert found[0].any()
    assert torch.equal(*found)


@pytest.mark.filterwarnings("error")
def test_an_ensemble_does_not_say_of_who_fell_before_that_a_gradient_is_missing() -> None:
    x, module = torch.randn(4, 3), nn.Identity()
    goal = eb.Misclassify((x.argmax(1) + 1) % 3)
    attack = eb.AutoAttack(eps=0.5, steps=2, queries=3)
    result = attack.run(lambda: Evaluation(None, module(x)), eb.Site(module), criterion=goal)
    assert result.fooled_by == ["clean"] * 4
    assert not result.delta.any()


def test_outputs_that_are_probabilities_already_have_the_same_smallest_eps() -> None:
    x, module, head = torch.randn(6, 5), nn.Identity(), nn.Linear(5, 3)
    with torch.no_grad():
        goal = eb.Misclassify(head(x).argmax(1))

    def smallest(make: Any) -> Tensor:
        def loss() -> Evaluation:
            return Evaluation(None, make(10 * head(module(x))))

        return eb.FMN(steps=60).run(loss, eb.Site(module), criterion=goal).eps

    logits, probabilities = smallest(lambda z: z), smallest(lambda z: z.softmax(-1))
    torch.testing.assert_close(probabilities, logits, rtol=0.02, atol=0)


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
def test_one_logit_is_as_far_as_its_boundary(shape: tuple[int, ...]) -> None:
    x, module, head = torch.randn(6, 5), nn.Identity(), nn.Linear(5, 1)
    with torch.no_grad():
        clean = head(x).squeeze(1)

    def loss() -> Evaluation:
        return Evaluation(None, head(module(x)).reshape(shape))

    goal = eb.Misclassify((clean > 0).long())
    eps = eb.FMN(steps=60).run(loss, eb.Site(module), criterion=goal).eps
    expected = clean.abs() / head.weight.detach().norm()
    torch.testing.assert_close(eps, expected, rtol=0.02, atol=0)


def test_a_token_attack_that_finds_no_exchange_stops() -> None:
    embedding, tokens = nn.Embedding(9, 4), torch.randint(0, 9, (3, 5))

    def loss_of(tokens: Tensor) -> Any:
        return lambda: embedding(tokens).sum((1, 2))

    def passes(swaps: int) -> int:
        attack, nowhere = eb.TokenSwap(swaps=swaps), torch.zeros(3, 5, dtype=torch.bool)
        return attack.run(loss_of, eb.Site(embedding), tokens, mask=nowhere).passes

    assert passes(3) == passes(1)


def test_a_token_attack_makes_no_exchange_without_a_gain_by_the_gradient() -> None:
    embedding, tokens = nn.Embedding(9, 4), torch.randint(0, 9, (3, 5))
    at = embedding(tokens).detach()

    def loss_of(tokens: Tensor) -> Any:
        return lambda: (embedding(tokens) - at).square().sum((1, 2))  # flat at the start

    result = eb.TokenSwap().run(loss_of, eb.Site(embedding), tokens, mask=tokens >= 0)
    assert torch.equal(result.tokens, tokens)


def test_rounding_does_not_keep_samples_in_a_batch() -> None:
    x, module, head = torch.randn(8, 3), nn.Identity(), nn.Linear(3, 3)
    with torch.no_grad():
        labels = head(x).argmax(1)
    sizes = []

    def loss_of(rows: Tensor) -> Any:
        sizes.append(len(rows))
        rounded = 1.0 if len(rows) == 8 else 1.0 + 1e-6  # as smaller products may round
        return lambda: Evaluation(None, head(module(x[rows])) * rounded)

    attack = eb.AutoAttack(eps=0.5, steps=3, queries=0, targets=0)
    goal, whole = eb.Misclassify(labels), loss_of(torch.arange(8))
    sizes.clear()
    result = attack.run(whole, eb.Site(module), criterion=goal, subset=loss_of)
    assert 0 < int(result.reached.sum()) < 8
    assert sizes[0] == 4  # it is tried whether samples can leave, and then they do
    assert len(sizes) > 1
    assert len(result.steps.unique()) > 1  # who fell makes no more steps


@pytest.mark.parametrize("kind", ["one way", "randomised", "several ways"])
def test_ways_are_attacked_one_by_one_where_there_are_several_to_tell_apart(kind: str) -> None:
    x, module, head = torch.randn(4, 3), nn.Identity(), nn.Linear(3, 4)
    with torch.no_grad():
        labels = head(x).argmax(1)
    goal = eb.Target((labels + 1) % 4) if kind == "one way" else eb.Misclassify(labels)
    passes: list[int] = []

    def loss() -> Evaluation:
        passes.append(1)
        logits = head(module(x))
        return Evaluation(None, logits + torch.rand(()) if kind == "randomised" else logits)

    def count(targets: int) -> int:
        passes.clear()
        attack = eb.AutoAttack(eps=1e-3, steps=1, queries=0, targets=targets, eot=2)
        attack.run(loss, eb.Site(module), criterion=goal)
        return len(passes)

    # Each attack evaluates its start and its one step.
    assert count(3) - count(0) == (2 * 3 if kind == "several ways" else 0)


@pytest.mark.parametrize(
    "attack",
    [
        lambda **box: eb.PGD(eps=2.0, steps=2, **box),
        lambda **box: eb.PGD(eps=2.0, steps=2, random_start=True, keep="best", **box),
        lambda **box: eb.MIFGSM(eps=2.0, steps=2, **box),
        lambda **box: eb.APGD(eps=2.0, steps=4, **box),
        lambda **box: eb.MSAP(eps=2.0, steps=2, **box),
        lambda **box: eb.VAT(eps=2.0, **box),
        lambda **box: eb.SMARTStep(eps=2.0, step_size=9.0, sigma=1.0, **box),
        lambda **box: eb.UniformNoise(eps=2.0, **box),
        lambda **box: eb.GaussianNoise(std=2.0, **box),
        lambda **box: eb.NEFTune(alpha=9.0, **box),
        lambda **box: eb.AutoAttack(eps=2.0, steps=2, queries=5, **box),
        lambda **box: eb.FMN(steps=9, **box),
    ],
)
@pytest.mark.parametrize("side", ["lower", "upper"])
def test_boxes_of_one_side(attack: Any, side: str) -> None:
    x, module, head = torch.randn(8, 5), nn.Identity(), nn.Linear(5, 3)
    with torch.no_grad():
        labels = head(x).argmax(1)

    def loss() -> Evaluation:
        logits = head(module(x))
        return Evaluation(eb.losses.cross_entropy(logits, labels), logits)

    site, goal = eb.Site(module), eb.Misclassify(labels)
    plain = attack().run(loss, site, criterion=goal).delta
    delta = attack(**{side: 0.0}).run(loss, site, criterion=goal).delta
    out = (
        (lambda d: (x + d) < x.clamp(max=0) - 1e-6)
        if side == "lower"
        else (lambda d: (x + d) > x.clamp(min=0) + 1e-6)
    )
    assert out(plain).any(), "the box matters"
    assert not out(delta).any()
    assert not delta.requires_grad
    assert delta.any()


def test_what_gains_nothing_is_not_taken_for_the_worst() -> None:
    module, x = nn.Identity(), torch.randn(4, 3)

    def loss_of(rows: Tensor) -> Any:
        def loss() -> Evaluation:
            logits = module(x[rows]).sum(1, keepdim=True) * 0 + torch.tensor([1.0, 0.0])
            return Evaluation(logits[:, 1], logits)

        return loss

    goal = eb.Misclassify(torch.zeros(4, dtype=torch.int64))
    for leave in (False, True):
        attack = eb.PGD(eps=0.5, steps=2, random_start=True, keep="best", stop_when_fooled=leave)
        subset = loss_of if leave else None
        with pytest.warns(eb.attacks.AttackWarning):
            result = attack.run(
                loss_of(torch.arange(4)), eb.Site(module), criterion=goal, subset=subset
            )
        assert torch.equal(result.delta, torch.zeros(4, 3))


def test_each_step_of_a_minimum_norm_attack_is_one_pass() -> None:
    x, module, passes = torch.randn(4, 3), nn.Identity(), []

    def loss() -> Evaluation:
        passes.append(1)
        return Evaluation(None, module(x))

    eb.FMN(steps=5).run(loss, eb.Site(module), criterion=eb.Misclassify(x.argmax(1)))
    assert len(passes) == 5 + 1  # the first is the clean one; what was found is evaluated


def test_a_symmetric_start_is_left_at_the_first_step() -> None:
    x, module = torch.randn(4, 3), nn.Identity()

    def loss() -> Evaluation:
        off = 1e6 * (module(x) - x).square().sum(1)
        return Evaluation(None, torch.stack([torch.full_like(off, 1e-6), off], dim=1))

    goal = eb.Misclassify(torch.zeros(4, dtype=torch.int64))
    assert eb.FMN(steps=2).run(loss, eb.Site(module), criterion=goal).eps.isfinite().all()


def test_samples_that_stand_again_by_a_few_bits_are_pushed_on() -> None:
    x, module, passes, steps = torch.randn(40, 3), nn.Identity(), [], 60

    def loss() -> Evaluation:
        passes.append(1)
        lead = module(x).sum(1) - x.sum(1) - 1.0
        lead = lead - 1e-4 * (len(passes) > steps)  # as another order of sums might have it
        return Evaluation(None, torch.stack([torch.zeros_like(lead), lead], dim=1))

    goal = eb.Misclassify(torch.zeros(40, dtype=torch.int64))
    result = eb.FMN(steps=steps).run(loss, eb.Site(module), criterion=goal)
    assert len(passes) > steps + 1
    assert result.reached.all()
    assert torch.all((result.eps - 1 / math.sqrt(3)).abs() < 0.01)


# --- objectives -----------------------------------------------------------------------------------


def test_training_passes_under_awp_draw_their_own_dropout_masks() -> None:
    """Iterates are compared under the same masks; the passes that train are not."""
    model = toys.encoder(dropout=0.5)
    tokens, labels = toys.text_batch()
    attack = eb.PGD(eps=0.0, step_size=0.1, steps=2, keep="best")
    objective = eb.AdversarialObjective(attack, eb.Site(model.embedding, model=model))
    _, metrics = eb.AWP(objective, model)(toys.classify(model, tokens, labels))
    assert metrics["adversarial_loss"] != metrics["clean_loss"]


def test_mart_of_sequences_is_the_mean_over_its_places() -> None:
    """Eq. 8 at each place that counts, with the largest other class of each."""
    embedding, head = nn.Embedding(9, 4).double(), nn.Linear(4, 3).double()
    tokens, labels = torch.randint(0, 9, (2, 5)), torch.randint(0, 3, (2, 5))
    labels[0, 3:] = -100

    def loss() -> Evaluation:
        logits = head(embedding(tokens))
        return Evaluation(eb.losses.cross_entropy(logits, labels), logits)

    site, attack = eb.Site(embedding), eb.PGD(eps=0.5, steps=2)
    criterion = eb.Misclassify(labels)
    got, _ = eb.AdversarialObjective(attack, site, form="mart", lam=2.0)(loss, criterion=criterion)
    with torch.no_grad():
        p = loss().outputs.softmax(-1)  # type: ignore[union-attr]
        with attack.run(loss, site, criterion=criterion).applied():
            q = loss().outputs.softmax(-1)  # type: ignore[union-attr]
    samples = []
    for b in range(2):
        values = []
        for t in range(5 if b else 3):
            y = int(labels[b, t])
            other = max(float(q[b, t, k]) for k in range(3) if k != y)
            kl = float((p[b, t] * (p[b, t] / q[b, t]).log()).sum())
            bce = -math.log(q[b, t, y]) - math.log(1 - other)
            values.append(bce + 2.0 * kl * (1 - float(p[b, t, y])))
        samples.append(sum(values) / len(values))
    assert float(got.detach()) == pytest.approx(sum(samples) / 2)


def test_statistics_start_anew_at_perturbed_weights() -> None:
    model = nn.Sequential(nn.Embedding(20, 6), nn.Flatten(), nn.BatchNorm1d(18), nn.Linear(18, 3))
    seen: list[int] = []
    model[2].register_forward_pre_hook(lambda norm, _: seen.append(int(norm.num_batches_tracked)))
    site = eb.Site(model[0], model=model)
    objective = eb.AWP(eb.AdversarialObjective(eb.PGD(eps=0.5, steps=2), site), model)
    tokens, labels = torch.randint(0, 20, (8, 3)), torch.randint(0, 3, (8,))
    objective(toys.classify(model, tokens, labels))
    assert seen[-2:] == [0, 1]


@pytest.mark.parametrize("seeded", [False, True])
def test_a_state_is_taken_over_with_and_without_a_generator(seeded: bool) -> None:
    site = eb.Site(toys.encoder().embedding)

    def objective(own: bool) -> eb.AdversarialObjective:
        generator = torch.Generator() if own else None
        return eb.AdversarialObjective(eb.FGM(eps=0.1, generator=generator), site)

    before, after = objective(seeded), objective(not seeded)
    before.step = 3
    after.load_state_dict(before.state_dict())
    assert after.step == 3


def test_weight_perturbation_takes_its_numbers_by_name() -> None:
    model = toys.encoder()
    objective = eb.AdversarialObjective(eb.FGM(eps=0.1), eb.Site(model.embedding))
    assert eb.AWP(objective=objective, model=model, gamma=0.1).gamma == 0.1
    with pytest.raises(TypeError):
        eb.AWP(objective, model, 0.1)  # type: ignore[misc]


def test_deltas_of_a_batch_of_another_size_are_not_taken_over() -> None:
    model = toys.encoder()
    tokens, labels = toys.text_batch()
    site, attack = eb.Site(model.embedding), eb.FGSM(eps=0.1)
    objective = eb.AdversarialObjective(attack, site, form="freeat")
    objective(toys.classify(model, tokens, labels))
    last = toys.classify(model, tokens[:4], labels[:4])
    fresh = eb.AdversarialObjective(attack, site, form="freeat")
    torch.testing.assert_close(objective(last)[0].detach(), fresh(last)[0].detach())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: eb.schedules.Constant(-0.1), "Constant: value"),
        (lambda: eb.schedules.WarmUp(-1), "WarmUp: steps"),
        (lambda: eb.schedules.WarmUp(3, start=-0.1), "WarmUp: start"),
        (lambda: eb.schedules.WarmUp(3, delay=-1), "WarmUp: delay"),
        (lambda: eb.schedules.Cosine(0), "Cosine: steps"),
        (lambda: eb.schedules.Cosine(3, start=-0.1), "Cosine: start"),
        (lambda: eb.schedules.Cosine(3, end=-0.1), "Cosine: end"),
        (lambda: eb.schedules.Adaptive(0.0), "Adaptive: target"),
        (lambda: eb.schedules.Adaptive(1.0), "Adaptive: target"),
        (lambda: eb.schedules.Adaptive(0.5, shrink=0.0), "Adaptive: shrink"),
        (lambda: eb.schedules.Adaptive(0.5, shrink=1.0), "Adaptive: shrink"),
        (lambda: eb.schedules.Adaptive(0.5, grow=-0.1), "Adaptive: grow"),
        (lambda: eb.schedules.Adaptive(0.5, every=0), "Adaptive: every"),
        (lambda: eb.schedules.Adaptive(0.5, lowest=-0.1), "Adaptive: lowest"),
        (lambda: eb.schedules.Adaptive(0.5, lowest=0.5, highest=0.4), "Adaptive: highest"),
        (lambda: eb.masking.LossQuantile(0.0), "LossQuantile: quantile"),
        (lambda: eb.masking.LossQuantile(1.1), "LossQuantile: quantile"),
        (lambda: eb.masking.Confidence(0.0), "Confidence: highest"),
        (lambda: eb.masking.Confidence(1.1), "Confidence: highest"),
        (lambda: eb.Bregman(nn.Linear(2, 2), weight=-1), "Bregman: weight"),
        (lambda: eb.Bregman(nn.Linear(2, 2), momentum=-0.1), "Bregman: momentum"),
        (lambda: eb.Bregman(nn.Linear(2, 2), momentum=1.0), "Bregman: momentum"),
    ],
)
def test_parts_of_objectives_check_their_numbers(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_numbers_at_the_border_are_allowed() -> None:
    eb.schedules.Constant(0.0)
    eb.schedules.WarmUp(0, start=0.0, delay=0)
    eb.schedules.Cosine(1, start=0.0, end=0.0)
    eb.schedules.Adaptive(0.5, grow=0.0, every=1, lowest=1.0, highest=1.0)
    eb.masking.LossQuantile(1.0)
    eb.masking.Confidence(1.0)
    eb.Bregman(nn.Linear(2, 2), weight=0.0, momentum=0.0)


@pytest.mark.parametrize("kind", ["joint", "packed", "time first", "no table", "rows"])
def test_agreement_is_asked_only_where_embeddings_are_in_their_place(kind: str) -> None:
    embedding, tokens = nn.Embedding(9, 4), torch.randint(0, 9, (3, 5))
    module = nn.Sequential(embedding) if kind == "no table" else embedding
    options: dict[str, Any] = {"time first": {"samples": 1}, "rows": {"scope": "row"}}.get(kind, {})
    given = {"joint": {"joint": True}, "packed": {"offsets": torch.tensor([0, 5, 10, 15])}}
    if kind == "time first":
        tokens = tokens.T
    if kind == "packed":
        tokens = tokens.flatten()

    def loss() -> Tensor:
        hidden = module(tokens).square().sum(-1)
        return hidden.sum(0) if kind == "time first" else hidden.reshape(3, 5).sum(1)

    policy = eb.masking.NearestAgreement()
    objective = eb.AdversarialObjective(eb.FGM(eps=0.1), eb.Site(module, **options), masking=policy)
    with pytest.raises(ValueError, match="NearestAgreement: needs"):
        objective(loss, **given.get(kind, {}))


@pytest.mark.parametrize("perturbed", [0, 1])
def test_sparse_gradients_are_carried_under_a_factor(perturbed: int) -> None:
    """Of the table that is perturbed, and of one that is not."""
    tables = [nn.Embedding(9, 4, sparse=True) for _ in range(2)]
    tokens = torch.randint(0, 9, (3, 2))

    def loss() -> Tensor:
        return (tables[0](tokens) * tables[1](tokens)).sum((1, 2))

    objective = eb.AdversarialObjective(eb.FGM(eps=0.3), eb.Site(tables[perturbed]))
    found = []
    for factor in (1.0, 3.0):
        for table in tables:
            table.weight.grad = None
        (factor * objective(loss)[0]).backward()
        found.append([table.weight.grad.to_dense() for table in tables])  # type: ignore[union-attr]
    for one, three in zip(*found, strict=True):
        torch.testing.assert_close(3 * one, three)


@pytest.mark.parametrize("form", ["mixed", "adversarial", "apr"])
@pytest.mark.parametrize("masked", [False, True])
def test_the_parts_of_an_objective_make_its_loss(form: str, masked: bool) -> None:
    model = toys.encoder()
    loss_fn = toys.classify(model, *toys.text_batch())
    with torch.no_grad():
        bound = float(loss_fn().losses.median())  # type: ignore[union-attr]
    site = eb.Site(model.embedding, scope="row" if form == "apr" else "output")
    lam = 1.0 if form == "adversarial" else 0.5
    objective = eb.AdversarialObjective(
        eb.FGM(eps=0.3), site, form=form, lam=lam, early_backward=False,
        masking=eb.masking.LossBound(bound) if masked else None,
    )  # fmt: skip
    whole, metrics = objective(loss_fn)
    parts, again = objective.parts(loss_fn)
    torch.testing.assert_close(parts.summed.mean(), whole)
    assert parts.summed.shape == (6,)
    assert parts.lam == lam
    assert (parts.clean is None) == (form == "adversarial")
    assert (parts.kept is None) == (not masked)
    assert again.keys() == metrics.keys()
    with pytest.raises(ValueError, match="form must be one of"):
        eb.AdversarialObjective(eb.FGM(eps=0.3), objective.sites, form="mart").parts(loss_fn)


def test_ragged_batches_have_no_agreement() -> None:
    embedding = nn.Embedding(9, 4)
    parts = [torch.tensor([1, 2, 3]), torch.tensor([4, 5])]
    tokens = torch.nested.nested_tensor(parts, layout=torch.jagged)

    def loss() -> Tensor:
        return torch.stack([one.square().sum() for one in embedding(tokens).unbind()])

    policy = eb.masking.NearestAgreement()
    objective = eb.AdversarialObjective(eb.FGM(eps=0.1), eb.Site(embedding), masking=policy)
    with pytest.raises(ValueError, match="NearestAgreement: needs"):
        objective(loss)
