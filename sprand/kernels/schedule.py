"""Schedules: how the CUDA row kernel of sddmm walks one pattern. Made once per pattern, on the pattern's device.

The kernel (csrc/cuda/sddmm_rows.cuh) gives each lane whole rows of the weight and a fixed number of slots per row and window
of columns. An *aligned* schedule serves patterns whose rows hold nearly equal numbers of entries, spread evenly, as the random
draws do: slot s of window w is the entry of rank `w * ranks + s` of its row, so that a table of row starts is all it needs. An
*ordered* schedule serves any other mask: the entries of a row and window are dealt to as many lanes as they need, in an order
that keeps the eight lanes of a shared-memory phase on different banks.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from . import host
from .limits import Limits, ceil_div

BANKS = 8  # of 16 bytes, which a GPU's shared memory serves at once
SAMPLED_ROWS, SAMPLED_RANKS = 2048, 64  # of a pattern, to judge its bank conflicts
FEW_CONFLICTS = 1.3  # wavefronts per phase, up to which nothing is gained by ordering
MOST_PADDING = 8  # slots per entry, beyond which an aligned schedule is out of the question
CHUNK_ROWS = 128  # a multiple of it starts each chunk: cuBLAS's fast kernels read 16 bytes at once, from such edges
CHUNK_BYTES = 32 << 20  # of a chunk of the dense gradient, in float32: stays in the L2 of an A100 or later until it is gathered


@dataclass(frozen=True)
class Variant:
    """One compiled instantiation of the row kernel; csrc/cuda/sddmm_rows_variants.cuh holds the same list.

    Attributes:
        threads: lanes of a block.
        rows: rows of the weight that a lane owns.
        slots: sums per row and window.
        columns: the widest window.
        unit: neighbouring rows that share their columns.
        ordered: for ordered schedules.
    """

    threads: int
    rows: int
    slots: int
    columns: int
    unit: int = 1
    ordered: bool = False

    @property
    def block_rows(self) -> int:
        return self.threads * self.rows

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block: two stages of input, and the slots' offsets, eight by eight."""
        stage = 16 * self.columns
        offsets = ceil_div(self.rows // self.unit * self.slots, 8) * 8
        return 2 * stage + 2 * self.threads * offsets


_ORDERED = Variant(256, 8, 8, 2048, 1, True)
_SIZES = {
    torch.bfloat16: [
        *[(8, 2, 4096), (8, 5, 4096), (4, 5, 4096), (8, 4, 2048), (8, 8, 2048), (8, 11, 2560), (4, 11, 2560), (4, 16, 2048)],
        *[(4, 21, 2560), (8, 4, 2048, 2), (8, 11, 2560, 2), (8, 4, 2048, 4), (4, 11, 2560, 4)],
    ],
    torch.float16: [
        *[(8, 2, 4096), (8, 5, 4096), (8, 8, 2048), (8, 11, 2560), (4, 11, 2560), (4, 21, 2560)],
        *[(8, 11, 2560, 2), (4, 11, 2560, 4)],
    ],
    torch.float32: [(8, 2, 4096), (8, 8, 2048), (8, 11, 2560), (4, 11, 2560)],
}
VARIANTS = {dtype: [*(Variant(256, *sizes) for sizes in all_sizes), _ORDERED] for dtype, all_sizes in _SIZES.items()}


@dataclass(frozen=True)
class Schedule:
    """What the row kernel needs beside the indices.

    Attributes:
        table: int32, on the device of the indices; its layout stands in csrc/cuda/sddmm_rows.h.
        variant: the instantiation.
        tiles: blocks of rows.
        windows: windows of columns per block of rows.
        ranks: entries of a row that one window serves.
        width: columns of the widest window.
        blocks: multiprocessors to fill.
        cost: cycles of one multiprocessor per 8 tokens, by the model of the design: a figure to compare schedules by.
        chunks: `(first row, last row, first entry, last entry)` of row chunks whose dense gradient stays in L2.
        dense_tokens: the token counts `[first, last)` for which `sddmm` takes these chunks instead of the row kernel.
    """

    table: Tensor
    variant: Variant
    tiles: int
    windows: int
    ranks: int
    width: int
    blocks: int
    cost: float
    chunks: tuple[tuple[int, int, int, int], ...]
    dense_tokens: tuple[int, int] = (0, 0)

    @property
    def launch(self) -> list[int]:
        """The numbers that the operator takes beside `table`."""
        v = self.variant
        numbers = [v.threads, v.rows, v.slots, v.columns, v.unit, int(v.ordered)]
        return [*numbers, self.tiles, self.windows, self.ranks, self.width, self.blocks]


def make_schedule(
    indices: Tensor, out_features: int, in_features: int, dtype: torch.dtype, limits: Limits | None = None
) -> Schedule | None:
    """The schedule of a pattern, or None where the row kernel has no use: no entries, an odd width, a float64 weight.

    A mask that no aligned schedule serves has none either where `sprand._host`, which orders entries, is not built.

    Args:
        indices: `[nnz]`, flat, sorted, distinct.
        out_features, in_features: rows and columns of the weight.
        dtype: of grad_output and input.
        limits: of the device; by default that of `indices`.
    """
    if indices.numel() == 0 or dtype not in VARIANTS or in_features % 2:
        return None
    limits = limits or Limits.of(indices.device)
    rows = Rows.of(indices, out_features, in_features)
    fitting = [variant for variant in VARIANTS[dtype] if variant.shared_bytes <= limits.shared_bytes]
    return _best(rows, fitting, limits.processors)


def _best(rows: Rows, variants: Sequence[Variant], processors: int) -> Schedule | None:
    """The cheapest schedule of some variants; entries are ordered only where no aligned schedule is nearly free of conflicts."""
    conflicts = {unit: rows.conflicts(unit) for unit in (1, 2, 4) if unit <= rows.shared}
    candidates = []
    for variant in variants:
        together = max(2, variant.unit)  # rows that a lane loads at once
        if not variant.ordered and variant.unit in conflicts and rows.out_features % together == 0:
            candidates.append(_aligned(rows, variant, conflicts[variant.unit], processors))
    best = _cheapest(candidates)
    if host.has_extension() and (best is None or conflicts[best.variant.unit] > FEW_CONFLICTS):
        ordered = [_ordered(rows, variant, processors) for variant in variants if variant.ordered]
        best = _cheapest([best, *ordered])
    return best


def _cheapest(schedules: Sequence[Schedule | None]) -> Schedule | None:
    return min(filter(None, schedules), key=lambda schedule: schedule.cost, default=None)


@dataclass
class Rows:
    """A pattern, looked at by rows.

    Attributes:
        indices: `[nnz]`.
        begin: `[out + 1]` int32, the number of entries before each row.
        columns: `[nnz]` int64.
        rank: `[nnz]` int64, place of an entry in its row.
        most: entries of the fullest row.
        shared: 4, 2 or 1: how many neighbouring rows always have the same columns.
        out_features, in_features: of the weight.
    """

    indices: Tensor
    begin: Tensor
    columns: Tensor
    rank: Tensor
    most: int
    shared: int
    out_features: int
    in_features: int

    @classmethod
    def of(cls, indices: Tensor, out_features: int, in_features: int) -> Rows:
        positions = indices.long()
        edges = torch.arange(out_features + 1, device=indices.device) * in_features
        begin = torch.searchsorted(positions, edges)
        row = positions // in_features
        columns = positions - row * in_features
        rank = torch.arange(len(positions), device=indices.device) - begin[row]
        counts = begin.diff()
        shared = 1
        for unit in (2, 4):
            if out_features % unit or not bool((counts.view(-1, unit) == counts[::unit, None]).all()):
                break
            of_first_row = columns[begin[row // unit * unit] + rank]
            if not torch.equal(of_first_row, columns):
                break
            shared = unit
        return cls(indices, begin.int(), columns, rank, int(counts.max()), shared, out_features, in_features)

    @functools.cached_property
    def chunks(self) -> tuple[tuple[int, int, int, int], ...]:
        """The chunks of rows of a dense gradient, with their entries, in the form that `Schedule.chunks` describes."""
        height = chunk_rows(self.in_features)
        row_edges = [*range(0, self.out_features, height), self.out_features]
        entry_edges = self.begin[torch.tensor(row_edges, device=self.begin.device)].tolist()
        return tuple((*rows, *entries) for rows, entries in zip(pairwise(row_edges), pairwise(entry_edges), strict=True))

    def conflicts(self, unit: int) -> float:
        """Wavefronts per shared-memory phase of an aligned schedule, 1 at best, over the first rows."""
        group = max(2, unit)
        together = BANKS * group
        height = min(SAMPLED_ROWS, self.out_features) // together * together
        ranks = min(SAMPLED_RANKS, self.most)
        sampled = (self.rank[: int(self.begin[height])] < ranks).nonzero().flatten()
        if not len(sampled):
            return 1.0
        row = self.indices[sampled].long() // self.in_features
        residues = torch.full((height, ranks), -1, device=row.device)
        residues[row, self.rank[sampled]] = self.columns[sampled] % BANKS
        lanes = residues.view(-1, BANKS, group, ranks)[:, :, ::unit].transpose(1, 2)  # [block, member, lane, rank]
        wavefronts = torch.stack([(lanes == bank).sum(2) for bank in range(BANKS)]).amax(0)
        return float(wavefronts[wavefronts > 0].double().mean())


def chunk_rows(in_features: int) -> int:
    """How many rows of a dense gradient make a chunk: as many times CHUNK_ROWS as CHUNK_BYTES hold, at least once."""
    bytes_of_rows = 4 * in_features * CHUNK_ROWS
    return max(1, CHUNK_BYTES // bytes_of_rows) * CHUNK_ROWS


def _aligned(rows: Rows, variant: Variant, conflicts: float, multiprocessors: int) -> Schedule | None:
    """The aligned schedule of a variant with the fewest windows that hold the pattern's columns, if there is one."""
    fewest = ceil_div(rows.most, variant.slots)
    if fewest * variant.slots * rows.out_features > MOST_PADDING * rows.indices.numel():
        return None
    for windows in range(fewest, 2 * fewest + 2):
        ranks = ceil_div(rows.most, windows)
        first, width = _windows(rows, windows, ranks)
        if width <= variant.columns:
            tiles = ceil_div(rows.out_features, variant.block_rows)
            cost = _cost(variant, width, conflicts) * tiles * windows
            table = torch.cat([rows.begin, first])
            return Schedule(table, variant, tiles, windows, ranks, width, multiprocessors, cost, rows.chunks)
    return None


def _windows(rows: Rows, windows: int, ranks: int) -> tuple[Tensor, int]:
    """The first column of each window, int32 and even, and the columns of the widest; a window serves so many ranks of a row."""
    window = rows.rank // ranks
    low = torch.full((windows,), rows.in_features, device=window.device)
    high = torch.zeros_like(low)
    low.scatter_reduce_(0, window, rows.columns, "amin")
    high.scatter_reduce_(0, window, rows.columns, "amax")
    low = low // 2 * 2
    width = int((high + 1 - low).max())
    width = min(width + width % 2, rows.in_features)
    return low.clamp_(max=rows.in_features - width).int(), width


def _ordered(rows: Rows, variant: Variant, multiprocessors: int) -> Schedule:
    """The ordered schedule of a variant."""
    table, tiles, conflicts = host.order_rows(
        rows.indices, rows.out_features, rows.in_features, variant.threads, variant.rows, variant.slots, variant.columns
    )
    width = min(variant.columns, rows.in_features)
    cost = _cost(variant, width, conflicts) * tiles
    return Schedule(table, variant, tiles, 1, variant.slots, width, multiprocessors, cost, rows.chunks)


def _cost(variant: Variant, width: int, conflicts: float) -> float:
    """Cycles of one block per 8 tokens: the instructions to issue, or the shared memory's wavefronts, whichever is more.

    Work is counted by the warp, with its 32 slots or 64 rows or columns of two. A slot costs 8 sums for each row of its unit, 8
    conversions, a load and its offset. Four schedulers issue at 83 % of their peak, the shared memory serves at 90 % of its.
    """
    slots = variant.block_rows * variant.slots / variant.unit / 32
    rows = variant.block_rows / 64
    columns = width / 64
    per_slot = {1: 18.8, 2: 27.2, 4: 44.0}[variant.unit]
    per_row = 56 if variant.ordered else 28
    instructions = slots * per_slot + rows * per_row + columns * 28
    wavefronts = slots * (4 * conflicts + 0.5) + columns * 8
    return max(instructions / 4 / 0.83, wavefronts / 0.9)
