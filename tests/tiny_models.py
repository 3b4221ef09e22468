"""Tiny models with random weights and tokenizers of their own, made on the spot, and data that they can learn."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

WORDS = [f"w{i}" for i in range(40)]


def save_tokenizer(folder: Path):
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", eos_token="[SEP]"
    )
    fast.save_pretrained(folder)
    return len(vocabulary)


def save_bert(folder: Path, seed: int = 0) -> Path:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=save_tokenizer(folder), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64, hidden_dropout_prob=0.1,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def save_llama(folder: Path) -> Path:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=save_tokenizer(folder), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=64, max_position_embeddings=64,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def save_rows(path: Path, count: int = 96) -> Path:
    """Rows whose label is the half of the vocabulary most of their words come from."""
    source = random.Random(0)
    lines = ["text\tlabel"]
    for _ in range(count):
        label = source.randrange(2)
        own = WORDS[:20] if label else WORDS[20:]
        lines.append(
            " ".join(source.choice(own if source.random() < 0.9 else WORDS) for _ in range(source.randint(4, 9)))
            + f"\t{'ab'[label]}"
        )
    path.write_text("\n".join(lines) + "\n")
    return path
