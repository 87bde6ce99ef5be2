"""Small models with random weights in folders and files: a Llama, a T5, a GGUF file of a Llama."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

WIDTH, HEADS = 16, 2


def save_tokenizer(folder: Path, words: list[str]) -> int:
    """A tokenizer of words and marks without a padding token; gives how many tokens it knows."""
    known = ["[UNK]", "[EOS]", *dict.fromkeys(words)]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[EOS]"
    ).save_pretrained(folder)
    return len(known)


def llama(vocabulary: int, layers: int = 2, tied: bool = False) -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.3,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config).eval()


def save_llama(folder: Path, words: list[str], layers: int = 2) -> Path:
    llama(save_tokenizer(folder, words), layers).save_pretrained(folder)
    return folder


def save_t5(folder: Path, words: list[str]) -> Path:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=save_tokenizer(folder, words),
        d_model=WIDTH,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=HEADS,
        pad_token_id=1,
        decoder_start_token_id=1,
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def write_gguf(path: Path, tied: bool = False) -> transformers.LlamaForCausalLM:
    """Writes a Llama whose tokens are bytes, and gives the model; its head may be its table."""
    import gguf

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<unk>", "<eos>", *letters, "Ġa"]
    model = llama(len(tokens), tied=tied)
    config: Any = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges(["Ġ a"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            # The two halves that a rotation turns together are neighbours in such files.
            heads = HEADS if "q_proj" in name else 1
            weight = weight.view(heads, 2, -1, WIDTH).transpose(1, 2).reshape(weight.shape)
        there = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(there, weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model
