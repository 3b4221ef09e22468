"""Host-side work on sorted index lists: in C++ where `sprand._host` is built, else in PyTorch, with the same results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

try:
    from .. import _host
except ImportError:
    _host = None


BANKS = 8  # of 16 bytes, which a GPU's shared memory serves at once


def has_extension() -> bool:
    """Whether the compiled module serves CPU tensors."""
    return _host is not None


def compiler() -> str | None:
    """The compiler that built the native modules, where that is known."""
    return getattr(_host, "compiler", None)


def first_bad_index(indices: Tensor, numel: int) -> int:
    """Prove a list of positions: ascending, unique, within `0..numel-1`.

    Args:
        indices: `[nnz]`, int32 or int64, any device.
        numel: the number of positions there are.

    Returns:
        The place of the first entry that is out of range or not above its predecessor, or -1.

    Raises:
        ValueError: `indices` is not a vector of int32 or int64.
    """
    _check("first_bad_index", indices)
    if _host is not None and indices.device.type == "cpu":
        indices = indices.contiguous()
        limit = min(numel, 2**63 - 1)
        return _host.first_bad_index(indices.data_ptr(), indices.numel(), indices.element_size(), limit)
    bad = indices < 0
    if numel <= torch.iinfo(indices.dtype).max:
        bad |= indices >= numel
    bad[1:] |= indices[1:] <= indices[:-1]
    where = bad.nonzero()
    return int(where[0]) if len(where) else -1


def merge_indices(lists: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The sorted union of several index lists, and where each list's entries stand in it.

    Args:
        lists: one or more `[nnz_i]`, ascending, unique, of one dtype (int32 or int64) and device.

    Returns:
        The union `[n]` in that dtype, and for each list its positions in the union, `[nnz_i]` int64:
        `union[positions[i]] == lists[i]`.

    Raises:
        ValueError: no list, lists of different dtype or device, or one that is not ascending and unique.
    """
    if not lists:
        raise ValueError("merge_indices: expected at least one list of indices, got none")
    for number, indices in enumerate(lists):
        _check("merge_indices", indices)
        if indices.dtype != lists[0].dtype or indices.device != lists[0].device:
            raise ValueError(
                f"merge_indices: expected all lists as {lists[0].dtype} on {lists[0].device}, "
                f"got list {number} as {indices.dtype} on {indices.device}"
            )
        bad = first_bad_index(indices, 2**63 - 1)
        if bad >= 0:
            raise ValueError(
                f"merge_indices: expected ascending, unique indices from 0, got {int(indices[bad])} at {bad} of list {number}"
            )
    if _host is None or lists[0].device.type != "cpu":
        union = torch.unique(torch.cat(list(lists)))
        return union, [torch.searchsorted(union, indices.contiguous()) for indices in lists]
    kept = [indices.contiguous() for indices in lists]
    union = torch.empty(sum(indices.numel() for indices in kept), dtype=kept[0].dtype)
    positions = [torch.empty(indices.numel(), dtype=torch.int64) for indices in kept]
    count = _host.merge_indices(
        [(indices.data_ptr(), indices.numel()) for indices in kept],
        union.element_size(),
        union.data_ptr(),
        [place.data_ptr() for place in positions],
    )
    return union[:count].clone(), positions


def order_rows(
    indices: Tensor, out_features: int, in_features: int, threads: int, rows_per_lane: int, slots: int, columns: int
) -> tuple[Tensor, int, float]:
    """Deal the entries of an arbitrary mask to the lanes of the CUDA row kernel; csrc/host/order.h says how.

    Args:
        indices: `[nnz]`, int32 or int64, sorted, any device.
        out_features, in_features: rows and columns of the weight; in_features is even.
        threads, rows_per_lane, slots, columns: of the kernel's variant; columns is even.

    Returns:
        The kernel's table (int32, on the device of indices), the number of tiles, and the wavefronts per shared-memory phase.

    Raises:
        ValueError: `indices` is not a vector of int32 or int64.
    """
    _check("order_rows", indices)
    here = indices.cpu().contiguous()
    sizes = out_features, in_features, threads, rows_per_lane, slots, columns
    if _host is not None:
        *parts, phases, wavefronts = _host.order_rows(here.data_ptr(), here.numel(), here.element_size(), *sizes)
        lists = [torch.frombuffer(bytearray(part), dtype=torch.int32) for part in parts]
    else:
        *parts, phases, wavefronts = _order_rows(here.tolist(), *sizes)
        lists = [torch.tensor(part, dtype=torch.int32) for part in parts]
    return torch.cat(lists).to(indices.device), len(lists[0]), wavefronts / max(phases, 1)


