"""Headers and indices of whoever, links, and what is no file: refused at once, in little memory; nothing is written elsewhere."""

from __future__ import annotations

import json
import os
import resource
import time
from pathlib import Path

import pytest

import sprand
from hostile import REFUSED, header_of, outcome, tensor, written
from models import MLP, built
from sprand.adapters.file import WEIGHTS_FILE, AdapterFile
from sprand.checkpoint.diff import diff
from sprand.checkpoint.merge import merge
from sprand.checkpoint.revert import revert
from sprand.checkpoint.shards import open_checkpoint
from sprand.files import states


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return written(tmp_path_factory.mktemp("hostile"))


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
        lambda: AdapterFile.read(tmp_path / "model.safetensors"),
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
    elsewhere = isinstance(name, str) and "/" in name
    with pytest.raises(REFUSED, match="expected names of files beside it" if elsewhere else None):
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
    AdapterFile.read(adapter)
    sprand.Mask.load(mask)


def test_what_is_no_file_is_refused_without_waiting(folder, tmp_path):
    os.mkfifo(tmp_path / WEIGHTS_FILE)
    os.mkfifo(tmp_path / "model.safetensors")
    for path in (tmp_path, tmp_path / WEIGHTS_FILE, "/dev/zero", tmp_path / "none"):
        for read in (AdapterFile.read, lambda path: states.read(Path(path), "test"), sprand.Mask.load, open_checkpoint):
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
    read = (lambda: AdapterFile.read(million)) if reader == "adapter" else lambda: open_checkpoint(million)
    with pytest.raises(ValueError, match=r"1,000,000 tensors, more than"):
        read()
    size, seconds = growth(read)
    assert size < 2 * million.stat().st_size + 2**24
    assert seconds < 10
