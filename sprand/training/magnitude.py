"""How large the weights are that train: the root mean square of their base, whatever their entries have learned since."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..adapters.frozen import Frozen
from ..kernels import ops
from ..layers import sharding
from ..layers.sites import Site

CHUNK = 1 << 22  # entries that are read at once


def root_mean_square(sites: Sequence[Site], frozen: Mapping[str, Frozen]) -> float:
    """The root mean square of the base of all linear weights among some; of all of them, where none is linear.

    Args:
        sites: with trained entries; where they are sharded, every rank must call this.
        frozen: what earlier masks left in the weights, by their names.

    Raises:
        ValueError: A weight has no values here that can be read.
    """
    sites = [site for site in sites if is_linear(site)] or sites
    for site in sites:
        _prove_readable(site)
    squares = math.fsum(square for site in sites for square in _squares(site, frozen.get(site.name)))
    return math.sqrt(squares / sum(site.numel for site in sites))


def is_linear(site: Site) -> bool:
    """Whether a weight multiplies what its module is given: no bias, no norm, no embedding."""
    return len(site.shape) > 1 and not any(isinstance(module, (nn.Embedding, nn.EmbeddingBag)) for module, _ in site.owners)


def _squares(site: Site, frozen: Frozen | None) -> Iterator[float]:
    """Sums of the squares of a weight's base, one for each chunk."""
    weight = _dense(site).reshape(-1)
    put = []
    if site.backend is None:  # a packed weight is its base
        entries = site.entries
        put.append((entries.indices, entries.base))
    if frozen is not None:
        put.append((frozen.indices, frozen.base))
    starts = range(0, weight.numel(), CHUNK)
    parts = [_Parts(indices.to(weight.device), base, starts) for indices, base in put]
    sums = []
    for number, start in enumerate(starts):
        chunk = weight[start : start + CHUNK].to(ops.accumulation_dtype(weight.dtype), copy=True)
        for part in parts:
            indices, base = part[number]
            chunk[indices - start] = base.to(chunk)
        sums.append(chunk.square_().sum())
    return iter(torch.stack(sums).tolist())


class _Parts:
    """Entries of a weight, chunk by chunk: flat positions `[nnz]`, sorted, and the values of the base there."""

    def __init__(self, indices: Tensor, base: Tensor, starts: range) -> None:
        self.indices, self.base = indices, base
        first = torch.searchsorted(indices, torch.tensor(starts, dtype=indices.dtype, device=indices.device))
        self.bounds = [*first.tolist(), indices.numel()]

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        own = slice(self.bounds[number], self.bounds[number + 1])
        return self.indices[own].long(), self.base[own]


def _dense(site: Site) -> Tensor:
    """The whole weight as it is held now; of a packed one what it stands for."""
    if site.backend is None:
        return sharding.whole(site.weight)
    return site.backend.get_base_weight(site.module.get_base_layer()).detach()


def _prove_readable(site: Site) -> None:
    """Prove that a weight has values here.

    Raises:
        ValueError: It has none.
    """
    tensors = [site.weight] if site.backend is None else list(site.module.get_base_layer().parameters())
    if any(tensor.is_meta for tensor in tensors):
        raise ValueError(
            f"suggest_lr: expected the values of {site.name}, which is on the meta device (or offloaded); load the weights "
            "first, or give rms, the root mean square of the targeted weights"
        )
    if site.backend is None:
        return
    if not site.backend.supports_merge:
        raise ValueError(
            f"suggest_lr: expected a weight that can be read, got {site.name}, packed by {site.backend.backend_name}; give rms, "
            "the root mean square of the targeted weights in 16 bits"
        )
    if any(map(sharding.is_sharded, tensors)):
        raise ValueError(
            f"suggest_lr: {site.name} is packed by {site.backend.backend_name} and sharded, so that no rank can read it; call "
            "suggest_lr before the model is sharded, or give rms"
        )
