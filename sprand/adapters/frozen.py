"""Frozen entries: values that belong to the adapter below its deltas: left behind by a redrawn mask, or what added rows hold."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import host, ops


@dataclass
class Frozen:
    """The frozen entries of one weight.

    Values are kept as they stand in the weight, not as a change: a change that was rounded once could not bring back the
    same bits.

    Attributes:
        indices: `[n]`, flat positions, sorted.
        values: `[n]`, what the weight holds there, in its dtype; under trained entries, what they start from.
        base: `[n]`, what it held before any training.
    """

    indices: Tensor
    values: Tensor
    base: Tensor

    def write(self, weight: Tensor) -> None:
        """Make `weight` hold the frozen values."""
        self._put(weight, self.values)

    def restore(self, weight: Tensor) -> None:
        """Make `weight` hold its base, bit for bit."""
        self._put(weight, self.base)

    def pristine(self, indices: Tensor, base: Tensor) -> Tensor:
        """`base` `[nnz]` at `indices`, with what was there before any training where an entry is frozen."""
        if not self.indices.numel():
            return base
        own = self.indices.to(indices.device)
        place = torch.searchsorted(own, indices).clamp_(max=own.numel() - 1)
        return torch.where(own[place] == indices, self.base.to(base)[place], base)

    def extended(self, indices: Tensor, values: Tensor, base: Tensor) -> Frozen:
        """These entries and further ones, whose values replace those of an entry that is frozen already.

        Args:
            indices: `[nnz]`, flat positions, sorted.
            values: `[nnz]`, what the weight holds there.
            base: `[nnz]`, what the weight would hold without the deltas in these values.
        """
        base = self.pristine(indices, base)
        own = self.indices.to(indices.device)
        union, (before, now) = host.merge_indices([own, indices])
        merged = values.new_empty(union.shape), base.new_empty(union.shape)
        for result, old, new in zip(merged, (self.values, self.base), (values, base), strict=True):
            result[before] = old.to(new)
            result[now] = new
        return Frozen(union, *merged)

    def _put(self, weight: Tensor, values: Tensor) -> None:
        ops.patch_(weight.data, self.indices.to(weight.device), values.to(device=weight.device, dtype=weight.dtype), None)


def nothing_frozen(indices: Tensor, base: Tensor) -> Frozen:
    """No entries, in the dtypes and on the device of a pattern and its base."""
    return Frozen(indices.new_empty(0), base.new_empty(0), base.new_empty(0))
