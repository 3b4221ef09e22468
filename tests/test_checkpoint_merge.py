"""Merging adapters into checkpoint files gives the bits of loading, merging and saving the model; nothing wrong gets written."""

from __future__ import annotations

import os

import pytest
import torch

import sprand.checkpoint.shards
from checkpoints import DTYPES, assert_same, bert, changed, content_of, llama, plain, redrawn, tensors_of, trained
from sprand.adapters.file import AdapterFile
from sprand.checkpoint import stream
from sprand.checkpoint.merge import merge, verify
from sprand.checkpoint.revert import revert
from sprand.checkpoint.stream import RewrittenShard

transformers = pytest.importorskip("transformers")


def load(folder, dtype="auto"):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def saved(model, folder):
    model.save_pretrained(folder)
    return tensors_of(folder)


def bases(folder, dtype):
    """A base in several files, and two adapters for it."""
    base = llama(folder, dtype, "30KB" if dtype == torch.float32 else "15KB")
    assert len(list(base.glob("model-*.safetensors"))) > 2
    for number, fields in enumerate(
        ({"density": 0.05}, {"density": 0.02, "strategy": "magnitude", "target_modules": ["q_proj"]})
    ):
        model = trained(load(base), number, seed=number, **fields)
        sprand.save(model, folder / f"adapter{number}")
    return base, folder / "adapter0", folder / "adapter1"


@pytest.fixture(scope="module", params=DTYPES.values(), ids=DTYPES)
def each(request, tmp_path_factory):
    return bases(tmp_path_factory.mktemp("each"), request.param)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return bases(tmp_path_factory.mktemp("sharded"), torch.bfloat16)


def test_one_adapter_gives_the_bits_of_load_merge_and_save(each, tmp_path):
    base, adapter, _ = each
    said = merge(base, [(adapter, 1.0)], tmp_path / "out")
    expected = saved(sprand.merge(sprand.load(load(base), adapter)), tmp_path / "expected")
    assert_same(tensors_of(tmp_path / "out"), expected)
    assert said.entries == sum(target["nnz"] for target in AdapterFile.read(adapter).targets.values())
    verify(base, [(adapter, 1.0)], tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    model = load(tmp_path / "out")
    assert torch.equal(model.lm_head.weight, load(base).lm_head.weight)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "out"]


@pytest.mark.parametrize("weights", [(0.7, -1.3), (1.0, 1.0), (0.5, None)])
def test_a_weighted_sum_gives_the_bits_of_switch(each, tmp_path, weights):
    base, *adapters = each
    mixture = [(path, weight) for path, weight in zip(adapters, weights, strict=True) if weight is not None]
    merge(base, mixture, tmp_path / "out")
    model = load(base)
    for path, _ in mixture:
        sprand.load(model, path, name=str(path))
    sprand.switch(model, {str(path): weight for path, weight in mixture})
    assert_same(tensors_of(tmp_path / "out"), saved(sprand.merge(model), tmp_path / "expected"))
    verify(base, mixture, tmp_path / "out")


def test_revert_gives_back_the_bytes_of_the_base(each, tmp_path):
    base, *adapters = each
    mixture = [(adapters[0], 0.5), (adapters[1], 2.0)]
    merge(base, mixture, tmp_path / "out")
    revert(tmp_path / "out", mixture, tmp_path / "back")
    assert content_of(tmp_path / "back") == content_of(base)


def test_revert_refuses_what_it_cannot_prove(sharded, tmp_path):
    base, one, two = sharded
    merge(base, [(one, 1.0)], tmp_path / "out")
    with pytest.raises(ValueError, match="merged from other adapters, or with other weights"):
        revert(tmp_path / "out", [(two, 1.0)], tmp_path / "back")
    with pytest.raises(ValueError, match="merged from other adapters, or with other weights"):
        revert(tmp_path / "out", [(one, 0.5)], tmp_path / "back")
    trained_tensor = sprand.checkpoint.shards.open_checkpoint(tmp_path / "out").tensors["model.layers.0.mlp.up_proj.weight"]
    file = tmp_path / "out" / trained_tensor.file
    content = bytearray(file.read_bytes())
    index = int(_indices(base, one)["model.layers.0.mlp.up_proj.weight"][3])
    content[trained_tensor.begin + index * trained_tensor.dtype.itemsize] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"up_proj.weight holds other values than the merge wrote"):
        revert(tmp_path / "out", [(one, 1.0)], tmp_path / "back")
    (tmp_path / "out" / "sprand_revert.dat").unlink()
    with pytest.raises(FileNotFoundError, match="do not determine the base value"):
        revert(tmp_path / "out", [(one, 1.0)], tmp_path / "back")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def _indices(base, adapter):
    return sprand.adapters.state.mask_of(sprand.load(load(base), adapter))


