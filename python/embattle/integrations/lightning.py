"""Adversarial training in Lightning: a mix-in for a LightningModule."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from embattle.objectives import AWP, AdversarialObjective


class AdversarialModule:
    """Put this before LightningModule; set `self.objective` and define `loss_fn(batch)`.

        class Robust(AdversarialModule, LightningModule):
            def __init__(self, model):
                super().__init__()
                self.model = model
                site = Site(model.embedding)
                self.objective = AdversarialObjective(PGD(eps=1.0, steps=3), site)

            def loss_fn(self, batch):
                return F.cross_entropy(self.model(batch.x), batch.y, reduction="none")

    The objective's loss is an ordinary one to Lightning: automatic optimisation works, and with
    manual optimisation call `self.manual_backward(self.robust_loss(batch))`. The objective's step
    and schedules are part of the checkpoint.
    """

    objective: AdversarialObjective | AWP

    def loss_fn(self, batch: Any) -> Tensor | tuple[Tensor, Tensor]:
        """Give losses `[B]`, or (losses, outputs)."""
        raise NotImplementedError(f"{type(self).__name__} must define loss_fn(batch)")

    def objective_arguments(self, batch: Any) -> dict[str, Any]:
        """Give what else the objective is called with: `mask`, `labels`, ..."""
        return {}

    def robust_loss(self, batch: Any) -> Tensor:
        """Compute the loss to backpropagate, and log the metrics."""
        loss, metrics = self.objective(
            lambda: self.loss_fn(batch), **self.objective_arguments(batch)
        )
        scalars = {f"train_{name}": value.float().mean() for name, value in metrics.items()}
        self.log_dict(scalars)  # type: ignore[attr-defined]
        return loss

    def training_step(self, batch: Any, *args: Any) -> Tensor | None:
        """One step of automatic optimisation."""
        return self.robust_loss(batch)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the objective's state."""
        checkpoint["embattle_objective"] = self.objective.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the objective's state back."""
        if "embattle_objective" in checkpoint:
            self.objective.load_state_dict(checkpoint["embattle_objective"])
