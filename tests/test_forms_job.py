"""Two processes train by staggered replays and partial batches, stop, and go on: the same bits."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("pyarrow")
pytest.importorskip("pydantic")

import ranks
import torch
from embattle.data.account import Account
from embattle.jobs import fit
from embattle.jobs import recipe as recipes
from embattle.jobs.train import make_accelerator
from safetensors.torch import load_file
from test_variants import recipe_of

VARIANTS: dict[str, dict[str, object]] = {
    "staggered": {"objective": "staggered", "attack": {"kind": "mifgsm", "steps": 2}},
    "partial": {"objective": "partial", "choose": "margin", "share": 0.4},
}


def train_twice(rank: int, folder: Path) -> None:
    """Once in one go; once with a stop after three steps, where random states are lost."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost",
        MASTER_PORT="29400",
    )  # fmt: skip
    recipe = recipes.load(folder / "recipe.yaml")
    task = recipe.make_task()
    task.read(Account())
    accelerator = make_accelerator(recipe, task, folder)
    assert accelerator.num_processes == 2
    step = fit.Fit._step

    def interrupted(self: fit.Fit, number: int) -> dict[str, float]:
        if number == 3 and rank == 0:
            signal.raise_signal(signal.SIGINT)
        return step(self, number)

    for name in VARIANTS:
        places: list[list[int]] = []
        whole = fit.Fit(recipe, name, task, folder / "whole", accelerator)
        for number in range(6):
            places += [rows.tolist() for rows in whole._places_of(number)]
        torch.save(places, folder / f"{name}-{rank}.pt")
        whole.go()
        fit.Fit._step = interrupted  # type: ignore[method-assign]
        try:
            fit.Fit(recipe, name, task, folder / "parts", accelerator).go()
        except fit.Interrupted:
            torch.save(True, folder / f"stopped-{name}-{rank}.pt")
        fit.Fit._step = step  # type: ignore[method-assign]
        torch.manual_seed(99)
        fit.Fit(recipe, name, task, folder / "parts", accelerator).go()


def test_two_processes_resume_with_the_same_bits(tmp_path: Path) -> None:
    train = {"steps": 6, "batch_size": 16, "learning_rate": 0.02}
    recipe_of(tmp_path, variants=VARIANTS, train=train)
    ranks.run(train_twice, tmp_path)
    for name in VARIANTS:
        assert all((tmp_path / f"stopped-{name}-{rank}.pt").exists() for rank in range(2))
        one, two = (
            load_file(tmp_path / kind / name / "model.safetensors") for kind in ("whole", "parts")
        )
        assert all(torch.equal(one[key], two[key]) for key in one)
    # Each process replays samples of its own.
    mine, theirs = (torch.load(tmp_path / f"staggered-{rank}.pt") for rank in range(2))
    assert [len(rows) for rows in mine] == [len(rows) for rows in theirs] == [4, *[8] * 5]
    assert not {s for rows in mine for s in rows} & {s for rows in theirs for s in rows}
    assert mine[0] == mine[1][4:]
