"""Where a model reads texts as tokens, for what is shown to readers and for exchanges of words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from embattle.data.batch import Batch


@dataclass(frozen=True)
class Words:
    """The texts of a task's batches.

    Attributes:
        tokenizer: a tokenizer of transformers that pads on the right.
        embedding: the table that the tokens are looked up in.
        ids, mask: the batch's inputs with the tokens `[B, T]`, and with 1 at tokens, 0 at padding.
        max_tokens: longer texts are cut.
    """

    tokenizer: Any
    embedding: nn.Module
    ids: str
    mask: str
    max_tokens: int

    def names(self, batch: Batch) -> list[list[str]]:
        """Show each token of a batch's texts by itself, B lists of T."""
        return self.shown(batch.inputs[self.ids])

    def shown(self, tokens: Tensor) -> list[list[str]]:
        """Show tokens [B, T], each by itself; what continues a word as the tokenizer marks it."""
        rows: list[list[int]] = tokens.tolist()
        known = {token: self._name(token) for token in {token for row in rows for token in row}}
        return [[known[token] for token in row] for row in rows]

    def _name(self, token: int) -> str:
        name = str(self.tokenizer.convert_ids_to_tokens(token))
        text = str(self.tokenizer.convert_tokens_to_string([name])).strip()
        return text or name

    def texts(self, tokens: Tensor) -> list[str]:
        """Write texts of tokens [B, T] as a reader would see them, special tokens left out."""
        written: Sequence[str] = self.tokenizer.batch_decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return list(written)
