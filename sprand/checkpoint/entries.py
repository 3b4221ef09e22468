"""The combined entries of one parameter, worked out when first needed, and where they are in the tensors and parts of a file."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapters.combining import SUM, Part, Rule, combined
from ..adapters.file import AdapterFile
from ..kernels import ops
from ..selection import pattern
from .conversion import Place
from .shards import CHUNK, Stored


@dataclass(frozen=True, eq=False)
class ParameterEntries:
    """What adapters change in one parameter.

    Attributes:
        indices: `[n]`, flat, sorted.
        deltas: `[n]`, float32 (float64 for float64 tensors).
        frozen_indices, frozen_values: the frozen entries, which lie under the deltas; flat, sorted.
        positions: where the entries of each adapter stand in `indices`; None for all of them in order.
    """

    indices: Tensor
    deltas: Tensor
    frozen_indices: Tensor
    frozen_values: Tensor
    positions: list[Tensor | None]


class PlacedEntries:
    """Entries of one parameter as they lie in the tensors that hold it, one after another.

    Args:
        place: of the parameter.
        indices: `[n]`, flat and sorted, in the parameter.
        values: `[n]`, what goes with them.

    Attributes:
        indices: `[n]`, flat and sorted, among the entries of the tensors.
        values: `[n]`, in that order.
    """

    def __init__(self, place: Place, indices: Tensor, values: Tensor) -> None:
        self.indices, self.values, self._order = place.positions(indices), values, None
        if place.rows is not None:
            self.indices, self._order = self.indices.sort()
            self.values = values[self._order]

    def restored(self, values: Tensor) -> Tensor:
        """What goes with the entries `[n]`, in the order of the parameter again."""
        return _unsorted(values, self._order)


class PendingEntries:
    """The entries of one parameter, drawn and combined once, by whichever thread asks first.

    Args:
        name: of the parameter.
        adapters: all adapters, in their order; some may not change this parameter.
        rule: how they are combined.
        dtype: of the parameter in the checkpoint.
        place: of the parameter in the checkpoint.
    """

    def __init__(self, name: str, adapters: Sequence[AdapterFile], rule: Rule, dtype: torch.dtype, place: Place) -> None:
        self.name, self.adapters, self.rule, self.dtype, self.place = name, adapters, rule, dtype, place
        self.chosen = [adapter for adapter in adapters if name in adapter.targets]
        self._lock = threading.Lock()
        self._entries: ParameterEntries | None = None
        self._placed: tuple[PlacedEntries, PlacedEntries] | None = None

    def entries(self) -> ParameterEntries:
        """The entries of all adapters, combined.

        Raises:
            ValueError: An adapter is damaged.
        """
        with self._lock:
            if self._entries is None:
                self._entries = self._combine()
            return self._entries

    def placed(self) -> tuple[PlacedEntries, PlacedEntries]:
        """Those that have a delta, and the frozen ones, as they lie in the tensors of the checkpoint.

        Raises:
            ValueError: An adapter is damaged.
        """
        whole = self.entries()
        with self._lock:
            if self._placed is None:
                trained = PlacedEntries(self.place, whole.indices, whole.deltas)
                self._placed = trained, PlacedEntries(self.place, whole.frozen_indices, whole.frozen_values)
            return self._placed

    def _combine(self) -> ParameterEntries:
        dtype = ops.accumulation_dtype(self.dtype)
        parts = []
        for adapter in self.chosen:
            indices, deltas = adapter.entries(self.name)
            parts.append(Part(self.adapters.index(adapter), adapter.weight, indices, deltas.to(dtype)))
        first = parts[0]
        frozen_indices, frozen_values = self.chosen[0].frozen(self.name) or (first.indices[:0], torch.empty(0))
        frozen = frozen_indices, frozen_values.to(self.dtype)
        if self.rule == SUM and len(parts) == 1 and first.weight == 1:
            return ParameterEntries(first.indices, first.delta, *frozen, [None])
        whole = combined(self.rule, len(self.adapters), {self.name: parts})[self.name]
        return ParameterEntries(whole.indices, whole.delta, *frozen, whole.positions)


class PartedEntries:
    """Entries of one tensor, cut where the parts begin in which it is read.

    Args:
        stored: the tensor.
        claims: of each parameter that the tensor holds entries of: its entries, and where among them the tensor's own begin.

    Attributes:
        indices: `[n]`, flat and sorted, in the tensor.
        values: `[n]`.
        base: `[n]`, what the tensor held there before; known once all its parts were edited.

    Raises:
        ValueError: Two parameters have the same entry.
    """

    def __init__(self, stored: Stored, claims: Sequence[tuple[PlacedEntries, int]]) -> None:
        cuts = [_cut(stored, placed, begin) for placed, begin in claims]
        self._counts, self._order = [values.numel() for _, values in cuts], None
        self.indices, self.values = cuts[0] if len(cuts) == 1 else map(torch.cat, zip(*cuts, strict=True))
        if len(cuts) > 1:
            self.indices, self._order = self.indices.sort()
            self.values = self.values[self._order]
            if (self.indices[1:] == self.indices[:-1]).any():
                raise ValueError(f"two parameters of the adapters are the same entries of {stored.name}")
        self.base = torch.empty(self.indices.shape, dtype=stored.dtype)
        self._step = CHUNK // stored.dtype.itemsize
        starts = torch.arange(0, stored.numel + self._step, self._step).clamp_(max=stored.numel)
        self._bounds = torch.searchsorted(self.indices.long(), starts).tolist()

    def base_of(self, claim: int) -> Tensor:
        """The base of the entries of one of the parameters, in their order."""
        return _unsorted(self.base, self._order).split(self._counts)[claim]

    def touch(self, first: int, count: int) -> bool:
        """Whether any of them lie in the part that begins at `first`."""
        low, high = self._span(first, count)
        return low < high

    def within(self, first: int, count: int) -> tuple[slice, Tensor]:
        """Which of them lie in the part that begins at `first`, and where in the part, int32."""
        low, high = self._span(first, count)
        return slice(low, high), (self.indices[low:high] - first).to(torch.int32)

    def held(self, part: Tensor, first: int) -> Tensor:
        """What a part holds at the entries."""
        return ops.gather(part, self.within(first, part.numel())[1])

    def put_base(self, part: Tensor, first: int) -> None:
        """Let a part hold the base there."""
        own, places = self.within(first, part.numel())
        ops.patch_(part, places, self.base[own], None)

    def _span(self, first: int, count: int) -> tuple[int, int]:
        assert first % self._step == 0 and count <= self._step
        number = first // self._step
        return self._bounds[number], self._bounds[number + 1]


def _cut(stored: Stored, placed: PlacedEntries, begin: int) -> tuple[Tensor, Tensor]:
    """The indices and values of a parameter's entries that are in one tensor, in that tensor."""
    low, high = _bounds(placed.indices, begin, stored.numel)
    return (placed.indices[low:high] - begin).to(pattern.index_dtype(stored.numel)), placed.values[low:high]


def _unsorted(values: Tensor, order: Tensor | None) -> Tensor:
    """What was put in an order, as it was before."""
    if order is None:
        return values
    result = torch.empty_like(values)
    result[order] = values
    return result


def _bounds(indices: Tensor, first: int, count: int) -> tuple[int, int]:
    """Where the indices from `first` on begin, and where they end after `count` positions."""
    limits = torch.tensor([first, first + count]).clamp(max=torch.iinfo(indices.dtype).max)
    low, high = torch.searchsorted(indices, limits.to(indices.dtype)).tolist()
    return low, high
