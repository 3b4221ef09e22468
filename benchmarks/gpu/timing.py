"""Times calls on a GPU in turn, by CUDA events and with flushed caches (on the CPU by the clock, to see that a script runs)."""

from __future__ import annotations

import csv
import gc
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from report import RESULTS, quantiles  # noqa: E402

Call = Callable[[], object]
FLUSH_BYTES = 2**29


class Clock:
    """Seconds of calls on one device.

    Args:
        device: "cuda" or "cpu".
        samples: how many of each call count.
        warmup: how many before them do not.
    """

    def __init__(self, device: str, samples: int, warmup: int = 3) -> None:
        self.device, self.samples, self.warmup = device, samples, warmup
        self._scratch = torch.empty(FLUSH_BYTES if device == "cuda" else 0, dtype=torch.int8, device=device)

    def alternate(self, calls: Mapping[str, Call], flush: bool = True) -> dict[str, list[float]]:
        """Seconds of every sample, the calls in turn (A B A B ...).

        Args:
            calls: what to time, by name.
            flush: write 512 MB before each sample, so that no operand lies in L2 (the host runs ahead meanwhile, and the
                launch of a short call is not what is measured).
        """
        for _ in range(self.warmup):
            for call in calls.values():
                call()
        gc.collect()
        self.wait()
        marks: dict[str, list[tuple]] = {name: [] for name in calls}
        for _ in range(self.samples):
            for name, call in calls.items():
                marks[name].append(self._sample(call, flush))
        self.wait()
        return {name: [self._seconds(*pair) for pair in pairs] for name, pairs in marks.items()}

    def wait(self) -> None:
        """Until the device has done everything."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _sample(self, call: Call, flush: bool) -> tuple:
        if self.device != "cuda":
            start = time.perf_counter()
            call()
            return start, time.perf_counter()
        if flush:
            self._scratch.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        return start, end

    def _seconds(self, start, end) -> float:
        return start.elapsed_time(end) / 1e3 if self.device == "cuda" else end - start


class Budget:
    """The seconds a script may take: what does not fit is left out, and said."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def spent(self) -> bool:
        return time.monotonic() > self._end


def predictions(of: str) -> dict[tuple, float]:
    """`predictions.csv` as `{(what, layout, density, out, in, tokens): value}`; empty columns are None."""
    lines = [line for line in (HERE / "predictions.csv").read_text().splitlines() if not line.startswith("#")]

    def key(row: dict[str, str]) -> tuple:
        whole = [int(row[name]) if row[name] else None for name in ("out", "in", "tokens")]
        return row["what"], row["layout"] or None, float(row["density"]) if row["density"] else None, *whole

    return {key(row): float(row["value"]) for row in csv.DictReader(lines) if row["of"] == of}


def default_out() -> Path:
    """Where results of this card belong: `results/gpu-h200` for an NVIDIA H200."""
    name = torch.cuda.get_device_name().lower().removeprefix("nvidia ").replace(" ", "-")
    return RESULTS / f"gpu-{name}"


def microseconds(taken: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile as columns of a row."""
    middle, low, high = quantiles(taken)
    return {"us": middle * 1e6, "us_p20": low * 1e6, "us_p80": high * 1e6, "samples": len(taken)}
