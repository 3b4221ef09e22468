"""The units of a run8 pattern: which runs, tiles of 16 rows and column groups go to one block of csrc/cuda/sddmm_run8.cu.

A run is 1 row x 8 columns of one column group. Rows of one block of rows with a run in the same group are cut into tiles of 16.
A unit is a block of rows and the longest range of groups whose tiles and columns fit into one block of the kernel.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from .limits import ceil_div

RUN = 8
TILE_ROWS = 16
UNIT_TILES = 256
SHAPES = ((2048, 1408), (1024, 1472), (512, 1024))  # most rows and columns of a unit: the instantiations of the kernel
ROW_BEGIN, COLUMN_BEGIN, COLUMNS, FIRST_TILE = range(4)  # what a unit's line of the table's header holds


def are_runs(indices: Tensor, in_features: int) -> bool:
    """Whether sorted positions are runs of 8 that start at multiples of 8, in rows whose length is one."""
    if in_features % RUN or indices.numel() % RUN:
        return False
    runs = indices.view(-1, RUN)
    first = runs[:, :1]
    aligned = first % RUN == 0
    consecutive = runs - first == torch.arange(RUN, device=indices.device)
    return bool((aligned & consecutive).all())


@dataclass(frozen=True)
class Runs:
    """The runs of a pattern.

    Attributes:
        row: `[runs]`, int64.
        group: `[runs]`, int64, the column group: its column, in eights.
        out_features: rows of the weight.
        groups: column groups of the weight.
    """

    row: Tensor
    group: Tensor
    out_features: int
    groups: int

    @classmethod
    def of(cls, indices: Tensor, out_features: int, in_features: int) -> Runs:
        """The runs of sorted positions, proven."""
        whole = indices.numel() % RUN == 0 and in_features % RUN == 0
        if indices.dim() != 1 or indices.dtype not in (torch.int32, torch.int64) or not whole:
            raise ValueError(
                f"run8_schedule: expected indices [nnz] of int32 or int64 and nnz and in_features in multiples of {RUN}, "
                f"got {list(indices.shape)} of {indices.dtype} and in_features {in_features}"
            )
        first = indices.long()[::RUN]
        if not are_runs(indices, in_features) or not bool((first.diff() > 0).all()):
            raise ValueError(f"run8_schedule: expected ascending runs of {RUN} consecutive indices from a multiple of {RUN}")
        if len(first) and not 0 <= int(first[0]) <= int(first[-1]) < out_features * in_features:
            raise ValueError(f"run8_schedule: expected indices within a weight [{out_features}, {in_features}]")
        columns = max(in_features, 1)
        return cls(first // columns, first % columns // RUN, out_features, in_features // RUN)

    def keys(self, rows: int) -> Tensor:
        """`[runs]`: the block of so many rows and the column group of each, as one number."""
        return self.row // rows * self.groups + self.group


@dataclass(frozen=True)
class Plan:
    """The units of a pattern for one shape of the kernel's blocks.

    Attributes:
        shape: a row of `SHAPES`.
        rows: rows of the weight in each block of rows.
        header: the table's, a line for each unit and one that ends the last.
        cost: rows and columns that all units read for one token.
    """

    shape: int
    rows: int
    header: list[list[int]]
    cost: int

    @property
    def units(self) -> int:
        return len(self.header) - 1

    @property
    def tiles(self) -> int:
        return self.header[-1][FIRST_TILE]

    @classmethod
    def of(cls, runs: Runs, shape: int) -> Plan:
        most_rows, most_columns = SHAPES[shape]
        blocks = max(1, ceil_div(runs.out_features, most_rows))
        rows = max(1, ceil_div(runs.out_features, blocks * TILE_ROWS)) * TILE_ROWS  # blocks of equal height
        counts = torch.bincount(runs.keys(rows), minlength=blocks * runs.groups).view(blocks, runs.groups)
        header, first_tile, cost = [], 0, 0
        for block, tiles in enumerate(ceil_div(counts, TILE_ROWS).tolist()):
            row_begin = block * rows
            height = min(rows, runs.out_features - row_begin)
            before = [0, *accumulate(tiles)]
            active = [group for group, count in enumerate(tiles) if count]
            for begin, end in _balanced_ranges(before, active, most_columns // RUN):
                columns = (end - begin) * RUN
                header.append([row_begin, begin * RUN, columns, first_tile + before[begin]])
                cost += height + columns
            first_tile += before[-1]
        return cls(shape, rows, [*header, [0, 0, 0, first_tile]], cost)


def _balanced_ranges(before: list[int], active: list[int], most_groups: int) -> list[tuple[int, int]]:
    """As few ranges of column groups as hold all tiles of a block of rows, with about the same number of columns each."""
    fewest = len(_ranges(before, active, most_groups))
    low, high = 1, most_groups
    while low < high:
        middle = (low + high) // 2
        if len(_ranges(before, active, middle, enough=fewest)) <= fewest:
            high = middle
        else:
            low = middle + 1
    return _ranges(before, active, high)


def _ranges(before: list[int], active: list[int], most_groups: int, enough: int | None = None) -> list[tuple[int, int]]:
    """Ranges of at most `most_groups` groups and `UNIT_TILES` tiles; not more than `enough` and one of them.

    Args:
        before: tiles before each group.
        active: the groups that have tiles; no other begins or ends a range.
        most_groups: groups of a range.
        enough: how many ranges are of interest, all if None.
    """
    ranges: list[tuple[int, int]] = []
    place = 0  # in active
    while place < len(active) and (enough is None or len(ranges) <= enough):
        begin = active[place]
        last_tile = before[begin] + UNIT_TILES
        end = min(begin + most_groups, bisect_right(before, last_tile) - 1)
        place = bisect_right(active, end - 1)
        ranges.append((begin, active[place - 1] + 1))
    return ranges
