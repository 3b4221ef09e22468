"""Adapters, masks and states of whoever: whatever their bytes are, a reader gives what was written or a sentence."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

import sprand
from hostile import assert_untouched, outcome, same, state_of, written
from models import MLP, assert_same_bits, built
from sprand.adapters import layout
from sprand.adapters.file import CONFIG_FILE, KEY, WEIGHTS_FILE, AdapterFile
from sprand.adapters.layout import head_key, key
from sprand.checkpoint.export import export
from sprand.checkpoint.inspect import inspect
from sprand.checkpoint.merge import merge
from sprand.checkpoint.shards import read_header
from sprand.files import described, states


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return written(tmp_path_factory.mktemp("hostile"))


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    """No power is lost here: hundreds of small files need not wait for the disk."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


DELTA, INDICES, HEAD = key("delta", "second.weight"), key("indices", "second.weight"), head_key("third.bias")


def header_and_tensors(path):
    """What the bytes of an adapter file say and hold."""
    with safe_open(path / WEIGHTS_FILE, framework="pt") as content:
        tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
        return json.loads(content.metadata()[KEY]), tensors


def contents(path):
    """What an adapter file says and holds."""
    adapter = AdapterFile.read(path)
    return adapter.description, adapter.tensors


READERS = {
    "drawn": (f"drawn/{WEIGHTS_FILE}", lambda root: contents(root / "drawn")),
    "given": (f"given/{WEIGHTS_FILE}", lambda root: contents(root / "given")),
    "frozen": (f"frozen/{WEIGHTS_FILE}", lambda root: contents(root / "frozen")),
    "mask": ("mask.safetensors", lambda root: dict(sprand.Mask.load(root / "mask.safetensors"))),
    "state": ("state.safetensors", lambda root: states.read(root / "state.safetensors", "test")),
}


def mutated(content: bytes, source: random.Random) -> bytes:
    """Other bytes: flipped, replaced, cut, repeated, inserted or zeroed, in the header as often as behind it."""
    data = bytearray(content)
    header = 8 + int.from_bytes(data[:8], "little")
    for _ in range(source.choice((1, 1, 1, 2, 8))):
        at = source.randrange(min(header, len(data)) if source.random() < 0.5 else len(data)) if data else 0
        kind = source.randrange(6)
        if kind == 0 and data:
            data[at] ^= 1 << source.randrange(8)
        elif kind == 1 and data:
            data[at] = source.randrange(256)
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            del data[at : at + source.randrange(1, 9)]
        elif kind == 4:
            data[at:at] = bytes(data[at : at + 8]) or b"\0"
        else:
            data[at : at + 8] = b"\0\0\0\0\0\0\0\xff"[: len(data) - at]
    return bytes(data)


@pytest.mark.parametrize("name", READERS)
def test_changed_bytes_are_refused_or_change_nothing(folder, name):
    path, read = READERS[name]
    content, whole = (folder / path).read_bytes(), read(folder)
    refused = 0
    try:
        for seed in range(400):
            other = mutated(content, random.Random(seed))
            (folder / path).write_bytes(other)
            found = outcome(lambda: read(folder))
            refused += found is None
            assert found is None or same(found, whole), seed
    finally:
        (folder / path).write_bytes(content)
    assert refused > 300
    assert same(read(folder), whole)


