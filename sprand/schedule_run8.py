"""The schedule of a run8 pattern, for csrc/cuda/sddmm_run8.cu: which 16 rows make a tile, and which tiles a block of the kernel.

A run is 1 row x 8 columns of one column group. Rows of one block of rows with a run in the same group are cut into tiles of 16.
A unit is a block of rows and the longest range of groups whose tiles and columns fit into one block of the kernel. The layout of
the table is that of `Run8Schedule` in csrc/cuda/sddmm_run8.h.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

RUN = 8
TILE_ROWS = 16
UNIT_TILES = 256
SHAPES = ((2048, 1408), (1024, 1472), (512, 1024))  # most rows and columns of a unit: the instantiations of the kernel
PROCESSORS = 132  # blocks at once where the device cannot be asked: an H200
SHARED_MEMORY = 227 * 1024


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


def run8_schedule(indices: Tensor, out_features: int, in_features: int, shape: int | None = None) -> tuple[Tensor, list[int]]:
    """Schedule a pattern of runs of 8 adjacent entries.

    Args:
        indices: `[nnz]`, sorted flat positions, int32 or int64: eight by eight consecutive, from a multiple of 8 on.
        out_features, in_features: the size of the weight; `in_features` a multiple of 8.
        shape: a row of `SHAPES` to use; by default that which reads the fewest bytes and fits the device of `indices`.

    Returns:
        The table, int32 on the device of `indices`, and the list of ints that goes with it.

    Raises:
        ValueError: the indices are no such runs, or lie outside the weight.
    """
    run_row, group = _runs(indices, out_features, in_features)
    shared_memory, processors = _device(indices.device)
    groups = in_features // RUN
    plans = []
    for number, (rows, columns) in enumerate(SHAPES):
        if shape == number or (shape is None and shared_bytes(rows, columns) <= shared_memory):
            plans.append(_plan(number, run_row, group, out_features, groups, rows, columns))
    _, number, rows, units = min(plans, key=lambda plan: plan[:2])
    key = run_row // rows * groups + group
    counts = torch.bincount(key, minlength=-(-out_features // rows) * groups)
    tiles_before = (-(-counts // TILE_ROWS)).cumsum(0)
    tiles = int(tiles_before[-1]) if len(tiles_before) else 0

    # Dealt out to the half tiles of their group in order of their residue, the rows of one residue meet as rarely as can be.
    order = ((key * RUN + run_row % RUN) * rows + run_row % rows).argsort()
    key = key[order]
    rank = torch.arange(len(key), device=key.device) - (counts.cumsum(0) - counts)[key]
    halves = 2 * -(-counts[key] // TILE_ROWS)
    first_half = 2 * tiles_before[key] - halves
    place = (first_half + rank % halves) * RUN + rank // halves
    runs = torch.full((tiles * TILE_ROWS,), -1, dtype=torch.int32, device=key.device)
    runs[place] = order.int()
    row = torch.full_like(runs, -1, dtype=torch.int16)
    row[place] = (run_row[order] % rows).short()
    tile_group = torch.zeros(-(-tiles // 4) * 4, dtype=torch.int32, device=key.device)
    tile_group[place // TILE_ROWS] = group[order].int()
    header = torch.tensor(units, dtype=torch.int32, device=key.device).view(-1, 4)
    unit_tiles = header[1:, 3] - header[:-1, 3]
    tile_group[:tiles] -= (header[:-1, 1] // RUN).repeat_interleave(unit_tiles)
    table = torch.cat([header.flatten(), runs, _with_spare_rows(row).view(torch.int32), tile_group])
    return table, Run8Launch(number, rows, len(units) - 1, tiles, processors).as_list()


def run8_indices(table: Tensor, launch: list[int], in_features: int, nnz: int) -> Tensor:
    """The flat positions `[nnz]`, int64, that a schedule was made from."""
    header, runs, row, tile_group = _parts(table, launch)
    unit = torch.arange(len(header) - 1, device=table.device).repeat_interleave(header[1:, 3] - header[:-1, 3])
    first = (header[unit, 0, None] + row) * in_features + (header[unit, 1] + tile_group * RUN)[:, None]
    indices = torch.empty(nnz // RUN, dtype=torch.int64, device=table.device)
    there = runs >= 0
    indices[runs[there]] = first[there]
    return (indices[:, None] + torch.arange(RUN, device=table.device)).flatten()


def conflict_degree(table: Tensor, launch: list[int]) -> float:
    """How often, on average, ldmatrix must go to a bank for 8 rows of a tile; 1 is the least. Rows 8 apart share their banks."""
    banks = _parts(table, launch)[2].view(-1, RUN) % RUN
    return torch.nn.functional.one_hot(banks, RUN).sum(1).amax(1).double().mean().item()


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
    steps = torch.arange(RUN, device=indices.device)
    if not bool(((first % RUN == 0).all() & (runs - first[:, None] == steps).all() & (first[1:] > first[:-1]).all()).item()):
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


def _with_spare_rows(row: Tensor) -> Tensor:
    """`row` with every -1 replaced by one of the rows 0..7 whose banks the other rows of its half tile leave free."""
    halves = row.view(-1, RUN).long()
    spare = halves < 0
    taken = torch.nn.functional.one_hot((halves % RUN).masked_fill(spare, RUN), RUN + 1).sum(1)[:, :RUN] > 0
    free_first = taken.int().argsort(dim=1, stable=True)
    chosen = free_first.gather(1, (spare.long().cumsum(1) - 1).clamp_min(0))
    return torch.where(spare, chosen, halves).short().flatten()


def _parts(table: Tensor, launch: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Header `[units + 1, 4]`, runs and rows `[tiles, 16]`, and groups `[tiles]` of a table, int64."""
    at = Run8Launch(*launch)
    header, runs, row, group = table.split([4 * (at.units + 1), 16 * at.tiles, 8 * at.tiles, -(-at.tiles // 4) * 4])
    row = row.contiguous().view(torch.int16)
    return header.view(-1, 4).long(), runs.view(-1, 16).long(), row.view(-1, 16).long(), group[: at.tiles].long()


def _device(device: torch.device) -> tuple[int, int]:
    """The shared memory of a block, and how many blocks run at once."""
    if device.type != "cuda":
        return SHARED_MEMORY, PROCESSORS
    properties = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_block_optin, properties.multi_processor_count
