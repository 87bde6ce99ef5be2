"""What tasks share that look up the vectors of known texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from embattle.data.account import COUNTED, Account
from embattle.errors import InputError
from embattle.models.encoder import TextEncoder
from embattle.models.pretrained import count_longer, load_encoder, load_tokenizer, saved_encoder
from embattle.models.recipe import EncoderRecipe
from embattle.tasks.base import Task


class EncodedTexts(Task):
    """A task whose model has a `TextTable`, called `texts`.

    What is saved can be loaded where the pretrained model is not.

    Attributes:
        model_options: with those of `EncoderRecipe`.
        texts: what the table holds; `read` sets them.
    """

    model_options: EncoderRecipe
    texts: list[str]

    _folder: Path | None = None

    def text_encoder(self) -> TextEncoder:
        """Give the encoder: the pretrained one or, while a model is loaded, that of its folder."""
        options = self.model_options
        encoder, tokenizer = (
            load_encoder(options.pretrained, options.layers, options.dropout)
            if self._folder is None
            else saved_encoder(self._folder)
        )
        return TextEncoder(
            encoder, tokenizer, pooling=options.pooling, max_tokens=options.max_tokens
        )

    def note_encoding(self, account: Account, model: nn.Module | None = None) -> None:
        """Note how many texts are cut; without a model its tokenizer is loaded."""
        texts, tokens = self.texts[:COUNTED], self.model_options.max_tokens
        if model is not None:
            cut = model.texts.encoder.count_cut(texts)  # type: ignore[union-attr, operator]
        else:
            try:
                tokenizer = load_tokenizer(self.model_options.pretrained)
            except InputError as error:
                account.note("read by the model", f"not known: {error}")
                return
            cut = count_longer(tokenizer, texts, tokens)
        account.note_cut(cut, len(self.texts), tokens)

    def facts(self) -> dict[str, Any]:
        """Give the texts too."""
        return {**super().facts(), "texts": self.texts}

    def restore(self, facts: dict[str, Any]) -> None:
        """Take over the texts too."""
        super().restore(facts)
        self.texts = list(facts["texts"])

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write the encoder's configuration and tokenizer too."""
        super().save(model, folder)
        model.texts.encoder.save_parts(folder)  # type: ignore[union-attr, operator]

    def load(self, folder: Path) -> nn.Module:
        """Read back what `save` wrote, in evaluation mode."""
        self._folder = folder
        try:
            return super().load(folder)
        finally:
            self._folder = None
