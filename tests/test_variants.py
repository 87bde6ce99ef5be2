"""Variants of a job: what goes together, what each trains on, and how it goes on after a stop."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("pyarrow")
pytest.importorskip("pydantic")
pytest.importorskip("transformers")
pytest.importorskip("typer")

import torch
import yaml
from embattle import attacks, objectives
from embattle.data.account import Account
from embattle.errors import InputError
from embattle.jobs import fit
from embattle.jobs import recipe as recipes
from embattle.jobs.attack_recipe import ATTACKS
from embattle.jobs.fit import first_model
from embattle.jobs.loss import rehearse
from embattle.jobs.run_folder import Run
from embattle.jobs.threat import make_attack
from embattle.jobs.train import make_accelerator
from embattle.jobs.variant_recipe import OBJECTIVES
from embattle.objectives.monitor import Monitor
from embattle.tasks.kinds import BinaryClassification
from safetensors.torch import load_file
from test_tabular import write
from tiny_job import invoke

NORMS = {"kind": "norm_bound", "bound": 9}
RANDOM = {"kind": "pgd", "steps": 2, "random_start": True}
#: A variant for each objective, and for each option with a state.
EVERY: dict[str, dict[str, object]] = {
    "clipped": {"objective": "plain", "clipping": {"max_norm": 0.5}},
    "hardened": {
        "attack": {"kind": "pgd", "steps": 2},
        "masking": NORMS,
    },
    "both": {"clipping": {"max_norm": 0.5, "noise_multiplier": 0.1}},
    "only": {"objective": "adversarial", "attack": RANDOM, "awp": {"gamma": 0.01}},
    "adaptive": {"eps_schedule": {"kind": "adaptive", "target": 0.4, "every": 2}},
    "trades": {"objective": "trades", "attack": RANDOM},
    "vat": {"objective": "vat", "attack": {"kind": "vat"}},
    "smart": {"objective": "smart", "attack": {"kind": "smart"}, "bregman": {}},
    "mart": {"objective": "mart", "lam_schedule": {"kind": "cosine"}},
    "alp": {"objective": "alp", "masking": {"kind": "loss_quantile", "quantile": 0.9}},
    "r3f": {"objective": "r3f"},
    "free": {"objective": "free", "attack": RANDOM},
    "freeat": {"objective": "freeat", "replays": 3},
    "staggered": {"objective": "staggered", "clipping": {"max_norm": 5.0}},
    "partial": {"objective": "partial", "choose": "loss", "delay": 0.2, "awp": {}},
    "shorter": {"duration": 0.9, "rate": 2.0, "eps_schedule": {"share": 0.9}},
}


LOOKS = {"every": 2, "attack": {"kind": "pgd", "steps": 2}}


def recipe_of(folder: Path, **changes: object) -> Path:
    """A recipe for a small table, all but the model and the budget as usual."""
    if not (folder / "census.csv").exists():
        write(folder / "census.csv", 200)
    recipe = {
        "name": "tiny",
        "seed": 3,
        "task": "tabular",
        "data": {"path": str(folder / "census.csv"), "label": "income", "missing": ["?"]},
        "model": {"dim": 4, "hidden": [8], "dropout": 0.1},
        "threat": {"eps": 0.5},
        "train": {"steps": 6, "batch_size": 16, "learning_rate": 0.02},
        "audit": {"attacks": [{"kind": "apgd", "steps": 3}], "sweep": [1.0]},
        **changes,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def load(folder: Path, **changes: object) -> recipes.Recipe:
    return recipes.load(recipe_of(folder, **changes))


def test_every_objective_and_attack_has_a_section() -> None:
    assert set(OBJECTIVES) == {"plain", *objectives.FORMS}
    known = {made for made in vars(attacks).values() if isinstance(made, type)}
    batchwise = {made for made in known if issubclass(made, attacks.Attack)} - {attacks.Attack}
    # These are for examining a model, not for training it.
    examining = {attacks.AutoAttack, attacks.FMN, attacks.Square}
    assert batchwise - examining == {section.made for section in ATTACKS.values()}


@pytest.mark.parametrize("kind", ATTACKS)
def test_an_attack_gets_the_threats_ball_and_its_own_options(kind: str) -> None:
    needed = {"gaussian_noise": {"std": 0.5}}.get(kind, {})
    threat = {"norm": "linf" if kind == "fgsm" else "l2", "eps": 0.5, "unit": "absolute"}
    ball = recipes.ThreatRecipe.model_validate(threat)
    made = make_attack(ATTACKS[kind](**needed), ball, torch.Generator(), scale=2.0)
    assert type(made) is ATTACKS[kind].made
    if kind == "neftune":
        assert made.alpha == 5.0
    else:
        assert (made.eps, made.norm) == (1.0, threat["norm"])
    if kind == "gaussian_noise":
        assert made.std == 0.5
    if kind == "pgd":
        assert made.step_size == 1.0


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ({"objective": "trade"}, r"variants.a.objective: 'trade'; did you mean 'trades'"),
        ({"lamm": 1}, "variants.a.lamm in mixed; did you mean 'lam'"),
        ({"objective": "free", "masking": {"kind": "loss_bound", "bound": 1}}, "masking in free"),
        ({"objective": "free", "clipping": {}}, "unknown key variants.a.clipping in free"),
        ({"objective": "trades", "clipping": {}}, "unknown key variants.a.clipping in trades"),
        ({"objective": "plain", "masking": {}}, "unknown key variants.a.masking in plain"),
        ({"objective": "adversarial", "lam": 2}, "unknown key variants.a.lam in adversarial"),
        ({"clipping": {}, "awp": {}}, "clipping and awp exclude each other"),
        ({"objective": "trades", "attack": {"kind": "pgd"}}, "write attack.random_start: true"),
        ({"objective": "r3f", "attack": {"kind": "pgd"}}, "r3f takes noise, not attack pgd"),
        ({"objective": "free", "attack": {"kind": "apgd"}}, "not of apgd: use pgd"),
        ({"objective": "free", "attack": {"mode": "eval"}}, "mode: eval do not go with it"),
        (
            {"objective": "adversarial", "masking": {"kind": "loss_ratio", "ratio": 2}},
            "loss_ratio compares with clean losses",
        ),
        (
            {"objective": "staggered", "masking": {"kind": "loss_ratio", "ratio": 2}},
            "loss_ratio compares with clean losses",
        ),
        ({"objective": "staggered", "attack": {"kind": "apgd"}}, "not of apgd: use pgd"),
        ({"objective": "staggered", "awp": {}}, "unknown key variants.a.awp in staggered"),
        ({"objective": "partial", "share": 0}, "variants.a.share"),
        ({"objective": "partial", "choose": "hardest"}, "variants.a.choose"),
        ({"masking": {"kind": "loss_quantile", "quantile": 2}}, "quantile must lie in"),
        ({"masking": {"kind": "loss_quantil", "quantile": 1}}, "did you mean 'loss_quantile'"),
        ({"masking": {"quantile": 1}}, "variants.a.masking.kind is missing"),
        ({"attack": {"kind": "pdg"}}, "variants.a.attack.kind: 'pdg'; did you mean 'pgd'"),
        ({"attack": {"kind": "noise", "steps": 2}}, "variants.a.attack.steps: Input should be 0"),
        ({"attack": {"kind": "fgsm"}}, "variants.a.attack: kind fgsm steps in the linf norm"),
        ({"lam_schedule": {"kind": "adaptive", "target": 0.5}}, "lam_schedule.kind: 'adaptive'"),
        ({"eps_schedule": {"kind": "adaptive"}}, "variants.a.eps_schedule.target is missing"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_named(
    variant: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        load(tmp_path, variants={"a": variant})


def test_what_does_not_go_with_the_rest_is_named(tmp_path: Path) -> None:
    for changes, message in (
        ({"variants": {"a": {"clipping": {}}}, "train": {"precision": "bf16"}}, "full precision"),
        ({"variants": {"a": {"objective": "free"}}, "train": {"precision": "fp16"}}, "use bf16"),
        (
            {"variants": {"a": {"objective": "freeat"}}, "train": {"accumulate": 2}},
            "cannot have train.accumulate",
        ),
        (
            {"variants": {"a": {"attack": {"kind": "msap"}}}, "threat": {"norm": "linf"}},
            "variants.a.attack: MSAP: steps are of norm 'l2'",
        ),
        ({"variants": {"a/b": {}}}, "cannot be called 'a/b'"),
        ({"variants": {"trackers": {}}}, "cannot be called 'trackers'"),
    ):
        with pytest.raises(InputError, match=message):
            load(tmp_path, **changes)


def test_a_plain_variant_is_always_there_and_first(tmp_path: Path) -> None:
    assert list(load(tmp_path).variants) == ["standard", "hardened"]
    assert list(load(tmp_path, variants={"a": {}, "b": {}}).variants) == ["standard", "a", "b"]
    own = load(tmp_path, variants={"a": {}, "standard": {"objective": "plain", "clipping": {}}})
    assert list(own.variants) == ["standard", "a"]
    assert own.variants["standard"].clipping is not None


def test_what_does_not_fit_the_task_fails_before_the_training(tmp_path: Path) -> None:
    recipe = load(tmp_path, variants={"a": {"objective": "apr"}})
    task = recipe.make_task()
    task.read(Account())
    with pytest.raises(InputError, match=r"variants\.a: form 'apr' perturbs table rows"):
        rehearse(recipe, task, first_model(task))
    status, text = invoke("train", tmp_path / "recipe.yaml", "--out", tmp_path / "run")
    assert status == 2, text
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A recipe with every variant, and its run."""
    folder = tmp_path_factory.mktemp("every")
    recipe = recipe_of(folder, variants=EVERY)
    status, text = invoke("train", recipe, "--out", folder / "run")
    assert status == 0, text
    return recipe, folder / "run"


