"""Sites: the weights of a model by name, each once, with every module that holds it and the entries that train there."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import sharding
from .functional import Entries

Owner = tuple[nn.Module, str]


@dataclass
class Site:
    """A weight of a model.

    Attributes:
        name: the weight's name in the model; the first one where several modules share it.
        owners: every module that holds it, with its name there.
        shape: the shape of the whole weight, also where it is sharded or stored packed.
        device: where its entries are kept.
        backend: how a weight that is stored packed is read; None for an ordinary one.
    """

    name: str
    owners: list[Owner]
    shape: tuple[int, ...]
    device: torch.device
    backend: Any = None

    @property
    def module(self) -> nn.Module:
        """The first module that holds the weight."""
        return self.owners[0][0]

    @property
    def parameter(self) -> str:
        """The weight's name in that module."""
        return self.owners[0][1]

    @property
    def weight(self) -> Tensor | None:
        """The weight itself; a packed one may have no parameter of that name."""
        return self.module._parameters.get(self.parameter)

    @property
    def numel(self) -> int:
        """How many entries the whole weight has."""
        return math.prod(self.shape)

    @property
    def entries(self) -> Entries:
        """The trained entries of the weight."""
        return self.module.sparse_entries(self.parameter)

    def share(self, other: Site) -> None:
        """Let the owners of another site of the same weight be owners of this one."""
        known = {(id(module), parameter) for module, parameter in self.owners}
        self.owners += [owner for owner in other.owners if (id(owner[0]), owner[1]) not in known]


def site_of(name: str, module: nn.Module, parameter: str) -> Site:
    """The site of an ordinary parameter."""
    weight = module._parameters[parameter]
    return Site(name, [(module, parameter)], tuple(sharding.shape_of(weight)), weight.device)


def sites_of(model: nn.Module) -> list[Site]:
    """Every weight with trained entries, in the order of the model, tied ones once; also of a PEFT model."""
    sites: dict[int, Site] = {}
    for prefix, module in model.named_modules():
        if not hasattr(type(module), "sparse_sites"):
            continue
        for site in module.sparse_sites(prefix):
            key = id(module if site.weight is None else site.weight)
            sites.setdefault(key, site).share(site)
    return list(sites.values())


def weights_of(model: nn.Module) -> dict[str, Site]:
    """Every parameter of a model, by each name that it has there; a tied one is one site, under its first name."""
    return collected(model.named_modules(remove_duplicate=False))


def collected(modules: Iterator[tuple[str, nn.Module]]) -> dict[str, Site]:
    """The parameters of named modules, by each name; one that several modules share is one site, under its first name."""
    sites: dict[str, Site] = {}
    first: dict[int, Site] = {}
    for prefix, module in modules:
        for parameter, weight in module._parameters.items():
            if weight is not None:
                site = site_of(joined(prefix, parameter), module, parameter)
                sites[site.name] = first.setdefault(id(weight), site)
                sites[site.name].share(site)
    return sites


def joined(prefix: str, name: str) -> str:
    """A name inside of a module, as the model calls it."""
    return f"{prefix}.{name}" if prefix else name
