"""Adversarial training that watches itself: schedules, gradient masking, and a monitor.

python examples/guarded_training.py

A fifth of the labels is wrong. Each masking policy leaves some samples out of the adversarial part;
the script prints how many, and the accuracy on the true labels. The strength grows only while the
model holds its robust accuracy, the weight of the adversarial part follows a cosine, and the
monitor looks at the tables, the attack's gains and a held batch.
"""

from __future__ import annotations

import warnings

import embattle as eb
import torch
from embattle.objectives.monitor import RobustTrainingWarning
from torch import Tensor, nn


class Classifier(nn.Module):
    """Mean of embeddings, one hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(200, 16)
        self.layers = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 2))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layers(self.embedding(tokens).mean(1))


POLICIES = {
    "no masking": None,
    "loss quantile": eb.masking.LossQuantile(0.8),
    "loss bound": eb.masking.LossBound(1.5),
    "loss ratio": eb.masking.LossRatio(4.0),
    "norm bound": eb.masking.NormBound(1.0),
    "confidence": eb.masking.Confidence(0.95),
    "nearest agreement": eb.masking.NearestAgreement(0.9),
}


def main(steps: int = 200, batch: int = 128) -> dict[str, dict[str, float]]:
    """Train with each policy; returns what each ended in."""
    torch.manual_seed(0)
    tokens = torch.randint(0, 200, (512, 12))
    truth = ((tokens < 100).float().mean(1) > 0.5).long()
    labels = torch.where(torch.rand(512) < 0.2, 1 - truth, truth)
    found: dict[str, dict[str, float]] = {}
    for name, policy in POLICIES.items():
        torch.manual_seed(1)
        model = Classifier()
        site = eb.Site(model.embedding)
        strength = eb.schedules.Adaptive(target=0.6, start=0.2, grow=0.1, every=10)
        objective = eb.AdversarialObjective(
            eb.PGD(eps=eb.Relative(0.2), steps=3),
            site,
            masking=policy,
            eps_schedule=strength,
            lam_schedule=eb.schedules.Cosine(steps // 2),
            steps_schedule=eb.schedules.WarmUp(steps // 4, start=0.3),
        )
        monitor = eb.Monitor(sites=site, window=20)
        monitor.check_tables()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        masked, said = 0, list[str]()

        def loss_fn(rows: Tensor, model: nn.Module = model) -> eb.Evaluation:
            logits = model(tokens[rows])
            return eb.Evaluation(eb.losses.cross_entropy(logits, labels[rows]), logits)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RobustTrainingWarning)  # printed below
            for step in range(steps):
                rows = torch.randint(0, len(tokens), (batch,))
                loss, metrics = objective(
                    lambda rows=rows: loss_fn(rows), criterion=eb.Misclassify(labels[rows])
                )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                masked += int(metrics.get("masked", torch.tensor(0)))
                said += monitor.update(metrics)
                if step % 50 == 49:
                    said += monitor.check_tables()
                    held = torch.arange(64)
                    said += monitor.check_held(
                        lambda held=held: loss_fn(held),
                        criterion=eb.Misclassify(truth[:64]),
                        eps=0.1,
                    )
        right = float((model(tokens).argmax(1) == truth).float().mean())
        found[name] = {
            "true accuracy": right,
            "masked": masked / (steps * batch),
            "eps factor": strength.factor,
            "warnings": len(said),
        }
        print(f"{name:18s} " + "  ".join(f"{k} {v:.2f}" for k, v in found[name].items()))
        for text in dict.fromkeys(said):
            print(f"    {text}")
    return found


if __name__ == "__main__":
    main()