def test_every_variant_trains_on_something_else(trained: tuple[Path, Path]) -> None:
    run = Run.read(trained[1])
    assert list(run.variants) == ["standard", *EVERY]
    weights = [load_file(trained[1] / name / "model.safetensors") for name in run.variants]
    for i, one in enumerate(weights):
        for other in weights[:i]:
            assert any((one[key] != other[key]).any() for key in one)


def test_duration_and_rate_are_shares_of_the_budgets(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    history = {name: one.history for name, one in Run.read(trained[1]).variants.items()}
    assert {name: len(steps) for name, steps in history.items() if name != "shorter"} == (
        dict.fromkeys(["standard", *(EVERY.keys() - {"shorter"})], 6)
    )
    assert len(history["shorter"]) == 5
    assert history["shorter"][-1]["eps"] == 0.5  # its schedule is over its own steps
    recipe = recipes.load(trained[0])
    task = recipe.make_task()
    task.read(Account())
    one = fit.Fit(recipe, "shorter", task, tmp_path, make_accelerator(recipe, task, tmp_path))
    one.fit()
    assert one.optimizer.param_groups[0]["lr"] == pytest.approx(2 * 0.02 / 5)  # no warm-up
    for change in ("duration=0", "duration=1.1", "rate=0"):
        status, text = invoke("train", trained[0], "--set", f"variants.shorter.{change}")
        assert status == 2
        assert f"variants.shorter.{change.split('=')[0]}" in text


def test_a_training_that_came_to_nothing_is_named(tmp_path: Path) -> None:
    train = {"steps": 60, "batch_size": 16, "learning_rate": 0.02}
    recipe = recipe_of(tmp_path, train=train, variants={"a": {"rate": 1e-6}})
    status, text = invoke("train", recipe, "--out", tmp_path / "run")
    assert status == 0, text
    assert text.count("no better than one answer for all") == 1
    assert "a: on the validation part" in text
    assert "variants.a.rate" in text


def test_few_of_a_rare_class_are_found_by_a_model_that_ranks_them() -> None:
    labels = torch.tensor([0] * 9 + [1])
    ranks = torch.tensor([-3.0] * 9 + [-1.0])  # all are below one half
    kind = BinaryClassification()
    assert not kind.learnt_nothing(ranks, labels)
    assert kind.learnt_nothing(torch.full((10,), -2.2), labels)
    assert kind.learnt_nothing(-ranks, labels)


@pytest.mark.parametrize("name", EVERY)
def test_a_variant_goes_on_where_it_stopped(
    name: str, trained: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipes.load(trained[0])
    step = fit.Fit._step

    def interrupted(self: fit.Fit, number: int) -> dict[str, float]:
        if number == 3:
            signal.raise_signal(signal.SIGINT)
        return step(self, number)

    task = recipe.make_task()
    task.read(Account())
    accelerator = make_accelerator(recipe, task, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(fit.Fit, "_step", interrupted)
        with pytest.raises(fit.Interrupted):
            fit.Fit(recipe, name, task, tmp_path, accelerator).go()
    torch.manual_seed(99)
    again = fit.Fit(recipe, name, task, tmp_path, accelerator).go()
    assert again.history == Run.read(trained[1]).variants[name].history
    mine = load_file(tmp_path / name / "model.safetensors")
    theirs = load_file(trained[1] / name / "model.safetensors")
    assert all((mine[key] == theirs[key]).all() for key in theirs)


def test_three_models_in_the_report(tmp_path: Path) -> None:
    variants = {"mixed": {}, "trades": {"objective": "trades", "attack": RANDOM}}
    recipe = recipe_of(tmp_path, variants=variants)
    assert invoke("train", recipe, "--out", tmp_path / "run")[0] == 0
    status, text = invoke("audit", tmp_path / "run")
    assert status == 0, text
    facts = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert list(facts["models"]) == list(facts["train_seconds"]) == ["standard", "mixed", "trades"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert ">trades against PGD-2</td>" in page
    transfers = [check["name"] for check in facts["checks"] if "transferred" in check["name"]]
    assert len(transfers) == 6
    assert "trades: an attack transferred from mixed is no stronger than its own" in transfers
    for name in facts["models"]:
        assert f"<b>{facts['models'][name]['clean']['accuracy']:.1%}</b>" in page
        assert name in text


def test_accumulation_changes_nothing_but_the_passes(tmp_path: Path) -> None:
    variants = {"hardened": {}, "clipped": {"objective": "plain", "clipping": {"max_norm": 0.1}}}
    model = {"dim": 4, "hidden": [8], "dropout": 0.0}
    threat = {"eps": 0.1, "unit": "absolute"}  # a relative one is of the samples of a pass
    losses = []
    for accumulate in (1, 4):
        train = {"steps": 3, "batch_size": 16, "learning_rate": 0.02, "accumulate": accumulate}
        recipe = recipe_of(tmp_path, variants=variants, train=train, model=model, threat=threat)
        out = tmp_path / str(accumulate)
        status, text = invoke("train", recipe, "--out", out)
        assert status == 0, text
        run = Run.read(out)
        losses.append([step["loss"] for name in variants for step in run.variants[name].history])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    status, text = invoke("train", recipe, "--out", out, "--set", "train.accumulate=3")
    assert status == 2
    assert "train.batch_size: 16 cannot be divided among 3 passes" in text


def test_freeat_stays_on_a_batch(tmp_path: Path) -> None:
    recipe = load(tmp_path, variants={"a": EVERY["freeat"]})
    task = recipe.make_task()
    task.read(Account())
    one = fit.Fit(recipe, "a", task, tmp_path, make_accelerator(recipe, task, tmp_path))
    batches = [one._batches_of(step, one.order.places(step))[0].inputs for step in range(4)]
    same = [all((x[key] == batches[0][key]).all() for key in x) for x in batches]
    assert same == [True, True, True, False]


def test_staggered_replays_make_the_passes_of_plain_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In each step as many passes as samples allow, over as many samples; in every epoch."""
    variants = {
        "staggered": {"objective": "staggered", "visits": 4, "masking": NORMS},
        "partial": {"objective": "partial", "share": 0.25, "eps_schedule": {"kind": "constant"}},
    }
    train = {"steps": 30, "batch_size": 16, "learning_rate": 0.02, "accumulate": 2}
    recipe = load(tmp_path, variants=variants, train=train)
    task = recipe.make_task()
    task.read(Account())
    calls: dict[str, list[int]] = {}
    for name in recipe.variants:
        passes = calls[name] = []
        one = fit.Fit(recipe, name, task, tmp_path, make_accelerator(recipe, task, tmp_path))
        one.bare.register_forward_pre_hook(
            lambda m, a, k, p=passes: p.append(len(next(iter(k.values())))) if m.training else None,
            with_kwargs=True,
        )
        backward = torch.autograd.backward
        monkeypatch.setattr(
            torch.autograd,
            "backward",
            lambda *a, b=backward, p=passes, **k: (p.append(0), b(*a, **k))[1],
        )
        one.fit()
        monkeypatch.setattr(torch.autograd, "backward", backward)
    forward = {name: [size for size in sizes if size] for name, sizes in calls.items()}
    assert set(forward["standard"]) == {8}
    # Groups of two: the first three batches of an epoch lack earlier ones.
    assert forward["staggered"][:4] == [2, 4, 6, 8]
    assert set(forward["staggered"][3:]) == {8}
    assert len(calls["staggered"]) == len(calls["standard"]) == 2 * 60
    assert forward["partial"] == [2, 8] * 60
    assert calls["partial"].count(0) == 60


def test_what_the_monitor_finds_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Monitor, "update", lambda self, metrics: [f"label leakage: {len(metrics)}"])
    train = {"steps": 3, "batch_size": 16}
    recipe = recipe_of(tmp_path, train=train, variants={"a": {}})
    status, text = invoke("train", recipe, "--out", tmp_path / "run")
    assert status == 0, text
    assert text.count("label leakage") == text.count("a, step 1: label leakage: ") == 1


def test_looking_changes_nothing_in_the_training(
    tmp_path: Path, trained: tuple[Path, Path]
) -> None:
    train = {"steps": 6, "batch_size": 16, "learning_rate": 0.02}
    looking = {**train, "validation": {**LOOKS, "choose": "last"}}
    recipe = recipe_of(tmp_path, train=looking)
    recipe.write_text(recipe.read_text().replace(str(tmp_path), str(trained[0].parent)))
    status, text = invoke("train", recipe, "--out", tmp_path / "run")
    assert status == 0, text
    assert "under attack 0." in text
    one = Run.read(tmp_path / "run").variants["standard"]
    assert one.history == Run.read(trained[1]).variants["standard"].history
    assert [look["step"] for look in one.looks] == [2, 4, 6]
    assert one.chosen is None
    assert one.looks[-1]["accuracy"] == one.validation["accuracy"]
    assert one.looks[-1]["robust_loss"] > one.looks[-1]["loss"]
