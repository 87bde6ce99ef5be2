"""Checkpoints without pickle: tensors in safetensors, everything else as JSON in its header."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from embattle.errors import InputError, need
from embattle.files import save_tensors


@dataclass(frozen=True)
class Checkpoint:
    """A training run at a step boundary.

    Attributes:
        tensors: `model.*`, `optimizer.<index>.<name>`, `random.*`, and `process<rank>.*`, what each
            process keeps by itself; on the CPU.
        facts: whatever else is needed to go on, as JSON.
    """

    tensors: dict[str, Tensor]
    facts: dict[str, Any]

    def save(self, path: Path) -> None:
        """Writes the file, all of it or nothing."""
        safetensors = need("safetensors.torch")
        tensors = {name: x.detach().cpu().contiguous() for name, x in self.tensors.items()}
        facts = json.dumps(self.facts)
        save_tensors(
            path, lambda part: safetensors.save_file(tensors, part, metadata={"embattle": facts})
        )

    @classmethod
    def load(cls, path: Path) -> Checkpoint:
        """Reads a file that `save` wrote.

        Raises:
            InputError: if it is no such file.
        """
        safetensors = need("safetensors")
        try:
            with safetensors.safe_open(str(path), framework="pt") as stream:
                facts = json.loads((stream.metadata() or {})["embattle"])
                tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
            if not isinstance(facts, dict):
                raise ValueError("its header holds no facts")
        except (
            OSError,
            KeyError,
            ValueError,
            RecursionError,
            safetensors.SafetensorError,
        ) as error:
            raise InputError(
                f"{path} is not a readable checkpoint ({error}); start again with --overwrite"
            ) from error
        return cls(tensors, facts)


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the model's parameters and buffers, as `model.*`."""
    return {f"model.{name}": x.detach().clone() for name, x in model.state_dict().items()}


def restore_model(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Puts `model.*` back into the model."""
    prefix = "model."
    model.load_state_dict(
        {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    )


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as `optimizer.<parameter index>.<name>`; numbers become 0-d tensors."""
    state = optimizer.state_dict()["state"]
    return {
        f"optimizer.{index}.{name}": torch.as_tensor(value).detach().clone()
        for index, values in state.items()
        for name, value in values.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Puts `optimizer.*` back; the parameter groups (rates and the like) stay as they are.

    Raises:
        ValueError: if a state has not the shape of its parameter, or belongs to none.
    """
    parameters = [x for group in optimizer.param_groups for x in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            if int(index) >= len(parameters):
                raise ValueError(f"{name} belongs to no parameter")
            if value.dim() and value.shape != parameters[int(index)].shape:
                shapes = f"{list(value.shape)}, not {list(parameters[int(index)].shape)}"
                raise ValueError(f"{name} has the shape {shapes}")
            state.setdefault(int(index), {})[key] = value
    if len(state) != len(parameters):
        raise ValueError(f"it holds {len(state)} states for {len(parameters)} parameters")
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def random_tensors(generator: torch.Generator) -> dict[str, Tensor]:
    """The states of torch's own generators and of `generator`, as `random.*` [n] uint8."""
    states = {"random.cpu": torch.get_rng_state(), "random.attack": generator.get_state()}
    if torch.cuda.is_available():
        states["random.cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random(generator: torch.Generator, tensors: dict[str, Tensor]) -> None:
    """Puts the states of `random_tensors` back; one of another device is left out."""
    # A generator reads the memory of a state from its start, also of a view that begins later.
    states = {name: state.clone() for name, state in tensors.items()}
    torch.set_rng_state(states["random.cpu"])
    generator.set_state(states["random.attack"])
    if torch.cuda.is_available() and "random.cuda" in states:
        torch.cuda.set_rng_state(states["random.cuda"])


def of_all_processes(accelerator: Any, tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """What every process holds under the same names, of whatever sizes; in the order of ranks.

    Args:
        accelerator: Accelerate's object.
        tensors: this process's, of as many dims in all processes.
    """
    ranks = accelerator.num_processes
    if ranks == 1:
        return [tensors]
    found: list[dict[str, Tensor]] = [{} for _ in range(ranks)]
    for name in sorted(tensors):
        mine = tensors[name].to(accelerator.device)
        shapes = accelerator.gather(torch.tensor([mine.shape], device=mine.device)).tolist()
        counts = [math.prod(shape) for shape in shapes]
        flat = mine.new_zeros(1, max(counts))
        flat[0, : mine.numel()] = mine.flatten()
        rows = accelerator.gather(flat) if max(counts) else flat.expand(ranks, 0)
        for own, row, count, shape in zip(found, rows, counts, shapes, strict=True):
            own[name] = row[:count].reshape(shape)
    return found
