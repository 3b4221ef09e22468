"""Exact top-k of scores: per target, and over all targets without ever joining their scores; ties go to the first position.

Scores are compared by 32-bit keys in their order. The k-th largest key is found by two histograms of 16 bits each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

EXCLUDED = -(2**31)  # below the key of every number: an entry that may not be chosen
CHUNK = 1 << 20  # keys worked on at once
SMALL = 1 << 16  # keys that are sorted sooner than counted


def order_keys(score: Tensor) -> Tensor:
    """Keys `[numel]`, int32, that order as the scores do in float32; 0.0 and -0.0 are equal. No score may be NaN."""
    score = score.detach().flatten()
    keys = torch.empty(score.shape, dtype=torch.int32, device=score.device)
    for part, into in zip(score.split(CHUNK), keys.split(CHUNK), strict=True):
        bits = (part.float() + 0.0).view(torch.int32)
        torch.bitwise_xor(bits, (bits >> 31) & 0x7FFFFFFF, out=into)
    return keys


def kth_largest(parts: Sequence[Tensor], k: int) -> tuple[int, int]:
    """The k-th largest of all keys in several tensors, and how many that equal it are among the k largest.

    Args:
        parts: int32 keys; at least `k` of them in all.
        k: at least 1.
    """
    high, above = _bucket([(part, None) for part in parts], k)
    low, more = _bucket([(part, high - 32768) for part in parts], k - above)
    return ((high - 32768) << 16) + low, k - above - more


def largest(keys: Tensor, k: int) -> Tensor:
    """Positions `[k]`, int64, ascending, of the k largest keys; of equal ones the first."""
    if k == 0:
        return keys.new_empty(0, dtype=torch.int64)
    if k == keys.numel():
        return torch.arange(k, device=keys.device)
    if keys.numel() <= SMALL:
        return keys.sort(descending=True, stable=True).indices[:k].sort().values
    threshold, ties = kth_largest([keys], k)
    chosen = keys > threshold
    chosen[(keys == threshold).nonzero().flatten()[:ties]] = True
    return chosen.nonzero().flatten()


class Pool:
    """The largest keys over targets that are added one after another; holds at most twice as many as it shall give.

    Of equal keys those of the target added first are taken, within a target the first.

    Args:
        size: how many to give.
    """

    def __init__(self, size: int) -> None:
        self.size, self.threshold, self._held = size, EXCLUDED, 0
        self._parts: list[tuple[str, Tensor, Tensor]] = []

    def add(self, name: str, keys: Tensor, limit: int) -> None:
        """Enter the keys of a target, of which at most `limit` may be chosen."""
        better = keys > self.threshold
        room = min(limit, self.size)
        positions = largest(keys, room) if int(better.sum()) > room else better.nonzero().flatten()
        self._parts.append((name, keys[positions], positions))
        self._held += positions.numel()
        if self._held > 2 * self.size:
            self._prune()

    def chosen(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Keys and positions, ascending, of what is chosen, by target."""
        self._prune()
        return {name: (keys, positions) for name, keys, positions in self._parts}

    def _prune(self) -> None:
        if self._held <= self.size:
            return
        if self.size == 0:
            self._parts, self._held = [], 0
            return
        self.threshold, ties = kth_largest([keys for _, keys, _ in self._parts], self.size)
        kept = []
        for name, keys, positions in self._parts:
            keep = keys > self.threshold
            equal = (keys == self.threshold).nonzero().flatten()[:ties]
            ties -= equal.numel()
            keep[equal] = True
            kept.append((name, keys[keep], positions[keep]))
        self._parts, self._held = kept, self.size


def _bucket(parts: Sequence[tuple[Tensor, int | None]], k: int) -> tuple[int, int]:
    """The value of 16 bits that the k-th largest has, and how many are above it.

    The upper 16 bits (as 0 to 65535) of all keys, or the lower ones of the keys with the given upper bits.
    """
    counts = torch.zeros(65536, dtype=torch.int64)
    for keys, upper in parts:
        part = torch.zeros(65536, dtype=torch.int64, device=keys.device)
        for chunk in keys.split(CHUNK):
            values = (chunk >> 16) + 32768 if upper is None else chunk[(chunk >> 16) == upper] & 0xFFFF
            part += torch.bincount(values, minlength=65536)
        counts += part.cpu()
    from_top = counts.flip(0).cumsum(0)
    place = int((from_top < k).sum())
    return 65535 - place, int(from_top[place - 1]) if place else 0
