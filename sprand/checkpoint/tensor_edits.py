"""What adapters change in one tensor of a checkpoint: some of its entries, or all of them."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..kernels import ops
from .entries import PartedEntries, PendingEntries
from .shards import Stored


class Edit:
    """The entries of one tensor that adapters change: `cast(base + delta)`, rounded once, over frozen entries.

    Args:
        stored: the tensor.
        pending: the entries of the parameter that it holds entries of.
        begin: the position of its first entry among those of all tensors that hold the parameter.

    Attributes:
        claims: of each parameter that it holds entries of the same two; some checkpoints have several in one tensor.
    """

    def __init__(self, stored: Stored, pending: PendingEntries, begin: int = 0) -> None:
        self.stored, self.claims = stored, [(pending, begin)]
        self._lock = threading.Lock()
        self._entries: tuple[PartedEntries, PartedEntries] | None = None

    @property
    def trained(self) -> PartedEntries:
        """The entries that have a delta, and their deltas, float32 (float64 for float64 tensors).

        Raises:
            ValueError: An adapter is damaged.
        """
        return self.prepare()[0]

    @property
    def frozen(self) -> PartedEntries:
        """The frozen entries, which lie under the deltas, and their values.

        Raises:
            ValueError: An adapter is damaged.
        """
        return self.prepare()[1]

    def prepare(self) -> tuple[PartedEntries, PartedEntries]:
        """Work the entries out, if that has not been done yet."""
        with self._lock:
            if self._entries is None:
                placed = [(*pending.placed(), begin) for pending, begin in self.claims]
                trained = PartedEntries(self.stored, [(entries, begin) for entries, _, begin in placed])
                frozen = PartedEntries(self.stored, [(entries, begin) for _, entries, begin in placed])
                self._entries = trained, frozen
            return self._entries

    def bases(self, pending: PendingEntries) -> tuple[Tensor, Tensor]:
        """What the entries of one parameter held before, trained and frozen ones, in the order of the tensor."""
        claim = [claimed for claimed, _ in self.claims].index(pending)
        trained, frozen = self.prepare()
        return trained.base_of(claim), frozen.base_of(claim)

    def touches(self, first: int, count: int) -> bool:
        """Whether it changes any of `count` entries from `first` on."""
        return any(entries.touch(first, count) for entries in self.prepare())

    def apply(self, part: Tensor, first: int) -> None:
        """Change a part of the tensor, flat, in place; `first` is the position of its first entry."""
        trained, frozen = self.prepare()
        own, places = trained.within(first, part.numel())
        start = trained.base[own] = ops.gather(part, places)
        if frozen.indices.numel():
            under, frozen_places = frozen.within(first, part.numel())
            frozen.base[under] = ops.gather(part, frozen_places)
            ops.patch_(part, frozen_places, frozen.values[under], None)
            start = ops.gather(part, places)
        ops.patch_(part, places, start, trained.values[own])

    def restore(self, part: Tensor, first: int) -> None:
        """Put the base back into a part that holds the trained values.

        Raises:
            ValueError: The part holds other values.
        """
        before = self._held(part, first)
        self._put_base(part, first)
        self.apply(part, first)
        for made, held in zip(self._held(part, first), before, strict=True):
            _prove_same(self.stored, made, held)
        self._put_base(part, first)

    def _held(self, part: Tensor, first: int) -> list[Tensor]:
        return [entries.held(part, first) for entries in self.prepare()]

    def _put_base(self, part: Tensor, first: int) -> None:
        self.frozen.put_base(part, first)
        self.trained.put_base(part, first)


@dataclass(eq=False)
class Overwrite:
    """All entries of one tensor: a module that was trained in full.

    Attributes:
        stored: the tensor.
        values: its new entries, flat, in its dtype.
        base: what it held before; known once all its parts were edited.
    """

    stored: Stored
    values: Tensor
    base: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.base = torch.empty_like(self.values)

    def prepare(self) -> None:
        """Do nothing: all is known."""

    def touches(self, first: int, count: int) -> bool:
        """Every entry changes."""
        return True

    def apply(self, part: Tensor, first: int) -> None:
        """Change a part of the tensor, flat, in place; `first` is the position of its first entry."""
        own = slice(first, first + part.numel())
        self.base[own] = part
        part.copy_(self.values[own])

    def restore(self, part: Tensor, first: int) -> None:
        """Put the base back into a part that holds the trained values.

        Raises:
            ValueError: The part holds other values.
        """
        own = slice(first, first + part.numel())
        _prove_same(self.stored, self.values[own], part)
        part.copy_(self.base[own])


def bits(values: Tensor) -> Tensor:
    """The bytes of a tensor."""
    return values.contiguous().view(torch.uint8)


def _prove_same(stored: Stored, expected: Tensor, held: Tensor) -> None:
    if not torch.equal(bits(expected), bits(held)):
        raise ValueError(
            f"{stored.name} holds other values than the merge wrote: it was changed since, or other adapters or weights were "
            "merged"
        )