def test_a_wrong_base_is_refused_and_nothing_is_written(sharded, tmp_path, monkeypatch):
    base, adapter, _ = sharded
    merge(base, [(adapter, 1.0)], tmp_path / "merged")
    monkeypatch.setattr(RewrittenShard, "write", lambda *arguments: pytest.fail("something was written"))
    with pytest.raises(ValueError, match="was trained on another base"):
        merge(tmp_path / "merged", [(adapter, 1.0)], tmp_path / "twice")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged"]


def test_a_base_with_one_other_entry_is_refused_and_nothing_is_left(sharded, tmp_path):
    base, adapter, _ = sharded
    model = load(base)
    name, index = "model.layers.1.mlp.up_proj.weight", int(_indices(base, adapter)["model.layers.1.mlp.up_proj.weight"][-1])
    model.get_parameter(name).data.view(-1)[index] += 1
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=rf"trained on another base: the entries it changes in {name}"):
        merge(tmp_path / "other", [(adapter, 1.0)], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other"]


def test_a_stopped_merge_goes_on(sharded, tmp_path, monkeypatch):
    base, adapter, _ = sharded
    wrote, write = [], RewrittenShard.write

    def stop_at_the_third(rewritten, *rest):
        wrote.append(rewritten.shard.name)
        if len(wrote) == 3:
            raise KeyboardInterrupt
        write(rewritten, *rest)

    monkeypatch.setattr(RewrittenShard, "write", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        merge(base, [(adapter, 1.0)], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    merge(base, [(adapter, 1.0)], tmp_path / "out")
    assert wrote[3:] == wrote[2:3] + wrote[4:] and not set(wrote[:2]) & set(wrote[3:])
    verify(base, [(adapter, 1.0)], tmp_path / "out")
    merge(base, [(adapter, 1.0)], tmp_path / "whole")
    assert content_of(tmp_path / "out") == content_of(tmp_path / "whole")


def test_what_was_left_of_another_merge_is_not_used(sharded, tmp_path, monkeypatch):
    base, one, two = sharded
    write = RewrittenShard.write

    def stop(*arguments):
        write(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(RewrittenShard, "write", stop)
        merge(base, [(one, 1.0)], tmp_path / "out")
    merge(base, [(two, 1.0)], tmp_path / "out")
    verify(base, [(two, 1.0)], tmp_path / "out")


def test_verify_names_a_tensor_that_is_different(sharded, tmp_path):
    base, adapter, _ = sharded
    merge(base, [(adapter, 1.0)], tmp_path / "out")
    tensor = sprand.checkpoint.shards.open_checkpoint(tmp_path / "out").tensors["model.norm.weight"]
    with open(tmp_path / "out" / tensor.file, "r+b") as file:
        file.seek(tensor.begin)
        file.write(b"\x01")
    with pytest.raises(ValueError, match="is different; merge again"):
        verify(base, [(adapter, 1.0)], tmp_path / "out")


def test_a_file_system_that_shares_blocks_gives_the_same(sharded, tmp_path, monkeypatch):
    """Stands in for one: the blocks are there at once, and only changed parts are written over them."""
    base, adapter, _ = sharded
    merge(base, [(adapter, 1.0)], tmp_path / "plain")

    def share(source, target):
        os.pwrite(target, os.pread(source, os.fstat(source).st_size, 0), 0)
        return True

    monkeypatch.setattr(stream, "_share", share)
    monkeypatch.setattr(stream, "_copy", lambda *arguments: pytest.fail("copied what was shared"))
    merge(base, [(adapter, 1.0)], tmp_path / "shared")
    assert content_of(tmp_path / "shared") == content_of(tmp_path / "plain")


def test_without_copies_in_the_kernel_it_gives_the_same(sharded, tmp_path, monkeypatch):
    base, adapter, _ = sharded
    merge(base, [(adapter, 1.0)], tmp_path / "plain")

    def refuse(*arguments):
        raise OSError(95, "not supported")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    merge(base, [(adapter, 1.0)], tmp_path / "read")
    assert content_of(tmp_path / "read") == content_of(tmp_path / "plain")


def test_an_existing_folder_is_refused_and_an_empty_one_is_filled(sharded, tmp_path):
    base, adapter, _ = sharded
    (tmp_path / "out").mkdir()
    merge(base, [(adapter, 1.0)], tmp_path / "out")
    with pytest.raises(FileExistsError, match="give a new folder"):
        merge(base, [(adapter, 1.0)], tmp_path / "out")


def test_weights_in_another_form_are_not_carried_over(sharded, tmp_path):
    base, adapter, _ = sharded
    other = tmp_path / "base"
    other.mkdir()
    for path in base.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    (other / "pytorch_model.bin").write_bytes(b"stale")
    (other / "1_Pooling").mkdir()
    (other / "1_Pooling" / "config.json").write_text("{}")
    said = merge(other, [(adapter, 1.0)], tmp_path / "out")
    assert said.left_out == ("pytorch_model.bin",)
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()
    assert (tmp_path / "out" / "1_Pooling" / "config.json").read_text() == "{}"


@pytest.mark.parametrize("frozen", [False, True], ids=["head", "head and frozen entries"])
def test_a_classifier_on_an_encoder_gains_its_head(tmp_path, frozen):
    """Names lose the prefix `bert.`, the head is added, and a mask that was redrawn left entries behind."""
    base = bert(tmp_path)
    make = transformers.AutoModelForSequenceClassification.from_pretrained
    model = make(base, num_labels=3)
    changed(sprand.apply(model, density=0.05, modules_to_save=["classifier"]))
    if frozen:
        redrawn(model)
    sprand.save(model, tmp_path / "adapter")
    said = merge(base, [(tmp_path / "adapter", 1.0)], tmp_path / "out")
    assert set(said.added) == {"classifier.weight", "classifier.bias"}
    merged, expected = make(tmp_path / "out", num_labels=3), sprand.merge(model)
    assert_same(dict(merged.state_dict()), dict(expected.state_dict()))
    verify(base, [(tmp_path / "adapter", 1.0)], tmp_path / "out")
    revert(tmp_path / "out", [(tmp_path / "adapter", 1.0)], tmp_path / "back")
    assert content_of(tmp_path / "back") == content_of(base)
    with pytest.raises(ValueError, match="which cannot be mixed; merge it alone, with weight 1"):
        merge(base, [(tmp_path / "adapter", 0.5)], tmp_path / "half")


def test_a_head_in_the_checkpoint_is_written_over(sharded, tmp_path):
    base = sharded[0]
    model = changed(sprand.apply(load(base), density=0.01, modules_to_save=["lm_head"]))
    sprand.save(model, tmp_path / "adapter")
    merge(base, [(tmp_path / "adapter", 1.0)], tmp_path / "out")
    assert_same(tensors_of(tmp_path / "out"), saved(sprand.merge(model), tmp_path / "expected"))
    revert(tmp_path / "out", [(tmp_path / "adapter", 1.0)], tmp_path / "back")
    assert content_of(tmp_path / "back") == content_of(base)


def test_one_file_by_its_name(sharded, tmp_path):
    tensors = {"a.weight": torch.randn(16, 8), "b": torch.zeros(0), "c": torch.tensor(3.0)}
    plain(tmp_path / "base", tensors)
    (tmp_path / "base" / "model.safetensors").rename(tmp_path / "base" / "weights.safetensors")
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(8, 16, bias=False)})
    model["a"].weight.data.copy_(tensors["a.weight"])
    trained(model, density=0.2)
    sprand.save(model, tmp_path / "adapter")
    merge(tmp_path / "base" / "weights.safetensors", [(tmp_path / "adapter", 1.0)], tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["sprand_revert.dat", "weights.safetensors"]
    with pytest.raises(FileNotFoundError, match=r"give one of its files by name \(weights.safetensors\)"):
        merge(tmp_path / "base", [(tmp_path / "adapter", 1.0)], tmp_path / "other")
