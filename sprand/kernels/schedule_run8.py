"""The schedule of a run8 pattern, for csrc/cuda/sddmm_run8.cu: where each of its runs lies in the tiles and in shared memory.

`run8_units.py` says what a run, a tile and a unit are. The layout of the table is that of `Run8Schedule` in
csrc/cuda/sddmm_run8.h.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .limits import Limits, ceil_div
from .run8_units import COLUMN_BEGIN, FIRST_TILE, ROW_BEGIN, RUN, SHAPES, TILE_ROWS, Plan, Runs

HALF_TILE = 8  # rows that shared memory serves at once


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
        The table, int32 on the device of `indices`, and `launch`: the shape, rows of a block, units, tiles, multiprocessors.

    Raises:
        ValueError: The indices are no such runs, or lie outside the weight.
    """
    runs = Runs.of(indices, out_features, in_features)
    limits = limits or Limits.of(indices.device)
    fitting = [number for number, sides in enumerate(SHAPES) if shared_bytes(*sides) <= limits.shared_bytes]
    plans = [Plan.of(runs, number) for number in (fitting if shape is None else [shape])]
    plan = min(plans, key=lambda plan: plan.cost)
    return _table(runs, plan), [plan.shape, plan.rows, plan.units, plan.tiles, limits.processors]


