"""The Hugging Face Trainer with adversarial training: one class and two arguments more.

    python examples/huggingface_trainer.py

A tiny random model and synthetic data stand in for yours.
"""

from __future__ import annotations

import tempfile
from typing import Any

import embattle as eb
import torch
from embattle.integrations.transformers import AdversarialTrainer
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments


class Synthetic(Dataset[dict[str, Any]]):
    """Texts whose label says whether their first token is even."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Any]:
        tokens = torch.randint(5, 100, (12,), generator=torch.Generator().manual_seed(index))
        return {
            "input_ids": tokens,
            "attention_mask": torch.ones_like(tokens),
            "labels": int(tokens[0]) % 2,
        }


def main(steps: int = 20) -> list[dict[str, float]]:
    """Train; returns the log."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = AdversarialTrainer(
            model=BertForSequenceClassification(config),
            args=TrainingArguments(
                folder, max_steps=steps, logging_steps=5, report_to=[], save_strategy="no"
            ),
            train_dataset=Synthetic(),
            attack=eb.PGD(eps=eb.Relative(0.1), steps=2),
            objective={"form": "mixed", "eps_schedule": eb.schedules.WarmUp(10)},
        )
        trainer.train()
        history: list[dict[str, float]] = trainer.state.log_history
        return history


if __name__ == "__main__":
    main()
