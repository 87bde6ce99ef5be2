"""`embattle audit` of several runs, what it writes, `--fail-under`, and `embattle report`."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")
pytest.importorskip("pyarrow")
pytest.importorskip("pydantic")
pytest.importorskip("scipy")
pytest.importorskip("transformers")
pytest.importorskip("typer")
pytest.importorskip("yaml")

from embattle.audit.schema import SCHEMA, Metrics, json_schema
from embattle.audit.scores import CLEAN, WORST, read_outcomes
from embattle.audit.statistics import mcnemar, wilson
from embattle.errors import InputError
from embattle.files import sha256
from embattle.jobs import audit as job
from embattle.jobs.bounds import names_of, parse, unmet
from tiny_job import invoke, make_encoder, recipe_of

DOCS = Path(__file__).parents[1] / "docs"
ATTACKS = ["Noise x2", "FGM", "PGD-3 x2"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two audited runs, `a` and `b`, of one table and one division, with another learning rate."""
    folder = tmp_path_factory.mktemp("runs")
    encoder = make_encoder(folder / "encoder")
    for name, rate in (("a", 0.01), ("b", 0.002)):
        train = {"steps": 12, "batch_size": 8, "learning_rate": rate}
        recipe = recipe_of(folder, encoder, train=train, name=name, threat={"eps": 1.5})
        status, text = invoke("train", recipe, "--out", folder / name)
        assert status == 0, text
    status, text = invoke("audit", folder / "a", folder / "b")
    assert status == 0, text
    assert text.count("report: ") == 2
    return folder


