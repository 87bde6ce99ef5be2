"""Staggered replays and partial batches in two processes: gradients, and jobs that go on."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("pyarrow")
pytest.importorskip("pydantic")

import embattle as eb
import ranks
import torch
import toys
from embattle.data.account import Account
from embattle.integrations.lightning import AdversarialModule
from embattle.jobs import fit
from embattle.jobs import recipe as recipes
from embattle.jobs.train import make_accelerator
from safetensors.torch import load_file
from test_partial import partial, plain_step, step
from test_variants import recipe_of
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

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
            places += [rows.tolist() for rows in whole.order.places(number)]
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


SHARES = ([0, 5, 7, 2], [9, 1, 3, 6])


def train_wrapped(rank: int, folder: Path) -> None:
    """Some steps of each form through DDP, on samples of one's own."""
    mine = SHARES[rank]
    for name in ("partial", "staggered"):
        model = toys.encoder()
        wrapped = DistributedDataParallel(model)
        optimizer = torch.optim.SGD(model.parameters(), 0.2)
        objective = of_form(name, model)
        rows: list[list[int]] = []
        for texts in parts_of(name, mine):
            optimizer.zero_grad()
            loss, _, chosen = step(objective, wrapped, texts)
            rows += chosen
            loss.backward()
            optimizer.step()
        torch.save(
            {"weights": [p.detach() for p in model.parameters()], "rows": rows},
            folder / f"ddp-{name}-{rank}.pt",
        )


def of_form(name: str, model: nn.Module) -> eb.AdversarialObjective:
    if name == "partial":
        return partial(model, share=0.5, choose="loss")  # type: ignore[no-any-return]
    return eb.AdversarialObjective(eb.FGM(eps=0.4), eb.Site(model.embedding), form=name)  # type: ignore[arg-type]


def parts_of(name: str, mine: list[int]) -> list[list[int]]:
    """The batches of a process: of staggered replays two new samples, and those before."""
    return [mine, mine] if name == "partial" else [mine[:2], mine[2:] + mine[:2], mine[2:]]


def check_wrapped(folder: Path) -> None:
    """The same weights as in one process, with the mean of both shares' losses."""
    for name in ("partial", "staggered"):
        found = [torch.load(folder / f"ddp-{name}-{rank}.pt") for rank in range(2)]
        model = toys.encoder()
        optimizer = torch.optim.SGD(model.parameters(), 0.2)
        objectives = [of_form(name, model) for _ in SHARES]
        for number in range(len(parts_of(name, SHARES[0]))):
            optimizer.zero_grad()
            for rank, share in enumerate(SHARES):
                texts = parts_of(name, share)[number]
                if name == "partial":  # what was chosen there, by a loop of its own
                    rows = found[rank]["rows"][number]
                    loss = plain_step(model, texts, rows, size=0.4)
                else:
                    loss, _, _ = step(objectives[rank], model, texts)
                (loss / 2).backward()
            optimizer.step()
        for one in found:
            for weight, p in zip(one["weights"], model.parameters(), strict=True):
                torch.testing.assert_close(weight, p.detach(), rtol=0, atol=1e-10)


class Texts(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 18

    def __getitem__(self, index: int) -> dict[str, object]:
        generator = torch.Generator().manual_seed(index)
        tokens = torch.randint(5, 60, (8,), generator=generator)
        return {"input_ids": tokens, "labels": index % 2}


def train_in_trainer(rank: int, folder: Path) -> None:
    """Two epochs of staggered replays, and again from the middle of the second."""
    transformers = pytest.importorskip("transformers")
    from embattle.integrations.transformers import AdversarialTrainer

    met: list[list[int]] = []

    class Trainer(AdversarialTrainer):  # type: ignore[misc]
        def compute_loss(
            self, model: object, inputs: dict[str, Tensor], *args: object, **more: object
        ) -> object:
            met.append(inputs["embattle_samples"].tolist())
            return super().compute_loss(model, inputs, *args, **more)

    for start in (0, 9):
        args = transformers.TrainingArguments(
            output_dir=str(folder / "trainer"),
            report_to=[],
            save_strategy="steps",
            save_steps=9,
            use_cpu=True,
            disable_tqdm=True,
            max_steps=12,
            per_device_train_batch_size=4,
        )
        objective = {"form": eb.StaggeredReplays(2)}
        model = toys.tiny_bert()
        run = Trainer(
            model=model, args=args, train_dataset=Texts(), attack=eb.FGM(eps=0.1),
            objective=objective,
        )  # fmt: skip
        met.clear()
        run.train(
            resume_from_checkpoint=str(folder / "trainer" / "checkpoint-9") if start else None
        )
        batches = eb.StaggeredBatches(18, 4, 2, seed=args.seed, rank=rank, ranks=2)
        assert met == [*batches.batches(0), *batches.batches(1)][start:12]


def of_rank(rank: int, folder: Path) -> None:
    train_wrapped(rank, folder)
    train_twice(rank, folder)
    train_in_trainer(rank, folder)


def keep_in_lightning(rank: int, folder: Path) -> None:
    """A step on samples of one's own; then each takes its state from the first one's checkpoint."""
    tokens, labels = toys.text_batch(batch=12)

    model = toys.encoder(dtype=torch.float32)

    def module() -> AdversarialModule:
        made = AdversarialModule()
        site = eb.Site(model.embedding)
        made.objective = eb.AdversarialObjective(eb.FGM(eps=0.3), site, form="staggered")
        return made

    begun = module()
    rows = torch.tensor(next(iter(eb.StaggeredBatches(12, 4, visits=2, rank=rank, ranks=2))))
    loss, _ = begun.objective(toys.classify(model, tokens[rows], labels[rows]), samples=rows)
    loss.backward()
    checkpoint: dict[str, Any] = {}
    begun.on_save_checkpoint(checkpoint)
    if rank == 0:
        torch.save(checkpoint, folder / "first.ckpt")
    torch.distributed.barrier()
    resumed = module()
    resumed.on_load_checkpoint(torch.load(folder / "first.ckpt", weights_only=True))
    state = str(resumed.objective.state_dict())
    assert state == str(begun.objective.state_dict())
    assert (state == str(checkpoint["embattle_objective"])) == (rank == 0)


def test_each_process_of_lightning_resumes_its_own_samples(tmp_path: Path) -> None:
    ranks.run(keep_in_lightning, tmp_path)


def test_two_processes_give_what_one_does_and_resume_with_the_same_bits(tmp_path: Path) -> None:
    train = {"steps": 6, "batch_size": 16, "learning_rate": 0.02}
    recipe_of(tmp_path, variants=VARIANTS, train=train)
    ranks.run(of_rank, tmp_path)
    check_wrapped(tmp_path)
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
