"""Files of whole columns: what they take, that they come back to the bit, and that damage is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import sprand
from models import EVERY_TARGET, MLP, EveryLayer, assert_same_bits, bits, built
from peft_models import llama, peft
from sprand.adapters.file import CONFIG_FILE, WEIGHTS_FILE, AdapterFile
from sprand.adapters.layout import FORMAT_VERSION, WITHOUT_COLUMNS
from sprand.checkpoint.combine import combine
from sprand.checkpoint.inspect import inspect
from sprand.layers.units import Units
from sprand.peft import SprandConfig
from test_columns_choice import columns_of
from test_selection import TARGETS

PeftModel = peft.PeftModel
DOORS = pytest.mark.parametrize("door", ["save", "save_pretrained"])


def header_of(file):
    content = file.read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


def saved(folder, door, model, fields):
    """An adapter of columns that was written by a door: the model, and its file's tensors and description."""
    if door == "save":
        sprand.save(sprand.apply(model, **fields), folder)
    else:
        own = {"mask" if key == "strategy" and not isinstance(value, str) else key: value for key, value in fields.items()}
        peft.get_peft_model(model, SprandConfig(**own)).save_pretrained(folder)
    return load_file(folder / WEIGHTS_FILE), json.loads((folder / CONFIG_FILE).read_text())


@DOORS
def test_a_random_draw_of_columns_is_a_seed_and_values(tmp_path, door):
    tensors, settings = saved(tmp_path, door, built(MLP), {"density": 0.3, "layout": "columns", "seed": 4})
    assert {name.rpartition("sprand_")[2] for name in tensors} == {"delta.weight", "draw"}
    assert settings["versions"]["format_version"] == FORMAT_VERSION
    loaded = sprand.load(built(MLP), tmp_path)
    other = sprand.apply(built(MLP), density=0.3, layout="columns", seed=4)
    assert_same_bits(loaded._sprand.current.indices, other._sprand.current.indices)
    assert AdapterFile.read(tmp_path).config.layout == "columns"