@settings(max_examples=150, deadline=None)
@given(content=st.one_of(st.binary(max_size=300), st.binary(max_size=200).map(lambda b: len(b).to_bytes(8, "little") + b)))
def test_any_bytes_at_all_are_refused(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "anything.safetensors"
    file.write_bytes(content)
    for read in (AdapterFile.read, sprand.Mask.load, lambda path: states.read(path, "test")):
        with pytest.raises(ValueError):
            read(file)
    outcome(lambda: read_header(file))  # an empty file of safetensors is one


def test_a_flipped_byte_leaves_the_model_untouched(folder):
    """Into a plain model, and beside an adapter that it holds."""
    plain_model, holder = built(MLP), sprand.load(built(MLP), folder / "drawn", name="first")
    content, file = (folder / "given" / WEIGHTS_FILE).read_bytes(), folder / "given" / WEIGHTS_FILE
    before, held = state_of(plain_model), state_of(holder)
    try:
        for at in random.Random(1).sample(range(len(content)), 60):
            file.write_bytes(content[:at] + bytes([content[at] ^ 0x15]) + content[at + 1 :])
            for model, was in ((plain_model, before), (holder, held)):
                assert outcome(lambda model=model: sprand.load(model, folder / "given", name="second")) is None
                assert_untouched(model, was)
    finally:
        file.write_bytes(content)


WRONG = (None, [], {}, "", "x", -1, 0, 1.5, True, 10**30, [[]], {"a": None}, ["x"] * 3, [2**62, 2**62], [-1, -576], [1] * 100)


def places(value, path=()):
    """The paths of all values in a description."""
    if path:
        yield path
    for part, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(item, (*path, part))


def resealed(folder: Path, out: Path, change) -> Path:
    """The same adapter with its description changed, and checksums that are right."""
    description, tensors = header_and_tensors(folder)
    change(description, tensors)
    described.write(out / WEIGHTS_FILE, KEY, description, tensors)
    return out


@pytest.mark.parametrize("kind", ["drawn", "given", "frozen"])
def test_fields_of_other_types_are_refused_in_a_sentence(folder, tmp_path, kind):
    """Whoever makes such a file makes its checksum, too: types and ranges are checked all the same."""
    model, (description, _) = built(MLP), header_and_tensors(folder / kind)
    before, commands, source = state_of(model), 0, random.Random(0)
    for path in places(description):
        if path[0] in ("checksum", "header_checksum", "sealed"):
            continue
        for wrong in WRONG if kind == "given" else source.sample(WRONG, 4):

            def change(description, tensors, path=path, wrong=wrong):
                for part in path[:-1]:
                    description = description[part]
                description[path[-1]] = wrong

            hostile, where = resealed(folder / kind, tmp_path, change), (path, wrong)
            loaded = outcome(lambda hostile=hostile: sprand.load(model, hostile))
            if loaded is not None:
                sprand.unmerge(model)
            assert_untouched(model, before), where
            commands += 1
            if commands % 19 == 0:
                outcome(lambda hostile=hostile: inspect(hostile))
                outcome(lambda hostile=hostile: inspect(hostile, folder / "base"))
            if commands % 60 == 0:
                outcome(lambda hostile=hostile: export(hostile, "dense-delta", tmp_path / "out"))
                shutil.rmtree(tmp_path / "merged", ignore_errors=True)
                outcome(lambda hostile=hostile: merge(folder / "base", [(hostile, 1.0)], tmp_path / "merged"))


@pytest.mark.parametrize("kind", ["peft_drawn", "peft_given"])
def test_fields_of_a_configuration_of_peft_are_refused_in_a_sentence(tmp_path, kind):
    """Where PEFT wrote the adapter, its configuration is all that describes it, and has no checksum."""
    hostile = Path(shutil.copytree(Path(__file__).parent / "adapters_of_0_1_0" / kind, tmp_path / kind))
    model, source = built(MLP), random.Random(0)
    settings, before, refused = json.loads((hostile / CONFIG_FILE).read_text()), state_of(model), 0
    settings |= {"selection": {"strategy": "snip", "density": 0.1}, "sparse_config": {"seed": 3}, "versions": layout.VERSIONS}
    for path in places(settings):
        for wrong in source.sample(WRONG, 5):
            changed = copy.deepcopy(settings)
            inner = changed
            for part in path[:-1]:
                inner = inner[part]
            inner[path[-1]] = wrong
            (hostile / CONFIG_FILE).write_text(json.dumps(changed))
            loaded = outcome(lambda: sprand.load(model, hostile))
            refused += loaded is None
            if loaded is not None:
                sprand.unmerge(model)
            assert_untouched(model, before), (path, wrong)
            outcome(lambda: inspect(hostile))
            outcome(lambda: sprand.select(model, density=0.1, disjoint=hostile))
    assert refused > 50


def indices(values):
    return lambda d, t: t.update({INDICES: torch.tensor(values, dtype=torch.int32)})


def value(name, number):
    return lambda d, t: t[name].view(-1).__setitem__(0, number)


def renamed(name):
    def change(d, t):
        d["targets"][name] = d["targets"].pop("second.weight")
        for kind in ("delta", "indices"):
            t[key(kind, name)] = t.pop(key(kind, "second.weight"))

    return change


COUNT = 15
CONTENT = {
    "index twice": (indices([0, 0, *range(2, COUNT)]), "appears twice"),
    "not sorted": (indices([3, 1, *range(4, COUNT + 2)]), "not above"),
    "negative": (indices([-5, *range(1, COUNT)]), "out of range"),
    "out of range": (indices([*range(COUNT - 1), 576]), "out of range"),
    "not one for each": (indices(list(range(COUNT - 1))), "integer indices"),
    "floats": (lambda d, t: t.update({INDICES: torch.arange(float(COUNT))}), "integer indices"),
    "nan": (value(DELTA, float("nan")), "not finite"),
    "inf": (value(DELTA, float("inf")), "not finite"),
    "nan in a head": (value(HEAD, float("nan")), "not finite"),
    "integer values": (lambda d, t: t.update({DELTA: torch.arange(COUNT)}), "float32 or float64"),
    "head of another shape": (lambda d, t: t.update({HEAD: torch.zeros(5)}), "third.bias is .* here and .* there"),
    "head and target": (lambda d, t: t.update({head_key("second.weight"): torch.zeros(1)}), "both in full and in part"),
    "tensor of nothing": (lambda d, t: t.update({"extra": torch.zeros(1)}), "of no parameter that it names"),
    "no tensor": (lambda d, t: t.pop(DELTA), "expected 15 values"),
    "another parameter": (renamed("first.weight"), "is .* here and .* there"),
    "..": (renamed("../../etc/passwd"), "no parameter"),
    "deep": (lambda d, t: d["sparse_config"].update(strategy_options=json.loads("[" * 400 + "]" * 400)), "strategy_options"),
}


@pytest.mark.parametrize(("change", "message"), CONTENT.values(), ids=CONTENT)
def test_content_that_cannot_be_is_refused_by_every_reader(folder, tmp_path, change, message):
    hostile = resealed(folder / "given", tmp_path / "hostile", change)
    for name, model in {"plain": built(MLP), "holder": sprand.load(built(MLP), folder / "drawn", name="first")}.items():
        before = state_of(model)
        with pytest.raises(ValueError, match=message):
            sprand.load(model, hostile, name="second")
        assert_untouched(model, before), name
    with pytest.raises(ValueError):
        merge(folder / "base", [(hostile, 1.0)], tmp_path / "merged")
    assert {path.name for path in tmp_path.iterdir()} == {"hostile"}


def test_tied_parameters_are_trained_once(folder, tmp_path):
    model = built(MLP)
    model.fourth = model.second
    before = state_of(model)

    def twice(d, t):
        d["targets"]["fourth.weight"] = copy.deepcopy(d["targets"]["second.weight"])
        for kind in ("delta", "indices"):
            t[key(kind, "fourth.weight")] = t[key(kind, "second.weight")].clone()

    with pytest.raises(ValueError, match="are one parameter"):
        sprand.load(model, resealed(folder / "given", tmp_path, twice))
    assert_untouched(model, before)


def test_what_was_loaded_does_not_change_with_the_file(folder, tmp_path):
    """The library maps files into memory: another program that writes over one would change a model that was proven."""
    adapter = AdapterFile.read(folder / "given")
    copied = tmp_path / WEIGHTS_FILE
    copied.write_bytes((folder / "given" / WEIGHTS_FILE).read_bytes())
    model = sprand.load(built(MLP), copied)
    delta = model.second.sprand_delta.detach().clone()
    with open(copied, "r+b") as file:
        begin = 8 + int.from_bytes(file.read(8), "little")
        file.seek(begin)
        file.write(b"\x41" * (copied.stat().st_size - begin))
    assert torch.equal(model.second.sprand_delta, delta) and torch.equal(delta, adapter.entries("second.weight")[1])


def test_files_of_earlier_versions_load(folder, tmp_path):
    """They have a checksum of their tensors alone."""
    description, tensors = header_and_tensors(folder / "given")
    del description["header_checksum"], description["sealed"]
    save_file(tensors, tmp_path / WEIGHTS_FILE, metadata={KEY: json.dumps(description)})
    assert_same_bits(sprand.load(built(MLP), tmp_path).state_dict(), sprand.load(built(MLP), folder / "given").state_dict())
