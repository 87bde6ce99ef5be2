"""The examples run, on few steps."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_attack_a_classifier() -> None:
    accuracy = load("attack_a_classifier").main(steps=100)
    assert accuracy["PGD"] < accuracy["no attack"]
    assert accuracy["PGD"] <= accuracy["FGM"] <= accuracy["UniformNoise"]
    assert accuracy["TokenSwap"] < accuracy["no attack"]


def test_audit_own_model(tmp_path: Path) -> None:
    pytest.importorskip("scipy")
    facts = load("audit_own_model").main(tmp_path / "run", steps=100).facts
    worst = {name: model["worst"]["accuracy"] for name, model in facts["models"].items()}
    assert worst["plain"] < worst["hardened"] < facts["models"]["hardened"]["clean"]["accuracy"]
    (one,) = (
        one
        for one in facts["comparisons"]
        if (one["attack"], one["measure"]) == ("worst", "accuracy")
    )
    assert one["significant"]
    assert (tmp_path / "run" / "report.html").is_file()


def test_train_objectives() -> None:
    module = load("train_objectives")
    found = module.main(steps=60)
    assert set(found) == set(module.OBJECTIVES)
    assert all(clean > 0.6 for clean, _ in found.values())


def test_adversarial_ranking() -> None:
    found = load("adversarial_ranking").main(steps=60)
    for clean, robust in found.values():
        assert clean > 0.75
        assert robust < clean


def test_huggingface_trainer() -> None:
    history = load("huggingface_trainer").main(steps=10)
    assert any("adversarial_loss" in entry for entry in history)


def test_explain_an_attack(tmp_path: Path) -> None:
    shares = load("explain_an_attack").main(tmp_path, steps=60)
    # Words that tell the class carry the attack, although each word may move as far.
    assert max(shares, key=lambda name: shares[name]) in ("good", "bad")
    assert shares["good"] + shares["bad"] > 0.3
    assert {path.name for path in tmp_path.iterdir()} == {"carried.svg", "landscape.svg"}


def test_clipping() -> None:
    found = load("clipping").main(steps=60)
    assert found["per sample"] > 0.8
    assert found["per user"] < 0.5 < 0.8 < found["plain"]
    assert found["per user, adversarial"] < 0.5


def test_lightning_module() -> None:
    metrics = load("lightning_module").main(epochs=2)
    assert metrics["train_adversarial_loss"] > metrics["train_clean_loss"]


def test_guarded_training() -> None:
    module = load("guarded_training")
    found = module.main(steps=60)
    assert set(found) == set(module.POLICIES)
    assert found["no masking"]["masked"] == 0
    assert all(one["true accuracy"] > 0.55 for one in found.values())
    assert 0.1 < found["loss quantile"]["masked"] < 0.3


def test_a_task_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")
    from tiny_job import invoke

    monkeypatch.chdir(EXAMPLES.parent)
    lines = (EXAMPLES / "own_task.py").read_text().splitlines()
    assert len(lines) <= 60
    recipe, out = EXAMPLES / "own_task.yaml", tmp_path / "run"
    status, text = invoke("train", recipe, "--out", out)
    assert status == 2
    assert "--trust-task" in text
    assert not out.exists()
    status, text = invoke("train", recipe, "--out", out, "--trust-task")
    assert status == 0, text
    status, text = invoke("audit", out)
    assert status == 2
    assert "--trust-task" in text
    status, text = invoke("audit", out, "--trust-task")
    assert status == 0, text
    facts = json.loads((out / "metrics.json").read_text())
    standard, hardened = (facts["models"][name] for name in ("standard", "hardened"))
    assert standard["clean"]["r2"] > 0.9
    assert standard["sweep"]["within"][0] == standard["clean"]["within"] > 0.9
    attacked = [model["attacks"]["PGD-10 x2"]["within"] for model in (standard, hardened)]
    assert attacked[0] < attacked[1] < hardened["clean"]["within"]
    page = (out / "report.html").read_text()
    assert " of 100 predictions close enough under the strongest attack" in page
    assert "around each flat as a whole" in page