def _order_rows(
    indices: list[int], out_features: int, in_features: int, threads: int, rows_per_lane: int, slots: int, columns: int
) -> tuple[list[int], list[int], list[int], int, int]:
    """`order_rows` of csrc/host/order.h in Python."""
    block, width = threads * rows_per_lane, min(columns, in_features)
    windows: dict[int, dict[int, list[int]]] = {}  # window, row: entries
    for entry, index in enumerate(indices):
        row, column = divmod(index, in_features)
        windows.setdefault(column // columns, {}).setdefault(row, []).append(entry)
    begins: list[int] = []
    rows: list[int] = []
    entries: list[int] = []
    phases = wavefronts = 0
    for window in sorted(windows):
        virtual: list[tuple[int, list[int]]] = []
        for row, members in windows[window].items():
            members = sorted(members, key=lambda entry: indices[entry] % in_features % BANKS)
            parts = -(-len(members) // slots)
            virtual += [(row, members[part::parts]) for part in range(parts)]
        tiles, base = -(-len(virtual) // block), len(begins)
        begins += [min(window * columns, in_features - width)] * tiles
        rows += [-1] * (tiles * block)
        entries += [-1] * (tiles * block * slots)
        for eight in range(0, len(virtual), BANKS):
            tile, place = base + eight // block, eight % block
            line = tile * rows_per_lane + place // 32 % rows_per_lane
            thread = place // (32 * rows_per_lane) * 32 + place % 32
            stock = []
            for lane, (row, members) in enumerate(virtual[eight : eight + BANKS]):
                rows[line * threads + thread + lane] = row
                stock.append([[e for e in members if indices[e] % in_features % BANKS == bank] for bank in range(BANKS)])
            for slot, chosen in enumerate(_fill_slots(stock, slots)):
                used = [bank for _, bank, _ in chosen]
                wavefronts += max(map(used.count, used), default=0)
                phases += bool(used)
                for lane, _, entry in chosen:
                    entries[(line * slots + slot) * threads + thread + lane] = entry
    return begins, rows, entries, phases, wavefronts


def _fill_slots(stock: list[list[list[int]]], slots: int) -> Iterator[list[tuple[int, int, int]]]:
    """For each slot the `(lane, bank, entry)` that it serves; empties `stock`."""
    for slot in range(slots):
        left = [sum(map(len, banks)) for banks in stock]
        slack = [slots - slot - count for count in left]
        order = sorted((slack[lane], sum(map(bool, stock[lane])), lane) for lane in range(len(stock)) if left[lane])
        chosen: list[tuple[int, int, int]] = []
        used = [0] * BANKS
        for _, _, lane in order:
            held = [bank for bank in range(BANKS) if stock[lane][bank]]
            free = [bank for bank in held if not used[bank]]
            if not free and slack[lane] > 0:
                continue
            bank = max(free, key=lambda b: (len(stock[lane][b]), -b)) if free else min(held, key=lambda b: (used[b], b))
            chosen.append((lane, bank, stock[lane][bank].pop()))
            used[bank] += 1
        yield chosen


def _check(name: str, indices: Tensor) -> None:
    if indices.dim() != 1 or indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name}: expected indices [nnz] of int32 or int64, got {list(indices.shape)} of {indices.dtype}")
