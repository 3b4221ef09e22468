"""Files of whoever: whatever their bytes are, a reader gives what was written or a sentence, and the model is as it was."""

from __future__ import annotations

import copy
import json
import os
import random
import resource
import shutil
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

import sprand
from checkpoints import plain, redrawn
from models import MLP, assert_same_bits, built
from sprand import adapter_file, files, states
from sprand.adapter_file import KEY, WEIGHTS_FILE
from sprand.checkpoint.diff import diff
from sprand.checkpoint.export import export
from sprand.checkpoint.merge import merge
from sprand.checkpoint.report import inspect
from sprand.checkpoint.revert import revert
from sprand.checkpoint.shards import open_checkpoint, read_header

REFUSED = (ValueError, OSError)


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    """No power is lost here: hundreds of small files need not wait for the disk."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base, adapters of each kind of content, a merged checkpoint, a mask and a state."""
    root = tmp_path_factory.mktemp("hostile")
    base = {name: value.clone() for name, value in built(MLP).state_dict().items()}
    plain(root / "base", base, {"model_type": "none"})
    generator = torch.Generator().manual_seed(0)
    for name, make in {
        "drawn": lambda: sprand.apply(built(MLP), density=0.05),
        "given": lambda: sprand.apply(built(MLP), strategy={"second.weight": torch.arange(0, 99, 7)}, modules_to_save=["third"]),
        "folded": lambda: redrawn(sprand.apply(built(MLP), density=0.02, target_modules=["second"])),
    }.items():
        model = make()
        for p in sprand.parameters(model):
            p.data.add_(0.1 * torch.randn(p.shape, generator=generator))
        sprand.write(model)
        sprand.save(model, root / name)
    merge(root / "base", [(root / "given", 1.0)], root / "merged")
    sprand.Mask({"second.weight": torch.arange(0, 99, 7)}, {"second.weight": (24, 24)}).save(root / "mask.safetensors")
    states.write(root / "state.safetensors", "test", {"a": torch.arange(9.0), "b": [1, (2.5, None)], "c": {3: "x"}})
    return root


def state_of(model):
    """Everything a failed load must leave as it was."""
    kinds = [(name, type(module)) for name, module in model.named_modules()]
    grads = [(name, p.requires_grad) for name, p in model.named_parameters()]
    return {name: value.clone() for name, value in model.state_dict().items()}, kinds, grads, "_sprand" in vars(model)


def assert_untouched(model, before):
    now = state_of(model)
    assert now[1:] == before[1:]
    assert_same_bits(now[0], before[0])


def outcome(read):
    """What a reader gives, or None where it refuses; anything but a sentence in ValueError or OSError fails."""
    try:
        return read()
    except REFUSED as error:
        assert str(error).strip() and len(str(error)) < 2000
        return None


def same(one, two) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(two, torch.Tensor) and one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(two) and len(one) == len(two) and all(map(same, one, two))
    return one == two


