"""Staggered replays: the batches, the passes, and the numbers of a plain loop."""

from __future__ import annotations

import gc
import io
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any

import devices
import embattle as eb
import numpy as np
import pytest
import torch
import toys
from embattle.data.buckets import padding
from embattle.errors import InputError
from embattle.objectives.kept_deltas import KeptDeltas, write_packed
from embattle.objectives.rows import Rows
from embattle.perturb.perturbation import Perturbation
from torch import Tensor, nn
from torch.utils.data import DataLoader

TOKENS, LABELS = toys.text_batch(11, 9, seed=5)


def cut(samples: list[int]) -> tuple[Tensor, Tensor]:
    """A batch, padded to its longest text, so that a sample's padding differs between visits."""
    tokens = TOKENS[samples]
    return tokens[:, : int((tokens != 0).sum(1).max())], LABELS[samples]


def endless(batches: eb.StaggeredBatches) -> Iterator[list[int]]:
    while True:
        yield from batches


# --- the batches ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "size", "visits"), [(11, 6, 3), (12, 6, 2), (3, 8, 4), (5, 2, 1)]
)
def test_each_sample_comes_in_a_row_of_batches(count: int, size: int, visits: int) -> None:
    sampler = eb.StaggeredBatches(count, size, visits, seed=2)
    epochs = [list(sampler), list(sampler)]
    assert count < 4 or epochs[0] != epochs[1]
    assert epochs[1] == eb.StaggeredBatches(count, size, visits, seed=2).batches(1)
    for batches in epochs:
        assert len(batches) == len(sampler)
        met: dict[int, list[tuple[int, int]]] = {}
        for position, batch in enumerate(batches):
            numbers = sampler.visit_numbers(position)
            assert len(batch) == len(set(batch)) == len(numbers) <= size
            if visits - 1 <= position < count // (size // visits):
                assert Counter(numbers) == dict.fromkeys(range(1, visits + 1), size // visits)
            for sample, number in zip(batch, numbers, strict=True):
                met.setdefault(sample, []).append((position, number))
        assert sorted(met) == list(range(count))
        for places in met.values():
            first = places[0][0]
            assert places == [(first + i, i + 1) for i in range(visits)]


def test_the_batches_resume_and_feed_a_loader() -> None:
    whole = list(islice(endless(eb.StaggeredBatches(11, 6, 3, seed=1)), 14))
    sampler = eb.StaggeredBatches(11, 6, 3, seed=1)
    begun = list(islice(sampler, 4))
    other = eb.StaggeredBatches(11, 6, 3, seed=1)
    other.load_state_dict(sampler.state_dict())
    assert begun + list(islice(endless(other), 10)) == whole
    loader = DataLoader(range(11), batch_sampler=eb.StaggeredBatches(11, 6, 3, seed=1))  # type: ignore[arg-type]
    assert [batch.tolist() for batch in loader] == whole[: len(loader)]
    with pytest.raises(InputError, match="batch_size=8 must be a multiple of visits=3"):
        eb.StaggeredBatches(11, 8, 3)


# --- the numbers ---------------------------------------------------------------------------------


def plain_loop(
    model: toys.Encoder, batches: list[list[int]], visits: int, norm: str, eps: float, size: float
) -> dict[int, Tensor]:
    """The method as one would write it: deltas in a dict, one `backward()` for each batch."""
    optimizer = torch.optim.SGD(model.parameters(), 0.2)
    kept: dict[int, Tensor] = {}
    seen: Counter[int] = Counter()
    for samples in batches:
        tokens, labels = cut(samples)
        delta = torch.zeros(*tokens.shape, 8, dtype=torch.float64)
        for row, sample in enumerate(samples):
            if sample in kept:
                delta[row, tokens[row] != 0] = kept[sample]
        delta.requires_grad_()
        hook = model.embedding.register_forward_hook(lambda m, a, out, d=delta: out + d)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens), labels).backward()
        hook.remove()
        optimizer.step()
        kept, before = {}, kept
        for row, sample in enumerate(samples):
            seen[sample] += 1
            if seen[sample] % visits == 0:
                continue
            grad, own = delta.grad[row, tokens[row] != 0], before.get(sample, 0.0)  # type: ignore[index]
            if norm == "linf":
                kept[sample] = (own + size * grad.sign()).clamp(-eps, eps)
            else:
                moved = own + size * grad / grad.norm()
                kept[sample] = moved * (eps / moved.norm()).clamp(max=1)
    return kept


