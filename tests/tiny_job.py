"""A job of a few seconds: a small randomly initialised model, made-up reviews."""

from __future__ import annotations

import csv
import traceback
from pathlib import Path

import yaml
from embattle.cli import app
from typer.testing import CliRunner

GOOD = ["love", "great", "perfect", "soft", "flattering"]
BAD = ["hate", "poor", "itchy", "returned", "cheap"]
PLAIN = ["the", "dress", "fits", "and", "colour", "is", "shirt", "a", "size", "fabric"]


def invoke(*words: object) -> tuple[int, str]:
    """The status and everything printed, with the traceback of what the command did not expect."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    fault = result.exc_info if result.exit_code == 1 else None
    return result.exit_code, result.output + (
        "".join(traceback.format_exception(*fault)) if fault else ""
    )


def make_encoder(folder: Path) -> Path:
    """Writes a one-layer BERT with random weights and a word-level tokenizer."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *GOOD, *BAD, *PLAIN]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=32,
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    transformers.BertModel(config).save_pretrained(folder, safe_serialization=True)
    return folder


def write_reviews(path: Path, count: int = 160, *, label: str | None = None) -> None:
    """Reviews whose words give their label away."""
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "recommended"])
        for i in range(count):
            mood = GOOD if i % 2 else BAD
            words = [PLAIN[i % 10], mood[i % 5], PLAIN[(3 * i + 1) % 10], mood[(i // 5) % 5]]
            rows.writerow([" ".join([*words, PLAIN[(i // 7) % 10]]), label or i % 2])


def recipe_of(folder: Path, encoder: Path, **changes: object) -> Path:
    """A recipe for a run of a few seconds."""
    if not (folder / "reviews.csv").exists():
        write_reviews(folder / "reviews.csv")
    recipe = {
        "name": "tiny",
        "seed": 3,
        "data": {
            "path": str(folder / "reviews.csv"),
            "text": ["text"],
            "label": "recommended",
            "fractions": [0.6, 0.2, 0.2],
        },
        "model": {"pretrained": str(encoder), "max_tokens": 12},
        "threat": {"eps": 0.3},
        "train": {"steps": 12, "batch_size": 8, "learning_rate": 0.01},
        "audit": {
            "attacks": [
                {"kind": "noise", "restarts": 2},
                {"kind": "fgm"},
                {"kind": "pgd", "steps": 3, "random_start": True, "restarts": 2},
            ],
            "sweep": [0.5, 1.0, 4.0],
            "sweep_attack": {"kind": "pgd", "steps": 2},
        },
        **changes,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path
