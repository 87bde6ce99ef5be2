"""Item texts that are rewritten so that the item is recommended, or no longer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("typer")

import tiny_models
from embattle.models.encoder import TextEncoder
from embattle.models.hybrid import HybridMF
from embattle.models.llm import build
from embattle.models.pretrained import load_encoder
from embattle.poisoning.rewriting import HybridReader, PromptReader, rewrite_text, whole_words
from tiny_job import BAD, GOOD, PLAIN, make_encoder

USERS, TARGET = 16, 1
TEXTS = ["love the dress", "poor itchy size", "the colour is great", "soft shirt", "cheap fabric"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> HybridMF:
    """Users who like good words: the projection of texts is fitted to them."""
    folder = make_encoder(tmp_path_factory.mktemp("encoder"))
    encoder = TextEncoder(*load_encoder(str(folder), None, 0.0), pooling="mean", max_tokens=12)
    torch.manual_seed(1)
    made = HybridMF(USERS, encoder, TEXTS, dim=4, std=0.1)
    with torch.no_grad():
        for weight in (made.user.weight, made.projection.weight):
            nn.init.normal_(weight, std=1.0)
        made.user.weight.add_(1.0)
    return made.eval().requires_grad_(False)


def others(model: HybridMF) -> torch.Tensor:
    scores = model.scores(torch.arange(USERS))
    return scores[:, [i for i in range(len(TEXTS)) if i != TARGET]]


@pytest.mark.parametrize("demote", [False, True])
def test_a_text_is_rewritten_for_the_hybrid(model: HybridMF, demote: bool) -> None:
    reader = HybridReader(model, torch.arange(USERS), TARGET)
    beside = others(model)
    allowed = whole_words(reader.tokenizer, len(reader.embedding.weight), least=1)
    found = rewrite_text(reader, beside, k=2, swaps=2, allowed=allowed, demote=demote)
    own = model.scores(torch.arange(USERS))[:, TARGET]
    clean = ((beside >= own[:, None]).sum(1) < 2).double().mean()
    assert found.clean == pytest.approx(float(clean))
    assert found.before == TEXTS[TARGET]
    if demote:
        assert found.with_own < found.clean
    else:
        assert found.with_own > found.clean
    # Every text is scored as the model scores an item with that text.
    made = HybridMF(USERS, model.texts.encoder, [*TEXTS], dim=4)
    made.load_state_dict(model.state_dict())
    made.texts.texts[TARGET] = found.one
    new = made.eval().scores(torch.arange(USERS))[USERS // 2 :, TARGET]
    half = ((beside[USERS // 2 :] >= new[:, None]).sum(1) < 2).double().mean()
    assert found.with_one == pytest.approx(float(half))
    known = {*GOOD, *BAD, *PLAIN}
    for text in {*found.own, found.one}:
        words = text.split()
        assert len(words) == 3
        assert set(words) <= known
        assert sum(a != b for a, b in zip(words, TEXTS[TARGET].split(), strict=True)) <= 2


def test_a_title_is_rewritten_for_a_language_model(tmp_path: Path) -> None:
    words = ["Red", "Blue", "Green", "White", "House", "River", "Night"]
    asking = "She liked . Will she like ? yes no ,"
    tiny_models.save_llama(tmp_path / "llama", [*words, *asking.split(" ")], layers=2)
    torch.manual_seed(0)
    made: Any = build(
        str(tmp_path / "llama"),
        layers=None,
        rank=2,
        alpha=4.0,
        prompt="She liked {liked}. Will she like {title}?",
        answers=(" no", " yes"),
        max_tokens=24,
    )
    nn.init.normal_(made.answers.weight, std=3.0)
    made.eval().requires_grad_(False)
    histories = [["Red House"], ["Blue River", "Green Night"], ["White House"], ["Red River"]] * 2
    reader = PromptReader(made, histories, "Blue Night")
    lead = reader.scores_of("Blue Night", slice(None))
    tokens, where = reader.tokens()
    assert torch.allclose(reader.scores(tokens), lead, atol=1e-5)
    assert int(where.sum()) == 16
    # Each user has one other title that is a little better.
    beside = lead[:, None] + 1e-4
    allowed = torch.zeros(len(reader.embedding.weight), dtype=torch.bool)
    allowed[made.prompts.tokenizer.convert_tokens_to_ids(words)] = True
    found = rewrite_text(reader, beside, k=1, swaps=1, tries=20, allowed=allowed)
    assert (found.clean, found.clean_second) == (0, 0)
    assert found.with_own > 0
    assert all(len(text.split()) == 2 and set(text.split()) <= set(words) for text in found.own)
    after = reader.scores_of(found.one, slice(4, None))
    assert found.with_one == float((after > beside[4:, 0]).double().mean())


def test_what_cannot_be_rewritten_is_refused(model: HybridMF) -> None:
    reader = HybridReader(model, torch.arange(USERS), TARGET)
    with pytest.raises(ValueError, match=r"others must be \[16, 9 or more\]"):
        rewrite_text(reader, others(model), k=9)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        rewrite_text(reader, others(model), k=0)
    with pytest.raises(ValueError, match="needs two users"):
        rewrite_text(HybridReader(model, torch.arange(1), TARGET), others(model)[:1], k=2)


class Tokens:
    """A tokenizer of some pieces."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str | None]:
        return [self.names[i] if i < len(self.names) else None for i in ids]


def test_whole_words_are_told_from_pieces() -> None:
    pieces = Tokens("[PAD]", "dress", "##es", "red", "2020")
    # The table of tokens may be longer than the vocabulary.
    assert whole_words(pieces, 7).tolist() == [False, True, False, False, False, False, False]
    marked = Tokens("<s>", "\u0120dress", "dress", "\u0120re", "\u2581night")
    assert whole_words(marked, 5).tolist() == [False, True, False, False, True]
