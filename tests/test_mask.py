"""Masks: saved and read back the same, refused when damaged, trained as chosen, and their picture shows where they lie."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import sprand
from hostile import edited
from models import MLP, assert_same_bits, bits, built, points_and_labels
from sprand.adapters import plots
from sprand.adapters.file import CONFIG_FILE
from sprand.adapters.state import mask_of
from sprand.selection.mask import chosen_by

FIELDS = {"strategy": "magnitude", "scope": "global", "density": 0.1, "target_modules": ["first", "second"]}


def chosen(**fields):
    return sprand.select(built(MLP), **FIELDS | fields)


def test_a_mask_is_read_back_as_it_was_saved(tmp_path):
    mask = chosen()
    assert mask.save(tmp_path / "deep" / "mask.safetensors").is_file()
    again = sprand.Mask.load(tmp_path / "deep" / "mask.safetensors")
    assert list(again) == list(mask) and again.nnz == mask.nnz == sum(len(indices) for indices in mask.values())
    assert all(torch.equal(again[name], mask[name]) and again[name].dtype == mask[name].dtype for name in mask)
    assert again.shapes == mask.shapes
    assert again.selection["strategy"] == "magnitude" and again.selection["scope"] == "global"


def test_a_random_mask_and_a_callable_say_what_is_known(tmp_path):
    def mine(name, weight, stats):
        return -weight.abs()

    assert sprand.Mask.load(chosen(strategy="random", scope="local").save(tmp_path / "a")).selection is None
    assert sprand.Mask.load(chosen(strategy=mine).save(tmp_path / "b")).selection["strategy"] == "mine"


@pytest.mark.parametrize("through", ["mask", "strategy"])
def test_an_adapter_says_how_its_entries_were_chosen(tmp_path, through):
    model = sprand.apply(built(MLP), **({"strategy": chosen()} if through == "mask" else FIELDS))
    sprand.parameters(model)[0].data.fill_(0.25)
    sprand.save(model, tmp_path)
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["selection"]["strategy"] == "magnitude"
    loaded = sprand.load(built(MLP), tmp_path)
    assert_same_bits(bits(loaded), bits(model))
    assert mask_of(loaded).selection == mask_of(model).selection


def test_a_model_trains_exactly_what_a_mask_chose():
    mask = chosen()
    model = sprand.apply(built(MLP), strategy=mask)
    assert {name: indices.tolist() for name, indices in mask_of(model).items()} == {n: i.tolist() for n, i in mask.items()}
    sprand.switch(model, None)
    with pytest.raises(ValueError, match=r"call sprand.switch\(model, name\)"):
        mask_of(model)


BAD = {
    "newer": (lambda t, d: d.update(format_version=9), "mask format 9"),
    "twice": (lambda t, d: t["second.weight"][:2].fill_(3), "index 3 .*appears twice"),
    "out of range": (lambda t, d: t["second.weight"][-1:].fill_(10**6), "out of range"),
    "other names": (lambda t, d: d["shapes"].pop("second.weight"), "names other parameters"),
    "floats": (lambda t, d: t.update({"second.weight": torch.ones(3)}), "flat integer indices"),
}


@pytest.mark.parametrize("change, message", BAD.values(), ids=BAD)
def test_a_bad_mask_is_refused(tmp_path, change, message):
    path = chosen().save(tmp_path / "mask.safetensors")
    edited(path, change, "sprand_mask")
    with pytest.raises(ValueError, match=message):
        sprand.Mask.load(path)


def test_a_damaged_file_is_refused(tmp_path):
    path = chosen().save(tmp_path / "mask.safetensors")
    whole = path.read_bytes()
    for damaged in (whole[:-5], whole[:20], whole[:-1] + bytes([whole[-1] ^ 1]), b"", b"\xff" * 64):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged"):
            sprand.Mask.load(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="is no mask of sprand"):
        sprand.Mask.load(path)
    with pytest.raises(FileNotFoundError, match="sprand select"):
        sprand.Mask.load(tmp_path / "none")


def test_a_mask_of_another_model_is_refused():
    with pytest.raises(ValueError, match="has no parameter 'first.weight'"):
        sprand.apply(nn.Sequential(nn.Linear(3, 3)), strategy=chosen())
    for width in (8, 48):  # indices that are out of range, and indices of other places
        with pytest.raises(ValueError, match=rf"first.weight is \[24, 16\] there and \[{width}, 16\] in this model"):
            sprand.apply(built(MLP, width=width), strategy=chosen())


def png(path):
    return path.read_bytes().startswith(b"\x89PNG")


def test_the_picture_of_a_draw_says_that_its_densities_are_alike(tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="the picture is drawn by matplotlib")
    monkeypatch.setattr(pyplot, "close", lambda figure: None)
    titles, fields = [], []
    for scale in (1, 3):
        cells = {("0", "up"): 0.01 * scale, ("0", "down"): 0.01, ("1", "up"): 0.0101, ("1", "down"): 0.0101}
        plots.draw([(cells, "density", "", ".2%")], tmp_path / "picture.png")
        panel = pyplot.gcf().axes[0]
        titles.append(panel.get_title())
        fields.append([text.get_text() for text in panel.texts])
    assert titles == ["density\nabout the same everywhere", "density"]
    assert fields[1] == ["3.00%", "1.00%", "1.01%", "1.01%"]
    monkeypatch.undo()
    pyplot.close("all")


def test_the_picture_of_a_model_and_of_two_masks(tmp_path):
    pytest.importorskip("matplotlib", reason="the picture is drawn by matplotlib")
    model = sprand.apply(built(MLP), density=0.1)
    assert png(sprand.plot_selection(model, tmp_path / "new" / "model.png"))
    sprand.apply(model, name="b", density=0.1, disjoint=True)
    assert png(sprand.plot_selection(model, tmp_path / "apart.png"))
    assert png(sprand.plot_selection(chosen(), tmp_path / "two.png", other=model))
    with pytest.raises(ValueError, match="no weight in common"):
        sprand.plot_selection(chosen(), tmp_path / "bad.png", other=chosen(target_modules=["third"], scope="local"))
    assert not (tmp_path / "bad.png").exists()


def test_overlap_counts_what_both_chose():
    one = sprand.Mask({"a.weight": torch.tensor([0, 1, 2, 3])}, {"a.weight": (4, 5)})
    two = sprand.Mask({"a.weight": torch.tensor([2, 3, 7, 9, 11])}, {"a.weight": (4, 5)})
    shared, chance = plots.overlaps(one, two)
    assert shared == {"a.weight": 0.5}
    assert chance == pytest.approx(5 / 20)
    assert plots.densities(two) == {"a.weight": 0.25}
    with pytest.raises(ValueError, match="is .4, 5. in one choice and .5, 4. in the other"):
        plots.overlaps(one, sprand.Mask({"a.weight": torch.tensor([1])}, {"a.weight": (5, 4)}))


@pytest.mark.parametrize(
    "name, place",
    [
        ("model.layers.11.self_attn.q_proj.weight", ("11", "q_proj")),
        ("encoder.layer.3.attention.output.dense.weight", ("3", "output.dense")),
        ("lm_head.weight", ("-", "lm_head")),
        ("0.weight", ("0", "0.weight")),
        ("h.2.mlp.experts.gate_up_proj", ("2", "gate_up_proj")),
    ],
)
def test_layer_and_kind_of_a_parameter(name, place):
    assert plots.place_of(name) == place


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match="pip install matplotlib"):
        sprand.plot_selection(chosen(), tmp_path / "a.png")


def test_the_density_of_a_trained_model_stays_after_a_step(tmp_path):
    model = sprand.apply(built(MLP), strategy=chosen())
    optimizer = sprand.SparseAdamW(model, lr=0.1)
    x, y = points_and_labels()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert plots.densities(mask_of(model)) == plots.densities(chosen())


def test_how_entries_were_chosen_in_words():
    model = sprand.apply(built(MLP), density=0.1, name="a", target_modules=["first"])
    words = []
    for fields in ({"density": 0.2, "seed": 3, "target_modules": ["first"]}, {"strategy": {"second.weight": torch.arange(5)}}):
        sprand.apply(model, name=f"b{len(words)}", disjoint=sprand.adapters.state.mask_of(model), **fields)
        words.append(chosen_by(sprand.adapters.state.mask_of(model).selection))
    sprand.combine(model, {"a": 1.0, "b0": -0.5}, "dare", density=0.5, seed=2)
    words.append(chosen_by(sprand.adapters.state.mask_of(model).selection))
    assert words == [
        "random, seed 3, density 0.2, disjoint from mask", "given indices, disjoint from mask",
        "dare of 1 x a, -0.5 x b0, density 0.5, seed 2",
    ]  # fmt: skip
