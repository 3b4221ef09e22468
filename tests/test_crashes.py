"""Whatever stops a save, what was there before or the new content is there afterwards, whole, and no rubbish piles up."""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

import sprand
from checkpoints import plain
from forks import killed_after, killed_at, on_small_disk, one_thread, started, status_of
from models import MLP, built
from sprand.adapters.file import AdapterFile
from sprand.checkpoint.merge import merge, verify
from sprand.files import atomic, described

ENTRIES = 30_000
KILLS = 30


@pytest.fixture(autouse=True, scope="module")
def single():
    with one_thread():
        yield


class Adapter:
    """Saves an adapter whose every value is one number, and reads that number back."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "adapter"
        self.model = sprand.apply(torch.nn.Sequential(torch.nn.Linear(200, ENTRIES // 100)), density=0.5)

    def save(self, number: int) -> None:
        for p in sprand.parameters(self.model):
            p.data.fill_(number)
        sprand.save(self.model, self.folder)

    def read(self) -> int:
        return _one(AdapterFile.read(self.folder).entries("0.weight")[1])

    def allowed(self) -> set[str]:
        return {"adapter_model.safetensors", "adapter_config.json"}


class Mask:
    """The same of a mask that begins at one position."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "masks"
        self.folder.mkdir()

    def save(self, number: int) -> None:
        sprand.Mask({"a": torch.arange(ENTRIES) + number}, {"a": (10, ENTRIES)}).save(self.folder / "mask.safetensors")

    def read(self) -> int:
        indices = sprand.Mask.load(self.folder / "mask.safetensors")["a"]
        return _one(indices - torch.arange(ENTRIES))

    def allowed(self) -> set[str]:
        return {"mask.safetensors"}


def _one(values: torch.Tensor) -> int:
    assert (values == values[0]).all()
    return int(values[0])


@pytest.fixture(params=[Adapter, Mask], ids=lambda kind: kind.__name__.lower())
def kept(request, tmp_path):
    item = request.param(tmp_path)
    item.save(1)
    return item


def rubbish(kept) -> list[str]:
    return sorted({path.name for path in kept.folder.iterdir()} - kept.allowed())


def test_killed_at_random_old_or_new_is_there(kept):
    source, last, found = random.Random(0), 1, set()
    start = time.perf_counter()
    assert status_of(started(lambda: kept.save(1))) == 0
    longest = 2.5 * (time.perf_counter() - start)

    def save_on() -> None:
        for number in range(last + 1, last + 10**6):
            kept.save(number)

    for _ in range(KILLS):
        assert killed_after(source.random() * longest, save_on) == -signal.SIGKILL
        now = kept.read()
        assert now >= last
        found.add(now - last)
        last = now
        assert len(rubbish(kept)) <= 1
    assert len(found) > 1
    kept.save(last + 1)
    assert kept.read() == last + 1
    assert rubbish(kept) == []


POINTS = [
    (os, "replace"), (os, "fsync"), (described, "save_file"), (atomic.tempfile, "mkdtemp"), (shutil, "rmtree"), (Path, "chmod"),
]  # fmt: skip


@pytest.mark.parametrize(("owner", "name"), POINTS, ids=[name for _, name in POINTS])
def test_killed_at_each_call_old_or_new_is_there(kept, owner, name):
    met = 0
    for number in (1, 2, 3, 4):
        for before in (True, False):
            kept.save(1)
            status = killed_at(owner, name, number, before, lambda: kept.save(2))
            assert status in (0, -signal.SIGKILL)
            met += status != 0
            assert kept.read() in ((2,) if status == 0 else (1, 2))
            kept.save(3)
            assert kept.read() == 3
            assert rubbish(kept) == []
    assert met >= 2


def test_a_live_writer_keeps_its_unfinished_file(tmp_path):
    """Two processes save at once: neither takes the other's file for one that was left behind."""
    kept = Mask(tmp_path)
    with atomic.replacing(kept.folder / "mask.safetensors") as temporary:
        temporary.write_bytes(b"half of it")
        assert status_of(started(lambda: kept.save(7))) == 0
        assert temporary.read_bytes() == b"half of it" and kept.read() == 7
    assert rubbish(kept) == []


