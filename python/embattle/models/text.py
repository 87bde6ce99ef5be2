"""A classifier of texts: any transformer without its head, pooling, one linear layer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from embattle.data.batch import Batch
from embattle.errors import need
from embattle.files import broken, require_finite, save_tensors, write_text
from embattle.models.encoder import TextEncoder
from embattle.models.pretrained import load_encoder, saved_encoder

if TYPE_CHECKING:
    from embattle.models.recipe import ModelRecipe


class TextClassifier(TextEncoder):
    """Encoder, pooling over the tokens, linear head.

    Args:
        encoder, tokenizer, pooling, max_tokens: see `TextEncoder`.
        classes: the names of the classes.
    """

    def __init__(
        self,
        encoder: Any,
        tokenizer: Any,
        *,
        classes: Sequence[str],
        pooling: str | None,
        max_tokens: int,
    ) -> None:
        super().__init__(encoder, tokenizer, pooling=pooling, max_tokens=max_tokens)
        self.head = nn.Linear(self.width, len(classes))
        self.classes = tuple(classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits [B, classes] of `input_ids` and `attention_mask`, both [B, T]."""
        logits: Tensor = self.head(self.pooled(attention_mask, input_ids=input_ids))
        return logits

    def encode(self, texts: Sequence[str], labels: Sequence[int]) -> Batch:
        """Tokenizes N texts into one batch, padded to the longest."""
        batch = self.tokenize(texts)
        return Batch(batch.inputs, torch.tensor(list(labels), dtype=torch.int64), batch.movable)

    def save(self, folder: Path) -> None:
        """Writes weights, configuration and tokenizer; `load` needs nothing else."""
        safetensors = need("safetensors.torch")
        self.save_parts(folder)
        head = {
            "kind": "text",
            "classes": list(self.classes),
            "pooling": self.pooling,
            "max_tokens": self.max_tokens,
        }
        write_text(folder / "classifier.json", json.dumps(head, indent=2) + "\n")
        save_tensors(folder / "model.safetensors", lambda part: safetensors.save_model(self, part))


def build(recipe: ModelRecipe, classes: Sequence[str], seed: int) -> TextClassifier:
    """A pretrained model under a new head.

    Args:
        recipe: the recipe's `model` section.
        classes: the names of the classes.
        seed: decides the head's first weights.

    Returns:
        The model, in training mode.

    Raises:
        InputError: if the encoder cannot be had.
    """
    encoder, tokenizer = load_encoder(recipe.pretrained, recipe.layers, recipe.dropout)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = TextClassifier(
            encoder,
            tokenizer,
            classes=classes,
            pooling=recipe.pooling,
            max_tokens=recipe.max_tokens,
        )
    model.embedding.requires_grad_(recipe.train_embeddings)
    return model.train()


def load(folder: Path) -> TextClassifier:
    """Reads back what `TextClassifier.save` wrote, in evaluation mode.

    Raises:
        InputError: if the folder does not hold such a model.
    """
    safetensors = need("safetensors.torch")
    try:
        head = json.loads((folder / "classifier.json").read_text(encoding="utf-8"))
        encoder, tokenizer = saved_encoder(folder)
        if not isinstance(head["classes"], list) or len(head["classes"]) < 2:
            raise ValueError("classifier.json names no classes")
        model = TextClassifier(
            encoder,
            tokenizer,
            classes=[str(name) for name in head["classes"]],
            pooling=head["pooling"],
            max_tokens=head["max_tokens"],
        )
        safetensors.load_model(model, str(folder / "model.safetensors"))
        require_finite(model)
    except Exception as error:
        # The files of a model may be changed in any way, and transformers, tokenizers and
        # safetensors each raise errors of their own kinds.
        raise broken(folder, error) from error
    return model.eval()
