"""Adapters of PEFT whose columns wait to be chosen while the model trains: found, so that it can choose them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from ..adapters.waiting import Door, Waiting, columns_at, doors
from ..layers.sites import Site
from .layer import SprandLayer


def register() -> None:
    """Let a model of PEFT in training find what waits."""
    doors.append(Door(_active, _any))


def waits(layer: SprandLayer, parameter: str, adapter_name: str) -> bool:
    """Whether an adapter's columns of a parameter keep the place of others; what a checkpoint has brought waits no more."""
    target = layer.sprand_targets[parameter]
    if adapter_name not in target.waiting:
        return False
    if torch.equal(columns_at(target.indices.pattern(adapter_name)), target.waiting[adapter_name][0]):
        return True
    del target.waiting[adapter_name]
    return False


def _active(module: nn.Module) -> list[Waiting]:
    return list(_of_layer(module)) if isinstance(module, SprandLayer) else []


def _any(module: nn.Module) -> bool:
    return isinstance(module, SprandLayer) and any(target.waiting for target in module.sprand_targets.values())


def _of_layer(layer: SprandLayer) -> Iterator[Waiting]:
    for parameter, target in layer.sprand_targets.items():
        for name in target.active:
            if waits(layer, parameter, name):
                columns, config = target.waiting[name]
                put = functools.partial(layer.sprand_put, parameter, name)
                site = _called(layer.sprand_site(parameter), layer)
                yield Waiting(site, name, config, columns.numel(), [target], put)


def _called(site: Site, layer: SprandLayer) -> Site:
    """The weight with the modules that are called: of a packed one this is the layer, which reads what it stands for."""
    return site if site.backend is None else replace(site, owners=[(layer, site.parameter)])
