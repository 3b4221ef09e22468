"""The schedule of a run8 pattern, for csrc/cuda/sddmm_run8.cu: which 16 rows make a tile, and which tiles a block of the kernel.

A run is 1 row x 8 columns of one column group. Rows of one block of rows with a run in the same group are cut into tiles of 16.
A unit is a block of rows and the longest range of groups whose tiles and columns fit into one block of the kernel. The layout of
the table is that of `Run8Schedule` in csrc/cuda/sddmm_run8.h.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

RUN = 8
TILE_ROWS = 16
UNIT_TILES = 256
SHAPES = ((2048, 1408), (1024, 1472), (512, 1024))  # most rows and columns of a unit: the instantiations of the kernel


@dataclass(frozen=True)
class Limits:
    """What a device offers; by default an H200.

    Attributes:
        shared_bytes: shared memory of a block.
        processors: multiprocessors.
    """

    shared_bytes: int = 227 << 10
    processors: int = 132

    @classmethod
    def of(cls, device: torch.device) -> Limits:
        """Those of a GPU; the default elsewhere."""
        if device.type != "cuda":
            return cls()
        facts = torch.cuda.get_device_properties(device)
        return cls(facts.shared_memory_per_block_optin, facts.multi_processor_count)


@dataclass(frozen=True)
class Run8Launch:
    """The numbers that go with a table, in the order of the operator's `launch`."""

    shape: int
    rows: int
    units: int
    tiles: int
    processors: int

    def as_list(self) -> list[int]:
        return [self.shape, self.rows, self.units, self.tiles, self.processors]


def are_runs(indices: Tensor, in_features: int) -> bool:
    """Whether sorted positions are runs of 8 that start at multiples of 8, in rows whose length is one."""
    if in_features % RUN or indices.numel() % RUN:
        return False
    runs = indices.view(-1, RUN)
    first = runs[:, :1]
    return bool(((first % RUN == 0) & (runs - first == torch.arange(RUN, device=indices.device))).all())


