"""`sprand finetune --dtype`: weights train as they are stored, and what `sprand merge` writes is what was trained."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from tiny_models import save_bert, save_llama

pytest.importorskip("transformers")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

import transformers

import sprand
from sprand.cli import main
from sprand.cli.finetune import models

ON_DISK = "loaded from the checkpoint that sprand merge writes, the outputs are equal (torch.equal)"


def stored(save, folder, dtype):
    """A tiny model whose files hold a dtype."""
    made = transformers.AutoModel if save is save_bert else transformers.AutoModelForCausalLM
    made.from_pretrained(save(folder), dtype=dtype).save_pretrained(folder)
    return folder


def finetuned(model, rows, out, *asked):
    """What the run says of its model, and what it has checked."""
    options = ("--max-steps", 3, "--batch-size", 8, "--density", 0.1, "--lr", 0.01, "--verify", *asked)
    assert main.run(["finetune", *map(str, ("--model", model, "--train", rows, "--out", out, *options))]) == 0
    return json.loads((out / "task.json").read_text()), json.loads((out / "results.json").read_text())["checked"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("save, pooling", [(save_bert, "model"), (save_bert, "mean"), (save_llama, "model")])
def test_what_is_trained_is_what_merge_writes(save, pooling, dtype, rows, tmp_path):
    base, out = stored(save, tmp_path / "base", dtype), tmp_path / "run"
    said, checked = finetuned(base, rows, out, "--task", "classification", "--pooling", pooling)
    assert said["dtype"] == str(dtype).removeprefix("torch.") and ON_DISK in checked
    adapter = load_file(out / "adapter" / "adapter_model.safetensors")
    head = next(p for name, p in adapter.items() if name.endswith(("classifier.weight", "score.weight")))
    assert head.dtype == torch.float32
    assert main.run(["merge", str(base), str(out / "adapter"), str(tmp_path / "merged")]) == 0
    trained = sprand.load(models.load(str(base), said["task"], 2, said["dtype"], pooling, 0)[0], out / "adapter")
    merged = models.load(str(tmp_path / "merged"), said["task"], 2, "auto", pooling, 1)[0]
    tokens = torch.arange(4, 12).view(2, 4)
    with torch.no_grad():
        one, two = (model.eval()(input_ids=tokens, attention_mask=torch.ones_like(tokens)) for model in (trained, merged))
    assert torch.equal(*(output if pooling == "mean" else output.logits for output in (one, two)))


def test_a_language_model_trains_as_it_is_stored(rows, tmp_path):
    said, checked = finetuned(
        stored(save_llama, tmp_path / "base", torch.bfloat16), rows, tmp_path / "run", "--task", "causal-lm"
    )
    assert said["dtype"] == "bfloat16" and ON_DISK in checked


@pytest.mark.parametrize("dtype, asked", [(torch.float16, ()), (torch.bfloat16, ("--dtype", "float32"))])
def test_weights_that_are_stored_otherwise_are_rounded_and_that_is_said(dtype, asked, rows, tmp_path):
    said, checked = finetuned(stored(save_bert, tmp_path / "base", dtype), rows, tmp_path / "run", *asked)
    assert said["dtype"] == "float32"
    assert checked[-1].startswith(f"trained in float32 and merged by sprand merge into {str(dtype).removeprefix('torch.')},")


def test_files_tell_the_dtype_where_the_configuration_says_another(rows, tmp_path):
    base = stored(save_bert, tmp_path / "base", torch.bfloat16)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    said, checked = finetuned(base, rows, tmp_path / "run")
    assert said["dtype"] == "bfloat16" and ON_DISK in checked


def test_without_safetensors_files_merging_is_not_compared_and_that_is_said(rows, tmp_path):
    base = save_bert(tmp_path / "base")
    torch.save(transformers.AutoModel.from_pretrained(base).state_dict(), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    said, checked = finetuned(base, rows, tmp_path / "run")
    assert said["dtype"] == "float32" and checked[-1].startswith("sprand merge was not compared: ")
