"""Changes of a base model's weights, as adapters of every method make them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..kernels import ops
from ..kernels.dtypes import HALVES
from ..layers.sites import Site
from ..selection import pattern
from .plan import pristine

Sites = Mapping[str, Site]
Tensors = Mapping[str, Tensor]
Settings = Mapping[str, Any]  # what an adapter's configuration says


@dataclass
class Change:
    """What an adapter changes of one weight.

    Attributes:
        name: of the parameter in the base model.
        shape: of the parameter.
        indices: `[nnz]`, flat, ascending.
        values: `[nnz]` float32, or float64 for a weight of that, added to the base.
        base: `[nnz]`, what a 16-bit weight holds there; None for a weight of another dtype.
    """

    name: str
    shape: tuple[int, ...]
    indices: Tensor
    values: Tensor
    base: Tensor | None = None

    @classmethod
    def summed(cls, site: Site, flat: Tensor, values: Tensor) -> Change:
        """The change of one weight by values that may fall on the same entries, which add up.

        Args:
            site: the weight.
            flat: `[n]`, flat indices in any order.
            values: `[n]`.

        Raises:
            ValueError: The indices are none of the weight, or a value is not finite.
        """
        size, count = site.numel, flat.numel()
        if count != values.numel() or (count and not 0 <= int(flat.min()) <= int(flat.max()) < size):
            raise ValueError(f"{site.name}: expected as many values as indices, below {size:,}; the adapter is for another model")
        if not torch.isfinite(values).all():
            raise ValueError(f"{site.name}: the values of the adapter are not finite")
        union, inverse = torch.unique(flat, return_inverse=True)
        dtype = ops.accumulation_dtype(values.dtype)
        total = torch.zeros(union.shape, dtype=dtype).index_add_(0, inverse, values.to(dtype))
        return cls(site.name, site.shape, union.to(pattern.index_dtype(size)), total, _base_of(site, union))

    @property
    def module_name(self) -> str:
        """The module that holds the weight."""
        return self.name.rpartition(".")[0]

    def merged(self) -> Tensor:
        """What a 16-bit weight holds with the change, `[nnz]`."""
        return (self.base.float() + self.values).to(self.base.dtype)

    def exact(self) -> Change:
        """The same merged weight by values that others add to the base and round: merged - base, in 16 bits."""
        if self.base is None:
            return self
        return replace(self, values=self.merged().float() - self.base.float())


def site_named(folder: Path, sites: Sites, name: str) -> Site:
    """The weight of a name.

    Raises:
        ValueError: The base has none.
    """
    if name not in sites:
        raise ValueError(f"{folder} was made for another model: this one has no parameter {name!r}")
    return sites[name]


def _base_of(site: Site, indices: Tensor) -> Tensor | None:
    """What a 16-bit weight holds before any adapter, `[n]`; None for a weight of another dtype."""
    if site.weight is None or site.weight.dtype not in HALVES:
        return None
    with pristine(site):
        weight = site.weight.data.contiguous()
        return ops.gather(weight, indices.to(weight.device)).cpu()
