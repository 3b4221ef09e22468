"""Adapter names meet checkpoint names: prefixes, fused experts, tied weights; what is ambiguous or missing is refused."""

from __future__ import annotations

import pytest
import torch

import sprand
from checkpoints import assert_same, bert, changed, content_of, plain, tensors_of, trained
from sprand.checkpoint import conversion
from sprand.checkpoint.merge import merge
from sprand.checkpoint.names import resolve
from sprand.checkpoint.revert import revert
from sprand.checkpoint.shards import open_checkpoint


def checkpoint(folder, names, config=None):
    return open_checkpoint(plain(folder, {name: torch.zeros(2, 3) for name in names}, config))


CASES = {
    "equal": (["a.0.w", "b.w"], ["a.0.w", "b.w"], ["a.0.w", "b.w"]),
    "prefix there": (["model.layers.0.w", "lm_head.w"], ["layers.0.w"], ["model.layers.0.w"]),
    "prefix here": (["encoder.layer.0.w"], ["bert.encoder.layer.0.w"], ["encoder.layer.0.w"]),
    "wrapped": (["encoder.layer.0.w", "embeddings.w"], ["encoder.encoder.layer.0.w"], ["encoder.layer.0.w"]),
    "other prefix": (["bert.encoder.layer.0.w"], ["encoder.encoder.layer.0.w"], ["bert.encoder.layer.0.w"]),
    "moved": (["language_model.model.layers.1.w"], ["model.language_model.layers.1.w"], ["language_model.model.layers.1.w"]),
}


@pytest.mark.parametrize(("there", "wanted", "expected"), CASES.values(), ids=CASES)
def test_one_prefix_may_change(tmp_path, there, wanted, expected):
    found, _ = resolve(checkpoint(tmp_path, there), {name: (2, 3) for name in wanted})
    assert [found[name].tensors for name in wanted] == [(name,) for name in expected]


def test_a_head_keeps_its_name_where_the_encoder_loses_its_prefix(tmp_path):
    there = checkpoint(tmp_path, ["encoder.layer.0.w"])
    _, others = resolve(there, {"bert.encoder.layer.0.w": (2, 3)}, ["classifier.weight"])
    assert others["classifier.weight"].tensors == ("classifier.weight",)


REFUSED = {
    "ambiguous": (["a.layer.0.w", "b.layer.0.w"], ["layer.0.w"], r"could be a.layer.0.w or b.layer.0.w"),
    "another layer is no prefix": (["layer.1.w"], ["layer.0.w"], r"no tensor for layer.0.w \[2, 3\] \(nearest: layer.1.w\)"),
    "a module of another name": (
        ["bert.layer.0.w", "cls.transform.dense.w"],
        ["bert.layer.0.w", "bert.pooler.dense.w"],
        "no tensor for bert.pooler.dense.w",
    ),
    "a lone module of another name": (["cls.transform.dense.w"], ["pooler.dense.w"], "no tensor for pooler.dense.w"),
    "one is missing": (["m.layer.0.w"], ["layer.0.w", "layer.1.w"], "no tensor for layer"),
}


@pytest.mark.parametrize(("there", "wanted", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_one_prefix_is_refused(tmp_path, there, wanted, message):
    with pytest.raises(ValueError, match=message):
        resolve(checkpoint(tmp_path, there), {name: (2, 3) for name in wanted})


def test_a_mean_pooled_classifier_merges_into_its_encoder(tmp_path):
    transformers = pytest.importorskip("transformers")
    from sprand.cli.finetune.models import MeanPoolClassifier

    base = bert(tmp_path)
    model = MeanPoolClassifier(transformers.AutoModel.from_pretrained(base, add_pooling_layer=False), 2)
    changed(sprand.apply(model, density=0.05, exclude_modules=["pooled_classifier"], modules_to_save=["pooled_classifier"]))
    sprand.save(model, tmp_path / "adapter")
    said = merge(base, [(tmp_path / "adapter", 1.0)], tmp_path / "out")
    assert set(said.added) == {"pooled_classifier.weight", "pooled_classifier.bias"}
    assert "of no class of transformers" in said.unsaid
    sprand.merge(model)
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "out", add_pooling_layer=False)
    assert_same(dict(loaded.state_dict()), dict(model.encoder.state_dict()))
    assert torch.equal(tensors_of(tmp_path / "out")["pooled_classifier.weight"], model.pooled_classifier.weight)


def test_where_transformers_is_not_installed_a_refusal_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, "is_installed", lambda: False)
    there = checkpoint(tmp_path, ["visual.merger.mlp.w"], {"model_type": "qwen2_vl"})
    with pytest.raises(
        ValueError, match="no tensor for model.visual.merge.w.*or install transformers, which knows under which names"
    ):
        resolve(there, {"model.visual.merge.w": (2, 3)})


