"""What all tests share: one environment on any machine, fixed seeds, devices, thread counts, the emulated operators."""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import leftovers

MOST_PROCESSES = 8  # each has torch and transformers in memory


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--torch-threads", type=int, default=1, help="threads of torch, here and in the processes that tests start")


def pytest_configure(config: pytest.Config) -> None:
    """The same threads and settings in every test process and in the processes that tests start, whatever the caller's are."""
    threads = config.getoption("--torch-threads")
    torch.set_num_threads(threads)
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell starts what runs in its background
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """How many processes `-n auto` starts: one for each core that is ours."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_PROCESSES)


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Fails a test that leaves the process other than it found it; the next one finds it as it was."""
    before = leftovers.state()
    yield
    changes = leftovers.changes(before)
    leftovers.put_back(before)
    if changes:
        pytest.fail("the test has left changed: " + "; ".join(changes))


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def threads():
    """`torch.set_num_threads`, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


DEVICES = ["cpu"] + [pytest.param("cuda", marks=pytest.mark.gpu)] * torch.cuda.is_available()


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """The CPU, and a GPU where there is one."""
    return request.param


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder and its tokenizer, saved."""
    from tiny_models import save_bert

    return save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labelled rows that the encoder can learn."""
    from tiny_models import save_rows

    return save_rows(tmp_path_factory.mktemp("rows") / "rows.tsv")


@pytest.fixture
def quality(monkeypatch: pytest.MonkeyPatch) -> None:
    """The quality benchmarks can be imported."""
    pytest.importorskip("transformers", reason="the models come from transformers")
    monkeypatch.syspath_prepend(Path(__file__).resolve().parent.parent / "benchmarks")


@pytest.fixture(scope="session")
def simt():
    """The CUDA kernels built for the CPU, and the order in which their threads run."""
    import emulation

    return emulation.load()


@pytest.fixture
def emulated(simt):
    """The emulated operators; whatever they allocate is full of NaN before they write."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield simt.ops
    torch.use_deterministic_algorithms(False)
    simt.set_order(0)
