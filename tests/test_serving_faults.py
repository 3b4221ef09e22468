"""A pool under load and faults: many adapters on disk, many threads, files that vanish and change: nothing wrong or stuck."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch

from models import MLP, assert_same_bits, bits, built, points_and_labels
from served import in_threads, merged, outputs_of, trained, until
from sprand.serving import AdapterPool

ADAPTERS, THREADS = 24, 64


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters of a few positions: some share theirs, most do not."""
    folder = tmp_path_factory.mktemp("adapters")
    return {f"{n}": trained(built(MLP), folder / f"{n}", seed=n, draw=n % 9) for n in range(ADAPTERS)}


@pytest.fixture(scope="module")
def outputs(paths: dict[str, Path]) -> dict[str | None, torch.Tensor]:
    return outputs_of(paths)


def forward(pool: AdapterPool) -> torch.Tensor:
    with torch.no_grad():
        return pool.model(points_and_labels()[0])


def one_size(path: Path) -> int:
    """What one adapter takes in host memory."""
    pool = AdapterPool(built(MLP))
    pool.add("one", path)
    return pool.nbytes


def test_random_requests_of_many_threads_are_answered_right_from_little_memory(paths, outputs):
    limit = 5 * one_size(paths["0"])
    pool = AdapterPool(built(MLP), host_bytes=limit, max_queue_delay=0.01)
    for name, path in paths.items():
        pool.add(name, path)
        assert pool.nbytes <= limit
    assert len(pool) == ADAPTERS and pool.statistics().resident < 8
    answered, most = [], []

    def asking(number: int):
        def job() -> None:
            source = random.Random(number)
            for _ in range(6):
                name = source.choice([*paths, None])
                if source.random() < 0.5:
                    with pool.use(name, timeout=25):
                        assert torch.equal(forward(pool), outputs[name]), name
                else:
                    asyncio.run(ask(name))
                answered.append(name)
                most.append(pool.nbytes)

        return job

    async def ask(name: str | None) -> None:
        async with pool.use_async(name, timeout=25):
            assert torch.equal(await asyncio.to_thread(forward, pool), outputs[name]), name

    in_threads(*map(asking, range(THREADS)))
    assert len(answered) == 6 * THREADS
    statistics = pool.statistics()
    assert statistics.reads > 0 and statistics.removals > 0 and statistics.waiting == 0
    assert max(most) <= limit + one_size(paths["0"])  # the active one stays above the limit
    pool.close()
    assert_same_bits(bits(pool.model), bits(built(MLP)))
    assert pool.nbytes == 0


def crowded(paths: dict[str, Path], *names: str) -> AdapterPool:
    """A pool with room for one adapter, the last one."""
    pool = AdapterPool(built(MLP), host_bytes=1)
    for name in names:
        pool.add(name, paths[name])
    return pool


def test_a_folder_that_vanishes_is_missed_by_its_requests_alone(paths, outputs, tmp_path):
    mine = {name: shutil.copytree(paths[name], tmp_path / name) for name in "01"}
    pool = crowded(mine, "0", "1")
    pool.switch("1")
    away = mine["0"].rename(tmp_path / "away")
    with pytest.raises(FileNotFoundError, match="no adapter at"), pool.use("0"):
        pass
    with pytest.raises(FileNotFoundError, match="no adapter at"):
        asyncio.run(pool.use_async("0").__aenter__())
    assert pool.active == "1" and torch.equal(forward(pool), outputs["1"])
    mine["1"].rename(tmp_path / "away too")
    with pool.use("1"):  # in memory
        assert torch.equal(forward(pool), outputs["1"])
    away.rename(mine["0"])
    with pool.use("0"):
        assert torch.equal(forward(pool), outputs["0"])


def test_a_file_that_changed_is_never_served_under_the_old_name(paths, outputs, tmp_path):
    mine = {name: shutil.copytree(paths[name], tmp_path / name) for name in "012"}
    pool = crowded(mine, "0", "1", "2")
    shutil.copytree(paths["3"], mine["0"], dirs_exist_ok=True)
    with pytest.raises(ValueError, match=r"not what was added as '0' any more; replace\('0'\)"), pool.use("0"):
        pass
    pool.replace("0")
    with pool.use("0"):
        assert torch.equal(forward(pool), outputs["3"])
    file = mine["1"] / "adapter_model.safetensors"
    os.truncate(file, file.stat().st_size - 8)
    with pytest.raises(ValueError, match="damaged"), pool.use("1"):
        pass
    with pool.use("2"):
        assert torch.equal(forward(pool), outputs["2"])


