"""Units: what is chosen of a weight as a whole, one entry, or all that belongs to one input of a layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import ops

CHUNK = 1 << 22  # entries that are converted, and summed, at once


def index_dtype(numel: int) -> torch.dtype:
    """int32 for weights below 2**31 entries, int64 from there on."""
    return torch.int32 if numel < 2**31 else torch.int64


@dataclass(frozen=True)
class Units:
    """A weight seen as `[outer, count, inner]`, of which unit j is `[:, j, :]`.

    Attributes:
        outer, count, inner: the sizes. Of a linear weight `[out, in]` they are out, in, 1; of a Conv1D `[in, out]` 1, in, out; of
            a convolution out, in, and the size of its kernel; of an embedding vocabulary, features, 1.
    """

    outer: int
    count: int
    inner: int

    @classmethod
    def of(cls, shape: Sequence[int], axis: int | None) -> Units:
        """The units of a weight along a dimension; along none each entry is one."""
        if axis is None:
            return cls(1, math.prod(shape), 1)
        return cls(math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :]))

    @property
    def size(self) -> int:
        """How many entries one unit has."""
        return self.outer * self.inner

    @property
    def numel(self) -> int:
        """How many entries the weight has."""
        return self.size * self.count

    def entries(self, chosen: Tensor) -> Tensor:
        """The entries of units.

        Args:
            chosen: `[c]`, ascending.

        Returns:
            `[c * size]`, flat, ascending, int32 (int64 from 2**31 entries).
        """
        inner = torch.arange(self.inner, device=chosen.device)
        outer = torch.arange(self.outer, device=chosen.device) * (self.count * self.inner)
        row = (chosen.long()[:, None] * self.inner + inner).flatten()
        return (outer[:, None] + row).flatten().to(index_dtype(self.numel))

    def holding(self, indices: Tensor) -> Tensor:
        """The units that hold any of these entries, ascending, int64."""
        return (indices.long() // self.inner % self.count).unique()

    def whole(self, indices: Tensor) -> Tensor | None:
        """The units that these entries are, all of each and nothing else; None where they are no such.

        Args:
            indices: `[nnz]`, flat, ascending.

        Returns:
            `[c]`, ascending, int32 (int64 from 2**31 units).
        """
        if not self.size or indices.numel() % self.size:
            return None
        row = indices[: indices.numel() // self.outer]
        chosen = row[:: self.inner] // self.inner
        if chosen.numel() and (chosen[-1] >= self.count or not torch.equal(self.entries(chosen).to(indices), indices)):
            return None
        return chosen.to(index_dtype(self.count))

    def means(self, score: Tensor, squares: bool) -> Tensor:
        """The score of each unit: the mean over its entries, or the root of the mean of their squares.

        Units of one weight are ranked by it as by the sum. Over several weights, whose units differ in size, it ranks by what a
        trained entry brings, so that of a given number of entries the sum of all their scores becomes the largest. The root
        keeps the order of the squares, and those of small scores do not vanish in float32.

        Args:
            score: of the weight's entries, in its shape.
            squares: whether squares add up.

        Returns:
            `[count]`, float64; where each entry is a unit, the scores themselves.
        """
        if self.size == 1:
            return score.flatten()
        total = torch.zeros(self.count, dtype=torch.float64, device=score.device)
        for part in score.reshape(self.outer, self.count, self.inner).split(max(1, CHUNK // (self.count * self.inner))):
            part = part.double()
            total += (part.square() if squares else part).sum((0, 2))
        mean = total / self.size
        return mean.sqrt() if squares else mean


def whole_units(shape: Sequence[int], indices: Tensor) -> tuple[int, Tensor] | None:
    """The whole columns (or channels), or else the whole rows, that entries of a weight are.

    Args:
        shape: of the weight.
        indices: `[nnz]`, flat, ascending.

    Returns:
        The dimension along which they are counted, 1 or 0, and which they are, `[c]`; None where they are neither, or no more
        than one entry each.
    """
    for axis in (1, 0) if len(shape) > 1 and indices.numel() else ():
        units = Units.of(shape, axis)
        chosen = units.whole(indices) if units.size > 1 else None
        if chosen is not None:
            return axis, chosen
    return None


class Pattern(NamedTuple):
    """Which entries of a weight are chosen: single ones, or all those of its columns.

    Attributes:
        chosen: flat indices `[nnz]`, sorted, or the numbers `[c]` of columns, ascending; int32 (int64 from 2**31 on).
        columns: the weight as its columns; None where `chosen` are flat indices.
    """

    chosen: Tensor
    columns: Units | None = None

    @classmethod
    def of(cls, indices: Tensor, columns: Units) -> Pattern:
        """The pattern of flat indices, by columns where it is made of whole ones.

        Args:
            indices: `[nnz]`; on the meta device nothing is known of them.
            columns: of the weight, see `Site.units`.
        """
        is_known = columns.size > 1 and indices.numel() and not indices.is_meta
        chosen = columns.whole(indices) if is_known else None
        return cls(indices) if chosen is None else cls(chosen, columns)

    @classmethod
    def stored(cls, chosen: Tensor, nnz: int, columns: Units) -> Pattern | None:
        """The pattern of `nnz` entries that a state holds as flat indices or as columns; None where it has not as many."""
        if chosen.numel() == nnz:
            return cls.of(chosen, columns)
        return cls(chosen, columns) if chosen.numel() * columns.size == nnz else None

    @property
    def indices(self) -> Tensor:
        """The flat indices `[nnz]`; of columns they are made anew at each call."""
        return self.chosen if self.columns is None else self.columns.entries(self.chosen)

    @property
    def nnz(self) -> int:
        """How many entries are chosen."""
        return self.chosen.numel() * (1 if self.columns is None else self.columns.size)

    def view(self, weight: Tensor) -> Tensor:
        """A weight in the shape in which the operators know `chosen` by: columns are its dimension 1."""
        if self.columns is None or self.columns.outer > 1:
            return weight
        return weight.view(1, self.columns.count, self.columns.inner)

    def gather(self, weight: Tensor) -> Tensor:
        """The chosen entries `[nnz]` of a contiguous weight."""
        if self.columns is None:
            return ops.gather(weight, self.chosen)
        return self.view(weight).index_select(1, self.chosen).flatten()

    def to(self, device: torch.device) -> Pattern:
        """The same pattern on a device."""
        return Pattern(self.chosen.to(device), self.columns)

    def is_same(self, other: Pattern) -> bool:
        """Whether both are the same entries, on any devices."""
        return self.columns == other.columns and torch.equal(self.chosen.cpu(), other.chosen.cpu())
