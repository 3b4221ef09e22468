"""Two ways to give a weight other entries: some are dropped and others grown, or all of them are drawn anew."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..adapters.frozen import Frozen
from ..kernels import ops
from ..kernels.topk import largest, order_keys
from ..layers.sites import Site, carried

NEW = -1  # where an entry stood before that did not train


def regrow(site: Site, grown: Tensor, moved: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Drop the entries that moved least, which go back to their base values, and train as many others in their place.

    Args:
        site: the weight, which holds its trained values.
        grown: `[n]`, flat positions that do not train, sorted.
        moved: `[nnz]`, how far each entry moved; one that is NaN is dropped last.
        optimizer: holds the moments of the entries.
    """
    entries, weight = site.entries, site.weight.data
    dropped = _least(moved, grown.numel())
    ops.patch_(weight, entries.indices[dropped], entries.base[dropped], None)
    stays = torch.ones_like(entries.indices, dtype=torch.bool).index_fill_(0, dropped, False)
    kept = stays.nonzero().flatten()
    indices, order = torch.cat([entries.indices[kept], grown]).sort()
    source = torch.cat([kept, kept.new_full(grown.shape, NEW)])[order]
    base = torch.cat([entries.base[kept], ops.gather(weight, grown)])[order]
    delta = carried(entries.delta.detach(), source)
    site.replace(indices, base, delta, source, optimizer)


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
    entries, weight = site.entries, site.weight.data
    folded = frozen.fold(entries.indices, ops.gather(weight, entries.indices), entries.base)
    site.mark_folded()
    nearest = torch.searchsorted(entries.indices, indices).clamp_(max=indices.numel() - 1)
    source = torch.where(entries.indices[nearest] == indices, nearest, NEW)
    base = ops.gather(weight, indices)
    site.replace(indices, base, torch.zeros_like(entries.delta), source, optimizer)
    return folded


def _least(moved: Tensor, count: int) -> Tensor:
    """The places of the `count` smallest by magnitude, ascending."""
    nearness = moved.abs().neg().nan_to_num(nan=-math.inf)
    return largest(order_keys(nearness), count)
