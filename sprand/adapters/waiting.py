"""Columns that wait to be chosen while the model trains: entries that keep their place, and how they are given others."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.topk import largest, order_keys
from ..layers import sharding
from ..layers.sites import Site, sites_of
from ..layers.units import Pattern
from ..selection.inputs import InputSums
from ..selection.strategies import STRATEGIES
from .state import Adapter, known_state

logger = logging.getLogger("sprand")
DEFAULT_STEPS = 8  # of training, whose gradients choose


@dataclass
class Waiting:
    """The entries of one weight, drawn to keep the place of those that are to be chosen.

    Attributes:
        site: the weight, with the modules that its inputs come into.
        adapter: the name of the adapter.
        config: of the adapter: by which score to choose, and after how many steps.
        count: how many columns to choose.
        targets: where the layers that use the weight look for `scores`, which their backward adds to.
        put: gives it other entries, `[nnz]`, flat and sorted.
    """

    site: Site
    adapter: str
    config: Any
    count: int
    targets: Sequence[Any]
    put: Callable[[Tensor], None]

    @property
    def score(self) -> str:
        """What the columns are chosen by, see `InputSums`."""
        return STRATEGIES[self.config.strategy].needs

    @property
    def steps(self) -> int:
        """How many steps of training choose; 0 where the first forward does."""
        return 0 if self.score == "activation" else self.config.score_steps or DEFAULT_STEPS

    def choose(self, sums: Tensor) -> None:
        """Take the columns with the largest sums `[inputs]`."""
        self.put(self.site.units.entries(largest(order_keys(sums).to(self.site.device), self.count)))


@dataclass(frozen=True)
class Door:
    """How adapters that wait are found in a module of a model.

    Attributes:
        active: those of the adapters that are active in this module, not counting what is inside of it.
        any: whether anything waits there, of any adapter.
    """

    active: Callable[[nn.Module], list[Waiting]]
    any: Callable[[nn.Module], bool]


def found(model: nn.Module) -> list[Waiting]:
    """What waits of the active adapters of a model."""
    return [waiting for module in model.modules() for door in doors for waiting in door.active(module)]


def settle(waiting: Sequence[Waiting], sums: InputSums, how: str) -> None:
    """Choose columns by the sums of all ranks.

    Args:
        waiting: what is to be chosen.
        sums: of this rank.
        how: what they were chosen by, for the log.
    """
    sums.agree()
    sums.finish(1)
    for one in waiting:
        one.choose(sums.values[one.site.name])
    columns = sum(one.count for one in waiting)
    logger.info("%d columns of %d weights were chosen by %s", columns, len(waiting), how)


def columns_at(pattern: Pattern) -> Tensor:
    """A copy of the columns `[c]` of a pattern, on the CPU; none where it has no whole ones."""
    return torch.empty(0, dtype=torch.int32) if pattern.columns is None else pattern.chosen.to("cpu", copy=True)


def refuse_waiting(waiting: bool, what: str) -> None:
    """Refuse what cannot be done with an adapter that waits.

    Raises:
        ValueError: It waits.
    """
    if waiting:
        raise ValueError(
            f"{what}: the columns of this adapter are chosen at the first training forward, or in the first steps where "
            "gradients choose, and are not yet; train first, or call sprand.choose(model, batch)"
        )


def _of_apply(model: nn.Module) -> list[Waiting]:
    """What waits of the active adapter of `sprand.apply`; what a checkpoint has brought waits no more."""
    state = known_state(model)
    adapter = None if state is None else state.current
    if adapter is None or not adapter.waiting:
        return []
    sites = [site for site in sites_of(model) if site.name in adapter.waiting]
    if not all(torch.equal(columns_at(site.entries.pattern), adapter.waiting[site.name]) for site in sites):
        adapter.waiting.clear()
        return []
    return [_waiting(state.active, adapter, site) for site in sites]


def _waiting(name: str, adapter: Adapter, site: Site) -> Waiting:
    targets = [module.sparse_target(parameter) for module, parameter in site.owners]
    put = functools.partial(_put, adapter, site)
    return Waiting(site, name, adapter.config, adapter.waiting[site.name].numel(), targets, put)


def _put(adapter: Adapter, site: Site, indices: Tensor) -> None:
    """Give a weight of `sprand.apply` its chosen entries; its delta is zero."""
    pattern = Pattern.of(indices, site.units)
    for module, parameter in site.owners:
        module.put_entries(parameter, pattern, pattern.gather(sharding.whole(module._parameters[parameter])))
    adapter.patterns[site.name] = site.entries.pattern
    del adapter.waiting[site.name]


def _any_of_apply(model: nn.Module) -> bool:
    state = known_state(model)
    return state is not None and any(adapter.waiting for adapter in state.adapters.values())


doors = [Door(_of_apply, _any_of_apply)]
