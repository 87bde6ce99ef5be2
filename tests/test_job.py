"""The main job from end to end: real code, a small randomly initialised model, made-up reviews."""

from __future__ import annotations

import csv
import json
import signal
from pathlib import Path

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")
pytest.importorskip("pyarrow")
pytest.importorskip("pydantic")
pytest.importorskip("torchmetrics")
pytest.importorskip("transformers")
pytest.importorskip("typer")
pytest.importorskip("yaml")

import yaml
from embattle import train as training
from embattle.cli import app
from safetensors.torch import load_file
from typer.testing import CliRunner

GOOD = ["love", "great", "perfect", "soft", "flattering"]
BAD = ["hate", "poor", "itchy", "returned", "cheap"]
PLAIN = ["the", "dress", "fits", "and", "colour", "is", "shirt", "a", "size", "fabric"]


def invoke(*words: object) -> tuple[int, str]:
    """The status and everything printed."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A one-layer BERT with random weights and a word-level tokenizer, as a local folder."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    folder = tmp_path_factory.mktemp("encoder")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *GOOD, *BAD, *PLAIN]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=32,
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    transformers.BertModel(config).save_pretrained(folder, safe_serialization=True)
    return folder


def write_reviews(path: Path, count: int = 160, *, label: str | None = None) -> None:
    """Reviews whose words give their label away."""
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "recommended"])
        for i in range(count):
            mood = GOOD if i % 2 else BAD
            words = [PLAIN[i % 10], mood[i % 5], PLAIN[(3 * i + 1) % 10], mood[(i // 5) % 5]]
            rows.writerow([" ".join([*words, PLAIN[(i // 7) % 10]]), label or i % 2])


def recipe_of(folder: Path, encoder: Path, **changes: object) -> Path:
    """A recipe for a run of a few seconds."""
    if not (folder / "reviews.csv").exists():
        write_reviews(folder / "reviews.csv")
    recipe = {
        "name": "tiny",
        "seed": 3,
        "data": {
            "path": str(folder / "reviews.csv"),
            "text": ["text"],
            "label": "recommended",
            "fractions": [0.6, 0.2, 0.2],
        },
        "model": {"pretrained": str(encoder), "max_tokens": 12},
        "threat": {"eps": 0.3},
        "train": {"steps": 12, "batch_size": 8, "learning_rate": 0.01},
        "audit": {
            "attacks": [
                {"kind": "noise", "restarts": 2},
                {"kind": "fgm"},
                {"kind": "pgd", "steps": 3, "random_start": True, "restarts": 2},
            ],
            "sweep": [0.5, 1.0, 4.0],
            "sweep_attack": {"kind": "pgd", "steps": 2},
        },
        **changes,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def test_the_whole_job(tmp_path: Path, encoder: Path) -> None:
    recipe = recipe_of(tmp_path, encoder)
    out = tmp_path / "run"
    status, text = invoke("train", recipe, "--out", out)
    assert status == 0, text
    status, text = invoke("audit", out)
    assert status == 0, text
    assert str(out) in text.strip().splitlines()[-1]

    metrics = json.loads((out / "metrics.json").read_text())
    assert "standard" in json.dumps(metrics)
    assert (out / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    html = (out / "report.html").read_text()
    assert "<script" not in html
    assert "http://" not in html.replace("http://www.w3.org", "")
    assert "data:image/png;base64," in html or "<svg" in html
    for variant in training.VARIANTS:
        assert (out / variant / "recipe.yaml").is_file()
        assert list((out / variant).glob("*.safetensors"))
        assert not (out / variant / "checkpoint.safetensors").exists()
    assert not [p for p in out.rglob("*") if p.suffix in {".pt", ".bin", ".pkl", ".tmp"}]


def test_resuming_gives_the_uninterrupted_run(
    tmp_path: Path, encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(tmp_path, encoder)
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
    first, second = training.Run.read(whole), training.Run.read(broken)
    for variant in training.VARIANTS:
        a, b = first.variants[variant]["history"], second.variants[variant]["history"]
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
    tmp_path: Path, encoder: Path, case: str, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
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
