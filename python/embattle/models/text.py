"""A classifier of texts: any transformer encoder, pooling, one linear layer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from embattle.data.batch import Batch
from embattle.errors import InputError, need
from embattle.files import save_tensors, write_text
from embattle.models.pretrained import count_longer, load_encoder, quiet

if TYPE_CHECKING:
    from embattle.models.recipe import ModelRecipe


class TextClassifier(nn.Module):
    """Encoder, pooling over the tokens, linear head.

    Args:
        encoder: a transformers model that gives `last_hidden_state`; of an encoder-decoder model
            the encoder is taken, and a pooler is dropped: its weights would never be trained.
        tokenizer: the encoder's tokenizer.
        classes: the names of the classes.
        pooling: `mean`, `first` or `last` (see `ModelRecipe.pooling`).
        max_tokens: longer texts are cut.
    """

    def __init__(
        self, encoder: Any, tokenizer: Any, *, classes: Sequence[str], pooling: str, max_tokens: int
    ) -> None:
        super().__init__()
        if getattr(encoder.config, "is_encoder_decoder", False):
            encoder = encoder.get_encoder()
        if getattr(encoder, "pooler", None) is not None:
            encoder.pooler = None
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, len(classes))
        self.classes = tuple(classes)
        self.pooling = pooling
        self.max_tokens = max_tokens
        tokenizer.padding_side = "right"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
            encoder.config.pad_token_id = tokenizer.pad_token_id
        self._tokenizer = tokenizer

    @property
    def embedding(self) -> nn.Module:
        """The module whose output an attacker perturbs: the token embeddings."""
        module: nn.Module = self.encoder.get_input_embeddings()
        return module

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits [B, classes] of `input_ids` and `attention_mask`, both [B, T]."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        if self.pooling == "first":
            pooled = hidden[:, 0]
        elif self.pooling == "last":
            last = (attention_mask.sum(1) - 1).clamp(min=0)
            pooled = hidden[torch.arange(hidden.shape[0], device=hidden.device), last]
        else:
            weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
            pooled = (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)
        logits: Tensor = self.head(pooled)
        return logits

    def encode(self, texts: Sequence[str], labels: Sequence[int]) -> Batch:
        """Tokenizes N texts into one batch, padded to the longest."""
        tokens = self._tokenizer(
            list(texts),
            truncation=True,
            max_length=self.max_tokens,
            padding=True,
            return_special_tokens_mask=True,
            return_tensors="pt",
        )
        attention = tokens["attention_mask"]
        movable = attention.bool() & ~tokens["special_tokens_mask"].bool()
        inputs = {"input_ids": tokens["input_ids"], "attention_mask": attention}
        return Batch(inputs, torch.tensor(list(labels), dtype=torch.int64), movable)

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """How many tokens the model reads of each text, special ones included."""
        if not texts:
            return []
        with quiet():
            found = self._tokenizer(list(texts), truncation=True, max_length=self.max_tokens)
        return [len(row) for row in found["input_ids"]]

    def count_cut(self, texts: Sequence[str]) -> int:
        """How many of the texts have more tokens than the model reads."""
        return count_longer(self._tokenizer, texts, self.max_tokens)

    def save(self, folder: Path) -> None:
        """Writes weights, configuration and tokenizer; `load` needs nothing else."""
        safetensors = need("safetensors.torch")
        self.encoder.config.save_pretrained(folder)
        self._tokenizer.save_pretrained(folder)
        head = {
            "kind": "text",
            "classes": list(self.classes),
            "pooling": self.pooling,
            "max_tokens": self.max_tokens,
        }
        write_text(folder / "classifier.json", json.dumps(head, indent=2) + "\n")
        save_tensors(folder / "model.safetensors", lambda part: safetensors.save_model(self, part))


def build(recipe: ModelRecipe, classes: Sequence[str], seed: int) -> TextClassifier:
    """A pretrained encoder under a new head.

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
    transformers, safetensors = need("transformers"), need("safetensors.torch")
    try:
        head = json.loads((folder / "classifier.json").read_text(encoding="utf-8"))
        with quiet():
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
            encoder = transformers.AutoModel.from_config(config)
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
        broken = [name for name, x in model.named_parameters() if not x.isfinite().all()]
        if broken:
            raise ValueError(f"{broken[0]} holds values that are no finite numbers")
    except Exception as error:
        # The files of a model may be changed in any way, and transformers, tokenizers and
        # safetensors each raise errors of their own kinds.
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{folder} does not hold a trained model: {first}; train it with `embattle train`"
        ) from error
    return model.eval()
