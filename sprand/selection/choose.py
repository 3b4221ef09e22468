"""Choosing: the indices of every target, from a random draw, given masks, or the scores of a strategy."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import pattern
from ..config import SparseConfig
from ..targets import Place, find_targets, saved_parameters
from ..topk import EXCLUDED, Pool, largest, order_keys
from .calibration import Calibration, calibrate
from .mask import Mask, selection_of
from .strategies import Stats, strategy_of


def select(
    model: nn.Module,
    config: SparseConfig | None = None,
    *,
    data: Iterable[Any] | None = None,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    calibration_memory: int | str = "auto",
    calibration_dtype: torch.dtype = torch.float32,
    calibration_device: torch.device | str | None = None,
    calibration_examples: int | None = 1024,
    **fields: Any,
) -> Mask:
    """Choose which entries of a model to train; the model is left as it was, bit for bit.

    The result can be given to `apply` as its strategy: `apply(model, strategy=select(model, ...))`.

    Args:
        model: any module without trained entries.
        config: what to choose; or its fields as keywords, `select(model, strategy="snip", density=0.01, data=batches)`.
        data: batches to calibrate on, for strategies with gradients: any iterable of tensors, tuples or mappings with
            tensors. Several passes (a small `calibration_memory`, `"grasp"`) need one that can be read again.
        loss_fn: `loss_fn(model, batch)` gives the loss, a mean over the batch; by default that of the model's output.
        calibration_memory: bytes for accumulated gradients: where those of all targets take more, several passes are made
            over the data, each for some of the layers. `"auto"` is half of the memory that is free.
        calibration_dtype: of accumulated gradients, `torch.float32` or `torch.bfloat16`.
        calibration_device: where gradients are accumulated; by default beside their weights.
        calibration_examples: stop after the batch that reaches as many examples; None reads all data.
        **fields: fields of `SparseConfig`.

    Returns:
        `{parameter name: indices [nnz]}`, flat, sorted, distinct, int32 (int64 from 2**31 entries), on the weight's device;
        a dict that also saves itself, `mask.save(path)`, and is read by `sprand.Mask.load(path)`.

    Raises:
        ValueError: nothing is targeted, the budget does not fit, data or labels are missing, or a score is NaN.
    """
    if config is not None and fields:
        raise ValueError(f"give a config or its fields, not both (got a config and {', '.join(fields)})")
    if hasattr(model, "_sprand"):
        raise ValueError("this model trains entries already; call sprand.merge(model) or sprand.unmerge(model) first")
    config = config or SparseConfig(**fields)
    heads = saved_parameters(model, config)
    places = [place for place in find_targets(model, config) if place.name not in heads]
    run = Calibration(data, loss_fn, calibration_memory, calibration_dtype, calibration_device, calibration_examples)
    indices = choose(model, config, places, heads, run)
    return Mask(indices, {place.name: tuple(place.parameter.shape) for place in places}, selection_of(config))


def choose(
    model: nn.Module, config: SparseConfig, places: Sequence[Place], heads: Mapping[str, Tensor], run: Calibration
) -> dict[str, Tensor]:
    """The indices of every target, by parameter name.

    Raises:
        ValueError: the budget is larger than the targets hold or rounds to nothing, a given mask does not fit, or scores
            cannot be computed.
    """
    scored = not isinstance(config.strategy, Mapping) and config.strategy not in pattern.RANDOM_STRATEGIES
    for place in places:
        if place.parameter.is_meta and (scored or config.preserve_zeros):
            raise ValueError(f"strategy: {place.name} is on the meta device and has no values; load the weights first")
    if isinstance(config.strategy, Mapping):
        return _given(config, places)
    sizes = [int(place.parameter.count_nonzero()) if config.preserve_zeros else place.parameter.numel() for place in places]
    total = _total(model, config, sizes, heads)
    if scored:
        return _by_score(model, config, places, sizes, total, run)
    runs = [math.prod(pattern.run_of(config.layout, place.parameter.shape)) for place in places]
    counts = pattern.shares(sizes, total, runs)
    if not any(counts):
        raise ValueError(f"layout {config.layout!r}: {total} entries are less than one run of {max(runs)}; raise the budget")
    return {place.name: _drawn(config, place, count) for place, count in zip(places, counts, strict=True)}


def _given(config: SparseConfig, places: Sequence[Place]) -> dict[str, Tensor]:
    chosen = {}
    for place in places:
        indices = pattern.from_user(place.name, config.strategy[place.name], place.parameter.shape).to(place.parameter.device)
        if config.preserve_zeros:
            indices = indices[place.parameter.detach().flatten()[indices.long()] != 0]
        chosen[place.name] = indices
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


def _drawn(config: SparseConfig, place: Place, count: int) -> Tensor:
    """A random draw, of the entries that are not zero where zeros are kept."""
    weight = place.parameter
    if not config.preserve_zeros:
        return pattern.draw(config.strategy, place.name, weight.shape, count, config.seed, weight.device, config.layout)
    nonzero = weight.detach().flatten().nonzero().flatten()
    drawn = pattern.draw(config.strategy, place.name, nonzero.shape, count, config.seed, weight.device)
    return nonzero[drawn.long()].to(pattern.index_dtype(weight.numel()))


def _by_score(
    model: nn.Module, config: SparseConfig, places: Sequence[Place], sizes: Sequence[int], total: int, run: Calibration
) -> dict[str, Tensor]:
    known = strategy_of(config.strategy, "", run.data is not None)
    if known.wants_data and run.data is None:
        raise ValueError(
            f"strategy {_called(config)!r} needs data to calibrate on; give data=, batches with labels or with a loss_fn"
        )
    options = dict(known.options) | dict(config.strategy_options or {})
    shares = pattern.shares(sizes, total)
    floors, ceilings = _bounds(config, sizes, total)
    pool, chosen, below = Pool(total - sum(floors)), {}, 0
    with contextlib.closing(calibrate(model, places, known.needs, run, options)) as calibrated:
        for i, (place, stats) in enumerate(calibrated):
            keys = _keys(config, place, stats, options)
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
            stacklevel=4,
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
