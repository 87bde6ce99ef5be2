"""What holds for every attack and objective, on models as awkward as they come.

`EMBATTLE_PROPERTY_CASES` cases are drawn in all (1,000 by default).
"""

from __future__ import annotations

import copy
import os
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest

pytest.importorskip("hypothesis")
import embattle as eb
import hostile
import torch
from embattle import Evaluation
from embattle.perturb.evaluation import call
from hostile import DIM, VOCAB, Case
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

CASES = int(os.environ.get("EMBATTLE_PROPERTY_CASES", "1000"))
HALVES = (torch.bfloat16, torch.float16)
BETWEEN = ("none", "dropout", "batch_norm", "in_batch", "spectral")


def share(of: float) -> settings:
    """Settings of a test that has this share of all cases."""
    return settings(
        max_examples=max(1, round(of * CASES)),
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


# --- evaluations of our own -----------------------------------------------------------------------


@contextmanager
def as_before(case: Case, random: Tensor, mode: str) -> Iterator[None]:
    """Around a pass: the random state of the attack's evaluations, and its mode; all undone."""
    model = case.model
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    flags = [(module, module.training) for module in model.modules()]
    if mode == "eval":
        model.eval()
    torch.set_rng_state(random)
    try:
        with torch.no_grad():
            yield
            for name, value in model.named_buffers():
                value.copy_(buffers[name])
    finally:
        for module, flag in flags:
            module.training = flag


def run(attack: eb.Attack, case: Case, **options: Any) -> eb.AttackResult:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", eb.attacks.AttackWarning)
        return attack.run(case.loss, case.site, criterion=case.criterion, **case.run, **options)


def assert_same(one: Tensor | None, two: Tensor | None) -> None:
    assert (one is None) == (two is None)
    if one is not None and two is not None:
        torch.testing.assert_close(one, two, equal_nan=True, **tolerance(one.dtype))


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    each = {torch.float64: 1e-9, torch.float32: 1e-5}.get(dtype, 0.0)
    return {"rtol": each, "atol": each}


# --- balls ----------------------------------------------------------------------------------------


def grouped(case: Case, values: list[Tensor]) -> list[list[Tensor]]:
    """Cut what the modules gave at each call into groups, one flat tensor each, block by block."""
    blocks = []
    for value in values:
        if case.where == "weight":
            blocks.append(list(value))
        elif case.where == "whole weight":
            blocks.append([value.flatten()])
        elif case.where == "shared":
            blocks.append(list(value))
        elif "offsets" in case.run:
            blocks.append([v.flatten() for v in value.split(case.run["offsets"].diff().tolist())])
        else:
            if case.kind.look == "time":
                value = value.transpose(0, 1)
            if case.kind.look == "choices":
                value = value.reshape(case.kind.batch, -1, *value.shape[1:])
            token = case.group == "token"
            blocks.append(list(value.reshape(-1, value.shape[-1]) if token else value.flatten(1)))
    if case.where == "joint":
        return [[torch.cat(parts) for parts in zip(*blocks, strict=True)]]
    return blocks


def movable(case: Case, calls: list[Tensor]) -> list[Tensor]:
    """Bool, of the shape of what was seen at each call: where it may move."""
    found = []
    for number, value in enumerate(calls):
        may = torch.ones(value.shape[:-1], dtype=torch.bool)
        if case.masks:
            may &= case.masks[number]
        if case.where in ("weight", "whole weight"):
            if case.kind.padding and case.kind.look not in ("bag", "weighted"):
                may[0] = False
        elif case.where == "shared":
            pass
        elif case.kind.padding and case.kind.look in ("plain", "time", "packed", "choices"):
            tied = case.kind.calls == "tied" and number == 1
            if not tied:  # that module has no padding row
                may &= case.tokens[number] != 0
        found.append(may.unsqueeze(-1).expand(value.shape))
    return found


def radii(strength: Any, norm: str, groups: list[Tensor], may: list[Tensor]) -> list[float]:
    """The radius of each group, by the definitions."""
    base = [torch.where(m, g, 0.0).double() for g, m in zip(groups, may, strict=True)]

    def size(vector: Tensor) -> float:
        return float(hostile.norms_of(vector.reshape(1, -1), norm)) if vector.numel() else 0.0

    if isinstance(strength, eb.PerDim):
        return [strength.value / max(1, int(m.sum())) ** 0.5 for m in may]
    if not isinstance(strength, eb.Relative):
        return [float(strength)] * len(groups)
    norms = [size(b) for b in base]
    if strength.to == "group_norm":
        return [strength.value * n for n in norms]
    if strength.to == "token_norm":
        pairs = [
            (size(v), bool(k.any()))
            for b, m in zip(base, may, strict=True)
            for v, k in zip(b.reshape(-1, DIM), m.reshape(-1, DIM), strict=True)
        ]
    else:
        pairs = list(zip(norms, [bool(m.any()) for m in may], strict=True))
    count = sum(k for _, k in pairs)
    mean = sum(n for n, k in pairs if k) / max(count, 1)
    return [strength.value * mean] * len(groups)


def check_ball(case: Case, attack: eb.Attack, result: eb.AttackResult, seen: Any) -> None:
    """Norms are within eps, those reported are true, and what is masked has not moved."""
    clean, moved = seen
    if len(moved) > len(clean) or not clean:
        pytest.fail(f"{len(clean)} calls without and {len(moved)} with perturbations")
    if "row" in case.where:
        check_rows(case, attack, result, seen)
        return
    if case.where in ("weight", "whole weight"):  # every call reads the same
        assert all(torch.equal(one, moved[0]) for one in moved)
        clean, moved = clean[:1], moved[:1]
    may = movable(case, clean)
    for one, two, may_here in zip(clean, moved, may, strict=True):
        assert torch.equal(one[~may_here], two[~may_here]), "a masked or padding place moved"
    exact = case.kind.dtype not in HALVES
    differences = [two.double() - one.double() for one, two in zip(clean, moved, strict=True)]
    blocks = zip(grouped(case, clean), grouped(case, differences), grouped(case, may), strict=True)
    norm = ball_of(attack)
    for number, (base, off, kept) in enumerate(blocks):
        norms = torch.stack(
            [
                hostile.norms_of(o.reshape(1, -1), attack.norm)[0] if o.numel() else o.sum()
                for o in off
            ]
        )
        reported = result.norms[number].double()
        torch.testing.assert_close(reported, norms, rtol=1e-5, atol=1e-6 if exact else 1e-7)
        largest = torch.tensor(radii(attack.eps, attack.norm, base, kept), dtype=torch.float64)
        slack = 1e-9 if case.kind.dtype == torch.float64 else 2e-5
        if exact and norm == attack.norm:
            assert torch.all(norms <= largest * (1 + slack) + slack), (norms, largest)
        check_delta(case, attack, result.deltas[number], base, kept, largest)


def ball_of(attack: eb.Attack) -> str:
    """The norm of the ball that deltas lie in; MSAP's "box" steps in another one."""
    return "linf" if getattr(attack, "projection", "") == "box" else attack.norm


def check_delta(
    case: Case,
    attack: eb.Attack,
    delta: Tensor,
    base: list[Tensor],
    kept: list[Tensor],
    largest: Tensor,
) -> None:
    """The delta itself, which is of float32 or more, is in the ball and in the box."""
    if "offsets" in case.run:
        parts = [d.flatten() for d in delta.split(case.run["offsets"].diff().tolist())]
    elif case.coupled or case.group == "token":
        width = delta.numel() if case.where == "whole weight" else delta.shape[-1]
        parts = list(delta.reshape(-1, width))
    else:
        parts = list(delta.flatten(1))
    slack = 1e-9 if case.kind.dtype == torch.float64 else 2e-5
    for one, at, may, radius in zip(parts, base, kept, largest.tolist(), strict=True):
        if not one.numel():
            continue
        assert not one.isnan().any()
        norm = float(hostile.norms_of(one.reshape(1, -1), ball_of(attack)))
        assert norm <= radius * (1 + slack) + slack
        assert torch.all(one[~may] == 0)
        at, point = at.double(), at.double() + one.double()
        for side, worse in (("lower", torch.minimum), ("upper", torch.maximum)):
            bound = getattr(attack, side)
            if bound is None:
                continue
            bound = torch.as_tensor(bound, dtype=torch.float64)
            bound = bound.expand(DIM).repeat(at.numel() // DIM)
            out = (point - worse(at, bound)) * (1 if side == "upper" else -1)
            assert torch.all(out <= 1e-6 + slack), f"{side}: {out.max()}"


def check_rows(case: Case, attack: eb.Attack, result: eb.AttackResult, seen: Any) -> None:
    """Rows move wherever they are looked up, by the same, unless that place is masked."""
    clean, moved = seen
    table = case.model.table.weight.detach()
    delta = result.delta
    whole = case.where == "all rows"
    masks = case.masks or [torch.ones_like(t, dtype=torch.bool) for t in case.tokens]
    allowed = []
    for number, (tokens, mask) in enumerate(zip(case.tokens, masks, strict=True)):
        tied = case.kind.calls == "tied" and number == 1
        allowed.append(mask if tied or not case.kind.padding else mask & (tokens != 0))
    pairs = list(zip(case.tokens, allowed, strict=True))
    rows = torch.arange(VOCAB) if whole else torch.cat([t[m] for t, m in pairs]).unique()
    assert delta.shape == (len(rows), DIM)
    base = list(table[rows])
    # Of a whole table the padding row stays, unless a tied module looks it up as any other.
    stays = 0 if whole and case.kind.padding and case.kind.calls != "tied" else None
    kept = [torch.full((DIM,), int(row) != stays) for row in rows]
    if len(rows):
        largest = torch.tensor(radii(attack.eps, attack.norm, base, kept), dtype=torch.float64)
        check_delta(case, attack, delta, base, kept, largest)
    if case.kind.look in ("bag", "weighted"):
        return
    place = {int(row): number for number, row in enumerate(rows)}
    for one, two, (tokens, may) in zip(clean, moved, pairs, strict=True):
        assert torch.equal(one[~may], two[~may])
        for row, before, after in zip(tokens[may], one[may], two[may], strict=True):
            off = delta[place[int(row)]]
            if case.kind.dtype in HALVES:
                assert torch.equal(after, before + off.to(before.dtype))
            else:
                torch.testing.assert_close(after - before, off, rtol=1e-5, atol=1e-6)


# --- results --------------------------------------------------------------------------------------


def radius_is_zero(attack: eb.Attack) -> bool:
    eps = attack.eps
    return not isinstance(eps, (eb.Relative, eb.PerDim)) and float(eps) == 0


def check_result(case: Case, attack: eb.Attack, ambient: Any, **options: Any) -> eb.AttackResult:
    """Run an attack, and hold it to all that a result promises."""
    model, goal = case.model, case.criterion or eb.MaximizeLoss()
    hostile.random_gradients(model)
    torch.manual_seed(case.seed + 1)
    before = hostile.state_of(model)
    inside = ambient if ambient is autocast else nullcontext
    with ambient():
        result = run(attack, case, **options)
    drew = (attack.random_start or attack.draws) and attack.generator is None
    torch.set_rng_state(before["random"])
    if drew:
        torch.randint(2**62, ())
    random = torch.get_rng_state()
    after = hostile.state_of(model)
    hostile.assert_same_state(after | {"random": random}, before | {"random": random})

    with inside(), as_before(case, random, attack.mode), hostile.outputs_seen(case) as clean_seen:
        clean = call(case.loss)
    with (
        inside(),
        as_before(case, random, attack.mode),
        hostile.outputs_seen(case) as seen,
        result.applied(),
    ):
        now = call(case.loss)
    hostile.assert_same_state(
        hostile.state_of(model) | {"random": random} | versions(after), after | {"random": random}
    )
    for one, two in ((result.clean_losses, clean.losses), (result.losses, now.losses)):
        assert_same(one, two)
    for one, two in ((result.clean_outputs, clean.outputs), (result.outputs, now.outputs)):
        assert_same(one, two)
    if case.where != "two sites":
        check_ball(case, attack, result, (clean_seen, seen))
    check_numbers(case, result, goal, clean, now)
    if radius_is_zero(attack):
        assert_same(result.losses, result.clean_losses)
        assert result.success is None or not result.success.any()
    with inside():
        check_copies(case, attack, result, random)
    return result


def versions(state: dict[str, Any]) -> dict[str, Any]:
    """Our own passes write the buffers back, which gives them other versions."""
    return {name: value for name, value in state.items() if name.endswith(" version")}


def check_numbers(
    case: Case, result: eb.AttackResult, goal: eb.Criterion, clean: Evaluation, now: Evaluation
) -> None:
    """Predictions, success and accuracies are those of the evaluation."""
    clean = Evaluation(result.clean_losses, result.clean_outputs)
    now = Evaluation(result.losses, result.outputs)
    there, here = goal.reached(clean, clean), goal.reached(now, clean)
    assert (here is None) == (result.reached is None) == (result.success is None)
    if here is not None and there is not None:
        assert torch.equal(result.reached, here)
        assert torch.equal(result.clean_reached, there)
        assert torch.equal(result.success, here & ~there)
    if isinstance(goal, eb.Misclassify):
        wrong, count = 0, 0
        guessed = eb.losses.predict(now.outputs)
        assert torch.equal(result.predictions, guessed)
        for guess, label in zip(guessed.flatten(), goal.labels.flatten(), strict=True):
            if int(label) != -100:
                count += 1
                wrong += int(guess) != int(label)
        if count:
            assert float(result.robust_accuracy) == pytest.approx(1 - wrong / count)
        else:
            assert bool(result.robust_accuracy.isnan())
    elif here is not None and not isinstance(goal, (eb.MultiLabel, eb.Deviate)):
        counted = goal.counted(now)
        count = case.kind.batch if counted is None else int(counted.sum())
        if count:
            reached = here if counted is None else here & counted
            assert float(result.robust_accuracy) == pytest.approx(1 - int(reached.sum()) / count)


def check_copies(case: Case, attack: eb.Attack, result: eb.AttackResult, random: Tensor) -> None:
    """A result can be pickled and copied, and copies are of their own."""
    read = pickle.loads(pickle.dumps(result))
    other = copy.deepcopy(result)
    for one in (read, other):
        for name in ("losses", "outputs", "clean_losses", "success", "steps", "robust_accuracy"):
            assert_same(getattr(one, name), getattr(result, name))
        for mine, its in zip(one.deltas + one.norms, result.deltas + result.norms, strict=True):
            assert torch.equal(mine, its)
            assert not mine.numel() or mine.data_ptr() != its.data_ptr()
    with as_before(case, random, attack.mode):
        assert_same(other.evaluate(case.loss).losses, result.losses)


def autocast() -> Any:
    return torch.autocast("cpu", torch.bfloat16)


AMBIENT = [nullcontext, nullcontext, torch.no_grad, torch.inference_mode, autocast]


@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("place", ["output", "table"])
def test_what_is_reported_was_evaluated(between: str, place: str) -> None:
    """Losses, goals, norms and masks are true; model, gradients and random state are as before."""
    places = hostile.TABLES if place == "table" else hostile.OUTPUTS

    @share(0.05)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        case = data.draw(hostile.cases(hostile.kinds(between), places))
        attack = data.draw(hostile.attacks(case))
        ambient = data.draw(st.sampled_from(AMBIENT))
        if ambient is autocast and case.kind.dtype != torch.float32:
            ambient = nullcontext
        check_result(case, attack, ambient)

    check()


class Broken(Exception):
    """What a loss function raises in the middle of an attack."""


@pytest.mark.parametrize("between", ["dropout", "batch_norm", "spectral"])
def test_a_pass_that_raises_leaves_everything_as_before(between: str) -> None:
    @share(0.02)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        case = data.draw(hostile.cases(hostile.kinds(between)))
        attack = data.draw(hostile.attacks(case))
        left = [data.draw(st.integers(0, 3))]

        def loss() -> Any:
            found = case.loss()
            left[0] -= 1
            if left[0] < 0:
                raise Broken
            return found

        hostile.random_gradients(case.model)
        torch.manual_seed(case.seed)
        before = hostile.state_of(case.model)
        raised = False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", eb.attacks.AttackWarning)
            try:
                attack.run(loss, case.site, criterion=case.criterion, **case.run)
            except Broken:
                raised = True
        assume(raised)
        hostile.assert_same_state(hostile.state_of(case.model), before)
        first = case.site[0] if isinstance(case.site, list) else case.site
        assert not first.busy
        check_result(case, attack, nullcontext)

    check()


# --- more is never less ---------------------------------------------------------------------------


def stronger(case: Case, less: eb.AttackResult, more: eb.AttackResult) -> None:
    """Where samples do not interact each sample is at least as badly off, otherwise the batch."""
    slack = {torch.float64: 1e-8, torch.float32: 1e-3}.get(case.kind.dtype, 5e-2)
    if case.interacting:
        one, two = (hostile.values_of(r, case.criterion) for r in (less, more))
        assert two[0] >= one[0]
        if two[0] == one[0]:
            assert two[1] >= one[1] - slack * (1 + abs(one[1])) or two[1] != two[1]
        return
    goal = case.criterion or eb.MaximizeLoss()
    pairs = []
    for result in (less, more):
        clean = Evaluation(result.clean_losses, result.clean_outputs)
        now = Evaluation(result.losses, result.outputs)
        reached = goal.reached(now, clean)
        value = goal.objective(now, clean).double()
        pairs.append((torch.zeros_like(value) if reached is None else reached.double(), value))
    (goal_one, one), (goal_two, two) = pairs
    assert torch.all(goal_two >= goal_one)
    equal = goal_two == goal_one
    assert torch.all((two >= one - slack * (1 + one.abs()))[equal])


@pytest.mark.parametrize("between", BETWEEN)
def test_more_is_never_weaker(between: str) -> None:
    """More restarts, or more steps of the same size, for `keep="best"`; clean is least."""

    @share(0.05)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        case = data.draw(hostile.cases(hostile.kinds(between)))
        kind = data.draw(st.sampled_from(["PGD", "PGD", "MIFGSM", "APGD", "Uniform"]))
        norm = data.draw(st.sampled_from(["l2", "linf", "l1"]))
        options: dict[str, Any] = {
            "eps": data.draw(hostile.strengths(data.draw(st.sampled_from([0.1, 1.0, 3.0])))),
            "norm": norm,
            "keep": "best",
            "mode": data.draw(st.sampled_from(["as_is", "same", "eval"])),
        }
        steps, restarts = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 2))
        what = data.draw(st.sampled_from(["steps", "restarts"]))
        more = {"steps": steps, "restarts": restarts}
        more[what] += data.draw(st.integers(1, 3))
        if kind == "Uniform":
            make, what = eb.UniformNoise, "restarts"
            more = {"restarts": restarts + 1, "steps": 0}
            steps = 0
        elif kind == "APGD":  # its step sizes depend on the number of steps
            make = eb.APGD
            more = {"restarts": restarts + 1, "steps": steps}
        else:
            make = getattr(eb, kind)
            options["step_size"] = data.draw(st.sampled_from([0.1, 0.5, 2.0]))
        if kind != "Uniform":
            options["random_start"] = True

        def result(**given: int) -> eb.AttackResult:
            torch.manual_seed(case.seed)
            g = torch.Generator().manual_seed(case.seed)
            return run(make(**options, **given, generator=g), case)

        less, stronger_one = result(steps=steps, restarts=restarts), result(**more)
        stronger(case, less, stronger_one)
        none = result(steps=0, restarts=1) if kind == "Uniform" else None
        if none is not None:
            stronger(case, none, stronger_one)
        clean = copy.copy(less)
        clean._now = less._clean
        stronger(case, clean, less)

    check()