@DOORS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_chosen_columns_are_values_and_four_bytes_a_column(tmp_path, door, dtype):
    mask = sprand.select(llama().to(dtype), strategy="magnitude", density=0.2, layout="columns")
    tensors, settings = saved(tmp_path, door, llama().to(dtype), {"strategy": mask})
    count = sum(indices.numel() // mask.shapes[name][0] for name, indices in mask.items())
    assert sum(value.numel() * value.element_size() for value in tensors.values()) == 4 * mask.nnz + 4 * count
    assert all(isinstance(line, str) and line.endswith(" axis 1") for line in settings["targets"].values())
    file = AdapterFile.read(tmp_path)
    for name, indices in mask.items():
        assert torch.equal(file.entries(name)[0], indices)
        axis, columns = file.columns(name)
        assert axis == 1 and columns.tolist() == columns_of(mask.shapes[name], 1, indices)
    assert "magnitude, local, density 0.2, columns" in inspect(tmp_path).chosen


@DOORS
def test_adapters_of_entries_keep_the_format_that_older_readers_know(tmp_path, door):
    _, settings = saved(tmp_path, door, built(MLP), {"density": 0.3})
    assert settings["versions"]["format_version"] == WITHOUT_COLUMNS


@DOORS
def test_whole_columns_are_stored_as_such_whoever_chose_them(tmp_path, door):
    given = {
        "first.weight": Units(24, 16, 1).entries(torch.tensor([2, 9])),  # columns
        "second.weight": Units(1, 24, 24).entries(torch.tensor([3])),  # a row
        "third.weight": torch.tensor([0, 5, 30]),
        "third.bias": torch.tensor([1]),
    }
    tensors, _ = saved(tmp_path, door, built(MLP), {"strategy": given})
    kinds = {name.removeprefix("base_model.model."): value.tolist() for name, value in tensors.items() if "delta" not in name}
    assert kinds == {
        "first.sprand_columns": [2, 9], "second.sprand_rows": [3], "third.sprand_indices": [0, 5, 30],
        "third.sprand_indices_bias": [1],
    }  # fmt: skip
    for loaded in (sprand.load(built(MLP), tmp_path), PeftModel.from_pretrained(built(MLP), tmp_path)):
        sprand.save(loaded, tmp_path / "again") if not isinstance(loaded, PeftModel) else loaded.save_pretrained(
            tmp_path / "again"
        )
        assert_same_bits(load_file(tmp_path / "again" / WEIGHTS_FILE), tensors)


def test_combined_columns_are_columns(tmp_path):
    save_file(bits(built(MLP)), tmp_path / "base.safetensors")
    for seed in (0, 1):
        sprand.save(sprand.apply(built(MLP), density=0.3, layout="columns", seed=seed), tmp_path / str(seed))
    combine([(tmp_path / "0", 1.0), (tmp_path / "1", 1.0)], tmp_path / "base.safetensors", tmp_path / "both")
    both, parts = AdapterFile.read(tmp_path / "both"), [AdapterFile.read(tmp_path / str(seed)) for seed in (0, 1)]
    for name in TARGETS:
        union = sorted(set().union(*(part.columns(name)[1].tolist() for part in parts)))
        assert both.tensors[f"base_model.model.{name.removesuffix('.weight')}.sprand_columns"].tolist() == union


def test_a_mask_of_columns_is_four_bytes_a_column(tmp_path):
    fields = {"strategy": "magnitude", "density": 0.2, "layout": "columns"}
    mask = sprand.select(built(EveryLayer), **fields, **EVERY_TARGET)
    loaded = sprand.Mask.load(mask.save(tmp_path / "mask"))
    assert loaded == mask and loaded.shapes == mask.shapes and loaded.selection == mask.selection
    assert all(loaded[name].dtype == mask[name].dtype for name in mask)
    tensors = load_file(tmp_path / "mask")
    assert tensors["conv.weight"].tolist() == columns_of(mask.shapes["conv.weight"], 1, mask["conv.weight"])
    entries = sprand.select(built(MLP), strategy="magnitude").save(tmp_path / "entries")
    headers = (header_of(file)["__metadata__"]["sprand_mask"] for file in (tmp_path / "mask", entries))
    versions = [json.loads(header)["format_version"] for header in headers]
    assert versions == [2, 1]  # older readers know the second


DAMAGED = {
    "out of range": lambda columns: columns.index_fill(0, torch.tensor([0]), 99).sort().values,
    "twice": lambda columns: columns.index_copy(0, torch.tensor([1]), columns[:1]),
    "fewer": lambda columns: columns[1:],
    "fractions": lambda columns: columns.float(),
    "negative": lambda columns: columns - 100,
}


@pytest.mark.parametrize("damage", DAMAGED)
@DOORS
def test_damaged_columns_are_refused_and_the_model_left_alone(tmp_path, door, damage):
    mask = sprand.select(built(MLP), strategy="magnitude", density=0.3, layout="columns")
    tensors, _ = saved(tmp_path, "save_pretrained", built(MLP), {"strategy": mask})
    key = "base_model.model.second.sprand_columns"
    save_file(tensors | {key: DAMAGED[damage](tensors[key])}, tmp_path / WEIGHTS_FILE)
    model = built(MLP)
    with pytest.raises(ValueError, match=r"second.weight"):
        sprand.load(model, tmp_path) if door == "save" else PeftModel.from_pretrained(model, tmp_path)
    assert_same_bits(bits(model), bits(built(MLP)))


def test_an_axis_that_cannot_be_is_refused(tmp_path):
    mask = sprand.select(built(MLP), strategy="magnitude", density=0.3, layout="columns")
    _, settings = saved(tmp_path / "adapter", "save_pretrained", built(MLP), {"strategy": mask})
    line = settings["targets"]["second.weight"]
    for wrong in (
        line.replace("axis 1", "axis 2"),
        line.replace("24x24", "576"),
        line.replace("24x24", "0x24"),
        f"{line} axis 1",
    ):
        shutil.copytree(tmp_path / "adapter", tmp_path / "wrong", dirs_exist_ok=True)
        (tmp_path / "wrong" / CONFIG_FILE).write_text(
            json.dumps(settings | {"targets": settings["targets"] | {"second.weight": wrong}})
        )
        for load in (sprand.load, PeftModel.from_pretrained):
            with pytest.raises(ValueError, match=r"second.weight"):
                load(built(MLP), tmp_path / "wrong")