def test_content_is_on_the_disk_before_its_name_and_the_name_before_the_end(tmp_path, monkeypatch):
    """Against a loss of power: what fsync and rename were called on, in their order."""
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (calls.append(os.readlink(f"/proc/self/fd/{handle}")), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append(("renamed", str(b))), replace(a, b)))
    file = tmp_path / "mask.safetensors"
    sprand.Mask({"a": torch.arange(3)}, {"a": (4,)}).save(file)
    assert len(calls) == 3 and calls[0].endswith(".sprand-tmp/mask.safetensors")
    assert calls[1:] == [("renamed", str(file)), str(tmp_path)]
    calls.clear()
    base = plain(tmp_path / "base", dict(built(MLP).state_dict()), {"model_type": "none"})
    sprand.save(sprand.apply(built(MLP), density=0.1), tmp_path / "adapter")
    calls.clear()
    merge(base, [(tmp_path / "adapter", 1.0)], tmp_path / "out")
    named = calls.index(("renamed", str(tmp_path / "out")))
    hidden = str(tmp_path / ".out.sprand-unfinished")
    for path in (tmp_path / "out").iterdir():
        assert f"{hidden}/{path.name}" in calls[:named]
    assert hidden in calls[:named] and calls[named + 1 :] == [str(tmp_path)]


def limited(size: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def refused(work) -> None:
    try:
        work()
    except Exception as error:
        assert isinstance(error, OSError) or "could not be written" in str(error), repr(error)
        return
    raise AssertionError("expected an error, for want of space")


def test_files_that_may_not_grow_leave_the_old_content(kept):
    largest = max(path.stat().st_size for path in kept.folder.iterdir())
    source = random.Random(0)
    for size in [0, 1, 8, 100, largest - 1, *(source.randrange(largest) for _ in range(25))]:

        def save(size=size) -> None:
            limited(size)
            refused(lambda: kept.save(2))

        assert status_of(started(save)) == 0
        assert kept.read() == 1 and rubbish(kept) == []


@pytest.mark.parametrize("kind", [Adapter, Mask])
def test_a_full_disk_leaves_the_old_content(tmp_path, kind):
    disk = tmp_path / "disk"
    disk.mkdir()

    def save() -> None:
        kept, source = kind(disk), random.Random(0)
        kept.save(1)
        for number in range(2, 32):
            free = shutil.disk_usage(disk).free
            filler = disk / "filler"
            filler.write_bytes(bytes(free - source.randrange(50_000)))
            refused(lambda number=number: kept.save(number))
            assert kept.read() == number - 1 and rubbish(kept) == []
            filler.unlink()
            kept.save(number)
            assert kept.read() == number

    on_small_disk(disk, 4_000_000, save)


@pytest.fixture
def to_merge(tmp_path):
    """A checkpoint of some megabytes, and an adapter of it."""
    model = torch.nn.Sequential(*(torch.nn.Linear(300, 300) for _ in range(8)))
    base = plain(tmp_path / "base", dict(model.state_dict()), {"model_type": "none"})
    sprand.apply(model, density=0.05)
    for p in sprand.parameters(model):
        p.data.fill_(1.0)
    sprand.save(model, tmp_path / "adapter")
    return base, [(tmp_path / "adapter", 1.0)], tmp_path


def test_a_merge_that_is_killed_leaves_all_or_nothing(to_merge):
    base, adapters, folder = to_merge
    out, source, whole = folder / "out", random.Random(0), 0
    for _ in range(KILLS):
        killed_after(source.random() * 0.12, lambda: merge(base, adapters, out))
        if out.exists():
            verify(base, adapters, out)
            whole += 1
            shutil.rmtree(out)
        assert {path.name for path in folder.iterdir()} <= {"base", "adapter", ".out.sprand-unfinished"}
    merge(base, adapters, out)
    verify(base, adapters, out)
    assert {path.name for path in folder.iterdir()} == {"base", "adapter", "out"}
    assert whole < KILLS


def test_a_merge_without_space_leaves_nothing(to_merge):
    base, adapters, folder = to_merge
    size = (base / "model.safetensors").stat().st_size
    for limit in (0, 1000, size // 2, size - 1):

        def run(limit=limit) -> None:
            limited(limit)
            refused(lambda: merge(base, adapters, folder / "out"))

        assert status_of(started(run)) == 0
        assert not (folder / "out").exists()

    def full() -> None:
        try:
            merge(base, adapters, folder / "disk" / "out")
        except OSError as error:
            assert error.errno == errno.ENOSPC
            assert not (folder / "disk" / "out").exists()
            return
        raise AssertionError("expected an error, for want of space")

    (folder / "disk").mkdir()
    on_small_disk(folder / "disk", size // 2, full)
