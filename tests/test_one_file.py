"""One adapter, one file: whoever wrote it, PEFT loads it and every command of sprand reads it, to the bit."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file

import sprand
from checkpoints import tensors_of
from models import MLP, assert_same_bits, bits, built
from peft_models import llama, peft, train, trainable
from sprand.adapters.file import CONFIG_FILE, WEIGHTS_FILE, AdapterFile
from sprand.adapters.layout import portable
from sprand.checkpoint.combine import combine
from sprand.checkpoint.diff import diff
from sprand.checkpoint.export import export
from sprand.checkpoint.inspect import inspect
from sprand.checkpoint.merge import merge
from sprand.cli import main
from sprand.peft import SprandConfig
from sprand.serving import AdapterPool

PeftModel = peft.PeftModel
DENSITY = 0.05


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A checkpoint folder of a tiny language model."""
    folder = tmp_path_factory.mktemp("machine") / "llama-base"
    llama().save_pretrained(folder)
    return folder


def loaded(base):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(base).eval()


def by_save(base, folder):
    model = sprand.apply(loaded(base), density=DENSITY, seed=3, modules_to_save=["lm_head"])
    train(model, sprand.SparseAdamW(model, lr=1e-2))
    sprand.save(model, folder)
    return bits(sprand.merge(model))


def by_save_pretrained(base, folder, **fields):
    options = {"density": DENSITY, "seed": 3, "modules_to_save": ["lm_head"]} | fields
    model = peft.get_peft_model(loaded(base), SprandConfig(**options))
    train(model, sprand.SparseAdamW(model, lr=1e-2))
    model.save_pretrained(folder)
    return bits(model.merge_and_unload())


def by_save_pretrained_with_a_mask(base, folder):
    mask = sprand.select(loaded(base), strategy="magnitude", density=DENSITY, target_modules=["q_proj", "down_proj"])
    return by_save_pretrained(base, folder, mask=mask, density=None, modules_to_save=None)


def by_save_of_columns(base, folder):
    model = sprand.apply(loaded(base), density=DENSITY, seed=3, layout="columns", modules_to_save=["lm_head"])
    train(model, sprand.SparseAdamW(model, lr=1e-2))
    sprand.save(model, folder)
    return bits(sprand.merge(model))


def by_save_of_chosen_columns(base, folder):
    model = sprand.apply(loaded(base), density=DENSITY, layout="columns", strategy="magnitude", scope="global")
    train(model, sprand.SparseAdamW(model, lr=1e-2))
    sprand.save(model, folder)
    return bits(sprand.merge(model))


def by_save_pretrained_of_columns(base, folder):
    return by_save_pretrained(base, folder, layout="columns", density=0.1)


def by_save_pretrained_of_chosen_columns(base, folder):
    mask = sprand.select(loaded(base), strategy="magnitude", density=DENSITY, layout="columns", target_modules=["down_proj"])
    return by_save_pretrained(base, folder, mask=mask, density=None, modules_to_save=None)


