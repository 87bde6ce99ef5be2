"""Lightning with adversarial training: one mix-in, one objective, one loss function.

python examples/lightning_module.py

A tiny random model and synthetic data stand in for yours.
"""

from __future__ import annotations

import tempfile
from typing import Any

import embattle as eb
import lightning
import torch
from embattle.integrations.lightning import AdversarialModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Classifier(nn.Module):
    """Mean of embeddings, one hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(200, 16)
        self.layers = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 2))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layers(self.embedding(tokens).mean(1))


class Robust(AdversarialModule, lightning.LightningModule):
    """What differs from an ordinary module: `objective` and `loss_fn` in place of a step.

    Attacks run inside Lightning's evaluation as they are.
    """

    def __init__(self) -> None:
        super().__init__()
        self.model = Classifier()
        self.objective = eb.AdversarialObjective(
            eb.PGD(eps=1.0, steps=2),
            eb.Site(self.model.embedding),
            eps_schedule=eb.schedules.WarmUp(10),
        )

    def loss_fn(self, batch: list[Tensor]) -> eb.Evaluation:
        logits = self.model(batch[0])
        return eb.Evaluation(eb.losses.cross_entropy(logits, batch[1]), logits)

    def objective_arguments(self, batch: list[Tensor]) -> dict[str, Any]:
        return {"criterion": eb.Misclassify(batch[1])}

    def validation_step(self, batch: list[Tensor]) -> None:
        result = eb.PGD(eps=1.0, steps=5, keep="best").run(
            lambda: self.loss_fn(batch), self.objective.sites, **self.objective_arguments(batch)
        )
        self.log_dict({"clean": result.clean_accuracy, "robust": result.robust_accuracy})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def main(epochs: int = 20) -> dict[str, float]:
    """Train; returns the metrics that were logged last."""
    torch.manual_seed(0)
    tokens = torch.randint(0, 200, (256, 12))
    labels = ((tokens < 100).float().mean(1) > 0.5).long()
    loader = DataLoader(TensorDataset(tokens, labels), batch_size=64, shuffle=True)
    with tempfile.TemporaryDirectory() as folder:
        trainer = lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        robust = Robust()
        trainer.fit(robust, loader)
        trained = dict(trainer.callback_metrics)
        trainer.validate(robust, loader, verbose=False)
    metrics = trained | dict(trainer.callback_metrics)
    found = {name: float(value) for name, value in metrics.items()}
    for name, value in found.items():
        print(f"{name:24s} {value:.3f}")
    return found


if __name__ == "__main__":
    main()
