"""Reads of a weight past its module's forward: which of them use the weight, and what is said where they lose its gradient."""

from __future__ import annotations

import sys
import types
import warnings
from collections.abc import Mapping

import torch
from torch import nn

from .entries import Written

MOVERS = "accelerate."  # its hooks read what they move from device to device, in the call of a module
LIBRARIES = (MOVERS, "torch.", "transformers.")  # they read weights to print, tie or replace them
BETWEEN = ("sprand.", "peft.")  # their layers hand on what they wrap
NAMED = 5  # how many weights a warning names
_KNOWN = ("_parameters", "_buffers", "_modules", "_flat_weights")  # the last is that of recurrent layers, which we know
_CALL = nn.Module._call_impl.__code__


def is_to_be_moved() -> bool:
    """Whether a tool that moves tensors about reads a weight now, and must get the parameter itself."""
    return not torch.compiler.is_compiling() and _reader().startswith(MOVERS)


def refuse_merge(name: str) -> None:
    """Refuse a layer of PEFT that merges its adapter into a weight with entries, which would take out what it adds to them.

    Raises:
        ValueError: One reads the weight now, to merge.
    """
    reader = sys._getframe(3)  # behind the attribute of the module
    if reader.f_code.co_name == "merge" and reader.f_globals.get("__name__", "").startswith("peft.tuners."):
        raise ValueError(
            f"{name}: PEFT merges an adapter into this weight, and entries of it that train by sprand.apply would lose what it "
            "adds; call sprand.merge(model) or sprand.unmerge(model) first"
        )


def is_to_be_used() -> bool:
    """Whether what reads a weight now computes with it: in a call of any module, also when backward repeats that, or compiled."""
    if torch.compiler.is_compiling() or torch._C._current_graph_task_id() != -1:
        return True
    return is_running(_CALL)


def is_running(code: types.CodeType) -> bool:
    """Whether a function runs in this thread, now or further up the stack."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame is not None


def tell_of_holders(model: nn.Module, names: Mapping[int, str]) -> None:
    """Warn where a module holds a targeted weight in a list or dict of its own, from where it is read past every module.

    Args:
        model: any module.
        names: of the targeted weights, by their `id`.
    """
    held = {
        names[id(value)]: f"{type(module).__name__}.{attribute}"
        for module in model.modules()
        for attribute, values in module.__dict__.items()
        if isinstance(values, list | tuple | dict) and attribute not in _KNOWN
        for value in (values.values() if isinstance(values, dict) else values)
        if id(value) in names
    }
    if held:
        listed = ", ".join(f"{name} in {place}" for name, place in list(held.items())[:NAMED])
        warnings.warn(
            f"sprand: weights that train are held beside their modules as well, {listed}; what is computed from them there gives "
            "their entries no gradient. Read them from their modules, layer.weight, or keep them in a torch.nn.ParameterList",
            stacklevel=2,
        )


def tell_of_lost_gradient(name: str, written: Written | None) -> None:
    """Warn where a weight is read outside of any call, between its own forward and backward: a loss that uses it loses a part."""
    if written is None or not written.is_awaited or not torch.is_grad_enabled() or _reader().startswith(LIBRARIES):
        return
    warnings.warn(
        f"sprand: {name} is read outside of any forward while its gradient is still to come, and what a loss computes "
        "from it there gives its entries no gradient; compute that in the forward of a module, which may be one around the loss",
        stacklevel=4,
    )


def _reader() -> str:
    """The module whose code reads a weight."""
    frame = sys._getframe(1)
    while frame.f_globals.get("__name__", "").startswith(BETWEEN) and frame.f_back is not None:
        frame = frame.f_back
    return frame.f_globals.get("__name__", "")
