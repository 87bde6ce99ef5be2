"""`embattle export`: programs and ONNX files give what the model gives, or nothing is left."""

from __future__ import annotations

import importlib.util
import json
import pickle
import resource
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("pyarrow")
pytest.importorskip("pydantic")
pytest.importorskip("transformers")
pytest.importorskip("typer")
pytest.importorskip("yaml")

import deployed
from deployed import NAMES, rows_of, write_csv
from embattle.data.batch import Batch
from embattle.errors import InputError
from embattle.files import UNFINISHED, sha256
from embattle.jobs import export as exporting
from embattle.jobs.export import export
from embattle.jobs.predict import predict
from embattle.jobs.trained import load_trained
from tiny_job import invoke
from torch import Tensor

models = deployed.models

HAS_ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))


def samples(model: Path, name: str, count: int) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs of rows of a file, and the model's outputs."""
    trained = load_trained(model)
    rows = [{k: str(v) for k, v in row.items()} for row in rows_of(name, count)]
    batch = trained.task.encode(trained.model, rows)
    with torch.no_grad():
        outputs = trained.task.evaluate(trained.model, batch).outputs
    assert outputs is not None
    return batch.inputs, outputs


# Inputs of each model, with what may be of any size.
SHAPES: dict[str, Any] = {
    "text_classification": {
        "input_ids": ["batch", "length_1"],
        "attention_mask": ["batch", "length_1"],
    },
    "tabular": {"values": ["batch", 2]},
    "click_through": {"values": ["batch", 1], "dense": ["batch", 1]},
    "item_ranking": {"users": ["batch"], "seen": ["batch", 20]},
    "lightgcn": {"users": ["batch"], "seen": ["batch", 20]},
    "hybrid_ranking": {"users": ["batch"], "seen": ["batch", 20]},
    "news_clicks": {
        "history": ["batch", 3],
        "text_ids": ["batch", "length_1"],
        "text_mask": ["batch", "length_1"],
    },
    "llm_ranking": {
        "input_ids": ["batch", "length_1"],
        "attention_mask": ["batch", "length_1"],
    },
    "next_item": {"sequences": ["batch", "length_1"], "seen": ["batch", 20]},
}