def by_trainer(base, folder):
    from trainers import trainer_of

    model = peft.get_peft_model(loaded(base), SprandConfig(density=DENSITY, seed=3))
    trainer = trainer_of(model, folder.parent / "trainer", max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    shutil.copytree(folder.parent / "trainer" / "checkpoint-2", folder)
    return bits(trainer.model.merge_and_unload())


def by_trl(base, folder):
    trl = pytest.importorskip("trl", reason="TRL trains the adapter")
    datasets = pytest.importorskip("datasets", reason="TRL takes datasets of this library")
    args = trl.SFTConfig(
        str(folder), max_steps=2, save_strategy="no", per_device_train_batch_size=2, report_to="none", disable_tqdm=True,
        use_cpu=True, bf16=False, max_length=16,
    )  # fmt: skip
    rows = datasets.Dataset.from_dict({"input_ids": [[start + step for step in range(8)] for start in range(16)]})
    tokenizer = built_tokenizer(folder.parent / "tokenizer")
    trainer = trl.SFTTrainer(
        loaded(base), args, train_dataset=rows, peft_config=SprandConfig(density=DENSITY, seed=3), processing_class=tokenizer
    )
    trainer.train()
    trainer.save_model(str(folder))
    return bits(trainer.model.merge_and_unload())


def built_tokenizer(folder):
    import transformers

    from tiny_models import save_tokenizer

    folder.mkdir()
    save_tokenizer(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


def by_finetune(base, folder):
    text = folder.parent / "text.txt"
    text.write_text("\n".join(" ".join(f"w{(start + step) % 40}" for step in range(8)) for start in range(16)))
    model = folder.parent / "model"
    shutil.copytree(base, model)
    built_tokenizer(folder.parent / "tokenizer").save_pretrained(model)
    run = ["finetune", "--model", model, "--train", text, "--task", "causal-lm", "--out", folder.parent / "run", "--max-steps", 2]
    assert main.run([*map(str, run), "--density", str(DENSITY)]) == 0
    shutil.copytree(folder.parent / "run" / "adapter", folder)
    return bits(sprand.merge(sprand.load(loaded(base), folder)))


WRITERS = {
    writer.__name__.removeprefix("by_"): writer
    for writer in (
        by_save, by_save_pretrained, by_save_pretrained_with_a_mask, by_save_of_columns, by_save_of_chosen_columns,
        by_save_pretrained_of_columns, by_save_pretrained_of_chosen_columns, by_trainer, by_trl, by_finetune,
    )
}  # fmt: skip


@pytest.fixture(scope="module", params=WRITERS)
def written(request, base, tmp_path_factory):
    """The folder of an adapter, and the weights that it makes of the base."""
    folder = tmp_path_factory.mktemp(request.param) / "adapter"
    return folder, WRITERS[request.param](base, folder)


def from_pretrained(base, folder, out):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = PeftModel.from_pretrained(loaded(base), folder)
    return bits(model.merge_and_unload())


def from_its_configuration(base, folder, out):
    """As PEFT's `AutoPeftModel` does it: the configuration is read first, by PEFT's own class."""
    config = peft.PeftConfig.from_pretrained(folder)
    return bits(PeftModel.from_pretrained(loaded(base), folder, config=config).merge_and_unload())


def load(base, folder, out):
    return bits(sprand.merge(sprand.load(loaded(base), folder)))


def pool(base, folder, out):
    model = loaded(base)
    adapters = AdapterPool(model)
    adapters.add("one", folder)
    adapters.switch("one")
    return bits(model)


def command(*words):
    assert main.run([*map(str, words)]) == 0


def merged_by_the_command(base, folder, out):
    command("merge", base, folder, out)
    return tensors_of(out)


def combined_by_the_command(base, folder, out):
    command("combine", folder, "--base", base, "-o", out / "one", "--drop-heads")
    combined = AdapterFile.read(out / "one")
    own = AdapterFile.read(folder)
    assert not combined.heads
    for name in own.targets:
        assert all(map(torch.equal, combined.entries(name), own.entries(name)))
    assert_same_bits(from_pretrained(base, out / "one", out), load(base, out / "one", out))
    return load(base, folder, out)


def exported_by_the_command(base, folder, out):
    command("export", folder, "--to", "vllm-patch", "--base", base, "-o", out)
    tensors, patches = tensors_of_base(base), load_file(out / "patches.safetensors")
    for name, tensor in tensors.items():
        if f"values.{name}" in patches:
            tensor.view(-1)[patches[f"indices.{name}"].long()] = patches[f"values.{name}"]
    return tensors


def tensors_of_base(base):
    return {name: value.clone() for name, value in tensors_of(base).items()}


READERS = {
    reader.__name__: reader
    for reader in (
        from_pretrained, from_its_configuration, load, pool, merged_by_the_command, combined_by_the_command,
        exported_by_the_command,
    )
}  # fmt: skip


@pytest.mark.parametrize("reader", READERS)
def test_every_writer_and_every_reader(written, base, tmp_path, reader):
    folder, weights = written
    assert_same_bits(READERS[reader](base, folder, tmp_path / "out"), weights)


@pytest.mark.parametrize("door", ["save", "save_pretrained"])
def test_inspect_says_the_same_of_both(base, tmp_path, door, capsys):
    WRITERS[door](base, tmp_path / "adapter")
    report = inspect(tmp_path / "adapter", base)
    assert report.chosen == "random, density 0.05, seed 3" and report.saved == {"lm_head.weight": [64, 32]}
    command("inspect", tmp_path / "adapter", "--base", base)
    said = capsys.readouterr().out
    assert f"{report.nnz:,} trained entries" in said and "base: llama-base" in said


@pytest.mark.parametrize("door", ["save", "save_pretrained_with_a_mask"])
def test_others_leave_out_what_either_trained(base, tmp_path, door):
    WRITERS[door](base, tmp_path / "adapter")
    mask = sprand.select(loaded(base), strategy="magnitude", density=0.9, disjoint=tmp_path / "adapter")
    adapter = AdapterFile.read(tmp_path / "adapter")
    for name in adapter.targets:
        assert not torch.isin(mask[name], adapter.entries(name)[0]).any()


def test_no_path_of_the_machine_is_in_the_files(base, tmp_path):
    for writer in (by_save, by_save_pretrained, by_save_pretrained_with_a_mask):
        writer(base, tmp_path / writer.__name__)
    PeftModel.from_pretrained(loaded(base), tmp_path / "by_save").save_pretrained(tmp_path / "again")
    combine([(tmp_path / "by_save", 1.0)], base, tmp_path / "combined", drop_heads=True)
    shutil.copytree(base, tmp_path / "tuned")
    merge(base, [(tmp_path / "by_save", 1.0)], tmp_path / "merged")
    diff(base, tmp_path / "merged", tmp_path / "difference")
    export(tmp_path / "by_save", "supertuning", tmp_path / "exported", base)
    for folder in ("by_save", "by_save_pretrained", "by_save_pretrained_with_a_mask", "again", "combined", "exported"):
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            content = (tmp_path / folder / name).read_bytes()
            assert str(base.parent).encode() not in content and str(tmp_path).encode() not in content, (folder, name)
        assert json.loads((tmp_path / folder / CONFIG_FILE).read_text())["base_model_name_or_path"] == "llama-base"
    assert AdapterFile.read(tmp_path / "difference").base_model == "llama-base"


def test_a_base_is_named_as_anyone_can_find_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    names = ("Qwen/Qwen3-4B", "gpt2", "models/mine", str(tmp_path / "models" / "mine"), "./gone/mine", "~/mine", "", None)
    expected = ["Qwen/Qwen3-4B", "gpt2", "mine", "mine", "mine", "mine", None, None]
    assert [portable(name) for name in names] == expected
    assert portable("models\\mine") == portable("C:\\models\\mine") == "mine"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("make", [lambda: built(MLP, width=256), llama], ids=["MLP", "Llama"])
@pytest.mark.parametrize("door", ["save", "save_pretrained"])
def test_a_random_draw_is_a_seed_and_four_bytes_a_weight(tmp_path, door, make, dtype):
    """The rest of the folder is less than 6 KB for the two layers of a Llama, of 14 weights, and grows by 320 bytes a weight."""
    model = make().to(dtype)
    if door == "save":
        sprand.save(sprand.apply(model, density=0.5), tmp_path)
    else:
        model = peft.get_peft_model(model, SprandConfig(density=0.5))
        model.save_pretrained(tmp_path)
        (tmp_path / "README.md").unlink()  # the model card, which is PEFT's
    weights = trainable(model)
    rest = sum(path.stat().st_size for path in tmp_path.iterdir()) - 4 * sum(p.numel() for p in weights)
    assert rest < 6_000 and rest < 900 + 320 * len(weights)


def test_given_entries_are_values_and_indices(tmp_path):
    mask = {"second.weight": torch.arange(0, 576, 5)}
    sprand.save(sprand.apply(built(MLP), strategy=mask), tmp_path / "save")
    peft.get_peft_model(built(MLP), SprandConfig(mask=mask)).save_pretrained(tmp_path / "save_pretrained")
    own, theirs = (load_file(tmp_path / door / WEIGHTS_FILE) for door in ("save", "save_pretrained"))
    assert_same_bits(own, theirs)
    assert {name.rpartition("sprand_")[2] for name in own} == {"delta.weight", "indices"}
