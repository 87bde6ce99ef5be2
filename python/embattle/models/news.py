"""Clicks on news from what is written in them and in those that the reader clicked on before."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from embattle.models.encoder import TextEncoder
from embattle.models.text_table import TextTable


class NewsClicks(nn.Module):
    """One logit: the product of a reader's vector and that of a piece of news.

    Both are what a projection makes of an encoder's vectors; a reader's is the mean over her
    history and one vector that all readers share, which is all of hers while she has no history.
    It is the frame of Wu et al., "Neural News Recommendation with Multi-Head Self-Attention",
    EMNLP 2019 (NRMS), with a pretrained encoder in place of word vectors and plain means in place
    of attention over the history.

    `Site(model.texts.words)` perturbs the words of the candidate.

    Args:
        encoder: of texts.
        texts: of the news by number.
        dim: width of the vectors.
        trained: whether the encoder is trained too.
    """

    def __init__(
        self, encoder: TextEncoder, texts: Sequence[str], *, dim: int = 64, trained: bool = True
    ) -> None:
        super().__init__()
        self.texts = TextTable(encoder, texts, trained=trained)
        self.projection = nn.Linear(encoder.width, dim, bias=False)
        self.shared = nn.Parameter(torch.zeros(dim))
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, history: Tensor, text_ids: Tensor, text_mask: Tensor) -> Tensor:
        """Give the logits `[B]` of clicks.

        Args:
            history: `[B, L]` numbers of news, -1 where there are no more.
            text_ids, text_mask: `[B, T]`, the candidates, see `TextTable.tokens`.
        """
        there = (history >= 0).unsqueeze(-1)
        read = self.texts(history.clamp(min=0)) * there
        mean = read.sum(1) / there.sum(1).clamp(min=1)
        reader = self.shared + self.projection(mean)
        candidate = self.projection(self.texts.rewritten(text_ids, text_mask))
        logits: Tensor = (reader * candidate).sum(-1) / reader.shape[-1] ** 0.5 + self.bias
        return logits
