"""`sprand finetune` on a base of 4 or 8 bits: what trains, what is verified, and what the adapter is merged into."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import load_file

from tiny_models import save_tokenizer

pytest.importorskip("trl")
pytest.importorskip("bitsandbytes")

import transformers

from sprand.cli import main
from sprand.cli.predict import load_run


def run(*arguments: object) -> int:
    return main.run([*map(str, arguments)])


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A model, whose rows of weights are whole blocks of NF4, and rows for it."""
    folder = tmp_path_factory.mktemp("packed")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=save_tokenizer(folder / "base"), hidden_size=64, intermediate_size=128, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(folder / "base")
    rows = folder / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"prompt": f"w{i} w1", "completion": f" w{i + 1}"}) for i in range(12)))
    return folder / "base", rows


@pytest.mark.parametrize("bits", [4, 8])
def test_a_packed_base_trains_and_its_adapter_merges_into_the_stored_one(bits, given, tmp_path, capsys):
    base, rows = given
    asked = ("--model", base, "--train", rows, "--eval", rows, "--max-steps", 4, "--density", 0.1, "--lr", 0.01, "--warmup", 0)
    asked = (*asked, "--max-new-tokens", 2, f"--load-in-{bits}bit", *(("--compare", "lora") if bits == 4 else ()))
    assert run("finetune", *asked, "--out", tmp_path / "out", "--verify") == 0
    said = capsys.readouterr().out
    assert said.count("(torch.equal)") == 1 and "whose other weights are not packed: the outputs differ by" in said
    results = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert [row["method"] for row in results] == (["sprand", "lora"] if bits == 4 else ["sprand"])
    assert results[0]["after"]["loss"] < results[0]["before"]["loss"]
    tuned = load_run(tmp_path / "out")
    assert any(p.dtype in (torch.uint8, torch.int8) for p in tuned.model.parameters())
    adapter = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert all(value.dtype == torch.float32 for name, value in adapter.items() if "delta" in name)
    assert run("evaluate", tmp_path / "out", rows, "--base", "--json", "--max-new-tokens", 2) == 0
    measured = json.loads(capsys.readouterr().out)
    rounding = 1e-6 if bits == 4 else 2**-8  # of the base itself: without an adapter int8 rounds inputs to 8 bits as well
    assert measured["base"]["numbers"]["loss"] == pytest.approx(results[0]["before"]["loss"], rel=rounding)
    assert measured["tuned"]["numbers"]["loss"] == pytest.approx(results[0]["after"]["loss"])

    assert run("merge", base, tmp_path / "out", tmp_path / "merged", "--verify") == 0
    merged, stored = (load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", base))
    assert {value.dtype for value in merged.values()} == {torch.bfloat16}
    changed = [name for name, value in merged.items() if not torch.equal(value, stored[name])]
    assert "model.layers.0.mlp.up_proj.weight" in changed and "lm_head.weight" not in changed


def test_what_cannot_be_with_packed_weights_is_refused(given, tmp_path, capsys, monkeypatch):
    base, rows = given
    asked = ("finetune", "--model", base, "--train", rows, "--out", tmp_path / "out", "--load-in-4bit")
    refused = {("--load-in-8bit",): "expected one of them, got both", ("--compare", "full"): "4 bits cannot all train"}
    for more, said in refused.items():
        assert run(*asked, *more) == 2
        assert said in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert run(*asked) == 2
    assert "needs the package bitsandbytes. Install: pip install" in capsys.readouterr().err
