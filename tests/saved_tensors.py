"""What autograd keeps between forward and backward, and masks of whole columns."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def columns_in(shape: tuple[int, int], features: Tensor, transposed: bool = False) -> Tensor:
    """The flat indices of all entries that belong to some input features, int32."""
    chosen = torch.zeros(shape, dtype=torch.bool)
    chosen[features if transposed else (slice(None), features)] = True
    return chosen.flatten().nonzero().flatten().int()


def masks(model: nn.Module, features: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: columns_in(model.get_parameter(name).shape, at) for name, at in features.items()}


def kept(run, *weights: Tensor) -> dict[tuple[int, ...], int]:
    """Bytes that autograd keeps beside `weights`, by shape of what lies in a piece of memory."""
    known, found = {w.untyped_storage().data_ptr() for w in weights}, {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = tuple(tensor.shape), storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    total: dict[tuple[int, ...], int] = {}
    for shape, size in found.values():
        total[shape] = total.get(shape, 0) + size
    del output
    return total


def own(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
