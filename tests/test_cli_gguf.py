"""GGUF files as models to fine-tune: what the writer of llama.cpp wrote gives the same model, and bad files are refused."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("gguf")
pytest.importorskip("transformers")

import transformers

from gguf_models import llama, written
from sprand.cli import CliError, main
from sprand.cli.finetune.gguf import as_folder


@pytest.fixture(scope="module")
def original() -> torch.nn.Module:
    return llama()


def test_a_file_is_unpacked_to_the_model_that_it_was_written_from(original, tmp_path):
    file = written(original, tmp_path / "tiny.gguf")
    folder = as_folder(str(file), tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32 and not getattr(model, "is_quantized", False)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in original.state_dict().items())
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "<s>user\nhi</s>\n"
    assert tokenizer.decode(tokenizer("Two wörds")["input_ids"], skip_special_tokens=True) == "Two wörds"


def test_half_precision_stays_half_precision(original, tmp_path):
    file = written(original, tmp_path / "tiny.gguf", kind=1)
    model = transformers.AutoModelForCausalLM.from_pretrained(as_folder(str(file), tmp_path / "model"))
    name = "model.layers.0.self_attn.k_proj.weight"
    assert model.dtype == torch.float16
    assert torch.equal(model.state_dict()[name], original.state_dict()[name].half())


def test_a_folder_is_unpacked_once_and_anew_when_the_file_changes(original, tmp_path):
    packed, folder = tmp_path / "packed", tmp_path / "model"
    packed.mkdir()
    file = written(original, packed / "tiny.gguf")
    assert as_folder(str(packed), folder) == as_folder(str(file), folder) == str(folder)
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert as_folder(str(packed), folder) == str(folder)
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    written(original, file, kind=1)
    as_folder(str(packed), folder)
    assert transformers.AutoConfig.from_pretrained(folder).dtype == torch.float16
    assert as_folder(str(folder), tmp_path / "other") == str(folder)


def test_files_that_are_none_are_refused_and_nothing_is_written(original, tmp_path):
    file = written(original, tmp_path / "tiny.gguf")
    (tmp_path / "text.gguf").write_text("hello")
    (tmp_path / "short.gguf").write_bytes(file.read_bytes()[:600])
    for name, said in (
        ("text.gguf", "got a file of another form"),
        ("short.gguf", "cannot be read as GGUF"),
        (".", "got 3; name one"),
    ):
        with pytest.raises(CliError, match=said):
            as_folder(str(tmp_path / name), tmp_path / "model")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "kept").touch()
    with pytest.raises(CliError, match="exists; give a new folder"):
        as_folder(str(file), tmp_path / "mine")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "short.gguf", "text.gguf", "tiny.gguf"]


def test_finetune_trains_on_it_and_its_adapter_merges(original, tmp_path):
    file, out = written(original, tmp_path / "tiny.gguf"), tmp_path / "out"
    (tmp_path / "text.txt").write_text("a line of text\n" * 60)
    asked = ("--max-steps", "2", "--batch-size", "4", "--max-length", "16", "--density", "0.05")
    assert main.run(["finetune", "--model", str(file), "--train", str(tmp_path / "text.txt"), "--out", str(out), *asked]) == 0
    assert main.run(["merge", str(out / "model"), str(out / "adapter"), str(tmp_path / "merged"), "--verify"]) == 0
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    assert any(not torch.equal(value, original.state_dict()[name]) for name, value in merged.items())
