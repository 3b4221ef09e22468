"""A warning for an optimizer made before `apply`: it holds weights that do not train any more, and none of what trains."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..layers.sites import sites_of

_models: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_seen: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
_hooks: list[object] = []


def watch(model: nn.Module) -> None:
    """Look at every optimizer once, before its next step: does it hold targets of this model, and none of its entries?"""
    _models.add(model)
    _seen.clear()
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_look))


def _look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    if torch.compiler.is_compiling() or optimizer in _seen:
        return
    _seen.add(optimizer)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for model in _models:
        sites = sites_of(model)
        frozen = {id(site.weight) for site in sites}
        trained = {id(site.entries.delta) for site in sites}
        if held & frozen and not held & trained:
            warnings.warn(
                f"this {type(optimizer).__name__} holds weights that sprand.apply froze ({len(held & frozen)} of them) and none "
                "of the entries that train, so its steps change none; make it after apply: sprand.SparseAdamW(model, lr=...)",
                stacklevel=3,
            )
            return
