"""Ranking: the units with the largest scores, of each target and over all targets together, within a number of entries."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.topk import EXCLUDED, Pool, largest
from ..layers.sites import Site
from ..layers.units import Units


@dataclass
class Bounds:
    """How many units of one target a choice by scores takes.

    Attributes:
        site: the target.
        units: what is chosen of it.
        least: so many of its largest scores are taken in any case.
        most: no more than so many are taken.
        avoided: units that may not be chosen.
    """

    site: Site
    units: Units
    least: int
    most: int
    avoided: Tensor | None


class Ranking:
    """The largest scores of targets that are added one after another.

    Attributes:
        not_positive: how many of the chosen entries are in units that have no positive score.
    """

    def __init__(self, shared: int) -> None:
        """`shared` entries are chosen over all targets together, beside the least of each."""
        self.not_positive = 0
        self._shared = shared
        self._pools: dict[int, Pool] = {}
        self._sizes: dict[str, int] = {}
        self._chosen: dict[str, Tensor] = {}

    def add(self, bounds: Bounds, keys: Tensor) -> None:
        """Take the largest keys of a target, and enter the others in the competition of all targets; `keys` is changed."""
        name, size = bounds.site.name, bounds.units.size
        first = largest(keys, bounds.least)
        self._count(keys[first], size)
        self._chosen[name], self._sizes[name] = first, size
        if bounds.most > bounds.least:
            keys[first] = EXCLUDED
            pool = self._pools.setdefault(size, Pool(self._shared // size))
            pool.add(name, keys, bounds.most - bounds.least)

    def chosen(self) -> dict[str, Tensor]:
        """The chosen units, ascending, by target.

        Where units differ in size they are taken by their scores as long as they fit: what is left is less than one more takes.
        """
        best = {name: part for pool in self._pools.values() for name, part in pool.chosen().items()}
        best = {name: best[name] for name in self._chosen if name in best}
        if len(self._pools) > 1:
            best = self._fitting(best)
        for name, (keys, positions) in best.items():
            self._count(keys, self._sizes[name])
            self._chosen[name] = torch.cat([self._chosen[name], positions]).sort().values
        return self._chosen

    def _fitting(self, best: dict[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
        """Those of the best units, in the order of their keys, that fit into the shared number of entries."""
        counts = [keys.numel() for keys, _ in best.values()]
        keys = torch.cat([keys.cpu() for keys, _ in best.values()])
        sizes = torch.tensor([self._sizes[name] for name in best]).repeat_interleave(torch.tensor(counts))
        left, room = keys.sort(descending=True, stable=True).indices, self._shared
        taken = torch.zeros(keys.shape, dtype=torch.bool)
        while left.numel():
            left = left[sizes[left] <= room]
            ends = sizes[left].cumsum(0)
            fit = int((ends <= room).sum())
            taken[left[:fit]] = True
            room -= int(ends[fit - 1]) if fit else 0
            left = left[fit:]
        parts = zip(best.items(), taken.split(counts), strict=True)
        return {name: (keys[own.to(keys.device)], at[own.to(at.device)]) for (name, (keys, at)), own in parts}

    def _count(self, keys: Tensor, size: int) -> None:
        self.not_positive += int((keys <= 0).sum()) * size
