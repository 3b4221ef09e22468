"""Adapters at hand: their entries packed in host memory, equal positions kept once, and the latest used on the device."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..adapters.frozen import Frozen
from ..adapters.state import Adapter
from ..files import described
from ..kernels import ops

QUAD = 4  # entries that a CUDA kernel reads at once, where they are aligned


Place = tuple[torch.device, torch.dtype]


class Packed:
    """Tensors by name in one buffer for each device and dtype: on the CPU, pinned where a GPU is their place."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        sizes: dict[Place, int] = {}
        self._slots: dict[str, tuple[Place, int, torch.Size]] = {}
        for name, tensor in tensors.items():
            place = tensor.device, tensor.dtype
            begin = sizes.get(place, 0)
            self._slots[name] = place, begin, tensor.shape
            sizes[place] = begin + -(-tensor.numel() // QUAD) * QUAD
        self._buffers = {place: _host_buffer(place, size) for place, size in sizes.items()}
        self.here = self._views(self._buffers)
        for name, view in self.here.items():
            view.copy_(tensors[name])
        bytes_by_place = {place: buffer.nbytes for place, buffer in self._buffers.items()}
        self.nbytes = sum(bytes_by_place.values())
        self.device_nbytes = sum(nbytes for (device, _), nbytes in bytes_by_place.items() if device.type != "cpu")

    def uploaded(self) -> dict[str, Tensor]:
        """The tensors on their devices; those of the CPU are not copied."""
        return self._views({place: buffer.to(place[0], non_blocking=True) for place, buffer in self._buffers.items()})

    def _views(self, buffers: Mapping[Place, Tensor]) -> dict[str, Tensor]:
        views = {}
        for name, (place, begin, shape) in self._slots.items():
            views[name] = buffers[place][begin : begin + shape.numel()].view(shape)
        return views


def _host_buffer(place: Place, size: int) -> Tensor:
    device, dtype = place
    return torch.zeros(size, dtype=dtype, pin_memory=device.type == "cuda")


class Positions:
    """Which entries an adapter changes, and what the base holds there; adapters with the same ones share them."""

    def __init__(self, indices: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> None:
        tensors = {f"indices.{name}": own for name, own in indices.items()}
        tensors |= {f"base.{name}": held for name, held in base.items()}
        self.packed = Packed(tensors)
        self.names = tuple(indices)


@dataclass(frozen=True, eq=False)
class Resident:
    """One adapter: its positions, and the values `[nnz]` that its weights hold there, absolute and in their dtypes.

    Attributes:
        name: what the pool calls it.
        positions: perhaps shared with others.
        values: by parameter name; those of modules trained in full in the parameter's shape.
        whole: names of parameters that were trained in full.
    """

    name: str
    positions: Positions
    values: Packed
    whole: tuple[str, ...]

    @property
    def parts(self) -> tuple[Packed, Packed]:
        """What it takes memory for; positions may be shared with others."""
        return self.values, self.positions.packed


class Library:
    """Makes residents of proven adapters; remembers positions as long as one of them has them."""

    def __init__(self) -> None:
        self._known: weakref.WeakValueDictionary[str, Positions] = weakref.WeakValueDictionary()

    def resident(self, name: str, adapter: Adapter, base: Mapping[str, Tensor]) -> Resident:
        """Compute the values of an adapter once, as training wrote them.

        Args:
            name: what the pool calls it.
            adapter: from `prove`.
            base: what the base holds at its trained entries, `[nnz]` by parameter name.
        """
        held = {key: _held(adapter, key, base[key]) for key in adapter.patterns}
        indices = {key: entries.indices for key, entries in held.items()}
        values = {key: entries.values for key, entries in held.items()}
        digest = described.digest(part for key, own in indices.items() for part in (key, own))
        positions = self._known.get(digest)
        if positions is None:
            made = Positions(indices, {key: entries.base for key, entries in held.items()})
            positions = self._known.setdefault(digest, made)
        whole = adapter.saved | adapter.buffers
        return Resident(name, positions, Packed(values | whole), tuple(whole))


def _held(adapter: Adapter, name: str, base: Tensor) -> Frozen:
    """What a weight holds with an adapter: positions of trained and frozen entries, the values there, and the base's."""
    indices, delta, frozen = adapter.patterns[name].indices, adapter.deltas[name].data, adapter.frozen.get(name)
    if frozen is None:
        return Frozen(indices, ops.patched(base, delta), base)
    start = Frozen(frozen.indices, frozen.values, frozen.values).pristine(indices, base)
    return frozen.extended(indices, ops.patched(start, delta), base)


@dataclass
class DeviceCache:
    """Copies of packed tensors on their devices: the least recently used ones go when their bytes are more than the limit.

    Attributes:
        limit: in bytes, over all devices; None for no limit. What is in use stays, also above it.
        nbytes: of the copies that are there.
        hits, misses, evictions, uploaded_bytes: since the start.
    """

    limit: int | None = None
    nbytes: int = 0
    hits: int = 0
    misses: int = 0
    evictions: int = 0
    uploaded_bytes: int = 0
    _copies: OrderedDict[Packed, dict[str, Tensor]] = field(default_factory=OrderedDict)
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def get(self, packed: Packed, in_use: tuple[Packed, ...] = ()) -> dict[str, Tensor]:
        """The tensors on their devices; `in_use` are not dropped to make room for them."""
        with self._lock:
            if not packed.device_nbytes:
                self.hits += 1
                return packed.here
            if packed in self._copies:
                self.hits += 1
                self._copies.move_to_end(packed)
            else:
                self.misses += 1
                self.shrink((packed, *in_use), packed.device_nbytes)
                self._copies[packed] = packed.uploaded()
                self.nbytes += packed.device_nbytes
                self.uploaded_bytes += packed.device_nbytes
            return self._copies[packed]

    def shrink(self, in_use: tuple[Packed, ...], room: int = 0) -> None:
        """Drop copies, the least recently used first, until the limit leaves `room` bytes."""
        with self._lock:
            for packed in list(self._copies):
                if self.limit is None or self.nbytes + room <= self.limit:
                    return
                if packed not in in_use:
                    self.drop(packed)
                    self.evictions += 1

    def drop(self, packed: Packed) -> None:
        """Forget one copy, if it is there."""
        with self._lock:
            if self._copies.pop(packed, None) is not None:
                self.nbytes -= packed.device_nbytes

    def __contains__(self, packed: Packed) -> bool:
        return packed in self._copies