@pytest.mark.parametrize("in_one_step", [True, False])
def test_a_file_that_is_replaced_while_it_loads_gives_one_of_both_or_an_error(paths, outputs, tmp_path, in_one_step):
    """Replaced as sprand does it, and overwritten in place as a careless copy does."""
    mine = shutil.copytree(paths["0"], tmp_path / "mine")
    file, end = mine / "adapter_model.safetensors", time.monotonic() + 1.5
    contents = [(paths[name] / file.name).read_bytes() for name in "01"]
    pool, seen = AdapterPool(built(MLP)), []

    def writing() -> None:
        number = 0
        while time.monotonic() < end:
            number += 1
            if in_one_step:
                (tmp_path / "new").write_bytes(contents[number % 2])
                (tmp_path / "new").replace(file)
            else:
                with open(file, "wb") as out:
                    for begin in range(0, len(contents[0]), 4096):
                        out.write(contents[number % 2][begin : begin + 4096])
                        out.flush()

    def loading(name: str):
        def job() -> None:
            while time.monotonic() < end:
                try:
                    pool.add(name, mine)
                except ValueError as error:
                    assert not in_one_step and "damaged" in str(error)
                    continue
                with pool.use(name):
                    y = forward(pool)
                seen.append(next(one for one in "01" if torch.equal(y, outputs[one])))
                pool.remove(name)

        return job

    in_threads(writing, *(loading(f"{n}") for n in range(3)))
    assert set(seen) == {"0", "1"}


def test_many_that_ask_for_one_read_it_once(paths, outputs):
    pool = crowded(paths, "0", "1")
    pool.switch("1")
    together = threading.Barrier(8, timeout=20)

    def job() -> None:
        together.wait()
        with pool.use("0"):
            assert torch.equal(forward(pool), outputs["0"])

    in_threads(*[job] * 8)
    assert pool.statistics().reads == 1


def test_a_read_inside_of_a_block_does_not_wait_for_those_who_wait_for_the_block(paths):
    """A block adds an adapter while others wait for the weights, and more readers wait than may read at the same time."""
    pool = AdapterPool(built(MLP))
    pool.add("0", paths["0"])
    go = threading.Event()

    def holds() -> None:
        with pool.use("0"):
            until(lambda: pool.statistics().waiting)
            pool.add("inside", paths["1"])
            go.set()

    def switches() -> None:
        pool.switch(None)

    def adds(name: str):
        return lambda: pool.add(name, paths[name])

    in_threads(holds, switches, *(adds(f"{n}") for n in range(2, 12)))
    assert go.is_set() and len(pool) == 12


def test_an_error_in_a_switch_is_its_requests_alone(paths, outputs, monkeypatch):
    pool = AdapterPool(built(MLP))
    for name in "012":
        pool.add(name, paths[name])
    real, bad = pool._weights.hold, pool._shelf.get("1")

    def hold(resident) -> None:
        if resident is bad:
            raise OSError("the bus is gone")
        real(resident)

    monkeypatch.setattr(pool._weights, "hold", hold)
    end = time.monotonic() + 0.5

    def asking(name: str):
        def job() -> None:
            while time.monotonic() < end:
                if name == "1":
                    with pytest.raises(OSError, match="the bus is gone"), pool.use("1"):
                        pass
                else:
                    with pool.use(name):
                        assert torch.equal(forward(pool), outputs[name])

        return job

    in_threads(*map(asking, "0120"))


def test_what_was_removed_or_replaced_takes_no_memory(paths):
    pool = AdapterPool(built(MLP))
    pool.add("0", paths["0"])
    size = pool.nbytes
    for n in range(1, 8):
        with pool.use("0"):
            pool.replace("0", paths[f"{n}"])
        pool.switch("0")
    assert pool.nbytes == size
    assert_same_bits(bits(pool.model), merged(built(MLP), paths["7"]))
    pool.remove("0")
    assert pool.nbytes == 0 and pool.active is None
    assert_same_bits(bits(pool.model), bits(built(MLP)))
