"""What all tests share: the import path of the problem table, fixed seeds, devices, thread counts, the emulated operators."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device")


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
