"""Adapters on disk: small, exact, atomic; damaged ones and wrong bases are refused before anything changes."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import sprand
from hostile import edited
from models import EVERY_TARGET, MLP, EveryLayer, built, points_and_labels, tokens_and_labels
from sprand.adapters.file import CONFIG_FILE, WEIGHTS_FILE
from sprand.adapters.fingerprint import DTYPES, described_target, in_full, line_of
from sprand.adapters.layout import key
from sprand.files import described


def random_deltas(model):
    generator = torch.Generator().manual_seed(1)
    for p in sprand.parameters(model):
        p.data.add_(0.1 * torch.randn(p.shape, generator=generator))
    sprand.write(model)
    return model


@pytest.fixture
def saved(tmp_path):
    model = random_deltas(sprand.apply(built(MLP), density=0.3, seed=5))
    sprand.save(model, tmp_path / "adapter")
    return model, tmp_path / "adapter"


@pytest.mark.parametrize(
    "fields",
    [
        {"density": 0.2},
        {"density": 0.2, "strategy": "uniform"},
        {"density": 1.0},
        {"density": 0.2, "layout": "columns"},
        {"density": 0.2, "layout": "columns", "strategy": "magnitude"},
    ],
    ids=["random", "uniform", "all", "columns", "chosen columns"],
)
def test_round_trip_is_exact(tmp_path, fields):
    model = random_deltas(sprand.apply(built(EveryLayer), **fields, **EVERY_TARGET))
    x, _ = tokens_and_labels()
    sprand.save(model, tmp_path)
    fresh = sprand.load(built(EveryLayer), tmp_path)
    assert torch.equal(fresh(x), model(x))
    for (name, p), (other, q) in zip(sprand.named_parameters(fresh), sprand.named_parameters(model), strict=True):
        assert name == other
        assert torch.equal(p, q)
    base = built(EveryLayer)
    sprand.unmerge(fresh)
    assert all(torch.equal(a, b) for a, b in zip(fresh.state_dict().values(), base.state_dict().values(), strict=True))


def test_given_indices_round_trip(tmp_path):
    mask = torch.rand(24, 24) < 0.2
    model = random_deltas(sprand.apply(built(MLP), strategy={"second.weight": mask}))
    sprand.save(model, tmp_path)
    fresh = sprand.load(built(MLP), tmp_path)
    assert torch.equal(fresh.second.sprand_indices, model.second.sprand_indices)
    assert torch.equal(fresh.second.weight, model.second.weight)


def test_a_random_pattern_stores_its_seed_and_values_alone(tmp_path):
    model = sprand.apply(torch.nn.Sequential(torch.nn.Linear(1024, 1024)), density=0.1)
    file = sprand.save(model, tmp_path) / WEIGHTS_FILE
    assert file.stat().st_size < 4.1 * sprand.parameters(model)[0].numel()
    with safe_open(file, framework="pt") as content:
        assert list(content.keys()) == ["base_model.model.0.sprand_delta.weight", "base_model.model.sprand_draw"]
    description = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert description["seed"] == 0
    assert description["targets"]["0.weight"].startswith(f"1024x1024 {sprand.parameters(model)[0].numel()} float32 ")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (3,), (24, 16), (2, 3, 4)])
def test_what_is_said_of_a_weight_comes_back_from_its_line(shape, dtype):
    target = described_target(shape, torch.ones(shape, dtype=DTYPES[dtype]).flatten())
    line = line_of(target)
    assert isinstance(line, str) and in_full({"a": line}) == {"a": target}
    assert in_full({"a": line_of(target | {"axis": 1})}) == {"a": target | {"axis": 1}}
    for more in ({"frozen": {"nnz": 1, "fingerprint": target["fingerprint"]}}, {"fingerprint": {}, "quantized": "4 bits"}):
        assert line_of(target | more) == target | more
    for other in (line[:-1], f"{line} ", line.upper(), line.replace(dtype, "int8"), f"-{line}"):
        assert in_full({"a": other}) == {"a": other}


def test_loading_replaces_values_and_keeps_parameters(saved):
    _, path = saved
    model = sprand.load(built(MLP), path)
    before, values = sprand.parameters(model), [p.detach().clone() for p in sprand.parameters(model)]
    for p in before:
        p.data.zero_()
    sprand.load(model, path)
    assert all(a is b for a, b in zip(sprand.parameters(model), before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(sprand.parameters(model), values, strict=True))
    assert torch.equal(model.second.weight, saved[0].second.weight)
    sprand.unmerge(model)
    sprand.apply(model, density=0.3, seed=6)
    with pytest.raises(ValueError, match="loaded already, with other entries"):
        sprand.load(model, path)


@pytest.mark.parametrize(("trained", "used"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("float32", "float16")])
def test_the_base_may_be_loaded_in_another_dtype(tmp_path, trained, used):
    """The same checkpoint in another precision is the same base; another checkpoint is not."""
    trained, used = getattr(torch, trained), getattr(torch, used)
    model = random_deltas(sprand.apply(built(MLP).to(trained), density=0.3))
    sprand.save(model, tmp_path)
    assert sprand.load(built(MLP).to(used), tmp_path).second.weight.dtype == used
    with pytest.raises(ValueError, match="trained on another base"):
        sprand.load(built(MLP, seed=1).to(used), tmp_path)


def with_indices(indices):
    def change(tensors, description):
        description |= {"strategy": "given", "indices_saved": True, "density": None}
        for name in description["targets"]:
            tensors[key("indices", name)] = torch.arange(tensors[key("delta", name)].numel(), dtype=torch.int32)
        name = next(iter(description["targets"]))
        indices(tensors[key("indices", name)])

    return change


def setting(position, value):
    return with_indices(lambda indices: indices.__setitem__(position, value))


def shape(tensors, description):
    description["targets"]["second.weight"] = description["targets"]["second.weight"].replace("24x24", "24x25")


def count(tensors, description):
    tensors[key("delta", "second.weight")] = tensors[key("delta", "second.weight")][:-1].clone()


def not_finite(tensors, description):
    tensors[key("delta", "second.weight")][0] = float("nan")


def renamed(tensors, description):
    description["targets"]["fourth.weight"] = description["targets"].pop("second.weight")
    tensors[key("delta", "fourth.weight")] = tensors.pop(key("delta", "second.weight"))


def newer(tensors, description):
    description["format_version"] = 99


EDITS = {
    "duplicate index": (setting(1, 0), "index 0 .* appears twice"),
    "unsorted index": (setting(5, 2), "index 2 .* not above"),
    "negative index": (setting(0, -1), "index -1 .* out of range"),
    "index out of range": (setting(-1, 10**6), "out of range"),
    "shape": (shape, r"second.weight is \[24, 24\] here and \[24, 25\] there"),
    "count": (count, "expected 173 values for second.weight, got"),
    "not finite": (not_finite, "not finite"),
    "another model": (renamed, "no parameter 'fourth.weight'"),
    "newer format": (newer, "has format 99"),
}


@pytest.mark.parametrize(("change", "message"), EDITS.values(), ids=EDITS.keys())
def test_bad_adapters_are_refused_and_change_nothing(saved, change, message):
    _, path = saved
    edited(path / WEIGHTS_FILE, change)
    model = built(MLP)
    with pytest.raises(ValueError, match=message):
        sprand.load(model, path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), built(MLP).state_dict().values(), strict=True))
    assert not any(isinstance(m, sprand.SparseModule) for m in model.modules())


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "text"])
def test_damaged_files_are_refused(saved, damage):
    _, path = saved
    file = path / WEIGHTS_FILE
    content = bytearray(file.read_bytes())
    if damage == "truncated":
        content = content[: len(content) // 2]
    elif damage == "flipped":
        content[-3] ^= 0x10
    elif damage == "empty":
        content = bytearray()
    else:
        content = bytearray(b"not a safetensors file at all")
    file.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        sprand.load(built(MLP), path)


def test_a_wrong_base_is_refused(saved):
    _, path = saved
    model = built(MLP, seed=1)
    with pytest.raises(ValueError, match="trained on another base"):
        sprand.load(model, path)
    merged = sprand.merge(sprand.load(built(MLP), path))
    with pytest.raises(ValueError, match="trained on another base"):
        sprand.load(merged, path)


def test_no_adapter(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected adapter_model.safetensors"):
        sprand.load(built(MLP), tmp_path)
    save_file({"a": torch.zeros(3)}, tmp_path / WEIGHTS_FILE)
    with pytest.raises(ValueError, match="is no adapter of sprand"):
        sprand.load(built(MLP), tmp_path)


def test_a_failed_load_leaves_a_trained_model_trained(saved):
    model, path = saved
    x, _ = points_and_labels()
    out = model(x)
    edited(path / WEIGHTS_FILE, not_finite)
    with pytest.raises(ValueError, match="not finite"):
        sprand.load(model, path, name="second")
    assert torch.equal(model(x), out)


def test_values_that_are_not_finite_are_not_saved(saved):
    model, path = saved
    before = (path / WEIGHTS_FILE).read_bytes()
    model.second.sprand_delta.data[0] = float("nan")
    with pytest.raises(ValueError, match=r"second.weight are not finite"):
        sprand.save(model, path)
    assert (path / WEIGHTS_FILE).read_bytes() == before


def test_a_full_disk_leaves_the_old_adapter(saved, monkeypatch):
    model, path = saved
    before = {file.name: file.read_bytes() for file in path.iterdir()}

    def full(tensors, name, metadata):
        Path(name).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(described, "save_file", full)
    model.second.sprand_delta.data.add_(1.0)
    with pytest.raises(OSError, match="No space left"):
        sprand.save(model, path)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before


def test_a_kill_during_save_leaves_the_old_adapter(saved):
    """The process dies with the new file written but not yet in place."""
    model, path = saved
    before = (path / WEIGHTS_FILE).read_bytes()
    script = textwrap.dedent(
        f"""
        import os, signal, sys
        sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}
        import sprand
        from models import MLP, built
        model = sprand.load(built(MLP), {str(path)!r})
        os.replace = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
        sprand.parameters(model)[0].data.zero_()
        sprand.save(model, {str(path)!r})
        """
    )
    done = subprocess.run([sys.executable, "-c", script], env=os.environ, check=False)
    assert done.returncode == -signal.SIGKILL
    assert (path / WEIGHTS_FILE).read_bytes() == before
    assert torch.equal(sprand.load(built(MLP), path).second.weight, model.second.weight)


def test_saving_over_an_adapter_replaces_it(saved):
    model, path = saved
    model.second.sprand_delta.data.add_(1.0)
    sprand.save(model, path)
    assert sorted(file.name for file in path.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]
    sprand.write(model)
    assert torch.equal(sprand.load(built(MLP), path).second.weight, model.second.weight)


def test_nothing_is_active(saved):
    model, path = saved
    sprand.switch(model, None)
    with pytest.raises(ValueError, match="no adapter is active"):
        sprand.save(model, path)


def test_copies_save_on_their_own(saved, tmp_path):
    model, _ = saved
    other = copy.deepcopy(model)
    other.second.sprand_delta.data.zero_()
    sprand.save(other, tmp_path / "other")
    sprand.write(model)
    assert torch.equal(sprand.load(built(MLP), tmp_path / "other").second.weight, built(MLP).second.weight)


def test_the_same_adapter_gives_the_same_bytes(saved, tmp_path):
    model, path = saved
    sprand.save(model, tmp_path / "again")
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        assert (tmp_path / "again" / name).read_bytes() == (path / name).read_bytes()


@pytest.mark.parametrize("name", ["taken", "adapter.safetensors"])
def test_the_name_of_a_file_is_refused_and_left_alone(tmp_path, name):
    (tmp_path / "taken").write_text("mine")
    model = sprand.apply(torch.nn.Sequential(torch.nn.Linear(8, 8)), density=0.5)
    with pytest.raises(ValueError, match=f"an adapter is a folder, and .*{name} is the name of a file; give a folder"):
        sprand.save(model, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"] and (tmp_path / "taken").read_text() == "mine"
