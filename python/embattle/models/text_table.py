"""Vectors of known texts, such as those of items: an encoder, and what it gave, kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from embattle.data.batch import Batch
from embattle.models.encoder import TextEncoder

# Texts that are encoded at once where no gradient is wanted.
_AT_ONCE = 256


class TextTable(nn.Module):
    """A table of N texts' vectors, which is looked up by the texts' numbers.

    A text that is not trained on is encoded once, and again only after the encoder's weights have
    changed. `rewritten` encodes a text that an attacker may have changed: its token embeddings
    alone pass through `words`, the place of such an attack.

    Args:
        encoder: gives the vectors.
        texts: the N texts.
        trained: whether the encoder's weights are trained; otherwise they are frozen, and it stays
            in evaluation mode.
    """

    kept: Tensor
    known: Tensor

    def __init__(self, encoder: TextEncoder, texts: Sequence[str], *, trained: bool) -> None:
        super().__init__()
        self.encoder, self.texts, self.trained = encoder, list(texts), trained
        self.words = nn.Identity()
        encoder.requires_grad_(trained)
        self.register_buffer("kept", torch.zeros(len(texts), encoder.width), persistent=False)
        self.register_buffer("known", torch.zeros(len(texts), dtype=torch.bool), persistent=False)
        self._versions: list[int] = []
        self._settled = False
        self.train(self.training)

    def train(self, mode: bool = True) -> TextTable:
        """Set the mode; a frozen encoder stays in evaluation mode."""
        super().train(mode)
        if not self.trained:
            self.encoder.eval()
        return self

    def forward(self, rows: Tensor) -> Tensor:
        """Give the vectors [..., width] of the texts with the numbers `rows` [...]."""
        if self.trained and self.training and torch.is_grad_enabled():
            distinct: Tensor
            place: Tensor
            distinct, place = torch.unique(rows, return_inverse=True)
            return self._encode(distinct)[place]
        self._learn(rows)
        return self.kept[rows]

    def settle(self) -> None:
        """Encode all texts now: the weights stay as they are, and look-ups look up."""
        self.every()
        self._settled = True

    def every(self) -> Tensor:
        """Give the vectors [N, width] of all texts, without a graph."""
        self._learn(torch.arange(len(self.texts), device=self.kept.device))
        return self.kept

    def rewritten(self, text_ids: Tensor, text_mask: Tensor) -> Tensor:
        """Give the vectors [B, width] of texts as an attacker has left them.

        Args:
            text_ids, text_mask: [B, T], see `tokens`.
        """
        words = self.words(self.encoder.embedding(text_ids))
        return self.encoder.pooled(text_mask, inputs_embeds=words)

    def tokens(self, rows: Sequence[int]) -> Batch:
        """Give the tokens of texts, for `rewritten`: inputs, and what of them may move.

        The names are not those of a batch of texts: such a batch is cut wherever samples leave it.
        """
        batch = self.encoder.tokenize([self.texts[row] for row in rows])
        ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
        return Batch({"text_ids": ids, "text_mask": mask}, movable=batch.movable)

    def _encode(self, rows: Tensor) -> Tensor:
        batch = self.encoder.tokenize([self.texts[row] for row in rows.tolist()])
        inputs = batch.to(rows.device).inputs
        return self.encoder.pooled(inputs.pop("attention_mask"), **inputs)

    @torch.no_grad()
    def _learn(self, rows: Tensor) -> None:
        """Encode what is not known of these rows; texts of like length together, to pad little."""
        if self._settled:
            return
        versions = [weight._version for weight in self.encoder.parameters()]
        if versions != self._versions:
            self.known.zero_()
            self._versions = versions
        new: Tensor = torch.unique(rows[~self.known[rows]])
        if not len(new):
            return
        length = torch.tensor([len(self.texts[row]) for row in new.tolist()])
        mode = self.encoder.training
        self.encoder.eval()
        for some in torch.split(new[length.argsort().to(new.device)], _AT_ONCE):
            self.kept[some] = self._encode(some).to(self.kept.dtype)
            self.known[some] = True
        self.encoder.train(mode)
