"""What sddmm costs on a card: a small table of costs, the time of each way that it implies, and the choice between them.

Three ways give the same sums up to rounding: the row kernel and, for runs of 8 columns, the tensor-core kernel (their time grows
with the entries), and dense products gathered chunk by chunk (time grows with the weight). Each is a start and a slope over the
tokens, so one token count separates two of them. A kernel's time is that of the multiprocessor with the most blocks, so the model
counts blocks, splits and waves as the launches do. `benchmarks/gpu/choice.py` shows what a choice gives away on measured times.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from .limits import ceil_div
from .run8_units import SHAPES
from .schedule import Schedule

EVERY = 1 << 62  # more tokens than any batch
MANY_TOKENS = 8192  # where kernels are compared: a few tokens are cheap with any
FEWEST_ROW_TOKENS, ROWS_GRANULE, RUN8_TOKENS = 64, 8, 16  # of a split, of a tile of the row kernel, of a step of that for runs


@dataclass(frozen=True)
class Line:
    """Seconds of a call: `start + slope * tokens`."""

    start: float
    slope: float

    def at(self, tokens: int) -> float:
        """The seconds for so many tokens."""
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
        """The time of the row kernel."""
        cycles, loads = row_work(schedule, MANY_TOKENS)
        seconds = self.rows_cycle * cycles + self.rows_load * loads
        return Line(self.rows_start, seconds / MANY_TOKENS)

    def runs(self, schedule: Schedule) -> Line:
        """The time of the kernel for runs of 8."""
        loads, tiles = run_work(schedule, MANY_TOKENS)
        seconds = self.runs_load * loads + self.runs_tile * tiles
        return Line(self.runs_start, seconds / MANY_TOKENS)

    def dense(self, schedule: Schedule, out_features: int, in_features: int) -> Line:
        """The time of dense chunks."""
        entries = out_features * in_features
        start = self.dense_start * len(schedule.chunks) + self.dense_entry * entries
        return Line(start, self.dense_product * entries)

    def choose(self, schedule: Schedule, out_features: int, in_features: int) -> Schedule:
        """The schedule with the faster kernel for many tokens, and the token counts for which dense chunks are faster still."""
        kernel = self.rows(schedule)
        if schedule.runs is not None:
            runs = self.runs(schedule)
            if runs.at(MANY_TOKENS) < kernel.at(MANY_TOKENS):
                kernel = runs
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


def row_splits(schedule: Schedule, tokens: int) -> int:
    """The parts into which the row kernel cuts the tokens, counted as `rows_splits` in csrc/cuda/sddmm_rows.h does."""
    idle = schedule.blocks // (schedule.tiles * schedule.windows)
    useful = tokens // FEWEST_ROW_TOKENS
    return min(max(idle, 1), max(useful, 1))


def row_work(schedule: Schedule, tokens: int) -> tuple[float, float]:
    """Cycles by the schedule's model, and elements loaded, of the multiprocessor that has most to do in the row kernel."""
    blocks = schedule.tiles * schedule.windows
    splits = row_splits(schedule, tokens)
    waves = ceil_div(blocks * splits, schedule.blocks)
    granules = waves * ceil_div(ceil_div(tokens, splits), ROWS_GRANULE)
    cycles = granules * schedule.cost / blocks
    elements = schedule.width + schedule.variant.block_rows  # of one token
    return cycles, granules * ROWS_GRANULE * elements


def run_splits(schedule: Schedule, tokens: int) -> int:
    """The parts into which the kernel for runs cuts the tokens, counted as `sddmm_run8_splits` in csrc/cuda does."""
    _, (_, _, units, _, processors) = schedule.runs
    *_, nnz = schedule.chunks[-1]
    steps = ceil_div(tokens, RUN8_TOKENS)

    def cost(splits: int) -> int:
        waves = ceil_div(units * splits, processors)
        return 1000 * waves * (ceil_div(steps, splits) + 3) + splits * nnz // 1400

    most = max(min(steps // 4, 64), 1)
    return min(range(1, most + 1), key=cost)


def run_work(schedule: Schedule, tokens: int) -> tuple[float, float]:
    """Elements loaded, and tiles times tokens, of the multiprocessor that has most to do in the kernel for runs."""
    _, (shape, rows, units, tiles, processors) = schedule.runs
    _, columns = SHAPES[shape]
    splits = run_splits(schedule, tokens)
    waves = ceil_div(units * splits, processors)
    own_tokens = waves * ceil_div(ceil_div(tokens, RUN8_TOKENS), splits) * RUN8_TOKENS
    return own_tokens * (rows + columns), own_tokens * tiles / units