def facts_of(run: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((run / "metrics.json").read_text())
    return facts


def test_the_schema_is_written_down() -> None:
    path = DOCS / "metrics.schema.json"
    if os.environ.get("EMBATTLE_WRITE_SCHEMA") == "1":
        path.write_text(json.dumps(json_schema(), indent=1) + "\n")
    assert json.loads(path.read_text()) == json_schema()
    page = (DOCS / "metrics.md").read_text()
    keys = json_schema()["properties"]
    assert [key for key in keys if f"`{key}`" not in page] == []
    assert f"schema is {SCHEMA}" in page


def test_metrics_are_as_the_schema_says(runs: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    facts = facts_of(runs / "a")
    validator = jsonschema.Draft202012Validator(json_schema())
    assert [error.message for error in validator.iter_errors(facts)] == []
    del facts["models"]["hardened"]["worst"]["success_rate"]
    assert not validator.is_valid(facts)


def test_what_metrics_say(runs: Path) -> None:
    facts = facts_of(runs / "a")
    part, right = read_outcomes(runs / "a" / "outcomes.safetensors")
    assert part == facts["fingerprints"]["part"] == facts_of(runs / "b")["fingerprints"]["part"]
    assert facts["fingerprints"]["outcomes"] == sha256(runs / "a" / "outcomes.safetensors")
    assert facts["fingerprint"] != facts_of(runs / "b")["fingerprint"]
    assert facts["command"]
    assert any("160" in line for line in facts["reading"])
    count = facts["examples"]
    for name, model in facts["models"].items():
        rows = {CLEAN: model["clean"], **model["attacks"], WORST: model["worst"]}
        assert list(rows) == list(right[name]) == [CLEAN, *ATTACKS, WORST]
        for row, entry in rows.items():
            good = int(right[name][row].sum())
            assert entry["accuracy"] == pytest.approx(good / count)
            assert entry["intervals"]["accuracy"] == pytest.approx(wilson(good, count))
            assert sum(one["count"] for one in entry["per_class"].values()) == count
            recalled = sum(one["count"] * one["recall"] for one in entry["per_class"].values())
            assert recalled == pytest.approx(good)
            assert 0 <= entry["calibration"]["ece"] <= 1
        fell = torch.stack([~right[name][label] for label in ATTACKS]).any(0)
        assert (right[name][WORST] == ~fell).all()
        assert model["worst"]["accuracy"] <= min(e["accuracy"] for e in model["attacks"].values())
    compared = {
        (one["attack"], one["measure"]): one
        for one in facts["comparisons"]
        if one["models"] == ["standard", "hardened"]
    }
    assert len(compared) == len(facts["comparisons"]) == 5 * 3
    for row in (CLEAN, *ATTACKS, WORST):
        one = compared[row, "accuracy"]
        assert one["p"] == pytest.approx(mcnemar(right["standard"][row], right["hardened"][row]))
        assert one["correction"] == "Holm, of 5"


def test_some_models_of_a_run(runs: Path, tmp_path: Path) -> None:
    run = shutil.copytree(runs / "b", tmp_path / "b")
    status, text = invoke("audit", run / "standard", "--fail-under", "standard:clean_accuracy=0")
    assert status == 0, text
    assert list(facts_of(run)["models"]) == ["standard"]
    assert facts_of(run)["comparisons"] == []
    for wrong in (run / "nobody", tmp_path, run.parent / "b" / "report.html"):
        status, text = invoke("audit", wrong)
        assert status == 2
        assert "not a run folder" in text


def test_a_bound_that_is_not_met_is_status_1(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(runs / "a", tmp_path / "a")
    options = ["--fail-under", "robust_accuracy=1", "--fail-under", "standard:clean_accuracy=0"]
    monkeypatch.setattr(job, "audit", lambda folder, **_: facts_of(folder))
    status, text = invoke("audit", run, *options)
    assert status == 1
    assert [line for line in text.splitlines() if line.startswith("failed")] == [
        f"failed: hardened: robust_accuracy "
        f"{facts_of(run)['models']['hardened']['worst']['accuracy']:.4g} is under 1"
    ]
    assert invoke("audit", run, *options[2:])[0] == 0
    status, text = invoke("audit", run, runs / "b", *options)
    assert status == 1
    assert f"failed: {runs / 'b'}: hardened: " in text

    def never(*_: object, **__: object) -> None:
        raise AssertionError("an audit began")

    monkeypatch.setattr(job, "audit", never)
    for bound, said in (
        ("robust_acuracy=0.6", "did you mean 'robust_accuracy'?"),
        ("robust_accuracy", "write MEASURE=VALUE"),
        ("robust_accuracy=much", "is no number"),
        ("robust_accuracy=nan", "is no number"),
        ("robust_accuracy=60", "is a share, at most 1"),
        ("robust_loss=0.6", "measures no 'robust_loss'"),
        ("nobody:robust_auc=0.6", "no run has a model 'nobody'"),
        (":robust_auc=0.6", "write MEASURE=VALUE"),
        ("certified_balls@0.1=0.6", "certificates need --certify"),
    ):
        status, text = invoke("audit", runs / "a", "--fail-under", bound)
        assert status == 2, bound
        assert said in text


def test_bounds_by_hand() -> None:
    def entry(accuracy: float, auc: float | None) -> dict[str, Any]:
        return {"hit_rate": accuracy, "mae": 0.5, "auc": auc}

    facts = {
        "measures": [["hit_rate", "hit rate"], ["mae", "MAE"], ["auc", "AUC"]],
        "smaller_is_better": ["loss", "mae"],
        "models": {
            name: {
                "clean": entry(0.9, 0.8),
                "worst": entry(worst, None),
                "attacks": {"PGD-3, step 0.5": entry(0.7, 0.6)},
                "columns": {"Swap-1, not age": entry(0.4, 0.6)},
            }
            for name, worst in (("standard", 0.1), ("hardened", 0.5), ("other", 0.6))
        },
    }
    names = names_of(facts["measures"], facts["smaller_is_better"], ["PGD-3, step 0.5"])
    assert set(names) == {
        *(f"{row}_{key}" for row in ("robust", "clean") for key in ("accuracy", "hit_rate", "auc")),
        *(f"PGD-3, step 0.5.{key}" for key in ("accuracy", "hit_rate", "auc")),
    }

    def lines(*texts: str) -> list[str]:
        return unmet(parse(texts), facts)

    assert lines("robust_accuracy=0.5", "clean_auc=0.8") == []
    assert lines("robust_hit_rate=0.55") == ["hardened: robust_hit_rate 0.5 is under 0.55"]
    assert lines("standard:robust_accuracy=0.2") == ["standard: robust_accuracy 0.1 is under 0.2"]
    assert len(lines("PGD-3, step 0.5.auc=0.61")) == 2
    assert len(lines("Swap-1, not age.accuracy=0.41", "Swap-1, not age.auc=0.6")) == 2
    assert lines("other:robust_auc=0") == ["other: robust_auc is not defined, and must be 0"]
    facts["models"]["other"]["certificates"] = [
        {"kind": "balls", "eps": [0.0, 0.1, 0.3], "certified": [0.9, 0.5, 0.2]}
    ]
    assert lines("other:certified_balls@0.1=0.5") == []
    # Of what is not listed the next larger radius tells.
    assert lines("other:certified_balls@0.2=0.3") == ["other: certified_balls@0.2 0.2 is under 0.3"]
    for name in ("certified_balls@0.4", "certified_swaps@1"):
        assert "is not defined" in lines(f"other:{name}=0")[0]
    with pytest.raises(InputError, match="is no number"):
        lines("certified_balls@far=0")
    # An ensemble is none of the models.
    facts["certificates"] = [{"kind": "fakes", "eps": [0.0, 5.0], "certified": [0.2, 0.1]}]
    assert lines("certified_fakes@3=0.1") == []
    assert lines("certified_fakes@1=0.3") == ["ensemble of MF: certified_fakes@1 0.1 is under 0.3"]
    facts["models"] = {"standard": facts["models"]["standard"]}
    assert len(lines("robust_accuracy=0.2")) == 1
    with pytest.raises(InputError, match="measures no 'robust_f1'"):
        lines("robust_f1=0.1")


def test_runs_are_compared(runs: Path, tmp_path: Path) -> None:
    page, figures = tmp_path / "page.html", tmp_path / "figures.json"
    status, text = invoke("report", runs / "a", runs / "b", "--out", page)
    assert status == 0, text
    assert invoke("report", runs / "a", runs / "b", "--out", figures)[0] == 0
    found = json.loads(figures.read_text())
    names = [f"{run}/{model}" for run in "ab" for model in ("standard", "hardened")]
    assert [f"{row['run']}/{row['model']}" for row in found["rows"]] == names
    facts = facts_of(runs / "b")
    assert found["rows"][3]["worst"] == facts["models"]["hardened"]["worst"]
    for name in names:
        assert name in text
        assert name in page.read_text()
    # Six pairs of models, without attack and under the worst.
    assert len(found["comparisons"]) == 12
    (one,) = (
        one
        for one in found["comparisons"]
        if one["models"] == ["a/standard", "b/hardened"] and one["attack"] == WORST
    )
    pair = [read_outcomes(runs / run / "outcomes.safetensors")[1] for run in "ab"]
    first, second = pair[0]["standard"][WORST], pair[1]["hardened"][WORST]
    assert one["p"] == pytest.approx(mcnemar(first, second))
    assert one["difference"] == pytest.approx(float(second.sum() - first.sum()) / len(first))
    assert one["correction"] == "Holm, of 12"
    status, text = invoke("report", runs / "a", runs / "b", "--out", page)
    assert status == 2
    assert "--overwrite" in text


def test_other_samples_and_attackers_are_not_tested_against_each_other(
    runs: Path, tmp_path: Path
) -> None:
    a, b = (shutil.copytree(runs / name, tmp_path / name) for name in "ab")

    def change(run: Path, **changes: Any) -> None:
        (run / "metrics.json").write_text(json.dumps({**facts_of(run), **changes}))

    change(b, threat={**facts_of(b)["threat"], "eps": 9.0})
    status, text = invoke("report", a, b)
    assert status == 0, text
    assert "b/hardened against a/hardened, no attack" in text
    assert "b/hardened against a/hardened, worst" not in text
    assert "attackers may do other things" in text
    (b / "outcomes.safetensors").unlink()
    status, text = invoke("report", a, b)
    assert status == 0, text
    assert "b/hardened against" not in text
    assert "b: outcomes.safetensors is not of this audit" in text


def test_what_is_no_audit_is_refused(runs: Path, tmp_path: Path) -> None:
    run = shutil.copytree(runs / "a", tmp_path / "a")
    facts = facts_of(run)
    for content, said in (
        (json.dumps({**facts, "schema": SCHEMA + 1}), "is not an audit of this version (schema"),
        (json.dumps({"recipe": {}, "results": {}}), "is not an audit of this version"),
        ("{", "cannot be read"),
        (None, "has not been audited"),
    ):
        if content is None:
            (run / "metrics.json").unlink()
        else:
            (run / "metrics.json").write_text(content)
        status, text = invoke("report", run)
        assert status == 2, text
        assert said in text
        assert "embattle audit" in text
    assert "is not a run" in invoke("report", tmp_path)[1]
    assert "named twice" in invoke("report", runs / "a", runs / "a")[1]
    assert ".html or .json" in invoke("report", runs / "a", "--out", tmp_path / "x.pdf")[1]
    Metrics.model_validate(facts)
    assert math.isfinite(facts["audit_seconds"])
