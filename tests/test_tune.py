"""Tuning: what is proposed, what is kept, and that a study goes on where it stopped."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("optuna")
pytest.importorskip("pyarrow")
pytest.importorskip("pydantic")
pytest.importorskip("typer")

from embattle.errors import InputError
from embattle.jobs import fit, tune
from embattle.jobs import recipe as recipes
from embattle.jobs.run_folder import Run
from embattle.jobs.tune_recipe import DimensionRecipe
from test_variants import recipe_of
from tiny_job import invoke

LOOKS = {"every": 3, "attack": {"kind": "pgd", "steps": 2}}
TRAIN = {"steps": 6, "batch_size": 16, "learning_rate": 0.02, "validation": LOOKS}
SPACE = {
    "scale": {"low": 0.1, "high": 4.0, "log": True},
    "attack.steps": {"low": 1, "high": 3},
    "objective": ["mixed", "trades"],
    "masking": [None, {"kind": "norm_bound", "bound": 9}],
}
VARIANTS = {"hardened": {"attack": {"kind": "pgd", "random_start": True}}}


def study_of(folder: Path, train: dict[str, Any] = TRAIN, **options: Any) -> Path:
    """A recipe with a section `tune`."""
    section = {"space": SPACE, "pruner": "none", **options}
    return recipe_of(folder, train=train, variants=VARIANTS, tune=section)


def rows_of(out: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((out / "trials.json").read_text())
    return found


def test_the_best_trial_within_the_bound_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = study_of(tmp_path, at_most_lost={"measure": "accuracy", "points": 5.0})
    fitted, found = fit.Fit.fit, []

    def scripted(self: fit.Fit) -> Any:
        """Each trial is more robust than the one before, and loses two points more."""
        trained = fitted(self)
        if self.variant == "hardened":
            found.append(recipes.Recipe.model_dump(self.recipe)["variants"]["hardened"])
        look = trained.chosen_look | {
            "accuracy": 0.9 - 0.02 * len(found),
            "robust_accuracy": 0.5 + 0.1 * len(found),
        }
        return trained.model_copy(update={"looks": [look], "chosen": None})

    monkeypatch.setattr(fit.Fit, "fit", scripted)
    out = tmp_path / "study"
    status, text = invoke("tune", recipe, "--trials", 4, "--out", out)
    assert status == 0, text
    rows = rows_of(out)
    assert [round(row["points_lost"]) for row in rows] == [2, 4, 6, 8]
    assert [row["kept"] for row in rows] == [True, True, False, False]
    best = recipes.load(out / "best.yaml").variants["hardened"]
    assert best.model_dump() == found[1]
    assert best.scale == rows[1]["values"]["scale"]
    assert best.objective == rows[1]["values"]["objective"]
    assert "2 best" in text
    assert "8.0 too many" in text
    assert text.splitlines()[-1].endswith("best.yaml")
    # The standard model was trained once; trials leave nothing.
    assert list(Run.read(out).variants) == ["standard"]
    assert not (out / "trial").exists()

    status, text = invoke("tune", recipe, "--trials", 4, "--out", out)
    assert status == 2
    assert "use --resume" in text


def test_a_bound_that_no_trial_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = study_of(tmp_path, at_most_lost={"measure": "auc", "points": 0})
    monkeypatch.setattr(tune._Study, "_lost", lambda self, look: 0.1)
    status, text = invoke("tune", recipe, "--trials", 1, "--out", tmp_path / "study")
    assert status == 2
    assert "no trial keeps tune.at_most_lost (0 points of auc)" in text
    assert not (tmp_path / "study" / "best.yaml").exists()


def test_a_study_goes_on_in_the_middle_of_a_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = study_of(tmp_path)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert invoke("tune", recipe, "--trials", 1, "--out", whole)[0] == 0
    step, made = fit.Fit._step, []

    def interrupted(self: fit.Fit, number: int) -> dict[str, float]:
        if self.variant == "hardened":
            made.append(number)
            if number == 3 and len(made) == 4:
                signal.raise_signal(signal.SIGINT)
        return step(self, number)

    monkeypatch.setattr(fit.Fit, "_step", interrupted)
    status, text = invoke("tune", recipe, "--trials", 1, "--out", broken)
    assert status == 130, text
    assert not (broken / "trials.json").exists()
    status, text = invoke("tune", recipe, "--trials", 1, "--out", broken, "--resume")
    assert status == 0, text
    assert made == [0, 1, 2, 3, 4, 5]
    assert rows_of(broken) == rows_of(whole)
    assert (broken / "best.yaml").read_text() == (whole / "best.yaml").read_text()

    # Another study takes its place, also of one that was stopped in the middle of a trial.
    made.clear()
    assert invoke("tune", recipe, "--trials", 1, "--out", broken, "--overwrite")[0] == 130
    made.extend(range(9))
    assert (broken / "trial").is_dir()
    status, text = invoke("tune", recipe, "--trials", 1, "--out", broken, "--overwrite")
    assert status == 0, text
    assert rows_of(broken) == rows_of(whole)

    # More trials are added to those that are there.
    status, text = invoke("tune", recipe, "--trials", 2, "--out", broken, "--resume")
    assert status == 0, text
    assert len(rows_of(broken)) == 2
    status, text = invoke(
        "tune", recipe, "--trials", 2, "--out", broken, "--resume", "--set", "tune.variant=standard"
    )
    assert status == 2


def test_trials_that_are_behind_are_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruner = pytest.importorskip("optuna").pruners.MedianPruner
    looks = {**LOOKS, "every": 1}
    recipe = study_of(tmp_path, train={**TRAIN, "validation": looks}, pruner="median")
    monkeypatch.setattr(
        pruner, "prune", lambda self, study, trial: trial.number == 1 and trial.last_step >= 2
    )
    step = fit.Fit._step

    def diverging(self: fit.Fit, number: int) -> dict[str, float]:
        if len(scales) == 3:
            raise fit.Diverged("the loss is no longer a number")
        return step(self, number)

    scales: list[float] = []
    suggest = DimensionRecipe.suggest

    def noted(self: DimensionRecipe, trial: Any, key: str) -> Any:
        value = suggest(self, trial, key)
        if key == "scale":
            scales.append(value)
        return value

    monkeypatch.setattr(DimensionRecipe, "suggest", noted)
    monkeypatch.setattr(fit.Fit, "_step", diverging)
    status, text = invoke("tune", recipe, "--trials", 3, "--out", tmp_path / "study")
    assert status == 0, text
    assert [row["state"] for row in rows_of(tmp_path / "study")] == ["complete", "pruned", "pruned"]
    assert "stopped after 2 steps" in text
    assert "1 best" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"space": {"lamm": [1]}}, r"variants\.hardened\.lamm=1: unknown key .*mean 'lam'"),
        ({"space": {"lam": [1, -2]}}, r"variants\.hardened\.lam: .*greater than or equal to 0"),
        ({"space": {"objective": ["mixed", "free"], "lam": [1]}}, "hardened.lam in free"),
        ({"space": {"lam": {"low": 2, "high": 1}}}, "low: 2 is above high: 1"),
        ({"space": {"lam": {"low": 0, "high": 1, "log": True}}}, "must be above 0"),
        ({"space": {"lam": {"low": 1}}}, "give a list of choices, or low and high"),
        ({"space": {"lam": []}}, "give a list of choices, or low and high"),
        ({"space": {}}, r"tune\.space"),
        ({"variant": "standard"}, r"tune\.variant: 'standard'; \(known: hardened\)"),
        ({"variant": "hardend"}, "did you mean 'hardened'"),
        ({"at_most_lost": {"measure": "loss", "points": 1}}, "tune.at_most_lost.measure: 'loss'"),
        ({"at_most_lost": {"measure": "ndcg", "points": 1}}, "known: accuracy, auc"),
    ],
    ids=str,
)
def test_a_bad_section_is_named(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = study_of(tmp_path, **options)
    with pytest.raises(InputError, match=message):
        tune.tune(recipes.load(path), tmp_path / "study", trials=1)


def test_what_tuning_needs_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="tune: the recipe has no such section"):
        tune.tune(recipes.load(recipe_of(tmp_path)), tmp_path / "study", trials=1)
    path = study_of(tmp_path, train={"steps": 2})
    with pytest.raises(InputError, match=r"train\.validation: tuning compares"):
        tune.tune(recipes.load(path), tmp_path / "study", trials=1)


def test_a_changed_recipe_keeps_what_was_said(tmp_path: Path) -> None:
    recipe = recipes.load(study_of(tmp_path))
    assert recipes.changed(recipe, {}) == recipe
    other = recipes.changed(recipe, {"variants.hardened.attack": {"kind": "fgm"}})
    assert other.variants["hardened"].attack.kind == "fgm"
    assert other.variants["standard"] == recipe.variants["standard"]
    assert other.threat == recipe.threat