# --- samples that leave ---------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["as_is", "eval"])
def test_samples_that_leave(mode: str) -> None:
    """What holds for a whole batch holds where samples leave it as they fall."""

    @share(0.05)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        between = data.draw(st.sampled_from(["none", "dropout", "batch_norm"]))
        between = between if mode == "eval" else "none"
        case = data.draw(hostile.cases(hostile.kinds(between), ("output", "token", "joint")))
        assume(case.kind.look not in ("packed",))
        goal = case.criterion
        assume(goal is not None)
        assume(not (isinstance(goal, eb.Diverge) and goal.divergence == "squared_distance"))
        attack = data.draw(hostile.attacks(case, stop_when_fooled=True, mode=mode))
        result = check_result(case, attack, nullcontext, subset=case.subset)
        for delta in result.deltas:
            assert torch.all(delta[result.clean_reached] == 0)
        assert torch.all(result.steps[result.clean_reached] == 0)
        assert torch.all(result.steps <= attack.steps * attack.restarts)

    check()


# --- objectives -----------------------------------------------------------------------------------

FORMS = ("mixed", "adversarial", "trades", "mart", "alp", "smart", "vat", "r3f", "free", "freeat")


def reference(form: str, case: Case, result: eb.AttackResult, lam: float, random: Tensor) -> Tensor:
    """The form's formula in plain torch, at the deltas of `result`."""
    torch.set_rng_state(random)
    clean = call(case.loss)
    with result.applied():
        now = call(case.loss)
    kl, symmetric = eb.losses.kl, eb.losses.symmetric_kl
    if form == "mixed":
        return clean.losses.mean() + lam * now.losses.mean()
    if form == "adversarial":
        return now.losses.mean()
    if form in ("trades", "vat"):
        p = clean.outputs.detach() if form == "vat" else clean.outputs
        return clean.losses.mean() + lam * kl(p, now.outputs).mean()
    if form in ("smart", "r3f"):
        return clean.losses.mean() + lam * symmetric(clean.outputs, now.outputs).mean()
    assert form == "alp"
    distance = (clean.outputs - now.outputs).square()
    distance = distance.reshape(len(distance), -1).mean(1)
    return (clean.losses.mean() + now.losses.mean()) / 2 + lam * distance.mean()


