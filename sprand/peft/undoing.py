"""An adapter that PEFT could not add or load is taken back: the base model is what it was before, by value and by class."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import peft
from torch import nn

from .layer import SprandLayer, adapter_targets

Flags = dict[nn.Parameter, bool]


@contextmanager
def whole_or_not_at_all(model: nn.Module, adapter_name: str) -> Iterator[Flags]:
    """While the block runs an adapter is added; where that fails, what was added of it is taken away again.

    Args:
        model: the base model, with or without other adapters; the block gets which of its parameters train.
        adapter_name: of the adapter.
    """
    flags = {p: p.requires_grad for p in model.parameters()}
    modules = list(model.modules())
    there = {id(module) for module in modules}
    try:
        yield flags
    except BaseException:
        for module in modules:
            for name, child in list(module.named_children()):
                if not isinstance(child, SprandLayer):
                    continue
                if id(child) in there:
                    child.delete_adapter(adapter_name)
                else:
                    setattr(module, name, child.get_base_layer())
                    child.sprand_leave()
        put_flags(flags)
        raise


def take_back(model: nn.Module, adapter_name: str) -> None:
    """Take away an adapter whose file does not hold its values; without any other the base model is a plain one again.

    One that was there before, which PEFT does not tell from one that it has just added, stays as it is.
    """
    if not isinstance(model, peft.PeftModel) or not _is_just_added(model, adapter_name):
        return
    if len(model.peft_config) > 1:
        model.delete_adapter(adapter_name)
        return
    flags = model.base_model.__dict__["_flags"]
    base = model.unload()
    base.__dict__.pop("peft_config", None)
    put_flags(flags)


def _is_just_added(model: peft.PeftModel, adapter_name: str) -> bool:
    """Whether an adapter was made for a file: by its description or for inference, and it changes nothing yet."""
    config = model.peft_config[adapter_name]
    deltas = [target.deltas[adapter_name] for *_, target in adapter_targets(model, adapter_name)]
    return bool(config.targets or config.inference_mode) and not any(not p.is_meta and p.any() for p in deltas)


def put_flags(flags: Flags) -> None:
    """Let those parameters train that did before."""
    for p, flag in flags.items():
        p.requires_grad_(flag)
