"""Tiny models of the families that people fine-tune go the whole way: trained on conversations, merged, asked, exported."""

from __future__ import annotations

import io
import json
import sys

import pytest
import torch

from tiny_models import WORDS, save_tokenizer

pytest.importorskip("transformers")
pytest.importorskip("trl")

import transformers

from sprand.adapters.file import AdapterFile
from sprand.cli import main

TEMPLATE = (
    "{% for m in messages %}{{ {'system': 'w30', 'user': 'w31', 'assistant': 'w32'}[m['role']] + ' ' }}"
    "{{ m['content'] + ' [SEP] ' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'w32 ' }}{% endif %}"
)
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3,
}  # fmt: skip
WIDE = SIZES | {"head_dim": 16}
MIXED = {"num_local_experts": 4, "num_experts_per_tok": 2}
FAMILIES = {
    "llama3": ("Llama", SIZES),
    "smollm": ("Llama", SIZES | {"tie_word_embeddings": True}),
    "gemma3": ("Gemma3Text", WIDE | {"sliding_window": 16}),
    "qwen3": ("Qwen3", WIDE),
    "phi3": ("Phi3", SIZES),
    "mistral": ("Mistral", WIDE),
    "mixtral": ("Mixtral", SIZES | MIXED),
    "qwen3_moe": ("Qwen3Moe", WIDE | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
    "gpt_oss": ("GptOss", WIDE | MIXED | {"sliding_window": 16}),
}
TOWER = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
EXPERTS = ("mixtral", "qwen3_moe", "gpt_oss")


def save(name, folder):
    """A model of a family with random weights in bfloat16, its tokenizer and a chat template."""
    vocabulary = save_tokenizer(folder)
    torch.manual_seed(0)
    if name == "gemma3_with_pictures":
        text = transformers.Gemma3TextConfig(vocab_size=vocabulary, **WIDE, sliding_window=16)
        tower = transformers.SiglipVisionConfig(**TOWER)
        config = transformers.Gemma3Config(text_config=text, vision_config=tower, mm_tokens_per_image=4, image_token_index=5)
        transformers.Gemma3ForConditionalGeneration(config).bfloat16().save_pretrained(folder)
    else:
        kind, sizes = FAMILIES[name]
        config = getattr(transformers, f"{kind}Config")(vocab_size=vocabulary, **sizes)
        transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def run(*arguments: object) -> int:
    return main.run([*map(str, arguments)])


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    turns = (
        [{"role": "user", "content": f"{WORDS[i]} w1"}, {"role": "assistant", "content": f"{WORDS[i + 1]}"},
         {"role": "user", "content": "w2"}, {"role": "assistant", "content": "w3 w4"}] for i in range(12)
    )  # fmt: skip
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"messages": messages}) for messages in turns))
    return file


@pytest.mark.parametrize("family", [*FAMILIES, "gemma3_with_pictures"])
def test_a_family_goes_the_whole_way(family, rows, tmp_path, capsys, monkeypatch):
    base, out = save(family, tmp_path / "base"), tmp_path / "out"
    experts = ("experts.gate_up_proj", "experts.down_proj")
    chosen = ("--target-parameters", ",".join(experts)) if family in EXPERTS else ("--layout", "columns")
    asked = ("--model", base, "--train", rows, "--eval", rows, "--max-steps", 2, "--batch-size", 4, "--density", 0.1)
    assert run("finetune", *asked, "--max-new-tokens", 3, *chosen, "--out", out, "--verify") == 0
    said = capsys.readouterr().out
    assert "12 conversations" in said and said.count("checked:") == 4
    targets = AdapterFile.read(out).targets
    assert any(name.endswith(experts) for name in targets) == (family in EXPERTS)
    assert not any("vision" in name for name in targets)

    assert run("merge", base, out, tmp_path / "merged", "--verify") == 0
    for name, folder in (("run", out), ("merged", tmp_path / "merged")):
        assert run("predict", folder, rows, "--max-new-tokens", 4, "-o", tmp_path / f"{name}.jsonl") == 0
    assert (tmp_path / "run.jsonl").read_text() == (tmp_path / "merged.jsonl").read_text()
    monkeypatch.setattr(sys, "stdin", io.StringIO("w5 w6\nw7"))
    capsys.readouterr()
    assert run("chat", out, "--max-new-tokens", 4) == 0
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()] == ["base", "tuned"] * 2
    code = run("export", out, "--to", "lora", "--base", base, "-o", tmp_path / "lora")
    assert code == (2 if family in EXPERTS else 0)
    if family in EXPERTS:
        assert "merge the adapter into its base instead" in capsys.readouterr().err


def test_experts_that_do_not_train_are_said(rows, tmp_path, capsys):
    base = save("mixtral", tmp_path / "base")
    asked = ("--model", base, "--train", rows, "--max-steps", 1, "--max-new-tokens", 1)
    assert run("finetune", *asked, "--target-parameters", "experts.gate_up_proj", "--out", tmp_path / "out") == 0
    assert "not trained: its experts; --target-parameters experts.down_proj adds them" in capsys.readouterr().out


@pytest.mark.parametrize("kind, said", [("Bert", "this is an encoder (bert)"), ("T5", "(t5) has an encoder and a decoder")])
def test_models_that_do_not_go_on_with_a_text_are_refused(kind, said, rows, tmp_path, capsys):
    getattr(transformers, f"{kind}Config")().save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    assert run("finetune", "--model", tmp_path / "base", "--train", rows, "--out", tmp_path / "out") == 2
    assert said in capsys.readouterr().err