def test_a_head_that_may_be_there_behind_a_prefix_is_not_added_beside_it(tmp_path):
    there = checkpoint(tmp_path, ["layer.0.w", "pooler.dense.w"])
    with pytest.raises(ValueError, match="bert.pooler.dense.w could be a new tensor or pooler.dense.w"):
        resolve(there, {"layer.0.w": (2, 3)}, ["bert.pooler.dense.w"])


def test_experts_in_an_unknown_layout_are_refused_with_what_to_do(tmp_path):
    there = checkpoint(tmp_path, ["layers.0.mlp.experts.w13"])
    with pytest.raises(ValueError, match=r"no tensor for .*gate_up_proj.*then sprand.load, sprand.merge and save_pretrained"):
        resolve(there, {"layers.0.mlp.experts.gate_up_proj": (3, 4, 5)})


TIED = {"tie_word_embeddings": True}


def embedding(rows=30, columns=8):
    torch.manual_seed(3)
    model = torch.nn.Module()
    model.embed_tokens = torch.nn.Embedding(rows, columns)
    return model


@pytest.mark.parametrize("other", ["same", "different"])
def test_both_copies_of_a_tied_embedding_change_if_they_are_one(tmp_path, other):
    model = embedding()
    weight = model.embed_tokens.weight.detach().clone()
    head = weight.clone() if other == "same" else weight + 1
    base = plain(tmp_path / "base", {"embed_tokens.weight": weight, "lm_head.weight": head}, TIED)
    trained(model, density=0.2, target_modules=None, target_parameters=["embed_tokens.weight"])
    sprand.save(model, tmp_path / "adapter")
    merge(base, [(tmp_path / "adapter", 1.0)], tmp_path / "out")
    found = tensors_of(tmp_path / "out")
    assert torch.equal(found["embed_tokens.weight"], model.embed_tokens.weight)
    assert torch.equal(found["lm_head.weight"], model.embed_tokens.weight if other == "same" else head)
    revert(tmp_path / "out", [(tmp_path / "adapter", 1.0)], tmp_path / "back")
    assert content_of(tmp_path / "back") == content_of(base)


def test_a_tied_head_that_is_not_stored_is_its_embedding(tmp_path):
    there = checkpoint(tmp_path, ["model.embed_tokens.weight"], TIED)
    assert resolve(there, {"lm_head.weight": (2, 3)})[0]["lm_head.weight"].tensors == ("model.embed_tokens.weight",)
    with pytest.raises(ValueError, match="no tensor for lm_head.weight"):
        resolve(checkpoint(tmp_path / "untied", ["model.embed_tokens.weight"], {}), {"lm_head.weight": (2, 3)})


def test_a_quantized_tensor_is_refused(tmp_path):
    model = torch.nn.ModuleDict({"up": torch.nn.Linear(8, 8, bias=False)})
    trained(model, density=0.2)
    sprand.save(model, tmp_path / "adapter")
    base = plain(tmp_path / "base", {"up.weight": torch.zeros(8, 8, dtype=torch.int8)})
    with pytest.raises(ValueError, match="up.weight is stored as I8.*merge into the checkpoint that is not quantized"):
        merge(base, [(tmp_path / "adapter", 1.0)], tmp_path / "out")