@pytest.mark.parametrize("form", FORMS)
def test_objectives(form: str) -> None:
    """The loss and its gradients are the formula's; nothing but them is left on the model."""

    @settings(share(0.015), suppress_health_check=list(HealthCheck))
    @given(st.data())
    def check(data: st.DataObject) -> None:
        between = data.draw(st.sampled_from(BETWEEN))
        kinds = hostile.kinds(between, (torch.float64, torch.float32))
        case = data.draw(hostile.cases(kinds))
        torch.manual_seed(case.seed)
        with torch.no_grad():
            evaluation = call(case.loss)
        assume(evaluation.losses is not None and evaluation.outputs is not None)
        assume(any(p.requires_grad for p in case.model.parameters()))
        classes = isinstance(case.criterion, eb.Misclassify)
        if form == "mart":
            assume(classes and bool((case.criterion.labels >= 0).all()))
        eps = data.draw(st.sampled_from([0.0, 0.3, 1.0]))
        start = data.draw(st.booleans()) or form in ("trades", "smart", "vat")
        draws = torch.Generator().manual_seed(case.seed)
        mode = data.draw(st.sampled_from(["as_is", "same"]))
        if between == "dropout" and form not in ("free", "freeat"):
            mode = "same"
        options: dict[str, Any] = {"eps": eps, "generator": draws, "mode": mode}
        if form == "r3f":
            attack: eb.Attack = eb.UniformNoise(**options)
        else:
            steps = data.draw(st.integers(1, 3))
            attack = eb.PGD(steps=steps, random_start=start, step_size=0.2, **options)
        criterion = case.criterion
        if form in ("free", "freeat"):  # they ascend the losses
            criterion = criterion if classes and criterion.ascend == "loss" else None
        elif isinstance(criterion, eb.Diverge) and not attack.random_start:
            criterion = None
        early = data.draw(st.booleans())
        alone = form in ("adversarial", "free", "freeat")  # they weigh nothing
        lam = 1.0 if alone else data.draw(st.sampled_from([0.0, 0.5, 2.0]))
        objective = eb.AdversarialObjective(
            attack, case.site, form=form, lam=lam, early_backward=early
        )
        torch.manual_seed(case.seed + 1)
        before = hostile.state_of(case.model)
        seed_state = draws.get_state()
        buffers = copy.deepcopy(dict(case.model.named_buffers()))
        loss, _ = objective(case.loss, criterion=criterion, **case.run)
        assert torch.isfinite(loss)
        weights = [p for p in case.model.parameters() if p.requires_grad]
        if loss.requires_grad:
            loss.backward()
        grads = [p.grad for p in weights]
        for p in weights:
            p.grad = None
        after = hostile.state_of(case.model)
        moving = {k for k in before if k.split()[0] in buffers or k == "random"}
        hostile.assert_same_state(
            {k: v for k, v in after.items() if k not in moving},
            {k: v for k, v in before.items() if k not in moving},
        )
        if form in ("mart", "free", "freeat") or (between == "dropout" and mode != "same"):
            return
        toward = {
            "trades": eb.Diverge("kl"),
            "vat": eb.Diverge("kl"),
            "smart": eb.Diverge("symmetric_kl"),
        }.get(form, criterion)
        draws.set_state(seed_state)
        with torch.no_grad():
            for name, value in case.model.named_buffers():
                value.copy_(buffers[name])
        torch.set_rng_state(before["random"])
        if between == "dropout" or between == "spectral":
            return  # other random numbers, and other vectors, than a run has
        result = attack.run(case.loss, case.site, criterion=toward, evaluate=False, **case.run)
        expected = reference(form, case, result, lam, before["random"])
        close = {"rtol": 1e-6, "atol": 1e-8} if loss.dtype == torch.float64 else {
            "rtol": 1e-3, "atol": 1e-4,
        }  # fmt: skip
        torch.testing.assert_close(loss.detach(), expected.detach(), **close)
        if not expected.requires_grad:  # what is trained has no part in this loss
            assert all(grad is None for grad in grads)
            return
        wanted = torch.autograd.grad(expected, weights, allow_unused=True)
        for mine, its in zip(grads, wanted, strict=True):
            one = torch.zeros(()) if mine is None else mine
            two = torch.zeros(()) if its is None else its
            if mine is None or its is None:
                assert float(one.abs().sum() + two.abs().sum()) < 1e-9
            else:
                torch.testing.assert_close(one, two, **close)

    check()
