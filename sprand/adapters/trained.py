"""What an adapter holds of one parameter, as it goes to a file."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from ..layers.units import whole_units
from . import layout
from .fingerprint import described_entries, described_target
from .frozen import Frozen


@dataclass(frozen=True, eq=False)
class Trained:
    """What an adapter holds of one parameter, as it goes to a file.

    Attributes:
        shape: of the parameter.
        delta: `[nnz]`, float32 or float64.
        base: `[nnz]`, what the parameter held there before any training, in its dtype.
        indices: `[nnz]`, flat, sorted; None where a seed draws them.
        axis: the dimension along which a seed draws whole columns; None where it draws entries, or none.
        frozen: its frozen entries, which are kept as values under the deltas; None where there are none.
        added: the first row that it was given after `apply`: what is in rows from there on, no base can prove. None for none.
    """

    shape: tuple[int, ...]
    delta: Tensor
    base: Tensor
    indices: Tensor | None = None
    frozen: Frozen | None = None
    added: int | None = None
    axis: int | None = None

    @cached_property
    def units(self) -> tuple[int, Tensor] | None:
        """The axis and the numbers `[c]` of the columns that given entries are; None where they are no whole ones."""
        return None if self.indices is None else whole_units(self.shape, self.indices)

    def describe(self) -> dict[str, Any]:
        """What the file says of the parameter."""
        axis = self.axis if self.units is None else self.units[0]
        target = described_target(self.shape, self.base, self._added(self.indices), axis)
        if self.frozen is not None:
            indices, base = self.frozen.indices, self.frozen.base
            target["frozen"] = described_entries(base, self._added(indices))
        return target

    def _added(self, indices: Tensor | None) -> int:
        """How many of the entries, the last ones, are in added rows."""
        if self.added is None or indices is None:
            return 0
        return int((indices >= self.added * math.prod(self.shape[1:])).sum())

    def tensors(self, name: str) -> dict[str, Tensor]:
        """What the file holds of the parameter of this name."""
        tensors = {layout.key("delta", name): self.delta}
        if self.units is not None:
            axis, units = self.units
            tensors[layout.key(layout.UNITS[axis], name)] = units
        elif self.indices is not None:
            tensors[layout.key("indices", name)] = self.indices
        if self.frozen is not None:
            tensors[layout.key("frozen_indices", name)] = self.frozen.indices
            tensors[layout.key("frozen_values", name)] = self.frozen.values
        return tensors
