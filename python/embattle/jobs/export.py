"""A model of a run as files for other programs: safetensors, a `torch.export` program, ONNX.

What is written has been read back and run on real samples beside the model, in batches of several
sizes: a file whose outputs differ is never left.
"""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from embattle.data.account import Account, printable
from embattle.data.batch import Batch
from embattle.data.rows import Rows
from embattle.errors import InputError, need, version_of
from embattle.files import patient, replacing_folder, sha256, write_text
from embattle.jobs.run_folder import contents
from embattle.jobs.train import read
from embattle.jobs.trained import TrainedModel, load_trained, model_files
from embattle.progress import say
from embattle.tasks.base import Task

PROGRAM, ONNX, FACTS = "model.pt2", "model.onnx", "export.json"
_WRITTEN = (PROGRAM, ONNX, f"{ONNX}.data", FACTS)
# Sizes of the batches that outputs are compared on; the third is the one that is traced.
SIZES = (1, 2, 5, 8)
_TRACED = 2
# How far an output may be off: of its size, and at least.
RELATIVE, ABSOLUTE = 1e-4, 1e-5
# A file of ONNX holds less than 2 GiB: larger weights are beside it.
_ONNX_MOST = 1 << 30

_NOTHING = "nothing was written"

Inputs = dict[str, Tensor]
Forward = Callable[[Inputs], Tensor]


class Differs(InputError):
    """What was written does not give what the model gives."""


class _Outputs(nn.Module):
    """The outputs of a task's model, as one function of a batch's inputs.

    Args:
        task: runs the model.
        model: a trained one, in evaluation mode.
    """

    def __init__(self, task: Task, model: nn.Module) -> None:
        super().__init__()
        self.task, self.model = task, model

    def forward(self, inputs: Inputs) -> Tensor:
        """Gives the outputs [B, ...]."""
        outputs = self.task.evaluate(self.model, Batch(inputs)).outputs
        if outputs is None:
            raise InputError(f"task {type(self.task).__name__}: evaluate gives no outputs")
        return outputs


@dataclass(frozen=True)
class Samples:
    """Real samples.

    Attributes:
        batches: inputs of `SIZES` samples each.
        outputs: the model's for each.
        varying: of each input, the dims that differ from batch to batch.
    """

    batches: list[Inputs]
    outputs: list[Tensor]
    varying: dict[str, list[int]]

    def furthest(self, name: str, run: Forward) -> float:
        """Gives how far outputs are off at most.

        Raises:
            Differs: further than may be.
            Any exception: `run` does not take a batch.
        """
        furthest = 0.0
        for inputs, wanted in zip(self.batches, self.outputs, strict=True):
            with torch.no_grad():
                found = run(inputs)
            size = len(next(iter(inputs.values())))
            if found.shape != wanted.shape:
                shapes = f"{list(found.shape)}, and not {list(wanted.shape)}"
                raise Differs(f"{name}: outputs for {size} samples are {shapes}; {_NOTHING}")
            off = float((found - wanted).masked_fill(found == wanted, 0).abs().max())
            if not torch.allclose(found, wanted, rtol=RELATIVE, atol=ABSOLUTE):
                raise Differs(
                    f"{name}: outputs for {size} samples differ from the model's by {off:.3g}; "
                    f"{_NOTHING}"
                )
            furthest = max(furthest, off)
        return furthest


