"""An encoder of texts: any transformer, its tokenizer, and pooling over the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from embattle.data.batch import Batch
from embattle.models.pretrained import count_longer, fitting, is_causal, padded_right, quiet, read
from embattle.models.words import Words


class TextEncoder(nn.Module):
    """A vector for each text.

    Args:
        encoder: a transformers model that gives `last_hidden_state`, such as an encoder or the
            body of a causal language model; of an encoder-decoder model the encoder is taken, and
            a pooler is dropped: its weights would never be trained.
        tokenizer: the encoder's tokenizer; where it knows no padding, its end of text pads.
        pooling: `mean` over tokens, `first` or `last` token; None takes the last token of a causal
            language model, and the mean of another.
        max_tokens: longer texts are cut.
    """

    def __init__(
        self, encoder: Any, tokenizer: Any, *, pooling: str | None, max_tokens: int
    ) -> None:
        super().__init__()
        self._config = encoder.config  # of all of it, which `saved_encoder` makes again
        # An encoder that was saved alone may be read as both, such as T5's.
        both = all(getattr(encoder, part, None) is not None for part in ("encoder", "decoder"))
        if both or getattr(encoder.config, "is_encoder_decoder", False):
            encoder = encoder.get_encoder()
        if getattr(encoder, "pooler", None) is not None:
            encoder.pooler = None
        self.encoder = encoder
        # OPT's may project its last layer to the width of its embeddings.
        self.width = int(getattr(encoder.config, "word_embed_proj_dim", encoder.config.hidden_size))
        self.pooling = pooling or ("last" if is_causal(self._config) else "mean")
        self.max_tokens = fitting(max_tokens, encoder)
        self._tokenizer = padded_right(tokenizer)

    @property
    def embedding(self) -> nn.Module:
        """The module whose output an attacker perturbs: the token embeddings."""
        module: nn.Module = self.encoder.get_input_embeddings()
        return module

    @property
    def tokenizer(self) -> Any:
        """The tokenizer."""
        return self._tokenizer

    def pooled(self, attention_mask: Tensor, **inputs: Tensor) -> Tensor:
        """Give the vectors [B, width] of texts.

        Args:
            attention_mask: [B, T].
            inputs: `input_ids` [B, T], or `inputs_embeds` [B, T, width of the embeddings].
        """
        hidden: Tensor = self.encoder(attention_mask=attention_mask, **inputs).last_hidden_state
        if self.pooling == "first":
            return hidden[:, 0]
        if self.pooling == "last":
            last = (attention_mask.sum(1) - 1).clamp(min=0)
            return hidden[torch.arange(hidden.shape[0], device=hidden.device), last]
        weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)

    def tokenize(self, texts: Sequence[str]) -> Batch:
        """Tokenizes N texts into one batch without labels, padded to the longest.

        Of a text without a token, such as an empty one where the tokenizer adds none, a padding
        token is read: its vector would depend on the other texts' padding.
        """
        tokens = read(
            self._tokenizer, texts, truncation=True, max_length=self.max_tokens, padding=True
        )
        ids, attention, special = (
            torch.tensor(tokens[name] if any(tokens[name]) else [[filled]] * len(texts))
            for name, filled in (
                ("input_ids", self._tokenizer.pad_token_id),
                ("attention_mask", 0),
                ("special_tokens_mask", 1),
            )
        )
        attention[:, 0] |= attention.sum(1) == 0
        movable = attention.bool() & ~special.bool()
        return Batch({"input_ids": ids, "attention_mask": attention}, movable=movable)

    def words(self, ids: str, mask: str) -> Words:
        """Give where batches have texts: under the names of their inputs `ids` and `mask`."""
        return Words(self._tokenizer, self.embedding, ids, mask, self.max_tokens)

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """How many tokens the model reads of each text, special ones included; one at least."""
        if not texts:
            return []
        with quiet():
            found = read(self._tokenizer, texts, truncation=True, max_length=self.max_tokens)
        return [max(1, len(row)) for row in found["input_ids"]]

    def count_cut(self, texts: Sequence[str]) -> int:
        """How many of the texts have more tokens than the model reads."""
        return count_longer(self._tokenizer, texts, self.max_tokens)

    def save_parts(self, folder: Path) -> None:
        """Writes configuration and tokenizer, for `saved_encoder`; the weights are the caller's."""
        self._config.save_pretrained(folder)
        self._tokenizer.save_pretrained(folder)
