"""The combined entries of one parameter, worked out when they are first needed, and cut where the parts of a file begin."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapters.combining import SUM, Part, Rule, combined
from ..adapters.file import AdapterFile
from ..kernels import ops


@dataclass(frozen=True, eq=False)
class Changes:
    """What adapters change in one parameter.

    Attributes:
        indices: `[n]`, flat, sorted.
        deltas: `[n]`, float32 (float64 for float64 tensors).
        set_indices, set_values: entries that are given as values, under the deltas; flat, sorted.
        positions: where the entries of each adapter stand in `indices`; None for all of them in order.
    """

    indices: Tensor
    deltas: Tensor
    set_indices: Tensor
    set_values: Tensor
    positions: list[Tensor | None]


class Pending:
    """The changes of one parameter, drawn and combined once, by whichever thread asks first.

    Args:
        name: of the parameter.
        chosen: the adapters that change it.
        adapters: all of them, in their order.
        rule: how they are combined.
        dtype: of the parameter in the checkpoint.
    """

    def __init__(
        self, name: str, chosen: Sequence[AdapterFile], adapters: Sequence[AdapterFile], rule: Rule, dtype: torch.dtype
    ) -> None:
        self.name, self.chosen, self.adapters, self.rule, self.dtype = name, chosen, adapters, rule, dtype
        self._lock, self._changes = threading.Lock(), None

    def changes(self) -> Changes:
        """Them.

        Raises:
            ValueError: an adapter is damaged.
        """
        with self._lock:
            if self._changes is None:
                self._changes = self._combine()
            return self._changes

    def _combine(self) -> Changes:
        each = [adapter.entries(self.name) for adapter in self.chosen]
        first, (union, total) = self.chosen[0], each[0]
        total, positions = total.to(ops.accumulation_dtype(self.dtype)), [None]
        if self.rule != SUM or len(self.chosen) > 1 or first.weight != 1:
            parts = [
                Part(self.adapters.index(adapter), adapter.weight, indices, deltas.to(total.dtype))
                for adapter, (indices, deltas) in zip(self.chosen, each, strict=True)
            ]
            whole = combined(self.rule, len(self.adapters), {self.name: parts})[self.name]
            union, total, positions = whole.indices, whole.delta, whole.positions
        set_indices, set_values = first.frozen(self.name) or (union[:0], torch.empty(0))
        return Changes(union, total, set_indices, set_values.to(self.dtype), positions)


class Cut:
    """Sorted indices of a tensor, cut where the parts of `step` entries begin in which it is read."""

    def __init__(self, indices: Tensor, numel: int, step: int) -> None:
        starts = torch.arange(0, numel + step, step).clamp_(max=numel)
        self.indices, self.step, self.bounds = indices, step, torch.searchsorted(indices.long(), starts).tolist()

    def span(self, first: int, count: int) -> tuple[int, int]:
        """Which of the indices lie in the part that begins at `first`."""
        assert first % self.step == 0 and count <= self.step
        return self.bounds[first // self.step], self.bounds[first // self.step + 1]

    def part(self, first: int, count: int) -> tuple[slice, Tensor]:
        """The same as a slice, and where they lie in the part."""
        low, high = self.span(first, count)
        return slice(low, high), (self.indices[low:high] - first).to(torch.int32)


def bounds(indices: Tensor, first: int, count: int) -> tuple[int, int]:
    limits = torch.tensor([first, first + count])
    low, high = torch.searchsorted(indices, limits.clamp(max=torch.iinfo(indices.dtype).max).to(indices.dtype)).tolist()
    return low, high
