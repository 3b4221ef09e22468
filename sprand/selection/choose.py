"""Choosing: the indices of every target, from a random draw, given masks, or the scores of a strategy."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels.topk import EXCLUDED, Pool, largest, order_keys
from ..layers.sites import Site
from . import pattern
from .calibration import Calibration, calibrate
from .config import SparseConfig
from .strategies import Stats, strategy_of
from .targets import Targets

Avoided = Mapping[str, Tensor]  # entries that may not be chosen, ascending, by the name of their site


def choose(
    config: SparseConfig, targets: Targets, run: Calibration | None = None, avoided: Avoided | None = None
) -> dict[str, Tensor]:
    """The indices of every target, by the name of its site.

    Args:
        config: what to choose.
        targets: the weights that it means, without trained entries.
        run: what calibration may use.
        avoided: entries that may not be chosen.

    Raises:
        ValueError: The budget is larger than the targets hold, or have free, or rounds to nothing; a given mask does not fit; or
            scores cannot be computed.
    """
    avoided = avoided or {}
    scored = targets.masks is None and config.strategy not in pattern.RANDOM_STRATEGIES
    for site in targets.sites:
        reads_values = scored or config.preserve_zeros or site.name in avoided
        if reads_values and site.weight.is_meta:
            raise ValueError(f"strategy: {site.name} is on the meta device and has no values; load the weights first")
    if targets.masks is not None:
        return _given(config, targets, avoided)
    sizes = [_size(config, site) for site in targets.sites]
    total = _total(config, targets, sum(sizes))
    if scored:
        return _by_score(config, targets, sizes, total, run or Calibration(), avoided)
    return _at_random(config, targets, sizes, total, avoided)


def _size(config: SparseConfig, site: Site) -> int:
    """How many entries of a target may train."""
    return int(site.weight.count_nonzero()) if config.preserve_zeros else site.numel


def _total(config: SparseConfig, targets: Targets, size: int) -> int:
    """How many entries to choose of all targets, which have `size` that may train."""
    if config.budget is None:
        total = round(config.density * size)
    elif isinstance(config.budget, float):
        total = round(config.budget * targets.numel)
    else:
        total = config.budget
    if total == 0:
        raise ValueError(
            f"density {config.density or config.budget} of the {size:,} targeted entries rounds to no entry; raise it, or target "
            "more"
        )
    return total


def _given(config: SparseConfig, targets: Targets, avoided: Avoided) -> dict[str, Tensor]:
    """The entries of given masks; those of a weight on the meta device, where nothing can be kept, stay where they are."""
    chosen = {}
    for site in targets.sites:
        indices = pattern.from_user(site.name, targets.masks[site.name], site.shape)
        if site.device.type != "meta":
            indices = indices.to(site.device)
        if config.preserve_zeros:
            indices = indices[site.weight.detach().flatten()[indices.long()] != 0]
        chosen[site.name] = indices
        if site.name in avoided and (both := int(torch.isin(indices, avoided[site.name]).sum())):
            raise ValueError(
                f"disjoint: {both:,} of the {indices.numel():,} given entries of {site.name} are among those to leave out; "
                "choose others, for example by sprand.select(model, disjoint=...)"
            )
    if not any(indices.numel() for indices in chosen.values()):
        raise ValueError("mask: it chooses no entry at all; give a True or an index of at least one weight")
    return chosen


def _at_random(config: SparseConfig, targets: Targets, sizes: Sequence[int], total: int, avoided: Avoided) -> dict[str, Tensor]:
    runs = [math.prod(pattern.run_of(config.layout, site.shape)) for site in targets.sites]
    counts = pattern.shares(sizes, total, runs)
    if not any(counts):
        raise ValueError(f"layout {config.layout!r}: {total} entries are less than one run of {max(runs)}; raise the budget")
    return {
        site.name: _drawn(config, site, count, avoided.get(site.name)) for site, count in zip(targets.sites, counts, strict=True)
    }


def _drawn(config: SparseConfig, site: Site, count: int, avoided: Tensor | None) -> Tensor:
    """A random draw, of the entries that are not zero where zeros are kept, and not of those to leave out."""
    draw = config.strategy, site.name
    if avoided is not None and not config.preserve_zeros:
        return pattern.draw_free(*draw, site.shape, count, config.seed, avoided, config.layout)
    if not config.preserve_zeros:
        return pattern.draw(*draw, site.shape, count, config.seed, site.device, config.layout)
    nonzero = site.weight.detach().flatten().nonzero().flatten()
    if avoided is not None:
        nonzero = nonzero[~torch.isin(nonzero, avoided)]
        pattern.check_free(site.name, count, nonzero.numel())
    ranks = pattern.draw(*draw, nonzero.shape, count, config.seed, site.device)
    return nonzero[ranks.long()].to(pattern.index_dtype(site.numel))


@dataclass
class _Bounds:
    """How many entries of one target a choice by scores takes.

    Attributes:
        site: the target.
        least: so many of its largest scores are taken in any case.
        most: no more than so many are taken.
        avoided: entries that may not be chosen.
    """

    site: Site
    least: int
    most: int
    avoided: Tensor | None


def _by_score(
    config: SparseConfig, targets: Targets, sizes: Sequence[int], total: int, run: Calibration, avoided: Avoided
) -> dict[str, Tensor]:
    known = strategy_of(config.strategy, "", run.data is not None)
    if known.wants_data and run.data is None:
        raise ValueError(
            f"strategy {_called(config)!r} needs data to calibrate on; give data=, batches with labels or with a loss_fn"
        )
    options = dict(known.options) | dict(config.strategy_options or {})
    bounds = _bounds(config, targets.sites, sizes, total, avoided)
    ranking = _Ranking(total - sum(bound.least for bound in bounds))
    with contextlib.closing(calibrate(targets.model, targets.sites, known.needs, run, options)) as calibrated:
        for bound, (_, stats) in zip(bounds, calibrated, strict=True):
            ranking.add(bound, _keys(config, bound, stats, options))
    chosen = ranking.chosen()
    if known.positive and ranking.not_positive:
        warnings.warn(
            f"{_called(config)}: {total:,} entries were asked for, but {ranking.not_positive:,} of the chosen have no positive "
            "score; lower the budget, or calibrate on more data",
            stacklevel=5,
        )
    return {site.name: chosen[site.name].to(pattern.index_dtype(site.numel)) for site in targets.sites}


class _Ranking:
    """The largest scores of targets that are added one after another.

    Attributes:
        not_positive: how many of the chosen entries have no positive score.
    """

    def __init__(self, shared: int) -> None:
        """`shared` entries are chosen over all targets together, beside the least of each."""
        self.not_positive = 0
        self._pool = Pool(shared)
        self._chosen: dict[str, Tensor] = {}

    def add(self, bound: _Bounds, keys: Tensor) -> None:
        """Take the largest keys of a target, and enter the others in the competition of all targets; `keys` is changed."""
        first = largest(keys, bound.least)
        self._count(keys[first])
        self._chosen[bound.site.name] = first
        if bound.most > bound.least:
            keys[first] = EXCLUDED
            self._pool.add(bound.site.name, keys, bound.most - bound.least)

    def chosen(self) -> dict[str, Tensor]:
        """The positions of the chosen entries, ascending, by target."""
        for name, (keys, positions) in self._pool.chosen().items():
            self._count(keys)
            self._chosen[name] = torch.cat([self._chosen[name], positions]).sort().values
        return self._chosen

    def _count(self, keys: Tensor) -> None:
        self.not_positive += int((keys <= 0).sum())


def _keys(config: SparseConfig, bound: _Bounds, stats: Stats, options: Mapping[str, Any]) -> Tensor:
    """The order of a target's entries; zeros that are to stay and entries to leave out come last."""
    name, weight = bound.site.name, bound.site.weight.detach()
    with torch.no_grad():
        score = strategy_of(config.strategy, name, stats.gradient is not None).score(weight, stats, **options)
    if score.isnan().any():
        raise ValueError(f"strategy {_called(config)!r}: {int(score.isnan().sum()):,} scores of {name} are NaN")
    keys = order_keys(score).to(weight.device)
    if config.preserve_zeros:
        keys.masked_fill_(weight.flatten() == 0, EXCLUDED)
    if bound.avoided is not None:
        keys[bound.avoided.to(keys.device).long()] = EXCLUDED
    return keys