def run8_schedule(
    indices: Tensor, out_features: int, in_features: int, shape: int | None = None, limits: Limits | None = None
) -> tuple[Tensor, list[int]]:
    """Schedule a pattern of runs of 8 adjacent entries.

    Args:
        indices: `[nnz]`, sorted flat positions, int32 or int64: eight by eight consecutive, from a multiple of 8 on.
        out_features, in_features: the size of the weight; `in_features` a multiple of 8.
        shape: a row of `SHAPES` to use; by default that which reads the fewest bytes and fits the device.
        limits: of the device; by default that of `indices`.

    Returns:
        The table, int32 on the device of `indices`, and the list of ints that goes with it.

    Raises:
        ValueError: the indices are no such runs, or lie outside the weight.
    """
    run_row, group = _runs(indices, out_features, in_features)
    limits = limits or Limits.of(indices.device)
    groups = in_features // RUN
    plans = []
    for number, (rows, columns) in enumerate(SHAPES):
        if shape == number or (shape is None and shared_bytes(rows, columns) <= limits.shared_bytes):
            plans.append(_plan(number, run_row, group, out_features, groups, rows, columns))
    _, number, rows, units = min(plans, key=lambda plan: plan[:2])
    header = torch.tensor(units, dtype=torch.int32, device=indices.device).view(-1, 4)
    key = run_row // rows * groups + group
    counts = torch.bincount(key, minlength=-(-out_features // rows) * groups)
    halves = 2 * -(-counts // TILE_ROWS)
    halves_before = halves.cumsum(0) - halves
    tiles = int(header[-1, 3])
    unit = torch.bucketize(halves_before // 2, header[1:, 3].contiguous(), right=True)
    row = run_row % rows
    turns = _turns(row, key, unit, halves, len(units) - 1, rows // TILE_ROWS)
    row ^= turns[unit[key], row // TILE_ROWS]

    # Dealt out to the half tiles of their group in order of their banks, rows of one bank meet as rarely as can be.
    order = ((key * RUN + row % RUN) * rows + row).argsort()
    key, row = key[order], row[order]
    rank = torch.arange(len(key), device=key.device) - (counts.cumsum(0) - counts)[key]
    place = (halves_before[key] + rank % halves[key]) * RUN + rank // halves[key]
    runs = torch.full((tiles * TILE_ROWS,), -1, dtype=torch.int32, device=key.device)
    runs[place] = order.int()
    tile_row = torch.full_like(runs, -1, dtype=torch.int64)
    tile_row[place] = row
    tile_group = torch.zeros(tiles, dtype=torch.int32, device=key.device)
    tile_group[place // TILE_ROWS] = (group[order] - header[unit[key], 1] // RUN).int()
    packed_rows = _with_spare_rows(tile_row).view(torch.int32)
    table = torch.cat([header.flatten(), runs, packed_rows, tile_group, turns.int().flatten()])
    return table, Run8Launch(number, rows, len(units) - 1, tiles, limits.processors).as_list()


def run8_indices(table: Tensor, launch: list[int], in_features: int, nnz: int) -> Tensor:
    """The flat positions `[nnz]`, int64, that a schedule was made from."""
    header, runs, row, tile_group, turns = _parts(table, launch)
    unit = torch.arange(len(header) - 1, device=table.device).repeat_interleave(header[1:, 3] - header[:-1, 3])[:, None]
    row = row ^ turns[unit, row // TILE_ROWS]
    first = (header[unit, 0] + row) * in_features + header[unit, 1] + tile_group[:, None] * RUN
    indices = torch.empty(nnz // RUN, dtype=torch.int64, device=table.device)
    there = runs >= 0
    indices[runs[there]] = first[there]
    return (indices[:, None] + torch.arange(RUN, device=table.device)).flatten()


def shared_bytes(rows: int, columns: int) -> int:
    """The shared memory of a block: two stages of 16 tokens, input rows padded by 16 bytes."""
    return 2 * (rows * 32 + 16 * (2 * columns + 16))


def _runs(indices: Tensor, out_features: int, in_features: int) -> tuple[Tensor, Tensor]:
    """Row and column group of every run, proven."""
    if indices.dim() != 1 or indices.dtype not in (torch.int32, torch.int64) or indices.numel() % RUN or in_features % RUN:
        raise ValueError(
            f"run8_schedule: expected indices [nnz] of int32 or int64 and nnz and in_features in multiples of {RUN}, "
            f"got {list(indices.shape)} of {indices.dtype} and in_features {in_features}"
        )
    runs = indices.long().view(-1, RUN)
    first = runs[:, 0]
    if not are_runs(indices, in_features) or not bool((first[1:] > first[:-1]).all()):
        raise ValueError(f"run8_schedule: expected ascending runs of {RUN} consecutive indices from a multiple of {RUN}")
    if len(first) and not 0 <= int(first[0]) <= int(first[-1]) < out_features * in_features:
        raise ValueError(f"run8_schedule: expected indices within a weight [{out_features}, {in_features}]")
    return first // max(in_features, 1), first % max(in_features, 1) // RUN


def _plan(number: int, run_row: Tensor, group: Tensor, out_features: int, groups: int, most_rows: int, columns: int):
    """`(cost, number, rows per block, header)` of one shape, where cost is the rows and columns that all units read per token."""
    blocks = max(1, -(-out_features // most_rows))
    rows = max(1, -(-out_features // (blocks * TILE_ROWS))) * TILE_ROWS  # blocks of equal height
    counts = torch.bincount(run_row // rows * groups + group, minlength=blocks * groups).view(blocks, groups).cpu()
    units, first_tile, cost = [], 0, 0
    for block, tiles in enumerate((-(-counts // TILE_ROWS)).tolist()):
        before = [0, *accumulate(tiles)]
        active = [g for g in range(groups) if tiles[g]]
        for begin, end in _balanced_ranges(before, active, columns // RUN):
            units.append([block * rows, begin * RUN, (end - begin) * RUN, first_tile + before[begin]])
            cost += min(rows, out_features - block * rows) + (end - begin) * RUN
        first_tile += before[-1]
    return cost, number, rows, [*units, [0, 0, 0, first_tile]]


def _balanced_ranges(before: list[int], active: list[int], most_groups: int) -> list[tuple[int, int]]:
    """As few ranges of column groups as hold all tiles of a block of rows, with about the same number of columns each."""
    fewest = _ranges(before, active, most_groups)
    low, high = 1, most_groups
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_ranges(before, active, middle, len(fewest))) <= len(fewest) else (middle + 1, high)
    return _ranges(before, active, high)


def _ranges(before: list[int], active: list[int], most_groups: int, enough: int | None = None) -> list[tuple[int, int]]:
    """Ranges of at most `most_groups` groups and `UNIT_TILES` tiles; not more than `enough` and one of them."""
    found, next_active = [], 0
    while next_active < len(active) and (enough is None or len(found) <= enough):
        begin = active[next_active]
        end = min(begin + most_groups, bisect_right(before, before[begin] + UNIT_TILES) - 1)
        next_active = bisect_right(active, end - 1)
        found.append((begin, active[next_active - 1] + 1))
    return found


def _turns(row: Tensor, key: Tensor, unit: Tensor, halves: Tensor, units: int, segments: int) -> Tensor:
    """`[units, segments]`: shared memory holds row r of a unit at place `r ^ turn`, where 16 rows share a turn of 0 to 7.

    A place mod 8 is its banks. One segment after the other, the turn is taken that leaves the rows of each column group most
    evenly spread. `row` and `key` (block and column group) are given per run; `unit` and `halves`, the half tiles, per key.
    """
    turns = torch.zeros(units, segments, dtype=torch.int64, device=row.device)
    met, pair = torch.unique(row // TILE_ROWS * len(halves) + key, return_inverse=True)  # a segment meets a group
    own = torch.zeros(len(met), RUN, dtype=torch.int64, device=row.device)
    own.index_put_((pair, row % RUN), own.new_ones(()), accumulate=True)
    bounds = torch.searchsorted(met, torch.arange(segments + 1, device=row.device) * len(halves)).tolist()
    met = met % max(len(halves), 1)
    held = own.new_zeros(len(halves), RUN)
    turn = torch.arange(RUN, device=row.device)
    for segment, (begin, end) in enumerate(pairwise(bounds)):
        at = met[begin:end]
        after = held[at][:, None] + own[begin:end][:, turn[:, None] ^ turn]  # [groups, turns, banks]
        cost = 256 * after.amax(2).maximum(halves[at][:, None]) + after.square().sum(2)
        best = (own.new_zeros(units, RUN).index_add_(0, unit[at], cost) * RUN + turn).argmin(1)
        turns[:, segment] = best
        held[at] = after[torch.arange(end - begin, device=row.device), best[unit[at]]]
    return turns


def _with_spare_rows(row: Tensor) -> Tensor:
    """`row` with every -1 replaced by one of the rows 0..7 whose banks the other rows of its half tile leave free."""
    halves = row.view(-1, RUN)
    spare = halves < 0
    taken = torch.nn.functional.one_hot((halves % RUN).masked_fill(spare, RUN), RUN + 1).sum(1)[:, :RUN] > 0
    free_first = taken.int().argsort(dim=1, stable=True)
    chosen = free_first.gather(1, (spare.long().cumsum(1) - 1).clamp_min(0))
    return torch.where(spare, chosen, halves).short().flatten()


def _parts(table: Tensor, launch: list[int]) -> list[Tensor]:
    """Header `[units + 1, 4]`, runs and places `[tiles, 16]`, groups `[tiles]` and turns `[units, rows / 16]`, int64."""
    at = Run8Launch(*launch)
    segments = at.rows // TILE_ROWS
    header, runs, row, group, turns = table.split(
        [4 * (at.units + 1), 16 * at.tiles, 8 * at.tiles, at.tiles, at.units * segments]
    )
    parts = header.view(-1, 4), runs.view(-1, 16), row.clone().view(torch.int16).view(-1, 16), group, turns.view(-1, segments)
    return [part.long() for part in parts]
