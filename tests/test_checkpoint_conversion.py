"""Adapters into files of transformers: the names and tensors that it stores, as it would save the merged model itself."""

from __future__ import annotations

import json

import pytest
import torch

import sprand
from checkpoints import assert_same, changed, content_of, tensors_of, trained
from sprand.adapters.file import AdapterFile
from sprand.checkpoint import conversion
from sprand.checkpoint.combine import combine
from sprand.checkpoint.export import export
from sprand.checkpoint.merge import merge, verify
from sprand.checkpoint.revert import revert
from sprand.checkpoint.shards import open_checkpoint
from sprand.integrations.vllm import read_patches
from transformers_models import KINDS, saved

transformers = pytest.importorskip("transformers")
EVERY = {"density": 0.1, "target_modules": None}


def every_parameter(model) -> list[str]:
    """All that can be targeted: torch.nn.MultiheadAttention does not call the layer that it names `out_proj`."""
    names = (name for name, p in model.named_parameters() if p.is_contiguous())
    return [name for name in names if ".head.attention.out_proj." not in name]


def without_classes(folder):
    """The same adapter as one that does not say which model it is of, such as those of sprand 0.1.0."""
    adapter = AdapterFile.read(folder)
    adapter.description.pop("architecture")
    adapter.store()


@pytest.mark.parametrize("says", ["its class", "nothing"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_writes_what_transformers_would_save(tmp_path, kind, says):
    model = saved(kind, tmp_path / "base", transformers)
    trained(model, **EVERY, target_parameters=every_parameter(model))
    sprand.save(model, tmp_path / "adapter")
    if says == "nothing":
        without_classes(tmp_path / "adapter")
    adapters = [(tmp_path / "adapter", 1.0)]
    merge(tmp_path / "base", adapters, tmp_path / "out")
    verify(tmp_path / "base", adapters, tmp_path / "out")
    sprand.merge(model).save_pretrained(tmp_path / "expected")
    assert_same(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "expected"))
    revert(tmp_path / "out", adapters, tmp_path / "back")
    assert content_of(tmp_path / "back") == content_of(tmp_path / "base")


def test_the_probe_of_whole_rows_gives_what_all_entries_give(tmp_path, monkeypatch):
    saved("mixtral", tmp_path / "mixtral", transformers)
    saved("dinov2", tmp_path / "dinov2", transformers)
    for kind in ("mixtral", "dinov2"):
        there = open_checkpoint(tmp_path / kind)
        fast = conversion.loading_of(there, (), ())
        monkeypatch.setattr(conversion, "PROBED", None)
        dense = conversion.loading_of(there, (), ())
        for name, shape in fast.shapes.items():
            places = fast.place(name), dense.place(name)
            if places[0] is not None:
                entries = torch.arange(torch.Size(shape).numel())
                values = [torch.cat([there.read(part) for part in place.tensors])[place.positions(entries)] for place in places]
                assert torch.equal(*values), name
        monkeypatch.undo()


@pytest.mark.parametrize("kind", ["dinov2", "qwen3_moe"])
def test_other_readers_find_the_entries_as_well(tmp_path, kind):
    model = saved(kind, tmp_path / "base", transformers)
    trained(model, **EVERY, target_parameters=every_parameter(model))
    sprand.save(model, tmp_path / "adapter")
    merge(tmp_path / "base", [(tmp_path / "adapter", 1.0)], tmp_path / "merged")
    export(tmp_path / "adapter", "vllm-patch", tmp_path / "patches", tmp_path / "base")
    copy = tensors_of(tmp_path / "base")
    for name, patch in read_patches(tmp_path / "patches")[0].items():
        copy[name].view(-1)[patch.indices.long()] = patch.values
    assert_same(copy, tensors_of(tmp_path / "merged"))
    combine([(tmp_path / "adapter", 1.0)], tmp_path / "base", tmp_path / "combined")
    merge(tmp_path / "base", [(tmp_path / "combined", 1.0)], tmp_path / "again")
    assert_same(tensors_of(tmp_path / "again"), tensors_of(tmp_path / "merged"))
    loaded = sprand.load(type(model).from_pretrained(tmp_path / "base"), tmp_path / "combined")
    assert_same(dict(sprand.merge(loaded).state_dict()), dict(sprand.merge(model).state_dict()))


def test_experts_that_train_in_full_are_written_to_the_single_ones(tmp_path):
    model = saved("mixtral", tmp_path / "base", transformers)
    changed(sprand.apply(model, density=0.1, target_modules=["q_proj"], modules_to_save=["experts"]))
    sprand.save(model, tmp_path / "adapter")
    said = merge(tmp_path / "base", [(tmp_path / "adapter", 1.0)], tmp_path / "out")
    sprand.merge(model).save_pretrained(tmp_path / "expected")
    assert_same(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "expected"))
    assert not said.added and not said.config and said.unsaid is None


def test_a_part_of_a_tensor_that_trains_in_full_is_refused(tmp_path):
    model = saved("dinov2", tmp_path / "base", transformers)
    part = next(name for name in model.state_dict() if ".mlp." in name).rpartition(".")[0]
    changed(sprand.apply(model, density=0.1, exclude_modules=[part], modules_to_save=[part]))
    sprand.save(model, tmp_path / "adapter")
    base = dict(tensors_of(tmp_path / "base"))
    try:
        merge(tmp_path / "base", [(tmp_path / "adapter", 1.0)], tmp_path / "out")
    except ValueError as error:
        assert "holds it with others in" in str(error)
    else:
        pytest.fail(f"{part} was merged into {sorted(base)}")


def test_what_transformers_computes_is_refused(tmp_path, monkeypatch):
    """An operation that does more than to move entries has no entry to be written to."""
    model = saved("mixtral", tmp_path / "base", transformers)
    trained(model, **EVERY, target_parameters=["mlp.experts.down_proj"])
    sprand.save(model, tmp_path / "adapter")
    operation = transformers.core_model_loading.MergeModulelist
    own = operation.convert

    def doubled(self, *args, **kwargs):
        return {name: value * 2 for name, value in own(self, *args, **kwargs).items()}

    monkeypatch.setattr(operation, "convert", doubled)
    with pytest.raises(ValueError, match=r"transformers computes .*down_proj of .*and not by moving entries; load the model"):
        merge(tmp_path / "base", [(tmp_path / "adapter", 1.0)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_layer_that_the_checkpoint_lacks_is_no_other_one_of_it(tmp_path):
    """The pooler of a model for masked words is not its `cls.predictions.transform`."""
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "base")
    model = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base")
    with pytest.warns(UserWarning, match=r"bert.pooler.dense.weight: not in the checkpoint.*modules_to_save=\"auto\""):
        trained(model, density=0.1, exclude_modules=["classifier"], modules_to_save=["classifier"])
    sprand.save(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"no tensor for bert.pooler.dense.weight.*random values.*modules_to_save=\"auto\""):
        merge(tmp_path / "base", [(tmp_path / "adapter", 1.0)], tmp_path / "out")
    sprand.unmerge(model)
    changed(sprand.apply(model, density=0.1, modules_to_save="auto"))
    sprand.save(model, tmp_path / "adapter")
    said = merge(tmp_path / "base", [(tmp_path / "adapter", 1.0)], tmp_path / "out")
    assert {name.rpartition(".")[0] for name in said.added} == {"bert.pooler.dense", "classifier"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["BertForSequenceClassification"]
    loaded, info = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert_same(dict(loaded.state_dict()), dict(sprand.merge(model).state_dict()))
