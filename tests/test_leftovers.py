"""Whatever a test leaves changed is seen, named and put back."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest
import torch

import leftovers

CHANGES: dict[str, Callable[[], object]] = {
    "os.environ": lambda: os.environ.update(SPRAND_LEFT="1"),
    "the working folder": lambda: os.chdir("/"),
    "the handler of SIGINT": lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    "the handler of SIGTERM": lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN),
    "torch's number of threads": lambda: torch.set_num_threads(torch.get_num_threads() + 1),
    "torch's default dtype": lambda: torch.set_default_dtype(torch.float64),
    "torch's default device": lambda: torch.set_default_device("meta"),
    "torch's grad mode": lambda: torch.set_grad_enabled(False),
    "torch's anomaly mode": lambda: torch.autograd.set_detect_anomaly(True),
    "torch's autocast on a CPU": lambda: torch.set_autocast_enabled("cpu", True),
    "torch's autocast on a GPU": lambda: torch.set_autocast_dtype("cuda", torch.bfloat16),
    "torch.use_deterministic_algorithms": lambda: torch.use_deterministic_algorithms(True, warn_only=True),
    "torch's precision of float32 products": lambda: torch.set_float32_matmul_precision("medium"),
    "torch's fast path of attention": lambda: torch.backends.mha.set_fastpath_enabled(False),
}


@pytest.mark.parametrize("name", leftovers.STATE)
def test_a_change_is_named_and_put_back(name):
    before = leftovers.state()
    if name in CHANGES:
        CHANGES[name]()
    else:
        read, write = leftovers.STATE[name]
        write(not read())
    (line,) = leftovers.changes(before)
    leftovers.put_back(before)
    assert line.startswith(f"{name}: ") and not leftovers.changes(before)


def test_every_test_is_watched(request):
    assert "nothing_left_behind" in request.fixturenames
