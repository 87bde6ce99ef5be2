"""The ensemble: what it finds, what hides from gradients and not from it, what it reports."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator

import embattle as eb
import pytest
import torch
import torch.nn.functional as F
import toys
from embattle.attacks import AttackWarning, EnsembleResult
from torch import Tensor, nn

EPS = {"linf": 0.5, "l2": 1.5, "l1": 3.0}


class Net(nn.Module):
    """What is perturbed, what comes before the layers, the layers, what is made of the logits."""

    def __init__(
        self,
        layers: nn.Module,
        before: Callable[[Tensor], Tensor] = lambda x: x,
        after: Callable[[Tensor], Tensor] = lambda z: z,
    ) -> None:
        super().__init__()
        self.input, self.layers, self.before, self.after = nn.Identity(), layers, before, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.layers(self.before(self.input(x))))


def trained(*middle: nn.Module) -> tuple[nn.Sequential, Tensor, Tensor]:
    """A small classifier of three blobs, and a batch of it."""
    torch.manual_seed(0)
    labels = torch.arange(300) % 3
    x = torch.randn(3, 12)[labels] * 0.7 + torch.randn(300, 12) * 0.6
    layers = nn.Sequential(nn.Linear(12, 24), *middle, nn.ReLU(), nn.Linear(24, 3))
    optimizer = torch.optim.Adam(layers.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(layers(x), labels).backward()
        optimizer.step()
    optimizer.zero_grad()
    return layers.eval(), x[:60], labels[:60]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AttackWarning)
        yield


def attack(
    net: nn.Module, x: Tensor, labels: Tensor, *, leave: bool = True, **options: object
) -> EnsembleResult:
    def loss() -> eb.Evaluation:
        return eb.Evaluation(None, net(x))

    def subset(rows: Tensor) -> Callable[[], eb.Evaluation]:
        return lambda: eb.Evaluation(None, net(x[rows]))

    given = {"eps": 0.5, "norm": "linf", "steps": 10, "queries": 100, "eot": 4} | options
    with eb.Site(net.input, model=net) as site:
        return eb.AutoAttack(**given, generator=torch.Generator().manual_seed(0)).run(
            loss,
            site,
            criterion=eb.Misclassify(labels),
            subset=subset if leave else None,
        )


def standing(result: EnsembleResult) -> int:
    assert result.reached is not None
    return int((~result.reached).sum())


def test_result_is_a_fresh_evaluation_and_names_the_attack() -> None:
    layers, x, labels = trained()
    net = Net(layers)
    sizes: list[int] = []
    net.register_forward_hook(lambda m, a, output: sizes.append(len(output)))
    result = attack(net, x, labels)
    with torch.no_grad():
        outputs = net(x + result.delta)
        clean = net(x).argmax(1) != labels
    assert torch.equal(result.outputs, outputs)
    assert torch.equal(result.reached, outputs.argmax(1) != labels)
    assert torch.all(result.norms[0] <= 0.5)
    assert result.randomised is False
    for by, fell, before in zip(result.fooled_by, result.reached, clean, strict=True):
        assert (by == "clean") == bool(before)
        assert (by is None) == (not fell)
    assert "apgd-ce" in result.fooled_by
    assert min(sizes) < 60  # who fell has left
    assert torch.all(result.steps[clean] == 0)
    assert pickle.loads(pickle.dumps(result)).fooled_by == result.fooled_by
    assert copy.deepcopy(result).fooled_by == result.fooled_by


def test_no_weaker_than_its_parts_and_than_without_subset() -> None:
    layers, x, labels = trained()
    net = Net(layers)
    both = [standing(attack(net, x, labels, leave=leave)) for leave in (True, False)]
    with eb.Site(net.input, model=net) as site:
        pgd = eb.PGD(eps=0.5, norm="linf", steps=40, keep="best").run(
            lambda: eb.Evaluation(None, net(x)),
            site,
            criterion=eb.Misclassify(labels),
        )
    assert 0 < max(both) <= int((~pgd.reached).sum()) < 60
    assert abs(both[0] - both[1]) <= 1


def test_model_and_random_state_are_as_before_and_runs_repeat() -> None:
    layers, x, labels = trained(nn.BatchNorm1d(24), nn.Dropout(0.2))
    net = Net(layers).train()
    state, random = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    one = attack(net, x, labels, queries=20, steps=3)
    assert torch.equal(torch.get_rng_state(), random)
    two = attack(net, x, labels, queries=20, steps=3)
    assert torch.equal(one.delta, two.delta)
    assert all(torch.equal(net.state_dict()[key], value) for key, value in state.items())
    assert net.training
    assert all(p.grad is None for p in net.parameters())


# --- models that hide their gradients ------------------------------------------------------------


HIDDEN: dict[str, dict[str, Callable[[Tensor], Tensor]]] = {
    "saturated": {"after": lambda z: z * 1e4},
    "huge": {"after": lambda z: z * 1e30},
    "probabilities": {"after": lambda z: (4 * z).softmax(1)},
    "rounded": {"before": lambda x: (x * 8).round() / 8},
    "integers": {"before": lambda x: (x * 8).round().long().to(x.dtype) / 8},
    "half gone": {"before": lambda x: torch.where(x > 0, x, (x * 8).round() / 8)},
}


@pytest.mark.parametrize(
    ("kind", "leave"),
    [
        ("saturated", True),
        ("huge", False),
        ("probabilities", True),
        ("rounded", False),
        ("rounded", True),
        ("integers", True),
        ("half gone", False),
    ],
)
def test_hidden_gradients_make_no_model_look_robust(kind: str, leave: bool) -> None:
    layers, x, labels = trained()
    plain = standing(attack(Net(layers), x, labels))
    searched = kind in ("rounded", "integers", "half gone")
    hiding = attack(
        Net(layers, **HIDDEN[kind]), x, labels, leave=leave, queries=500 if searched else 100
    )
    # Rounding by up to 1/16 changes the model itself a little.
    assert standing(hiding) <= plain + (3 if searched else 1)
    assert (int(hiding.zero_gradient) > 40) == (kind in ("rounded", "integers"))


def test_groups_without_gradient_are_warned_of() -> None:
    layers, x, labels = trained()
    with pytest.warns(AttackWarning, match="60 groups had no gradient"):
        attack(Net(layers, **HIDDEN["rounded"]), x, labels, leave=False, steps=2, queries=5)


def test_site_that_the_model_does_not_use_is_refused() -> None:
    layers, x, labels = trained()
    with pytest.raises(RuntimeError, match="do not depend"):
        attack(Net(layers, before=lambda z: z.detach() * 0), x, labels, queries=5)


def test_dropout_hides_nothing_and_counts_for_nothing() -> None:
    layers, x, labels = trained(nn.Dropout(0.3))
    plain = standing(attack(Net(layers), x, labels))
    net = Net(layers).train()
    result = attack(net, x, labels)
    assert result.randomised
    assert standing(result) <= plain + 4
    # What was found holds under other dropout masks too: gradients were means over several.
    with torch.no_grad():
        fresh = torch.stack([net(x + result.delta).argmax(1) != labels for _ in range(20)])
    assert fresh.float().mean(0)[result.reached].mean() > 0.8
    nothing = attack(net, x, labels, eps=0.0, steps=2, queries=5)
    assert not nothing.success.any()


def test_same_random_numbers_need_no_expectation() -> None:
    layers, x, labels = trained(nn.Dropout(0.3))
    net = Net(layers).train()
    passes = []
    net.register_forward_hook(lambda *_: passes.append(1))
    counts = []
    for mode in ("same", "as_is"):
        passes.clear()
        result = attack(net, x, labels, leave=False, mode=mode, steps=2, queries=0, targets=0)
        counts.append(len(passes))
        assert result.randomised == (mode == "as_is")
    # Two attacks of three evaluations; three more draws for each, and a second clean pass.
    assert counts[1] - counts[0] == 2 * 3 * 3 + 1


def test_sampled_negatives_are_averaged_over() -> None:
    model = toys.factors(torch.float32)
    users, items, _ = toys.triplets()

    def loss() -> Tensor:
        negatives = torch.randint(0, 20, users.shape)
        with torch.no_grad():
            table = model.item.weight
        u = model.user(users)
        return F.softplus((u * (table[negatives] - table[items])).sum(-1))

    with eb.Site(model.user) as site:
        result = eb.AutoAttack(eps=0.5, steps=5, queries=20, eot=4).run(loss, site)
        torch.manual_seed(5)
        before = torch.stack([loss() for _ in range(50)]).mean().item()
        with result.applied():
            after = torch.stack([loss() for _ in range(50)]).mean().item()
    assert result.randomised
    assert after > before + 0.5
    assert result.fooled_by == [None] * 9


def test_batch_norm_hides_nothing_and_samples_do_not_leave() -> None:
    layers, x, labels = trained(nn.BatchNorm1d(24))
    apart = attack(Net(layers), x, labels)
    net = Net(layers).train()
    with torch.no_grad():
        transferred = int((net(x + apart.delta).argmax(1) == labels).sum())
    sizes: set[int] = set()
    net.register_forward_hook(lambda m, a, output: sizes.add(len(output)))
    result = attack(net, x, labels)
    assert sizes == {60, 30}  # the whole batch, and the half that was tried
    assert standing(result) <= transferred < 50
    with torch.no_grad():
        assert torch.equal(net(x + result.delta), result.outputs)


# --- other goals, places and norms ---------------------------------------------------------------


def goals(outputs: Tensor) -> dict[str, eb.Criterion]:
    class Lead(eb.Criterion):
        per_sample = ("first",)
        needs_outputs = True

        def __init__(self, first: Tensor) -> None:
            self.first = first

        def objective(self, now: eb.Evaluation, clean: eb.Evaluation | None) -> Tensor:
            return -now.outputs.gather(1, self.first[:, None]).squeeze(1).exp()

        def reached(self, now: eb.Evaluation, clean: eb.Evaluation | None) -> Tensor:
            return now.outputs.argmax(1) != self.first

    first = outputs.argmax(1)
    return {
        "misclassify": eb.Misclassify(first),
        "target": eb.Target((first + 1) % 3),
        "multilabel": eb.MultiLabel(outputs > 0),
        "deviate": eb.Deviate(outputs, by=1.0),
        "promote": eb.Promote((first + 1) % 3, 1),
        "demote": eb.Demote(first, 1),
        "outrank": eb.Outrank(first, 1),
        "diverge": eb.Diverge(),
        "distance": eb.Diverge("squared_distance"),
        "own": Lead(first),
    }


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_every_goal_in_every_norm(norm: str) -> None:
    layers, x, _ = trained()
    net = Net(layers)
    with torch.no_grad():
        outputs = net(x)
    x = x[:20]
    for name, goal in goals(outputs[:20]).items():
        with eb.Site(net.input, model=net) as site:
            result = eb.AutoAttack(eps=EPS[norm], norm=norm, steps=5, queries=30, targets=2).run(
                lambda: eb.Evaluation(None, net(x)),
                site,
                criterion=goal,
                subset=lambda rows: lambda: eb.Evaluation(None, net(x[rows])),
            )
        assert torch.all(result.norms[0] <= EPS[norm] * (1 + 1e-6))
        if name != "distance":
            assert result.success.float().mean() > 0.1, name
        else:
            assert result.success is None
            assert (result.outputs - outputs[:20]).square().mean() > 0.1


def test_binary_logit_and_ignored_labels() -> None:
    layers, x, labels = trained()
    net = Net(layers, after=lambda z: z[:, 0] - z[:, 1:].amax(1))
    labels = (labels == 0).long()
    labels[:10] = -100
    result = attack(net, x, labels)
    assert not result.reached[:10].any()
    assert torch.all(result.delta[:10] == 0)
    assert result.success[10:].float().mean() > 0.2


@pytest.mark.parametrize("group", ["sample", "token"])
def test_masks_tokens_and_sequences(group: str) -> None:
    model = toys.encoder(dtype=torch.float32)
    tokens, _ = toys.text_batch()
    with torch.no_grad():
        labels = model(tokens).argmax(1)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[:, 0] = False
    with eb.Site(model.embedding, group=group, model=model) as site:
        result = eb.AutoAttack(eps=eb.Relative(0.5), steps=5, queries=20).run(
            lambda: eb.Evaluation(None, model(tokens)),
            site,
            criterion=eb.Misclassify(labels),
            mask=mask,
            subset=lambda rows: lambda: eb.Evaluation(None, model(tokens[rows])),
        )
    assert torch.all(result.delta[:, 0] == 0)
    assert torch.all(result.delta[tokens == 0] == 0)
    assert result.success.any()


def test_deltas_that_samples_share() -> None:
    model = toys.factors(torch.float32)
    batch = toys.triplets()
    with eb.Site(model.item, scope="row", model=model) as site:
        result = eb.AutoAttack(eps=0.5, steps=5, queries=20).run(toys.rank(model, batch), site)
        with result.applied(), torch.no_grad():
            assert torch.equal(toys.rank(model, batch)(), result.losses)
    assert result.losses.sum() > result.clean_losses.sum()


def test_results_of_a_removed_site_are_not_applied_in_vain() -> None:
    layers, x, labels = trained()
    net = Net(layers)
    result = attack(net, x, labels, steps=2, queries=2)
    with pytest.raises(RuntimeError, match="was removed"), result.applied():
        net(x)


def test_deltas_alone() -> None:
    layers, x, labels = trained()
    net = Net(layers)
    with eb.Site(net.input) as site:
        result = eb.AutoAttack(eps=0.3, norm="linf", steps=2, queries=2).run(
            lambda: eb.Evaluation(None, net(x)),
            site,
            criterion=eb.Misclassify(labels),
            evaluate=False,
        )
    assert result.delta.abs().amax() > 0
    with pytest.raises(RuntimeError, match="evaluate=False"):
        _ = result.fooled_by


# --- Square by itself ----------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_square_stays_on_the_ball_and_gets_better(norm: str) -> None:
    layers, x, labels = trained()
    net = Net(layers)
    mask = torch.ones(60, dtype=torch.bool)
    mask[3] = False
    values = []
    for steps in (5, 200):
        with eb.Site(net.input, model=net) as site:
            result = eb.Square(
                eps=EPS[norm], norm=norm, steps=steps, generator=torch.Generator().manual_seed(1)
            ).run(
                lambda: eb.Evaluation(None, net(x)),
                site,
                criterion=eb.Misclassify(labels, ascend="margin"),
                mask=mask,
            )
        values.append(eb.losses.margin(result.outputs, labels).mean().item())
    assert values[1] > values[0] + 0.1
    norms = result.norms[0]
    assert norms[3] == 0
    assert torch.all(norms <= EPS[norm] * (1 + 1e-6))
    moved = norms[norms > 0]
    assert torch.allclose(moved, torch.full_like(moved, EPS[norm]), rtol=1e-2)
    assert int(result.zero_gradient) == 0


def test_square_in_a_box_with_early_leaving() -> None:
    layers, x, labels = trained()
    net = Net(layers)
    with eb.Site(net.input, model=net) as site:
        result = eb.Square(
            eps=0.5, norm="linf", steps=50, lower=-1.0, upper=1.0, stop_when_fooled=True
        ).run(
            lambda: eb.Evaluation(None, net(x)),
            site,
            criterion=eb.Misclassify(labels),
            subset=lambda rows: lambda: eb.Evaluation(None, net(x[rows])),
        )
    moved = x + result.delta
    assert torch.all((moved <= x.clamp(min=1.0) + 1e-6) & (moved >= x.clamp(max=-1.0) - 1e-6))
    assert result.success.any()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: eb.AutoAttack(eps=0.1, queries=-1), "queries"),
        (lambda: eb.AutoAttack(eps=0.1, eot=0), "eot"),
        (lambda: eb.AutoAttack(eps=0.1, targets=1.5), "targets"),
        (lambda: eb.AutoAttack(eps=float("inf")), "finite"),
        (lambda: eb.Square(eps=0.1, share=0), "share"),
        (lambda: eb.Square(eps=float("inf")), "finite"),
        (lambda: eb.Square(eps=0.1, random_start=False), "random"),
    ],
)
def test_arguments_are_checked(make: Callable[[], object], match: str) -> None:
    with pytest.raises((TypeError, ValueError), match=match):
        make()
