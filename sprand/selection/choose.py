"""Choosing: the indices of every target, from a random draw, given masks, or the scores of a strategy."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.topk import EXCLUDED, Pool, largest, order_keys
from . import pattern
from .calibration import Calibration, calibrate
from .config import SparseConfig
from .strategies import Stats, strategy_of
from .targets import Place


def choose(
    model: nn.Module,
    config: SparseConfig,
    places: Sequence[Place],
    heads: Mapping[str, Tensor],
    run: Calibration,
    avoided: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The indices of every target, by parameter name.

    Args:
        model: without trained entries.
        config: what to choose.
        places: its targets.
        heads: the parameters that train in full.
        run: what calibration may use.
        avoided: entries that may not be chosen, ascending, by parameter name.

    Raises:
        ValueError: the budget is larger than the targets hold, or have free, or rounds to nothing, a given mask does not fit, or
            scores cannot be computed.
    """
    avoided = avoided or {}
    scored = not isinstance(config.strategy, Mapping) and config.strategy not in pattern.RANDOM_STRATEGIES
    for place in places:
        if place.parameter.is_meta and (scored or config.preserve_zeros or place.name in avoided):
            raise ValueError(f"strategy: {place.name} is on the meta device and has no values; load the weights first")
    if isinstance(config.strategy, Mapping):
        return _given(config, places, avoided)
    sizes = [int(place.parameter.count_nonzero()) if config.preserve_zeros else place.parameter.numel() for place in places]
    total = _total(model, config, sizes, heads)
    if scored:
        return _by_score(model, config, places, sizes, total, run, avoided)
    runs = [math.prod(pattern.run_of(config.layout, place.parameter.shape)) for place in places]
    counts = pattern.shares(sizes, total, runs)
    if not any(counts):
        raise ValueError(f"layout {config.layout!r}: {total} entries are less than one run of {max(runs)}; raise the budget")
    return {
        place.name: _drawn(config, place, count, avoided.get(place.name)) for place, count in zip(places, counts, strict=True)
    }


def _given(config: SparseConfig, places: Sequence[Place], avoided: Mapping[str, Tensor]) -> dict[str, Tensor]:
    chosen = {}
    for place in places:
        indices = pattern.from_user(place.name, config.strategy[place.name], place.parameter.shape).to(place.parameter.device)
        if config.preserve_zeros:
            indices = indices[place.parameter.detach().flatten()[indices.long()] != 0]
        chosen[place.name] = indices
        if place.name in avoided and (both := int(torch.isin(indices, avoided[place.name]).sum())):
            raise ValueError(
                f"disjoint: {both:,} of the {indices.numel():,} given entries of {place.name} are among those to leave out; "
                "choose others, for example by sprand.select(model, disjoint=...)"
            )
    if not any(indices.numel() for indices in chosen.values()):
        raise ValueError("strategy: the given masks or indices choose no entry at all")
    return chosen


def _total(model: nn.Module, config: SparseConfig, sizes: Sequence[int], heads: Mapping[str, Tensor]) -> int:
    """How many entries to choose of all targets."""
    if config.budget is None:
        total = round(config.density * sum(sizes))
    elif isinstance(config.budget, float):
        total = round(config.budget * sum(p.numel() for name, p in model.named_parameters() if name not in heads))
    else:
        total = config.budget
    if total == 0:
        raise ValueError(
            f"density {config.density or config.budget} of the {sum(sizes):,} targeted entries rounds to 0 entries; raise it, or "
            "target more"
        )
    return total


def _drawn(config: SparseConfig, place: Place, count: int, avoided: Tensor | None) -> Tensor:
    """A random draw, of the entries that are not zero where zeros are kept, and not of those to leave out."""
    weight = place.parameter
    if avoided is not None and not config.preserve_zeros:
        return pattern.draw_free(config.strategy, place.name, weight.shape, count, config.seed, avoided, config.layout)
    if not config.preserve_zeros:
        return pattern.draw(config.strategy, place.name, weight.shape, count, config.seed, weight.device, config.layout)
    nonzero = weight.detach().flatten().nonzero().flatten()
    if avoided is not None:
        nonzero = nonzero[~torch.isin(nonzero, avoided)]
        pattern.check_free(place.name, count, nonzero.numel())
    drawn = pattern.draw(config.strategy, place.name, nonzero.shape, count, config.seed, weight.device)
    return nonzero[drawn.long()].to(pattern.index_dtype(weight.numel()))


