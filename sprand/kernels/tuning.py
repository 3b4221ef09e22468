"""Which way of computing sddmm is faster on a GPU: the costs of `cost_model.py` are measured once per card, and schedules know.

The table of costs is kept in `$SPRAND_CACHE` (default `~/.cache/sprand`), one file per card and version, so that later runs and
the other processes of a machine choose alike. `SPRAND_SDDMM=sparse|dense` overrides it; `auto` is the default.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from ..version import __version__
from . import ops
from .cost_model import EVERY, Costs, row_work
from .dtypes import dtype_name
from .schedule import Schedule, make_schedule

MEASURED_SHAPES, MEASURED_TOKENS, MEASURED_DENSITIES = ((1024, 4096), (4096, 4096)), (2048, 8192), (0.001, 0.05)
WAIT_SECONDS = 60.0  # for another process that is measuring
FLUSH_BYTES, FLUSHES = 1 << 26, 8  # 0.5 GB: by its data sheet 0.2 ms of an H100, while the host launches the next call


def schedule_for(indices: Tensor, out_features: int, in_features: int, dtype: torch.dtype) -> Schedule | None:
    """The schedule of a pattern on its GPU, with the choice between the two ways; None where the kernel for any pattern serves.

    Args:
        indices: `[nnz]`, flat, sorted, on a GPU.
        out_features, in_features: rows and columns of the weight.
        dtype: of the weight.

    Raises:
        ValueError: `SPRAND_SDDMM` is neither auto nor sparse nor dense.
    """
    schedule = make_schedule(indices, out_features, in_features, dtype)
    if schedule is None:
        return None
    way = os.environ.get("SPRAND_SDDMM", "auto")
    if way not in ("auto", "sparse", "dense"):
        raise ValueError(f"SPRAND_SDDMM: expected auto, sparse or dense, got {way!r}")
    if way == "auto":
        return costs(indices.device, dtype).choose(schedule, out_features, in_features)
    return dataclasses.replace(schedule, dense_tokens=(0, EVERY) if way == "dense" else (0, 0))


def costs(device: torch.device, dtype: torch.dtype) -> Costs:
    """The costs of a card, from its file; measured (about a second) and written where there is none."""
    return _costs(torch.cuda.get_device_name(device), torch.device(device), dtype)


@functools.cache
def _costs(card: str, device: torch.device, dtype: torch.dtype) -> Costs:
    card = re.sub(r"[^A-Za-z0-9]+", "-", card)
    path = cache_folder() / f"sddmm-costs-{card}-{dtype_name(dtype)}-{__version__}-{torch.__version__}.json"
    return read_or_measure(path, lambda: measure(device, dtype))


def cache_folder() -> Path:
    """The folder of the tables."""
    return Path(os.environ.get("SPRAND_CACHE") or Path.home() / ".cache" / "sprand")


def read_or_measure(path: Path, measure: Callable[[], Costs]) -> Costs:
    """The table in `path`; measured by the first process that asks, awaited by the others.

    A folder that cannot be written to costs each process a measurement, nothing else.
    """
    lock = path.with_suffix(".lock")
    deadline = time.monotonic() + WAIT_SECONDS
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            kept = _read(path)
            if kept is not None:
                return kept
            if _taken(lock) or time.monotonic() > deadline:  # or its maker died
                break
            time.sleep(0.05)
    except OSError:
        return measure()
    try:
        costs = measure()
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(dataclasses.asdict(costs), file)
        os.replace(file.name, path)
        return costs
    finally:
        lock.unlink(missing_ok=True)


def _read(path: Path) -> Costs | None:
    """The table in a file; None where there is no file, or a damaged one."""
    try:
        return Costs(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _taken(lock: Path) -> bool:
    """Whether this process is the one that makes the file."""
    try:
        os.close(os.open(lock, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def measure(device: torch.device, dtype: torch.dtype, seconds: Callable[[Callable[[], object]], float] | None = None) -> Costs:
    """Time all ways on two weights, two densities and two token counts, and fit the costs by least squares.

    Args:
        device: the GPU.
        dtype: of the operands.
        seconds: how to time a call; by CUDA events and from cold caches, the median of ten, if None.
    """
    seconds = seconds or functools.partial(_seconds, device)
    cases = []
    for shape, tokens in itertools.product(MEASURED_SHAPES, MEASURED_TOKENS):
        sides = [torch.randn(tokens, features, device=device).to(dtype) for features in shape]
        for density in MEASURED_DENSITIES:
            schedule, indices = drawn(shape, density, dtype, device)
            taken = seconds(functools.partial(ops.sddmm, *sides, indices, schedule))
            cases.append(("rows", schedule, shape, tokens, taken))
        taken = seconds(functools.partial(ops.sddmm_dense, *sides, indices, schedule))
        cases.append(("dense", schedule, shape, tokens, taken))
    return fitted(cases)


def fitted(cases: Iterable[tuple[str, Schedule, tuple[int, int], int, float]]) -> Costs:
    """The costs behind measured times.

    Args:
        cases: of each call, its way (rows or dense), schedule, the weight's shape, tokens, and seconds.
    """
    measured: dict[str, list[tuple[list[float], float]]] = {"rows": [], "dense": []}
    for way, schedule, (out_features, in_features), tokens, taken in cases:
        entries = float(out_features * in_features)
        if way == "dense":
            measured[way].append(([float(len(schedule.chunks)), tokens * entries, entries], taken))
        else:
            measured[way].append(([1.0, *row_work(schedule, tokens)], taken))
    return Costs(*fit(measured["rows"]), *fit(measured["dense"]))


def drawn(shape: tuple[int, int], density: float, dtype: torch.dtype, device: torch.device) -> tuple[Schedule, Tensor]:
    """A random pattern of single entries, and its schedule."""
    out_features, in_features = shape
    indices = torch.empty(round(out_features * in_features * density), dtype=torch.int32, device=device)
    ops.stratified_indices_(indices, out_features, in_features, 0)
    return make_schedule(indices, out_features, in_features, dtype), indices


def fit(measured: list[tuple[list[float], float]]) -> list[float]:
    """Coefficients, none below zero, whose sums over a case come closest to its time, by relative error."""
    work = torch.tensor([case for case, _ in measured], dtype=torch.float64)
    seconds = torch.tensor([time for _, time in measured], dtype=torch.float64)
    scale = work.amax(0)
    relative = work / scale / seconds[:, None]
    ones = torch.ones_like(seconds)[:, None]
    active = list(range(work.shape[1]))
    while True:
        solution = torch.linalg.lstsq(relative[:, active], ones).solution[:, 0]
        if len(active) == 1 or bool((solution >= 0).all()):
            break
        active.pop(int(solution.argmin()))
    coefficients = torch.zeros_like(scale)
    coefficients[active] = solution.clamp_min(0) / scale[active]
    return coefficients.tolist()


def _seconds(device: torch.device, call: Callable[[], object]) -> float:
    """The median time of ten calls after three, by events, without waiting in between: the kernel's, not Python's to launch it.

    Before each call a buffer larger than any L2 is written a few times, so that the host runs ahead and no operand is in cache.
    """
    with torch.cuda.device(device):
        flushed = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
        marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(13)]
        for start, end in marks:
            for _ in range(FLUSHES):
                flushed.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) / 1e3 for start, end in marks[3:])