def _bounds(config: SparseConfig, sites: Sequence[Site], sizes: Sequence[int], total: int, avoided: Avoided) -> list[_Bounds]:
    """The least and the most entries of each target; where every target has its share, both are the share."""
    shares = pattern.shares(sizes, total)
    least = most = shares
    if config.scope == "global":
        least = [int(config.min_density * size) for size in sizes]
        most = [math.ceil(config.max_density * size) for size in sizes]
    if not sum(least) <= total <= sum(most):
        raise ValueError(
            f"min_density and max_density: together the targets train {sum(least):,} to {sum(most):,} entries, but "
            f"{total:,} were asked for"
        )
    bounds = [_Bounds(*fields, avoided.get(fields[0].name)) for fields in zip(sites, least, most, strict=True)]
    for bound, size in zip(bounds, sizes, strict=True):
        free = _free(config, bound, size)
        pattern.check_free(bound.site.name, bound.least, free)
        bound.most = min(bound.most, free)
    if avoided:
        pattern.check_free("all targets together (within max_density)", total, sum(bound.most for bound in bounds))
    return bounds


def _free(config: SparseConfig, bound: _Bounds, size: int) -> int:
    """How many of the `size` entries that may train are not to be left out."""
    if bound.avoided is None:
        return size
    if not config.preserve_zeros:
        return size - bound.avoided.numel()
    return size - int(bound.site.weight.detach().flatten()[bound.avoided.long()].count_nonzero())


def _called(config: SparseConfig) -> str:
    return config.strategy if isinstance(config.strategy, str) else getattr(config.strategy, "__name__", "callable")
