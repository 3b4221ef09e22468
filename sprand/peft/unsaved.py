"""Warnings for what changes in the training of a PEFT model and PEFT does not save: parameters unfrozen by hand, and buffers."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..adapters.in_full import buffers_of, changed, copies, first_of

_tuners: weakref.WeakKeyDictionary[BaseTuner, dict[str, torch.Tensor]] = weakref.WeakKeyDictionary()  # with their buffers
_warned: weakref.WeakSet[BaseTuner] = weakref.WeakSet()
_hooks: list[object] = []

INSTEAD = "name its module in modules_to_save of SprandConfig, or train by sprand.apply and sprand.save, which keep it"


def remember(tuner: BaseTuner) -> None:
    """Look at what trains before every step of an optimizer, and at which buffers have changed when an adapter is saved."""
    _tuners.setdefault(tuner, copies(_buffers(tuner)))
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_look))


def warn_of_buffers(tuner: BaseTuner) -> None:
    """Say which buffers training has changed that PEFT saves with no adapter."""
    names = sorted(changed(_buffers(tuner), _tuners[tuner])) if tuner in _tuners else []
    if names:
        warnings.warn(
            f"save_pretrained: {first_of(names)} changed in training, and PEFT saves no buffers of the base model; {INSTEAD}",
            stacklevel=2,
        )


def _look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    if torch.compiler.is_compiling() or all(tuner in _warned for tuner in _tuners):
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for tuner in list(_tuners):
        names = [name for name, p in _unsaved(tuner) if id(p) in held]
        if names and tuner not in _warned:
            _warned.add(tuner)
            warnings.warn(
                f"{first_of(names)} trains beside the adapter of this PEFT model, and PEFT neither saves it nor takes it off; "
                f"{INSTEAD}",
                stacklevel=4,
            )


def _unsaved(tuner: BaseTuner) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that train and belong to no adapter."""
    own = {id(p) for module in tuner.model.modules() for p in _of_adapters(module)}
    return ((name, p) for name, p in tuner.model.named_parameters() if p.requires_grad and id(p) not in own)


def _of_adapters(module: nn.Module) -> Iterator[nn.Parameter]:
    if isinstance(module, AuxiliaryTrainingWrapper):
        yield from module.parameters()
    elif isinstance(module, BaseTunerLayer):
        for name in module.adapter_layer_names:
            part = getattr(module, name, None)
            yield from part.parameters() if isinstance(part, nn.Module) else ()


def _buffers(tuner: BaseTuner) -> dict[str, torch.Tensor]:
    """The buffers of the base model that PEFT leaves where they are."""
    wrapped = [f"{name}." for name, module in tuner.model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    return {name: buffer for name, buffer in buffers_of(tuner.model).items() if not name.startswith(tuple(wrapped))}
