"""Two ways to give a weight other entries: some are dropped and others grown, or all of them are drawn anew."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..adapters.frozen import Frozen
from ..kernels import ops
from ..kernels.topk import largest, order_keys
from ..layers.entries import Candidates
from ..layers.sites import Site
from ..layers.units import Pattern, Units

NEW = -1  # where an entry stood before that did not train


def regrow(site: Site, units: Units, grown: Tensor, moved: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Drop the units that moved least, which go back to their base values, and train as many others in their place.

    Args:
        site: the weight, which holds its trained values.
        units: its entries, or its columns.
        grown: `[n]`, units that do not train, sorted.
        moved: `[nnz]`, how far each entry moved; a unit with one that is NaN is dropped last.
        optimizer: holds the moments of the entries.
    """
    entries, indices, weight = site.entries, site.entries.indices, site.weight.data
    held = Units(units.outer, moved.numel() // units.size, units.inner)
    dropped = held.entries(_least(moved.abs().view(held.outer, held.count, held.inner).sum((0, 2)), grown.numel())).long()
    grown = units.entries(grown).to(indices)
    ops.patch_(weight, indices[dropped], entries.base[dropped], None)
    stays = torch.ones_like(indices, dtype=torch.bool).index_fill_(0, dropped, False)
    kept = stays.nonzero().flatten()
    indices, order = torch.cat([indices[kept], grown]).sort()
    source = torch.cat([kept, kept.new_full(grown.shape, NEW)])[order]
    base = torch.cat([entries.base[kept], ops.gather(weight, grown)])[order]
    delta = carried(entries.delta.detach(), source)
    replace(site, indices, base, delta, source, optimizer)


def redraw(site: Site, indices: Tensor, frozen: Frozen, optimizer: torch.optim.Optimizer) -> Frozen:
    """Leave what was trained in the weight, and train the entries of another mask, from zero.

    Args:
        site: the weight, which holds its trained values.
        indices: `[nnz]`, flat positions, sorted, as many as train already.
        frozen: the entries of the weight that were left behind earlier.
        optimizer: holds the moments of the entries.

    Returns:
        The entries of the weight that are left behind.
    """
    entries, before, weight = site.entries, site.entries.indices, site.weight.data
    left = frozen.extended(before, ops.gather(weight, before), entries.base)
    mark_frozen(site)
    nearest = torch.searchsorted(before, indices).clamp_(max=indices.numel() - 1)
    source = torch.where(before[nearest] == indices, nearest, NEW)
    base = ops.gather(weight, indices)
    replace(site, indices, base, torch.zeros_like(entries.delta), source, optimizer)
    return left


def watch(site: Site, candidates: Candidates | None) -> None:
    """Show the gradient of the whole weight to `candidates` from the next forward pass on, or to nobody."""
    scores = getattr(candidates, "scores", None)
    for module, parameter in site.owners:
        target = module.sparse_target(parameter)
        target.candidates, target.scores = candidates if scores is None else None, scores


def mark_frozen(site: Site) -> None:
    """Remember that frozen entries of an earlier mask lie in the weight."""
    for module, parameter in site.owners:
        module.sparse_target(parameter).frozen = True


def moments(site: Site, optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """The optimizer's tensors for the entries of a weight.

    Raises:
        RuntimeError: One of them has no element for each entry (quantized blocks, say), and cannot be moved.
    """
    delta = site.entries.delta
    for value in optimizer.state.get(delta, {}).values():
        if not isinstance(value, Tensor) or value.dim() == 0:
            continue
        if value.shape != delta.shape or not value.is_floating_point():
            raise RuntimeError(
                f"DynamicMask: {type(optimizer).__name__} keeps a state of {list(value.shape)} {value.dtype} for "
                f"{site.name}, expected {list(delta.shape)} in floating point; use SparseAdamW or torch.optim.AdamW"
            )
        yield value


def replace(site: Site, indices: Tensor, base: Tensor, delta: Tensor, source: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Give a weight another pattern of as many entries; moments and gradient of an entry that stays go with it.

    The weight must hold `base + scale * delta`, or be written at its next use.

    Args:
        site: the weight.
        indices: `[nnz]`, flat positions, sorted.
        base: `[nnz]`, what the deltas are added to, in the weight's dtype.
        delta: `[nnz]`.
        source: `[nnz]`, where an entry stood before, or `NEW`.
        optimizer: holds the moments.
    """
    trained = site.entries.delta
    gradient = [] if trained.grad is None else [trained.grad]
    for values in (*moments(site, optimizer), *gradient):
        values.copy_(carried(values, source))
    trained.data.copy_(delta)
    pattern = Pattern.of(indices, site.units)
    for module, parameter in site.owners:
        module.sparse_target(parameter).redraw = None
        module.put_entries(parameter, pattern, base)


def carried(values: Tensor, source: Tensor) -> Tensor:
    """`values[source]`, zero where `source` is `NEW`."""
    return torch.where(source == NEW, torch.zeros_like(values), values[source.clamp(min=0)])


def _least(moved: Tensor, count: int) -> Tensor:
    """The places of the `count` smallest by magnitude, ascending."""
    nearness = moved.abs().neg().nan_to_num(nan=-math.inf)
    return largest(order_keys(nearness), count)
