"""The examples run, on few steps."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

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
