"""Before an optimizer's first step: what was unfrozen by hand joins the adapter, and an optimizer made before `apply` is told."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..layers.sites import sites_of
from .in_full import optimizers, take_unfrozen
from .state import known_state, watched

ANEW = -1  # of an optimizer that is to be looked at as if it had made no step

_hooks: list[object] = []


def watch(model: nn.Module) -> None:
    """Look at every optimizer before its next step, and whenever it holds other parameters that train."""
    if model in watched:
        return
    watched.add(model)
    optimizers.update(dict.fromkeys(optimizers, ANEW))
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_look))


def _look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    if torch.compiler.is_compiling():
        return
    held = [p for group in optimizer.param_groups for p in group["params"]]
    trained = sum(id(p) for p in held if p.requires_grad)
    before = optimizers.get(optimizer)
    if before == trained:
        return
    optimizers[optimizer] = trained
    models = _models_of({id(p) for p in held})
    for model in models:
        state = known_state(model)
        if state is not None:
            _refuse_whole_targets(model, held)
            take_unfrozen(model, state)
    if before in (None, ANEW):
        _warn_of_early(optimizer, models, {id(p) for p in held})


def _models_of(held: set[int]) -> list[nn.Module]:
    """The models that an optimizer with these parameters trains: of no concern to it is what others hold."""
    return [model for model in list(watched) if any(id(p) in held for p in model.parameters())]


def _refuse_whole_targets(model: nn.Module, held: list[nn.Parameter]) -> None:
    """Prove that no weight of which entries train is about to be changed in full as well.

    Raises:
        ValueError: An optimizer holds one, and it has a gradient.
    """
    whole = {id(p) for p in held if p.requires_grad and p.grad is not None}
    for site in sites_of(model) if whole else ():
        if id(site.weight) in whole:
            raise ValueError(
                f"{site.name}: its chosen entries train, and this optimizer would change it in full as well; freeze it "
                "(requires_grad_(False)), or train it in full by modules_to_save of sprand.apply"
            )


def _warn_of_early(optimizer: torch.optim.Optimizer, models: list[nn.Module], held: set[int]) -> None:
    for model in models:
        sites = sites_of(model)
        frozen = {id(site.weight) for site in sites}
        trained = {id(delta) for site in sites for delta in site.deltas}
        if held & frozen and not held & trained:
            warnings.warn(
                f"this {type(optimizer).__name__} holds weights that sprand.apply froze ({len(held & frozen)} of them) and none "
                "of the entries that train, so its steps change none; make it after apply: sprand.SparseAdamW(model, lr=...)",
                stacklevel=4,
            )
            return