def export(
    folder: Path,
    out: Path,
    *,
    rows: Path | None = None,
    require: Sequence[str] = (),
    overwrite: bool = False,
    trust: bool = False,
) -> dict[str, Any]:
    """Writes a model's files, `model.pt2`, `model.onnx` where that can be, and `export.json`.

    Args:
        folder: a model of a run, such as `runs/NAME/hardened`.
        out: a folder, which holds all of it or is as it was.
        rows: a file with rows to compare outputs on; None takes samples of the recipe's data.
        require: of `program` and `onnx`, what must be written; without it a model that cannot be
            so is told of, and the other files are written.
        overwrite: replace an earlier export.
        trust: whether a task that is code of one's own may be run.

    Returns:
        What `export.json` holds.

    Raises:
        InputError: outputs differ, what is required cannot be written, or about whatever else the
            user can mend.
    """
    for name in require:
        if name not in ("program", "onnx"):
            raise InputError(f"--require: {name!r} is neither program nor onnx")
    old = contents(out)
    if out.exists() and not out.is_dir():
        raise InputError(f"--out: {out} is a file; name a folder")
    if old and not (overwrite and (out / FACTS).is_file()):
        raise InputError(
            f"--out: {out} holds {'an export' if (out / FACTS).is_file() else 'other files'}; "
            "choose a new or empty folder, or replace an export with --overwrite"
        )
    trained = load_trained(folder, trust=trust)
    samples = _samples(trained, rows)
    with replacing_folder(out) as part:
        for path in model_files(folder):
            if path.name in _WRITTEN:
                continue  # of an export that is exported again
            copy = part / path.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
        facts = _facts(trained, samples)
        task, model = trained.task, trained.model
        module = _Outputs(task, task.for_scoring(model)).eval()
        with _quiet():
            program, facts["program"] = _write_program(module, samples, part / PROGRAM)
            facts["onnx"] = _write_onnx(program, samples, part / ONNX)
        for name in ("program", "onnx"):
            _tell(name, facts[name], required=name in require)
        facts["files"] = {str(path.relative_to(part)): sha256(path) for path in model_files(part)}
        write_text(part / FACTS, json.dumps(facts, indent=2) + "\n")
    say(f"exported: {out}")
    return facts