def run8_indices(table: Tensor, launch: list[int], in_features: int, nnz: int) -> Tensor:
    """The flat positions `[nnz]`, int64, that a schedule was made from."""
    parts = Parts.of(table, launch)
    tiles = parts.header[:, FIRST_TILE].diff()
    unit = torch.arange(len(tiles), device=table.device).repeat_interleave(tiles)  # of each tile
    turn = parts.turns[unit[:, None], parts.places // TILE_ROWS]
    row = parts.header[unit, ROW_BEGIN, None] + (parts.places ^ turn)
    column = parts.header[unit, COLUMN_BEGIN] + parts.groups * RUN
    first = row * in_features + column[:, None]
    held = parts.runs >= 0
    indices = torch.empty(nnz // RUN, dtype=torch.int64, device=table.device)
    indices[parts.runs[held]] = first[held]
    return (indices[:, None] + torch.arange(RUN, device=table.device)).flatten()


def shared_bytes(rows: int, columns: int) -> int:
    """The shared memory of a block: two stages of 16 tokens, input rows padded by 16 bytes."""
    return 2 * (rows * 32 + 16 * (2 * columns + 16))


class Parts(NamedTuple):
    """The parts of a table, int64.

    Attributes:
        header: `[units + 1, 4]`.
        runs: `[tiles, 16]`, the run of each row of a tile, -1 for none.
        places: `[tiles, 16]`, where shared memory holds that row.
        groups: `[tiles]`, the column group in its unit.
        turns: `[units, rows / 16]`.
    """

    header: Tensor
    runs: Tensor
    places: Tensor
    groups: Tensor
    turns: Tensor

    @classmethod
    def of(cls, table: Tensor, launch: list[int]) -> Parts:
        _, rows, units, tiles, _ = launch
        segments = rows // TILE_ROWS
        packed = TILE_ROWS // 2  # int32 that hold 16 places of 16 bits
        sizes = [4 * (units + 1), TILE_ROWS * tiles, packed * tiles, tiles, segments * units]
        header, runs, places, groups, turns = table.split(sizes)
        return cls(
            header.view(-1, 4).long(),
            runs.view(-1, TILE_ROWS).long(),
            places.clone().view(torch.int16).view(-1, TILE_ROWS).long(),
            groups.long(),
            turns.view(-1, segments).long(),
        )


@dataclass(frozen=True)
class Cut:
    """The runs as a plan cuts them, by key: a block of rows and a column group (`Runs.keys`).

    Attributes:
        key: `[runs]`, the key of each run.
        row: `[runs]`, its row in its block of rows.
        count: `[keys]`, runs of each key.
        halves: `[keys]`, half tiles of each key, two for each tile.
        halves_before: `[keys]`, half tiles of all earlier keys.
        unit: `[keys]`, the unit of each key.
    """

    key: Tensor
    row: Tensor
    count: Tensor
    halves: Tensor
    halves_before: Tensor
    unit: Tensor

    @classmethod
    def of(cls, runs: Runs, plan: Plan, header: Tensor) -> Cut:
        key = runs.keys(plan.rows)
        count = torch.bincount(key, minlength=ceil_div(runs.out_features, plan.rows) * runs.groups)
        halves = 2 * ceil_div(count, TILE_ROWS)
        halves_before = halves.cumsum(0) - halves
        ends = header[1:, FIRST_TILE].contiguous()  # of the units, in tiles
        unit = torch.bucketize(halves_before // 2, ends, right=True)
        return cls(key, runs.row % plan.rows, count, halves, halves_before, unit)


def _table(runs: Runs, plan: Plan) -> Tensor:
    """The table, part by part as in `Parts`."""
    header = torch.tensor(plan.header, dtype=torch.int32, device=runs.row.device)
    cut = Cut.of(runs, plan, header)
    turns = _turns(cut, plan.units, plan.rows // TILE_ROWS)
    place = cut.row ^ turns[cut.unit[cut.key], cut.row // TILE_ROWS]  # of each run's row in shared memory
    order, seat = _seating(cut, place, plan.rows)

    seats = plan.tiles * TILE_ROWS
    seated_runs = torch.full((seats,), -1, dtype=torch.int32, device=seat.device)
    seated_runs[seat] = order.int()
    seated_places = torch.full((seats,), -1, dtype=torch.int64, device=seat.device)
    seated_places[seat] = place[order]
    packed_places = _with_spare_places(seated_places).view(torch.int32)
    groups = torch.zeros(plan.tiles, dtype=torch.int32, device=seat.device)
    first_group = header[cut.unit[cut.key[order]], COLUMN_BEGIN] // RUN
    groups[seat // TILE_ROWS] = (runs.group[order] - first_group).int()
    return torch.cat([header.flatten(), seated_runs, packed_places, groups, turns.int().flatten()])


def _seating(cut: Cut, place: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The runs in the order of their seats, and the seat of each in that order: a row of a tile, counted over all tiles.

    The runs of a key are dealt out to its half tiles in order of their banks: rows of one bank meet as rarely as can be.
    """
    bank = cut.key * RUN + place % RUN
    order = (bank * rows + place).argsort()
    key = cut.key[order]
    runs_before = cut.count.cumsum(0) - cut.count
    rank = torch.arange(len(key), device=key.device) - runs_before[key]
    half = cut.halves_before[key] + rank % cut.halves[key]
    return order, half * HALF_TILE + rank // cut.halves[key]


def _turns(cut: Cut, units: int, segments: int) -> Tensor:
    """`[units, segments]`: shared memory holds row r of a unit at place `r ^ turn`, where a segment, 16 rows, shares a turn.

    A turn is 0 to 7, and a place mod 8 is its banks. One segment after the other, the turn is taken that leaves the rows of each
    key most evenly spread.
    """
    keys = len(cut.halves)
    meeting = cut.row // TILE_ROWS * keys + cut.key  # of a segment and a key, by segment
    meetings, meeting_of_run = torch.unique(meeting, return_inverse=True)
    banks = cut.row.new_zeros(len(meetings), RUN)  # how many rows of a meeting lie at each, before the turn
    banks.index_put_((meeting_of_run, cut.row % RUN), banks.new_ones(()), accumulate=True)
    edges = torch.arange(segments + 1, device=meetings.device) * keys
    bounds = torch.searchsorted(meetings, edges).tolist()

    turn = torch.arange(RUN, device=banks.device)
    turned = turn[:, None] ^ turn  # [turns, banks]
    held = banks.new_zeros(keys, RUN)  # by the earlier segments, at the turns that they got
    turns = banks.new_zeros(units, segments)
    for segment, (begin, end) in enumerate(pairwise(bounds)):
        key = meetings[begin:end] - segment * keys
        unit = cut.unit[key]
        after = held[key][:, None] + banks[begin:end][:, turned]  # [keys, turns, banks]
        fullest = after.amax(2).maximum(cut.halves[key][:, None])
        cost = 256 * fullest + after.square().sum(2)
        cost_of_unit = cost.new_zeros(units, RUN).index_add_(0, unit, cost)
        best = (cost_of_unit * RUN + turn).argmin(1)  # of equal ones the first
        turns[:, segment] = best
        held[key] = after[torch.arange(len(key), device=key.device), best[unit]]
    return turns


def _with_spare_places(places: Tensor) -> Tensor:
    """The places `[seats]` as int16, every -1 replaced by one of 0 to 7 whose banks the rest of its half tile leaves free."""
    halves = places.view(-1, HALF_TILE)
    spare = halves < 0
    nowhere = RUN  # the bank of a spare place
    banks = (halves % RUN).masked_fill(spare, nowhere)
    taken = torch.nn.functional.one_hot(banks, RUN + 1).sum(1)[:, :RUN] > 0
    free_first = taken.int().argsort(dim=1, stable=True)
    number = (spare.long().cumsum(1) - 1).clamp_min(0)  # of a spare place in its half tile
    return torch.where(spare, free_first.gather(1, number), halves).short().flatten()
