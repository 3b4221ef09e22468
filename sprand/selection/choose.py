"""Choosing: the indices of every target, from a random draw, given masks, or the scores of a strategy."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.topk import EXCLUDED, order_keys
from ..layers.sites import Site
from ..layers.units import Units
from . import pattern
from .calibration import Calibration, calibrate
from .config import SparseConfig
from .inputs import SCORES as INPUT_SCORES
from .inputs import has_inputs
from .ranking import Bounds, Ranking
from .strategies import STRATEGIES, Stats, strategy_of
from .targets import Targets

Avoided = Mapping[str, Tensor]  # entries that may not be chosen, ascending, by the name of their site


def choose(
    config: SparseConfig,
    targets: Targets,
    run: Calibration | None = None,
    avoided: Avoided | None = None,
    may_wait: bool = False,
) -> dict[str, Tensor]:
    """The indices of every target, by the name of its site.

    Args:
        config: what to choose.
        targets: the weights that it means, without trained entries.
        run: what calibration may use.
        avoided: entries that may not be chosen.
        may_wait: where `waits` says so, draw columns that keep the place of those that are chosen while the model trains.

    Raises:
        ValueError: The budget is larger than the targets hold, or have free, or rounds to nothing, or to no column of a target; a
            given mask does not fit; or scores cannot be computed.
    """
    avoided, wait = avoided or {}, may_wait and waits(config, run)
    scored = targets.masks is None and config.strategy not in pattern.RANDOM_STRATEGIES and not wait
    for site in targets.sites:
        reads_values = scored or config.preserve_zeros or site.name in avoided
        if reads_values and site.weight.is_meta:
            raise ValueError(f"strategy: {site.name} is on the meta device and has no values; load the weights first")
    if targets.masks is not None:
        return _given(config, targets, avoided)
    sizes = [int(site.weight.count_nonzero()) if config.preserve_zeros else site.numel for site in targets.sites]
    total = _total(config, targets, sum(sizes))
    if wait:
        return _keeping_places(config, targets, sizes, total, avoided)
    if scored:
        return _by_score(config, targets, sizes, total, run or Calibration(), avoided)
    return _at_random(config, targets, sizes, total, avoided)


def waits(config: SparseConfig, run: Calibration | None = None) -> bool:
    """Whether a configuration leaves the choice to the first forward, or the first steps, of training."""
    known = STRATEGIES.get(config.strategy) if isinstance(config.strategy, str) else None
    return known is not None and known.columns and (run is None or run.data is None)


def _keeping_places(
    config: SparseConfig, targets: Targets, sizes: Sequence[int], total: int, avoided: Avoided
) -> dict[str, Tensor]:
    """Columns as many as are to be chosen, which are there until they are."""
    if config.scope == "global":
        raise ValueError(
            f"strategy {config.strategy!r} without data chooses while the model trains, when the number of columns of each "
            "target is settled; leave out scope='global', or give data="
        )
    if avoided:
        raise ValueError(
            f"strategy {config.strategy!r} without data knows of no entries to leave out; leave out disjoint, or give data="
        )
    _check_inputs(config, targets)
    return _at_random(dataclasses.replace(config, strategy="random", score_steps=None), targets, sizes, total, avoided)


def _check_inputs(config: SparseConfig, targets: Targets) -> None:
    """Prove that targets are what a strategy that looks at inputs can score."""
    for site in targets.sites:
        if not has_inputs(site):
            raise ValueError(
                f"strategy {_called(config)!r} scores the inputs of linear layers, and {site.name} is in a "
                f"{type(site.module).__name__}; leave it out, or choose by another strategy"
            )


def _total(config: SparseConfig, targets: Targets, size: int) -> int:
    """How many entries to choose of all targets, which have `size` that may train."""
    if isinstance(config.budget, int):
        return config.budget
    total = round(config.density * size if config.budget is None else config.budget * targets.numel)
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


def _units(config: SparseConfig, site: Site) -> Units:
    """What is chosen of a target as a whole."""
    return Units.of(site.shape, pattern.axis_of(config.layout, site))


def _shares(config: SparseConfig, targets: Targets, sizes: Sequence[int], total: int) -> list[int]:
    """How many entries of each target, whole columns.

    Raises:
        ValueError: They are more than the targets hold, or no column of a target.
    """
    if config.layout == pattern.COLUMNS:
        return column_shares({site.name: _units(config, site) for site in targets.sites}, total)
    return pattern.shares(sizes, total)


def column_shares(units: Mapping[str, Units], total: int) -> list[int]:
    """How many entries of each target make `total` of all, in whole columns.

    Args:
        units: the columns of each target, or its entries, by name.
        total: how many entries to choose; the columns have as many, or fewer by less than one column.

    Raises:
        ValueError: The targets hold fewer, or a target would get no column.
    """
    sizes = [unit.numel for unit in units.values()]
    counts = pattern.shares(sizes, total, [unit.size for unit in units.values()])
    without = [name for (name, unit), count in zip(units.items(), counts, strict=True) if unit.size > 1 and not count]
    if without:
        least = fewest_entries(units.values())
        raise ValueError(
            f"layout 'columns': {total:,} of {sum(sizes):,} entries leave no whole column to {', '.join(without[:3])}; from a "
            f"density of {_rounded_up(least / sum(sizes))} (a budget of {least:,}) on every target has one: raise it, or leave "
            "such targets out"
        )
    return counts


def fewest_entries(units: Collection[Units]) -> int:
    """From how many entries on, over all targets, each target has at least one column for sure."""
    return math.ceil(sum(unit.numel for unit in units) / min((unit.count for unit in units if unit.size > 1), default=1))


def _rounded_up(share: float) -> str:
    """A fraction in decimals, of four digits, and not below it."""
    digits = 3 - math.floor(math.log10(share))
    return f"{math.ceil(round(share * 10**digits, 6)) / 10**digits:g}"


def _at_random(config: SparseConfig, targets: Targets, sizes: Sequence[int], total: int, avoided: Avoided) -> dict[str, Tensor]:
    counts = _shares(config, targets, sizes, total)
    return {
        site.name: _drawn(config, site, count, avoided.get(site.name)) for site, count in zip(targets.sites, counts, strict=True)
    }


def _drawn(config: SparseConfig, site: Site, count: int, avoided: Tensor | None) -> Tensor:
    """A random draw, of the entries that are not zero where zeros are kept, and not of those to leave out."""
    draw = config.strategy, site.name
    axis = pattern.axis_of(config.layout, site)
    if avoided is not None and not config.preserve_zeros:
        return pattern.draw_free(*draw, site.shape, count, config.seed, avoided, axis)
    if not config.preserve_zeros:
        return pattern.draw(*draw, site.shape, count, config.seed, site.device, axis)
    nonzero = site.weight.detach().flatten().nonzero().flatten()
    if avoided is not None:
        nonzero = nonzero[~torch.isin(nonzero, avoided)]
        pattern.check_free(site.name, count, nonzero.numel())
    ranks = pattern.draw(*draw, nonzero.shape, count, config.seed, site.device)
    return nonzero[ranks.long()].to(pattern.index_dtype(site.numel))


def _by_score(
    config: SparseConfig, targets: Targets, sizes: Sequence[int], total: int, run: Calibration, avoided: Avoided
) -> dict[str, Tensor]:
    known = strategy_of(config.strategy, "", run.data is not None)
    if known.wants_data and run.data is None:
        raise ValueError(
            f"strategy {_called(config)!r} needs data to calibrate on; give data=, batches with labels or with a loss_fn"
        )
    if known.needs in INPUT_SCORES:
        _check_inputs(config, targets)
    options = dict(known.options) | dict(config.strategy_options or {})
    every = _bounds(config, targets, sizes, total, avoided)
    ranking = Ranking(total - sum(bounds.least * bounds.units.size for bounds in every))
    with contextlib.closing(calibrate(targets.model, targets.sites, known.needs, run, options)) as calibrated:
        for bounds, (_, stats) in zip(every, calibrated, strict=True):
            ranking.add(bounds, _keys(config, bounds, stats, options))
    chosen = ranking.chosen()
    if known.positive and ranking.not_positive:
        warnings.warn(
            f"{_called(config)}: {total:,} entries were asked for, but {ranking.not_positive:,} of the chosen have no positive "
            "score; lower the budget, or calibrate on more data",
            stacklevel=5,
        )
    return {bounds.site.name: _entries(bounds, chosen[bounds.site.name]) for bounds in every}


def _entries(bounds: Bounds, chosen: Tensor) -> Tensor:
    """The entries of a target's chosen units."""
    if bounds.units.size == 1:
        return chosen.to(pattern.index_dtype(bounds.site.numel))
    return bounds.units.entries(chosen)


