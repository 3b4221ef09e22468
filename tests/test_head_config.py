"""A merged classifier is one that transformers loads: its class, its labels and their number are in its config.json."""

from __future__ import annotations

import json

import pytest
import torch

import sprand
from checkpoints import assert_same, bert, changed, content_of, tensors_of
from sprand.adapters.file import AdapterFile
from sprand.checkpoint.diff import diff
from sprand.checkpoint.merge import merge, verify
from sprand.checkpoint.revert import revert

transformers = pytest.importorskip("transformers")
LABELS = {0: "left", 1: "right", 2: "neither"}


def classifier(base, labels=LABELS):
    """An encoder with a new head; its classes have names."""
    torch.manual_seed(1)
    numbers = {label: number for number, label in labels.items()}
    made = transformers.AutoModelForSequenceClassification
    return made.from_pretrained(base, id2label=labels, label2id=numbers, problem_type="single_label_classification")


def by_apply(model, folder):
    changed(sprand.apply(model, density=0.1, modules_to_save="auto"))
    sprand.save(model, folder)
    return sprand.merge(model)


def by_peft(model, folder):
    peft = pytest.importorskip("peft")
    from sprand.peft import SprandConfig

    model = peft.get_peft_model(model, SprandConfig(density=0.1, modules_to_save=["classifier"]))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * p.requires_grad)
    model.save_pretrained(folder)
    return model.merge_and_unload()


@pytest.mark.parametrize("door", [by_apply, by_peft])
def test_a_merged_classifier_is_loaded_with_its_labels(tmp_path, door):
    base = bert(tmp_path)
    tuned = door(classifier(base), tmp_path / "adapter")
    adapters = [(tmp_path / "adapter", 1.0)]
    said = merge(base, adapters, tmp_path / "out")
    assert set(said.config) >= {"architectures", "id2label", "label2id", "problem_type"} and said.unsaid is None
    verify(base, adapters, tmp_path / "out")
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert loaded.config.id2label == LABELS and loaded.num_labels == 3
    assert loaded.config.problem_type == "single_label_classification"
    assert_same(dict(loaded.state_dict()), dict(tuned.state_dict()))
    assert transformers.pipeline("text-classification", str(tmp_path / "out"))("w1 w2")[0]["label"] in LABELS.values()
    revert(tmp_path / "out", adapters, tmp_path / "back")
    assert content_of(tmp_path / "back") == content_of(base)


def test_a_config_of_which_nothing_changes_keeps_its_bytes(tmp_path):
    base = bert(tmp_path)
    (base / "config.json").write_bytes((base / "config.json").read_bytes().replace(b"\n", b"\r\n"))
    model = transformers.AutoModel.from_pretrained(base)
    changed(sprand.apply(model, density=0.1))
    sprand.save(model, tmp_path / "adapter")
    assert merge(base, [(tmp_path / "adapter", 1.0)], tmp_path / "out").config == ()
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()


def test_labels_of_a_head_that_the_base_has_too_are_those_of_the_adapter(tmp_path):
    base = bert(tmp_path)
    classifier(base).save_pretrained(tmp_path / "first")
    model = classifier(tmp_path / "first", {0: "a", 1: "b", 2: "c"})
    by_apply(model, tmp_path / "adapter")
    said = merge(tmp_path / "first", [(tmp_path / "adapter", 1.0)], tmp_path / "out")
    assert said.config == ("id2label", "label2id") and not said.added
    assert json.loads((tmp_path / "out" / "config.json").read_text())["label2id"] == {"a": 0, "b": 1, "c": 2}


def test_what_an_adapter_does_not_say_is_said(tmp_path):
    base = bert(tmp_path)
    by_apply(classifier(base), tmp_path / "adapter")
    adapter = AdapterFile.read(tmp_path / "adapter")
    adapter.description.pop("architecture")
    adapter.store()
    said = merge(base, [(tmp_path / "adapter", 1.0)], tmp_path / "out")
    assert (
        said.config == ()
        and "does not say of which model classifier.bias, classifier.weight is; set architectures" in said.unsaid
    )


def test_the_difference_of_two_checkpoints_has_the_head_of_the_tuned_one(tmp_path):
    base = bert(tmp_path)
    by_apply(classifier(base), tmp_path / "adapter").save_pretrained(tmp_path / "tuned")
    diff(base, tmp_path / "tuned", tmp_path / "difference")
    merge(base, [(tmp_path / "difference", 1.0)], tmp_path / "out")
    loaded, tuned = (
        transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / name) for name in ("out", "tuned")
    )
    assert loaded.config.id2label == LABELS
    assert_same(dict(loaded.state_dict()), dict(tuned.state_dict()))


def test_a_difference_finds_what_two_files_call_by_different_names(tmp_path):
    """An encoder alone, and one below a head for masked words: its tensors have a prefix, and the files share no name."""
    base = bert(tmp_path)
    tuned = transformers.BertForMaskedLM.from_pretrained(base)
    with torch.no_grad():
        tuned.bert.encoder.layer[0].output.dense.weight[0, :3] += 1
    tuned.save_pretrained(tmp_path / "tuned")
    said = diff(base, tmp_path / "tuned", tmp_path / "difference")
    assert said.changed == 3 and all(name.startswith("cls.") for name in said.added)
    assert all(name.startswith("pooler.") for name in said.missing)
    assert len(said.missing) == 2 and len(tensors_of(base)) == said.compared + 2
