"""Looks at the validation part while a variant trains: the weights kept, the end, trackers."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("pyarrow")
pytest.importorskip("pydantic")
pytest.importorskip("transformers")
pytest.importorskip("typer")

from embattle.errors import InputError
from embattle.jobs import fit
from embattle.jobs.run_folder import Run
from embattle.jobs.validation import Validation
from safetensors.torch import load_file
from test_variants import LOOKS, load, recipe_of
from tiny_job import invoke
from torch import Tensor


def scripted(patch: pytest.MonkeyPatch, shares: dict[int, float]) -> dict[int, dict[str, Tensor]]:
    """Has looks find these shares under attack, by step; gives the weights that they looked at."""
    look, seen = Validation.look, {}

    def told(self: Validation, done: int) -> dict[str, float]:
        seen[done] = {name: x.clone() for name, x in self.model.state_dict().items()}
        return {**look(self, done), "robust_accuracy": shares[done]}

    patch.setattr(Validation, "look", told)
    return seen


@pytest.mark.parametrize("stopped", [False, True])
def test_the_best_look_is_kept(
    stopped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = {"steps": 6, "batch_size": 16, "learning_rate": 0.02, "validation": LOOKS}
    recipe = recipe_of(tmp_path, train=train, variants={"a": {}})
    step, stops = fit.Fit._step, [stopped]

    def interrupted(self: fit.Fit, number: int) -> dict[str, float]:
        if self.variant == "a" and number == 4 and stops.pop():
            signal.raise_signal(signal.SIGINT)
        return step(self, number)

    monkeypatch.setattr(fit.Fit, "_step", interrupted)
    seen = scripted(monkeypatch, {2: 0.7, 4: 0.9, 6: 0.8})
    status, text = invoke("train", recipe, "--out", tmp_path / "run")
    best = seen[4]
    if stopped:
        assert status == 130
        stops.append(False)
        status, text = invoke("train", recipe, "--out", tmp_path / "run", "--resume")
    assert status == 0, text
    run = Run.read(tmp_path / "run")
    assert run.variants["a"].chosen == 4
    saved = load_file(tmp_path / "run" / "a" / "model.safetensors")
    assert all((saved[name] == best[name]).all() for name in saved)
    # Nobody hardens the standard one: it is chosen by what it does without an attack.
    plain = run.variants["standard"]
    assert plain.chosen == max(plain.looks, key=lambda x: (x["accuracy"], -x["loss"]))["step"]


@pytest.mark.parametrize("kind", ["noise", "pgd"])
def test_looks_tell_of_a_blind_attack(kind: str, tmp_path: Path) -> None:
    looks = {**LOOKS, "every": 30, "choose": "last"}
    train = {"steps": 60, "batch_size": 16, "learning_rate": 0.02, "validation": looks}
    variants = {"a": {"attack": {"kind": kind}}}
    recipe = recipe_of(tmp_path, train=train, variants=variants, threat={"eps": 2.0})
    status, text = invoke("train", recipe, "--out", tmp_path / "run")
    assert status == 0, text
    assert text.count("catastrophic overfitting: on the held batch") == (kind == "noise")


def test_patience_ends_a_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = {**LOOKS, "every": 1, "patience": 2, "samples": 5}
    train = {"steps": 6, "batch_size": 16, "validation": looks}
    recipe = recipe_of(tmp_path, train=train, variants={"a": {}})
    scripted(monkeypatch, {1: 0.5, 2: 0.6, 3: 0.6, 4: 0.5, 5: 0.9, 6: 0.9})
    monkeypatch.setattr(Validation, "_rank", lambda self, look: (look["robust_accuracy"], 0.0))
    assert invoke("train", recipe, "--out", tmp_path / "run")[0] == 0
    one = Run.read(tmp_path / "run").variants["a"]
    assert (len(one.history), one.chosen) == (4, 2)
    assert [round(look["accuracy"] * 5, 4) % 1 for look in one.looks] == [0.0] * 4


def test_bad_looks_are_named(tmp_path: Path) -> None:
    train = {"validation": {"every": 2, "choose": "last", "patience": 1}}
    with pytest.raises(InputError, match="patience waits for a better look"):
        load(tmp_path, train=train)
    with pytest.raises(InputError, match=r"train\.validation\.attack: kind fgsm"):
        load(tmp_path, train={"validation": {"every": 2, "attack": {"kind": "fgsm"}}})


# --- trackers -------------------------------------------------------------------------------------


def test_figures_go_to_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train = {"steps": 2, "batch_size": 16, "trackers": ["tensorboard"], "validation": LOOKS}
    status, text = invoke("train", recipe_of(tmp_path, train=train), "--out", tmp_path / "run")
    assert status == 0, text
    events = EventAccumulator(str(tmp_path / "run" / "trackers" / "tiny"))
    events.Reload()
    history = Run.read(tmp_path / "run").variants["hardened"].history
    found = events.Scalars("hardened/robust_loss")
    assert [event.step for event in found] == [1, 2]
    assert [event.value for event in found] == pytest.approx([x["robust_loss"] for x in history])
    assert "standard/validation/robust_accuracy" in events.Tags()["scalars"]


def test_a_tracker_that_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    recipe = recipe_of(tmp_path, train={"trackers": ["wandb"]})
    status, text = invoke("train", recipe, "--out", tmp_path / "run")
    assert status == 2
    assert "wandb is not installed" in text
    assert "embattle[trackers]" in text
    assert not (tmp_path / "run").exists()
