"""What sddmm costs on a card: a small table of costs, the time of each way that it implies, and the choice between them.

Two ways give the same sums up to rounding: the row kernel (its time grows with the entries), and dense products gathered chunk by
chunk (time grows with the weight). Each is a start and a slope over the tokens, so one token count separates the two. The time of
the kernel is that of the multiprocessor with the most blocks, so the model counts blocks, splits and waves as the launches do.
`benchmarks/gpu/choice.py` shows what a choice gives away on measured times.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from .limits import ceil_div
from .schedule import Schedule

EVERY = 1 << 62  # more tokens than any batch
MANY_TOKENS = 8192  # where the slope of a kernel is taken: a few tokens are cheap with any
FEWEST_ROW_TOKENS, ROWS_GRANULE = 64, 8  # of a split, of a tile of the row kernel


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
        dense_start: one chunk of the dense way.
        dense_product: each multiplication of the dense product.
        dense_entry: each entry of the dense gradient, written and gathered.
    """

    rows_start: float
    rows_cycle: float
    rows_load: float
    dense_start: float
    dense_product: float
    dense_entry: float

    def rows(self, schedule: Schedule) -> Line:
        """The time of the row kernel."""
        cycles, loads = row_work(schedule, MANY_TOKENS)
        seconds = self.rows_cycle * cycles + self.rows_load * loads
        return Line(self.rows_start, seconds / MANY_TOKENS)

    def dense(self, schedule: Schedule, out_features: int, in_features: int) -> Line:
        """The time of dense chunks."""
        entries = out_features * in_features
        start = self.dense_start * len(schedule.chunks) + self.dense_entry * entries
        return Line(start, self.dense_product * entries)

    def choose(self, schedule: Schedule, out_features: int, in_features: int) -> Schedule:
        """The schedule with the token counts for which dense chunks are faster than the row kernel."""
        dense = self.dense(schedule, out_features, in_features)
        return dataclasses.replace(schedule, dense_tokens=below(dense, self.rows(schedule)))


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
