"""A model as it was: training mode, gradients, flags, buffers and random states are put back after calibration."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def untouched(model: nn.Module, checkpointing: bool = True) -> Iterator[None]:
    """Inside, the model has no gradients, trains nothing and is in evaluation mode; after, all is as before, bit for bit.

    Gradient checkpointing of Hugging Face models works in training mode only; where it is on, and `checkpointing` wanted,
    the model is in training mode but for its dropout and batch normalization.
    """
    modes = [(module, module.training) for module in model.modules()]
    parameters = [(p, p.requires_grad, p.grad, p._post_accumulate_grad_hooks) for p in model.parameters()]
    buffers = [
        (module, name, value, None if value is None or value.is_meta else value.detach().clone())
        for module in model.modules()
        for name, value in module._buffers.items()
    ]
    state = random_states()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices=devices), torch.enable_grad(), _working(model, checkpointing):
            for p, _, _, _ in parameters:
                p.requires_grad_(False)
                p.grad = p._post_accumulate_grad_hooks = None  # hooks of the user might step an optimizer
            yield
    finally:
        set_random_states(state)
        for module, mode in modes:
            module.training = mode
        for p, flag, grad, hooks in parameters:
            p.requires_grad_(flag)
            p.grad, p._post_accumulate_grad_hooks = grad, hooks
        _restore_buffers(model, buffers)


def random_states() -> dict[str, Any]:
    """The states of the generators that batches are drawn with: Python's, NumPy's where it is in use, and torch's of the CPU."""
    numpy = sys.modules.get("numpy")
    states = {"python": random.getstate(), "torch": torch.get_rng_state()}
    return states if numpy is None else states | {"numpy": numpy.random.get_state()}


def set_random_states(states: dict[str, Any]) -> None:
    """Put the generators back into the states that `random_states` gave."""
    random.setstate(states["python"])
    torch.set_rng_state(states["torch"])
    if "numpy" in states:
        sys.modules["numpy"].random.set_state(states["numpy"])


def _restore_buffers(model: nn.Module, buffers: list[tuple[nn.Module, str, Tensor | None, Tensor | None]]) -> None:
    known = {(id(module), name) for module, name, _, _ in buffers}
    for module in model.modules():
        for name in [name for name in module._buffers if (id(module), name) not in known]:
            del module._buffers[name]
    for module, name, value, copy in buffers:
        if copy is not None and not torch.equal(value, copy):  # NaN is copied again, to the same bits
            with torch.no_grad():
                value.copy_(copy)
        module._buffers[name] = value


@contextmanager
def _working(model: nn.Module, checkpointing: bool) -> Iterator[None]:
    """Evaluation mode, or what gradient checkpointing needs in a frozen model."""
    new, old = "is_activation_checkpointing", "is_gradient_checkpointing"  # Hugging Face's names since 5.x and before
    on = checkpointing and getattr(model, new if hasattr(model, new) else old, False)
    model.train(bool(on))
    for module in model.modules():
        if on and isinstance(module, (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)):
            module.eval()
        if isinstance(module, nn.RNNBase) and not module.dropout:
            module.train()  # cuDNN has no backward pass in evaluation mode
    embedding = model.get_input_embeddings() if on and hasattr(model, "get_input_embeddings") else None
    if embedding is None:
        yield
        return
    handle = embedding.register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))
    try:
        yield
    finally:
        handle.remove()
