"""Watches what operators allocate, and which of them write weights."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class WatchSizes(TorchDispatchMode):
    """Records every tensor of at least so many entries that an operator makes."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.seen = numel, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            fresh = isinstance(value, torch.Tensor) and value.numel() >= self.numel
            if fresh and not any(isinstance(a, torch.Tensor) and a.data_ptr() == value.data_ptr() for a in args):
                self.seen.append(f"{func} {list(value.shape)}")
        return result


class WritesSeen(TorchDispatchMode):
    """The operators that write chosen entries, in the order of their calls."""

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "sprand" and func._schema.name.endswith("_"):
            self.names.append(func._schema.name.removeprefix("sprand::"))
        return func(*args, **(kwargs or {}))