READERS = {
    "drawn": (f"drawn/{WEIGHTS_FILE}", lambda root: adapter_file.read(root / "drawn")),
    "given": (f"given/{WEIGHTS_FILE}", lambda root: adapter_file.read(root / "given")),
    "folded": (f"folded/{WEIGHTS_FILE}", lambda root: adapter_file.read(root / "folded")),
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
    for read in (adapter_file.read, sprand.Mask.load, lambda path: states.read(path, "test")):
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
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(item, (*path, key))


def resealed(folder: Path, out: Path, change) -> Path:
    """The same adapter with its description changed, and checksums that are right."""
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as content:
        description = json.loads(content.metadata()[KEY])
        tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    change(description, tensors)
    files.write(out / WEIGHTS_FILE, KEY, description, tensors)
    return out


@pytest.mark.parametrize("kind", ["drawn", "given", "folded"])
def test_fields_of_other_types_are_refused_in_a_sentence(folder, tmp_path, kind):
    """Whoever makes such a file makes its checksum, too: types and ranges are checked all the same."""
    model, description = built(MLP), adapter_file.read(folder / kind)[0]
    before, commands, source = state_of(model), 0, random.Random(0)
    for path in places(description):
        if path[0] in ("checksum", "header_checksum", "sealed"):
            continue
        for wrong in WRONG if kind == "given" else source.sample(WRONG, 4):

            def change(description, tensors, path=path, wrong=wrong):
                for key in path[:-1]:
                    description = description[key]
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


def indices(values):
    return lambda d, t: t.update({"indices.second.weight": torch.tensor(values, dtype=torch.int32)})


def value(name, number):
    return lambda d, t: t[name].view(-1).__setitem__(0, number)


def renamed(d, t):
    d["targets"]["first.weight"] = d["targets"].pop("second.weight")


COUNT = 15
CONTENT = {
    "index twice": (indices([0, 0, *range(2, COUNT)]), "appears twice"),
    "not sorted": (indices([3, 1, *range(4, COUNT + 2)]), "not above"),
    "negative": (indices([-5, *range(1, COUNT)]), "out of range"),
    "out of range": (indices([*range(COUNT - 1), 576]), "out of range"),
    "not one for each": (indices(list(range(COUNT - 1))), "integer indices"),
    "floats": (lambda d, t: t.update({"indices.second.weight": torch.arange(float(COUNT))}), "integer indices"),
    "nan": (value("delta.second.weight", float("nan")), "not finite"),
    "inf": (value("delta.second.weight", float("inf")), "not finite"),
    "nan in a head": (value("saved.third.bias", float("nan")), "not finite"),
    "integer values": (lambda d, t: t.update({"delta.second.weight": torch.arange(COUNT)}), "float32 or float64"),
    "head of another dtype": (lambda d, t: t.update({"saved.third.bias": torch.zeros(4).half()}), "dtype float32"),
    "no head": (lambda d, t: t.pop("saved.third.bias"), "expected values of shape"),
    "head and target": (
        lambda d, t: (
            d["saved"].update({"second.weight": {"shape": [1], "dtype": "float32"}}),
            t.update({"saved.second.weight": torch.zeros(1)}),
        ),
        "both in full and in part",
    ),
    "no tensor": (lambda d, t: t.pop("delta.second.weight"), "expected 15 values"),
    "another parameter": (renamed, "is .* here and .* there"),
    "..": (lambda d, t: d["targets"].update({"../../etc/passwd": d["targets"].pop("second.weight")}), "no parameter"),
    "deep": (lambda d, t: d["config"].update(strategy_options=json.loads("[" * 400 + "]" * 400)), "strategy_options"),
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
            t[f"{kind}.fourth.weight"] = t[f"{kind}.second.weight"].clone()

    with pytest.raises(ValueError, match="are one parameter"):
        sprand.load(model, resealed(folder / "given", tmp_path, twice))
    assert_untouched(model, before)


def header_of(entries, data=b"", length=None) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def tensor(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HEADERS = {
    "a claim of 10^18 bytes": header_of({}, length=10**18),
    "a claim of all there is": header_of({}, length=2**64 - 1),
    "product that overflows": header_of({"a": tensor([2**32, 2**32], 0, 0)}),
    "product that is zero by overflow": header_of({"a": tensor([2**33, 2**31], 0, 0)}),
    "negative offsets": header_of({"a": tensor([1], -4, 0)}, b"\0" * 4),
    "offsets that cross": header_of({"a": tensor([1], 4, 0)}, b"\0" * 4),
    "offsets beyond the end": header_of({"a": tensor([10**15], 0, 4 * 10**15)}),
    "overlap": header_of({"a": tensor([2], 0, 8), "b": tensor([2], 4, 12)}, b"\0" * 12),
    "gap": header_of({"a": tensor([1], 0, 4), "b": tensor([1], 8, 12)}, b"\0" * 12),
    "fractions": header_of({"a": tensor([1], 0.0, 4.0)}, b"\0" * 4),
    "negative shape": header_of({"a": tensor([-1, -1], 0, 4)}, b"\0" * 4),
    "10^5 dimensions": header_of({"a": tensor([10**18] * 10**5, 0, 4)}, b"\0" * 4),
    "deep": header_of(b"[" * 10**5 + b"]" * 10**5),
    "deep metadata": header_of(b'{"__metadata__":' + b"[" * 10**5 + b"]" * 10**5 + b"}"),
    "a list": header_of([1, 2]),
    "a number": header_of(b"17"),
    "nan": header_of(b'{"a": NaN}'),
    "no dtype": header_of({"a": {"shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4),
    "metadata of numbers": header_of({"__metadata__": {"a": 1}}),
    "no utf-8": header_of(b'{"\xff\xfe": 1}'),
    "unknown dtype that ends before it begins": header_of({"a": tensor([1], 4, 0, "X9")}, b"\0" * 4),
    "digits without end": header_of(b'{"a": ' + b"9" * 10**5 + b"}"),
}


@pytest.mark.parametrize("content", HEADERS.values(), ids=HEADERS)
def test_headers_that_lie_are_refused_at_once(folder, tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    start = time.perf_counter()
    commands = (
        lambda: open_checkpoint(tmp_path),
        lambda: merge(tmp_path, [(folder / "given", 1.0)], tmp_path / "out"),
        lambda: diff(folder / "base", tmp_path, tmp_path / "out"),
        lambda: revert(tmp_path, [(folder / "given", 1.0)], tmp_path / "out"),
        lambda: adapter_file.read(tmp_path / "model.safetensors"),
        lambda: sprand.Mask.load(tmp_path / "model.safetensors"),
        lambda: states.read(tmp_path / "model.safetensors", "test"),
    )
    for command in commands:
        with pytest.raises(REFUSED):
            command()
    assert time.perf_counter() - start < 5
    assert not (tmp_path / "out").exists()


def index(folder: Path, content) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors.index.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


@pytest.mark.parametrize("name", ["../base/model.safetensors", "/etc/hostname", "..", ".", "", "a/b", "\0", None, [], 3])
def test_an_index_cannot_name_files_elsewhere(folder, name):
    where = index(folder / "indexed", {"weight_map": {"first.weight": name}})
    with pytest.raises(REFUSED):
        open_checkpoint(where)


@pytest.mark.parametrize("content", ["[]", "null", "{}", '{"weight_map": []}', "[" * 10**5, "", '{"weight_map": {"a": "b"}'])
def test_an_index_of_another_kind_is_refused(tmp_path, content):
    with pytest.raises(REFUSED):
        open_checkpoint(index(tmp_path / "indexed", content))


def test_links_into_a_cache_are_read_and_links_in_the_output_are_not_written_through(folder, tmp_path):
    """The Hub's cache has a link for every file, to ../../blobs."""
    snapshot, blobs = tmp_path / "cache" / "snapshots" / "abc", tmp_path / "cache" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted((folder / "base").iterdir())):
        (blobs / f"blob{number}").write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/blob{number}")
    made = merge(snapshot, [(folder / "given", 1.0)], tmp_path / "out").folder
    assert not any(path.is_symlink() for path in made.iterdir())
    assert (made / "model.safetensors").read_bytes() == (folder / "merged" / "model.safetensors").read_bytes()

    precious = tmp_path / "precious"
    precious.write_text("precious")
    adapter, mask = tmp_path / "adapter", tmp_path / "mask.safetensors"
    adapter.mkdir()
    for path in (adapter / WEIGHTS_FILE, adapter / "adapter_config.json", mask):
        path.symlink_to(precious)
    sprand.save(sprand.load(built(MLP), folder / "given"), adapter)
    sprand.Mask.load(folder / "mask.safetensors").save(mask)
    hidden = tmp_path / ".out2.sprand-unfinished"
    (tmp_path / "elsewhere").mkdir()
    hidden.symlink_to(tmp_path / "elsewhere")
    merge(snapshot, [(folder / "given", 1.0)], tmp_path / "out2")
    assert precious.read_text() == "precious" and not list((tmp_path / "elsewhere").iterdir())
    adapter_file.read(adapter)
    sprand.Mask.load(mask)


def test_what_is_no_file_is_refused_without_waiting(folder, tmp_path):
    os.mkfifo(tmp_path / WEIGHTS_FILE)
    os.mkfifo(tmp_path / "model.safetensors")
    for path in (tmp_path, tmp_path / WEIGHTS_FILE, "/dev/zero", tmp_path / "none"):
        for read in (adapter_file.read, lambda path: states.read(Path(path), "test"), sprand.Mask.load, open_checkpoint):
            with pytest.raises(REFUSED):
                read(path)


def growth(run) -> tuple[int, float]:
    """Bytes that a child process of this one grows by at its peak, and the seconds it takes."""
    start, (out, into) = time.perf_counter(), os.pipe()
    child = os.fork()
    if child == 0:
        before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        outcome(run)
        os.write(into, str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before).encode())
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    size = int(os.read(out, 100))
    os.close(out)
    os.close(into)
    return size, time.perf_counter() - start


@pytest.fixture(scope="module")
def million(tmp_path_factory):
    """A file that claims a million tensors."""
    entries = ",".join('"t%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(10**6))  # noqa: UP031
    file = tmp_path_factory.mktemp("million") / "model.safetensors"
    file.write_bytes(header_of(b"{" + entries.encode() + b"}"))
    return file


@pytest.mark.parametrize("reader", ["adapter", "checkpoint"])
def test_a_million_tensors_take_bounded_time_and_memory(million, reader):
    """A header of a million names is read once, and refused before anything is made of it."""
    read = (lambda: adapter_file.read(million)) if reader == "adapter" else lambda: open_checkpoint(million)
    with pytest.raises(ValueError, match=r"1,000,000 tensors, more than"):
        read()
    size, seconds = growth(read)
    assert size < 2 * million.stat().st_size + 2**24
    assert seconds < 10


def test_what_was_loaded_does_not_change_with_the_file(folder, tmp_path):
    """The library maps files into memory: another program that writes over one would change a model that was proven."""
    _, tensors = adapter_file.read(folder / "given")
    copied = tmp_path / WEIGHTS_FILE
    copied.write_bytes((folder / "given" / WEIGHTS_FILE).read_bytes())
    model = sprand.load(built(MLP), copied)
    delta = model.second.sprand_delta.detach().clone()
    with open(copied, "r+b") as file:
        file.seek(-200, os.SEEK_END)
        file.write(b"\x41" * 200)
    assert torch.equal(model.second.sprand_delta, delta) and torch.equal(delta, tensors["delta.second.weight"])


def test_files_of_earlier_versions_load(folder, tmp_path):
    """They have a checksum of their tensors alone."""
    description, tensors = adapter_file.read(folder / "given")
    del description["header_checksum"], description["sealed"]
    save_file(tensors, tmp_path / WEIGHTS_FILE, metadata={KEY: json.dumps(description)})
    assert_same_bits(sprand.load(built(MLP), tmp_path).state_dict(), sprand.load(built(MLP), folder / "given").state_dict())
