"""Which way of computing sddmm is faster on a GPU: a small table of costs, measured once per card, and the choice it implies.

Three ways give the same sums up to rounding: the row kernel and, for runs of 8 columns, the tensor-core kernel (their time grows
with the entries), and dense products gathered chunk by chunk (time grows with the weight). Each is a start and a slope over the
tokens, so one token count separates two of them. A kernel's time is that of the multiprocessor with the most blocks, so the model
counts blocks, splits and waves as the launches do. `benchmarks/gpu/choice.py` shows what a choice gives away on measured times.

The table is kept in `$SPRAND_CACHE` (default `~/.cache/sprand`), one file per card and version, so that later runs and the other
processes of a machine choose alike. `SPRAND_SDDMM=sparse|dense` overrides it; `auto` is the default.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..version import __version__
from . import ops
from .dtypes import dtype_name
from .schedule import Schedule, make_schedule
from .schedule_run8 import SHAPES

EVERY = 1 << 62  # more tokens than any batch
MANY_TOKENS = 8192  # where kernels are compared: a few tokens are cheap with any
MEASURED_SHAPES, MEASURED_TOKENS, MEASURED_DENSITIES = ((1024, 4096), (4096, 4096)), (2048, 8192), (0.001, 0.05)
WAIT_SECONDS = 60.0  # for another process that is measuring
FEWEST_ROW_TOKENS, ROWS_GRANULE, RUN8_TOKENS = 64, 8, 16  # of a split, of a tile of the row kernel, of a step of that for runs
FLUSH_BYTES, FLUSHES = 1 << 26, 8  # 0.5 GB: by its data sheet 0.2 ms of an H100, while the host launches the next call


@dataclass(frozen=True)
class Line:
    """Seconds of a call: `start + slope * tokens`."""

    start: float
    slope: float

    def at(self, tokens: int) -> float:
        """Seconds for so many tokens."""
        return self.start + self.slope * tokens


@dataclass(frozen=True)
class Costs:
    """Seconds of sddmm on one card, in one dtype.

    Attributes:
        rows_start: one call of the row kernel.
        rows_cycle: each cycle that the schedule's model predicts for the busiest multiprocessor.
        rows_load: each element that this one loads.
        runs_start: one call of the kernel for runs of 8; zero, like the next two, where the dtype has none.
        runs_load: each element that its busiest multiprocessor loads.
        runs_tile: each tile of 16 runs that this one multiplies with a token.
        dense_start: one chunk of the dense way.
        dense_product: each multiplication of the dense product.
        dense_entry: each entry of the dense gradient, written and gathered.
    """

    rows_start: float
    rows_cycle: float
    rows_load: float
    runs_start: float
    runs_load: float
    runs_tile: float
    dense_start: float
    dense_product: float
    dense_entry: float

    def rows(self, schedule: Schedule) -> Line:
        """Of the row kernel."""
        cycles, loads = row_work(schedule, MANY_TOKENS)
        return Line(self.rows_start, (self.rows_cycle * cycles + self.rows_load * loads) / MANY_TOKENS)

    def runs(self, schedule: Schedule) -> Line:
        """Of the kernel for runs of 8."""
        loads, tiles = run_work(schedule, MANY_TOKENS)
        return Line(self.runs_start, (self.runs_load * loads + self.runs_tile * tiles) / MANY_TOKENS)

    def dense(self, schedule: Schedule, out_features: int, in_features: int) -> Line:
        """Of dense chunks."""
        entries = out_features * in_features
        return Line(self.dense_start * len(schedule.chunks) + self.dense_entry * entries, self.dense_product * entries)

    def choose(self, schedule: Schedule, out_features: int, in_features: int) -> Schedule:
        """The schedule with the faster kernel for many tokens, and the token counts for which dense chunks are faster still."""
        kernel = self.rows(schedule)
        if schedule.runs is not None:
            if self.runs(schedule).at(MANY_TOKENS) < kernel.at(MANY_TOKENS):
                kernel = self.runs(schedule)
            else:
                schedule = dataclasses.replace(schedule, runs=None)
        dense = self.dense(schedule, out_features, in_features)
        return dataclasses.replace(schedule, dense_tokens=below(dense, kernel))


def below(line: Line, other: Line) -> tuple[int, int]:
    """The token counts `[first, last)` for which `line` takes less time than `other`."""
    start, slope = other.start - line.start, other.slope - line.slope
    if slope == 0:
        return (0, EVERY) if start > 0 else (0, 0)
    crossing = min(EVERY, max(0, math.ceil(-start / slope)))
    if slope > 0:
        return (crossing, EVERY)
    return (0, crossing) if start > 0 else (0, 0)


def row_work(schedule: Schedule, tokens: int) -> tuple[float, float]:
    """Cycles by the schedule's model, and elements loaded, of the multiprocessor that has most to do in the row kernel."""
    blocks = schedule.tiles * schedule.windows
    splits = min(max(schedule.blocks // blocks, 1), max(tokens // FEWEST_ROW_TOKENS, 1))  # as rows_splits in sddmm_rows.h
    granules = math.ceil(blocks * splits / schedule.blocks) * math.ceil(math.ceil(tokens / splits) / ROWS_GRANULE)
    return granules * schedule.cost / blocks, granules * ROWS_GRANULE * (schedule.width + schedule.variant.block_rows)


def run_work(schedule: Schedule, tokens: int) -> tuple[float, float]:
    """Elements loaded, and tiles times tokens, of the multiprocessor that has most to do in the kernel for runs."""
    _, (shape, rows, units, tiles, processors) = schedule.runs
    nnz, steps = schedule.chunks[-1][3], math.ceil(tokens / RUN8_TOKENS)

    def waves(splits: int) -> int:
        return math.ceil(units * splits / processors)

    def cost(splits: int) -> int:  # as sddmm_run8_splits in sddmm_run8.cu
        return 1000 * waves(splits) * (math.ceil(steps / splits) + 3) + splits * nnz // 1400

    splits = min(range(1, max(min(steps // 4, 64), 1) + 1), key=cost)
    own = waves(splits) * math.ceil(steps / splits) * RUN8_TOKENS
    return own * (rows + SHAPES[shape][1]), own * tiles / units


def schedule_for(indices: Tensor, out_features: int, in_features: int, dtype: torch.dtype) -> Schedule | None:
    """The schedule of a pattern on its GPU, with the choice between the two ways; None where the kernel for any pattern serves.

    Args:
        indices: `[nnz]`, flat, sorted, on a GPU.
        out_features, in_features: rows and columns of the weight.
        dtype: of the weight.

    Raises:
        ValueError: `SPRAND_SDDMM` is set to something else than auto, sparse or dense.
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
    name = f"{re.sub(r'[^A-Za-z0-9]+', '-', card)}-{dtype_name(dtype)}-{__version__}-{torch.__version__}"
    path = cache_folder() / f"sddmm-costs-{name}.json"
    return read_or_measure(path, lambda: measure(device, dtype))


def cache_folder() -> Path:
    """Where tables are kept."""
    return Path(os.environ.get("SPRAND_CACHE") or Path.home() / ".cache" / "sprand")


def read_or_measure(path: Path, measure: Callable[[], Costs]) -> Costs:
    """The table in `path`; measured by the first process that asks, awaited by the others.

    A folder that cannot be written to costs each process a measurement, nothing else.
    """
    lock = path.with_suffix(".lock")
    deadline = time.monotonic() + WAIT_SECONDS
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError:
        return measure()
    while True:
        try:
            return Costs(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            pass
        try:
            os.close(os.open(lock, os.O_CREAT | os.O_EXCL))
            break
        except FileExistsError:
            if time.monotonic() > deadline:  # its maker died
                break
            time.sleep(0.05)
        except OSError:
            return measure()
    try:
        found = measure()
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(dataclasses.asdict(found), file)
        os.replace(file.name, path)
        return found
    finally:
        lock.unlink(missing_ok=True)


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
        for density, run in itertools.product(MEASURED_DENSITIES, (1, 8)):
            schedule, indices = drawn(shape, density, run, dtype, device)
            cases.append(
                ("rows" if run == 1 else "runs", schedule, shape, tokens, seconds(_call(ops.sddmm, sides, schedule, indices)))
            )
        cases.append(("dense", schedule, shape, tokens, seconds(_call(ops.sddmm_dense, sides, schedule, indices))))
    return fitted(cases)


def fitted(cases: Iterable[tuple[str, Schedule, tuple[int, int], int, float]]) -> Costs:
    """The costs behind measured times.

    Args:
        cases: of each call, its way (rows, runs or dense), schedule, the weight's shape, tokens, and seconds.
    """
    measured: dict[str, list[tuple[list[float], float]]] = {"rows": [], "runs": [], "dense": []}
    for way, schedule, (out_features, in_features), tokens, taken in cases:
        entries = float(out_features * in_features)
        if way == "dense":
            measured[way].append(([float(len(schedule.chunks)), tokens * entries, entries], taken))
        elif way == "rows":
            measured[way].append(([1.0, *row_work(schedule, tokens)], taken))
        elif schedule.runs is not None:
            measured[way].append(([1.0, *run_work(schedule, tokens)], taken))
    return Costs(
        *fit(measured["rows"]), *(fit(measured["runs"]) if measured["runs"] else (0.0, 0.0, 0.0)), *fit(measured["dense"])
    )


def drawn(shape: tuple[int, int], density: float, run: int, dtype: torch.dtype, device: torch.device) -> tuple[Schedule, Tensor]:
    """A random pattern of runs of so many columns, and its schedule."""
    out_features, in_features = shape
    indices = torch.empty(round(out_features * in_features * density) // run, dtype=torch.int32, device=device)
    ops.stratified_indices_(indices, out_features, in_features // run, 0)
    indices = (indices[:, None] * run + torch.arange(run, dtype=torch.int32, device=device)).flatten()
    return make_schedule(indices, out_features, in_features, dtype), indices


def _call(op: Callable[..., Tensor], sides: list[Tensor], schedule: Schedule, indices: Tensor) -> Callable[[], Tensor]:
    return lambda: op(*sides, indices, schedule)


def fit(measured: list[tuple[list[float], float]]) -> list[float]:
    """Coefficients, none below zero, whose sums over a case come closest to its time, by relative error."""
    matrix = torch.tensor([case for case, _ in measured], dtype=torch.float64)
    wanted = torch.tensor([time for _, time in measured], dtype=torch.float64)
    scale = matrix.amax(0)
    active = list(range(matrix.shape[1]))
    while True:
        weighted = matrix[:, active] / scale[active] / wanted[:, None]
        solution = torch.linalg.lstsq(weighted, torch.ones_like(wanted)[:, None]).solution[:, 0]
        if len(active) == 1 or bool((solution >= 0).all()):
            break
        active.pop(int(solution.argmin()))
    found = torch.zeros(matrix.shape[1], dtype=torch.float64)
    found[active] = solution.clamp_min(0) / scale[active]
    return found.tolist()


def _seconds(device: torch.device, call: Callable[[], object]) -> float:
    """By events around each of 13 calls, without waiting in between: a kernel's time, not that of Python to launch it.

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