def _keys(config: SparseConfig, bounds: Bounds, stats: Stats, options: Mapping[str, Any]) -> Tensor:
    """The order of a target's units; zeros that are to stay and units to leave out come last."""
    name, weight = bounds.site.name, bounds.site.weight.detach()
    strategy = strategy_of(config.strategy, name, stats.gradient is not None)
    with torch.no_grad():
        score = strategy.score(weight, stats, **options)
    if score.isnan().any():
        raise ValueError(f"strategy {_called(config)!r}: {int(score.isnan().sum()):,} scores of {name} are NaN")
    means = score if strategy.columns else bounds.units.means(score, strategy.squares)
    keys = order_keys(means).to(weight.device)
    if config.preserve_zeros:
        keys.masked_fill_(weight.flatten() == 0, EXCLUDED)
    if bounds.avoided is not None:
        keys[bounds.avoided.to(keys.device)] = EXCLUDED
    return keys


def _bounds(config: SparseConfig, targets: Targets, sizes: Sequence[int], total: int, avoided: Avoided) -> list[Bounds]:
    """The least and the most units of each target; where every target has its share, both are the share."""
    units = [_units(config, site) for site in targets.sites]
    counts = [size // unit.size for size, unit in zip(sizes, units, strict=True)]
    if config.scope == "global":
        least = [int(config.min_density * count) for count in counts]
        most = [math.ceil(config.max_density * count) for count in counts]
        low, high = (sum(count * unit.size for count, unit in zip(limit, units, strict=True)) for limit in (least, most))
        if not low <= total <= high:
            raise ValueError(
                f"min_density and max_density: together the targets train {low:,} to {high:,} entries, but {total:,} were asked "
                "for"
            )
    else:
        shares = _shares(config, targets, sizes, total)
        least = most = [share // unit.size for share, unit in zip(shares, units, strict=True)]
    every = []
    for site, unit, low, high, size in zip(targets.sites, units, least, most, sizes, strict=True):
        entries = avoided.get(site.name)
        held = None if entries is None else unit.holding(entries)
        free = _free(config, site, unit, size, held)
        pattern.check_free(site.name, low * unit.size, free * unit.size)
        every.append(Bounds(site, unit, low, min(high, free), held))
    if avoided and config.scope == "global":
        room = sum(bounds.most * bounds.units.size for bounds in every)
        pattern.check_free("all targets together (within max_density)", total, room)
    return every


def _free(config: SparseConfig, site: Site, units: Units, size: int, held: Tensor | None) -> int:
    """How many units of the `size` entries that may train are not to be left out."""
    if held is None:
        return size // units.size
    if not config.preserve_zeros:
        return units.count - held.numel()
    return size - int(site.weight.detach().flatten()[held].count_nonzero())


def _called(config: SparseConfig) -> str:
    return config.strategy if isinstance(config.strategy, str) else getattr(config.strategy, "__name__", "callable")
