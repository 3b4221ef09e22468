"""Peak memory of a stretch of work: on a GPU by torch's allocator, on a CPU by sampling the process's resident memory."""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

INTERVAL = 0.005  # seconds between samples
STATM = Path("/proc/self/statm")
HOW = {
    "cpu": "highest resident memory of the process while training, above that before, sampled every 5 ms",
    "cuda": "highest memory torch had allocated on the GPU while training, above that before",
}


class PeakMemory:
    """Measures inside of a `with` block.

    Free memory goes back to the system first, so that one measurement does not hide in what an earlier one left.

    Args:
        device: a GPU, or the CPU (Linux only).

    Attributes:
        peak: bytes above the level at the start; None where it cannot be measured.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.peak = device, None
        self._stop, self._on = threading.Event(), True

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._start = torch.cuda.memory_allocated(self.device)
        elif STATM.exists():
            _give_back()
            self._start = self._highest = _resident()
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self.device) - self._start
        elif STATM.exists():
            self._stop.set()
            self._thread.join()
            self.peak = self._highest - self._start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave a part out (on the CPU): an evaluation amid training."""
        self._on = False
        try:
            yield
        finally:
            if self.device.type == "cpu":
                _give_back()
            self._on = True

    def _sample(self) -> None:
        while not self._stop.wait(INTERVAL):
            if self._on:
                self._highest = max(self._highest, _resident())


def _resident() -> int:
    return int(STATM.read_text().split()[1]) * mmap.PAGESIZE


def _give_back() -> None:
    """Ask the C library to return free memory to the system, where it can."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return
