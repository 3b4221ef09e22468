"""Work on sorted index lists on the host: in C++ where `sprand._host` is built, else in PyTorch, with the same results."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

try:
    from .. import _host
except ImportError:
    _host = None


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
        ValueError: `indices` is no vector of int32 or int64.
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
        ValueError: There is no list, lists differ in dtype or device, or one is not ascending and unique.
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

    Only the compiled module can (`has_extension`).

    Args:
        indices: `[nnz]`, int32 or int64, sorted, any device.
        out_features, in_features: rows and columns of the weight; in_features is even.
        threads, rows_per_lane, slots, columns: of the kernel's variant; columns is even.

    Returns:
        The kernel's table (int32, on the device of indices), the number of tiles, and the wavefronts per shared-memory phase.

    Raises:
        ValueError: `indices` is no vector of int32 or int64.
    """
    _check("order_rows", indices)
    here = indices.cpu().contiguous()
    sizes = out_features, in_features, threads, rows_per_lane, slots, columns
    *parts, phases, wavefronts = _host.order_rows(here.data_ptr(), here.numel(), here.element_size(), *sizes)
    begins, rows, entries = (torch.frombuffer(bytearray(part), dtype=torch.int32) for part in parts)
    table = torch.cat([begins, rows, entries]).to(indices.device)
    return table, len(begins), wavefronts / max(phases, 1)


def _check(name: str, indices: Tensor) -> None:
    if indices.dim() != 1 or indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name}: expected indices [nnz] of int32 or int64, got {list(indices.shape)} of {indices.dtype}")