def train(
    model: nn.Module, objective: eb.AdversarialObjective, batches: list[list[int]]
) -> list[dict[str, Tensor]]:
    optimizer = torch.optim.SGD(model.parameters(), 0.2)
    found = []
    for samples in batches:
        tokens, labels = cut(samples)
        optimizer.zero_grad()
        loss, metrics = objective(
            toys.classify(model, tokens, labels),
            samples=samples,
            mask=tokens != 0,
            criterion=eb.Misclassify(labels),
        )
        loss.backward()
        optimizer.step()
        found.append(metrics)
    return found


def staggered(model: toys.Encoder, norm: str, visits: int, **more: Any) -> eb.AdversarialObjective:
    attack = eb.PGD(norm=norm, eps=0.4, step_size=0.3)  # type: ignore[arg-type]
    form = eb.StaggeredReplays(visits)
    return eb.AdversarialObjective(attack, eb.Site(model.embedding), form=form, **more)


def deltas(objective: eb.AdversarialObjective) -> dict[int, Tensor]:
    state = objective.state_dict()["form"]
    parts = state["0.rows"].split(state["0.lengths"].tolist()) if "0.rows" in state else ()
    return dict(zip(state["samples"].tolist(), parts, strict=True))


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize(("visits", "steps"), [(2, 4), (3, 6), (3, 13)])
def test_the_numbers_are_those_of_a_plain_loop(norm: str, visits: int, steps: int) -> None:
    batches = list(islice(endless(eb.StaggeredBatches(11, 6, visits, seed=1)), steps))
    plain, model = toys.encoder(), toys.encoder()
    expected = plain_loop(plain, batches, visits, norm, 0.4, 0.3)
    objective = staggered(model, norm, visits)
    metrics = train(model, objective, batches)
    got = deltas(objective)
    assert got.keys() == expected.keys()
    assert expected
    for sample, delta in expected.items():
        assert len(delta) == (TOKENS[sample] != 0).sum()
        torch.testing.assert_close(got[sample], delta, rtol=0, atol=1e-12)
    for one, two in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-12)
    untouched = toys.encoder()
    assert not torch.allclose(model.head.weight, untouched.head.weight, atol=1e-3)
    assert "adversarial_loss" not in metrics[0]
    assert {"clean_loss", "adversarial_loss", "robust_accuracy"} <= metrics[1].keys()
    assert [int(m["replayed"]) for m in metrics[:2]] == [0, 6 // visits]
    assert int(metrics[1]["nonfinite"]) == int(metrics[1]["zero_gradient"]) == 0


def test_a_step_makes_one_pass_forward_and_one_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = toys.encoder()
    objective = staggered(model, "l2", 2)
    calls: Counter[str] = Counter()

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *a, **k: (calls.update([name]), function(*a, **k))[1]

    model.layer.register_forward_pre_hook(lambda *_: calls.update(["forward"]))
    model.embedding.register_forward_pre_hook(lambda *_: calls.update(["look-up"]))
    for name in ("backward", "grad"):
        monkeypatch.setattr(torch.autograd, name, counted(name, getattr(torch.autograd, name)))
    batches = list(eb.StaggeredBatches(11, 4, 2, seed=1))
    train(model, objective, batches)
    steps = len(batches)
    assert calls == {"forward": steps, "look-up": steps, "backward": steps}


def test_a_step_leaves_nothing_to_the_garbage_collector() -> None:
    model = toys.encoder()
    outputs: list[weakref.ref[Tensor]] = []
    # Before the site's own hook: the look-up's output, which the batch holds.
    model.embedding.register_forward_hook(lambda m, a, out: outputs.append(weakref.ref(out)))
    objective = staggered(model, "l2", 2)
    gc.collect()
    gc.disable()
    try:
        train(model, objective, [[0, 1], [1, 0]])
        assert len(outputs) == 2
        assert not any(one() is not None for one in outputs)
    finally:
        gc.enable()


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_a_resumed_run_gives_the_same_bits(norm: str) -> None:
    def schedule(step: int) -> float:
        return 1 / (1 + step)

    batches = list(islice(endless(eb.StaggeredBatches(11, 6, 3, seed=1)), 9))
    whole = toys.encoder()
    train(whole, staggered(whole, norm, 3, eps_schedule=schedule), batches)
    begun = toys.encoder()
    objective = staggered(begun, norm, 3, eps_schedule=schedule)
    train(begun, objective, batches[:4])
    file = io.BytesIO()
    torch.save({"model": begun.state_dict(), "objective": objective.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    resumed = toys.encoder(seed=1)
    resumed.load_state_dict(state["model"])
    objective = staggered(resumed, norm, 3, eps_schedule=schedule)
    objective.load_state_dict(state["objective"])
    train(resumed, objective, batches[4:])
    for one, two in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_smaller_radius_projects_the_deltas_that_are_kept() -> None:
    model = toys.encoder()
    objective = staggered(model, "linf", 2, eps_schedule=lambda step: [1.0, 0.1][step])
    train(model, objective, [[0, 1]])
    assert deltas(objective)[0].abs().max() > 0.29
    seen: list[Tensor] = []
    tokens, labels = cut([1, 0])
    clean = model.embedding(tokens).detach()
    model.embedding.register_forward_hook(lambda m, a, out: seen.append(out.detach()))
    objective(toys.classify(model, tokens, labels), samples=torch.tensor([1, 0]))
    assert 0.039 < (seen[0] - clean).abs().max() <= 0.04 + 1e-12


def test_deltas_of_packed_rows_find_their_samples() -> None:
    rows = torch.arange(14.0).reshape(7, 2)
    mask = torch.tensor([True, True, False, True, True, True, True])
    one = Perturbation(rows, [(0, 0)], offsets=torch.tensor([0, 3, 4, 7]), mask=mask)
    one.set(rows)
    ends = Rows(np.array([0, 2]))
    kept = KeptDeltas.take(one, ends)
    assert torch.equal(kept.state()["rows"], rows[[0, 1, 4, 5, 6]])
    assert kept.state()["lengths"].tolist() == [2, 3]
    two = Perturbation(torch.zeros(6, 2), [(0, 0)], offsets=torch.tensor([0, 3, 4, 6]))
    delta, samples = torch.zeros(6, 2), np.array([7, 8, 9])
    turned = kept.of(Rows(np.array([1, 0])))
    write_packed(two, ends, delta, turned.fitted(two, ends, samples))
    assert torch.equal(delta, torch.cat([rows[4:7], torch.zeros(1, 2), rows[:2]]))
    if rows.is_cpu:  # a GPU says it late
        with pytest.raises(InputError, match="sample 9 has 2 vectors that may move, and had 3"):
            kept.of(Rows(np.array([1]))).fitted(two, Rows(np.array([2])), samples)


def test_deltas_of_padded_rows_find_their_places() -> None:
    rows = torch.arange(12.0).reshape(2, 3, 2)
    right = torch.tensor([[True, True, False], [True, True, True]])
    one = Perturbation(rows, [(0, 0)], mask=right)
    one.set(rows)
    kept = KeptDeltas.take(one, Rows(range(2)))
    # Padded on the left now, and in another order.
    left = torch.tensor([[False, True, True, True], [False] * 4, [False, False, True, True]])
    two = Perturbation(torch.zeros(3, 4, 2), [(0, 0)], mask=left)
    found = kept.of(Rows(np.array([1, 0]))).fitted(two, Rows(np.array([0, 2])), np.arange(3))
    none = torch.zeros(1, 2)
    assert torch.equal(found[0], torch.cat([none, rows[1]]))
    assert torch.equal(found[1], torch.cat([none, none, rows[0, :2]]))
    same = kept.fitted(one, Rows(range(2)), np.arange(2))
    assert torch.equal(same, rows * right.unsqueeze(-1))
    if rows.is_cpu:  # a GPU says it late
        with pytest.raises(InputError, match="sample 2 has 2 vectors that may move, and had 3"):
            kept.of(Rows(np.array([1]))).fitted(two, Rows(np.array([2])), np.arange(3))
    back = KeptDeltas.of_state(**kept.state())
    assert str(back.state()) == str(kept.state())
    with pytest.raises(InputError, match="width 3, which had 2"):
        kept.fitted(Perturbation(torch.zeros(2, 3, 3), [(0, 0)]), Rows(range(2)), np.arange(2))


@pytest.mark.parametrize("relative", [False, True])
def test_what_is_added_in_place_gives_the_numbers_of_a_sum(
    relative: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hook that may have seen the look-up's output lets all deltas be added to a copy."""
    added: list[int] = []
    add_to = Rows.add_to
    monkeypatch.setattr(
        Rows, "add_to", lambda rows, *args: added.append(len(rows)) or add_to(rows, *args)
    )
    # The samples come in another order at each visit: no run of rows.
    order = [[0, 1, 2], [2, 3, 0, 1], [4, 1, 3, 0, 2], [3, 4]]
    found = []
    for hooked in (False, True):
        model = toys.factors()
        added.clear()
        seen: list[tuple[Tensor, Tensor]] = []
        if hooked:
            model.item.register_forward_hook(
                lambda m, a, out, seen=seen: seen.append((out.detach(), out.detach().clone()))
            )
        sites = [eb.Site(model.user), eb.Site(model.item)]
        eps = eb.Relative(0.3, to="token_norm") if relative else 0.3
        attack = eb.MIFGSM(norm="l2", eps=eps, steps=2) if relative else eb.PGD(eps=eps, steps=2)
        form = eb.StaggeredReplays(3)
        objective = eb.AdversarialObjective(attack, sites, form=form, lam=2.0)
        optimizer = torch.optim.SGD(model.parameters(), 0.5)
        for samples in order:
            batch = [one[samples] for one in toys.triplets()]
            if not hooked:  # the table's rows do not move with the look-up
                rows = model.item.weight[batch[1]].detach().clone()
            loss, _ = objective(toys.rank(model, tuple(batch)), samples=samples)
            if not hooked:
                assert torch.equal(rows, model.item.weight[batch[1]])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append((loss.detach(), form.state_dict()))
        assert bool(seen) == hooked
        # Nine samples come again; users are looked up once, items twice.
        if devices.kind != "pretend":  # whose tensors are a subclass
            assert sum(added) == 9 * (1 if hooked else 3)
        assert all(torch.equal(out, then) for out, then in seen)  # nobody changed it
    half = len(found) // 2
    for (one, mine), (two, theirs) in zip(found[:half], found[half:], strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-12)
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            torch.testing.assert_close(value, theirs[key], rtol=0, atol=1e-12)


def test_several_sites_keep_a_delta_each() -> None:
    model = toys.factors()
    sites = [eb.Site(model.user), eb.Site(model.item)]
    objective = eb.AdversarialObjective(eb.FGM(eps=0.5), sites, form="staggered")
    users, positive, negative = toys.triplets()
    for samples in eb.StaggeredBatches(9, 4, seed=0):
        batch = (users[samples], positive[samples], negative[samples])
        loss, _ = objective(toys.rank(model, batch), samples=samples)
        loss.backward()
        kept = objective.state_dict()["form"]
        assert sum(key.endswith(".rows") for key in kept) in (0, 3)
        for key in kept:
            if key.endswith(".rows"):
                norms = kept[key].norm(dim=1)
                torch.testing.assert_close(norms, torch.full_like(norms, 0.5))
    assert not kept["samples"].numel()


def test_momentum_and_another_goal_than_the_loss() -> None:
    """Three visits by a goal that is not what is trained on: the numbers of a plain loop."""
    batches = list(islice(endless(eb.StaggeredBatches(11, 6, 3, seed=1)), 6))
    plain, model = toys.encoder(), toys.encoder()
    attack = eb.MIFGSM(eps=0.4, steps=2, norm="linf")
    objective = eb.AdversarialObjective(
        attack, eb.Site(model.embedding), form=eb.StaggeredReplays(3)
    )
    optimizers = [torch.optim.SGD(m.parameters(), 0.2) for m in (plain, model)]
    kept: dict[int, tuple[Tensor, Tensor]] = {}
    seen: Counter[int] = Counter()
    for samples in batches:
        tokens, labels = cut(samples)
        delta = torch.zeros(*tokens.shape, 8, dtype=torch.float64)
        for row, sample in enumerate(samples):
            if sample in kept:
                delta[row, tokens[row] != 0] = kept[sample][0]
        delta.requires_grad_()
        hook = plain.embedding.register_forward_hook(lambda m, a, out, d=delta: out + d)
        logits = plain(tokens)
        hook.remove()
        (grad,) = torch.autograd.grad(
            eb.losses.margin(logits, labels).sum(), delta, retain_graph=True
        )
        optimizers[0].zero_grad()
        nn.functional.cross_entropy(logits, labels).backward()
        optimizers[0].step()
        before, kept = kept, {}
        for row, sample in enumerate(samples):
            seen[sample] += 1
            if seen[sample] % 3:
                own, velocity = before.get(sample, (torch.zeros(()), torch.zeros(())))
                mine = grad[row, tokens[row] != 0]
                velocity = velocity + mine / mine.abs().sum()
                kept[sample] = (own + 0.2 * velocity.sign()).clamp(-0.4, 0.4), velocity
        optimizers[1].zero_grad()
        objective(
            toys.classify(model, tokens, labels),
            samples=samples,
            mask=tokens != 0,
            criterion=eb.Misclassify(labels, ascend="margin"),
        )[0].backward()
        optimizers[1].step()
    got = deltas(objective)
    assert got.keys() == kept.keys()
    for sample, (moved, _) in kept.items():
        torch.testing.assert_close(got[sample], moved, rtol=0, atol=1e-12)
    other = eb.StaggeredReplays(3)
    other.load_state_dict(objective.state_dict()["form"])
    assert str(other.state_dict()) == str(objective.state_dict()["form"])


def test_masking_weight_and_clipping() -> None:
    batches = list(eb.StaggeredBatches(11, 4, 2, seed=1))[:2]
    model = toys.encoder()
    objective = staggered(model, "l2", 2, lam=3.0, masking=lambda outcome: outcome.losses < 0)
    train(model, objective, batches[:1])
    tokens, labels = cut(batches[1])
    loss, metrics = objective(
        toys.classify(model, tokens, labels), samples=batches[1], mask=tokens != 0
    )
    clean = toys.classify(model, tokens, labels)().losses
    assert clean is not None
    assert int(metrics["masked"]) == 2
    assert loss.item() == pytest.approx(float(clean[:2].detach().sum() / (2 + 3.0 * 2)))
    # Clipped, the weights' steps are short, and the deltas are those of unclipped gradients.
    found = []
    for bound in (1e-3, 1e9):
        model = toys.encoder()
        objective = staggered(model, "l2", 2)
        clipper = eb.PerSampleClipper(model, max_norm=bound)
        with clipper:
            parts, _ = objective.parts(
                toys.classify(model, tokens, labels), samples=batches[1], mask=tokens != 0
            )
            clipper.backward(parts.summed)
        found.append(deltas(objective))
        total = sum(float(p.grad.square().sum()) for p in model.parameters())  # type: ignore[union-attr]
        assert (total**0.5 <= 1e-3 + 1e-9) == (bound == 1e-3)
    assert len(found[0]) == 4
    for sample, delta in found[0].items():
        torch.testing.assert_close(delta, found[1][sample])
        assert delta.norm() > 0.29


def test_a_model_whose_table_is_not_trained_and_changes_its_embeddings_in_place() -> None:
    class Halved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(9, 4), nn.Linear(4, 2)
            self.table.requires_grad_(False)

        def forward(self, indices: Tensor) -> Tensor:
            found = self.table(indices)
            found.mul_(torch.tensor([1.0, 0.0, 1.0, 1.0]))
            return self.head(found)

    model = Halved()
    objective = eb.AdversarialObjective(eb.FGM(eps=0.5), eb.Site(model.table), form="staggered")
    loss, _ = objective(
        toys.classify(model, torch.tensor([3, 5]), torch.tensor([0, 1])), samples=[0, 1]
    )
    loss.backward()
    for delta in deltas(objective).values():
        assert delta[0, 1] == 0  # the gradient before the change, not after it
        assert delta.norm().item() == pytest.approx(0.5)


def test_a_share_comes_again() -> None:
    batches = eb.StaggeredBatches(12, 6, 2, share=0.5, seed=1)
    assert {len(batch) for batch in list(batches)[1:-1]} == {6}
    for position, batch in enumerate(batches.batches(0)):
        numbers = batches.visit_numbers(position)
        assert len(numbers) == len(batch)
        assert numbers.count(2) == (2 if position else 0)
    counts = Counter(sample for batch in batches.batches(0) for sample in batch)
    assert sorted(counts.values()) == [1] * 6 + [2] * 6
    model = toys.encoder()
    attack = eb.FGM(eps=0.4)
    form = eb.StaggeredReplays(share=0.5)
    objective = eb.AdversarialObjective(attack, eb.Site(model.embedding), form=form)
    some = eb.StaggeredBatches(8, 6, 2, share=0.5, seed=1).batches(0)
    metrics = train(model, objective, some)
    assert [int(m["replayed"]) for m in metrics] == [0, 2, 2]


@pytest.mark.parametrize("share", [0.01, 0.1, 0.25, 0.5, 0.9])
def test_no_batch_is_empty_or_too_large(share: float) -> None:
    for count, size, visits in [(13, 6, 2), (50, 16, 2), (159, 16, 2), (59, 14, 3), (9, 4, 4)]:
        batches = eb.StaggeredBatches(count, size, visits, share=share)
        found = batches.batches(0)
        assert all(1 <= len(batch) <= size for batch in found)
        assert [len(batch) for batch in found] == [
            len(batches.visit_numbers(position)) for position in range(len(batches))
        ]
        assert {sample for batch in found for sample in batch} == set(range(count))
    for form in (eb.StaggeredReplays, partial(eb.StaggeredBatches, 8, 4)):
        with pytest.raises(ValueError, match=r"share must be above 0, got 0"):
            form(2, share=0)
    with pytest.raises(InputError, match="batch_size=2 must be at least visits=3"):
        eb.StaggeredBatches(8, 2, 3, share=share)


@pytest.mark.parametrize("visits", [2, 3])
def test_a_step_is_left_out(visits: int) -> None:
    """Its samples come again as they were: of these batches the second gives no gradient."""
    batches = eb.StaggeredBatches(8, 6, visits, seed=1).batches(0)
    model = toys.encoder()
    objective = staggered(model, "l2", visits)
    for number, samples in enumerate(batches):
        before = deltas(objective)
        tokens, labels = cut(samples)
        loss, _ = objective(toys.classify(model, tokens, labels), samples=samples, mask=tokens != 0)
        if number != 1:
            loss.backward()
        objective.form.skip()  # type: ignore[attr-defined]  # nothing where gradients have come
        after = deltas(objective)
        if number == 1:
            for sample, delta in after.items():
                assert torch.equal(delta, before.get(sample, torch.zeros_like(delta)))
            assert visits == 2 or before.keys() & after.keys()
        else:
            assert all(delta.norm() > 0 for delta in after.values())


@pytest.mark.parametrize("form", ["staggered", "freeat"])
def test_deltas_are_kept_in_the_ball_of_the_attack(form: str) -> None:
    """Which for MSAP's box is no l2 ball."""
    model = toys.encoder()
    attack = eb.MSAP(eps=0.5, projection="box", step_size=2.0, steps=3)
    given = eb.StaggeredReplays(3) if form == "staggered" else form
    objective = eb.AdversarialObjective(attack, eb.Site(model.embedding), form=given)
    seen: list[Tensor] = []
    model.embedding.register_forward_hook(lambda m, a, out: seen.append(out.detach().clone()))
    for _ in range(2):
        call(objective, model).backward()
    delta = seen[-1] - model.embedding.weight.detach()[cut([0, 1, 2])[0]]
    assert delta.abs().amax().item() == pytest.approx(0.5)
    assert delta.flatten(1).norm(dim=1).min() > 0.6


def test_ranks_and_lengths_divide_the_order() -> None:
    lengths = [1 + i % 7 for i in range(40)]
    shares = [
        eb.StaggeredBatches(41, 8, 2, seed=3, rank=rank, ranks=2).batches(1) for rank in range(2)
    ]
    first, second = ({s for batch in share for s in batch} for share in shares)
    assert len(first) == len(second) == 20
    assert not first & second
    assert [len(batch) for batch in shares[0]] == [len(batch) for batch in shares[1]]
    plain = eb.StaggeredBatches(40, 8, 2, seed=3).batches(0)
    similar = eb.StaggeredBatches(40, 8, 2, seed=3, lengths=lengths).batches(0)
    assert padding(lengths, similar) < padding(lengths, plain)
    assert sorted(s for batch in similar for s in batch) == sorted([*range(40)] * 2)


# --- robustness ----------------------------------------------------------------------------------


def test_it_trains_robustly_where_plain_training_does_not() -> None:
    """One feature is right in nine of ten cases; a hundred weak ones are better, and fragile."""
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (3000,), generator=g)
    sign = 2.0 * labels - 1
    right = torch.rand(3000, generator=g) < 0.9
    weak = 0.3 * sign[:, None] + torch.randn(3000, 100, generator=g)
    features = torch.cat([torch.where(right, sign, -sign)[:, None], weak], 1)

    def accuracies(visits: int) -> tuple[float, float]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Identity(), nn.Linear(101, 2))
        site = eb.Site(model[0])
        form = eb.StaggeredReplays(visits)
        objective = eb.AdversarialObjective(eb.FGSM(eps=0.6), site, form=form)
        optimizer = torch.optim.Adam(model.parameters(), 0.003)
        for samples in islice(endless(eb.StaggeredBatches(2000, 60, visits)), 400):
            optimizer.zero_grad()
            loss_fn = toys.classify(model, features[samples], labels[samples])
            objective(loss_fn, samples=samples)[0].backward()
            optimizer.step()
        held = toys.classify(model, features[2000:], labels[2000:])
        result = eb.PGD(norm="linf", eps=0.6, steps=10).run(
            held, site, criterion=eb.Misclassify(labels[2000:])
        )
        return float(result.clean_accuracy), float(result.robust_accuracy)  # type: ignore[arg-type]

    plain, robust = accuracies(1), accuracies(2)
    assert plain[0] > 0.9
    assert plain[1] < 0.1
    assert robust[0] > 0.8
    assert robust[1] > 0.75


# --- what is refused -----------------------------------------------------------------------------


def call(objective: eb.AdversarialObjective, model: nn.Module, **options: Any) -> Tensor:
    tokens, labels = cut([0, 1, 2])
    return objective(toys.classify(model, tokens, labels), **{"samples": [0, 1, 2]} | options)[0]


def test_wrong_samples_are_refused() -> None:
    model = toys.encoder()
    objective = staggered(model, "l2", 2)
    for samples, said in (
        (None, "needs the indices"),
        ([0, 1, 1], "twice"),
        ([0, 1], "2 indices in samples for 3"),
    ):
        with pytest.raises(InputError, match=said):
            call(objective, model, samples=samples)
    with pytest.raises(TypeError, match=r"each of samples must be an integer, got 0\.5"):
        call(objective, model, samples=[0, 0.5, 2])
    loss = call(objective, model)
    with pytest.raises(RuntimeError, match=r"gave no gradient.*backward\(\) once"):
        call(objective, model)
    with pytest.raises(RuntimeError, match="gave no gradient"):
        objective.state_dict()
    loss.backward()
    with pytest.raises(InputError, match="sample 0 awaits another visit"):
        call(objective, model, samples=[3, 4, 5])
    objective.form.reset()  # type: ignore[attr-defined]
    call(objective, model, samples=[3, 4, 5])


@pytest.mark.parametrize(
    ("attack", "options", "said"),
    [
        (eb.APGD(eps=0.1, steps=2), {}, "more than steps along gradients|keep='best'"),
        (eb.FGM(eps=0.1), {"scope": "row"}, "scope 'row'"),
        (eb.FGM(eps=0.1), {"joint": True}, "joint=True"),
    ],
)
def test_what_the_form_cannot_have_is_refused(
    attack: eb.Attack, options: dict[str, Any], said: str
) -> None:
    model = toys.encoder()
    site = eb.Site(model.embedding, scope=options.get("scope", "output"))

    def run() -> None:
        objective = eb.AdversarialObjective(attack, site, form="staggered")
        call(objective, model, joint=options.get("joint", False))

    with pytest.raises(ValueError, match=said):
        run()


def test_options_of_passes_that_are_not_made_are_refused() -> None:
    model = toys.encoder()
    site = eb.Site(model.embedding, model=model)
    for form in ("staggered", eb.StaggeredReplays(3)):
        with pytest.raises(ValueError, match=r"'staggered'.*mode='eval'"):
            eb.AdversarialObjective(eb.FGM(eps=1.0, mode="eval"), site, form=form)
        objective = eb.AdversarialObjective(eb.FGM(eps=1.0), site, form=form)
        with pytest.raises(ValueError, match="'staggered' moves its deltas"):
            eb.AWP(objective, model)
        with torch.no_grad(), pytest.raises(RuntimeError, match="no_grad"):
            call(objective, model)
    with pytest.raises(ValueError, match="visits must be at least 1"):
        eb.StaggeredReplays(0)
