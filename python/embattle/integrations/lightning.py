"""Adversarial training in Lightning: a mix-in for a LightningModule."""

from __future__ import annotations

import io
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed

from embattle.data.staggered_batches import StaggeredBatches
from embattle.integrations.trainer_batches import count, take
from embattle.objectives import AWP, AdversarialObjective, Partial
from embattle.perturb.evaluation import Evaluation


class AdversarialModule:
    """Put this before LightningModule; set `self.objective` and define `loss_fn(batch)`.

        class Robust(AdversarialModule, LightningModule):
            def __init__(self, model):
                super().__init__()
                self.model = model
                site = Site(model.embedding)
                self.objective = AdversarialObjective(PGD(eps=1.0, steps=3), site)

            def loss_fn(self, batch):
                logits = self.model(batch.x)
                return Evaluation(losses.cross_entropy(logits, batch.y), logits)

            def objective_arguments(self, batch):
                return {"criterion": Misclassify(batch.y)}

    Staggered replays need batches of their own, and the indices of their samples; set `batches`, so
    that a resumed training goes on in the middle of an epoch:

            def train_dataloader(self):  # a data set that returns the index beside the sample
                self.batches = StaggeredBatches(len(self.data), 64, visits=2)
                return DataLoader(self.data, batch_sampler=self.batches)

            def objective_arguments(self, batch):
                return {"samples": batch.index}

    With several processes give it `rank` and `ranks`, and the Trainer
    `use_distributed_sampler=False`. For the form `Partial` the rows of a batch's tensors are taken
    (`take`), or what you return as `subset`.

    The objective's loss is an ordinary one to Lightning: automatic optimisation works, and with
    manual optimisation call `self.manual_backward(self.robust_loss(batch))`. A float16 scaler or
    sharded parameters turn the objective's `early_backward` off. The objective's step and schedules
    are part of the checkpoint. Attacks run inside `validation_step` and `test_step` as they are,
    in inference mode too.
    """

    objective: AdversarialObjective | AWP
    batches: StaggeredBatches | None = None

    def loss_fn(self, batch: Any) -> Tensor | Evaluation:
        """Give losses `[B]`, or an `Evaluation` of losses and outputs."""
        raise NotImplementedError(f"{type(self).__name__} must define loss_fn(batch)")

    def objective_arguments(self, batch: Any) -> dict[str, Any]:
        """Give what else the objective is called with: `criterion`, `mask`, ..."""
        return {}

    def take(self, batch: Any, rows: Tensor) -> Any:
        """Give some samples of a batch, int64 `rows`, for `Partial`: rows of all its tensors."""
        return take(batch, rows)

    def robust_loss(self, batch: Any) -> Tensor:
        """Compute the loss to backpropagate, and log the metrics."""
        objective = self.objective
        inner = objective.objective if isinstance(objective, AWP) else objective
        if _scales_or_shards(getattr(self, "_trainer", None)):
            inner.early_backward = False
        arguments = self.objective_arguments(batch)
        if isinstance(inner.form, Partial) and "subset" not in arguments:
            arguments = {
                "samples": count(batch),
                "subset": lambda rows: partial(self.loss_fn, self.take(batch, rows)),
                **arguments,
            }
        loss, metrics = self.objective(lambda: self.loss_fn(batch), **arguments)
        scalars = {f"train_{name}": value.float().mean() for name, value in metrics.items()}
        self.log_dict(scalars)  # type: ignore[attr-defined]
        return loss

    def training_step(self, batch: Any, *args: Any) -> Tensor | None:
        """One step of automatic optimisation."""
        return self.robust_loss(batch)

    def on_train_epoch_start(self) -> None:
        """Take the place in the order of staggered replays from the number of steps made."""
        if self.batches is not None:
            epoch, position = divmod(self.objective.step, len(self.batches))
            self.batches.load_state_dict({"epoch": epoch, "position": position})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the objective's state, of several processes each one's."""
        states = _of_all_processes(self.objective.state_dict())
        checkpoint["embattle_objective"] = states[0]
        if len(states) > 1:
            checkpoint["embattle_objectives"] = states

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the objective's state back, the first process's where others wrote it."""
        if "embattle_objective" not in checkpoint:
            return
        states = checkpoint.get("embattle_objectives", [checkpoint["embattle_objective"]])
        rank, ranks = _place()
        self.objective.load_state_dict(states[rank if len(states) == ranks else 0])


def _place() -> tuple[int, int]:
    """This process, and how many there are."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def _of_all_processes(state: dict[str, Any]) -> list[dict[str, Any]]:
    """The state of each process, in the order of ranks; all must ask for it. Tensors on the CPU."""
    _, ranks = _place()
    if ranks == 1:
        return [state]
    mine = io.BytesIO()
    torch.save(state, mine)
    found: list[Any] = [None] * ranks
    distributed.all_gather_object(found, mine.getvalue())
    return [torch.load(io.BytesIO(one), map_location="cpu", weights_only=True) for one in found]


def _scales_or_shards(trainer: Any) -> bool:
    """Whether losses are scaled before they are backpropagated, or parameters are sharded."""
    if trainer is None:
        return False
    scaled = str(getattr(trainer, "precision", "")).startswith("16-mixed")
    strategy = type(getattr(trainer, "strategy", None)).__name__
    return scaled or strategy in ("FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy")