def _by_score(
    model: nn.Module,
    config: SparseConfig,
    places: Sequence[Place],
    sizes: Sequence[int],
    total: int,
    run: Calibration,
    avoided: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    known = strategy_of(config.strategy, "", run.data is not None)
    if known.wants_data and run.data is None:
        raise ValueError(
            f"strategy {_called(config)!r} needs data to calibrate on; give data=, batches with labels or with a loss_fn"
        )
    options = dict(known.options) | dict(config.strategy_options or {})
    shares = pattern.shares(sizes, total)
    floors, ceilings = _bounds(config, sizes, total)
    if avoided:
        free = [_free(config, place, size, avoided.get(place.name)) for place, size in zip(places, sizes, strict=True)]
        for place, count, left in zip(places, shares if config.scope == "local" else floors, free, strict=True):
            pattern.check_free(place.name, count, left)
        ceilings = [min(ceiling, left) for ceiling, left in zip(ceilings, free, strict=True)]
        if config.scope == "global":
            pattern.check_free("all targets together (within max_density)", total, sum(ceilings))
    pool, chosen, below = Pool(total - sum(floors)), {}, 0
    with contextlib.closing(calibrate(model, places, known.needs, run, options)) as calibrated:
        for i, (place, stats) in enumerate(calibrated):
            keys = _keys(config, place, stats, options)
            if place.name in avoided:
                keys[avoided[place.name].to(keys.device).long()] = EXCLUDED
            count = shares[i] if config.scope == "local" else floors[i]
            first = largest(keys, count)
            below += int((keys[first] <= 0).sum())
            chosen[place.name] = first
            if config.scope == "global":
                keys[first] = EXCLUDED
                pool.add(place.name, keys, ceilings[i] - floors[i])
    for name, (keys, positions) in pool.chosen().items() if config.scope == "global" else ():
        below += int((keys <= 0).sum())
        chosen[name] = torch.cat([chosen[name], positions]).sort().values
    if known.positive and below:
        warnings.warn(
            f"{_called(config)}: {total:,} entries were asked for, but {below:,} of the chosen have no positive score; lower the "
            "budget, or calibrate on more data",
            stacklevel=5,
        )
    return {place.name: chosen[place.name].to(pattern.index_dtype(place.parameter.numel())) for place in places}


def _keys(config: SparseConfig, place: Place, stats: Stats, options: Mapping[str, Any]) -> Tensor:
    """The order of a target's entries; zeros that are to stay come last."""
    weight = place.parameter.detach()
    with torch.no_grad():
        score = strategy_of(config.strategy, place.name, stats.gradient is not None).score(weight, stats, **options)
    if score.isnan().any():
        raise ValueError(f"strategy {_called(config)!r}: {int(score.isnan().sum()):,} scores of {place.name} are NaN")
    keys = order_keys(score).to(weight.device)
    return keys.masked_fill_(weight.flatten() == 0, EXCLUDED) if config.preserve_zeros else keys


def _free(config: SparseConfig, place: Place, size: int, avoided: Tensor | None) -> int:
    """How many of the `size` entries that may train are not to be left out."""
    if avoided is None:
        return size
    if not config.preserve_zeros:
        return size - avoided.numel()
    return size - int(place.parameter.detach().flatten()[avoided.long()].count_nonzero())


def _bounds(config: SparseConfig, sizes: Sequence[int], total: int) -> tuple[list[int], list[int]]:
    """The least and the most entries of each target."""
    floors = [int(config.min_density * size) for size in sizes]
    ceilings = [math.ceil(config.max_density * size) for size in sizes]
    if config.scope == "global" and not sum(floors) <= total <= sum(ceilings):
        raise ValueError(
            f"min_density and max_density: together the targets train {sum(floors):,} to {sum(ceilings):,} entries, but "
            f"{total:,} were asked for"
        )
    return floors, ceilings


def _called(config: SparseConfig) -> str:
    return config.strategy if isinstance(config.strategy, str) else getattr(config.strategy, "__name__", "callable")