@pytest.mark.parametrize("name", NAMES)
def test_a_program_gives_what_the_model_gives(
    name: str, models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for sizes and lengths that the export has not seen."""
    monkeypatch.setattr(exporting, "_write_onnx", lambda *a: {"left_out": "not in this test"})
    model, out = models(name), tmp_path / "out"
    export(model, out, require=["program"])
    facts = json.loads((out / "export.json").read_text())
    assert {key: x["shape"] for key, x in facts["inputs"].items()} == SHAPES[name]
    assert facts["program"]["max_difference"] < 1e-5
    assert facts["batches_compared"][:4] == [1, 2, 5, 8]
    program = torch.export.load(out / "model.pt2").module()
    for count in (1, 4, 17):
        inputs, outputs = samples(model, name, count)
        with torch.no_grad():
            found = program(inputs)
            assert torch.equal(program(dict(reversed(inputs.items()))), found)
        assert [*found.shape][1:] == facts["outputs"]["shape"][1:]
        torch.testing.assert_close(found, outputs, rtol=1e-4, atol=1e-5)
    # The weights and the rest are the model's, and are one.
    for path in model.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()
    assert facts["files"] == {p.name: sha256(p) for p in out.iterdir() if p.name != "export.json"}


@pytest.mark.parametrize("name", NAMES)
def test_models_are_copied_and_pickled(name: str, models: Callable[[str], Path]) -> None:
    """As for averages of weights, or a process of its own."""
    trained = load_trained(models(name))
    inputs, outputs = samples(models(name), name, 5)
    for copy in (deepcopy(trained.model), pickle.loads(pickle.dumps(trained.model))):
        with torch.no_grad():
            found = trained.task.evaluate(copy, Batch(inputs)).outputs
        torch.testing.assert_close(found, outputs, rtol=0, atol=0)


@pytest.mark.skipif(not HAS_ONNX, reason="onnx, onnxscript and onnxruntime are not all installed")
@pytest.mark.parametrize("name", ["text_classification", "click_through"])
def test_an_onnx_file_gives_what_the_model_gives(
    name: str, models: Callable[[str], Path], tmp_path: Path
) -> None:
    import onnxruntime

    status, text = invoke(
        "export", models(name), "--out", tmp_path / "out", "--require", "program, onnx"
    )
    assert status == 0, text
    assert "onnx: model.onnx, its outputs differ from the model's by" in text
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    for count in (1, 4, 17):
        inputs, outputs = samples(models(name), name, count)
        (found,) = session.run(["outputs"], {key: x.numpy() for key, x in inputs.items()})
        torch.testing.assert_close(torch.from_numpy(found), outputs, rtol=1e-4, atol=1e-5)


def no_program(*arguments: Any) -> tuple[None, dict[str, Any]]:
    return None, {"left_out": "not in this test"}


def test_an_export_predicts_like_the_model(
    models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = write_csv(tmp_path / "rows.csv", rows_of("tabular", 9))
    # Rows of a file serve where the data is not there.
    export(models("tabular"), tmp_path / "out", rows=table)
    for model, out in ((models("tabular"), "a.csv"), (tmp_path / "out", "b.csv")):
        predict(model, table, tmp_path / out)
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    # An export of an export has its own program, or none.
    monkeypatch.setattr(exporting, "_write_program", no_program)
    export(tmp_path / "out", tmp_path / "again", rows=table)
    assert not list((tmp_path / "again").glob("model.[!s]*"))


def test_without_the_data_rows_are_asked_for(
    models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    people = Path(load_trained(models("tabular")).recipe.data.path)  # type: ignore[attr-defined]
    people.rename(people.with_suffix(".gone"))
    try:
        status, text = invoke("export", models("tabular"), "--out", tmp_path / "out")
    finally:
        people.with_suffix(".gone").rename(people)
    assert status == 2
    assert "no samples to compare outputs on" in text
    assert "--rows" in text
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("off", ["values", "shape"])
def test_a_program_that_differs_is_not_left(
    off: str, models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = exporting._Outputs.forward

    def wrong(self: Any, inputs: Any) -> Tensor:
        outputs = forward(self, inputs)
        if not torch.compiler.is_exporting():
            return outputs
        return outputs * 1.01 if off == "values" else outputs[:, None]

    monkeypatch.setattr(exporting._Outputs, "forward", wrong)
    status, text = invoke("export", models("tabular"), "--out", tmp_path / "out")
    assert status == 2
    assert "model.pt2: outputs for 1 samples" in text
    assert "nothing was written" in text
    assert not [*tmp_path.iterdir()]


def test_a_model_that_cannot_be_exported_is_told_of(
    models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = exporting._Outputs.forward

    def by_value(self: Any, inputs: Any) -> Tensor:
        outputs = forward(self, inputs)
        return outputs if outputs.sum() > 0 else outputs.clone()

    monkeypatch.setattr(exporting._Outputs, "forward", by_value)
    words = ("export", models("item_ranking"), "--out", tmp_path / "out")
    for name in ("program", "onnx"):
        status, text = invoke(*words, "--require", name)
        assert status == 2
        assert f"--require {name}: " in text
        assert not [*tmp_path.iterdir()]
    status, text = invoke(*words)
    assert status == 0, text
    assert "program: left out (torch.export: " in text
    assert "onnx: left out (it is made of the program, and there is none)" in text
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "export.json",
        "model.safetensors",
        "recipe.yaml",
        "task.json",
    ]


def test_a_program_that_does_not_take_all_batches_is_left_out(
    models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = exporting._Outputs.forward

    def of_four_or_more(self: Any, inputs: Any) -> Tensor:
        if torch.compiler.is_exporting():
            torch._check(inputs["values"].shape[0] >= 4)
        return forward(self, inputs)

    monkeypatch.setattr(exporting._Outputs, "forward", of_four_or_more)
    status, text = invoke("export", models("tabular"), "--out", tmp_path / "out")
    assert status == 0, text
    assert "program: left out (torch.export: " in text
    assert not list((tmp_path / "out").glob("model.[!s]*"))


@pytest.mark.parametrize("missing", ["onnxscript", "onnxruntime"])
def test_without_a_package_it_says_so(
    missing: str, models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if missing == "onnxruntime" and not HAS_ONNX:
        pytest.skip("onnx and onnxscript are not installed")
    monkeypatch.setitem(sys.modules, missing, None)
    words = ("export", models("tabular"), "--out", tmp_path / "out")
    status, text = invoke(*words, "--require", "onnx")
    assert status == 2
    assert f"{missing} is not installed" in text
    assert not [*tmp_path.iterdir()]
    status, text = invoke(*words)
    assert status == 0, text
    what = "left out" if missing == "onnxscript" else "whose outputs were not compared"
    assert what in text
    assert (tmp_path / "out" / "model.onnx").exists() == (missing == "onnxruntime")


def test_a_full_disk(
    models: Callable[[str], Path], tmp_path: Path, small_disk: Callable[[int], None]
) -> None:
    """The writer of torch's archives would end the process."""
    model = models("tabular")
    sizes = [path.stat().st_size for path in model.iterdir()]
    for room in (max(sizes), 2 * max(sizes)):  # between that of a copy and that of a program
        small_disk(room)
        status, text = invoke("export", model, "--out", tmp_path / "out")
        small_disk(resource.RLIM_INFINITY)
        assert status == 2, text
        assert "--out: cannot write the export: File too large; make room or choose" in text
        assert not list(tmp_path.iterdir())


def test_only_an_export_is_replaced(
    models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "_write_program", no_program)
    out = tmp_path / "out"
    export(models("tabular"), out)
    (out / "of the old one").touch()
    with pytest.raises(InputError, match=r"holds an export; .* --overwrite"):
        export(models("tabular"), out)
    export(models("tabular"), out, overwrite=True)
    assert not (out / "of the old one").exists()
    (out / "export.json").unlink()
    for overwrite in (False, True):
        with pytest.raises(InputError, match="holds other files"):
            export(models("tabular"), out, overwrite=overwrite)
    with pytest.raises(InputError, match="'onnxx' is neither program nor onnx"):
        export(models("tabular"), tmp_path / "new", require=["onnxx"])
    with pytest.raises(InputError, match="is a file; name a folder"):
        export(models("tabular"), out / "recipe.yaml")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(UNFINISHED)]
