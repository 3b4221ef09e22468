"""`order_rows` of csrc/host/order.h, slowly and in Python: the oracle of the ordered schedules."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BANKS = 8
Stock = list[list[list[int]]]  # by lane and bank the entries that wait for a slot
VirtualRow = tuple[int, list[int]]  # a row and at most as many of its entries as a lane has slots


def order_rows_slowly(
    indices: Tensor, out_features: int, in_features: int, threads: int, rows_per_lane: int, slots: int, columns: int
) -> tuple[Tensor, int, float]:
    """What `host.order_rows` gives for the same arguments."""
    positions = indices.tolist()
    banks = [position % in_features % BANKS for position in positions]
    block, width = threads * rows_per_lane, min(columns, in_features)
    begins: list[int] = []
    rows: list[int] = []
    entries: list[int] = []
    phases = wavefronts = 0
    for window, virtual in _virtual_rows(positions, banks, in_features, slots, columns):
        tiles, base = -(-len(virtual) // block), len(begins)
        begins += [min(window * columns, in_features - width)] * tiles
        rows += [-1] * (tiles * block)
        entries += [-1] * (tiles * block * slots)
        for first in range(0, len(virtual), BANKS):
            eight = virtual[first : first + BANKS]
            tile, place = base + first // block, first % block
            line = tile * rows_per_lane + place // 32 % rows_per_lane
            thread = place // (32 * rows_per_lane) * 32 + place % 32
            for lane, (row, _) in enumerate(eight):
                rows[line * threads + thread + lane] = row
            stock = [[[e for e in members if banks[e] == bank] for bank in range(BANKS)] for _, members in eight]
            for slot, served in enumerate(_fill_slots(stock, slots)):
                met = [bank for _, bank, _ in served]
                wavefronts += max(map(met.count, met), default=0)
                phases += bool(met)
                for lane, _, entry in served:
                    entries[(line * slots + slot) * threads + thread + lane] = entry
    table = torch.tensor(begins + rows + entries, dtype=torch.int32)
    return table, len(begins), wavefronts / max(phases, 1)


def _virtual_rows(
    positions: list[int], banks: list[int], in_features: int, slots: int, columns: int
) -> Iterator[tuple[int, list[VirtualRow]]]:
    """Window by window the virtual rows: a row's entries in order of their banks, dealt to as many as they need."""
    windows: dict[int, dict[int, list[int]]] = {}
    for entry, position in enumerate(positions):
        row, column = divmod(position, in_features)
        windows.setdefault(column // columns, {}).setdefault(row, []).append(entry)
    for window in sorted(windows):
        virtual: list[VirtualRow] = []
        for row, members in windows[window].items():
            members = sorted(members, key=banks.__getitem__)
            parts = -(-len(members) // slots)
            virtual += [(row, members[part::parts]) for part in range(parts)]
        yield window, virtual


def _fill_slots(stock: Stock, slots: int) -> Iterator[list[tuple[int, int, int]]]:
    """For each slot the `(lane, bank, entry)` that it serves; empties `stock`."""
    for slot in range(slots):
        left = [sum(map(len, banks)) for banks in stock]
        slack = [slots - slot - count for count in left]
        order = sorted((slack[lane], sum(map(bool, stock[lane])), lane) for lane in range(len(stock)) if left[lane])
        served: list[tuple[int, int, int]] = []
        used = [0] * BANKS
        for _, _, lane in order:
            held = [bank for bank in range(BANKS) if stock[lane][bank]]
            free = [bank for bank in held if not used[bank]]
            if not free and slack[lane] > 0:
                continue
            bank = max(free, key=lambda b: (len(stock[lane][b]), -b)) if free else min(held, key=lambda b: (used[b], b))
            served.append((lane, bank, stock[lane][bank].pop()))
            used[bank] += 1
        yield served
