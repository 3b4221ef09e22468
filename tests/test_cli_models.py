"""Which models `sprand finetune` takes for a task, and how long their rows may be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tiny_models import WORDS, save_llama, save_tokenizer

pytest.importorskip("transformers")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

import transformers

from sprand.cli import CliError, main
from sprand.cli.finetune import models

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
DECODER = {**SIZES, "vocab_size": 44, "max_position_embeddings": 20}
LEARNED_POSITIONS = {
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**DECODER)),
    "roberta": lambda: transformers.RobertaModel(transformers.RobertaConfig(**DECODER)),
    "gpt2": lambda: transformers.GPT2Model(
        transformers.GPT2Config(vocab_size=44, n_positions=20, n_embd=32, n_layer=1, n_head=2),
    ),
    "opt": lambda: transformers.OPTModel(
        transformers.OPTConfig(**DECODER | {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    ),
}


@pytest.mark.parametrize("name", LEARNED_POSITIONS)
def test_a_model_has_as_many_positions_as_it_takes(name):
    model = LEARNED_POSITIONS[name]().eval()
    positions = models.positions_of(model)
    model(torch.full((1, positions), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, positions + 1), 5))


def saved(folder: Path, model: transformers.PreTrainedModel) -> Path:
    save_tokenizer(folder)
    model.save_pretrained(folder)
    return folder


def test_an_encoder_is_no_language_model_unless_it_was_made_one(tmp_path):
    config = transformers.BertConfig(**DECODER)
    for name, model in (
        ("masked", transformers.BertForMaskedLM(config)),
        ("plain", transformers.BertModel(config)),
        (
            "distil",
            transformers.DistilBertForMaskedLM(transformers.DistilBertConfig(vocab_size=44, dim=32, n_layers=1, n_heads=2)),
        ),
    ):
        with pytest.raises(CliError, match="this is an encoder"):
            models.load(str(saved(tmp_path / name, model)), "causal-lm", 0, "float32", "auto", 0)
    config.is_decoder = True
    decoder = saved(tmp_path / "decoder", transformers.BertLMHeadModel(config))
    model, tokenizer = models.load(str(decoder), "causal-lm", 0, "float32", "auto", 0)
    assert tokenizer.model_max_length == 20 and type(model).__name__ == "BertLMHeadModel"


def test_rows_are_as_long_as_the_model_allows_and_no_longer(tmp_path, capsys):
    model, rows = save_llama(tmp_path / "model"), tmp_path / "rows.tsv"
    words = " ".join(WORDS * 3)
    rows.write_text("text\tlabel\n" + "".join(f"{words if i < 3 else 'w1'}\t{'ab'[i % 2]}\n" for i in range(20)))
    run = ["finetune", "--model", str(model), "--train", str(rows), "--eval", str(rows), "--max-steps", "1", "--out"]
    assert main.run([*run, str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "2 classes, with their training rows: a 10, b 10" in said
    assert "6 of 40 texts are longer than 64 tokens, and lose their end" in said
    assert json.loads((tmp_path / "out" / "task.json").read_text())["max_length"] == 64
    assert main.run([*run, str(tmp_path / "longer"), "--max-length", "65"]) == 2
    assert "--max-length: this model has 64 positions, got 65" in capsys.readouterr().err