def _samples(trained: TrainedModel, rows: Path | None) -> Samples:
    """Batches of real samples, and a shorter one where their lengths may differ."""
    task, model = trained.task, trained.model
    make, count = _of_data(trained) if rows is None else _of_file(trained, rows)
    batches, start = [], 0
    for size in SIZES:
        batches.append(make([(start + i) % count for i in range(size)]).inputs)
        start += size
    traced = batches[_TRACED]
    varying = {
        name: [
            dim
            for dim in range(x.dim())
            if dim == 0 or (dim == 1 and name in task.varying) or _differs(batches, name, dim)
        ]
        for name, x in traced.items()
    }
    half = {name: -(-traced[name].shape[1] // 2) for name in task.varying if name in traced}
    if half:
        cut = {name: x[:, : half[name]] if name in half else x for name, x in traced.items()}
        batches.append(cut)
    # Of a view, a program would ask for what it is a view of.
    batches = [{name: x.clone() for name, x in inputs.items()} for inputs in batches]
    module = _Outputs(task, model)
    try:
        with torch.no_grad():
            outputs = [module(inputs) for inputs in batches]
    except ValueError as error:
        # What an audit attacks may be more than is scored.
        raise InputError(
            f"samples of the data cannot be scored ({error}); name a file that has some: --rows"
        ) from error
    return Samples(batches, outputs, varying)


def _of_data(trained: TrainedModel) -> tuple[Callable[[list[int]], Batch], int]:
    """What makes batches of the recipe's data, and how many samples there are."""
    # By a task of its own: what is exported depends on the model's folder alone.
    source, part = trained.recipe.make_task(), trained.recipe.audit.part
    try:
        read(source, Account(), part)
    except InputError as error:
        raise InputError(
            f"no samples to compare outputs on: {error}; or name a file that has some: --rows"
        ) from error

    def make(places: list[int]) -> Batch:
        return source.batch(trained.model, part, torch.tensor(places))

    return make, len(source.parts[part])


def _of_file(trained: TrainedModel, path: Path) -> tuple[Callable[[list[int]], Batch], int]:
    """What makes batches of a file's first rows, and how many there are."""
    task, most = trained.task, sum(SIZES)
    rows = Rows(path, task.columns_read(), lists=task.list_columns)
    found = [row.cells for row in islice(rows, most) if not row.wrong]
    if not found:
        raise InputError(f"{path}: none of the first {most} rows can be read")

    def make(places: list[int]) -> Batch:
        return task.encode(trained.model, [found[i] for i in places])

    return make, len(found)


def _differs(batches: Sequence[Inputs], name: str, dim: int) -> bool:
    return len({inputs[name].shape[dim] for inputs in batches}) > 1


def _facts(trained: TrainedModel, samples: Samples) -> dict[str, Any]:
    """What a program that loads the files must know."""

    def shape(name: str, x: Tensor) -> list[int | str]:
        names = {dim: "batch" if dim == 0 else f"length_{dim}" for dim in samples.varying[name]}
        return [names.get(dim, size) for dim, size in enumerate(x.shape)]

    traced = samples.batches[_TRACED]
    return {
        "format": 1,
        "name": trained.recipe.name,
        "task": trained.recipe.task,
        "kind": trained.task.kind.to_json(),
        "inputs": {
            name: {"dtype": str(x.dtype).removeprefix("torch."), "shape": shape(name, x)}
            for name, x in traced.items()
        },
        "outputs": {"shape": ["batch", *samples.outputs[_TRACED].shape[1:]]},
        "batches_compared": [len(next(iter(inputs.values()))) for inputs in samples.batches],
        "embattle": version_of("embattle"),
        "torch": torch.__version__,
    }


def _write_program(module: nn.Module, samples: Samples, path: Path) -> tuple[Any, dict[str, Any]]:
    """The program, None if the model cannot be exported, and what is to be said of it."""
    dims = {
        name: dict.fromkeys(varying, torch.export.Dim.DYNAMIC)
        for name, varying in samples.varying.items()
    }
    try:
        with torch.no_grad():
            program = torch.export.export(
                module, (samples.batches[_TRACED],), dynamic_shapes=(dims,)
            )
        with _writing(), patient(path) as stream:
            torch.export.save(program, stream)
        off = samples.furthest(PROGRAM, torch.export.load(path).module())
    except (Differs, _Unwritten):
        raise
    except Exception as error:  # exporters, and what they make, raise whatever they meet
        path.unlink(missing_ok=True)
        return None, {"left_out": f"torch.export: {_first_line(error)}"}
    return program, {"file": PROGRAM, "max_difference": off}


def _write_onnx(program: Any, samples: Samples, path: Path) -> dict[str, Any]:
    """What is to be said of the ONNX file, which is made of the program."""
    if program is None:
        return {"left_out": "it is made of the program, and there is none"}
    try:
        for name in ("onnx", "onnxscript"):
            need(name, "onnx")
    except InputError as error:
        return {"left_out": str(error)}
    large = sum(x.nbytes for x in program.state_dict.values()) > _ONNX_MOST
    names = [*samples.batches[_TRACED]]
    try:
        made: Any = torch.onnx.export(
            program, dynamo=True, verbose=False, input_names=names, output_names=["outputs"]
        )
        with _writing():
            made.save(path, external_data=large)
        return {"file": ONNX, **_compare_onnx(samples, path)}
    except (Differs, _Unwritten):
        raise
    except Exception as error:  # exporters, and what they make, raise whatever they meet
        for left in path.parent.glob(f"{path.name}*"):
            left.unlink()
        return {"left_out": f"torch.onnx: {_first_line(error)}"}


def _compare_onnx(samples: Samples, path: Path) -> dict[str, Any]:
    try:
        runtime = need("onnxruntime", "onnx")
    except InputError as error:
        return {"max_difference": None, "unchecked": str(error)}
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(inputs: Inputs) -> Tensor:
        given = {name: x.numpy() for name, x in inputs.items()}
        return torch.from_numpy(session.run(None, given)[0])

    return {"max_difference": samples.furthest(ONNX, run)}


def _tell(name: str, facts: dict[str, Any], *, required: bool) -> None:
    if "left_out" in facts:
        if required:
            raise InputError(f"--require {name}: {facts['left_out']}; {_NOTHING}")
        say(f"{name}: left out ({facts['left_out']})")
    elif "unchecked" in facts:
        if required:
            raise InputError(
                f"--require {name}: its outputs cannot be compared: {facts['unchecked']}; "
                f"{_NOTHING}"
            )
        say(f"{name}: {facts['file']}, whose outputs were not compared ({facts['unchecked']})")
    else:
        off = facts["max_difference"]
        say(f"{name}: {facts['file']}, its outputs differ from the model's by {off:.2g} at most")


class _Unwritten(InputError):
    """A file could not be written, which says nothing of the model."""


@contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _Unwritten(
            f"--out: cannot write the export: {error.strerror or error}; make room or choose "
            "another folder"
        ) from error


def _first_line(error: Exception) -> str:
    """What an exporter complains of, without how it came to that."""
    said = str(error.__cause__ or error).strip().splitlines()
    return printable(said[0]) if said else type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what exporters warn of and log from the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
